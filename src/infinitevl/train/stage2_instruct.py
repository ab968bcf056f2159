"""Stage 2: cross-entropy on answers. What trains is the recipe's choice; the paper's text says all mixers."""

from __future__ import annotations

from collections.abc import Iterator

from infinitevl.model import Model
from infinitevl.train import names
from infinitevl.train.data import Batch
from infinitevl.train.forward import embedded, head_weight, place, through
from infinitevl.train.losses import Loss, cross_entropy
from infinitevl.train.recipes import Recipe


def trains(model: Model, recipe: Recipe) -> list[str]:
    """What the recipe's `trains` says: deltas, mixers, mixers+mlp or all."""
    return names.chosen(model, recipe)


def loss(student: Model, teacher: Model | None, batch: Batch, recipe: Recipe) -> Iterator[Loss]:
    """Cross-entropy of the words of answers."""
    hidden = through(student, embedded(student, batch), place(student, batch), recipe.checkpointing)
    yield cross_entropy(hidden, head_weight(student), batch.labels)
