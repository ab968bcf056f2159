"""`infinitevl bench --fp8`: frame, breakdown, decode and streams with e4m3 weights, after a gate of their accuracy.

Two factors with 3 bits of mantissa, each 2.5 % off (rms), make a product that is 3.5 % off. A block adds the outcome of
two or three such products one after the other to its input, one of them gated by another: 6 to 8 % of what it adds,
less where attention takes a mean. So a block may be 10 % off and no more: that is what FP8 is, and a scale, a bias or
a channel in the wrong place is many times that. What blocks amplify of each other's rounding is then no fault of the
products: the whole may be as far off as plain PyTorch in FP8 is, twice (`gate`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from infinitevl.bench import breakdown, frame, gate, models, streams, text
from infinitevl.bench.setup import OURS, BenchError, Check, Found, Part, Row, Setup, Suite
from infinitevl.config import ModelConfig
from infinitevl.model import Model
from infinitevl.ops import fp8
from infinitevl.vision import layout

BLOCK = 0.10  # of what a block adds: how far FP8 may take it from float32
TOKENS = 1024  # of the text that the blocks are tried on
PARTS: dict[str, Part] = {
    "frame": frame.measure,
    "breakdown": breakdown.measure,
    "decode": text.decode,
    "streams": streams.measure,
}


def suite(device: torch.device, budget: float, longest: float) -> Suite:
    """The parts with FP8 in the names of their rows, and the gate before them. BenchError where FP8 cannot be."""
    try:
        fp8.check(device, torch.bfloat16)
    except fp8.Fp8Error as error:
        raise BenchError(f"--fp8: {error}") from error
    return Suite({name: _named(part) for name, part in PARTS.items()}, check, budget, longest)


def _named(part: Part) -> Part:
    def measure(setup: Setup) -> Iterator[Found]:
        for found in part(setup):
            yield replace(found, name=named(found.name)) if isinstance(found, Row) else found

    return measure


def named(name: str) -> str:
    """The name of a figure by FP8."""
    return f"{name}, FP8"


def check(setup: Setup) -> Iterator[Check]:
    """Every block by itself, then every path of the whole. Raises GateError at the first that is too far off."""
    config = gate.shallow(setup.scale.config)
    for name, error in blocks(setup, config):
        yield gate.passed(Check(f"{OURS}, {name} in FP8", error, BLOCK))
    yield from gate.check(setup, OURS, setup.scale.config)


def blocks(setup: Setup, config: ModelConfig) -> Iterator[tuple[str, float]]:
    """(name, relative error of what the block adds to its input) of every block; its input is the exact one."""
    model = gate.lively(models.random_model(config, setup.device, setup.dtype, setup.scale.processor))
    exact = copy.deepcopy(model).float()
    models.prepared(model, fp8=True)
    yield from _vision_blocks(model, exact)
    yield from _text_blocks(model, exact)


@torch.no_grad()
def _vision_blocks(model: Model, exact: Model) -> Iterator[tuple[str, float]]:
    """Two windows by two of random patches."""
    config = model.config.vision
    side = 2 * config.window_pixels // config.patch_size
    where = layout(side, side, config, model.device)
    x = exact.vision.embed(_noise(model, side * side, config.patch_dim))
    for number, (mine, theirs) in enumerate(zip(model.vision.blocks, exact.vision.blocks, strict=True)):
        after = theirs(x.clone(), where)
        yield f"vision block {number}", _off(mine(x.to(model.dtype), where), x, after)
        x = after


@torch.no_grad()
def _text_blocks(model: Model, exact: Model) -> Iterator[tuple[str, float]]:
    """Random tokens, without a memory."""
    x = _noise(model, TOKENS, model.config.text.hidden_size)
    positions = torch.arange(TOKENS, device=model.device).expand(3, 1, -1)
    where = exact._where(positions, None, None, None)[0]
    for number, (mine, theirs) in enumerate(zip(model.blocks, exact.blocks, strict=True)):
        after, _ = theirs(x.clone(), where, None)
        got, _ = mine(x.to(model.dtype), where, None)
        yield f"{model.config.text.layers[number]} block {number}", _off(got, x, after)
        x = after


def _noise(model: Model, rows: int, size: int) -> Tensor:
    generator = torch.Generator(model.device).manual_seed(4)
    return torch.randn(1, rows, size, device=model.device, generator=generator)


def _off(got: Tensor, x: Tensor, after: Tensor) -> float:
    """How far `got` is from `after`, in parts of what was added to x."""
    return float((got.double() - after.double()).norm() / (after.double() - x.double()).norm())
