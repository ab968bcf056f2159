"""Both painters make the same picture."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from infinitevl.synth.compose import Composer
from infinitevl.synth.render import render
from infinitevl.synth.world import BLUR, HELDOUT_FONTS, LONG, NOISE, READING, TRAIN, WORD, Stories, make_stories


def composed(stories: Stories, **how: int) -> np.ndarray:
    params = {name: torch.from_numpy(part) for name, part in stories.params().items()}
    return Composer("cpu", **how)(params).numpy()


@pytest.mark.parametrize(("split", "setting"), [(TRAIN, READING), (HELDOUT_FONTS, LONG)])
def test_torch_equals_the_plain_renderer_within_one_level(split, setting):
    stories = make_stories(3, 2, 12, split, setting)
    pictures = composed(stories).reshape(2, 12, 112, 112, 3)
    plain = np.stack([[render(stories, b, f) for f in range(0, 12, 3)] for b in range(2)])
    apart = np.abs(pictures[:, ::3].astype(int) - plain)
    assert pictures.dtype == np.uint8
    assert apart.max() <= 1 and (apart > 0).mean() < 1e-3


def test_slices_do_not_show():
    stories = make_stories(4, 1, 7, TRAIN, READING)
    assert np.array_equal(composed(stories, slice_frames=2), composed(stories, slice_frames=7))


def test_clean_words_are_the_atlas_and_stand_out():
    """With noise, blur and everything but the word off, what differs from the picture without it is the word's ink."""
    stories = make_stories(5, 4, 4, TRAIN, replace(READING, noise=0.0, blur=0.0))
    assert not stories.scene[..., [NOISE, BLUR]].any()
    shown = (stories.signs.at(4) < stories.signs.start.shape[1]).reshape(-1)
    full = composed(stories).astype(int)
    stories.strips[:, :, WORD] = 0
    change = np.abs(full - composed(stories)).max(-1).reshape(16, -1)
    assert (change[shown].max(1) > 60).all()
    assert not change[~shown].any()


def test_noise_differs_between_frames_and_channels_and_has_the_strength_set():
    stories = make_stories(6, 1, 2, TRAIN, LONG)
    stories.scene[..., NOISE] = 20
    noisy = composed(stories).astype(int)
    stories.scene[..., NOISE] = 0
    noise = noisy - composed(stories)
    middle = noise[np.abs(noise).max(-1) < 20].astype(float)
    assert 9 < middle.std() < 13  # uniform from -20 to 20: 11.5
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.05
