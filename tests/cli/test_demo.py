"""infinitevl synth, and the demo: a film, its questions, the answers beside the truth."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from infinitevl.video import frames

from .conftest import ROOT


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_run", ROOT / "demo" / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_synth_writes_a_film_and_its_questions(run: Callable, tmp_path: Path) -> None:
    one, other = tmp_path / "one.mp4", tmp_path / "other.mp4"
    said = run("synth", one, "--seed", 5, "--frames", 40, "--fps", 2)
    assert (said.code, said.err) == (0, "") and said.out.startswith(f"{one}: 40 s at 2 frames a second; ")
    record = json.loads(one.with_suffix(".json").read_text())
    assert (record["seed"], record["frames"], record["fps"]) == (5, 40, 2)
    assert f"{len(record['questions'])} questions in {one.with_suffix('.json')}" in said.out
    assert all(question["text"] and question["answer"] for question in record["questions"])
    assert len(list(frames(one, fps=1))) == 40
    run("synth", other, "--seed", 5, "--frames", 40, "--fps", 2)
    assert other.with_suffix(".json").read_text() == one.with_suffix(".json").read_text()


def test_demo_prints_answers_beside_the_truth(
    demo: ModuleType, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = demo.main(str(checkpoint), tmp_path)
    out = capsys.readouterr().out
    asked = json.loads((tmp_path / "out" / "film.json").read_text())["questions"]
    for question in asked:
        assert f"] {question['text']}\n" in out and f"truth: {question['answer']} " in out
    assert out.count(" bytes, ") == len(asked) and out.count("tokens seen so far") == len(asked)
    (line,) = (line for line in out.splitlines() if line.startswith("memory after each frame: "))
    assert line.count("bytes") == 1  # one number
    assert f"{right} of {len(asked)} answers are right" in out
    with Image.open(tmp_path / "report.png") as image:
        assert image.width > 1000


def test_demo_asks_what_it_promises(demo: ModuleType, model, tmp_path: Path) -> None:
    """Now, longer ago than the window reaches, how many, in which order, when, and what was never seen."""
    asked = demo.film.write(tmp_path / "film.mp4", demo.SEED, demo.SECONDS, fps=1)["questions"]
    window = model.config.text.window / 16  # seconds at most: a frame has 16 tokens, and stamps come on top
    kinds = {question["kind"] for question in asked}
    assert len({question["time"] for question in asked}) >= 6
    assert {"sign", "count_past", "order", "when_word"} <= kinds
    gone = [
        question for question in asked if question["evidence"] >= 0 and question["time"] - question["evidence"] > window
    ]
    assert {"word_by_emblem", "order", "when_word"} <= {question["kind"] for question in gone}
    assert "not seen" in {question["answer"] for question in asked}


def test_command_of_the_demo_is_what_it_runs(demo: ModuleType, tmp_path: Path) -> None:
    from infinitevl.watch import Question

    asked = [{"time": 21, "text": "what's 'that'?"}, {"time": 95, "text": "when?"}]
    words = demo.shlex.split(demo.command(tmp_path / "film.mp4", asked).replace("\\\n", " "))
    given = tuple(Question.parse(word) for before, word in zip(words, words[1:], strict=False) if before == "--ask")
    assert given == demo.settings(tmp_path / "film.mp4", asked).asked
