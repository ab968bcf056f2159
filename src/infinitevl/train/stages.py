"""The stages by name: what trains in each and what its loss is. The loop is handed one and knows nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from infinitevl.model import Model
from infinitevl.train import stage1_layers, stage1_logits, stage2_instruct, stage3_long
from infinitevl.train.data import Batch
from infinitevl.train.losses import Loss
from infinitevl.train.recipes import Recipe


class Stage(NamedTuple):
    """trains(model, recipe) -> names of what is trained. loss(student, teacher, batch, recipe) yields sums; each is
    taken backward before the next is asked for. end_to_end: the student's blocks run one after the other."""

    trains: Callable[[Model, Recipe], list[str]]
    loss: Callable[[Model, Model | None, Batch, Recipe], Iterator[Loss]]
    teacher: bool
    end_to_end: bool


STAGES = {
    "stage1_layers": Stage(stage1_layers.trains, stage1_layers.loss, teacher=True, end_to_end=False),
    "stage1_logits": Stage(stage1_logits.trains, stage1_logits.loss, teacher=True, end_to_end=True),
    "stage2_instruct": Stage(stage2_instruct.trains, stage2_instruct.loss, teacher=False, end_to_end=True),
    "stage3_long": Stage(stage3_long.trains, stage3_long.loss, teacher=False, end_to_end=True),
}
