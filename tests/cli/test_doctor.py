"""infinitevl doctor, and the package's lazy door."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import infinitevl
from infinitevl import doctor, ops
from infinitevl.model import Model


def test_json_says_it_all(run: Callable, checkpoint: Path, model: Model) -> None:
    said = run("doctor", "--model", checkpoint, "--json")
    found = json.loads(said.out)
    assert (said.code, said.err) == (0, "")
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["infinitevl"] == infinitevl.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert {"transformers", "av", "triton", "fla-core"} <= found["versions"].keys()
    assert set(found["ops"]["cpu"]) == set(ops.OPS)
    assert found["ops"]["cpu"]["gated_delta"] == ops.choose("gated_delta", torch.device("cpu"), torch.float32)._asdict()
    assert found["training"]["cpu"] == {op: found["ops"]["cpu"][op] for op in ("attend", "gated_delta")}
    about = found["checkpoint"]
    assert about["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert about["files"]["model.safetensors"] == {
        "bytes": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    assert (about["folder"], about["problem"]) == (str(checkpoint), None)


def test_lines(run: Callable, checkpoint: Path) -> None:
    said = run("doctor", "--model", checkpoint)
    assert said.code == 0
    assert "device cpu: " in said.out and "gated_delta   reference (plain torch: device is cpu)" in said.out
    assert said.out.endswith("complete: it loads\n") and "sha256 " in said.out


def test_pinned_op_is_shown(run: Callable, checkpoint: Path) -> None:
    with ops.pinned(gated_delta="recurrent"):
        said = run("doctor", "--model", checkpoint).out
    assert "gated_delta   recurrent (pinned)" in said and "gated_delta   recurrent to train (pinned)" in said


def test_what_trains_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: object())
    found = doctor._choices(torch.device("cuda"), doctor.MIXING, training=True)
    assert {op: choice["name"] for op, choice in found.items()} == {"attend": "flash", "gated_delta": "scan"}


def test_trouble_with_the_checkpoint_has_its_exit_code(run: Callable, checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "half"))
    (folder / "model.safetensors").unlink()
    half, none = (run("doctor", "--model", where) for where in (folder, tmp_path / "none"))
    assert (half.code, none.code) == (3, 3)
    assert half.out.endswith("weights are missing\n") and "no such folder" in none.out
    assert "versions" in none.out


@pytest.mark.parametrize("name", infinitevl.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(infinitevl, name) is not None and name in dir(infinitevl)


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        infinitevl.nothing  # noqa: B018


class Result:
    """Stands in for the report of a held-out run, which takes minutes."""

    def __init__(self, *asked: object) -> None:
        self.asked = asked

    def as_json(self) -> dict:
        return {"asked": [str(each) for each in self.asked]}

    def markdown(self) -> str:
        return "| a table |\n"


def test_eval_runs_the_held_out_test(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from infinitevl.eval import heldout

    monkeypatch.setattr(heldout, "run", Result)
    out = tmp_path / "results.json"
    words = ("there", "--device", "cpu", "--dtype", "bfloat16", "--controls", "full,blind", "--limit", 2)
    said = run("eval", "heldout", *words, "--out", out)
    assert said == (0, "| a table |\n", "")
    assert json.loads(out.read_text())["asked"] == ["there", "cpu", "torch.bfloat16", "['full', 'blind']", "2"]
    assert run("eval", "heldout", "--device", "cpu").code == 0
