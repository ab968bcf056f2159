"""The held-out test's runner answers as `stream.answer` does, one stream and one question at a time."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from infinitevl import stream, weights
from infinitevl.config import hybrid, tiny
from infinitevl.eval import batched, exam, heldout, record, room
from infinitevl.eval.exam import AT_MOST, CONTROLS, EvalError, Exam
from infinitevl.memory import Delta
from infinitevl.model import CapacityError, Model
from infinitevl.processor import load_processor
from infinitevl.synth import heldout as plans
from infinitevl.synth.compose import Composer
from infinitevl.synth.heldout import Ask
from infinitevl.synth.questions import questions
from infinitevl.synth.world import HELDOUT, HELDOUT_FONTS, SHORT, make_stories
from infinitevl.video import Frame

from .conftest import small as small_model

FRAMES = 22
WINDOW = 48  # tokens: under three frames, so that the delta states matter


@pytest.fixture(scope="module")
def model() -> Model:
    """Random weights of a size at which questions get answers of many lengths, the empty one included."""
    torch.manual_seed(0)
    config = tiny()
    vision = replace(config.vision, depth=2, hidden_size=48, intermediate_size=64, num_heads=2, out_hidden_size=64)
    small = {"layers": hybrid(1), "window": WINDOW, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    small |= {"mrope_sections": (2, 3, 3), "delta_heads": 2, "delta_key_dim": 16, "delta_value_dim": 32}
    text = replace(config.text, **small)
    model = Model(replace(config, vision=vision, text=text), load_processor(weights.locate("tiny")))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5)
        model.embedding.weight.normal_(0, 0.3)
        model.embedding.weight[list(model.config.stop_tokens)] *= 2.2
    return model.eval()


@pytest.fixture(scope="module")
def worlds():
    """Two worlds; the first one's streams begin at different times, so that their stamps differ in text and length."""
    setting = replace(SHORT, latest_start=0)
    return {
        "heldout": make_stories(5, 3, FRAMES, HELDOUT, setting, t0=np.array([0, 596, 4])),
        "heldout_fonts": make_stories(6, 2, FRAMES, HELDOUT_FONTS, setting),
    }


@pytest.fixture(scope="module")
def asks(worlds) -> list[Ask]:
    """Two or three questions at each of a few moments, some so early that fewer than four frames were seen."""
    rng = np.random.default_rng(1)
    kinds = {
        0: ("door", "sign"),
        2: ("light", "emblem_now"),
        12: ("sign", "was_word", "when_word"),
        19: ("first_word", "door"),
    }
    return [
        Ask(name, b, frame + b, question, ("now",))
        for name, stories in worlds.items()
        for frame in kinds
        for b in range(len(stories.t0))
        for question in questions(stories, b, frame + b, rng, kinds[frame])
        if (name, b) != ("heldout", 1) or frame != 12  # not every stream is asked at every moment
    ]


@pytest.fixture(scope="module")
def painted(worlds) -> dict[tuple[str, int], np.ndarray]:
    """The frames of each stream, painted by themselves."""
    names = ("strips", "scene", "grain")
    return {
        (name, b): Composer()({part: torch.from_numpy(getattr(stories, part)[b]) for part in names}).numpy()
        for name, stories in worlds.items()
        for b in range(len(stories.t0))
    }


def one_by_one(model: Model, pictures: np.ndarray, t0: float, asks: list[Ask], control: str) -> dict[Ask, str]:
    """What a control answers to the lines about one stream, in `stream`'s words; `last4` to those of one moment."""
    said, memory, last = {}, stream.begin(model), max(ask.frame for ask in asks)
    for frame in range(max(last - 3, 0) if control == "last4" else 0, last + 1):
        for block in memory.blocks:
            if control == "no_delta" and isinstance(block, Delta):
                block.state.zero_()
                block.tail.zero_()
        if control != "blind":
            memory = stream.observe(model, memory, Frame(t0 + frame, pictures[frame]))
        now = [ask for ask in asks if ask.frame == frame]
        said |= {ask: stream.answer(model, memory, ask.question.text, AT_MOST) for ask in now}
    return said


@pytest.fixture(scope="module")
def truth(model, worlds, asks, painted) -> dict[str, list[str]]:
    told = {}
    for control in CONTROLS:
        said: dict[Ask, str] = {}
        key = (lambda a: (a.world, a.stream, a.frame)) if control == "last4" else (lambda a: (a.world, a.stream))
        for (name, b, *_), group in groupby(sorted(asks, key=key), key):
            said |= one_by_one(model, painted[name, b], float(worlds[name].t0[b]), list(group), control)
        told[control] = [said[ask] for ask in asks]
    return told


