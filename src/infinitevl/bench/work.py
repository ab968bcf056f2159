"""FLOP that a step of training must do, counted from shapes: what utilisation and floors are held against.

Counted: products with weights (2 a weight and token forward, 2 for the gradient of what it reads where one is asked, 2
for its own where it trains), with the head only at tokens that the loss is over; scores and sums of attention at the
pairs that are seen, 4 a channel forward and 8 backward; the delta rule token by token, 6 a number of its state forward
and 12 backward. Not counted: norms, gates, convolutions, the optimiser, and what an implementation does more than that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from infinitevl.config import DELTA, SOFTMAX, TextConfig
from infinitevl.model import Model
from infinitevl.train import names
from infinitevl.train.begin import Run
from infinitevl.train.data import Batch
from infinitevl.train.losses import IGNORED

SUSTAINED = {"H200": 666e12}  # bf16 products of 8,192 over 12 s, measured, FLOP/s, by a part of torch's name


class Work(NamedTuple):
    """FLOP of some batches: what must be done, and what recomputing the blocks in the backward adds to it."""

    needed: int
    again: int


def sustained(device: torch.device) -> float | None:
    """FLOP/s that a device keeps up; None where nobody measured it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in SUSTAINED.items() if part in name), None)


def of(run: Run, batch: Batch) -> Work:
    """The work of a batch of a run's stage, on the process that has it."""
    lengths = conversations(batch)
    needed, again = blocks(run, lengths)
    if run.teacher is not None:
        needed += sum(_forward(run.teacher, number, lengths) for number in range(len(run.teacher.blocks)))
    return Work(needed + head(run, batch), again)


def conversations(batch: Batch) -> list[int]:
    """Tokens of each conversation of a batch, padding left out."""
    rows = zip(batch.segment, batch.real, strict=True)
    return [int(count) for segment, real in rows for count in segment[real].unique_consecutive(return_counts=True)[1]]


def blocks(run: Run, lengths: list[int]) -> Work:
    """The student's blocks. Stage 1a runs the delta blocks, each for itself; else a gradient goes down to the first
    block that trains, and the blocks that it passes are recomputed where the recipe says so."""
    student, trained = run.student, set(run.masters.live)
    needed = again = 0
    reached = False  # a block before this one trains, so that this one's input has a gradient
    for number, mixer in enumerate(student.config.text.layers):
        if not run.stage.end_to_end and mixer != DELTA:
            continue
        forward = _forward(student, number, lengths)
        backward = _backward(student, number, trained, lengths, reached and run.stage.end_to_end)
        needed += forward + backward
        again += forward if backward and run.recipe.checkpointing and run.stage.end_to_end else 0
        reached = reached or bool(backward)
    return Work(needed, again)


def head(run: Run, batch: Batch) -> int:
    """Logits and the gradient of what they are of (the head is frozen): of all tokens where the teacher's are learned,
    which also makes its own, of those with a label where answers are; none in stage 1a."""
    if not run.stage.end_to_end:
        return 0
    products = 2 if run.teacher is None else 3
    tokens = int((batch.labels != IGNORED).sum() if run.teacher is None else batch.real.sum())
    return 2 * products * tokens * run.student.embedding.weight.numel()


def pairs(lengths: list[int], window: int | None) -> int:
    """Pairs of a token and one that it sees: itself and those before it in its conversation, a window of them."""
    spans = [(length, length if window is None else min(length, window)) for length in lengths]
    return sum(span * (span + 1) // 2 + (length - span) * span for length, span in spans)


def _mixing(text: TextConfig, number: int, lengths: list[int]) -> int:
    """A mixer forward, its projections left out."""
    if text.layers[number] == SOFTMAX:
        return 4 * text.num_heads * text.head_dim * pairs(lengths, text.window)
    return 6 * text.delta_heads * text.delta_key_dim * text.delta_value_dim * sum(lengths)


def _weights(model: Model, number: int) -> dict[str, int]:
    """Sizes of a block's matrices by name."""
    named = model.blocks[number].named_parameters(prefix=f"blocks.{number}")
    return {name: p.numel() for name, p in named if p.dim() == 2 and not name.endswith("_conv")}


def _forward(model: Model, number: int, lengths: list[int]) -> int:
    products = 2 * sum(lengths) * sum(_weights(model, number).values())
    return products + _mixing(model.config.text, number, lengths)


def _backward(model: Model, number: int, trained: set[str], lengths: list[int], reached: bool) -> int:
    """A block backward; reached: its input has a gradient too. What reads that input directly are the mixer's first
    projections."""
    sizes = _weights(model, number)
    if not reached and not any(name.startswith(f"blocks.{number}.") for name in trained):
        return 0
    products = 0
    for name, size in sizes.items():
        first = names.part(name) == "mixer" and ".mixer.o." not in name and ".lora_B." not in name
        products += size * ((reached or not first) + (name in trained))
    return 2 * sum(lengths) * products + 2 * _mixing(model.config.text, number, lengths)
