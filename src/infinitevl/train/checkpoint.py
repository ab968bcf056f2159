"""A run's files: OUT/step-00000100/ with `model/`, which `infinitevl.load` reads, and the state that a resume needs.

A checkpoint is written aside and renamed, so that a folder with that name is whole whatever ends the process. One
process writes its state as safetensors, several by torch's distributed checkpoint; any number goes on from either.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor

from infinitevl import weights
from infinitevl.model import Model
from infinitevl.train import lora, parallel
from infinitevl.train.parallel import World
from infinitevl.train.recipes import Recipe

FORMAT = 1
STATE, SHARDED, RANDOM = "state.json", "state", "random.pt"
PART_BYTES, SMALL_PART_BYTES = 4 << 30, 15 << 20


class ResumeError(ValueError):
    """A run that cannot go on, or a folder that cannot take a new one; one line that says why."""


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run by step, the newest last."""
    found = ((re.fullmatch(r"step-(\d{8})", path.name), path) for path in out.glob("step-*"))
    return sorted((int(match[1]), path) for match, path in found if match)


def model_folder(where: str) -> str:
    """A checkpoint as `weights.load` wants it: the newest model of a run's folder, or `where` as it is."""
    found = checkpoints(Path(where)) if Path(where).is_dir() else []
    return str(found[-1][1] / "model") if found else where


# Writing


def save(
    out: Path,
    step: int,
    tensors: dict[str, Tensor],
    about: dict[str, Any],
    write_model: Callable[[Path], None],
    world: World,
    recipe: Recipe,
) -> Path:
    """Write one checkpoint and remove all but the recipe's newest. Every process calls it.

    tensors: of `Masters.state`; about: plain data; write_model(folder): called by every process, the first one writes.
    """
    place = out / f"step-{step:08d}"
    aside = out / f".{place.name}.part"
    if world.first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    parallel.wait(world)
    write_model(aside)
    if world.size > 1:
        dcp.save(tensors, checkpoint_id=aside / SHARDED)
    else:
        write_parts(tensors, aside, recipe.compact)
    if world.first:
        torch.save(_random(), aside / RANDOM)
        (aside / STATE).write_text(json.dumps({"format": FORMAT, "step": step, **about}, indent=1) + "\n")
        _sync(aside)
        shutil.rmtree(place, ignore_errors=True)
        os.replace(aside, place)
        prune(out, recipe.keep)
    parallel.wait(world)
    return place


def write_parts(tensors: dict[str, Tensor], folder: Path, compact: bool) -> None:
    """state-00001.safetensors and so on; compact: in bfloat16 and small parts, for places that take no large files."""
    held = {name: tensor.to(torch.bfloat16 if compact else tensor.dtype).cpu() for name, tensor in tensors.items()}
    limit = SMALL_PART_BYTES if compact else PART_BYTES
    parts: list[dict[str, Tensor]] = [{}]
    for name, tensor in held.items():
        if parts[-1] and tensor.nbytes + sum(each.nbytes for each in parts[-1].values()) > limit:
            parts.append({})
        parts[-1][name] = tensor.contiguous()
    for number, part in enumerate(parts, 1):
        save_file(part, folder / f"state-{number:05d}.safetensors")


def prune(out: Path, keep: int) -> None:
    """Remove all but the newest checkpoints; each loses its name first, so that no half one is ever found."""
    for _, path in checkpoints(out)[:-keep]:
        gone = path.with_name(f".{path.name}.gone")
        os.replace(path, gone)
        shutil.rmtree(gone)


def tidy(out: Path) -> None:
    """Remove what a process that was killed left behind."""
    for left in (*out.glob(".step-*.part"), *out.glob(".step-*.gone")):
        shutil.rmtree(left)


def _sync(folder: Path) -> None:
    """To the disk with every file of a folder, before it gets its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _random() -> dict[str, Any]:
    """The state of every source of random numbers."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


# A model's weights


def write_model(model: Model, recipe: Recipe, folder: Path, world: World, history: list[dict[str, Any]]) -> None:
    """Write the model into `folder`: `model/` with its weights, LoRA merged, or `adapter/` where it is not to be.

    Every process calls it: each gives its part of what is split.
    """
    tensors = {name: parallel.whole(p.detach()) for name, p in model.named_parameters() if _wanted(name, recipe)}
    if not world.first:
        return
    if recipe.lora_rank and not recipe.merge:
        lora.save(tensors, folder / "adapter", recipe.lora_rank, recipe.lora_alpha, recipe.student)
        return
    if recipe.lora_rank:
        tensors = lora.merged(tensors, lora.scale_of(recipe.lora_rank, recipe.lora_alpha))
    with torch.device("meta"):
        plain = Model(model.config, model.processor)
    plain.load_state_dict(tensors, assign=True)
    weights.save(plain, folder / "model")
    (folder / "model" / "training.json").write_text(json.dumps(history, indent=1) + "\n")


def _wanted(name: str, recipe: Recipe) -> bool:
    return recipe.merge or not recipe.lora_rank or bool(lora.MATRIX.fullmatch(name))


def history(where: str) -> list[dict[str, Any]]:
    """The runs that made a checkpoint, oldest first; nothing where it does not say."""
    path = Path(where) / "training.json"
    return json.loads(path.read_text()) if path.is_file() else []


# Reading


def newest(out: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint of a run and what it says. ResumeError where there is none that can be read."""
    found = checkpoints(out)
    if not found:
        raise ResumeError(f"{out}: no checkpoint to resume from; leave out --resume to begin")
    path = found[-1][1]
    about = json.loads((path / STATE).read_text())
    if about.get("format") != FORMAT:
        raise ResumeError(f"{path}: state of format {about.get('format')}, this version reads {FORMAT}")
    return path, about


def load(path: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Read a checkpoint's state into the tensors of `Masters.state`, in place."""
    if (path / SHARDED).is_dir():
        dcp.load(tensors, checkpoint_id=path / SHARDED, no_dist=world.size == 1)
        return
    found = read_parts(path)
    if set(found) != set(tensors):
        odd = sorted(set(found) ^ set(tensors))
        raise ResumeError(f"{path}: its state is of other parameters: {', '.join(odd[:4])}")
    for name, tensor in tensors.items():
        parallel.local(tensor).copy_(parallel.part(found[name], tensor))


def read_parts(folder: Path) -> dict[str, Tensor]:
    """What `write_parts` wrote."""
    return {name: tensor for part in folder.glob("state-*.safetensors") for name, tensor in load_file(part).items()}


def load_random(path: Path) -> None:
    """Set every source of random numbers to where it was."""
    state = torch.load(path / RANDOM, weights_only=True)
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
