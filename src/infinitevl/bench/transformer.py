"""The Transformer beside it: Qwen2.5-VL-3B's shape in our own `Model`, same process, same code, a cache that grows.

It has what ours has: attention by the fast path, decode and frames recorded at every length that is timed. Where its
prefill would take minutes it is sampled: chunks at eight depths of the cache, summed over all chunks of the prompt.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial

import numpy as np

from infinitevl.bench import gate, models, text, timing
from infinitevl.bench.setup import THEIRS, Curve, Found, Row, Setup, Skipped
from infinitevl.bench.timing import Camera, Times, running
from infinitevl.generate import prefill
from infinitevl.model import Model
from infinitevl.stream import frame_step

PART = "transformer"
DEPTHS = 8  # depths of the cache at which a sampled prefill is timed
FRAMES = 8  # of a timed frame step: its cache grows by as many


def measure(setup: Setup) -> Iterator[Found]:
    """The part "transformer"."""
    setup.drop_model()
    yield from gate.check(setup, THEIRS, setup.scale.teacher)
    model = setup.make(setup.scale.teacher)
    seconds: dict[int, float] = {}
    yield from _prefills(model, setup, seconds)
    yield Curve("prefill s", THEIRS, [float(length) for length in seconds], list(seconds.values()))
    steps: dict[int, float] = {}
    frames: dict[int, float] = {}
    for length in setup.scale.lengths:
        nbytes = models.cache_bytes(setup.scale.teacher, length, setup.dtype)
        yield Row(PART, f"memory after {length:,} tokens", "MiB", nbytes / 2**20, note="its cache")
        if not setup.fits(2 * nbytes):  # recording warms up on a copy
            yield Skipped(PART, f"decode and frames after {length:,} tokens", f"a cache of {nbytes:,} bytes: no room")
            continue
        took = text.decoding(model, models.filled(model, length, capacity=length + text.room(setup)), setup)
        steps[length] = 1e3 * took.p50
        yield text.token_row(PART, f"after {length:,} tokens", took, 1)
        frames[length] = _frames(model, setup, length).p50
        yield Row(PART, f"frames after {length:,} tokens", "frames/s", 1 / frames[length], None, FRAMES)
    yield Curve("decode ms", THEIRS, [float(length) for length in steps], list(steps.values()))
    per_frame = _frame_tokens(model, setup)
    seen = [length / per_frame for length in frames]
    yield Curve("frames a second", THEIRS, seen, [1 / each for each in frames.values()])
    cache = [float(models.cache_bytes(setup.scale.teacher, length, setup.dtype)) for length in setup.scale.lengths]
    yield Curve("memory bytes", THEIRS, [float(length) for length in setup.scale.lengths], cache)


def _prefills(model: Model, setup: Setup, seconds: dict[int, float]) -> Iterator[Found]:
    """Whole runs, then one by sampling, which must agree with the longest whole run first."""
    scale = setup.scale
    for length in scale.whole:
        if not setup.fits(models.cache_bytes(scale.teacher, length, setup.dtype)):
            yield Skipped(PART, f"prefill of {length:,} tokens", "its cache does not fit the device")
            continue
        took = text.prefilling(model, setup, length, text.repeats(setup, length))
        seconds[length] = took.p50
        yield text.prefill_row(PART, length, took)
    far = scale.sampled
    if far is None:
        return
    if not setup.fits(models.cache_bytes(scale.teacher, far + scale.chunk, setup.dtype)):
        yield Skipped(PART, f"prefill of {far:,} tokens", "its cache does not fit the device")
        return
    if setup.full:
        took = text.prefilling(model, setup, far, 1)
        seconds[far] = took.p50
        yield text.prefill_row(PART, far, took)
        return
    known = max(seconds, default=None)
    if known is None:
        yield Skipped(PART, f"prefill of {far:,} tokens", "no whole run to check the sampling against")
        return
    off = _sampled(model, setup, known) / seconds[known]
    yield Row(PART, "sampled over whole prefill", "x", off, None, DEPTHS, f"at {known:,} tokens")
    if scale.agree is not None and abs(off - 1) > scale.agree:
        reason = f"sampling is off by {abs(off - 1):.1%} at {known:,} tokens, at most {scale.agree:.0%}: --full runs it"
        yield Skipped(PART, f"prefill of {far:,} tokens", reason)
        return
    seconds[far] = _sampled(model, setup, far)
    yield text.prefill_row(PART, far, Times([seconds[far]]), "sampled")


def _sampled(model: Model, setup: Setup, length: int) -> float:
    """Seconds of a prefill of `length` tokens, from one chunk at each of eight depths of a cache of that length."""
    chunk = setup.scale.chunk
    depths = [length * part // DEPTHS for part in range(DEPTHS)]
    ids = text.prompt(setup, chunk)
    memory = models.filled(model, 0, capacity=max(length, depths[-1] + chunk))
    took = []
    for depth in [0, *depths]:  # the first only warms up
        memory = models.aged(memory, depth, model)
        run = partial(prefill, model, memory, ids, chunk)
        took.append(timing.latencies(run, setup.device, 1).p50)
    del memory, run
    gc.collect()
    return integral(depths, took[1:], length, chunk)


def integral(depths: list[int], took: list[float], length: int, chunk: int) -> float:
    """Seconds of all chunks of a prompt, each as long as the line through the samples beside its depth says."""
    after = took[-1] + (took[-1] - took[-2]) * (length - depths[-1]) / (depths[-1] - depths[-2])
    starts = np.arange(0, length, chunk)
    return float(np.interp(starts, [*depths, length], [*took, after]).sum())


def _frame_tokens(model: Model, setup: Setup) -> int:
    height, width = setup.scale.processor.frame_pixels
    return height * width // model.config.vision.stride**2


def _frames(model: Model, setup: Setup, length: int) -> Times:
    """Seconds of a frame's step after `length` tokens."""
    spare = (FRAMES + 12) * _frame_tokens(model, setup)
    camera = Camera(setup.scale.processor.frame_pixels, setup.device)
    memory = models.filled(model, length, capacity=length + spare)
    run = running(partial(frame_step, model), memory, *camera(0))
    return timing.intervals(lambda number: run(*camera(number)), setup.device, FRAMES, warm=3)
