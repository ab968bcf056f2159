"""Many streams in one step: frames a second in all, and what each further stream costs in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from infinitevl.batch import StreamBatch
from infinitevl.bench import timing
from infinitevl.bench.setup import Found, Row, Setup, Skipped
from infinitevl.stream import Stream

STEP = 1e-3  # seconds of the stream from frame to frame: so close that no time stamp comes in between


def pictures(setup: Setup, count: int = 16) -> list[np.ndarray]:
    """Random frames uint8 [H, W, 3] as a decoder would hand them over."""
    numbers = np.random.default_rng(1)
    return [numbers.integers(0, 256, (*setup.scale.processor.frame_pixels, 3), dtype=np.uint8) for _ in range(count)]


def measure(setup: Setup) -> Iterator[Found]:
    """The part "streams": by the calls that a user makes."""
    pool = pictures(setup)
    yield _rate(setup, 1, _alone(Stream(setup.model), pool))
    held = {slots: 0 for slots in setup.scale.slots}
    for slots in held:
        setup.quiet()
        # from here: of every stream that was recorded on, cuBLAS keeps a workspace of 32 MiB, and those add up
        before = timing.allocated(setup.device, setup.model.empty_memory(0))
        batch = StreamBatch(setup.model, slots)
        names = [batch.open() for _ in range(slots)]
        yield _rate(setup, slots, _all_of(batch, names, pool))
        if setup.on_gpu:
            setup.quiet()
            held[slots] = timing.allocated(setup.device, setup.model.empty_memory(0)) - before
        del batch
    few, many = setup.scale.slots[0], setup.scale.slots[-1]
    if not setup.on_gpu:
        yield Skipped("streams", "memory of each further stream", "no GPU: the allocator of a CPU does not count")
    elif few < many:
        each = (held[many] - held[few]) / (many - few) / 2**20
        yield Row("streams", "memory of each further stream", "MiB", each, note=f"from {few} to {many} slots")


def _alone(stream: Stream, pool: list[np.ndarray]) -> Callable[[int], None]:
    """A step of a stream by itself."""
    return lambda number: stream.observe(pool[number % len(pool)], STEP * number)


def _all_of(batch: StreamBatch, names: list[int], pool: list[np.ndarray]) -> Callable[[int], None]:
    """A step in which every slot has a frame, each another one."""

    def step(number: int) -> None:
        batch.observe({name: pool[(number + name) % len(pool)] for name in names}, STEP * number)

    return step


def _rate(setup: Setup, slots: int, step: Callable[[int], None]) -> Row:
    took = timing.intervals(step, setup.device, setup.scale.steps, warm=8)
    note = f"{1e3 * took.p50:.3g} ms a step, p99 {1e3 * took.p99:.3g}"
    return Row("streams", f"{slots} at once", "frames/s", slots / took.p50, None, len(took.seconds), note)
