"""Every refusal: its exit code, and one line without a traceback."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from infinitevl import cli, weights
from infinitevl.config import tiny
from infinitevl.model import Model
from infinitevl.stream import Stream

from .conftest import PATIENCE


def only_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, clip: Path, model: Model) -> Path:
    """A folder of things that cannot be used."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is no video\n" * 100)
    (folder / "folder").mkdir()
    (folder / "picture.png").write_text("no picture")
    only_sound(folder / "sound.mp4")
    shutil.copytree(checkpoint, folder / "half")
    (folder / "half" / "model.safetensors").unlink()
    shutil.copytree(checkpoint, folder / "odd")
    (folder / "odd" / "config.json").write_text('{"model_type": "something else"}')
    (folder / "damaged").write_bytes(b"no memory" * 100)
    Stream(model).save(folder / "memory")
    whole = (folder / "memory").read_bytes()
    (folder / "cut").write_bytes(whole[:-10])
    Stream(Model(tiny(), model.processor)).save(folder / "foreign")
    weights.save(model, folder / "good")
    shutil.copy(clip, folder / "clip.mp4")
    return folder


CASES = [
    # words, of which those with a slash lie in `place`; exit code; what the line says
    ("watch", 2, "Missing argument"),
    ("watch ./clip.mp4 --nope", 2, "No such option"),
    ("watch ./clip.mp4 --fps x", 2, "--fps"),
    ("watch ./clip.mp4 --model ./good --fps 0", 2, "fps must be a number above 0"),
    ("watch ./clip.mp4 --model ./good --ask 12s:", 2, "asks nothing"),
    ("watch ./clip.mp4 --model ./good --device nope", 2, "--device nope"),
    ("watch ./clip.mp4 --model ./good --dtype float16", 2, "--dtype"),
    ("watch ./clip.mp4 --model ./good --save ./no/memory", 2, "nothing can be written there"),
    ("watch ./clip.mp4 --model ./good --report ./report.txt", 2, "name it .png"),
    ("watch ./clip.mp4 --model ./good --report ./no/report.png", 2, "nothing can be written there"),
    ("watch - --model ./good --interactive", 2, "cannot be '-'"),
    ("watch ./missing.mp4 --model ./good", 2, "no such file"),
    ("watch ./empty.mp4 --model ./good", 2, "empty"),
    ("watch ./text.mp4 --model ./good", 2, "not a video"),
    ("watch ./sound.mp4 --model ./good", 2, "no video in it"),
    ("watch ./folder --model ./good", 2, "no pictures in this folder"),
    ("watch nope://there --model ./good", 2, "nope:// is not known"),
    ("watch ./clip.mp4 --model ./missing", 3, "no such folder"),
    ("watch ./clip.mp4 --model ./folder", 3, "no config.json"),
    ("watch ./clip.mp4 --model ./half", 3, "weights are missing"),
    ("watch ./clip.mp4 --model ./odd", 3, "something else"),
    ("watch ./clip.mp4 --model ./good --resume ./missing", 4, "no such file"),
    ("watch ./clip.mp4 --model ./good --resume ./damaged", 4, "not a memory"),
    ("watch ./clip.mp4 --model ./good --resume ./cut", 4, "damaged or truncated"),
    ("watch ./clip.mp4 --model ./good --resume ./foreign", 4, "of another model"),
    ("ask --model ./good alone?", 2, "at least one image"),
    ("ask ./missing.png what? --model ./good", 2, "no such file"),
    ("ask ./text.mp4 what? --model ./good", 2, "not a video"),
    ("ask ./picture.png what? --model ./good", 2, "not a picture"),
    ("ask ./clip.mp4 what? --model ./missing", 3, "no such folder"),
    ("synth ./no/film.mp4", 2, "nothing can be written there"),
    ("synth ./film.mp4 --frames 3", 2, "--frames"),
    ("synth ./film.json", 2, "must not end in .json"),
    ("eval heldout ./half --limit 1", 3, "weights are missing"),
    ("eval heldout --out ./no/results.json", 2, "nothing can be written there"),
    ("eval heldout --limit 0", 2, "--limit"),
    ("eval heldout --controls full,nope", 2, "there are full, "),
    ("eval heldout --controls blind,blind", 2, "control 'blind' is named twice"),
    ("eval heldout --limit 100000", 2, "it must be 1 to 96, which is all of them"),
    ("eval recall --tokens 100000001", 2, "--tokens"),
    ("nope", 2, "No such command"),
    ("eval", 2, "Missing command"),
]


