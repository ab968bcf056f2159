"""Follow a frame: what its memory weighs where a model keeps every token, and whether that fits, before it is begun."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from infinitevl.eval.exam import AT_MOST, EvalError
from infinitevl.memory import Memory
from infinitevl.model import Model
from infinitevl.synth.heldout import Ask

COPIES = 2  # a step of the reference ops makes a new memory before it lets go of the old one
CPU_FORKS, GPU_FORKS = 64, 1024  # questions answered in one batch, at most


class RoomError(EvalError):
    """Memories that do not fit the device; the message says what they take and what is free."""


def capacity(model: Model, seen: int, asks: Sequence[Ask]) -> int | None:
    """Tokens that a memory without a window must hold for a stream of `seen` tokens and any question about it; None
    with a window."""
    if model.config.text.window is not None:
        return None
    longest = max((len(model.processor.chat.tail(ask.question.text)) for ask in asks), default=0)
    return seen + longest + AT_MOST


def bytes_of(model: Model, streams: int, capacity: int | None) -> int:
    """Bytes of a memory of so many rows, without allocating it; `capacity` as in `Memory.empty`."""
    return Memory.empty(model.config, streams, capacity=capacity, device="meta", dtype=model.dtype).nbytes


def free(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return sizes[0] if device.type == "cpu" and sizes else None


def check(model: Model, streams: int, capacity: int | None) -> None:
    """RoomError where memories of so many streams, and what a step needs beside them, are larger than what is free."""
    need, left = COPIES * bytes_of(model, streams + 1, capacity), free(model.device)
    if left is not None and need > left:
        tokens = f" of {capacity:,} tokens" if capacity else ""
        raise RoomError(
            f"{streams} streams{tokens} take {need / 2**30:.1f} GiB on {model.device} with the copies that a step and "
            f"a question make, and {left / 2**30:.1f} GiB are free: take fewer streams, or shorter ones"
        )


def forks(model: Model, capacity: int | None) -> int:
    """How many questions are answered in one batch: each has a copy of its stream's memory, all within a quarter of
    what is free."""
    most = CPU_FORKS if model.device.type == "cpu" else GPU_FORKS
    left = free(model.device)
    if capacity is None or left is None:
        return most
    return max(1, min(most, left // (4 * COPIES * bytes_of(model, 1, capacity))))