@pytest.mark.parametrize("at_once", [2, 1000])
def test_batches_answer_as_one_by_one(model, worlds, asks, truth, at_once):
    assert exam.answers(Exam(model, worlds, asks, at_once)) == truth


def test_a_model_without_a_window_has_room_for_every_stream_and_no_more(worlds, asks):
    teacher = small_model(None, ("softmax", "softmax"))
    longest = heldout._longest(teacher, worlds, asks)
    capacity = room.capacity(teacher, longest, asks)
    given = exam.answers(Exam(teacher, worlds, asks, 1000, capacity=capacity), ["full", "last4", "blind"])
    assert given == exam.answers(Exam(teacher, worlds, asks, 1000, capacity=2 * capacity), ["full", "last4", "blind"])
    with pytest.raises(CapacityError, match="do not fit a memory made for"):
        exam.answers(Exam(teacher, worlds, asks, 1000, capacity=longest - 1), ["full"])


def test_the_answers_compared_tell_the_controls_and_lengths_apart(model, truth):
    lengths = {len(model.processor.ids(text)) for text in truth["full"]}
    assert 0 in lengths and max(lengths) >= 8 and len(lengths) >= 4
    for control in ("no_delta", "last4", "blind"):
        same = sum(ours == theirs for ours, theirs in zip(truth["full"], truth[control], strict=True))
        assert same < 0.7 * len(truth["full"]), control


def test_a_control_alone_answers_as_in_company(model, worlds, asks, truth):
    quiz = Exam(model, worlds, asks, 1000)
    assert exam.answers(quiz, ["last4", "blind"]) == {name: truth[name] for name in ("last4", "blind")}
    assert exam.answers(quiz, ["no_delta"]) == {"no_delta": truth["no_delta"]}
    with pytest.raises(ValueError, match="no control 'deaf'; there are full, no_delta, last4, blind"):
        exam.answers(quiz, ["full", "deaf"])


def test_work_is_counted_before_it_is_done(model, worlds, asks, monkeypatch, capsys):
    meters, meter = [], exam.Meter
    monkeypatch.setattr(exam, "Meter", lambda total: meters.append(meter(total, every=0.0)) or meters[0])
    exam.answers(Exam(model, worlds, asks, 5))
    assert meters[0].done == meters[0].total > 200
    assert capsys.readouterr().err.splitlines()[-1].startswith("100%")


@torch.no_grad()
def test_rows_fed_with_nothing_stay_as_they_are(model):
    memory = batched.observe(model, stream.begin(model, 3), torch.zeros(3, 112, 112, 3, dtype=torch.uint8), [0.0] * 3)
    kept = memory.clone()
    _, after = batched.feed(model, memory, [(5, 6, 7), (), (9,)])
    for row, ids in enumerate([(5, 6, 7), (), (9,)]):
        place = torch.tensor([row])
        alone = batched.feed(model, kept.rows(place), [ids])[1] if ids else kept.rows(place)
        for (name, got), (_, right) in zip(after.rows(place).named(), alone.named(), strict=True):
            assert torch.allclose(got, right, atol=1e-5, equal_nan=True), name
    with pytest.raises(ValueError, match="times never decrease"):
        batched.observe(model, kept, torch.zeros(3, 112, 112, 3, dtype=torch.uint8), [1.0, -1.0, 1.0])


# -- the table --------------------------------------------------------------------------------------------------------


def answered(right: dict[str, float]) -> list[str]:
    """Answers to the plan of which a share is right in each row (the first that names a line decides)."""
    rng = np.random.default_rng(0)
    return [a.question.answer if rng.random() < right.get(a.rows[0], 0.5) else "?" for a in plans.plan()]


@pytest.mark.parametrize(
    ("ours", "theirs", "holds"),
    [
        (0.9, {"last4": 0.3, "blind": 0.1}, True),
        (0.5, {"last4": 0.1, "blind": 0.3}, False),
        (0.0, {"blind": 0.0}, False),
    ],
)
def test_the_rule_compares_with_the_best_control_at_every_age(ours, theirs, holds):
    rows = heldout.RULE_ROWS
    tables = {"full": plans.score(answered(dict.fromkeys(rows, ours)))}
    tables |= {name: plans.score(answered(dict.fromkeys(rows, share))) for name, share in theirs.items()}
    judged = heldout.verdict(tables)
    assert judged["holds"] is holds and set(judged["rows"]) == {"age1", "age2", "age4"}
    assert {row["best_control"] for row in judged["rows"].values()} == {max(theirs, key=theirs.get)}


