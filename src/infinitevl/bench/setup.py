"""What is measured, and on what: the scale of a run, its models, and what a part may yield."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from infinitevl.bench import models
from infinitevl.config import SOFTMAX, ModelConfig, ProcessorConfig, infinitevl_4b, teacher_3b, tiny, tiny_processor
from infinitevl.model import Model


class BenchError(ValueError):
    """What was asked for cannot be measured; the message says why, in one line."""


@dataclass(frozen=True)
class Row:
    """One figure. value: the median where it was repeated `count` times; p99 of the same unit; floor: the bound that no
    code can pass on this hardware, where it is counted beside the figure."""

    part: str
    name: str
    unit: str
    value: float
    p99: float | None = None
    count: int = 1
    note: str = ""
    floor: float | None = None

    def told(self) -> str:
        return f"  {self.name}: {self.value:,.4g} {self.unit}" + (f" ({self.note})" if self.note else "")


class Skipped(NamedTuple):
    """What was not measured, and why."""

    part: str
    name: str
    reason: str

    def told(self) -> str:
        return f"  skipped {self.name}: {self.reason}"


class Check(NamedTuple):
    """A path of the gate: its distance from the truth, and what is still rounding."""

    path: str
    error: float
    bound: float

    def told(self) -> str:
        return f"gate: {self.path}: {self.error:.2e} from the truth, at most {self.bound:.2e} is rounding"


class Curve(NamedTuple):
    """Points of a figure: `whose` is "InfiniteVL" or "Transformer"; x and y are what the name says."""

    name: str
    whose: str
    x: list[float]
    y: list[float]

    def told(self) -> str:
        return f"  curve {self.name}: {len(self.x)} points"


Found = Row | Skipped | Curve | Check
OURS, THEIRS = "InfiniteVL", "Transformer"


@dataclass(frozen=True)
class Scale:
    """Sizes of a run. Lengths in tokens.

    frames: of the recorded stream; early: where its first frames are taken, once the start is over; late: how many
    last ones. whole: lengths at which the Transformer's prefill runs whole; sampled: where it is sampled. agree: how
    far sampling may be from the whole run, None where the machine is too noisy to say. shape: heads, key and value
    dim of the state update by itself, updates: its lengths, compiled: whether torch.compile is tried. gate_frames,
    gate_text: length of the gate's walk.
    """

    name: str
    config: ModelConfig
    teacher: ModelConfig
    processor: ProcessorConfig
    frames: int
    early: tuple[int, int]
    late: int
    eager: int
    steps: int
    slots: tuple[int, ...]
    lengths: tuple[int, ...]
    whole: tuple[int, ...]
    sampled: int | None
    agree: float | None
    chunk: int
    questions: int
    updates: tuple[int, ...]
    shape: tuple[int, int, int]
    compiled: bool
    gate_frames: int
    gate_text: int


def _hybrid_shape(config: ModelConfig) -> tuple[int, int, int]:
    return config.text.delta_heads, config.text.delta_key_dim, config.text.delta_value_dim


def _softmax_only(config: ModelConfig) -> ModelConfig:
    """The Transformer of the same size: every mixer softmax, no window."""
    return replace(config, text=replace(config.text, layers=(SOFTMAX,) * len(config.text.layers), window=None))


FULL = Scale(
    name="full",
    config=infinitevl_4b(),
    teacher=teacher_3b(),
    processor=ProcessorConfig(),
    frames=4096,
    early=(64, 160),
    late=96,
    eager=40,
    steps=200,
    slots=(4, 16),
    lengths=(4096, 32_768, 102_400, 262_144, 1_048_576),
    whole=(4096, 32_768, 102_400, 262_144),
    sampled=1_048_576,
    agree=0.03,
    chunk=8192,
    questions=50,
    updates=(1, 256, 4096),
    shape=_hybrid_shape(infinitevl_4b()),
    compiled=True,
    gate_frames=40,
    gate_text=9000,
)
QUICK = Scale(
    name="quick",
    config=tiny(),
    teacher=_softmax_only(tiny()),
    processor=tiny_processor(),
    frames=128,
    early=(16, 32),
    late=16,
    eager=12,
    steps=16,
    slots=(4,),
    lengths=(512, 4096),
    whole=(512, 1024),
    sampled=2048,
    agree=None,
    chunk=128,
    questions=5,
    updates=(1, 64, 256),
    shape=_hybrid_shape(tiny()),
    compiled=False,
    gate_frames=18,
    gate_text=300,
)
CPU = replace(
    QUICK,
    name="cpu",
    frames=1024,
    early=(64, 160),
    late=96,
    eager=40,
    steps=100,
    slots=(4, 16),
    lengths=(4096, 32_768),
    whole=(4096,),
    sampled=32_768,
    questions=30,
    updates=(1, 256, 4096),
    shape=_hybrid_shape(infinitevl_4b()),
    compiled=True,
)


@dataclass
class Setup:
    """A run's scale and device, and the model under test, made when it is first used. fp8: it multiplies e4m3."""

    scale: Scale
    device: torch.device
    full: bool
    deadline: float = math.inf  # on time.perf_counter's clock; what would end after it is not begun
    fp8: bool = False

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.perf_counter()

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def model(self) -> Model:
        """The published architecture (or the tiny one) with random weights."""
        return self.make(self.scale.config)

    def make(self, config: ModelConfig) -> Model:
        """A random model on this run's device, as fast as a loaded one."""
        return models.prepared(models.random_model(config, self.device, self.dtype, self.scale.processor), self.fp8)

    def drop_model(self) -> None:
        """Gives the model's memory back; it is made again where it is asked for again."""
        self.__dict__.pop("model", None)
        self.quiet()

    def quiet(self) -> None:
        """Between parts: what the last one held is given back."""
        if self.on_gpu:
            gc.collect()
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def fits(self, nbytes: int) -> bool:
        """Whether so many bytes more fit on the device, with a tenth and 2 GiB to spare."""
        if not self.on_gpu:
            return True
        self.quiet()
        return torch.cuda.mem_get_info(self.device)[0] > 1.1 * nbytes + (2 << 30)


Part = Callable[[Setup], Iterator[Found]]


class Suite(NamedTuple):
    """What one run measures: its parts by name, the gate before them, seconds after which no part begins, and how many
    must be left for one. together: several processes measure, and what fails in one must end them all."""

    parts: dict[str, Part]
    gate: Part
    budget: float
    longest: float
    together: bool = False
