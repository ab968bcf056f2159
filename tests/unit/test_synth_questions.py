"""Answers are true: they are read again from the numbers that the pictures are painted from, frame by frame."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest

from infinitevl.synth import atlas
from infinitevl.synth.questions import KINDS, NOW, RECALL, Question, clock, pair_name, plural, questions
from infinitevl.synth.world import EMBLEM, GLYPH, GROUP, LONG, PROPS, READING, SHORT, TRAIN, WORD, Stories, make_stories


@dataclass
class Sight:
    """What one frame shows: a word and an emblem's shape, groups as (shape, count), open, on, a digit."""

    word: str
    emblem: str
    groups: list[tuple[str, int]]
    open: bool
    on: bool
    digit: str


def look(stories: Stories, b: int, f: int) -> Sight:
    strips = stories.strips[b, f]
    letters = [glyph for glyph in strips[WORD, GLYPH] if glyph]
    word = "".join(atlas.ALPHABET[(glyph - atlas.LETTER0) % 32] for glyph in letters)
    emblem = int(strips[EMBLEM, GLYPH.start])
    groups = []
    for row in range(2):
        shapes = [int(glyph) for glyph in strips[GROUP + row, GLYPH] if glyph]
        if shapes:
            groups.append((atlas.SHAPES[shapes[0] - atlas.SHAPE0], len(shapes)))
    props = strips[PROPS]
    light = int(np.flatnonzero(props[GLYPH] == atlas.LIGHT)[0])
    digits = [int(glyph) - atlas.DIGIT0 for glyph in props[GLYPH] if glyph >= atlas.DIGIT0]
    return Sight(
        word,
        atlas.SHAPES[emblem - atlas.SHAPE0] if emblem else "",
        groups,
        bool((props[GLYPH] == atlas.OPEN).any()),
        bool(props[23 + 3 * light] > 200),
        str(atlas.digit_labels()[digits[0]]) if digits else "none",
    )


def signs(sights: list[Sight]) -> list[tuple[str, str, int, int]]:
    """(word, emblem shape, first frame, last frame) of the signs in a row of sights, in order."""
    found: list[tuple[str, str, int, int]] = []
    for f, sight in enumerate(sights):
        if found and sight.word and found[-1][0] == sight.word and found[-1][3] == f - 1:
            found[-1] = (*found[-1][:3], f)
        elif sight.word:
            found.append((sight.word, sight.emblem, f, f))
    return found


def stamp(frame: int) -> str:
    return clock(frame - frame % 4)


def changes(values: list[bool]) -> list[int]:
    return [f for f in range(1, len(values)) if values[f] != values[f - 1]]


def check(question: Question, sights: list[Sight]) -> None:
    """Compare a question with what was seen up to its frame."""
    seen, now, words = signs(sights), sights[-1], question.text.rstrip("?").split()
    by_word = {sign[0]: sign for sign in seen}
    answer = question.answer
    match question.kind:
        case "sign":
            assert answer == (now.word or "no sign")
        case "digit":
            assert answer == now.digit
        case "door":
            assert answer == ("yes" if now.open else "no")
        case "light":
            assert answer == ("yes" if now.on else "no")
        case "emblem_now":
            assert now.word and (words[1] == "colour" or answer == now.emblem)
        case "count_now":
            assert int(answer) in [count for shape, count in now.groups if plural(shape) == words[3]]
        case "word_by_emblem":
            told = [sign[0] for sign in seen if sign[1] == words[-1]]
            assert answer in told or answer == "not seen"
        case "emblem_by_word":
            named = by_word.get(words[-1])
            assert answer == "not seen" if named is None else answer.split()[1] == named[1]
        case "order":
            order = [sign[0] for sign in seen]
            step = -1 if "before" in words else 1
            assert answer == ("not seen" if words[-1] not in order else order[order.index(words[-1]) + step])
        case "word_at":
            minutes, seconds = words[-1].split(":")
            assert answer == (sights[60 * int(minutes) + int(seconds)].word or "no sign")
        case "when_word":
            named = by_word.get(words[2])
            assert answer == ("not seen" if named is None else stamp(named[2]))
        case "count_past":
            past = [group for sight in sights for group in sight.groups if plural(group[0]) == words[3]]
            assert answer == "not seen" or int(answer) in [count for _, count in past]
        case "first_word":
            assert answer == seen[0][0]
        case "last_word":
            assert answer == seen[-1][0]
        case "when_state":
            flips = changes([sight.on if "light" in words else sight.open for sight in sights])
            assert answer == (stamp(flips[-1]) if flips else "never")
        case "was_word":
            assert answer == ("yes" if words[1] in by_word else "no")
        case "was_pair":
            shown = {sight.emblem for sight in sights} | {group[0] for sight in sights for group in sight.groups}
            assert answer == "no" or words[-2] in shown
        case _:
            raise AssertionError(question.kind)