def test_one_age_that_falls_short_breaks_the_rule():
    rows = dict.fromkeys(heldout.RULE_ROWS, 0.9)
    tables = {
        "full": plans.score(answered(rows | {"age4": 0.3})),
        "blind": plans.score(answered(dict.fromkeys(rows, 0.2))),
    }
    judged = heldout.verdict(tables)
    assert {name: row["holds"] for name, row in judged["rows"].items()} == {"age1": True, "age2": True, "age4": False}
    assert not judged["holds"]
    assert heldout.verdict({"full": tables["full"]}) is None and heldout.verdict({"blind": tables["blind"]}) is None


@pytest.fixture
def small(monkeypatch, worlds, asks):
    """The runner with the small plan in the place of the fixed one."""
    monkeypatch.setattr(heldout.heldout, "plan", lambda: tuple(asks))
    monkeypatch.setattr(heldout.heldout, "worlds", lambda: worlds)


def test_the_command_writes_what_it_prints(model, truth, asks, small, tmp_path, capsys):
    weights.save(model, tmp_path / "checkpoint")
    out, lines = tmp_path / "new" / "results.json", tmp_path / "answers.jsonl"
    heldout.main(
        ["--model", str(tmp_path / "checkpoint"), "--device", "cpu", "--out", str(out), "--answers", str(lines)]
    )
    printed = capsys.readouterr().out
    assert printed.startswith("| row | questions | full | no_delta | last4 | blind |")
    assert printed.endswith(f"Rule: {heldout.RULE} (no_delta, last4, blind): does not hold.\n")
    told = json.loads(out.read_text(), parse_constant=pytest.fail)
    right = sum(given == ask.question.answer for given, ask in zip(truth["blind"], asks, strict=True))
    assert told["tables"]["blind"]["now"]["total"] == [right, len(asks)] and told["partial"] is None
    assert told["checkpoint"]["sha256"] == record.checksums(tmp_path / "checkpoint") and told["dtype"] == "float32"
    assert {"command", "date", "commit", "hardware", "versions", "seconds", "ops", "verdict"} <= set(told)
    assert str(tmp_path) not in out.read_text()
    said = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["given"] for line in said] == [
        dict(zip(truth, column, strict=True)) for column in zip(*truth.values(), strict=True)
    ]


def test_a_quick_look_says_that_it_is_one(model, asks, truth, small, tmp_path):
    weights.save(model, tmp_path)
    report = heldout.run(tmp_path, controls=["full"], limit=1)
    firsts = [place for place, ask in enumerate(asks) if ask.stream == 0]
    assert report.answers == {"full": [truth["full"][place] for place in firsts]}
    assert report.as_json()["partial"] == "PARTIAL: the first 1 streams of each world only"
    assert report.markdown().startswith("**PARTIAL: the first 1 streams of each world only**\n")
    assert report.as_json()["tables"]["full"]["age1"]["share"] is None, "a row without questions"
    most = max(ask.stream for ask in asks) + 1
    assert heldout.run(tmp_path, controls=["blind"], limit=most).partial is None, "all of them are the whole test"
    for limit in (0, most + 1):
        with pytest.raises(EvalError, match=f"a limit of {limit} streams of each world: it must be 1 to {most}"):
            heldout.run(tmp_path, limit=limit)
    with pytest.raises(EvalError, match="control 'blind' is named twice"):
        heldout.run(tmp_path, controls=["blind", "blind"])


def test_a_number_travels_with_its_circumstances(model, tmp_path, monkeypatch):
    about = record.circumstances(model)
    assert about["hardware"]["cores"] >= 1 and about["versions"]["torch"] == torch.__version__
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    assert record.checksums(tmp_path) == {
        "model.safetensors": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    }
    monkeypatch.setattr(record.sys, "orig_argv", ["/venv/bin/python", "/venv/bin/infinitevl", "eval", "a file.mp4"])
    assert record.command() == "infinitevl eval 'a file.mp4'"
    monkeypatch.setattr(record.sys, "orig_argv", ["/venv/bin/python", "-m", "infinitevl", "eval", "x"])
    assert record.command() == "python -m infinitevl eval x"
    with pytest.raises(ValueError):
        record.write(tmp_path / "out.json", {"share": math.nan})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"], "nothing half-written"
