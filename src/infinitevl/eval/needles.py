"""Follow a frame: one of a very long stream of the synthetic world, in which some things are shown once, never again.

A long stream is a chain of *chapters*: stories of 256 frames with the clock going on from one to the next. In a few of
them (the first, and those numbered by powers of four) lie *needles*: signs and groups of objects about which questions
can be asked for ever. All else is a distractor. What makes a needle one, within its stream:

- its word is on no other sign, and neither is the word of the sign before it where a question names that;
- its colour and shape belong to no other sign and no other group: they are kept for it.

Time is never asked for. Stamps go on (the frame at second 5,025 follows "83:44"), but a checkpoint trained on minutes
has never met them, and a right answer could only be copied from them: the kinds `when_word`, `word_at` and `when_state`
are left out, at every age alike. So are the last word and yes or no, which can be guessed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from infinitevl.eval.exam import EvalError, painted
from infinitevl.synth import atlas
from infinitevl.synth.questions import pair_name, plural
from infinitevl.synth.words import HELDOUT_WORDS
from infinitevl.synth.world import (
    EMBLEM,
    FILL,
    GLYPH,
    GROUP,
    HELDOUT,
    HELDOUT_SETTING,
    PAIRS,
    SIZE,
    Array,
    Events,
    Stories,
    make_stories,
)

FRAME = (SIZE, SIZE)  # pixels of a picture
CHAPTER = 256  # frames: as long as a held-out stream
SIGNS, GROUPS = 4, 2  # needles of a chapter that has any; one group in either row
MARKED = (0, *(4**power for power in range(7)))  # the chapters that have: at most 48 of 56 colours and shapes are kept
OPEN = ("word_by_emblem", "emblem_by_word", "order", "first_word")  # not to be guessed
KINDS = (*OPEN, "count_past")  # a count is one of five


@dataclass(frozen=True)
class Needle:
    """A question about a thing that was last seen at frame `evidence` of stream `stream`, and its one right answer."""

    stream: int
    kind: str
    text: str
    answer: str
    evidence: int


@dataclass(frozen=True)
class Long:
    """Streams of chapters. needles: ordered by chapter; marked: the chapters that have some, by number.

    words: of each stream, those that no chapter without needles may show. spare: [B, N] colours and shapes of
    distractors.
    """

    seed: int
    needles: tuple[Needle, ...]
    marked: dict[int, Stories]
    words: tuple[frozenset[str], ...]
    spare: Array

    @property
    def streams(self) -> int:
        return len(self.words)

    def chapter(self, number: int) -> Stories:
        """Chapter `number` of every stream; the same one however often it is asked for."""
        if number in self.marked:
            return self.marked[number]
        for attempt in itertools.count():  # a random string may be a needle's word: about one chapter in thirty
            stories = _drawn(self.seed, number, attempt, self.streams, HELDOUT_WORDS[1::2])
            if not any(self.words[b] & set(_words(stories, b)) for b in range(self.streams)):
                return _renamed(stories, *_distracting(stories, self.spare))
        raise AssertionError

    def pictures(self, first: int, count: int, device: torch.device) -> Iterator[Tensor]:
        """Frames first, first + 1, ... of all streams, one of each at a time: uint8 [B, 112, 112, 3]."""
        for number in range(first // CHAPTER, -(-(first + count) // CHAPTER)):
            start = number * CHAPTER
            skipped, end = max(first - start, 0), min(first + count - start, CHAPTER)
            yield from itertools.islice(painted(self.chapter(number), range(self.streams), end, device), skipped, None)


def long(seed: int, streams: int, frames: int) -> Long:
    """Streams of at least so many frames; the same arguments give the same ones. EvalError for less than one."""
    if streams < 1 or frames < 1 or seed < 0:
        raise EvalError(f"long streams need a seed of 0 or more, a stream and a frame: {seed}, {streams}, {frames}")
    numbers = [number for number in MARKED if number * CHAPTER < frames]
    marked = {number: _drawn(seed, number, 0, streams, HELDOUT_WORDS[::2]) for number in numbers}
    words = [Counter(itertools.chain(*(_words(each, b) for each in marked.values()))) for b in range(streams)]
    order = np.random.default_rng([HELDOUT.space, seed]).random((streams, PAIRS)).argsort(1)
    kept, spare = np.split(order, [len(numbers) * (SIGNS + GROUPS)], 1)
    needles: list[Needle] = []
    for place, (number, stories) in enumerate(marked.items()):
        own = kept[:, place * (SIGNS + GROUPS) :][:, : SIGNS + GROUPS]
        signs = np.array([_chosen(stories, b, words[b]) for b in range(streams)])
        groups = np.tile([0, stories.groups.start.shape[1] // 2], (streams, 1))  # the first of each row
        sign_pair, group_pair = _distracting(stories, spare)
        np.put_along_axis(sign_pair, signs, own[:, :SIGNS], 1)
        np.put_along_axis(group_pair, groups, own[:, SIGNS:], 1)
        marked[number] = _renamed(stories, sign_pair, group_pair)
        for b in range(streams):
            needles += _needles(marked[number], number * CHAPTER, b, signs[b], groups[b], words[b])
    return Long(seed, tuple(needles), marked, tuple(frozenset(each) for each in words), spare)


def _drawn(seed: int, number: int, attempt: int, streams: int, words: tuple[str, ...]) -> Stories:
    """Chapter `number` of all streams as the held-out world has it, its listed words out of `words`."""
    chance = ((seed + 1) << 40) + (number << 8) + attempt  # no chapter of another seed, and none of the held-out test
    t0 = np.full(streams, number * CHAPTER)
    return make_stories(chance, streams, CHAPTER, replace(HELDOUT, words=words), HELDOUT_SETTING, t0)


def _words(stories: Stories, b: int) -> list[str]:
    """The words that story b shows, in order."""
    shown = int((stories.signs.start[b] < stories.frames).sum())
    return [stories.word(b, sign) for sign in range(shown)]


def _chosen(stories: Stories, b: int, words: Counter[str]) -> list[int]:
    """The first signs of story b whose word is on one sign only of its stream's `words`."""
    once = [sign for sign, word in enumerate(_words(stories, b)) if words[word] == 1]
    if len(once) < SIGNS:
        raise AssertionError(f"story {b} has {len(once)} words that come once, {SIGNS} are needed")
    return once[:SIGNS]


