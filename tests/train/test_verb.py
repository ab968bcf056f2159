"""`infinitevl train`: what it refuses is one line and an exit code; what it runs ends with the documented one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from infinitevl import cli
from infinitevl.train import loop
from infinitevl.train.folders import can_be_made
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
    assert f"student {small[1].removeprefix('student=')}: no record of earlier training" in said
    assert (tmp_path / "run" / "step-00000001" / "model" / "config.json").is_file()
    assert code_of(*small) == 2
    assert "holds a run at step 1: --resume goes on with it" in capsys.readouterr().err
    assert code_of(*small, "--resume") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run'}: already at its last step, 1\n"
    assert code_of(*small[:1], f"student={tmp_path / 'run'}", *small[2:-1], str(tmp_path / "next")) == 0
    assert f"student {tmp_path / 'run'}: trained before by stage1_layers (1 steps)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["stage1"], 2, "no recipe 'stage1'"),
        (["stage1_layers", "learning_rate=1"], 2, "no key 'learning_rate'"),
        (["stage2_instruct", "student=tiny"], 2, "data= names what is trained on"),
        (["stage2_instruct", "student=tiny", "data=none.jsonl"], 2, "none.jsonl: no such file"),
        (["stage2_instruct", "student=none", "data=synth"], 3, "none: no such folder"),
        (["stage2_instruct", "student=tiny", "data=synth", "device=foo"], 2, "device=foo: "),
        (["stage2_instruct", "student=tiny", "data=synth", "length=5"], 2, "length=5: the 68 frames of a story"),
        (["stage2_instruct", "student=tiny", "data=synth", "--resume", "--out", "none"], 2, "no checkpoint to resume"),
    ],
)
def test_refusals(words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(*words, *([] if "--out" in words else ["--out", "never"])) == code
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1 and shown.startswith("infinitevl: ")
    assert not Path("never").exists() and not Path("none").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("stage2_instruct_tiny", "student=tiny", "device=cuda", "--out", "never") == 2
    assert capsys.readouterr().err.startswith("infinitevl: device=cuda: ")


@pytest.mark.parametrize("below", ["file", "file/run", "file/deep/run"])
def test_a_folder_that_cannot_be_made(below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert code_of("stage2_instruct_tiny", "student=tiny", "--out", str(tmp_path / below)) == 2
    assert capsys.readouterr().err == (
        f"infinitevl: {tmp_path / below}: nothing can be written there; give a folder, there already or not\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_can_be_made_is_not_made_by_asking(tmp_path: Path) -> None:
    assert can_be_made(tmp_path / "a" / "b") and can_be_made(tmp_path) and list(tmp_path.iterdir()) == []
    if Path("/proc/self").exists():  # where even root, who may write anywhere, makes nothing
        assert not can_be_made(Path("/proc/run"))


def test_what_the_documentation_says_to_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The section "Try it" of docs/training.md, to its last command."""
    pytest.importorskip("sklearn")
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    section = text.partition("## Try it\n")[2].partition("\n## ")[0]
    monkeypatch.chdir(tmp_path)
    for language, code in re.findall(r"^```(bash|python)\n([\s\S]*?)^```$", section, re.M):
        if language == "python":
            exec(code, {})
        for line in code.splitlines() if language == "bash" else ():
            with pytest.raises(SystemExit) as ended:
                cli.main(shlex.split(line)[1:])
            assert not ended.value.code, line
    names = ("try", "1a", "1b", "2", "3")
    assert all(Path("runs", name, "step-00000003", "model", "config.json").is_file() for name in names)


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
