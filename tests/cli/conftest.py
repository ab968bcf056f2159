"""A random checkpoint of the default one's shape, small films, and a way to run a command in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
import torch
from PIL import Image

from infinitevl import cli, weights
from infinitevl.config import tiny
from infinitevl.model import Model
from infinitevl.processor import load_processor

ROOT = Path(__file__).parents[2]
PATIENCE = 120  # seconds for a process on a busy machine; alone it needs five


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict]:
        return [json.loads(line) for line in self.out.splitlines()]

    def told(self, name: str) -> list[dict]:
        return [event for event in self.events if event["event"] == name]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Steps of 16 tokens: a second thread gains nothing, and waits where tests share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: what is said means nothing, but tells apart what was seen."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("checkpoint")
    weights.save(Model(tiny(), load_processor(weights.locate("tiny"))), folder)
    return folder


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> Model:
    return weights.load(checkpoint)


def picture(number: int, height: int = 112, width: int = 112) -> np.ndarray:
    """Blurred noise, another for each number."""
    small = np.random.default_rng(number).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def album(folder: Path, numbers: range) -> Path:
    """A folder of pictures, which are kept as they are."""
    folder.mkdir()
    for number in numbers:
        Image.fromarray(picture(number)).save(folder / f"{number}.png")
    return folder


def film(path: Path, seconds: int, fps: int = 2) -> Path:
    """A video of one picture a second; H.264, or MPEG-4 in AVI."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4" if path.suffix == ".avi" else "libx264", rate=Fraction(fps))
        stream.width = stream.height = 112
        stream.pix_fmt = "yuv420p"
        for number in range(seconds * fps):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number // fps), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight seconds."""
    return film(tmp_path_factory.mktemp("clip") / "clip.mp4", 8)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs `infinitevl` with some words in this process."""

    def ran(*words: object) -> Ran:
        with pytest.raises(SystemExit) as left:
            cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return Ran(int(left.value.code or 0), out, err)

    return ran


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `infinitevl` with some words in a process of its own; none outlives its test."""
    processes: list[subprocess.Popen[str]] = []

    def start(*words: object, then: str = "", **options: object) -> subprocess.Popen[str]:
        processes.append(_started(*words, then=then, **options))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def _started(*words: object, then: str, **options: object) -> subprocess.Popen[str]:
    """then: code to run at its end."""
    code = f"import sys\nfrom infinitevl.cli import main\ntry: main()\nfinally: {then or 'pass'}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