@pytest.mark.parametrize(("words", "code", "says"), CASES, ids=[case[0] for case in CASES])
def test_one_line_and_its_code(run: Callable, place: Path, words: str, code: int, says: str) -> None:
    said = run(*(f"{place}{word[1:]}" if word.startswith("./") else word for word in words.split()))
    assert said.code == code, said
    assert said.out == "" and "Traceback" not in said.err
    assert said.err.startswith("infinitevl: ") and said.err.count("\n") == 1 and said.err.endswith("\n")
    assert says in said.err
    assert not list(place.glob(".*.part"))


def test_nothing_decodes_though_it_could_be_opened(run: Callable, place: Path) -> None:
    said = run("watch", place / "picture.png", "--model", place / "good", "--ask", "what?")
    assert said.code == 2 and "[" not in said.out
    assert said.err.startswith("infinitevl: ") and said.err.count("\n") == 1 and "not a picture" in said.err


def test_refused_watch_leaves_no_files(run: Callable, place: Path, tmp_path: Path) -> None:
    files = (tmp_path / "memory", tmp_path / "report.png")
    said = run("watch", place / "text.mp4", "--model", place / "good", "--save", files[0], "--report", files[1])
    assert said.code == 2 and not any(file.exists() for file in files)


def test_debug_shows_the_traceback_too(run: Callable, place: Path) -> None:
    said = run("watch", place / "text.mp4", "--model", place / "good", "--debug")
    assert said.code == 2 and "Traceback" in said.err and "VideoError" in said.err
    assert said.err.splitlines()[-1].startswith("infinitevl: ")


def test_unexpected_error_is_one_line_too(run: Callable, monkeypatch: pytest.MonkeyPatch, clip: Path) -> None:
    def broken(*_: object) -> Model:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(weights, "load", broken)
    said = run("watch", clip)
    assert said == (
        cli.UNEXPECTED,
        "",
        "infinitevl: unexpected RuntimeError, --debug shows where: first line second line\n",
    )


def test_control_c_while_loading(run: Callable, monkeypatch: pytest.MonkeyPatch, clip: Path) -> None:
    def interrupted(*_: object) -> Model:
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "load", interrupted)
    assert run("watch", clip) == (130, "", "infinitevl: interrupted\n")


def test_sigterm_ends_a_command_as_control_c_does(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from infinitevl.eval import heldout

    monkeypatch.setattr(heldout, "run", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert run("eval", "heldout") == (130, "", "infinitevl: interrupted\n")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["watch", "--help"], ["ask", "--help"], ["doctor", "--help"], ["eval", "--help"]]
)
def test_help_states_every_exit_code(run: Callable, words: list[str]) -> None:
    said = run(*words)
    flat = " ".join(said.out.split())
    assert said.code == 0 and said.err == ""
    assert all(f" {code} " in flat for code in (0, 1, 2, 3, 4, 5, 130))


def test_help_does_not_wait_for_torch(started: Callable) -> None:
    process = started("watch", "--help", then="print(sorted({'torch', 'numpy', 'av'} & set(sys.modules)))")
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err, out.splitlines()[-1]) == (0, "", "[]")


def test_version(run: Callable) -> None:
    from infinitevl import __version__

    assert run("--version") == (0, f"{__version__}\n", "")


def test_a_runs_folder_is_no_checkpoint_but_holds_some(run: Callable, place: Path, tmp_path: Path) -> None:
    for step in (2, 10):
        shutil.copytree(place / "good", tmp_path / f"step-{step:08d}" / "model")
    said = run("watch", place / "clip.mp4", "--model", tmp_path)
    assert said.code == 3 and said.err.count("\n") == 1
    assert f"its newest checkpoint is {tmp_path / 'step-00000010' / 'model'}" in said.err
