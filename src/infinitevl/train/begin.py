"""From a recipe to a run that can take a step. All that can be refused is refused here, before a file is written."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infinitevl import weights
from infinitevl.model import Model
from infinitevl.train import checkpoint, grad_check, lora, parallel
from infinitevl.train.checkpoint import ResumeError
from infinitevl.train.data import Feed, Order, Rows
from infinitevl.train.folders import can_be_made
from infinitevl.train.log import Log, Tell, flops_per_token, peak, spelled
from infinitevl.train.masters import Masters
from infinitevl.train.parallel import World
from infinitevl.train.recipes import Recipe, RecipeError
from infinitevl.train.sources import open_source
from infinitevl.train.stages import Stage

# what a resumed run may do otherwise: none of it changes a number that is trained
FREE = ("log_every", "save_every", "keep", "compact", "workers", "tensorboard", "patience", "device")


@dataclass
class Counts:
    """What a run has seen and skipped; survives a resume. failed: steps in a row that were not finite."""

    tokens: int = 0
    skipped_samples: int = 0
    skipped_steps: int = 0
    failed: int = 0


@dataclass
class Run:
    """All that the loop works with. about: what is saved with every checkpoint and does not change.

    positions: where the row streams stand; each process keeps those of its own up to date.
    """

    recipe: Recipe
    stage: Stage
    world: World
    out: Path
    student: Model
    teacher: Model | None
    masters: Masters
    feed: Feed
    log: Log
    about: dict[str, Any]
    positions: list[int]
    step: int = 0
    counts: Counts = field(default_factory=Counts)


def begin(recipe: Recipe, stage: Stage, out: Path, resume: bool, world: World, tell: Tell | None) -> Run:
    """The run of a recipe at its first step, or where its newest checkpoint stands."""
    _check(recipe, stage, world)
    found = _found(out, resume)
    _seed(recipe.seed)
    student, teacher = _models(recipe, stage, world)
    about = _about(recipe, student)
    if found is not None:
        _check_same(about, found[1], out)
    names = prepared(student, stage, recipe)
    grad_check.guard(student.config.text, world.device, student.dtype)
    positions, step, counts = _stands(recipe, found)
    share, opened = recipe.batch // world.size, partial(open_source, recipe, student.processor, student.config)
    feed = Feed(opened, recipe, range(world.rank * share, (world.rank + 1) * share), positions)
    _check_data(feed)
    flops = flops_per_token(student, teacher, names, stage.end_to_end)
    told = _introduced(student, names, about)
    for model in (student, teacher):
        if model is not None:
            parallel.shard(model, world)
    if recipe.compile and world.device.type == "cuda":
        compile_blocks(student)
    masters = Masters(student, names, recipe, world)
    if found is not None:
        path, state = found
        checkpoint.load(path, masters.state(), world)
        masters.restore(state["updates"])
        checkpoint.load_random(path)
    if world.first:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.tidy(out)
    log = Log(out, recipe.steps, recipe.log_every, recipe.tensorboard and step < recipe.steps, tell, step)
    at_most = peak(world.device)
    log.flops = None if at_most is None else flops / at_most / world.size
    for line in told if step < recipe.steps else [f"{out}: already at its last step, {step}"]:
        log.say(line)
    return Run(recipe, stage, world, out, student, teacher, masters, feed, log, about, list(positions), step, counts)


def _stands(recipe: Recipe, found: tuple[Path, dict[str, Any]] | None) -> tuple[list[int], int, Counts]:
    """Where the row streams are, the step, and what was counted: of the checkpoint to go on from, or of a new run."""
    if found is None:
        return [0] * recipe.batch, 0, Counts()
    state = found[1]
    return state["positions"], state["step"], Counts(**state["counts"])


def _seed(seed: int) -> None:
    """Every source of random numbers from one seed; a resumed run then sets them to where they were."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# What is refused


def _check(recipe: Recipe, stage: Stage, world: World) -> None:
    if not recipe.student:
        raise RecipeError(
            "student= names the checkpoint that is trained: a folder, a hub id, or an earlier run's folder"
        )
    if stage.teacher and not recipe.teacher:
        raise RecipeError(f"{recipe.stage} distils: teacher= names the checkpoint that is learned from")
    if not recipe.data:
        raise RecipeError("data= names what is trained on: FILE.jsonl, FILE.json, hf:NAME[:SPLIT] or synth")
    if recipe.batch % (world.size * recipe.micro):
        raise RecipeError(
            f"batch={recipe.batch} is not a multiple of micro={recipe.micro} rows on each of {world.size} processes"
        )
    if recipe.lora_rank and recipe.stage != "stage3_long":
        raise RecipeError(f"lora_rank is for stage3_long; {recipe.stage} trains the weights themselves")


