"""Recall by age: asked when the age is right to the frame, answered as one stream would, and counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from infinitevl import stream, weights
from infinitevl.eval import counts, figure, needles, recall, room
from infinitevl.eval.batched import Watcher, tokens_seen
from infinitevl.eval.exam import AT_MOST, EvalError, without_delta
from infinitevl.eval.needles import CHAPTER, FRAME, KINDS, OPEN, Needle
from infinitevl.eval.recall import COLUMNS, Report, Upkeep
from infinitevl.synth.heldout import Ask, Count
from infinitevl.video import Frame

from .conftest import WINDOW, small

TOKENS = 4 * WINDOW
STREAMS = 2


@pytest.fixture(scope="module")
def laid_out(tiny_model):
    return recall.laid_out(tiny_model, TOKENS, STREAMS, 1)


@pytest.fixture(scope="module")
def asks(tiny_model, laid_out) -> list[Ask]:
    world, seen = laid_out
    return recall.plan(world.needles, seen, WINDOW, recall.ages(WINDOW, TOKENS))


# -- when a needle is asked for ---------------------------------------------------------------------------------------


def faults(asks: Sequence[Ask], seen: np.ndarray, window: int) -> list[str]:
    """What is wrong with a plan: a needle asked at another age than it says, or before it was gone."""
    wrong = []
    for ask in asks:
        shown, age = ask.question.evidence, float(ask.rows[0])
        if ask.frame <= shown:
            wrong.append("before it is shown")
        elif not seen[ask.frame - 1] - seen[shown] < age * window <= seen[ask.frame] - seen[shown]:
            wrong.append("at another age")
    return wrong


def test_every_needle_is_asked_at_every_age_that_the_stream_has(laid_out, asks):
    world, seen = laid_out
    assert faults(asks, seen, WINDOW) == []
    assert {float(ask.rows[0]) for ask in asks} == {0.5, 1.0, 2.0, 4.0}
    oldest = [ask for ask in asks if ask.rows == ("4",)]
    assert len(oldest) == len(world.needles), "the greatest age is reached by all of the first chapter"
    assert asks == sorted(asks, key=lambda ask: ask.frame) and max(ask.frame for ask in asks) == len(seen) - 1


@pytest.mark.parametrize(("fault", "says"), [(WINDOW, "at another age"), (-WINDOW, "before it is shown")])
def test_an_age_off_by_one_window_would_be_noticed(laid_out, fault, says):
    world, seen = laid_out
    moved = [replace(each, evidence=int(np.searchsorted(seen, seen[each.evidence] + fault))) for each in world.needles]
    asked = recall.plan([each for each in moved if 0 < each.evidence < len(seen)], seen, WINDOW, [0.5, 1.0])
    back = {(each.stream, each.text): each.evidence for each in world.needles}
    wrong = [
        replace(ask, question=replace(ask.question, evidence=back[ask.stream, ask.question.text])) for ask in asked
    ]
    assert says in faults(wrong, seen, WINDOW)


@torch.no_grad()
def test_at_an_age_of_one_window_nothing_of_the_needle_is_held(tiny_model, laid_out, asks):
    """The oldest token in the rings came after the needle's last one; half a window earlier it is still there."""
    world, seen = laid_out
    watcher, held = Watcher(tiny_model, STREAMS), []
    for frame, pixels in enumerate(world.pictures(0, len(seen), torch.device("cpu"))):
        watcher.observe(pixels, float(frame))
        held.append(int(watcher.memory.index.min()))
    for ask in asks:
        last_token = int(seen[ask.question.evidence]) - 1
        assert (held[ask.frame] > last_token) == (float(ask.rows[0]) >= 1)


@pytest.mark.parametrize(("tokens", "wanted"), [(256, [0.5, 1]), (1000, [0.5, 1, 2]), (1024, [0.5, 1, 2, 4])])
def test_ages_double_up_to_the_greatest(tokens, wanted):
    assert recall.ages(256, tokens) == wanted


def test_less_than_a_window_is_refused():
    with pytest.raises(EvalError, match="--tokens 255 is less than a window of 256 tokens"):
        recall.ages(256, 255)


