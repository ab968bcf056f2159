"""Follow a frame: long after it went by, what is left of it: needles in a stream, asked for by their age.

Streams of the synthetic world go on for a very long time, each a row of one memory. What was shown once (`needles`) is
asked for on forks when half a window of tokens has come after its last sight, then one, two, four ... windows.
"""

from __future__ import annotations

import math
import sys
import time as clock
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infinitevl import weights
from infinitevl.eval import counts, freshness, needles, record, room
from infinitevl.eval.batched import Watcher, tokens_seen
from infinitevl.eval.exam import CONTROLS, FULL, EvalError, Exam, Meter, Quiz, blind, check_controls, without_delta
from infinitevl.eval.needles import CHAPTER, FRAME, KINDS, OPEN, Long, Needle
from infinitevl.memory import Delta, Memory
from infinitevl.model import Model
from infinitevl.synth import heldout
from infinitevl.synth.heldout import Ask, Count
from infinitevl.synth.questions import Question

COLUMNS = (FULL, "no_delta", "blind")
NEWEST = 0.5  # of a window: the least age that is asked for, as something in view of the window to compare with
LISTENED = 64  # frames after the last question over which the gates are listened to


@dataclass(frozen=True)
class Upkeep:
    """What is done to the delta states between frames; not part of the model. Nothing, unless said otherwise.

    refresh_every: after so many frames, `Memory.refresh(keep)`. state_dtype: states are rounded to it after each frame.
    EvalError for a rate below 1, or a share that `Memory.refresh` refuses.
    """

    refresh_every: int | None = None
    keep: float = 0.0
    state_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.refresh_every is not None and self.refresh_every < 1:
            raise EvalError(f"states can be refreshed after every frame or more seldom, not every {self.refresh_every}")
        if not 0 <= self.keep <= 1:
            raise EvalError(f"keep is a share of the delta states from 0 to 1, got {self.keep}")

    def after(self, watcher: Watcher, frame: int) -> None:
        """Frame number `frame` was seen."""
        if self.state_dtype != torch.float32:
            watcher.change(self._rounded)
        if self.refresh_every is not None and (frame + 1) % self.refresh_every == 0:
            watcher.change(lambda memory: memory.refresh(self.keep))

    def _rounded(self, memory: Memory) -> Memory:
        def rounded(block: Delta) -> Delta:
            return block._replace(state=block.state.to(self.state_dtype).to(block.state.dtype))

        blocks = (rounded(block) if isinstance(block, Delta) else block for block in memory.blocks)
        return memory._replace(blocks=tuple(blocks))

    def as_json(self) -> dict[str, Any]:
        dtype = str(self.state_dtype).removeprefix("torch.")
        return {"refresh_every": self.refresh_every, "keep": self.keep, "state_dtype": dtype}


def ages(window: int, tokens: int) -> list[float]:
    """The ages that are asked for, in windows: a half, one, two, four ... up to `tokens`. EvalError for none."""
    if tokens < window:
        raise EvalError(f"--tokens {tokens} is less than a window of {window} tokens: nothing would be out of it")
    return [NEWEST, *(2.0**power for power in range(int(math.log2(tokens / window)) + 1))]


def plan(shown: Sequence[Needle], seen: np.ndarray, window: int, wanted: Sequence[float]) -> list[Ask]:
    """When each needle is asked for: after the first frame that leaves it `wanted` windows of tokens behind.

    seen: tokens of the stream after each frame [F]; what would be asked after the last one is not. In order of frames.
    """
    asks = []
    for needle in shown:
        for age in wanted:
            frame = int(np.searchsorted(seen, seen[needle.evidence] + age * window))
            if frame < len(seen):
                question = Question(needle.kind, needle.text, needle.answer, needle.evidence, frame)
                asks.append(Ask("long", needle.stream, frame, question, (f"{age:g}",)))
    return sorted(asks, key=lambda ask: (ask.frame, ask.stream))


