"""The stories: nothing of the held-out world is trained on, and what they promise holds."""

from dataclasses import replace

import numpy as np
import pytest

from infinitevl.synth import atlas
from infinitevl.synth.world import (
    BOARD,
    CELLS,
    GHOSTS,
    GLYPH,
    HELDOUT,
    HELDOUT_FONTS,
    HELDOUT_SETTING,
    LONG,
    READING,
    SHORT,
    SIZE,
    STEP_X,
    TRAIN,
    WORD,
    Stories,
    X,
    make_stories,
)


def words(stories: Stories) -> set[str]:
    streams, count = stories.letters.shape[:2]
    return {stories.word(b, sign) for b in range(streams) for sign in range(count)}


def glyphs(stories: Stories, first: int, last: int) -> set[int]:
    used = stories.strips[..., GLYPH]
    return set(used[(used >= first) & (used < last)].tolist())


@pytest.fixture(scope="module")
def trained() -> Stories:
    return make_stories(1, 64, 128, TRAIN, LONG)


@pytest.fixture(scope="module")
def held() -> Stories:
    return make_stories(1, 64, 128, HELDOUT, HELDOUT_SETTING)


def test_lists_fonts_digits_and_seeds_of_the_splits_are_apart():
    assert not set(TRAIN.words) & set(HELDOUT.words)
    assert len(set(TRAIN.words)) > 550 and len(set(HELDOUT.words)) > 130
    assert not set(TRAIN.fonts) & set(HELDOUT_FONTS.fonts)
    assert len(TRAIN.fonts) >= 8 and len(HELDOUT_FONTS.fonts) == 3
    assert not set(TRAIN.digits) & set(HELDOUT.digits)
    assert len({TRAIN.space, HELDOUT.space, HELDOUT_FONTS.space}) == 3


def test_no_word_seen_in_training_is_held_out(trained, held):
    assert not {word for word in words(trained) if len(word) > 3} & words(held)


def test_random_strings_of_both_splits_cannot_meet():
    """Enough strings of four letters that free choice would give hundreds in common."""
    only_random = replace(LONG, random_share=1.0, letters=(4, 4))
    ours, theirs = (words(make_stories(5, 2000, 64, split, only_random)) for split in (TRAIN, HELDOUT))
    assert len(ours) > 15_000 and len(theirs) > 15_000
    assert not ours & theirs


def test_pictures_use_only_the_glyphs_of_their_split(trained, held):
    letters = (atlas.LETTER0, atlas.DIGIT0)
    fonts = make_stories(1, 16, 64, HELDOUT_FONTS, HELDOUT_SETTING)
    assert not glyphs(trained, *letters) & glyphs(fonts, *letters)
    assert {(glyph - atlas.LETTER0) // 32 for glyph in glyphs(fonts, *letters)} == set(atlas.HELDOUT_FONTS)
    assert max(glyphs(trained, atlas.DIGIT0, atlas.GLYPHS)) < atlas.DIGIT0 + atlas.HELDOUT_DIGITS
    assert min(glyphs(held, atlas.DIGIT0, atlas.GLYPHS)) >= atlas.DIGIT0 + atlas.HELDOUT_DIGITS


def test_the_same_seed_tells_the_same_story_and_another_seed_another():
    first, again, other = (make_stories(seed, 3, 20, TRAIN, SHORT) for seed in (4, 4, 5))
    assert all(np.array_equal(value, again.params()[name]) for name, value in first.params().items())
    assert not np.array_equal(first.letters, other.letters)


def test_half_of_the_signs_say_random_strings_of_four_to_six(held):
    said = [held.word(b, sign) for b in range(64) for sign in range(held.letters.shape[1])]
    listed = sum(word in HELDOUT.words for word in said) / len(said)
    assert 0.42 < listed < 0.58
    assert {len(word) for word in said} == {4, 5, 6}


def test_colour_and_shape_pairs_are_unique_in_a_story(held):
    for b in range(64):
        pairs = np.concatenate([held.sign_pair[b], held.group_pair[b], held.spare[b]])
        assert sorted(pairs) == list(range(56))
        assert len(held.spare[b]) >= 14


@pytest.mark.parametrize("setting", [READING, SHORT, LONG])
def test_signs_follow_each_other_for_the_time_set(setting):
    signs = make_stories(2, 50, 96, TRAIN, setting).signs
    inner = signs.end < 96
    last = (signs.end - signs.start)[inner]
    gap = (signs.start[:, 1:] - signs.end[:, :-1])[signs.start[:, 1:] < 96]
    assert (last.min(), last.max()) == setting.sign_frames
    assert (gap.min(), gap.max()) == setting.sign_gaps


def test_an_unlisted_length_makes_random_words_only():
    stories = make_stories(0, 4, 8, TRAIN, replace(READING, letters=(1, 3)))
    assert {len(word) for word in words(stories)} == {1, 2, 3}


def test_every_letter_lies_in_the_frame(trained):
    word = trained.strips[:, :, WORD].astype(int)
    cell = 512 * 16 / np.maximum(word[..., STEP_X], 1)  # pixels: 32 texels * 4096 / 16 / step
    length = (word[..., GLYPH] != atlas.BLANK).sum(-1)
    left, right = word[..., X] / 16, word[..., X] / 16 + cell * length
    shown = length > 0
    assert left[shown].min() > -1 and right[shown].max() < SIZE + 1
    assert 10.9 < cell[shown].min() and cell[shown].max() < 17.2


def test_the_board_is_there_exactly_with_its_word(trained):
    board = trained.strips[:, :, BOARD, GLYPH.start] == atlas.BOARD
    lettered = (trained.strips[:, :, WORD, GLYPH] != atlas.BLANK).any(-1)
    assert np.array_equal(board, lettered)
    assert np.array_equal(board, trained.signs.at(128) < trained.signs.start.shape[1])


def test_t0_is_given_or_drawn_in_multiples_of_four():
    drawn = make_stories(0, 200, 4, TRAIN, replace(READING, latest_start=3600)).t0
    assert (drawn % 4 == 0).all() and drawn.max() > 3000 and drawn.max() <= 3600
    given = np.array([8, 400])
    assert make_stories(0, 2, 4, TRAIN, READING, given).t0 is given
    assert not make_stories(0, 5, 4, TRAIN, READING).t0.any()


def test_the_atlas_is_blank_where_strips_rely_on_it():
    cells = atlas.atlas()
    assert cells.shape == (atlas.GLYPHS, atlas.CELL_H, atlas.CELL_W)
    assert not cells[atlas.BLANK].any() and not cells[:, 0].any() and not cells[:, -1].any()
    assert cells[1:].reshape(atlas.GLYPHS - 1, -1).max(1).min() > 100
    assert GHOSTS > 0 and CELLS == 6


def test_letters_of_a_font_are_told_apart():
    letters = atlas.atlas()[atlas.LETTER0 : atlas.DIGIT0].astype(float).reshape(-1, 32, 48 * 32)
    for font in letters:
        apart = np.abs(font[:, None] - font[None]).mean(-1) + np.eye(32) * 255
        assert apart.min() > 6  # of 255, averaged over the cell; O and Q are the closest
