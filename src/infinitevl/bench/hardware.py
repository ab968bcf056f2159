"""What a figure was measured on: machine, versions, clocks as found, commit."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from infinitevl import __version__

PACKAGES = ("numpy", "triton", "fla-core", "transformers")
_CLOCKS = {
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "sm_most_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "watts",
    "power.limit": "watts_most",
    "temperature.gpu": "celsius",
    "utilization.gpu": "busy_percent",
}


def about(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit, as JSON has them."""
    return {"hardware": _hardware(device), "versions": _versions(), "commit": commit()}


def _hardware(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        capability = f"{found.major}.{found.minor}"
        facts = {"name": found.name, "bytes": found.total_memory, "capability": capability}
        return facts | {"processors": found.multi_processor_count, "clocks": clocks(device)}
    return {"name": _processor(), "threads": torch.get_num_threads(), "clocks": clocks(device)}


def _processor() -> str:
    """The CPU's name as Linux knows it, else what Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def clocks(device: torch.device) -> dict[str, str] | None:
    """What nvidia-smi says of the GPU at this moment; None where there is no GPU or no nvidia-smi."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    number = device.index if device.index is not None else torch.cuda.current_device()
    asked = ["nvidia-smi", f"--id={number}", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    values = [value.strip() for value in said.stdout.strip().split(",")]
    return dict(zip(_CLOCKS.values(), values, strict=False)) if said.returncode == 0 else None


def _versions() -> dict[str, str]:
    found = {"infinitevl": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    found["cuda"] = str(torch.version.cuda)
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str | None:
    """The commit of the source, with "+" where files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    if shutil.which("git") is None:
        return None

    def git(*words: str) -> str | None:
        said = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True)
        return said.stdout.strip() if said.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", str(folder.parent))
    return head and head + ("+" if changed else "")