def test_what_cannot_be_asked_is_refused_before_weights_are_loaded(tiny_model, tmp_path, monkeypatch):
    weights.save(tiny_model, tmp_path)
    monkeypatch.setattr(weights, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(EvalError, match=f"--tokens 47 is less than a window of {WINDOW} tokens"):
        recall.run(tmp_path, tokens=47)


def test_half_a_million_tokens_are_laid_out_in_a_second(tiny_model):
    world, seen = recall.laid_out(tiny_model, 1 << 19, 1, 0)
    latest = max(needle.evidence for needle in world.needles if needle.evidence < CHAPTER)
    assert seen[-2] - seen[latest] < 1 << 19 <= seen[-1] - seen[latest]
    assert sorted(world.marked) == [0, 1, 4, 16, 64]


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tiny_model, laid_out, asks):
    """A run over every tenth question."""
    world, seen = laid_out
    few = asks[::10]
    return few, *recall.watched(tiny_model, world, few, seen, COLUMNS, Upkeep())


@torch.no_grad()
def test_answers_are_those_of_each_stream_by_itself(tiny_model, laid_out, told):
    world, seen = laid_out
    few, given, _ = told
    frames = torch.stack(list(world.pictures(0, len(seen), torch.device("cpu"))), 1).numpy()
    for column in ("full", "no_delta"):
        said = {}
        for b in range(STREAMS):
            memory = stream.begin(tiny_model)
            for frame in range(len(seen)):
                memory = without_delta(memory) if column == "no_delta" else memory
                memory = stream.observe(tiny_model, memory, Frame(float(frame), frames[b, frame]))
                for ask in few:
                    if (ask.stream, ask.frame) == (b, frame):
                        said[ask] = stream.answer(tiny_model, memory, ask.question.text, AT_MOST)
        assert given[column] == [said[ask] for ask in few]
    fresh = stream.begin(tiny_model)
    assert given["blind"] == [stream.answer(tiny_model, fresh, ask.question.text, AT_MOST) for ask in few]
    assert given["full"] != given["no_delta"] != given["blind"] != given["full"], "the columns are told apart"


def test_recorded_steps_give_the_same_answers(tiny_model, laid_out, told, played, monkeypatch):
    world, seen = laid_out
    few, given, fresh = told
    recorded = lambda *words: Watcher(*words, recorded=True)  # noqa: E731
    monkeypatch.setattr(recall, "Watcher", recorded)
    assert recall.watched(tiny_model, world, few, seen, COLUMNS, Upkeep()) == (given, fresh)
    assert played.made > 0


def test_upkeep_is_for_the_model_and_not_for_its_controls(tiny_model, laid_out, told):
    world, seen = laid_out
    few, given, _ = told
    other, _ = recall.watched(tiny_model, world, few, seen, COLUMNS, Upkeep(refresh_every=1, keep=0.0))
    assert other["full"] != given["full"]
    assert (other["no_delta"], other["blind"]) == (given["no_delta"], given["blind"])
    kept, _ = recall.watched(tiny_model, world, few, seen, ["full"], Upkeep(refresh_every=1, keep=1.0))
    assert kept == {"full": given["full"]}


def test_a_model_without_a_window_gets_a_memory_for_all_of_it(laid_out, asks):
    model = small(window=None)
    world, seen = recall.laid_out(model, TOKENS, STREAMS, 1)
    few = asks[::40]
    assert (room.capacity(model, int(seen[-1]), few) or 0) > seen[-1]
    given, fresh = recall.watched(model, world, few, seen, COLUMNS, Upkeep())
    assert [len(given[column]) for column in COLUMNS] == 3 * [len(few)] and fresh["gates"] == []


def test_what_does_not_fit_is_refused(tiny_model, laid_out, asks, monkeypatch):
    monkeypatch.setattr(room, "free", lambda device: 1000)
    with pytest.raises(room.RoomError, match=r"2 streams take .* GiB on cpu .* take fewer streams"):
        recall.watched(tiny_model, *laid_out[:1], asks, laid_out[1], ["full"], Upkeep())


