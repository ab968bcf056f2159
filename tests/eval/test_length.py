"""Accuracy by the length of a stream: each length by itself, in a memory that is large enough, or refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")

from infinitevl import stream, weights
from infinitevl.config import SOFTMAX
from infinitevl.eval import counts, figure, length, needles, room
from infinitevl.eval.exam import AT_MOST, EvalError
from infinitevl.synth.heldout import Count
from infinitevl.synth.questions import NOW, STATES
from infinitevl.video import Frame

from .conftest import small


@pytest.mark.parametrize(
    ("frames", "wanted"),
    [(8, [8]), (9, [8, 9]), (32, [8, 32]), (100, [8, 32, 100]), (4096, [8, 32, 128, 512, 2048, 4096])],
)
def test_lengths_are_four_times_as_long_each(frames, wanted):
    assert length.lengths(frames) == wanted


def test_too_short_is_refused():
    with pytest.raises(EvalError, match="--frames 7: the shortest stream has 8"):
        length.lengths(7)


@pytest.fixture(scope="module")
def world():
    return needles.long(0, 3, 64)


def test_needles_are_asked_once_they_are_gone_and_the_rest_in_view(world):
    for frames in (8, 40, 64, world.needles[0].evidence + 1):
        asks = length.plan(world, frames)
        for ask in asks:
            if ask.rows[0] in ("now", "states"):
                assert ask.question.kind in NOW + STATES and frames - 8 < ask.frame == ask.question.evidence < frames
            else:
                assert ask.question.evidence < ask.frame == frames - 1
        gone = sum(needle.evidence < frames - 1 for needle in world.needles)
        assert sum(ask.rows[0] in ("past", "count_past") for ask in asks) == gone
        assert sum(ask.rows[0] == "states" for ask in asks) == 4 * 2 * world.streams


@torch.no_grad()
def test_what_is_right_is_what_a_stream_by_itself_gets_right(tiny_model, world, monkeypatch):
    """Truths are replaced by what the model says, for every second question: random weights get nothing right."""
    frames = 16
    asks = length.plan(world, frames)
    pictures = torch.stack(list(world.pictures(0, frames, torch.device("cpu"))), 1).numpy()
    said = [""] * len(asks)
    for b in range(world.streams):
        memory = stream.begin(tiny_model)
        for frame in range(frames):
            memory = stream.observe(tiny_model, memory, Frame(float(frame), pictures[b, frame]))
            for n, ask in enumerate(asks):
                if (ask.stream, ask.frame) == (b, frame):
                    said[n] = stream.answer(tiny_model, memory, ask.question.text, AT_MOST)
    right = [said[n] if n % 2 else "never said" for n in range(len(asks))]
    pairs = zip(asks, right, strict=True)
    made = [replace(ask, question=replace(ask.question, answer=truth)) for ask, truth in pairs]
    monkeypatch.setattr(length, "plan", lambda world, frames: made)
    found = length._fitting(tiny_model, world, frames, ["full"], True, length.Meter(1))
    for row in length.ROWS:
        marks = [n % 2 == 1 for n, ask in enumerate(asks) if ask.rows == (row,)]
        assert (found.counts["full"][row].right, found.counts["full"][row].asked) == (sum(marks), len(marks))


def test_a_memory_of_fixed_size_stays_and_one_without_a_window_grows(tiny_model, tmp_path):
    open_ended = small(window=None, layers=(SOFTMAX, SOFTMAX))
    sizes = {}
    for name, model in (("hybrid", tiny_model), ("teacher", open_ended)):
        weights.save(model, tmp_path / name)
        found = length.run(tmp_path / name, frames=32, streams=2)
        told = found.as_json()
        assert json.loads(json.dumps(told, allow_nan=False)) == told and str(tmp_path) not in json.dumps(told)
        assert [each["frames"] for each in told["lengths"]] == [8, 32]
        assert all(each["milliseconds_p90"] >= each["milliseconds"] > 0 for each in told["lengths"])
        sizes[name] = [each["bytes"] for each in told["lengths"]]
        figure.length(told, tmp_path / f"{name}.png")
        assert found.markdown().count("\n| ") == 2 and f"{sizes[name][1]:,}" in found.markdown()
        first = told["lengths"][0]["full"]["now"]
        cell = f"{first['share']:.1%} ({first['low']:.1%} to {first['high']:.1%}) of {first['asked']} |"
        assert cell in found.markdown().splitlines()[2] and "p50 | p90 |" in found.markdown()
    assert sizes["hybrid"][0] == sizes["hybrid"][1]
    assert sizes["teacher"][1] > 2 * sizes["teacher"][0]
    assert {path.name for path in tmp_path.glob("*.png")} == {"hybrid.png", "teacher.png"}


def test_the_times_are_the_middle_and_the_slow_end_of_the_last_steps(tiny_model, world, monkeypatch):
    ticks = iter([0.0] * 4 + [at for n in range(1, 17) for at in (0.0, n / 1000)])  # the first four are not timed
    monkeypatch.setattr(length, "_clock", lambda device: next(ticks))
    monkeypatch.setattr(length, "plan", lambda world, frames: [])
    found = length._fitting(tiny_model, world, 20, ["full"], True, length.Meter(1))
    told = found.as_json()
    assert (told["milliseconds"], told["milliseconds_p90"]) == (8.5, 14.5)


def test_the_figure_shows_intervals_and_the_spread_of_times(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(figure, "_write", lambda drawn, path: made.append(drawn))
    few, many, none = (counts.plain(Count(n // 2, n)) for n in (4, 400, 0))
    points = [
        {"frames": 8, "milliseconds": 2.0, "milliseconds_p90": 5.0, "bytes": 1, "full": {"now": few, "past": none}},
        {"frames": 32, "milliseconds": 3.0, "milliseconds_p90": 3.5, "bytes": 1, "full": {"now": many, "past": few}},
        {"frames": 128, "refused": "too long"},
    ]
    about = {"checkpoint": {"name": "made up"}, "streams": 3, "columns": {"full": ""}}
    figure.length({**about, "lengths": points}, tmp_path / "l.png")
    accuracy, time, _ = made[0].axes
    drawn = [line.tolist() for axes in (accuracy, time) for each in axes.collections for line in each.get_segments()]
    ends = [(8, few["low"], few["high"]), (32, many["low"], many["high"]), (32, few["low"], few["high"])]
    ends += [(8, 2.0, 5.0), (32, 3.0, 3.5)]
    assert drawn == [[[x, low], [x, high]] for x, low, high in ends]
    assert made[0].get_suptitle() == "made up, 3 streams: accuracy, time and memory by length of stream"


def test_what_does_not_fit_is_not_run_and_said(tmp_path, monkeypatch):
    weights.save(small(window=None), tmp_path)
    whole = length.run(tmp_path, frames=32, streams=2).as_json()["lengths"]
    enough = int(2.2 * 3 * whole[0]["bytes"])
    monkeypatch.setattr(room, "free", lambda device: enough)
    found = length.run(tmp_path, frames=100, streams=2)
    first, refused = found.as_json()["lengths"]
    assert first["full"] == whole[0]["full"] and set(refused) == {"frames", "tokens", "refused"}
    assert refused["frames"] == 32 and "take fewer streams, or shorter ones" in refused["refused"]
    assert "32 frames were not run: 2 streams of " in found.markdown()
    monkeypatch.setattr(room, "free", lambda device: 10)
    with pytest.raises(room.RoomError, match="2 streams of .* tokens take"):
        length.run(tmp_path, frames=100, streams=2)


def test_how_many_questions_wait_depends_on_what_is_free(tiny_model, monkeypatch):
    model = small(window=None)
    row = room.bytes_of(model, 1, 1000)
    monkeypatch.setattr(room, "free", lambda device: 8 * 5 * row)
    assert room.forks(model, 1000) == 5 and room.forks(tiny_model, None) == room.CPU_FORKS
    monkeypatch.setattr(room, "free", lambda device: 1)
    assert room.forks(model, 1000) == 1
    assert row == model.empty_memory(1, 1000).nbytes