def _found(out: Path, resume: bool) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from; None for a new run. ResumeError for a folder that cannot take one."""
    if not can_be_made(out):
        raise ResumeError(f"{out}: nothing can be written there; give a folder, there already or not")
    if resume:
        return checkpoint.newest(out)
    held = checkpoint.checkpoints(out)
    if held:
        raise ResumeError(f"{out} holds a run at step {held[-1][0]}: --resume goes on with it, or choose another --out")
    return None


def _check_data(feed: Feed) -> None:
    """Data of which nothing can be used is refused here, not by a worker: the first row is made once more for that."""
    source, recipe, row = feed.opened(), feed.recipe, feed.mine[0]
    Rows(source, Order(source.size, recipe.batch, recipe.seed), recipe.length).next(row, feed.start[row])


def _check_same(about: dict[str, Any], found: dict[str, Any], out: Path) -> None:
    old, new = found["recipe"], about["recipe"]
    names = [each.name for each in fields(Recipe) if each.name not in FREE]
    changed = [f"{name}={old.get(name)}" for name in names if old.get(name) != new[name]]
    if changed:
        raise ResumeError(f"{out}: the run was begun with {', '.join(changed)}: say the same to go on with it")
    if found["fingerprint"] != about["fingerprint"]:
        raise ResumeError(f"{out}: the weights of student={new['student']} are not those that the run was begun with")


# What is made


def _models(recipe: Recipe, stage: Stage, world: World) -> tuple[Model, Model | None]:
    """Student and, where the stage has one, teacher, in the dtype that computes."""
    dtype = getattr(torch, recipe.dtype or ("float32" if world.device.type == "cpu" else "bfloat16"))
    # by way of the CPU: loaded onto CUDA, weights are views of shared storage, which sharding would keep whole
    student = weights.load(checkpoint.model_folder(recipe.student), "cpu", dtype).to(world.device)
    if not stage.teacher:
        return student, None
    by_way = world.device if world.size == 1 else "cpu"
    teacher = weights.load(checkpoint.model_folder(recipe.teacher), by_way, dtype).to(world.device)
    teacher.requires_grad_(False)
    one, other = student.config.text, teacher.config.text
    for name in ("hidden_size", "vocab_size"):
        if getattr(one, name) != getattr(other, name):
            raise RecipeError(f"teacher and student differ in {name}: {getattr(other, name)} and {getattr(one, name)}")
    if len(one.layers) != len(other.layers):
        raise RecipeError(f"teacher and student differ in layers: {len(other.layers)} and {len(one.layers)}")
    return student, teacher


def prepared(student: Model, stage: Stage, recipe: Recipe) -> list[str]:
    """Add LoRA where the recipe has it, let exactly what the stage trains have gradients; the names of that."""
    if recipe.lora_rank:
        lora.add(student, recipe.lora_rank, recipe.lora_alpha)
    names = stage.trains(student, recipe)
    if not names:
        raise RecipeError(f"{recipe.stage}: there is nothing to train in {recipe.student}: it has no such layers")
    trained = set(names)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in trained)
    return names


def compile_blocks(student: Model) -> None:
    """Every block that trains or that gradients pass through, by torch.compile.

    Rows of a batch are all of one length, pictures are not. A teacher's blocks have no gradients, and kernels of ours.
    """
    for block in student.blocks:
        block.compile(dynamic=False)
    if any(parameter.requires_grad for parameter in student.vision.parameters()):
        for block in student.vision.blocks:
            block.compile()


def _about(recipe: Recipe, student: Model) -> dict[str, Any]:
    before = checkpoint.history(checkpoint.model_folder(recipe.student))
    return {"recipe": asdict(recipe), "fingerprint": weights.fingerprint(student), "before": before}


def _introduced(student: Model, names: list[str], about: dict[str, Any]) -> list[str]:
    """What a run says first: what the student has been through, what trains, and how much of it that is."""
    parameters = dict(student.named_parameters())
    count, total = sum(parameters[name].numel() for name in names), sum(p.numel() for p in parameters.values())
    runs = ", ".join(f"{each['stage']} ({each['steps']} steps)" for each in about["before"])
    before = f"trained before by {runs}" if runs else "no record of earlier training"
    return [
        f"student {about['recipe']['student']}: {before}",
        f"trains {len(names)} tensors, {count:,} of {total:,} parameters:",
        *(f"  {line}" for line in spelled(names)),
    ]