@pytest.mark.parametrize(("setting", "frames"), [(LONG, 160), (SHORT, 32)])
def test_every_answer_is_what_the_frames_show(setting, frames):
    stories, rng = make_stories(9, 12, frames, TRAIN, setting), np.random.default_rng(0)
    kinds: Counter[str] = Counter()
    for b in range(12):
        sights = [look(stories, b, f) for f in range(frames)]
        for frame in range(7, frames, 8):
            for question in questions(stories, b, frame, rng):
                check(question, sights[: frame + 1])
                kinds[question.kind] += 1
    assert set(kinds) == set(KINDS) and min(kinds.values()) >= 5


def test_evidence_is_the_last_frame_that_showed_the_answer():
    stories, rng = make_stories(2, 8, 128, TRAIN, LONG), np.random.default_rng(1)
    for b in range(8):
        seen = signs([look(stories, b, f) for f in range(128)])
        last = {word: end for word, _, _, end in seen}
        for frame in (60, 100, 127):
            for question in questions(stories, b, frame, rng, ("word_by_emblem", "order", "word_at", "last_word"), 0.0):
                assert question.asked == frame
                assert question.evidence == min(last[question.answer], frame)


def test_within_bounds_the_evidence():
    stories, rng = make_stories(2, 16, 128, TRAIN, LONG), np.random.default_rng(1)
    found = [
        question for b in range(16) for question in questions(stories, b, 120, rng, RECALL, never=0.0, within=(40, 80))
    ]
    assert len(found) > 60
    assert all(40 <= question.evidence <= 80 for question in found)


def test_never_chooses_between_seen_and_unseen():
    stories, rng = make_stories(2, 16, 128, TRAIN, LONG), np.random.default_rng(1)
    kinds = ("word_by_emblem", "emblem_by_word", "order", "when_word", "count_past", "was_word", "was_pair")
    for share, negative in ((0.0, False), (1.0, True)):
        found = [question for b in range(16) for question in questions(stories, b, 120, rng, kinds, never=share)]
        assert len(found) > 80
        assert {question.evidence < 0 for question in found} == {negative}
        assert {question.answer in ("not seen", "no") for question in found} == {negative}


def test_yes_and_no_are_balanced_and_answers_now_are_not_guessable():
    stories, rng = make_stories(4, 200, 40, TRAIN, LONG), np.random.default_rng(2)
    answers: dict[str, Counter[str]] = {}
    for b in range(200):
        for frame in (20, 30, 39):
            for question in questions(stories, b, frame, rng):
                answers.setdefault(question.kind, Counter())[question.answer] += 1
    for kind in ("was_word", "was_pair", "door", "light"):
        assert 0.42 < answers[kind]["yes"] / answers[kind].total() < 0.58
    for kind in NOW:
        assert answers[kind].most_common(1)[0][1] / answers[kind].total() < 0.3


def test_times_follow_the_start_of_the_story():
    stories = make_stories(3, 4, 64, TRAIN, LONG, np.full(4, 3600))
    early = replace(stories, t0=np.zeros(4, int))
    for b in range(4):
        late, soon = (
            questions(each, b, 60, np.random.default_rng(5), ("when_word",), never=0.0)[0] for each in (stories, early)
        )
        minutes, seconds = soon.answer.split(":")
        assert late.answer == f"{60 + int(minutes)}:{seconds}"


def test_names():
    assert pair_name(0) == "red circle" and pair_name(55) == "white ring"
    assert plural("red cross") == "red crosses" and plural("red star") == "red stars"
    assert [clock(second) for second in (0, 44, 60, 3664)] == ["0:00", "0:44", "1:00", "61:04"]


def test_words_that_repeat_are_not_asked_about():
    """One-letter words repeat: a question about one of two equal words would have two right answers."""
    crowded = replace(READING, letters=(1, 1), sign_frames=(1, 1), sign_gaps=(0, 0))
    stories, rng = make_stories(3, 60, 26, TRAIN, crowded), np.random.default_rng(3)
    for b in range(60):
        said = [stories.word(b, sign) for sign in range(stories.signs.start.shape[1])][:26]
        for question in questions(stories, b, 25, rng, ("when_word", "emblem_by_word"), never=0.0):
            named = question.text.rstrip("?").split()[2 if question.kind == "when_word" else -1]
            assert said.count(named) == 1
