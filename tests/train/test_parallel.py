"""Two processes on gloo, text blocks split by FSDP2, give what one gives; either goes on from the other's files."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

from infinitevl import weights
from infinitevl.train import checkpoint
from infinitevl.train.loop import train
from infinitevl.train.recipes import Recipe

ROOT = Path(__file__).parents[2]
JOBS = """
import json, sys
from pathlib import Path
import torch
from infinitevl.train.loop import train
from infinitevl.train.parallel import world
from infinitevl.train.recipes import Recipe
torch.set_num_threads(1)
with world("cpu"):  # one group for all: the second in a process may meet the first's keys
    for job in json.loads(sys.argv[1]):
        train(Recipe(**job["recipe"]), Path(job["out"]), job["resume"])
left = [each.read_text().strip() for each in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in left if "gloo" in name], left  # they may abort a process that ends before them
"""


@dataclass
class Runs:
    """The same runs by one process and by two, in folders of the same name."""

    one: Path
    two: Path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def two_processes(jobs: list[dict]) -> None:
    shared = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, "-c", JOBS, json.dumps(jobs)]
    ranks = [
        subprocess.Popen(
            command,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    assert "step 1/" in said[0] and "step 1/" not in said[1]  # the first one talks


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Recipe]], Runs]:
    def make(recipes: dict[str, Recipe]) -> Runs:
        runs = Runs(tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two"))
        for name, recipe in recipes.items():
            train(recipe, runs.one / name, tell=lambda line: None)
        jobs = [
            {"recipe": asdict(recipe), "out": str(runs.two / name), "resume": False} for name, recipe in recipes.items()
        ]
        cut = runs.two / "crossed"
        shutil.copytree(runs.one / "all", cut)
        shutil.rmtree(cut / "step-00000004")
        jobs.append({"recipe": asdict(recipes["all"]), "out": str(cut), "resume": True})
        two_processes(jobs)
        return runs

    return make


def curve(out: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["loss"], line["norm"]) for line in lines]


def assert_same(one: Path, two: Path, tolerance: float) -> None:
    """Loss and norm of the gradient at every step, and the weights at the end."""
    for (loss, norm), (other, another) in zip(curve(one), curve(two), strict=True):
        assert loss == pytest.approx(other, rel=tolerance) and norm == pytest.approx(another, rel=10 * tolerance)
    left, right = (weights.load(checkpoint.model_folder(str(out)), dtype=torch.float32) for out in (one, two))
    for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.allclose(a, b, atol=20 * tolerance), name


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process reads what two wrote
def test_two_processes_equal_one(made: Callable, toy_recipe: Callable[..., Recipe]) -> None:
    recipes = {
        "layers": toy_recipe("stage1_layers", steps=3),
        "logits": toy_recipe("stage1_logits", steps=2),
        "all": toy_recipe("stage2_instruct", steps=4, save_every=2, micro=1, trains="all"),
        "lora": toy_recipe("stage3_long", steps=3),
        "half": toy_recipe("stage1_layers", steps=2, dtype="bfloat16"),
    }
    runs: Runs = made(recipes)
    for name in ("layers", "logits", "all", "lora"):
        assert_same(runs.one / name, runs.two / name, 1e-5)
    assert_same(runs.one / "half", runs.two / "half", 1e-3)
    # two went on where one stood, and one goes on where two stood
    assert_same(runs.one / "all", runs.two / "crossed", 1e-5)
    newest = checkpoint.checkpoints(runs.two / "all")
    assert [step for step, _ in newest] == [2, 4] and (newest[0][1] / "state").is_dir()
    shutil.rmtree(newest[1][1])
    train(recipes["all"], runs.two / "all", resume=True, tell=lambda line: None)
    assert_same(runs.one / "all", runs.two / "all", 1e-5)
    assert (checkpoint.checkpoints(runs.two / "all")[-1][1] / "state-00001.safetensors").is_file()
