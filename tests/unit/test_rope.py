"""Positions of prompts and streams, pinned to the rule the checkpoints were trained with, and the angles they give."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from infinitevl import rope
from infinitevl.config import ModelConfig, infinitevl_4b, tiny
from infinitevl.memory import Memory
from infinitevl.ops import reference
from infinitevl.rope import Grid

CONFIG = tiny(64)
IMAGE, VIDEO = CONFIG.image_token, CONFIG.video_token


def ids(*parts: tuple[int, int] | int) -> torch.Tensor:
    """One prompt: a number is that many text tokens, (token, count) a picture's place."""
    row = [token for part in parts for token in ([1] * part if isinstance(part, int) else [part[0]] * part[1])]
    return torch.tensor([row])


def fed(memory: Memory, positions: torch.Tensor) -> Memory:
    """What `Model.forward` does to the clock."""
    return memory._replace(clock=torch.maximum(memory.clock, positions.amax((0, 2)) + 1))


def turned(x: torch.Tensor, angle: rope.Angles) -> torch.Tensor:
    return reference.rotate(x=x, cos=angle.cos, sin=angle.sin)


def frame(memory: Memory, time: float, rows: int = 2, columns: int = 3) -> tuple[torch.Tensor, Memory]:
    """The next frame's positions [3, rows, columns], and the memory after it."""
    times = torch.full_like(memory.last, time)
    positions, memory = rope.next_frame(memory, times, rows, columns, CONFIG)
    return positions[:, 0].view(3, rows, columns), fed(memory, positions)


def text(memory: Memory, length: int) -> tuple[torch.Tensor, Memory]:
    positions, memory = rope.next_text(memory, length)
    return positions[:, 0], fed(memory, positions)


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seconds, t", [(0.2, (3, 3, 3)), (0.5, (3, 3, 3)), (1.0, (3, 5, 7)), (1.5, (3, 5, 7)), (2.0, (3, 7, 11))]
)
def test_seconds_per_grid_are_cut_before_they_are_multiplied(seconds, t):
    """3 grids of 8x8 patches at 2 tokens a second after three text tokens."""
    positions = rope.prompt(ids(3, (VIDEO, 48), 1), [], [Grid(3, 8, 8, seconds)], infinitevl_ids())
    assert positions[0, 0, 3:51].tolist() == [value for value in t for _ in range(16)]
    assert positions[1, 0, 3:19].tolist() == [3 + i // 4 for i in range(16)]
    assert positions[2, 0, 3:19].tolist() == [3 + i % 4 for i in range(16)]
    assert positions[:, 0, 51].tolist() == [max(6, *t) + 1] * 3, "text goes on at the greatest position plus one"


def infinitevl_ids() -> ModelConfig:
    """The published model, whose picture tokens are those of the test's prompts."""
    return replace(infinitevl_4b(), image_token=IMAGE, video_token=VIDEO)


def test_text_alone_counts():
    positions = rope.prompt(ids(7), [], [], CONFIG)
    assert positions.tolist() == [[list(range(7))]] * 3


def test_an_image_stands_in_one_moment():
    positions = rope.prompt(ids(2, (IMAGE, 6), 2), [Grid(1, 4, 6)], [], CONFIG)[:, 0]
    assert positions[0].tolist() == [0, 1, *[2] * 6, 5, 6]
    assert positions[1].tolist() == [0, 1, 2, 2, 2, 3, 3, 3, 5, 6]
    assert positions[2].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]


def test_pictures_that_touch_are_told_apart_by_their_grids():
    positions = rope.prompt(
        ids((IMAGE, 2), (IMAGE, 4), (VIDEO, 2), 1), [Grid(1, 2, 4), Grid(1, 4, 4)], [Grid(2, 2, 2, 1.0)], CONFIG
    )
    assert positions[0, 0].tolist() == [0, 0, 2, 2, 2, 2, 4, 6, 7]
    assert positions[2, 0].tolist() == [0, 1, 2, 3, 2, 3, 4, 4, 7]


