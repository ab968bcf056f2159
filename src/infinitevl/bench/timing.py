"""Time and bytes. A figure is taken after a warm-up, on fresh random inputs, and is a median."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from infinitevl.memory import Memory
from infinitevl.record import record

Step = Callable[..., Memory]
Mark = torch.cuda.Event | float  # a moment on a device's own clock


class Times(NamedTuple):
    """Seconds of repeated calls."""

    seconds: list[float]

    @property
    def p50(self) -> float:
        return float(np.quantile(self.seconds, 0.5))

    @property
    def p99(self) -> float:
        return float(np.quantile(self.seconds, 0.99))


class Running(Protocol):
    """A step bound to a memory: each call takes its inputs and leaves the memory one step later."""

    @property
    def memory(self) -> Memory: ...

    def __call__(self, *inputs: Tensor) -> object: ...


class Eager:
    """A step called as plain Python calls it."""

    def __init__(self, step: Step, memory: Memory, *inputs: Tensor) -> None:
        self.step, self.memory = step, memory

    def __call__(self, *inputs: Tensor) -> None:
        self.memory = self.step(self.memory, *inputs)


class Replays:
    """A step recorded over the memory."""

    def __init__(self, step: Step, memory: Memory, *inputs: Tensor) -> None:
        self.memory = memory
        self._recorded = record(lambda memory, *inputs: (step(memory, *inputs),), memory, *inputs)

    def __call__(self, *inputs: Tensor) -> None:
        self._recorded(*inputs)


def running(step: Step, memory: Memory, *inputs: Tensor) -> Running:
    """A step as fast as it goes: recorded on CUDA, where it is replayed on static buffers; eager on a CPU."""
    if memory.seen.device.type != "cuda":
        return Eager(step, memory)
    return Replays(step, memory, *inputs)


def recorded(run: Callable[[], object]) -> Callable[[], object]:
    """A function without memory as a CUDA graph of its own, on the tensors it has now."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def synchronise(device: torch.device) -> None:
    """Waits for all that was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def latencies(run: Callable[[], object], device: torch.device, count: int, most: float = 10.0) -> Times:
    """`count` calls one by one, each from an idle device to an idle device; fewer, at least one, after `most` s."""
    seconds: list[float] = []
    while len(seconds) < count and sum(seconds) < most:
        synchronise(device)
        began = time.perf_counter()
        run()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return Times(seconds)


def intervals(run: Callable[[int], object], device: torch.device, count: int, warm: int = 0) -> Times:
    """Calls `run(0)`, `run(1)`, ... back to back without waiting: seconds from the end of each to the end of the next
    on the device's own clock, of `count` calls after `warm` more."""
    for number in range(warm):
        run(number)
    synchronise(device)
    marks = [mark(device)]
    for number in range(warm, warm + count):
        run(number)
        marks.append(mark(device))
    synchronise(device)
    return Times([between(*pair) for pair in zip(marks, marks[1:], strict=False)])


def mark(device: torch.device) -> Mark:
    """A moment on the device's own clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(before: Mark, after: Mark) -> float:
    """Seconds from one mark to another; the device must have come to both (`synchronise`)."""
    if isinstance(before, float) and isinstance(after, float):
        return after - before
    return cast(torch.cuda.Event, before).elapsed_time(cast(torch.cuda.Event, after)) / 1e3


class Camera:
    """Fresh random frames of one size and their times, as a camera would have them: bytes in the host's memory."""

    def __init__(self, size: tuple[int, int], device: torch.device, rows: int = 1, frames: int = 16) -> None:
        generator = torch.Generator().manual_seed(1)
        pool = torch.randint(0, 256, (frames, rows, *size, 3), dtype=torch.uint8, generator=generator)
        self.pool = pool.pin_memory() if device.type == "cuda" else pool
        self.device = device
        self.times = torch.arange(1 << 16, dtype=torch.float64, device=device)[:, None].expand(-1, rows)

    def __call__(self, number: int) -> tuple[Tensor, Tensor]:
        """pixels uint8 [B, h, w, 3] and time float64 [B] of a frame a second; the copy to the device is part of it."""
        pixels = self.pool[number % len(self.pool)]
        return pixels.to(self.device, non_blocking=True), self.times[number]


def allocated(device: torch.device, memory: Memory) -> int:
    """Bytes held on the GPU by this process; on a CPU, where nobody counts them, those of the memory."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else memory.nbytes
