"""Follow a frame: watched in many streams side by side; after it, what is asked then, of forks and of three controls.

The controls stand for what a model would know without what this package is about.
"""

from __future__ import annotations

import sys
import time as clock
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infinitevl import stream
from infinitevl.eval import batched
from infinitevl.memory import Delta, Memory
from infinitevl.model import Model
from infinitevl.synth.compose import Composer
from infinitevl.synth.heldout import Ask
from infinitevl.synth.world import Stories

FULL = "full"
CONTROLS = {
    FULL: "the model as it is",
    "no_delta": "delta states and conv tails zeroed before every frame: the window alone, and nothing relayed to it",
    "last4": "a fresh memory that has seen the last 4 frames only, at their times",
    "blind": "the question only, before any frame",
}
AT_MOST = 12  # tokens of an answer; the longest right one has 6
GLIMPSE = 4  # frames that `last4` sees
_AHEAD = 8  # frames of a stream painted at once


class EvalError(ValueError):
    """A test that cannot be run as asked; the message says what to change."""


@dataclass(frozen=True)
class Exam:
    """Which streams are watched and which lines of the plan are asked; `at_once`: questions answered in one batch;
    `capacity` of a stream's memory, for models without a window."""

    model: Model
    worlds: Mapping[str, Stories]
    asks: Sequence[Ask]
    at_once: int
    at_most: int = AT_MOST
    capacity: int | None = None

    def lines(self, world: str) -> dict[int, list[int]]:
        """The lines of the plan about a world, by the frame after which they are asked."""
        found: dict[int, list[int]] = {}
        for line, ask in enumerate(self.asks):
            if ask.world == world:
                found.setdefault(ask.frame, []).append(line)
        return found


class Meter:
    """How far a run has come, in frames fed plus questions answered, told on stderr every few seconds."""

    def __init__(self, total: int, every: float = 5.0) -> None:
        self.total, self.every, self.done = total, every, 0
        self.began = self.told = clock.perf_counter()

    def add(self, count: int) -> None:
        self.done += count
        now = clock.perf_counter()
        if now - self.told >= self.every:
            self.told = now
            rate = self.done / (now - self.began)
            left = (self.total - self.done) / rate
            share = self.done / self.total
            print(f"{share:4.0%}  {rate:.0f} frames and questions/s  {left:.0f} s left", file=sys.stderr, flush=True)


class Quiz:
    """Answers by line of the plan. Questions wait with their forks until a batch is full."""

    def __init__(self, exam: Exam, meter: Meter) -> None:
        self.exam, self.meter = exam, meter
        self.given = [""] * len(exam.asks)
        self.forks: list[Memory] = []
        self.waiting: list[int] = []

    def ask(self, memory: Memory, rows: Sequence[int], lines: Sequence[int]) -> None:
        """Line `lines[i]` of the memory's row `rows[i]`, as it is now."""
        for first in range(0, len(lines), self.exam.at_once):
            part = slice(first, first + self.exam.at_once)
            if len(self.waiting) + len(lines[part]) > self.exam.at_once:
                self.finish()
            self.forks.append(memory.rows(torch.tensor(rows[part], device=self.exam.model.device)))
            self.waiting += lines[part]

    def finish(self) -> list[str]:
        """Answers what waits; all answers so far."""
        if self.waiting:
            asked = [self.exam.asks[line].question.text for line in self.waiting]
            said = batched.answers(self.exam.model, _joined(self.forks), asked, self.exam.at_most)
            for line, text in zip(self.waiting, said, strict=True):
                self.given[line] = text
            self.meter.add(len(said))
            self.forks, self.waiting = [], []
        return self.given


def _joined(memories: list[Memory]) -> Memory:
    """The rows of several memories as one memory."""
    leaves = iter(
        [torch.cat(same) for same in zip(*([leaf for _, leaf in each.named()] for each in memories), strict=True)]
    )
    return memories[0].map(lambda _: next(leaves))


def without_delta(memory: Memory) -> Memory:
    """The memory with every delta state and conv tail zeroed: what is left is the window."""
    blocks = (Delta(*map(torch.zeros_like, block)) if isinstance(block, Delta) else block for block in memory.blocks)
    return memory._replace(blocks=tuple(blocks))


def watched(exam: Exam, names: Sequence[str], meter: Meter) -> dict[str, list[str]]:
    """Answers of those that follow the streams from the beginning: `full` and `no_delta`."""
    quizzes = {name: Quiz(exam, meter) for name in names}
    for world, stories in exam.worlds.items():
        if names and exam.lines(world):
            _watch(exam, exam.lines(world), stories, quizzes, meter)
    return {name: quiz.finish() for name, quiz in quizzes.items()}


@torch.no_grad()
def _watch(exam: Exam, lines: dict[int, list[int]], stories: Stories, quizzes: dict[str, Quiz], meter: Meter) -> None:
    """All streams of a world side by side, and after each frame what is asked then."""
    streams = sorted({exam.asks[line].stream for asked in lines.values() for line in asked})
    row = {number: place for place, number in enumerate(streams)}
    memories = {name: stream.begin(exam.model, len(streams), exam.capacity) for name in quizzes}
    for frame, pixels in enumerate(painted(stories, streams, max(lines) + 1, exam.model.device)):
        asked = lines.get(frame, [])
        for name, quiz in quizzes.items():
            before = without_delta(memories[name]) if name == "no_delta" else memories[name]
            memories[name] = batched.observe(exam.model, before, pixels, (stories.t0[streams] + float(frame)).tolist())
            quiz.ask(memories[name], [row[exam.asks[line].stream] for line in asked], asked)
        meter.add(len(streams) * len(quizzes))