@dataclass(frozen=True)
class Report:
    """What a run found. answers: by column, one for each of `asks`. seen: tokens after each frame. about: plain."""

    asks: Sequence[Ask]
    answers: Mapping[str, Sequence[str]]
    window: int
    seen: np.ndarray
    about: dict[str, Any]

    @cached_property
    def ages(self) -> list[float]:
        return sorted({float(ask.rows[0]) for ask in self.asks})

    @cached_property
    def _tally(self) -> dict[tuple[str, float, str, int], Count]:
        """Right answers by column, age, kind of question, and chapter that showed the needle."""
        tally: dict[tuple[str, float, str, int], Count] = {}
        for column, given in self.answers.items():
            for ask, said in zip(self.asks, given, strict=True):
                question = ask.question
                key = column, float(ask.rows[0]), question.kind, question.evidence // CHAPTER
                before = tally.get(key, Count(0, 0))
                tally[key] = Count(before.right + (said.strip() == question.answer), before.asked + 1)
        return tally

    def count(
        self, column: str, age: float | None = None, kinds: Iterable[str] = OPEN, chapter: int | None = None
    ) -> Count:
        """Right answers of a column to some kinds; age (windows) and chapter: None for all of them."""
        found = [
            count
            for (of, old, kind, shown), count in self._tally.items()
            if of == column and age in (None, old) and kind in kinds and chapter in (None, shown)
        ]
        return Count(sum(each.right for each in found), sum(each.asked for each in found))

    @cached_property
    def chapters(self) -> list[int]:
        """The chapters that showed needles."""
        return sorted({ask.question.evidence // CHAPTER for ask in self.asks})

    def markdown(self) -> str:
        """The table by age, with each kind of question; and one by how long the stream was before the needle, too."""
        heads = ["windows", "tokens", "questions", *self.answers, *KINDS]
        rows = []
        for age in self.ages:
            shares = [counts.cell(self.count(column, age), column == FULL) for column in self.answers]
            kinds = [counts.cell(self.count(FULL, age, [kind])) for kind in KINDS]
            asked = str(self.count(FULL, age).asked)
            rows.append([f"{age:g}", f"{age * self.window:,.0f}", asked, *shares, *kinds])
        named = f"{', '.join(self.answers)} and the questions count {', '.join(OPEN)}; each of these and {KINDS[-1]}"
        said = f"\n{named} alone are of full; the interval is one of 95 %.\n\nfull, by what came before the needle:\n\n"
        return counts.table(heads, rows) + said + self._filled()

    def _filled(self) -> str:
        """The table of `full` by chapter and age: a memory that is full already may take less."""
        rows = [
            [f"{self._before(chapter):,}"]
            + [counts.cell(self.count(FULL, age, chapter=chapter)) for age in self.ages]
            + [str(self.count(FULL, chapter=chapter).asked)]
            for chapter in self.chapters
        ]
        return counts.table(["tokens before", *(f"{age:g}" for age in self.ages), "questions"], rows)

    def as_json(self) -> dict[str, Any]:
        """Everything but the answers, as plain data."""
        return {
            **self.about,
            "window": self.window,
            "frames": len(self.seen),
            "tokens": int(self.seen[-1]),
            "columns": {column: CONTROLS[column] for column in self.answers},
            "headline": list(OPEN),
            "ages": self._curve(OPEN),
            "kinds": {kind: self._curve([kind]) for kind in KINDS},
            "chapters": [
                {"chapter": chapter, "tokens_before": self._before(chapter), "ages": self._curve(OPEN, chapter)}
                for chapter in self.chapters
            ],
        }

    def _before(self, chapter: int) -> int:
        return int(self.seen[chapter * CHAPTER - 1]) if chapter else 0

    def _curve(self, kinds: Sequence[str], chapter: int | None = None) -> list[dict[str, Any]]:
        points = []
        for age in self.ages:
            told = {column: self.count(column, age, kinds, chapter) for column in self.answers}
            if told[FULL].asked:
                plain = {column: counts.plain(count) for column, count in told.items()}
                points.append({"windows": age, "tokens": round(age * self.window), **plain})
        return points


def run(
    where: str | Path = weights.DEFAULT,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    tokens: int | None = None,
    streams: int | None = None,
    columns: Sequence[str] = COLUMNS,
    upkeep: Upkeep | None = None,
    seed: int = 0,
) -> Report:
    """Recall by age of a checkpoint. Progress goes to stderr.

    tokens: the greatest age (None: 16,384 on a CPU, 524,288 elsewhere); streams: rows (None: 4 and 32). A model
    without a window gets a memory for all of it, its ages in windows of the held-out test. EvalError for columns that
    `check_columns` refuses, less than a window of tokens or one stream; RoomError; those of `weights.load`.
    """
    check_columns(columns, COLUMNS)
    on_cpu = torch.device(device).type == "cpu"
    tokens, streams = tokens or (1 << 14 if on_cpu else 1 << 19), streams or (4 if on_cpu else 32)
    window = weights.read_config(weights.locate(where)).text.window or heldout.WINDOW
    wanted = ages(window, tokens)
    model, began = weights.load(where, device, dtype), clock.perf_counter()
    print(f"laying out streams in which things reach an age of {tokens:,} tokens", file=sys.stderr, flush=True)
    world, seen = laid_out(model, tokens, streams, seed)
    asks = plan(world.needles, seen, window, wanted)
    given, fresh = watched(model, world, asks, seen, columns, upkeep or Upkeep())
    about = {
        "checkpoint": {"name": str(where) if where == weights.DEFAULT else Path(where).name}
        | {"sha256": record.checksums(weights.locate(where))},
        "greatest_age": tokens,
        "streams": world.streams,
        "seed": seed,
        "upkeep": (upkeep or Upkeep()).as_json(),
        "seconds": round(clock.perf_counter() - began, 1),
        **record.circumstances(model),
        "freshness": fresh,
    }
    return Report(asks, given, window, seen, about)


def check_columns(columns: Sequence[str], known: Sequence[str]) -> None:
    """EvalError for a column that is not known or named twice, and where `full` is not among them."""
    check_controls(columns, known)
    if FULL not in columns:
        raise EvalError(f"the model as it is must be asked too: {FULL} is not among {', '.join(columns)}")


def laid_out(model: Model, tokens: int, streams: int, seed: int) -> tuple[Long, np.ndarray]:
    """Streams long enough that every needle of their first chapter reaches an age of `tokens`; tokens after each frame.

    Frames come one a second.
    """
    twice = tokens_seen(model, FRAME, [0.0, 0.0])
    most = CHAPTER + tokens // int(twice[1] - twice[0]) + 1  # as if no frame had a stamp
    seen = tokens_seen(model, FRAME, [float(second) for second in range(most)])
    first = needles.long(seed, streams, CHAPTER)
    latest = max(needle.evidence for needle in first.needles)
    frames = int(np.searchsorted(seen, seen[latest] + tokens)) + 1
    return needles.long(seed, streams, frames), seen[:frames]


@torch.no_grad()
def watched(
    model: Model, world: Long, asks: Sequence[Ask], seen: np.ndarray, columns: Sequence[str], upkeep: Upkeep
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Answers by column, and how fresh the states of `full` were on the way (`freshness`)."""
    capacious = room.capacity(model, int(seen[-1]), asks)
    watching = [column for column in columns if column != "blind"]
    room.check(model, len(watching) * world.streams, capacious)
    exam = Exam(model, {}, asks, room.forks(model, capacious), capacity=capacious)
    unasked = len({ask.question.text for ask in asks}) * ("blind" in columns)
    meter = Meter(len(watching) * (len(seen) * world.streams + len(asks)) + unasked)
    watchers = {column: Watcher(model, world.streams, capacious) for column in watching}
    quizzes = {column: Quiz(exam, meter) for column in watching}
    lines: dict[int, list[int]] = {}
    for line, ask in enumerate(asks):
        lines.setdefault(ask.frame, []).append(line)
    looks, fresh = _looks(model, seen), []
    for frame, pixels in enumerate(world.pictures(0, len(seen), model.device)):
        asked = lines.get(frame, [])
        for column, watcher in watchers.items():
            if column == "no_delta":
                watcher.change(without_delta)
            watcher.observe(pixels, float(frame))
            if column == FULL:
                upkeep.after(watcher, frame)
            quizzes[column].ask(watcher.memory, [asks[line].stream for line in asked], asked)
        if frame in looks:
            rows = freshness.states(watchers[FULL].memory)
            fresh += [{"tokens": int(seen[frame]), **row} for row in rows]
        meter.add(len(watching) * world.streams)
    given = {column: quiz.finish() for column, quiz in quizzes.items()}
    if "blind" in columns:
        given["blind"] = blind(exam, meter)
    listened = _listened(model, world, watchers[FULL].memory, len(seen))
    return {column: given[column] for column in columns}, {"states": fresh, "gates": listened}


def _looks(model: Model, seen: np.ndarray) -> set[int]:
    """The frames after which states are looked at: when the stream is 1, 2, 4 ... windows long, and the last one."""
    window = model.config.text.window or heldout.WINDOW
    doubled = [window * 2**power for power in range(int(math.log2(max(seen[-1] / window, 1))) + 1)]
    return {*np.searchsorted(seen, doubled).tolist(), len(seen) - 1}


def _listened(model: Model, world: Long, memory: Memory, first: int) -> list[dict[str, Any]]:
    """`freshness.ages` of a few streams over the frames that follow; nothing for a model without a window, whose memory
    is full."""
    if model.config.text.window is None:
        return []
    rows = torch.arange(min(world.streams, freshness.SAMPLE), device=model.device)
    pictures = world.pictures(first, LISTENED, model.device)
    frames = ((pixels[rows], float(first + number)) for number, pixels in enumerate(pictures))
    return freshness.ages(model, memory.rows(rows), frames)
