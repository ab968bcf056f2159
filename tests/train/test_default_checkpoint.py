"""The default checkpoint's training feeds the very stream that it will watch, and its loop runs, stops and resumes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "default_checkpoint"
pytest.importorskip("sklearn")
sys.path.insert(0, str(FOLDER))

import batches  # noqa: E402
import recipe as recipes  # noqa: E402
import train  # noqa: E402
from average import average  # noqa: E402
from batches import IGNORED, Batch, make  # noqa: E402

from infinitevl import stream, weights  # noqa: E402
from infinitevl.config import tiny  # noqa: E402
from infinitevl.generate import feed  # noqa: E402
from infinitevl.memory import Memory  # noqa: E402
from infinitevl.model import Model  # noqa: E402
from infinitevl.processor import load_processor  # noqa: E402
from infinitevl.synth.compose import Composer  # noqa: E402
from infinitevl.synth.world import SHORT, TRAIN, make_stories  # noqa: E402
from infinitevl.train.convert import convert  # noqa: E402
from infinitevl.video import Frame  # noqa: E402


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model(tiny(), load_processor(weights.locate("tiny")))


def test_a_training_segment_leaves_the_memory_of_a_stream(model):
    phase = recipes.Phase("check", 1, 2, 2, 5, 3, SHORT, peak=1e-3)
    batch = make(phase, 0, 3, model.processor, {})
    pixels = pictures(batch)
    start = make_stories(3, 2, phase.length, TRAIN, phase.world).t0[1]
    with torch.no_grad():
        trained = train.opened(model, model.empty_memory(2), train.head(model))
        for segment, plan in enumerate(train.plan_segments(model, phase)):
            part = slice(segment * 5, segment * 5 + 5)
            stamps = torch.from_numpy(batch.stamps)[:, plan.stamps]
            trained = train.watch(model, trained, plan, pixels[:, part], stamps)
        watched = observed(model, stream.begin(model), float(start), pixels[1])
    same(watched, trained, 1)


def pictures(batch: Batch) -> torch.Tensor:
    """The frames of a batch, uint8 [B, F, h, w, 3]."""
    numbers = {name: torch.from_numpy(getattr(batch, name)).flatten(0, 1) for name in ("strips", "scene", "grain")}
    return Composer("cpu")(numbers).unflatten(0, batch.grain.shape)


def observed(model: Model, memory: Memory, start: float, frames: torch.Tensor) -> Memory:
    for second, frame in enumerate(frames):
        memory = stream.observe(model, memory, Frame(start + second, frame.numpy()))
    return memory


def same(watched: Memory, trained: Memory, row: int) -> None:
    for name, leaf in watched.named():
        if name not in ("frames", "start", "origin", "last"):  # clocks of the run: training does not keep them
            other = dict(trained.named())[name][row : row + 1]
            assert torch.allclose(leaf.double(), other.double(), atol=1e-5), name


def test_a_chain_of_stories_is_one_stream(model):
    """Row 0 begins with the first step; row 1 is one story older, and begins again with the second."""
    (phase,) = (phase for phase in recipes.smoke_longer().phases if phase.chapters > 1)
    step = train.Step(model, Composer("cpu"), phase, record=False)
    given = [make(phase, number, 6 + number, model.processor, {}) for number in range(2)]
    for batch in given:
        step(batch)
    assert [batch.fresh.tolist() for batch in given] == [[True, False, True], [False, True, False]]
    began = [[phase.age(number, row)[1] for number in range(2)] for row in range(2)]
    assert began[0][1] == began[0][0] + phase.length and began[0][0] % 4 == 0
    with torch.no_grad():
        first = observed(model, stream.begin(model), began[0][0], pictures(given[0])[0])
        first = observed(model, first, began[0][1], pictures(given[1])[0])
        second = observed(model, stream.begin(model), began[1][1], pictures(given[1])[1])
    same(first, step.carried, 0)
    same(second, step.carried, 1)


def test_a_run_resumed_within_a_chain_begins_its_streams_again(model):
    (phase,) = (phase for phase in recipes.smoke_longer().phases if phase.chapters > 1)
    step, batch = train.Step(model, Composer("cpu"), phase, record=False), make(phase, 1, 7, model.processor, {})
    assert not batch.fresh.all()
    step(batch)
    with torch.no_grad():
        watched = observed(model, stream.begin(model), phase.age(1, 0)[1], pictures(batch)[0])
    same(watched, step.carried, 0)


def test_an_older_stream_is_not_told_that_it_has_not_seen(model):
    phase = replace(recipes.longer().phases[-1], streams=6, segments=2)
    stories = make_stories(8, 6, phase.length, TRAIN, phase.world)

    def asked(fresh: bool) -> set[tuple[str, bool]]:
        rng = np.random.default_rng(0)
        drawn = [batches._drawn(stories, b, 33, phase, rng, {}, fresh) for b in range(6) for _ in range(20)]
        return {(question.kind, question.evidence < 0) for questions in drawn for question in questions}

    doubtful = {("first_word", False), ("was_pair", False), ("was_pair", True)}
    doubtful |= {(kind, True) for kind in ("word_by_emblem", "count_past", "when_state")}
    assert doubtful <= asked(fresh=True) and not doubtful & asked(fresh=False)
    assert {("word_by_emblem", False), ("was_word", True)} <= asked(fresh=False)


def test_a_question_is_learned_as_it_will_be_asked(model):
    batch = make(recipes.Phase("check", 1, 1, 1, 5, 4, SHORT, peak=1e-3), 0, 4, model.processor, {})
    ids, labels = batch.ids[0, 0], batch.labels[0, 0]
    learned = (labels != IGNORED).nonzero()[0]
    prompt, answer = ids[: learned[0] + 1].tolist(), labels[learned].tolist()
    question = model.processor.text(prompt).split("user")[-1].split("assistant")[0].strip()
    assert prompt == list(model.processor.chat.tail(question))
    assert answer[-1] in model.config.stop_tokens
    with torch.no_grad():
        memory = model.empty_memory(1)
        loss, _ = train.ask(
            model,
            memory,
            torch.zeros(1, dtype=torch.int64),
            torch.from_numpy(ids)[None],
            torch.from_numpy(labels)[None],
        )
        hidden, memory = feed(model, model.empty_memory(1), prompt)
        by_hand = []
        for token in answer:
            by_hand.append(-model.logits(hidden).log_softmax(-1)[0, token])
            hidden, memory = feed(model, memory, [token])
    assert torch.allclose(loss[0], torch.stack(by_hand).mean(), atol=1e-4)


def test_a_teacher_without_a_window_holds_the_whole_story(model):
    """Its memory has room for the last question; what is asked last sees the first frame."""
    teacher = Model(train.shaped(recipes.smoke_teacher(), 512), model.processor)
    phase = recipes.Phase("check", 1, 1, 3, 5, 2, SHORT, peak=1e-3)
    plans, batch = train.plan_segments(teacher, phase), make(phase, 0, 5, model.processor, {})
    room = train.capacity(teacher, plans)
    tokens = len(model.processor.chat.head) + sum(plan.positions.shape[1] for plan in plans)
    assert room == tokens + train.LONGEST and train.capacity(model, train.plan_segments(model, phase)) is None
    tensors = {name: torch.from_numpy(value) for name, value in batch._asdict().items()}
    one = train.train_step(teacher, Composer("cpu"), plans, phase, train.head(teacher), None, tensors)
    tensors["strips"] = tensors["strips"].clone()
    tensors["strips"][:, 0] = 0
    other = train.train_step(teacher, Composer("cpu"), plans, phase, train.head(teacher), None, tensors)
    assert all(gradient.isfinite().all() for gradient in one.gradients)
    assert (one.loss[-2:] != other.loss[-2:]).all()


PHASES = [phase for recipe in (recipes.default, recipes.longer, recipes.teacher) for phase in recipe().phases]


@pytest.mark.parametrize("phase", [each for each in PHASES if each.chapters > 1], ids=lambda p: p.name)
def test_every_stamp_of_a_chain_has_one_length(model, phase):
    begins = [phase.age(step, stream)[1] for step in range(phase.steps) for stream in range(phase.streams)]
    assert max(begins) - min(begins) > 4000
    lengths = {len(model.processor.stamp_ids(t)) for t in (min(begins), max(begins) + phase.length - 1)}
    assert lengths == {len(model.processor.stamp_ids(600))}


@pytest.mark.parametrize("phase", [each for each in PHASES if each.chapters == 1], ids=lambda p: p.name)
def test_every_stamp_of_a_phase_has_one_length(model, phase):
    latest = phase.world.latest_start // 4 * 4 + phase.length - 1
    assert phase.world.latest_start >= 300
    assert len(model.processor.stamp_ids(latest)) == len(model.processor.stamp_ids(0))


@pytest.mark.parametrize("recipe", ["smoke", "smoke_teacher", "smoke_longer"])
def test_the_loop_runs_stops_and_resumes(tmp_path, recipe):
    def run(*more: str) -> None:
        command = [sys.executable, str(FOLDER / "train.py"), "--recipe", recipe, "--every", "1", "--device", "cpu"]
        subprocess.run([*command, "--out", str(tmp_path), "--no-compile", *more], check=True, capture_output=True)

    start = ["--start", "tiny"] if recipe == "smoke_longer" else []
    run("--seconds", "0", *start)
    run("--resume")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(0 < line["loss"] < 10 for line in lines)
    assert (lines[0]["loss"] < 3) == bool(start)  # a guess out of 512 tokens costs 6
    (state,) = tmp_path.glob("state-*")
    assert state.name == "state-00000004"
    assert max(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) < 16 << 20
    made = weights.load(tmp_path / "checkpoint").config
    assert made == train.shaped(recipes.RECIPES[recipe](), 512)
    if recipe == "smoke_teacher":
        assert convert(tmp_path / "checkpoint", tmp_path / "student", window=256).config == tiny().text


def test_a_run_that_is_not_there_is_not_resumed(model, tmp_path):
    with pytest.raises(SystemExit, match="no state to resume from"):
        train.resumed(train.Trainer(model, recipes.smoke()), tmp_path)


def test_a_resumed_run_stands_where_it_stopped(model):
    """Masters and moments come back within the rounding of bfloat16, and the count of updates to the number."""
    torch.manual_seed(1)
    trainer, other = (train.Trainer(Model(tiny(), model.processor), recipes.smoke()) for _ in range(2))
    gradients = [torch.randn_like(p) for p in trainer.live]
    trainer.step(1e-3, gradients)
    other.restore({name: tensor.bfloat16() for name, tensor in trainer.state().items()})
    left, right = trainer.state(), other.state()
    assert set(left) == set(right) and any(name.endswith(".step") for name in left)
    for name, tensor in left.items():
        assert torch.allclose(tensor, right[name], rtol=1e-2, atol=1e-6), name


def test_the_mean_of_two_checkpoints_lies_between_them(model, tmp_path):
    torch.manual_seed(2)
    other = Model(tiny(), model.processor)
    weights.save(model, tmp_path / "one")
    weights.save(other, tmp_path / "other")
    average(str(tmp_path / "one"), str(tmp_path / "other"), tmp_path / "mean")
    parts = zip(weights.load(tmp_path / "mean").parameters(), model.parameters(), other.parameters(), strict=True)
    for mean, mine, theirs in parts:
        assert torch.allclose(mean, (mine + theirs) / 2, rtol=4e-3, atol=1e-6)  # bfloat16, and decays in float32
    weights.save(Model(train.shaped(recipes.smoke_teacher(), 512), model.processor), tmp_path / "softmax")
    with pytest.raises(SystemExit, match="not of one shape"):
        average(str(tmp_path / "one"), str(tmp_path / "softmax"), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit, match="is there already"):
        average(str(tmp_path / "one"), str(tmp_path / "other"), tmp_path / "mean")


def test_what_goes_on_says_from_what(tmp_path):
    words = ["--recipe", "smoke_longer", "--device", "cpu", "--no-compile", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, str(FOLDER / "train.py"), *words], capture_output=True, text=True)
    assert done.returncode == 1 and "say which with --start" in done.stderr and "Traceback" not in done.stderr
