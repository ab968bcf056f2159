"""Needles of very long streams: shown once, asked in the world's own words, seen as they are told."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from infinitevl.eval import needles
from infinitevl.eval.exam import EvalError, painted
from infinitevl.eval.needles import CHAPTER, KINDS, Long
from infinitevl.synth import atlas
from infinitevl.synth.questions import pair_name, plural, questions
from infinitevl.synth.world import EMBLEM, FILL, GLYPH, GROUP, HELDOUT, HELDOUT_SETTING, Events, make_stories

CHAPTERS = 6  # of which 0, 1 and 4 have needles


@pytest.fixture(scope="module")
def world() -> Long:
    return needles.long(3, 3, CHAPTERS * CHAPTER)


def named(world: Long, b: int) -> tuple[Counter[str], Counter[int]]:
    """How often a stream shows each word, and each colour and shape."""
    words: Counter[str] = Counter()
    pairs: Counter[int] = Counter()
    for number in range(CHAPTERS):
        stories = world.chapter(number)
        words.update(stories.word(b, sign) for sign in np.flatnonzero(stories.signs.start[b] < CHAPTER))
        pairs.update(stories.sign_pair[b, stories.signs.start[b] < CHAPTER].tolist())
        pairs.update(stories.group_pair[b, stories.groups.start[b] < CHAPTER].tolist())
    return words, pairs


def once(world: Long) -> bool:
    """Whether every needle's words and looks are on one thing only."""
    for b in range(world.streams):
        words, pairs = named(world, b)
        looks = {name: count for pair, count in pairs.items() for name in (pair_name(pair), plural(pair_name(pair)))}
        for needle in (each for each in world.needles if each.stream == b):
            told = f" {needle.text} {needle.answer} ".replace("?", "")
            found = [count for name, count in [*words.items(), *looks.items()] if f" {name} " in told]
            if not found or set(found) != {1}:
                return False
    return True


def test_what_a_needle_is_about_is_shown_once(world):
    assert once(world)
    per_stream = Counter(needle.stream for needle in world.needles)
    assert set(per_stream) == {0, 1, 2} and min(per_stream.values()) >= 3 * (2 * needles.SIGNS + needles.GROUPS)
    assert {needle.kind for needle in world.needles} == set(KINDS)


def test_a_needle_shown_twice_would_be_noticed(world):
    """The planted fault: distractors take their looks, or words, from those kept for needles."""
    everything = np.tile(np.arange(56), (world.streams, 1))
    assert not once(replace(world, spare=everything))
    again = replace(world, marked={**world.marked, 2: world.marked[1]})
    assert not once(again)


def test_a_chapter_with_a_needles_word_is_drawn_again(world):
    """The planted word is one that a distractor has; the chapter drawn instead is as good as any."""
    word = world.chapter(2).word(1, 0)
    guarded = replace(world, words=tuple(words | {word} if b == 1 else words for b, words in enumerate(world.words)))
    other = guarded.chapter(2)
    assert word not in [other.word(1, sign) for sign in range(20)]
    assert not np.array_equal(other.letters, world.chapter(2).letters)


def test_needles_are_asked_in_the_worlds_words(world):
    """Text and answer are those that `questions` gives for that very sign or group."""
    for needle in world.needles:
        number, last = divmod(needle.evidence, CHAPTER)
        found = []
        for chance in range(20):  # order is drawn before or after; of two groups that end together one is drawn
            stories, rng = world.chapter(number), np.random.default_rng(chance)
            found += questions(stories, needle.stream, CHAPTER - 1, rng, (needle.kind,), 0.0, (last, last))
        assert (needle.text, needle.answer, last) in [(each.text, each.answer, each.evidence) for each in found]


def test_what_is_seen_is_what_is_told(world):
    """Form and colour of every emblem and object, in frames with and without needles."""
    for number in (1, 2):
        stories = world.chapter(number)
        halves = [np.split(part, 2, 1) for part in (stories.groups.start, stories.groups.end, stories.group_pair)]
        shown = [(EMBLEM, stories.signs, stories.sign_pair)]
        shown += [(GROUP + row, Events(halves[0][row], halves[1][row]), halves[2][row]) for row in range(2)]
        for strip, events, pairs in shown:
            now, there = events.at(CHAPTER), 0
            for b, frame in zip(*np.nonzero(now < pairs.shape[1]), strict=True):
                glyph, fill = (stories.strips[b, frame, strip, part] for part in (GLYPH, FILL))
                cells = np.flatnonzero(glyph)
                pair = pairs[b, now[b, frame]]
                assert len(cells) and (glyph[cells] == atlas.SHAPE0 + pair % len(atlas.SHAPES)).all()
                away = fill.reshape(6, 3)[cells] - np.array(atlas.PALETTE[pair // len(atlas.SHAPES)])
                assert np.abs(away).max() <= 20  # a shade of it: drawn up to 10 away, then cut at 0 and 255
                there += 1
            assert there > 50


def test_two_things_in_view_never_look_the_same(world):
    for number in range(CHAPTERS):
        stories = world.chapter(number)
        for b in range(world.streams):
            for frame in range(CHAPTER):
                parts = ((stories.signs, stories.sign_pair), (stories.groups, stories.group_pair))
                pairs = [
                    pair
                    for events, of in parts
                    for pair in of[b, (events.start[b] <= frame) & (frame < events.end[b])].tolist()
                ]
                assert len(set(pairs)) == len(pairs)


def test_pictures_go_on_over_a_chapters_end(world):
    device = torch.device("cpu")
    first, count = CHAPTER - 3, 7
    shown = list(world.pictures(first, count, device))
    apart = [*painted(world.chapter(0), range(3), CHAPTER, device)][-3:] + [
        *painted(world.chapter(1), range(3), 4, device)
    ]
    assert len(shown) == count and all(torch.equal(a, b) for a, b in zip(shown, apart, strict=True))


def test_the_clock_goes_on_and_seeds_differ(world):
    assert [int(world.chapter(number).t0[0]) for number in range(3)] == [0, CHAPTER, 2 * CHAPTER]
    assert needles.long(3, 3, CHAPTERS * CHAPTER).needles == world.needles
    assert needles.long(4, 3, CHAPTERS * CHAPTER).needles != world.needles
    assert needles.long(3, 3, CHAPTER).needles[:5] == world.needles[:5], "a longer stream begins as a shorter one"
    told = make_stories(3, 3, CHAPTER, HELDOUT, HELDOUT_SETTING)
    assert not np.array_equal(told.grain, world.chapter(0).grain)


@pytest.mark.parametrize("words", [(0, 0, 9), (0, 1, 0), (-1, 1, 9)])
def test_streams_of_nothing_are_refused(words):
    with pytest.raises(EvalError, match="need a seed of 0 or more"):
        needles.long(*words)
