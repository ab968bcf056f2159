"""Follow a frame: beside what was measured on it, how: command, hardware, versions, date, commit, weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from infinitevl import __version__, ops
from infinitevl.files import written_aside
from infinitevl.model import Model

PACKAGES = ("numpy", "transformers", "fla-core", "triton")


def circumstances(model: Model) -> dict[str, Any]:
    """What a number of `model`'s travels with, as plain data."""
    return {
        "command": command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "ops": {op: ops.choose(op, model.device, model.dtype).name for op in ops.OPS},
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Of Python, this package, torch (with its build, which its metadata does not tell) and others; None: not there."""
    own = {"python": platform.python_version(), "infinitevl": __version__, "torch": str(torch.__version__)}
    return {**own, **{name: _version(name) for name in PACKAGES}}


def command() -> str:
    """The command that runs now; of absolute paths only the last part, which means something elsewhere."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.orig_argv[1:]]
    return shlex.join(words if words[:1] == ["infinitevl"] else ["python", *words])  # the installed entry has a name


def hardware(device: torch.device) -> dict[str, Any]:
    """Processor, cores that may be used, threads that torch uses, and the GPU where the device is one."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _processor(), "cores": cores, "threads": torch.get_num_threads(), "gpu": gpu}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit that this code is of, "-dirty" where it was changed since; None outside its repository."""
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:  # installed inside some other repository
        return None
    return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each safetensors file of a checkpoint's folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {path.name: _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: str | Path, content: dict[str, Any]) -> None:
    """Plain data as a JSON file, whole or not at all; its folder is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
