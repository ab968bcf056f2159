"""Stage 3: cross-entropy on the answers of long rows, by LoRA on the text blocks or as stage 2 does."""

from __future__ import annotations

from infinitevl.model import Model
from infinitevl.train import names
from infinitevl.train.recipes import Recipe
from infinitevl.train.stage2_instruct import loss as loss


def trains(model: Model, recipe: Recipe) -> list[str]:
    """LoRA's matrices; with lora_rank=0 what the recipe's `trains` says."""
    return names.chosen(model, recipe)
