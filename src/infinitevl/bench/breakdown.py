"""Where the time of a recorded step goes: by kinds of kernels, and what is idle between them; they sum to the whole."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from infinitevl.bench import models, timing
from infinitevl.bench.setup import Found, Row, Setup, Skipped
from infinitevl.bench.timing import Camera, running
from infinitevl.generate import feed
from infinitevl.processor import patchify
from infinitevl.record import LENGTHS, Recorder
from infinitevl.step import frame_step

PROFILED = 4  # steps under the profiler
TEXT = 38  # tokens of the question that the part "question" asks
SLOWEST = 12  # kernels that are named

# Kinds of work by the names of kernels (or, on a CPU, of torch's own functions); the first that fits.
KINDS = {
    "attention": r"attend|attention|flash|fmha|sdpa|softmax|^_(turn|finish)_kernel",
    "delta rule": r"^_(convolve|prepare|scan|token|token_end|norm)$|delta|recurrent|causal_conv|chunk_|triangular|trsm",
    "matrix products": r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitk|addmm|\bmm\b|bmm|matmul|linear|^_one_row",
    "copies": r"memcpy|memset|copy|\bcat|CatArray|index|gather|scatter|fill|zero|clone|empty",
    "norms, rotations, sums": r"norm|rotate|rms|silu|gelu|elementwise|vectorized|reduce|triton_|^_(quantise|gated|add)|"
    r"aten::(mul|add|sub|div|pow|exp|mean|sum|cos|sin|sigmoid|rsqrt|where|neg)_?$",
}
REST, IDLE = "other kernels", "idle between kernels"


def measure(setup: Setup) -> Iterator[Found]:
    """The part "breakdown": a frame of one stream, of as many as are measured at once, and a question's text."""
    many = setup.scale.slots[-1]
    yield from _of(setup, "breakdown", "the whole frame", _frames(setup, 1))
    yield from _vision(setup)
    yield from _of(setup, f"breakdown, {many} streams", "the whole step", _frames(setup, many))
    padded = next(length for length in LENGTHS if length >= TEXT)
    yield from _of(setup, f"breakdown, text of {padded}", "the whole text", _text(setup))


def _frames(setup: Setup, rows: int) -> Callable[[int], object]:
    """A frame into each of so many full windows; of more than one, as `StreamBatch` takes them."""
    camera = Camera(setup.scale.processor.frame_pixels, setup.device, rows)
    memory = models.filled(setup.model, 2 * (setup.model.config.text.window or 0), rows)
    there = () if rows == 1 else (torch.ones(rows, dtype=torch.bool, device=setup.device),)
    run = running(partial(frame_step, setup.model), memory, *camera(0), *there)
    return lambda number: run(*camera(number), *there)


def _text(setup: Setup) -> Callable[[int], object]:
    """A question's text into a full window."""
    memory = models.filled(setup.model, 2 * (setup.model.config.text.window or 0))
    ids = list(range(1, TEXT + 1))
    if not setup.on_gpu:
        return lambda number: feed(setup.model, memory, ids)
    recorder = Recorder(setup.model, memory)
    return lambda number: recorder.text(ids)


def _of(setup: Setup, part: str, whole_name: str, run: Callable[[int], object]) -> Iterator[Found]:
    """The time of each kind of kernel in a step, and of none; then the slowest kernels."""
    for number in range(3):
        run(number)
    timing.synchronise(setup.device)
    kernels, whole = _profiled(run, setup)
    if not kernels:
        yield Skipped(part, "all", "the profiler saw no kernels here")
        return
    kinds = dict.fromkeys([*KINDS, REST], 0.0)
    for name, milliseconds in kernels.items():
        kinds[kind(name)] += milliseconds
    for name, milliseconds in kinds.items():
        yield Row(part, name, "ms", milliseconds, None, PROFILED)
    yield Row(part, IDLE, "ms", whole - sum(kinds.values()), None, PROFILED, "below 0: kernels ran side by side")
    yield Row(part, whole_name, "ms", whole, None, PROFILED, "under the profiler")
    for name, milliseconds in sorted(kernels.items(), key=lambda item: -item[1])[:SLOWEST]:
        yield Row(f"kernels: {part}", " ".join(name.split())[:72], "ms", milliseconds, None, PROFILED, kind(name))


def kind(name: str) -> str:
    """The kind of work of a kernel."""
    return next((each for each, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), REST)


def _profiled(run: Callable[[int], object], setup: Setup) -> tuple[dict[str, float], float]:
    """Milliseconds per step of each kernel by name, and of a whole step, from the first kernel to the last."""
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
