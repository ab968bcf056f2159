"""What `data` of a recipe names. Apart from the rest, so that a worker process need not import the model."""

from __future__ import annotations

from infinitevl.config import ModelConfig
from infinitevl.processor import Processor
from infinitevl.train.data import DataError, Source
from infinitevl.train.recipes import Recipe


def open_source(recipe: Recipe, processor: Processor, config: ModelConfig) -> Source:
    """The source that a recipe's `data` names. Called once in every process that makes data."""
    if recipe.data != "synth":
        from infinitevl.train.conversations import open_files

        return open_files(recipe, processor, config)
    try:
        from infinitevl.train.synthetic import Synthetic
    except ImportError as error:
        raise DataError(f"data=synth needs {error.name}: pip install 'infinitevl[synth]'") from None
    return Synthetic(processor, config, recipe)
