"""Follow a frame: one of the last of a stream of 8, 32, 128 ... frames; then is asked what is in view, and what was.

Each length is a run of its own, from an empty memory: one without a window is made as large as that length needs.
Beside what is right: milliseconds that a frame took at that length, and the bytes of a stream's memory.
"""

from __future__ import annotations

import time as clock
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infinitevl import weights
from infinitevl.eval import counts, needles, record, room
from infinitevl.eval.batched import Watcher, tokens_seen
from infinitevl.eval.exam import CONTROLS, FULL, EvalError, Exam, Meter, Quiz, without_delta
from infinitevl.eval.needles import CHAPTER, FRAME, OPEN, Long
from infinitevl.eval.recall import check_columns
from infinitevl.model import Model
from infinitevl.synth.heldout import Ask, Count
from infinitevl.synth.questions import NOW, STATES, Question, questions

COLUMNS = (FULL, "no_delta")
SHORTEST, FACTOR = 8, 4  # frames of the first length, and how many times as long the next one is
TIMED = 16  # the last frames, whose time is taken
ROWS = ("now", "states", "past", "count_past")  # in view; door and light; out of view and not to be guessed; counts


def lengths(frames: int) -> list[int]:
    """8, 32, 128 ... and `frames` itself. EvalError for less than 8."""
    if frames < SHORTEST:
        raise EvalError(f"--frames {frames}: the shortest stream has {SHORTEST}")
    found = [SHORTEST]
    while found[-1] * FACTOR < frames:
        found.append(found[-1] * FACTOR)
    return [*found[: -1 if found[-1] == frames else None], frames]


def plan(world: Long, frames: int) -> list[Ask]:
    """What is in view at four of the last eight frames, and after the last one every needle that has gone by."""
    asks = [ask for frame in range(frames - SHORTEST + 1, frames, 2) for ask in _now(world, frame)]
    for needle in world.needles:
        if needle.evidence < frames - 1:
            row = "past" if needle.kind in OPEN else needle.kind
            question = Question(needle.kind, needle.text, needle.answer, needle.evidence, frames - 1)
            asks.append(Ask("long", needle.stream, frames - 1, question, (row,)))
    return asks


