"""Stage 1a: teacher block and student block walk side by side on the teacher's hidden; the student learns its output.

Nothing is hooked: the teacher's output of a block is the input of the next, the loss of a block is taken backward
before the next is begun, so that memory is one block deep.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from infinitevl.config import DELTA
from infinitevl.model import Model
from infinitevl.train import names
from infinitevl.train.data import Batch
from infinitevl.train.forward import embedded, place
from infinitevl.train.losses import Loss, squared_error
from infinitevl.train.recipes import Recipe


def trains(model: Model, recipe: Recipe) -> list[str]:
    """The delta mixers."""
    return names.delta_mixers(model)


def loss(student: Model, teacher: Model | None, batch: Batch, recipe: Recipe) -> Iterator[Loss]:
    """For each delta block: squared difference to the teacher's block, mean over channels, over real tokens."""
    assert teacher is not None
    with torch.no_grad():
        hidden, where = embedded(teacher, batch), place(student, batch)
    for mixer, mine, theirs in zip(student.config.text.layers, student.blocks, teacher.blocks, strict=True):
        with torch.no_grad():
            after, _ = theirs(hidden.clone(), where, None)  # a block may write in place, and `mine` reads it too
        if mixer == DELTA:
            yield squared_error(mine(hidden, where, None)[0], after, batch.real)
        hidden = after
