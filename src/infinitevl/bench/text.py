"""Text: one token after the other (decode), and many at once (prefill)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from infinitevl import rope
from infinitevl.bench import models, timing
from infinitevl.bench.setup import OURS, Curve, Found, Row, Setup
from infinitevl.bench.timing import Times, running
from infinitevl.generate import prefill as feed_long
from infinitevl.memory import Memory
from infinitevl.model import Model


@torch.no_grad()
def decode_step(model: Model, token: Tensor, memory: Memory) -> Memory:
    """One greedy step of every row: reads `token` [B, 1], writes its most likely successor there."""
    positions, memory = rope.next_text(memory, 1)
    hidden, after = model(model.embed(token), positions, memory)
    token.copy_(model.logits(hidden).argmax(-1))
    assert after is not None
    return after


def decoding(model: Model, memory: Memory, setup: Setup) -> Times:
    """Seconds of each of many greedy steps on a memory, which is consumed."""
    token = torch.ones(len(memory.seen), 1, dtype=torch.int64, device=model.device)
    run = running(partial(decode_step, model, token), memory)
    return timing.intervals(lambda _: run(), setup.device, setup.scale.steps, warm=4)


def room(setup: Setup) -> int:
    """Tokens that a memory without a window needs for `decoding`, those of warming up and recording included."""
    return setup.scale.steps + 64


def decode(setup: Setup) -> Iterator[Found]:
    """The part "decode": after every length, then many streams at once."""
    lengths, milliseconds = setup.scale.lengths, []
    for length in lengths:
        took = decoding(setup.model, models.filled(setup.model, length), setup)
        milliseconds.append(1e3 * took.p50)
        yield token_row("decode", f"after {length:,} tokens", took, 1)
    yield Row("decode", "1 stream", "tokens/s", 1e3 / milliseconds[-1], None, setup.scale.steps)
    yield Curve("decode ms", OURS, [float(length) for length in lengths], milliseconds)
    for rows in setup.scale.slots[-1:]:
        took = decoding(setup.model, models.filled(setup.model, lengths[-1], rows), setup)
        yield Row("decode", f"{rows} streams", "tokens/s", rows / took.p50, None, setup.scale.steps, "in all")


def token_row(part: str, name: str, took: Times, rows: int) -> Row:
    """Tokens a second in all, with the milliseconds of a step."""
    note = f"{1e3 * took.p50:.3g} ms a step, p99 {1e3 * took.p99:.3g}"
    return Row(part, name, "tokens/s", rows / took.p50, None, len(took.seconds), note)


def prompt(setup: Setup, length: int) -> Tensor:
    """Random ids [1, length], another text for every length."""
    generator = torch.Generator().manual_seed(length)
    most = min(setup.scale.config.stop_tokens) // 2
    return torch.randint(0, most, (1, length), generator=generator).to(setup.device)


def prefilling(model: Model, setup: Setup, length: int, repeats: int) -> Times:
    """Seconds to take a prompt into an empty memory, in chunks; one chunk has warmed up before."""
    capacity = length if model.config.text.window is None else None
    ids = prompt(setup, length)

    def run(ids: Tensor) -> None:
        feed_long(model, model.empty_memory(capacity=capacity), ids, chunk=setup.scale.chunk)

    run(ids[:, : setup.scale.chunk])
    return timing.latencies(partial(run, ids), setup.device, repeats)


def prefill(setup: Setup) -> Iterator[Found]:
    """The part "prefill"."""
    seconds = []
    for length in setup.scale.lengths:
        took = prefilling(setup.model, setup, length, repeats(setup, length))
        seconds.append(took.p50)
        yield prefill_row("prefill", length, took)
    yield Curve("prefill s", OURS, [float(length) for length in setup.scale.lengths], seconds)
    nbytes = setup.model.empty_memory().nbytes
    yield Curve("memory bytes", OURS, [float(n) for n in setup.scale.lengths], [float(nbytes)] * len(seconds))


def repeats(setup: Setup, length: int) -> int:
    """Five of a short prompt, one of a long one."""
    return max(1, min(5, 16 * setup.scale.chunk // length))


def prefill_row(part: str, length: int, took: Times, note: str = "") -> Row:
    """Tokens a second, with the seconds."""
    note = f"{took.p50:.3g} s" + (f", {note}" if note else "")
    return Row(part, f"prefill of {length:,} tokens", "tokens/s", length / took.p50, None, len(took.seconds), note)