def test_rows_of_a_batch_take_their_pictures_in_turn_and_padding_stays_at_zero():
    one, two = ids((IMAGE, 4), 3), ids(1, (IMAGE, 2), 1)
    batch = torch.cat([one, torch.cat([torch.full((1, 3), IMAGE), two], dim=1)])
    present = torch.ones_like(batch, dtype=torch.bool)
    present[1, :3] = False
    grids = [Grid(1, 4, 4), Grid(1, 2, 4)]
    positions = rope.prompt(batch, grids, [], CONFIG, present)
    assert torch.equal(positions[:, :1], rope.prompt(one, grids[:1], [], CONFIG))
    assert torch.equal(positions[:, 1:, 3:], rope.prompt(two, grids[1:], [], CONFIG))
    assert not positions[:, 1, :3].any()


@pytest.mark.parametrize(
    "prompt, images, named",
    [
        (ids(2, (IMAGE, 4)), [], "more pictures than were given"),
        (ids(2, (IMAGE, 4)), [Grid(1, 4, 4), Grid(1, 4, 4)], "1 pictures more"),
        (ids(2, (IMAGE, 3), 5), [Grid(1, 4, 4)], "4 tokens does not fit"),
        (ids(2, (IMAGE, 5), 5), [Grid(1, 4, 4)], "more pictures than were given"),
        (ids(2, (IMAGE, 3)), [Grid(1, 4, 4)], "4 tokens does not fit"),
        (ids(2, (VIDEO, 4)), [Grid(1, 4, 4)], "more pictures than were given"),
        (ids(4), [Grid(1, 4, 4)], "1 pictures more"),
    ],
)
def test_grids_that_do_not_fit_the_prompt_are_refused(prompt, images, named):
    with pytest.raises(ValueError, match=named):
        rope.prompt(prompt, images, [], CONFIG)


# -- streams ----------------------------------------------------------------------------------------------------------


def test_a_streams_frames_stand_where_the_same_frames_of_a_video_would():
    grids = [Grid(4, 4, 6, 1.0), Grid(2, 4, 6, 1.0)]
    whole = rope.prompt(ids(3, (VIDEO, 24), 2, (VIDEO, 12), 2), [], grids, CONFIG)[:, 0]
    memory = Memory.empty(CONFIG)
    parts = []
    for length, times in ((3, range(4)), (2, range(4, 6)), (2, ())):
        positions, memory = text(memory, length)
        parts.append(positions)
        for time in times:
            positions, memory = frame(memory, 10.0 + time)
            parts.append(positions.flatten(1))
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_time_is_that_since_the_run_began_and_is_rounded_down():
    _, memory = text(Memory.empty(CONFIG), 5)
    steps = []
    for time in (7.3, 7.7, 7.8, 8.29, 8.3, 9.0, 100.0):
        positions, memory = frame(memory, time)
        assert len(positions[0].unique()) == 1
        assert positions[1, :, 0].tolist() == [5, 6] and positions[2, 0].tolist() == [5, 6, 7]
        steps.append(int(positions[0, 0, 0]) - 5)
    assert steps == [math.floor(2 * (time - 7.3)) for time in (7.3, 7.7, 7.8, 8.29, 8.3, 9.0, 100.0)]
    assert steps == [0, 0, 1, 1, 2, 3, 185]
    assert memory.last.tolist() == [100.0] and memory.start.tolist() == [7.3] and memory.origin.tolist() == [5]


def test_text_ends_the_run_and_the_next_frame_begins_one():
    positions, memory = frame(Memory.empty(CONFIG), 3.0)
    assert positions[:, 0, 0].tolist() == [0, 0, 0]
    positions, memory = frame(memory, 13.0)
    assert positions[:, 0, 0].tolist() == [20, 0, 0] and memory.clock.tolist() == [21]
    positions, memory = text(memory, 2)
    assert positions.tolist() == [[21, 22]] * 3 and memory.start.isnan().all()
    positions, memory = frame(memory, 14.0)
    assert positions[:, 0, 0].tolist() == [23, 23, 23], "time starts anew, it does not go on from the last run"
    assert memory.last.tolist() == [14.0] and memory.start.tolist() == [14.0]


def test_rows_run_apart():
    memory = Memory.empty(CONFIG, 2)._replace(clock=torch.tensor([4, 9]))
    _, memory = rope.next_frame(memory, torch.tensor([1.0, 5.0]).double(), 2, 2, CONFIG)
    positions, memory = rope.next_frame(memory, torch.tensor([2.0, 8.5]).double(), 2, 2, CONFIG)
    assert positions[:, :, 0].tolist() == [[6, 16], [4, 9], [4, 9]]


