"""Follow a frame: where it will run: versions, devices, what each op chooses there and why, a checkpoint's files."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from infinitevl import __version__, ops, weights
from infinitevl.config import ConfigError
from infinitevl.model import Model

PACKAGES = ("transformers", "safetensors", "av", "numpy", "pillow", "triton", "fla-core")
MISSING = "not installed"
MIXING = ("attend", "gated_delta")  # the ops that train by other implementations than they watch by


def examine(where: str = weights.DEFAULT) -> dict[str, Any]:
    """All there is to say, as data: versions, devices, by device the ops that watch and answer and those that train,
    the checkpoint (`problem` None: it loads)."""
    devices = _devices()
    return {
        "versions": _versions(),
        "devices": devices,
        "ops": {name: _choices(torch.device(name), ops.OPS, False) for name in devices},
        "training": {name: _choices(torch.device(name), MIXING, True) for name in devices},
        "checkpoint": _checkpoint(where),
    }


def _versions() -> dict[str, str]:
    system = f"{platform.system()} {platform.machine()}"
    found = {"infinitevl": __version__, "python": platform.python_version(), "system": system}
    found["torch"] = str(torch.__version__)  # with its build, which its metadata does not tell
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = MISSING
    return found


def _devices() -> dict[str, str]:
    devices = {"cpu": f"{torch.get_num_threads()} threads"}
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        capability = f"compute capability {about.major}.{about.minor}"
        devices[f"cuda:{number}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {capability}"
    return devices


def _choices(device: torch.device, which: Sequence[str], training: bool) -> dict[str, dict[str, str]]:
    """What ops choose, and why: to watch and to answer, or to train (a gradient, packed segments)."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16  # as `weights.load` has it
    return {op: ops.choose(op, device, dtype, training, training)._asdict() for op in which}


def _checkpoint(where: str) -> dict[str, Any]:
    try:
        folder = weights.locate(where)
    except weights.CheckpointError as error:
        return {"name": where, "folder": None, "problem": str(error)}
    about: dict[str, Any] = {"name": where, "folder": str(folder), "files": _files(folder)}
    try:
        config = weights.read_config(folder)
        with torch.device("meta"):
            about["parameters"] = sum(parameter.numel() for parameter in Model(config).parameters())
        weights.load(where)
    except (weights.CheckpointError, ConfigError) as error:
        return about | {"problem": str(error)}
    return about | {"problem": None}


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every file of a checkpoint."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lines(found: dict[str, Any]) -> list[str]:
    """What `examine` found, for people."""
    told = ["versions", *(f"  {name:<13} {version}" for name, version in found["versions"].items())]
    for device, about in found["devices"].items():
        told += ["", f"device {device}: {about}"]
        told += [f"  {op:<13} {choice['name']} ({choice['reason']})" for op, choice in found["ops"][device].items()]
        training = found["training"][device].items()
        told += [f"  {op:<13} {choice['name']} to train ({choice['reason']})" for op, choice in training]
    return [*told, "", *_checkpoint_lines(found["checkpoint"])]


def _checkpoint_lines(about: dict[str, Any]) -> list[str]:
    told = [f"checkpoint {about['name']}: {about['folder'] or 'not found'}"]
    files = about.get("files", {})
    if "parameters" in about:
        whole = sum(file["bytes"] for file in files.values())
        told.append(f"  {about['parameters']:,} parameters, {whole:,} bytes in {len(files)} files")
    for name, file in files.items():
        told.append(f"  {name:<26} {file['bytes']:>13,} bytes  sha256 {file['sha256']}")
    return [*told, f"  {about['problem'] or 'complete: it loads'}"]