# -- counts -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def report(laid_out, asks) -> Report:
    """Of a model that knows what is at most a window old, and one that always says the first count's answer."""
    knowing = [ask.question.answer if float(ask.rows[0]) <= 1 else "?" for ask in asks]
    about = {"checkpoint": {"name": "made up"}, "streams": STREAMS}
    guess = next(ask.question.answer for ask in asks if ask.question.kind == "count_past")
    answers = {"full": knowing, "blind": [guess] * len(asks)}
    return Report(asks, answers, WINDOW, laid_out[1], about)


def test_shares_are_counted_by_age_and_kind(report, asks):
    assert [report.count("full", age).share for age in report.ages] == [1.0, 1.0, 0.0, 0.0]
    opens = [ask for ask in asks if ask.question.kind in OPEN]
    assert report.count("full").asked == len(opens) < len(asks)
    assert report.count("blind").right == 0 and report.count("blind", kinds=["count_past"]).right > 0
    assert sum(report.count("full", kinds=[kind]).asked for kind in KINDS) == len(asks)
    told = report.as_json()
    assert [point["full"]["share"] for point in told["ages"]] == [1.0, 1.0, 0.0, 0.0]
    assert [point["tokens"] for point in told["ages"]] == [24, 48, 96, 192]
    assert sum(point["full"]["asked"] for point in told["chapters"][0]["ages"]) == len(opens)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    lines = report.markdown().splitlines()
    assert lines[2].startswith("| 0.5 | 24 |") and "100.0% (" in lines[3] and "| 0.0% (0.0% to " in lines[4]


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (50, 100, 0.4038, 0.5962)]
)
def test_intervals_are_wilsons(right, asked, low, high):
    assert counts.interval(Count(right, asked)) == pytest.approx((low, high), abs=1e-4)
    assert counts.interval(Count(0, 0)) == (0.0, 1.0) and counts.plain(Count(0, 0))["share"] is None


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng, share = np.random.default_rng(0), 0.3
    held = [
        low <= share <= high
        for low, high in (counts.interval(Count(int(n), 90)) for n in rng.binomial(90, share, 2000))
    ]
    assert 0.93 < np.mean(held) < 0.97


def test_the_curve_is_drawn_from_what_was_written(report, tmp_path):
    told = json.loads(json.dumps(report.as_json()))
    figure.recall(told, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(figure.FigureError, match="name it .png"):
        figure.recall(told, tmp_path / "curve.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_a_run_is_told_with_its_circumstances(tiny_model, tmp_path):
    weights.save(tiny_model, tmp_path)
    found = recall.run(tmp_path, tokens=WINDOW, streams=1, columns=["full"], upkeep=Upkeep(4, 0.5, torch.bfloat16))
    told = found.as_json()
    assert told["upkeep"] == {"refresh_every": 4, "keep": 0.5, "state_dtype": "bfloat16"}
    assert {"command", "date", "commit", "hardware", "versions", "seconds", "seed", "window"} <= set(told)
    assert told["greatest_age"] == told["window"] == WINDOW and told["tokens"] == found.seen[-1]
    states, gates = told["freshness"]["states"], told["freshness"]["gates"]
    assert {row["tokens"] for row in states} >= {told["tokens"]} and len(gates) == 3 * 2
    assert str(tmp_path) not in json.dumps(told)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (["full", "deaf"], "no control 'deaf'; there are full, no_delta, blind"),
        (["full", "blind", "full"], "control 'full' is named twice"),
        (["blind"], "full is not"),
    ],
)
def test_columns_that_mean_nothing_are_refused(columns, says):
    with pytest.raises(EvalError, match=says):
        recall.run(columns=columns)


def test_a_needle_too_late_for_an_age_is_not_asked_at_it(tiny_model):
    seen = tokens_seen(tiny_model, FRAME, [float(second) for second in range(10)])
    late = Needle(0, "order", "what?", "X", 8)
    assert recall.plan([late], seen, WINDOW, [0.25, 1.0]) == recall.plan([late], seen, WINDOW, [0.25])
    assert needles.CHAPTER > 10