def painted(stories: Stories, streams: Sequence[int], count: int, device: torch.device) -> Iterator[Tensor]:
    """The first `count` frames of the streams, one of each at a time: uint8 [B, 112, 112, 3]."""
    composer = Composer(device)
    for first in range(0, count, _AHEAD):
        frames = np.arange(first, min(first + _AHEAD, count))
        yield from _pictures(composer, stories, np.array(streams)[:, None], frames[None]).unbind(1)


def _pictures(composer: Composer, stories: Stories, streams: np.ndarray, frames: np.ndarray) -> Tensor:
    """Frames [N, M] of streams [N, 1] -> uint8 [N, M, 112, 112, 3]."""
    numbers = {name: torch.from_numpy(getattr(stories, name)[streams, frames]) for name in ("strips", "scene", "grain")}
    shape = next(iter(numbers.values())).shape[:2]
    return composer({name: part.flatten(0, 1) for name, part in numbers.items()}).unflatten(0, shape)


@torch.no_grad()
def glimpsed(exam: Exam, meter: Meter) -> list[str]:
    """Answers of `last4`: for each moment at which something is asked, a memory of the frames just before it."""
    quiz, composer = Quiz(exam, meter), Composer(exam.model.device)
    for world, stories in exam.worlds.items():
        for moments in _moments(exam, world):
            streams, frames = (np.array(part)[:, None] for part in zip(*moments, strict=True))
            seen = frames + np.arange(-min(GLIMPSE, int(frames[0, 0]) + 1) + 1, 1)
            pixels = _pictures(composer, stories, streams, seen)
            memory = stream.begin(exam.model, len(moments), exam.capacity)
            for step in range(seen.shape[1]):
                times = (stories.t0[streams[:, 0]] + seen[:, step].astype(float)).tolist()
                memory = batched.observe(exam.model, memory, pixels[:, step], times)
            meter.add(seen.size)
            lines = list(moments.values())
            rows = [row for row, asked in enumerate(lines) for _ in asked]
            quiz.ask(memory, rows, [line for asked in lines for line in asked])
    return quiz.finish()


def _moments(exam: Exam, world: str) -> Iterator[dict[tuple[int, int], list[int]]]:
    """The moments of a world with their lines, by (stream, frame), in batches that have equally many frames to see."""
    found: dict[int, dict[tuple[int, int], list[int]]] = {}
    for frame, lines in exam.lines(world).items():
        group = found.setdefault(min(GLIMPSE, frame + 1), {})
        for line in lines:
            group.setdefault((exam.asks[line].stream, frame), []).append(line)
    for group in found.values():
        keys = list(group)
        for first in range(0, len(keys), exam.at_once):
            yield {key: group[key] for key in keys[first : first + exam.at_once]}


@torch.no_grad()
def blind(exam: Exam, meter: Meter) -> list[str]:
    """Answers to the questions alone; the same words have the same answer, so each is asked once."""
    first: dict[str, int] = {}
    for line, ask in enumerate(exam.asks):
        first.setdefault(ask.question.text, line)
    quiz = Quiz(exam, meter)
    quiz.ask(stream.begin(exam.model, 1, exam.capacity), [0] * len(first), list(first.values()))
    given = quiz.finish()
    return [given[first[ask.question.text]] for ask in exam.asks]


def check_controls(names: Sequence[str], known: Iterable[str] = CONTROLS) -> None:
    """EvalError for a control that is not known, or named twice."""
    if unknown := sorted(set(names) - set(known)):
        raise EvalError(f"no control {unknown[0]!r}; there are {', '.join(known)}")
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        raise EvalError(f"control {twice[0]!r} is named twice; once is enough")


def answers(exam: Exam, controls: Iterable[str] = CONTROLS) -> dict[str, list[str]]:
    """For each control its answer to every line of the exam, in order. EvalError as `check_controls` raises it."""
    names = list(controls)
    check_controls(names)
    meter = Meter(_work(exam, names))
    given = watched(exam, [name for name in names if name in (FULL, "no_delta")], meter)
    if "last4" in names:
        given["last4"] = glimpsed(exam, meter)
    if "blind" in names:
        given["blind"] = blind(exam, meter)
    return {name: given[name] for name in names}


def _work(exam: Exam, names: list[str]) -> int:
    """Frames to be fed and questions to be answered."""
    total = 0
    for world in exam.worlds:
        lines = exam.lines(world)
        streams = {exam.asks[line].stream for asked in lines.values() for line in asked}
        total += len({FULL, "no_delta"} & set(names)) * len(streams) * (max(lines, default=-1) + 1)
        if "last4" in names:
            total += sum(min(GLIMPSE, frame + 1) for moments in _moments(exam, world) for _, frame in moments)
    total += len({ask.question.text for ask in exam.asks}) * ("blind" in names)
    return total + len(exam.asks) * len(set(names) - {"blind"})
