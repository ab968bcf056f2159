"""What a run says: a line of JSON, a point in TensorBoard and a progress line, every so many steps."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from infinitevl.config import DELTA
from infinitevl.files import written_aside
from infinitevl.model import Model

# Dense bf16 of the data sheets, FLOP/s, by a part of torch's name for the device.
PEAKS = {"H200": 989.4e12, "H100": 989.4e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165.2e12}
Tell = Callable[[str], None]


def peak(device: torch.device) -> float | None:
    """What a device can do at most, in FLOP/s; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAKS.items() if part in name), None)


def flops_per_token(student: Model, teacher: Model | None, names: Iterable[str], end_to_end: bool) -> int:
    """FLOP that a real token costs in the matrices of the text blocks, those of recomputation not counted.

    2 a parameter forward, 2 for the gradient of its input, 2 for its own where it trains. Heads, vision and the
    products of attention and delta rule are left out: what is said of utilisation is a lower bound.
    """
    trained = set(names)
    flops = 0 if teacher is None else 2 * _size(teacher, range(len(teacher.blocks)))
    layers = student.config.text.layers
    run = [number for number, mixer in enumerate(layers) if end_to_end or mixer == DELTA]
    flops += 4 * _size(student, run)
    return flops + 2 * sum(p.numel() for name, p in student.named_parameters() if name in trained and p.dim() == 2)


def _size(model: Model, blocks: Iterable[int]) -> int:
    return sum(p.numel() for number in blocks for p in model.blocks[number].parameters() if p.dim() == 2)


def spelled(names: list[str]) -> list[str]:
    """Names in short: those of several blocks on one line, `blocks.{1-3,5}.mixer.q.weight`."""
    groups: dict[str, list[int]] = {}
    for name in names:
        number = re.match(r"blocks\.(\d+)\.", name)
        key = name.replace(number[0], "blocks.{}.", 1) if number else name
        groups.setdefault(key, []).extend([int(number[1])] if number else [])
    return [key.replace("{}", "{" + _ranges(numbers) + "}", 1) for key, numbers in groups.items()]


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _step_of(line: str) -> float:
    """The step of a line of the log; one that was cut short by a kill belongs to none."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


class Log:
    """OUT/log.jsonl, OUT/tensorboard and the progress line of one process; the others are silent (tell=None)."""

    def __init__(self, out: Path, steps: int, every: int, tensorboard: bool, tell: Tell | None, since: int) -> None:
        self.path, self.steps, self.every, self.tell = out / "log.jsonl", steps, every, tell
        self.flops: float | None = None  # that utilisation is measured by: FLOP of a token over those of the devices
        self.sums, self.count, self.tokens, self.last = 0.0, 0, 0, time.perf_counter()
        self.board = None
        if tell is not None:
            out.mkdir(parents=True, exist_ok=True)
            self._forget(since)
            if tensorboard and importlib.util.find_spec("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(out / "tensorboard"), purge_step=since + 1)
            elif tensorboard:
                tell("tensorboard is not installed (pip install 'infinitevl[train]'): the log is log.jsonl alone")

    def _forget(self, since: int) -> None:
        """Drop the lines of steps after the one that a resumed run goes on from: they are made again."""
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step_of(line) <= since]
            with written_aside(self.path) as aside:
                aside.write_text("".join(line + "\n" for line in lines))

    def say(self, message: str) -> None:
        """A line for people."""
        if self.tell is not None:
            self.tell(message)

    def event(self, step: int, **facts: Any) -> None:
        """A line of the log that is no step: a skipped sample or step."""
        if self.tell is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **facts}) + "\n")

    def step(self, step: int, loss: float, tokens: int, facts: dict[str, Any]) -> None:
        """A step that was taken; loss is the mean over its tokens. Written every so many steps, and the last one."""
        self.sums, self.count, self.tokens = self.sums + loss, self.count + 1, self.tokens + tokens
        if step % self.every and step != self.steps:
            return
        seconds = max(time.perf_counter() - self.last, 1e-9)
        speed = self.tokens / seconds
        line = {"loss": self.sums / self.count, **facts, "tokens_per_second": round(speed, 1)}
        if self.flops is not None:
            line["mfu"] = round(speed * self.flops, 4)
        left = (self.steps - step) * seconds / self.count
        self.event(step, **line)
        self.say(progress(step, self.steps, line, left))
        if self.board is not None:
            for name, value in line.items():
                self.board.add_scalar(name, value, step)
        self.sums, self.count, self.tokens, self.last = 0.0, 0, 0, time.perf_counter()

    def close(self) -> None:
        """Write what TensorBoard still holds."""
        if self.board is not None:
            self.board.close()


def progress(step: int, steps: int, line: dict[str, Any], left: float) -> str:
    """The progress line."""
    parts = [
        f"step {step}/{steps}",
        f"loss {line['loss']:.4f}",
        f"norm {line['norm']:.3g}",
        f"lr {line['lr']:.2e}",
        f"{line['tokens_per_second']:,.0f} tokens/s",
        *([f"MFU {100 * line['mfu']:.1f} %"] if "mfu" in line else []),
        f"{duration(left)} left",
    ]
    if line["skipped_steps"] or line["skipped_samples"]:
        parts.append(f"skipped: {line['skipped_steps']} steps, {line['skipped_samples']} samples")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """A time in words: 42 s, 3 min 20 s, 5 h 12 min, 3 d 4 h."""
    for unit, below, name, inner in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name} {int(seconds % unit // below)} {inner}"
    return f"{seconds:.0f} s"
