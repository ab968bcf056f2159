"""A frame into the memory: eager and recorded, first ones against last ones, the bytes, and where the time goes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from infinitevl.bench import models, timing
from infinitevl.bench.setup import OURS, Curve, Found, Row, Setup, Skipped
from infinitevl.bench.timing import Camera, Eager, Running, Times, running
from infinitevl.processor import patchify
from infinitevl.stream import begin, frame_step

EVERY = 64  # frames between two readings of the allocator
PROFILED = 4  # frames under the profiler

# Kinds of work by the names of kernels (or, on a CPU, of torch's own functions); the first that fits.
KINDS = {
    "attention": r"attend|attention|flash|fmha|sdpa|softmax|^_(turn|finish)_kernel",
    "delta rule": r"^_(convolve|prepare|scan|token|token_end|norm)$|delta|recurrent|causal_conv|chunk_|triangular|trsm",
    "matrix products": r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|addmm|\bmm\b|bmm|matmul|linear|^_one_row",
    "copies": r"memcpy|memset|copy|\bcat|CatArray|index|gather|scatter|fill|zero|clone|empty",
    "norms, rotations, sums": r"norm|rotate|rms|silu|gelu|elementwise|vectorized|reduce|triton_|"
    r"aten::(mul|add|sub|div|pow|exp|mean|sum|cos|sin|sigmoid|rsqrt|where|neg)_?$",
}
REST, IDLE = "other kernels", "idle between kernels"


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


def breakdown(setup: Setup) -> Iterator[Found]:
    """The part "breakdown": the time of each kind of kernel in a recorded frame, and of none; they sum to the whole."""
    camera = Camera(setup.scale.processor.frame_pixels, setup.device)
    memory = models.filled(setup.model, 2 * (setup.model.config.text.window or 0))
    run = running(partial(frame_step, setup.model), memory, *camera(0))
    for number in range(3):
        run(*camera(number))
    timing.synchronise(setup.device)
    kernels, whole = _profiled(lambda number: run(*camera(number)), setup)
    if not kernels:
        yield Skipped("breakdown", "all", "the profiler saw no kernels here")
        return
    kinds = dict.fromkeys([*KINDS, REST], 0.0)
    for name, milliseconds in kernels.items():
        kinds[kind(name)] += milliseconds
    for name, milliseconds in kinds.items():
        yield Row("breakdown", name, "ms", milliseconds, None, PROFILED)
    yield Row("breakdown", IDLE, "ms", whole - sum(kinds.values()), None, PROFILED, "below 0: kernels ran side by side")
    yield Row("breakdown", "the whole frame", "ms", whole, None, PROFILED, "under the profiler")
    yield from _vision(setup)
    for name, milliseconds in sorted(kernels.items(), key=lambda item: -item[1])[:12]:
        yield Row("kernels", " ".join(name.split())[:72], "ms", milliseconds, None, PROFILED, kind(name))


def kind(name: str) -> str:
    """The kind of work of a kernel."""
    return next((each for each, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), REST)


def _profiled(run: Callable[[int], object], setup: Setup) -> tuple[dict[str, float], float]:
    """Milliseconds per frame of each kernel by name, and of a whole frame, from the first kernel to the last."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if setup.on_gpu else activity.CPU]) as profile:
        began = time.perf_counter()
        for number in range(PROFILED):
            run(number)
        timing.synchronise(setup.device)
        whole = 1e3 * (time.perf_counter() - began) / PROFILED
    kernels: dict[str, float] = {}
    if not setup.on_gpu:
        for each in profile.key_averages():
            kernels[each.key] = each.self_cpu_time_total / 1e3 / PROFILED
        return kernels, whole
    ran = [each for each in profile.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    for event in ran:
        kernels[event.name] = kernels.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e3 / PROFILED
    if ran:
        span = max(event.time_range.end for event in ran) - min(event.time_range.start for event in ran)
        whole = span / 1e3 / PROFILED
    return kernels, whole


@torch.no_grad()
def _vision(setup: Setup) -> Iterator[Found]:
    """The vision encoder by itself, from pixels to tokens."""
    pixels, _ = Camera(setup.scale.processor.frame_pixels, setup.device)(0)

    def run() -> None:
        patches, (rows, columns) = patchify(pixels, setup.scale.processor, pair=False)
        setup.model.vision(patches, rows, columns)

    again = timing.recorded(run) if setup.on_gpu else run
    took = timing.intervals(lambda _: again(), setup.device, setup.scale.eager, warm=3)
    yield Row("breakdown", "vision alone", "ms", 1e3 * took.p50, 1e3 * took.p99, setup.scale.eager, "part of the frame")
