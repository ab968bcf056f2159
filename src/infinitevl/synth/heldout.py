"""Follow a frame: the fixed held-out test: which streams are watched, what is asked when, and how answers are counted.

Nothing here knows a model. `worlds()` gives the streams, `plan()` what is asked after which frame, `score` takes one
answer for each line of the plan, in its order, and gives a table. Right means equal to the answer, letter for letter.

Age is how long the evidence has been out of view, in windows of the default model: 256 tokens, where a frame takes 16
and every fourth frame a time stamp of about 6, so 17.5 tokens a frame and 14.6 frames a window.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .questions import NOW, RECALL, STATES, UNSEEN, YES_NO, Question, questions
from .world import HELDOUT, HELDOUT_FONTS, HELDOUT_SETTING, Stories, make_stories

WINDOW = 256  # tokens
TOKENS_PER_FRAME = 17.5
STREAMS, FRAMES = 96, 256
FONT_STREAMS, FONT_FRAMES = 64, 128
_SEED = 2512
_MOMENTS = range(39, FRAMES, 8)  # frames after which questions are asked
_DISTRACTORS = 2  # other signs and other groups that must have been seen before anything is asked about the past
_FORM_WORDS = frozenset(
    "what does the sign say digit is shown how many colour shape emblem door open light on word came with before after "
    "was at when were there first last did change a an".split()
)
_OPEN = ("word_by_emblem", "emblem_by_word", "order", "when_word", "count_past")  # answered "not seen" at times


@dataclass(frozen=True)
class Row:
    """A row of the table. ages: least and greatest age in windows (the second excluded), None where age is no matter.

    halves: the row's count is the lower of its seen and its never-seen half.
    """

    name: str
    title: str
    ages: tuple[float, float] | None = None
    halves: bool = False


ROWS = (
    Row("now", "now"),
    Row("states", "now, yes or no (door, light)"),
    Row("fonts", "now, unseen fonts"),
    Row("window", "in the window", (0, 1)),
    Row("age1", "1 window ago", (1, 2)),
    Row("age2", "2 windows ago", (2, 4)),
    Row("age4", "4 windows ago", (4, 8)),
    Row("age8", "8 windows ago", (8, 16)),
    Row("relay", "older than 3 windows", (3, math.inf)),
    Row("never", "never seen, yes or no", halves=True),
    Row("unseen", "never seen, open question", halves=True),
)
_AGES = tuple(row for row in ROWS if row.ages and row.name != "relay")


@dataclass(frozen=True)
class Ask:
    """One line of the plan: after `frame` of stream `stream` of `world`, ask `question`; it counts in `rows`."""

    world: str
    stream: int
    frame: int
    question: Question
    rows: tuple[str, ...]


def age(question: Question) -> float:
    """Windows since the evidence was last visible; infinite for what was never seen."""
    if question.evidence < 0:
        return math.inf
    return (question.asked - question.evidence) * TOKENS_PER_FRAME / WINDOW


@functools.cache
def worlds() -> dict[str, Stories]:
    """The streams, by the name of their split: 96 of 256 frames, and 64 of 128 frames in unseen fonts."""
    return {
        HELDOUT.name: make_stories(_SEED, STREAMS, FRAMES, HELDOUT, HELDOUT_SETTING),
        HELDOUT_FONTS.name: make_stories(_SEED, FONT_STREAMS, FONT_FRAMES, HELDOUT_FONTS, HELDOUT_SETTING),
    }


@functools.cache
def plan() -> tuple[Ask, ...]:
    """All that is asked, ordered by world, frame and stream; each row and half has at least 500 questions."""
    asks = [*_now(), *_fonts()]
    for b in range(STREAMS):
        rng = np.random.default_rng([_SEED, b])
        asks += _recall(b, rng) + _never(b, rng)
    return tuple(sorted(_once(asks), key=lambda ask: (ask.world, ask.frame, ask.stream)))


def _once(asks: list[Ask]) -> list[Ask]:
    """The same question drawn for two rows is asked once and counts in both."""
    merged: dict[tuple[str, int, int, str], Ask] = {}
    for ask in asks:
        key = (ask.world, ask.stream, ask.frame, ask.question.text)
        rows = merged[key].rows if key in merged else ()
        merged[key] = replace(ask, rows=tuple(dict.fromkeys(rows + ask.rows)))
    return list(merged.values())


def _now() -> list[Ask]:
    """What is in view, three moments in seven of every stream; door and light at one in four."""
    stories, asks = worlds()[HELDOUT.name], []
    for b in range(STREAMS):
        rng = np.random.default_rng([_SEED, 1, b])
        for number, frame in enumerate(_MOMENTS):
            if (number + b) % 7 < 3:
                found = questions(stories, b, frame, rng, NOW, never=0.05)
                asks += [Ask(HELDOUT.name, b, frame, question, ("now",)) for question in found]
            if (number + b) % 4 == 0:
                state = questions(stories, b, frame, rng, (STATES[int(rng.integers(2))],))
                asks += [Ask(HELDOUT.name, b, frame, question, ("states",)) for question in state]
    return asks


def _fonts() -> list[Ask]:
    """Each sign in an unseen font, read once, at its last frame in view."""
    stories, asks = worlds()[HELDOUT_FONTS.name], []
    rng = np.random.default_rng(_SEED)
    for b in range(FONT_STREAMS):
        for end in stories.signs.end[b]:
            frame = int(end) - 1
            found = questions(stories, b, frame, rng, ("sign",), never=0.0) if 0 <= frame < FONT_FRAMES - 1 else []
            asks += [Ask(HELDOUT_FONTS.name, b, frame, question, ("fonts",)) for question in found]
    return asks


def _recall(b: int, rng: np.random.Generator) -> list[Ask]:
    """Six questions about the past for each age row."""
    asks = []
    for row in _AGES:
        for number in range(6):
            question = _draw(b, rng, row, _turn(rng, RECALL, b + number))
            rows = (row.name, "relay") if age(question) >= 3 else (row.name,)
            asks.append(Ask(HELDOUT.name, b, question.asked, question, rows))
    return asks


def _never(b: int, rng: np.random.Generator) -> list[Ask]:
    """Pairs of one kind at one moment, one about what was seen (each age in turn) and one about what never was."""
    asks = []
    for name, kinds in (("never", YES_NO), ("unseen", _OPEN)):
        for number in range(6):
            row = _AGES[(b + number) % len(_AGES)]
            seen = _draw(b, rng, row, _turn(rng, kinds, b + number))
            unseen = _never_like(b, rng, seen)
            asks += [Ask(HELDOUT.name, b, seen.asked, question, (name,)) for question in (seen, unseen)]
    return asks


def _turn(rng: np.random.Generator, kinds: tuple[str, ...], number: int) -> list[str]:
    """Each kind's turn in order, the others behind it at random: some kinds never get old enough for a row."""
    first = kinds[number % len(kinds)]
    return [first, *rng.permutation([kind for kind in kinds if kind != first]).tolist()]


