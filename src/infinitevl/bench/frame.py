"""A frame into the memory: eager and recorded, first ones against last ones, the bytes, and where the time goes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from infinitevl.bench import timing
from infinitevl.bench.setup import OURS, Curve, Found, Row, Setup, Skipped
from infinitevl.bench.timing import Camera, Eager, Running, Times, running
from infinitevl.stream import begin, frame_step

EVERY = 64  # frames between two readings of the allocator


def measure(setup: Setup) -> Iterator[Found]:
    """The part "frame"."""
    scale, device, model = setup.scale, setup.device, setup.model
    camera = Camera(scale.processor.frame_pixels, device)
    step = partial(frame_step, model)
    took = _rate(setup, Eager(step, begin(model)), scale.eager)
    yield Row("frame", "frame step, eager", "ms", 1e3 * took.p50, 1e3 * took.p99, scale.eager, "window not yet full")
    if setup.on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    run = running(step, begin(model), *camera(0))
    held: list[int] = []

    def one(number: int) -> None:
        if number % EVERY == 0:
            held.append(timing.allocated(device, run.memory))
        run(*camera(number))

    took = timing.intervals(one, device, scale.frames)
    held.append(timing.allocated(device, run.memory))
    settled = Times(took.seconds[scale.early[0] :])
    how = "recorded" if setup.on_gpu else "eager: nothing is recorded on a CPU"
    count = len(settled.seconds)
    yield Row("frame", "frame step, recorded", "ms", 1e3 * settled.p50, 1e3 * settled.p99, count, how)
    yield Row("frame", "one stream", "frames/s", 1 / settled.p50, None, count)
    yield Row("frame", "p99 over p50", "x", settled.p99 / settled.p50, None, count)
    first = Times(took.seconds[slice(*scale.early)])
    last = Times(took.seconds[-scale.late :])
    about = f"frames {scale.frames - scale.late:,} to {scale.frames:,} over {scale.early[0]} to {scale.early[1]}"
    yield Row("frame", "last frames over first", "x", last.p50 / first.p50, None, scale.late, about)
    yield from _bytes(setup, held, int(run.memory.seen[0]))
    yield Curve("bytes allocated", OURS, [float(EVERY * n) for n in range(len(held))], [float(b) for b in held])
    cuts = [took.seconds[at : at + EVERY] for at in range(0, scale.frames, EVERY)]
    middle = [at + EVERY / 2 for at in range(0, scale.frames, EVERY)]
    yield Curve("frames a second", OURS, middle, [float(1 / np.median(cut)) for cut in cuts])


def _rate(setup: Setup, run: Running, count: int) -> Times:
    camera = Camera(setup.scale.processor.frame_pixels, setup.device)
    return timing.intervals(lambda number: run(*camera(number)), setup.device, count, warm=3)


def _bytes(setup: Setup, held: list[int], seen: int) -> Iterator[Found]:
    about = f"from frame {EVERY} to {setup.scale.frames:,}, {seen:,} tokens"
    if not setup.on_gpu:
        about += "; the memory's own bytes"
    yield Row("frame", "bytes grown", "bytes", held[-1] - held[1], None, len(held) - 1, about)
    yield Row("frame", "memory of a stream", "MiB", setup.model.empty_memory().nbytes / 2**20)
    if setup.on_gpu:
        peak = torch.cuda.max_memory_allocated(setup.device) / 2**30
        yield Row("frame", "peak with one stream", "GiB", peak, note="weights, memory, recorded step")
    else:
        yield Skipped("frame", "peak with one stream", "no GPU: the allocator of a CPU does not count")