def test_the_clocks_of_rows_that_are_not_there_stay():
    """Rows before a run, in one, and after one that ended; what stands in the place of their times does not matter."""
    begun = Memory.empty(CONFIG, 6)._replace(clock=torch.tensor([4, 4, 9, 9, 7, 7]))
    running = torch.tensor([False, False, True, True, True, True])
    _, begun = rope.next_frame(begun, torch.arange(6).double(), 2, 2, CONFIG, running)
    _, begun = rope.next_text(begun, 3, torch.tensor([False, False, False, False, True, True]))
    assert begun.start.isnan().tolist() == [True, True, False, False, True, True]
    there = torch.tensor([True, False] * 3)
    time = torch.tensor([8.0, math.nan, 8.0, -1e9, 8.0, math.inf]).double()
    positions, framed = rope.next_frame(begun, time, 2, 2, CONFIG, there)
    right, whole = rope.next_frame(begun, torch.full_like(time, 8.0), 2, 2, CONFIG)
    assert torch.equal(positions[:, there], right[:, there])
    _, read = rope.next_text(begun, 3, there)
    _, ended = rope.next_text(begun, 3)
    for after, wanted in ((framed, whole), (read, ended)):
        for (name, got), (_, moved), (_, stayed) in zip(after.named(), wanted.named(), begun.named(), strict=True):
            assert torch.equal(got[there].nan_to_num(-7), moved[there].nan_to_num(-7)), name
            assert torch.equal(got[~there].nan_to_num(-7), stayed[~there].nan_to_num(-7)), name
    assert framed.frames.tolist() == [1, 0, 2, 1, 2, 1]


def test_frames_after_weeks_are_still_told_apart():
    """Seconds are float64: in float32, times after 40 days are 0.25 s apart."""
    memory = Memory.empty(CONFIG)
    _, memory = frame(memory, 0.04)
    late = 40 * 24 * 3600.0
    before, memory = frame(memory, late)
    after, memory = frame(memory, late + 0.04)
    assert int(after[0, 0, 0]) == int(before[0, 0, 0]) + 1 == 2 * int(late)


# -- angles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 1, 8191, 10**6, 10**7])
def test_phases_are_exact_far_into_a_stream(position):
    text = infinitevl_4b().text
    got = rope.angles(torch.full((3, 1, 1), position), text)
    for pair in range(64):
        phase = math.fmod(position * 1e6 ** (-pair / 64), 2 * math.pi)
        for half in (pair, pair + 64):
            assert abs(float(got.cos[0, 0, half]) - math.cos(phase)) < 1e-6
            assert abs(float(got.sin[0, 0, half]) - math.sin(phase)) < 1e-6


def test_each_range_of_frequencies_follows_its_axis():
    text = CONFIG.text
    base = rope.angles(torch.full((3, 1, 1), 5), text).sin[0, 0]
    sections = text.mrope_sections
    edges = [0, sections[0], sections[0] + sections[1], sum(sections)]
    for axis in range(3):
        positions = torch.full((3, 1, 1), 5)
        positions[axis] = 77
        moved = (rope.angles(positions, text).sin[0, 0] != base).view(2, -1)
        expected = torch.zeros_like(moved)
        expected[:, edges[axis] : edges[axis + 1]] = True
        assert torch.equal(moved, expected)


def test_rotation_turns_pairs_and_scores_know_only_distances():
    config = CONFIG.text
    q, k = torch.randn(2, 1, 1, 1, config.head_dim)

    def score(at: int, other: int) -> torch.Tensor:
        pair = [turned(x, rope.angles(torch.full((3, 1, 1), place), config)) for x, place in ((q, at), (k, other))]
        return (pair[0] * pair[1]).sum()

    torch.testing.assert_close(score(12, 5), score(100_012, 100_005), atol=1e-4, rtol=0)
    assert abs(score(12, 5) - score(12, 6)) > 1e-3
    half = config.head_dim // 2
    angle = rope.angles(torch.full((3, 1, 1), 3), config)
    rotated = turned(q, angle)
    pairs = torch.complex(q[..., :half], q[..., half:]) * torch.complex(angle.cos, angle.sin)[..., None, :half]
    torch.testing.assert_close(rotated, torch.cat([pairs.real, pairs.imag], dim=-1))
    assert turned(q.bfloat16(), angle).dtype == torch.bfloat16