def _draw(b: int, rng: np.random.Generator, row: Row, kinds: list[str]) -> Question:
    """A question of the first of `kinds` that some moment of story b allows with evidence of the row's age."""
    stories = worlds()[HELDOUT.name]
    assert row.ages is not None
    newest = max(math.ceil(row.ages[0] * WINDOW / TOKENS_PER_FRAME), 1)
    oldest = math.ceil(row.ages[1] * WINDOW / TOKENS_PER_FRAME) - 1
    for kind in kinds:
        for frame in rng.permutation([moment for moment in _MOMENTS if moment >= newest]).tolist():
            within = (max(frame - oldest, 0), frame - newest)
            found = questions(stories, b, frame, rng, (kind,), 0.0, within) if _crowded(stories, b, frame) else []
            if found and found[0].answer not in (UNSEEN, "no sign", "never"):
                return found[0]
    raise AssertionError(f"story {b} has nothing to ask for row {row.name}")


def _crowded(stories: Stories, b: int, frame: int) -> bool:
    """Enough has been seen that every answer has at least two distractors of its kind."""
    return all((events.start[b] <= frame).sum() > _DISTRACTORS for events in (stories.signs, stories.groups))


def _never_like(b: int, rng: np.random.Generator, seen: Question) -> Question:
    """The twin of a question, about something that was not seen up to its moment."""
    for _ in range(100):
        found = questions(worlds()[HELDOUT.name], b, seen.asked, rng, (seen.kind,), never=1.0)
        if found and found[0].evidence < 0:
            return found[0]
    raise AssertionError(f"story {b} has nothing unseen to ask at frame {seen.asked}")


