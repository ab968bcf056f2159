"""Stage 1b: the student's delta mixers learn the teacher's distribution over the next word, end to end."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from infinitevl.model import Model
from infinitevl.train import names
from infinitevl.train.data import Batch
from infinitevl.train.forward import embedded, head_weight, place, through
from infinitevl.train.losses import Loss, divergence
from infinitevl.train.recipes import Recipe


def trains(model: Model, recipe: Recipe) -> list[str]:
    """The delta mixers."""
    return names.delta_mixers(model)


def loss(student: Model, teacher: Model | None, batch: Batch, recipe: Recipe) -> Iterator[Loss]:
    """KL of teacher and student at the recipe's temperature, over real tokens, those of pictures included."""
    assert teacher is not None
    where = place(student, batch)
    with torch.no_grad():
        theirs = through(teacher, embedded(teacher, batch), where, False)
    mine = through(student, embedded(student, batch), where, recipe.checkpointing)
    yield divergence(mine, head_weight(student), batch.real, theirs, head_weight(teacher), recipe.temperature)
