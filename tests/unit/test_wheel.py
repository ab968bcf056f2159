"""The wheel carries the whole package, the default checkpoint included, and names its command and licence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ZipFile(next(folder.glob("infinitevl-*-py3-none-any.whl")))


def test_every_file_of_the_package_is_inside(wheel: ZipFile) -> None:
    source = ROOT / "src"
    files = (file for file in (source / "infinitevl").rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    expected = {file.relative_to(source).as_posix(): file.stat().st_size for file in files}
    inside = {entry.filename: entry.file_size for entry in wheel.infolist() if entry.filename.startswith("infinitevl/")}
    assert inside == expected


def test_default_checkpoint_is_inside_and_small(wheel: ZipFile) -> None:
    entries = [entry for entry in wheel.infolist() if entry.filename.startswith("infinitevl/checkpoints/tiny/")]
    assert any(entry.filename.endswith(".safetensors") for entry in entries)
    assert sum(entry.file_size for entry in entries) <= 16_000_000


def test_metadata(wheel: ZipFile) -> None:
    info = next(name for name in wheel.namelist() if name.endswith("/METADATA")).removesuffix("METADATA")
    metadata = wheel.read(info + "METADATA").decode()
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "Requires-Python: >=3.11\n" in metadata
    assert "infinitevl = infinitevl.cli:main" in wheel.read(info + "entry_points.txt").decode()
    assert wheel.read(info + "licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