@dataclass(frozen=True)
class Count:
    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked if self.asked else math.nan


@dataclass(frozen=True)
class Score:
    """A row's result. `total` is what counts (for rows of halves the worse half); kinds: each kind of question."""

    row: Row
    total: Count
    seen: Count
    never: Count
    kinds: dict[str, Count]


def score(answers: Sequence[str], asks: Sequence[Ask] | None = None) -> dict[str, Score]:
    """One answer for each of `asks` (None: the whole `plan()`), in order -> the table, by row name.

    ValueError for a wrong number of answers.
    """
    asks = plan() if asks is None else asks
    if len(answers) != len(asks):
        raise ValueError(f"{len(answers)} answers for {len(asks)} questions; give one for each, in order")
    marks = [(ask, given.strip() == ask.question.answer) for ask, given in zip(asks, answers, strict=True)]
    return {row.name: _score(row, [mark for mark in marks if row.name in mark[0].rows]) for row in ROWS}


def _score(row: Row, marks: list[tuple[Ask, bool]]) -> Score:
    never = _count([right for ask, right in marks if ask.question.evidence < 0])
    seen = _count([right for ask, right in marks if ask.question.evidence >= 0])
    total = min(seen, never, key=lambda half: half.share) if row.halves else _count([right for _, right in marks])
    kinds = sorted({ask.question.kind for ask, _ in marks})
    by_kind = {kind: _count([right for ask, right in marks if ask.question.kind == kind]) for kind in kinds}
    return Score(row, total, seen, never, by_kind)


def _count(marks: list[bool]) -> Count:
    return Count(sum(marks), len(marks))


def blind() -> list[str]:
    """The best answers that depend on the form of the question alone: each form's most frequent one."""
    common: dict[str, Counter[str]] = {}
    for ask in plan():
        common.setdefault(_form(ask.question), Counter())[ask.question.answer] += 1
    return [common[_form(ask.question)].most_common(1)[0][0] for ask in plan()]


def _form(question: Question) -> str:
    """The question's template: its text without the words, times, colours and shapes it names."""
    return " ".join(word for word in question.text.split() if word.strip("?") in _FORM_WORDS)


def markdown(tables: dict[str, dict[str, Score]]) -> str:
    """Columns of results side by side, e.g. {"model": score(...), "blind": score(...)}, as a markdown table."""
    lines = ["| row | questions | " + " | ".join(tables) + " |", "|---|---:|" + "---:|" * len(tables)]
    for row in ROWS:
        scores = [table[row.name] for table in tables.values()]
        cells = " | ".join(_cell(each) for each in scores)
        lines.append(f"| {row.title} | {scores[0].seen.asked + scores[0].never.asked} | {cells} |")
    return "\n".join(lines) + "\n"


def _cell(result: Score) -> str:
    if not result.row.halves:
        return f"{result.total.share:.1%}"
    return f"{result.total.share:.1%} (seen {result.seen.share:.1%}, never {result.never.share:.1%})"


def as_json(table: dict[str, Score]) -> dict[str, dict[str, object]]:
    """The table as plain data: right and asked of each row, its halves and its kinds."""
    return {
        name: {
            "share": round(result.total.share, 4),
            "total": [result.total.right, result.total.asked],
            "seen": [result.seen.right, result.seen.asked],
            "never": [result.never.right, result.never.asked],
            "kinds": {kind: [count.right, count.asked] for kind, count in result.kinds.items()},
        }
        for name, result in table.items()
    }
