"""`infinitevl eval recall` and `length` on the command line: what they write, and one line for what cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

from infinitevl import cli, weights


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch, tiny_model, tmp_path) -> Callable[..., tuple[int, str, str]]:
    """Runs `infinitevl eval` in a folder with a checkpoint named `model`."""
    weights.save(tiny_model, tmp_path / "model")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)

    def ran(words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(["eval", *words.split()])
        return int(left.value.code or 0), *capsys.readouterr()

    return ran


def test_recall_prints_writes_and_draws(run):
    code, out, _ = run(
        "recall model --tokens 48 --streams 1 --controls full,blind --out r.json --plot r.png --device cpu"
    )
    assert code == 0 and out.startswith("| windows | tokens | questions | full | blind | word_by_emblem |")
    told = json.loads(Path("r.json").read_text(), parse_constant=pytest.fail)
    assert list(told["columns"]) == ["full", "blind"] and [point["windows"] for point in told["ages"]] == [0.5, 1.0]
    assert Path("r.png").read_bytes().startswith(b"\x89PNG")


def test_length_prints_writes_and_draws(run):
    code, out, _ = run(
        "length model --frames 8 --streams 2 --controls full,no_delta --out l.json --plot l.png --device cpu"
    )
    assert code == 0 and out.startswith("| frames | tokens | now, full |")
    assert [each["frames"] for each in json.loads(Path("l.json").read_text())["lengths"]] == [8]
    assert Path("l.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("recall nowhere", 3, "nowhere: no such folder"),
        ("recall empty", 3, "no config.json"),
        ("recall model --tokens 47", 2, "--tokens 47 is less than a window of 48 tokens"),
        ("recall model --tokens 0", 2, "--tokens"),
        ("recall model --streams 0", 2, "--streams"),
        ("recall model --controls full,nope", 2, "there are full, no_delta, blind"),
        ("recall model --controls blind", 2, "full is not among blind"),
        ("recall model --keep 1.5", 2, "--keep"),
        ("recall model --keep 0.5", 2, "--keep says what --refresh-every leaves: give both"),
        ("recall model --refresh-every 0", 2, "--refresh-every"),
        ("recall model --state-dtype float16", 2, "--state-dtype"),
        ("recall model --out no/r.json", 2, "nothing can be written there"),
        ("recall model --plot r.txt", 2, "name it .png"),
        ("recall model --device nope", 2, "--device nope"),
        ("length nowhere", 3, "nowhere: no such folder"),
        ("length model --frames 7", 2, "--frames"),
        ("length model --controls full,blind", 2, "there are full, no_delta"),
        ("length model --plot no/l.png", 2, "nothing can be written there"),
    ],
)
def test_bad_input_is_one_line(run, words, code, says):
    got, out, err = run(words)
    assert (got, out) == (code, "") and says in err
    assert err.startswith("infinitevl: ") and err.count("\n") == 1
    assert {path.name for path in Path().iterdir()} == {"model", "empty"}