def _needles(
    stories: Stories, start: int, b: int, signs: Array, groups: Array, words: Counter[str]
) -> Iterator[Needle]:
    """What can be asked about the needles of story b, which begins at frame `start`, in the words of the world."""
    for sign in signs.tolist():
        word, pair = stories.word(b, sign), pair_name(int(stories.sign_pair[b, sign]))
        last = start + int(stories.signs.end[b, sign]) - 1
        yield Needle(b, "word_by_emblem", f"what word came with the {pair}?", word, last)
        yield Needle(b, "emblem_by_word", f"what came with {word}?", pair, last)
        before = stories.word(b, sign - 1) if sign else None
        if before is not None and words[before] == 1:
            yield Needle(b, "order", f"what word came after {before}?", word, last)
        if start + sign == 0:
            yield Needle(b, "first_word", "what was the first word?", word, last)
    for group in groups.tolist():
        pair, count = pair_name(int(stories.group_pair[b, group])), str(stories.group_count[b, group])
        last = start + int(stories.groups.end[b, group]) - 1
        yield Needle(b, "count_past", f"how many {plural(pair)} were there?", count, last)


def _distracting(stories: Stories, spare: Array) -> tuple[Array, Array]:
    """Colours and shapes of all signs and groups out of `spare` [B, N]: emblems and either row of objects take a third
    each, so that no two things in view look the same."""
    signs, upper, lower = np.array_split(spare, 3, axis=1)

    def dealt(pairs: Array, among: Array) -> Array:
        return np.take_along_axis(among, pairs % among.shape[1], 1)

    rows = np.split(stories.group_pair, 2, 1)
    return dealt(stories.sign_pair, signs), np.hstack([dealt(rows[0], upper), dealt(rows[1], lower)])


def _renamed(stories: Stories, sign_pair: Array, group_pair: Array) -> Stories:
    """The stories with other emblems and objects, in what is told and in what is seen."""
    strips = stories.strips.copy()
    halves = [(*np.split(part, 2, 1),) for part in (stories.groups.start, stories.groups.end, group_pair)]
    _repaint(strips[:, :, EMBLEM], stories.signs, stories.sign_pair, sign_pair)
    for row, (start, end, pairs) in enumerate(zip(*halves, strict=True)):
        old = np.split(stories.group_pair, 2, 1)[row]
        _repaint(strips[:, :, GROUP + row], Events(start, end), old, pairs)
    nothing = stories.spare[:, :0]  # what never appears in a chapter may in the next one
    return replace(stories, sign_pair=sign_pair, group_pair=group_pair, strips=strips, spare=nothing)


def _repaint(strip: Array, events: Events, old: Array, new: Array) -> None:
    """Give the shapes of a strip [B, F, 59] the form and colour of pairs `new` [B, E] in the place of `old`."""
    now = np.minimum(events.at(strip.shape[1]), old.shape[1] - 1)
    before, after = (np.take_along_axis(pairs, now, 1)[..., None] for pairs in (old, new))
    glyph = strip[..., GLYPH]
    shape = (glyph >= atlas.SHAPE0) & (glyph < atlas.SHAPE0 + len(atlas.SHAPES))
    strip[..., GLYPH] = np.where(shape, atlas.SHAPE0 + after % len(atlas.SHAPES), glyph)
    palette = np.array(atlas.PALETTE)
    moved = palette[after // len(atlas.SHAPES)] - palette[before // len(atlas.SHAPES)]  # [B, F, 1, 3]
    fill = strip[..., FILL].reshape(*shape.shape, 3)
    strip[..., FILL] = np.where(shape[..., None], np.clip(fill + moved, 0, 255), fill).reshape(*strip.shape[:2], -1)
