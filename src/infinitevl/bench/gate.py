"""No figure without a green gate: what is timed must first come as close to the truth as plain PyTorch does.

One walk (chat head, frames past the window, long text, single tokens) through a model of the full width and little
depth. The truth is float32, plain PyTorch, the delta rule token by token. Plain PyTorch in the dtype that is timed sets
the measure: every faster path may be at most twice as far from the truth.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from infinitevl import ops
from infinitevl.batch import StreamBatch
from infinitevl.bench import models
from infinitevl.bench.setup import Check, Setup
from infinitevl.bench.timing import Camera, Eager, Running, running
from infinitevl.config import SOFTMAX, ModelConfig, hybrid
from infinitevl.generate import feed, prefill
from infinitevl.memory import Memory
from infinitevl.model import Model
from infinitevl.record import RecordError
from infinitevl.stream import Stream, frame_step

FACTOR = 2.0  # how much farther from the truth than plain PyTorch a faster path may be
CEILING = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # how far plain PyTorch itself may be: more is no rounding
# e4m3 rounds 16 times as much as bfloat16, which takes this walk 0.04 off: blocks with random weights amplify both
CEILING[torch.float8_e4m3fn] = 0.6
COUNTERS = ("index", "seen", "frames", "clock", "origin")
QUESTION = "what does the sign over the door say"
SHARPNESS = 3.0  # of attention: random keys are seen almost evenly, and a fault among 8,192 would hide in the mean


Way = Callable[..., Running]  # (step, memory, *inputs): how a step is run


class GateError(RuntimeError):
    """A path that is not close enough to the truth; the message says which, and by how much."""


class Walk(NamedTuple):
    """What came out: hidden of the last token of each text [1, D], and the memory at the end."""

    hidden: list[Tensor]
    memory: Memory


def check(setup: Setup, whose: str, config: ModelConfig) -> Iterator[Check]:
    """Every path of a model: its distance from the truth. Raises GateError at the first that is too far, or fails."""
    try:
        for path, error, bound in _paths(setup, shallow(config)):
            yield passed(Check(f"{whose}, {path}", error, bound))
    except RecordError as error:
        raise GateError(f"gate: {whose}: {error}: no figures") from error
    finally:
        setup.quiet()


def passed(check: Check) -> Check:
    """The check, if it is green. Raises GateError where it is not; a NaN is no pass."""
    if not check.error <= check.bound:
        raise GateError(f"{check.told()}: no figures")
    return check


def _paths(setup: Setup, config: ModelConfig) -> Iterator[tuple[str, float, float]]:
    """(path, distance, bound) of every path of one model."""
    unstamped = replace(setup.scale.processor, stamp_seconds=None)
    model = lively(models.random_model(config, setup.device, setup.dtype, unstamped))
    exact = copy.deepcopy(model).float()
    plainly = {op: "reference" for op in ops.OPS}
    with ops.pinned(**plainly):
        apart = distance(_in_pieces(exact, setup), _in_one(exact, setup))
    yield "pieces against one pass, float32", apart, CEILING[torch.float32]
    with ops.pinned(**plainly | {"gated_delta": "recurrent"}):
        truth = walk(exact, setup, Eager)
    del exact
    with ops.pinned(**plainly):
        plain = distance(walk(model, setup, Eager), truth)
    yield f"plain PyTorch, {str(setup.dtype).removeprefix('torch.')}", plain, CEILING[setup.dtype]
    models.prepared(model)
    bound = max(FACTOR * plain, torch.finfo(setup.dtype).eps)
    if setup.fp8:
        yield "eager, before FP8", distance(walk(model, setup, Eager), truth), bound
        model.to_fp8()
        with ops.pinned(**plainly):
            plain = distance(walk(model, setup, Eager), truth)
        yield "plain PyTorch, FP8", plain, CEILING[torch.float8_e4m3fn]
        bound = FACTOR * plain
    ways: dict[str, Way] = {"eager": Eager}
    if setup.on_gpu:
        ways["recorded frames"] = running
    if config.text.window is not None:
        ways |= {"a stream": InAStream, "a slot of two": InASlot}
    for name, way in ways.items():
        yield name, distance(walk(model, setup, way), truth), bound


class InAStream:
    """A frame step and a question through a `Stream`, which records both on CUDA."""

    def __init__(self, step: partial[Memory], memory: Memory, *inputs: Tensor) -> None:
        self.stream = Stream(step.args[0], memory)

    def __call__(self, *inputs: Tensor) -> None:
        pixels, time = inputs
        self.stream.observe(pixels[0].cpu().numpy(), float(time))

    @property
    def memory(self) -> Memory:
        return self.stream.memory


class InASlot:
    """A frame step in a batch of two slots: every second frame is the other stream's too, and after the others it has
    one of its own, while this one waits."""

    def __init__(self, step: partial[Memory], memory: Memory, *inputs: Tensor) -> None:
        self.batch = StreamBatch(step.args[0], 2)
        self.other, self.slot, self.number = self.batch.open(), self.batch.open(), 0

    def __call__(self, *inputs: Tensor) -> None:
        pixels, time = inputs
        picture = pixels[0].cpu().numpy()
        mine, others = {self.slot: picture}, {self.other: picture}
        for shown in (mine, others) if self.number % 2 else (mine | others,):
            self.batch.observe(shown, float(time))
        self.number += 1

    @property
    def memory(self) -> Memory:
        return self.batch.fork(self.slot).memory


def shallow(config: ModelConfig) -> ModelConfig:
    """The same widths, window and mixers in two vision blocks and one block of each kind (tiny models stay whole)."""
    if len(config.text.layers) <= 8:
        return config
    layers = hybrid(1) if set(config.text.layers) != {SOFTMAX} else (SOFTMAX,) * 2
    return replace(
        config,
        vision=replace(config.vision, depth=2, full_attention_blocks=(1,)),
        text=replace(config.text, layers=layers),
    )


@torch.no_grad()
def lively(model: Model) -> Model:
    """The model with biases, norms and attention that matter: freshly made they are 0, 1 and almost even."""
    generator = torch.Generator(model.device).manual_seed(2)
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        if parameter.dim() == 1 and not name.endswith(("A_log", "dt_bias")):
            noise = torch.randn(parameter.shape, device=model.device, generator=generator)
            parameter.add_(0.3 * noise.to(parameter.dtype))
        if name.endswith("mixer.q.weight") and f"{name[:-8]}a.weight" not in named:
            parameter.mul_(SHARPNESS)
    return model


def _text(model: Model, setup: Setup, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, min(model.config.stop_tokens) // 2, (1, length), generator=generator)
    return ids.to(model.device)


def walk(model: Model, setup: Setup, way: Way) -> Walk:
    """Chat head and frames by `way`, a question, long text, four single tokens: always the same ones."""
    scale = setup.scale
    size = scale.processor.frame_pixels
    tokens = size[0] * size[1] // model.config.vision.stride**2
    windowless = model.config.text.window is None
    capacity = 128 + scale.gate_frames * tokens + scale.gate_text if windowless else None
    camera = Camera(size, model.device, frames=scale.gate_frames)
    _, memory = feed(model, model.empty_memory(capacity=capacity), model.processor.chat.head)
    run = way(partial(frame_step, model), memory, *camera(0))
    for number in range(scale.gate_frames):
        run(*camera(number))
    memory = _asked(model, run)
    ids = _text(model, setup, scale.gate_text)
    last, memory = prefill(model, memory, ids, chunk=scale.chunk)
    hidden = [last]
    for token in ids[0, :4].tolist():
        last, memory = feed(model, memory, [token])
        hidden.append(last)
    return Walk([each.clone() for each in hidden], memory)


def _asked(model: Model, run: Running) -> Memory:
    """The memory after a question that was kept without an answer: by text, or as a stream does it."""
    if isinstance(run, InAStream):
        run.stream.ask(QUESTION, at_most=0, keep=True)
        return run.memory
    chat = model.processor.chat
    _, memory = feed(model, run.memory, chat.tail(QUESTION))
    return feed(model, memory, (model.config.stop_tokens[0], *chat.reopen))[1]


@torch.no_grad()
def _in_one(model: Model, setup: Setup) -> Walk:
    """The text in one pass, without a memory."""
    ids = _text(model, setup, setup.scale.gate_text)
    positions = torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
    hidden, _ = model(model.embed(ids), positions)
    return Walk([hidden[:, -1]], model.empty_memory(capacity=_capacity(model, 1)))


def _in_pieces(model: Model, setup: Setup) -> Walk:
    """The same text through a memory, in pieces of odd lengths."""
    ids = _text(model, setup, setup.scale.gate_text)
    memory = model.empty_memory(capacity=_capacity(model, ids.shape[1]))
    for piece in ids.split([100, 1, ids.shape[1] - 101], dim=1):
        hidden, memory = prefill(model, memory, piece, chunk=setup.scale.chunk)
    return Walk([hidden], model.empty_memory(capacity=_capacity(model, 1)))


def _capacity(model: Model, tokens: int) -> int | None:
    return tokens if model.config.text.window is None else None


def distance(found: Walk, truth: Walk) -> float:
    """The greatest relative error of any text's last hidden and of any leaf; infinite where a counter differs."""
    if any(not torch.equal(getattr(found.memory, name), getattr(truth.memory, name)) for name in COUNTERS):
        return math.inf
    leaves = zip(found.memory.blocks, truth.memory.blocks, strict=True)
    pairs = list(zip(found.hidden, truth.hidden, strict=True))
    pairs += [pair for ours, theirs in leaves for pair in zip(ours, theirs, strict=True)]
    errors = [_relative(ours, right) for ours, right in pairs]
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def _relative(ours: Tensor, right: Tensor) -> float:
    size = right.double().norm()
    return float((ours.double() - right.double()).norm() / size) if size > 0 else float(ours.double().norm())
