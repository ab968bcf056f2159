"""The default checkpoint's training feeds the very stream that it will watch, and its loop runs, stops and resumes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "default_checkpoint"
pytest.importorskip("sklearn")
sys.path.insert(0, str(FOLDER))

import recipe as recipes  # noqa: E402
import train  # noqa: E402
from batches import IGNORED, make  # noqa: E402

from infinitevl import stream, weights  # noqa: E402
from infinitevl.config import tiny  # noqa: E402
from infinitevl.generate import feed  # noqa: E402
from infinitevl.model import Model  # noqa: E402
from infinitevl.processor import load_processor  # noqa: E402
from infinitevl.synth.compose import Composer  # noqa: E402
from infinitevl.synth.world import SHORT  # noqa: E402
from infinitevl.video import Frame  # noqa: E402


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model(tiny(), load_processor(weights.locate("tiny")))


def test_a_training_segment_leaves_the_memory_of_a_stream(model):
    phase = recipes.Phase("check", 1, 2, 2, 5, 3, SHORT, peak=1e-3)
    batch = make(phase, 3, model.processor, {})
    pixels = Composer("cpu")(
        {name: torch.from_numpy(getattr(batch, name)).flatten(0, 1) for name in ("strips", "scene", "grain")}
    )
    pixels = pixels.unflatten(0, (2, -1))
    trained = model.empty_memory(2)
    with torch.no_grad():
        for segment, plan in enumerate(train.plan_segments(model, phase)):
            part = slice(segment * 5, segment * 5 + 5)
            stamps = torch.from_numpy(batch.stamps)[:, plan.stamps]
            trained = train.watch(model, trained, plan, pixels[:, part], stamps)
        watched = stream.begin(model)
        for second, frame in enumerate(pixels[1]):
            watched = stream.observe(model, watched, Frame(float(second), frame.numpy()))
    for name, leaf in watched.named():
        if name not in ("frames", "start", "origin", "last"):  # clocks of the run: training does not keep them
            other = dict(trained.named())[name][1:]
            assert torch.allclose(leaf.double(), other.double(), atol=2e-4), name


def test_a_question_is_learned_as_it_will_be_asked(model):
    batch = make(recipes.Phase("check", 1, 1, 1, 5, 4, SHORT, peak=1e-3), 4, model.processor, {})
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


def test_the_loop_runs_stops_and_resumes(tmp_path):
    def run(*more: str) -> None:
        command = [sys.executable, str(FOLDER / "train.py"), "--recipe", "smoke", "--every", "1", "--device", "cpu"]
        subprocess.run([*command, "--out", str(tmp_path), "--no-compile", *more], check=True, capture_output=True)

    run("--seconds", "0")
    run("--resume", str(tmp_path / "state.pt"))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(0 < line["loss"] < 10 for line in lines)
    assert weights.load(tmp_path / "checkpoint").config == tiny()