def _now(world: Long, frame: int) -> list[Ask]:
    """What can be asked of each stream about a frame in view."""
    stories, asks = world.chapter(frame // CHAPTER), []
    for b in range(world.streams):
        rng = np.random.default_rng([world.seed, frame, b])
        for row, kinds in (("now", NOW), ("states", STATES)):
            found = questions(stories, b, frame % CHAPTER, rng, kinds, never=0.05)
            asks += [Ask("long", b, frame, Question(q.kind, q.text, q.answer, frame, frame), (row,)) for q in found]
    return asks


@dataclass(frozen=True)
class Length:
    """What was found at one length. nbytes: of one stream's memory.

    milliseconds: of a step, all streams in it, the middle and the ninth decile of those timed: others use a CPU, too.
    counts: by column and row. refused: why it was not run, with nothing else found.
    """

    frames: int
    tokens: int
    milliseconds: tuple[float, float] | None = None
    nbytes: int | None = None
    counts: Mapping[str, Mapping[str, Count]] | None = None
    refused: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data: the counts by column and row, or why there are none."""
        place = {"frames": self.frames, "tokens": self.tokens}
        if self.counts is None or self.milliseconds is None:
            return {**place, "refused": self.refused}
        middle, slow = self.milliseconds
        found = {column: {row: counts.plain(n) for row, n in rows.items()} for column, rows in self.counts.items()}
        return {**place, "milliseconds": middle, "milliseconds_p90": slow, "bytes": self.nbytes, **found}


@dataclass(frozen=True)
class Report:
    """What a run found, length by length."""

    found: Sequence[Length]
    columns: Sequence[str]
    about: dict[str, Any]

    def markdown(self) -> str:
        """The table by length, with how many were asked and the 95 % interval; below it what did not fit."""
        heads = ["frames", "tokens", *(f"{row}, {column}" for column in self.columns for row in ROWS)]
        rows = [
            [f"{each.frames:,}", f"{each.tokens:,}"]
            + [_cell(each.counts[column][row]) for column in self.columns for row in ROWS]
            + [*(f"{time:.1f}" for time in each.milliseconds), f"{each.nbytes:,}"]
            for each in self.found
            if each.counts is not None and each.milliseconds is not None
        ]
        refused = [f"\n{each.frames:,} frames were not run: {each.refused}\n" for each in self.found if each.refused]
        heads += ["ms a step, p50", "p90", "bytes a stream"]
        said = "\nin brackets the 95 % interval\n"
        return counts.table(heads, rows) + said + "".join(refused)

    def as_json(self) -> dict[str, Any]:
        """Everything but the answers, as plain data."""
        columns = {column: CONTROLS[column] for column in self.columns}
        return {**self.about, "columns": columns, "lengths": [each.as_json() for each in self.found]}


def _cell(count: Count) -> str:
    """A share with its interval, and of how many; a dash where nothing was asked."""
    return f"{counts.cell(count, spread=True)}" + (f" of {count.asked}" if count.asked else "")


def run(
    where: str | Path = weights.DEFAULT,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    frames: int | None = None,
    streams: int | None = None,
    columns: Sequence[str] = (FULL,),
    eager: bool = False,
    seed: int = 0,
) -> Report:
    """Accuracy, time and memory of a checkpoint by the length of its streams. Progress goes to stderr.

    frames: of the longest (None: 512 on a CPU, 4,096 elsewhere); streams: rows (None: 8 and 32). eager: on CUDA do not
    record steps. A length that does not fit the device is said to be refused, and no longer one is tried.
    EvalError for columns that `check_columns` refuses, or less than 8 frames or one stream; RoomError where even the
    shortest does not fit; those of `weights.load`.
    """
    check_columns(columns, COLUMNS)
    model = weights.load(where, device, dtype)
    on_cpu, began = model.device.type == "cpu", clock.perf_counter()
    wanted = lengths(frames or (512 if on_cpu else 4096))
    world = needles.long(seed, streams or (8 if on_cpu else 32), wanted[-1])
    meter = Meter(len(columns) * sum(world.streams * each + len(plan(world, each)) for each in wanted))
    found: list[Length] = []
    for each in wanted:
        found.append(_fitting(model, world, each, columns, eager, meter))
        if found[-1].refused is not None:
            break
    if found[0].refused is not None:
        raise room.RoomError(found[0].refused)
    about = {
        "checkpoint": {"name": str(where) if where == weights.DEFAULT else Path(where).name}
        | {"sha256": record.checksums(weights.locate(where))},
        "window": model.config.text.window,
        "streams": world.streams,
        "recorded": not (eager or on_cpu),
        "seed": seed,
        "seconds": round(clock.perf_counter() - began, 1),
        **record.circumstances(model),
    }
    return Report(found, columns, about)


def _fitting(model: Model, world: Long, frames: int, columns: Sequence[str], eager: bool, meter: Meter) -> Length:
    """One length, or why it was refused."""
    seen, asks = tokens_seen(model, FRAME, [float(second) for second in range(frames)]), plan(world, frames)
    room_for = room.capacity(model, int(seen[-1]), asks)
    try:
        room.check(model, len(columns) * world.streams, room_for)
    except room.RoomError as error:
        return Length(frames, int(seen[-1]), refused=str(error))
    exam = Exam(model, {}, asks, room.forks(model, room_for))
    found, steps, nbytes = {}, None, 0
    for column in columns:
        watcher = Watcher(model, world.streams, room_for, recorded=False if eager else None)
        quiz = Quiz(exam, meter)
        taken = _watch(watcher, world, frames, column == "no_delta", quiz)
        found[column] = _counted(asks, quiz.finish())
        if column == FULL:
            steps, nbytes = taken, watcher.memory.nbytes // world.streams
    return Length(frames, int(seen[-1]), steps, nbytes, found)


@torch.no_grad()
def _watch(watcher: Watcher, world: Long, frames: int, forgetting: bool, quiz: Quiz) -> tuple[float, float]:
    """So many frames into every row, with what is asked on the way -> milliseconds of the last ones, p50 and p90."""
    device, taken = watcher.model.device, []
    for frame, pixels in enumerate(world.pictures(0, frames, device)):
        if forgetting:
            watcher.change(without_delta)
        began = _clock(device)
        watcher.observe(pixels, float(frame))
        if frame >= max(frames - TIMED, SHORTEST // 2):  # the first steps of a kind are recorded, which takes seconds
            taken.append(_clock(device) - began)
        lines = [line for line, ask in enumerate(quiz.exam.asks) if ask.frame == frame]
        quiz.ask(watcher.memory, [quiz.exam.asks[line].stream for line in lines], lines)
        quiz.meter.add(world.streams)
    middle, slow = np.quantile(taken, (0.5, 0.9)) * 1000
    return round(float(middle), 3), round(float(slow), 3)


def _clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock.perf_counter()


def _counted(asks: Sequence[Ask], said: Sequence[str]) -> dict[str, Count]:
    """Right answers by row."""
    marks: dict[str, list[bool]] = {row: [] for row in ROWS}
    for ask, given in zip(asks, said, strict=True):
        marks[ask.rows[0]].append(given.strip() == ask.question.answer)
    return {row: Count(sum(right), len(right)) for row, right in marks.items()}
