"""`infinitevl train`: what it refuses is one line and an exit code; what it runs ends with the documented one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infinitevl import cli
from infinitevl.train import loop
from infinitevl.train.loop import DivergedError, Outcome
from infinitevl.train.recipes import Recipe


def code_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def small(toy_recipe: Callable[..., Recipe], tmp_path: Path) -> list[str]:
    """The command's words for a run of one step."""
    recipe = toy_recipe("stage1_layers", steps=1)
    names = ("student", "teacher", "data", "steps", "batch", "micro", "length", "workers", "device", "log_every")
    changes = [f"{name}={getattr(recipe, name)}" for name in names]
    return ["stage1_layers", *changes, "tensorboard=false", "--out", str(tmp_path / "run")]


def test_a_run_from_the_command_line(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(*small) == 0
    said = capsys.readouterr().out
    assert "trains 26 tensors, 17,736 of 132,328 parameters:" in said and "step 1/1" in said
    assert (tmp_path / "run" / "step-00000001" / "model" / "config.json").is_file()
    assert code_of(*small) == 2
    assert "holds a run at step 1: --resume goes on with it" in capsys.readouterr().err
    assert code_of(*small, "--resume") == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["stage1"], 2, "no recipe 'stage1'"),
        (["stage1_layers", "learning_rate=1"], 2, "no key 'learning_rate'"),
        (["stage2_instruct", "student=tiny"], 2, "data= names what is trained on"),
        (["stage2_instruct", "student=tiny", "data=none.jsonl"], 2, "none.jsonl: no such file"),
        (["stage2_instruct", "student=none", "data=synth"], 3, "none: no such folder"),
        (["stage2_instruct", "student=tiny", "data=synth", "--resume", "--out", "none"], 2, "no checkpoint to resume"),
    ],
)
def test_refusals(words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(*words, *([] if "--out" in words else ["--out", "never"])) == code
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1 and shown.startswith("infinitevl: ")


def test_how_a_run_ended_is_its_code(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends() -> Iterator[object]:
        yield Outcome("interrupted", 1, Path())
        raise DivergedError("5 steps in a row were not finite")

    ending = ends()
    monkeypatch.setattr(loop, "train", lambda *given: next(ending))
    assert [code_of(*small), code_of(*small)] == [130, 6]
    assert "infinitevl: 5 steps in a row were not finite" in capsys.readouterr().err
