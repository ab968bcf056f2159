"""Train on the synthetic world, the hybrid or a softmax teacher, from scratch or on from a checkpoint.

A step feeds stories segment by segment through the memory, as a stream would, and after each segment asks questions of
copies of it; gradients run back through all segments. Nothing here knows how the mixers work.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import shutil
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import recipe as recipes
import torch
import torch.nn.functional as F
from batches import IGNORED, LONGEST, Batch, make
from recipe import Phase, Recipe
from torch import Tensor

from infinitevl import rope, weights
from infinitevl.config import ModelConfig, tiny
from infinitevl.files import folder_written_aside
from infinitevl.memory import Memory
from infinitevl.model import Model
from infinitevl.processor import Processor, load_processor, patchify
from infinitevl.record import overwrite
from infinitevl.synth import questions as quiz
from infinitevl.synth.compose import Composer
from infinitevl.train.checkpoint import read_parts, write_parts


def shaped(recipe: Recipe, words: int) -> ModelConfig:
    """The default checkpoint's shape with the recipe's layers and window."""
    small = tiny(words)
    return replace(small, text=replace(small.text, layers=recipe.layers, window=recipe.window))


class Plan(NamedTuple):
    """How the tokens of a segment are ordered: `order` picks from its visual tokens, then its text tokens.

    clock [1]: where the stream's clock stands in this plan; positions [3, T] move with it. stamps: which of the story's
    stamps it holds.
    """

    order: Tensor
    positions: Tensor
    clock: Tensor
    stamps: slice


def plan_segments(model: Model, phase: Phase) -> list[Plan]:
    """Lay out every segment of a phase, by the very position rules that a stream follows."""
    processor, config = model.processor, model.config
    side = processor.config.frame_pixels[0] // config.vision.stride
    every = int(processor.config.stamp_seconds or 0)
    memory = Memory.empty(config, capacity=1 if config.text.window is None else None)  # its clocks alone are used
    memory = memory._replace(clock=memory.clock + len(processor.chat.head))
    plans = []
    for segment in range(phase.segments):
        first = segment * phase.frames
        visual, text, positions, order, clock = 0, phase.frames * side**2, [], [], memory.clock
        for frame in range(first, first + phase.frames):
            if frame % every == 0:
                ids = len(processor.stamp_ids(phase.earliest))
                part, memory = rope.next_text(memory, ids)
                memory = memory._replace(clock=part.amax((0, 2)) + 1)
                positions.append(part)
                order.append(torch.arange(text, text + ids))
                text += ids
            now = torch.tensor([float(frame)], dtype=torch.float64)
            part, memory = rope.next_frame(memory, now, side, side, config)
            memory = memory._replace(clock=torch.maximum(memory.clock, part.amax((0, 2)) + 1))
            positions.append(part)
            order.append(torch.arange(visual, visual + side**2))
            visual += side**2
        held = slice(-(-first // every), -(-(first + phase.frames) // every))
        where = (torch.cat(order), torch.cat(positions, 2)[:, 0], clock)
        plans.append(Plan(*(x.to(model.device) for x in where), held))
    return plans


def capacity(model: Model, plans: list[Plan]) -> int | None:
    """Tokens of a story and of a question after it, where nothing leaves the memory; None for a model with a window."""
    held = len(model.processor.chat.head) + sum(plan.positions.shape[1] for plan in plans) + LONGEST
    return held if model.config.text.window is None else None


def head(model: Model) -> Tensor:
    """Ids of the chat's head [T]; a step that is being recorded cannot make them."""
    return torch.tensor(model.processor.chat.head, device=model.device)


def opened(model: Model, memory: Memory, head: Tensor) -> Memory:
    """The chat's head, ids [T], into a memory that has seen nothing."""
    ids = head.expand(memory.seen.shape[0], -1)
    positions, memory = rope.next_text(memory, ids.shape[1])
    after = model(model.embed(ids), positions, memory)[1]
    assert after is not None
    return after


def continued(fresh: Tensor, new: Memory, carried: Memory) -> Memory:
    """Rows of `new` where `fresh` [B], of `carried` elsewhere."""
    old = iter([leaf for _, leaf in carried.named()])
    return new.map(lambda leaf: torch.where(fresh.view(-1, *[1] * (leaf.dim() - 1)), leaf, next(old)))


def watch(model: Model, memory: Memory, plan: Plan, pixels: Tensor, stamps: Tensor) -> Memory:
    """One segment into the memory: pixels uint8 [B, F, h, w, 3], stamps [B, stamps of the segment, tokens]."""
    rows = pixels.shape[0]
    patches, grid = patchify(pixels.flatten(0, 1), model.processor.config, pair=False)
    visual = model.vision(patches, *grid).unflatten(0, (rows, -1)).flatten(1, 2)
    hidden = torch.cat([visual, model.embed(stamps.flatten(1))], 1)[:, plan.order]
    positions = plan.positions[:, None] + (memory.clock - plan.clock)[:, None]
    after = model(hidden, positions, memory)[1]
    assert after is not None
    return after


def ask(model: Model, memory: Memory, rows: Tensor, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss per question and whether the whole answer is right, [N] each, on copies of the memory's rows."""
    forks = memory.rows(rows)
    positions, forks = rope.next_text(forks, ids.shape[1])
    hidden, _ = model(model.embed(ids), positions, forks)
    logits = model.logits(hidden).float()
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    there = labels != IGNORED
    right = ((logits.argmax(-1) == labels) | ~there).all(1)
    return loss.view(labels.shape).sum(1) / there.sum(1).clamp(min=1), right


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices [N, R, C], roughly: five Newton-Schulz steps in bf16 (Jordan 2024)."""
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon:
    """torch.optim.Muon's update for all matrices of one shape at once: 80 small matrices cost 12 launches, not 80.

    Momentum 0.95 with Nesterov's look-ahead; the update is scaled to the size of AdamW's.
    """

    def __init__(self, matrices: list[Tensor], weight_decay: float) -> None:
        self.weight_decay = weight_decay
        shapes = sorted({tuple(m.shape) for m in matrices})
        self.groups = [[m for m in matrices if tuple(m.shape) == shape] for shape in shapes]
        self.momenta = [torch.zeros(len(group), *group[0].shape, device=group[0].device) for group in self.groups]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([m.grad for m in group if m.grad is not None])
            momentum.lerp_(gradient, 0.05)
            update = orthogonal(gradient.lerp(momentum, 0.95))
            scale = 0.2 * max(group[0].shape) ** 0.5
            torch._foreach_mul_(group, 1 - rate * self.weight_decay)
            torch._foreach_add_(group, list(update.unbind()), alpha=-rate * scale)


class Trainer:
    """bf16 (on CUDA) weights compute, float32 masters learn: matrices of the blocks by Muon, the rest by AdamW."""

    def __init__(self, model: Model, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.names, self.live = map(list, zip(*model.named_parameters(), strict=True))
        self.masters = [p.detach().float().clone() for p in self.live]
        named = dict(zip(self.names, self.masters, strict=True))
        matrices = {n for n, p in named.items() if p.dim() == 2 and "blocks." in n and not n.endswith("_conv")}
        self.muon = Muon([named[n] for n in named if n in matrices], recipe.weight_decay)
        rest = [named[n] for n in named if n not in matrices]
        self.adam = torch.optim.AdamW(rest, weight_decay=0.0, betas=(0.9, 0.98), fused=model.device.type == "cuda")

    @torch.no_grad()
    def step(self, rate: float, gradients: list[Tensor]) -> float:
        """One update; returns the norm of the gradients. Where that is not finite nothing changes."""
        norm = torch.nn.utils.get_total_norm(gradients)
        if not norm.isfinite():
            return float(norm)
        scale = (self.recipe.clip / (norm + 1e-6)).clamp(max=1.0)
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient.float() * scale
        self.muon.step(rate)
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        torch._foreach_copy_(self.live, self.masters)
        return float(norm)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run goes on from, by name: masters, momenta, AdamW's moments and its count of updates."""
        tensors = {f"master.{name}": master for name, master in zip(self.names, self.masters, strict=True)}
        tensors |= {f"momentum.{place}": momentum for place, momentum in enumerate(self.muon.momenta)}
        for place, kept in self.adam.state_dict()["state"].items():
            tensors |= {f"adam.{place}.{name}": moment for name, moment in kept.items()}
        return tensors

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave, in whatever dtype it was kept."""
        held = [*self.masters, *self.muon.momenta]
        names = [f"master.{name}" for name in self.names]
        names += [f"momentum.{place}" for place in range(len(self.muon.momenta))]
        torch._foreach_copy_(held, [state.pop(name).to(self.model.device).float() for name in names])
        torch._foreach_copy_(self.live, self.masters)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, moment in state.items():
            _, place, key = name.split(".")
            moments.setdefault(int(place), {})[key] = moment.float()
        self.adam.load_state_dict(self.adam.state_dict() | {"state": moments})


def rate_at(recipe: Recipe, phase: Phase, step: int, overall: int) -> float:
    """Warm-up over the whole run, then linear within the phase from its peak to `floor` times its peak."""
    share = step / max(1, phase.steps)
    return phase.peak * (1 + (phase.floor - 1) * share) * min(1.0, (overall + 1) / recipe.warmup)


@functools.cache
def _processor() -> Processor:
    """The processor of a worker process, loaded once."""
    torch.set_num_threads(1)
    return load_processor(weights.locate(weights.DEFAULT))


def _produce(job: tuple[Phase, int, int, dict[str, float]]) -> Batch:
    phase, step, seed, mix = job
    return make(phase, step, seed, _processor(), mix)


def produced(recipe: Recipe, start: int) -> Iterator[tuple[Phase, int, int, Batch]]:
    """(phase, step in it, step overall, batch) from step `start` on, made ahead in order by worker processes."""
    steps = [(phase, step) for phase in recipe.phases for step in range(phase.steps)]
    todo = [(phase, step, overall) for overall, (phase, step) in enumerate(steps)][start:]
    jobs = ((phase, step, recipe.seed * 1_000_003 + overall, recipe.kinds) for phase, step, overall in todo)
    if not recipe.workers:
        yield from ((*at, batch) for at, batch in zip(todo, map(_produce, jobs), strict=True))
        return
    with multiprocessing.get_context("spawn").Pool(recipe.workers) as pool:
        ahead: deque = deque()
        for at, job in zip(todo, jobs, strict=True):
            ahead.append((*at, pool.apply_async(_produce, (job,))))
            if len(ahead) >= 3 * recipe.workers:
                *now, batch = ahead.popleft()
                yield (*now, batch.get())
        for *now, batch in ahead:
            yield (*now, batch.get())


class Result(NamedTuple):
    """Per question: loss, is all of the answer right, kind, was there one. Gradients of the mean loss."""

    loss: Tensor
    right: Tensor
    kinds: Tensor
    asked: Tensor
    gradients: list[Tensor]


def train_step(
    model: Model,
    composer: Composer,
    plans: list[Plan],
    phase: Phase,
    begin: Tensor,
    carried: Memory | None,
    batch: dict[str, Tensor],
) -> Result:
    """Forward and backward of one batch (the fields of `Batch` as tensors on the model's device).

    begin: ids of the chat's head. carried: the memory that streams that are not fresh go on from, overwritten with what
    this step leaves; None where all are fresh.
    """
    memory = opened(model, model.empty_memory(phase.streams, capacity(model, plans)), begin)
    if carried is not None:
        memory = continued(batch["fresh"], memory, carried)
    rows = torch.arange(phase.streams, device=model.device).repeat_interleave(phase.asks)
    losses, rights = [], []
    for segment, plan in enumerate(plans):
        part = slice(segment * phase.frames, (segment + 1) * phase.frames)
        params = {name: batch[name][:, part].flatten(0, 1) for name in ("strips", "scene", "grain")}
        pixels = composer(params).unflatten(0, (phase.streams, -1))
        memory = watch(model, memory, plan, pixels, batch["stamps"][:, plan.stamps])
        loss, right = ask(model, memory, rows, batch["ids"][segment], batch["labels"][segment])
        losses.append(loss)
        rights.append(right)
    if carried is not None:
        overwrite(carried, memory.map(Tensor.detach))
    loss, asked = torch.cat(losses), (batch["labels"] != IGNORED).any(2).flatten()
    gradients = torch.autograd.grad(loss.sum() / asked.sum(), list(model.parameters()), materialize_grads=True)
    return Result(loss.detach(), torch.cat(rights), batch["kinds"].flatten(), asked, list(gradients))


class Step:
    """`train_step` of one phase. On CUDA it is recorded once as a graph and replayed: thousands of small launches cost
    nothing then, and every buffer has its place."""

    def __init__(self, model: Model, composer: Composer, phase: Phase, record: bool) -> None:
        self.record = record
        self.carried = model.empty_memory(phase.streams) if phase.chapters > 1 else None
        self.begun = False
        plans = plan_segments(model, phase)
        self.run = functools.partial(train_step, model, composer, plans, phase, head(model), self.carried)
        self.device = model.device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: dict[str, Tensor] = {}
        self.result: Result | None = None

    def __call__(self, batch: Batch) -> Result:
        if not self.begun:  # there is nothing to go on from yet, in a resumed run either
            self.begun, batch = True, batch._replace(fresh=np.ones_like(batch.fresh))
        tensors = {name: torch.from_numpy(value) for name, value in batch._asdict().items()}
        if self.device.type != "cuda":
            return self.run(tensors)
        tensors = {name: value.pin_memory() for name, value in tensors.items()}
        if not self.record:
            return self.run({name: value.to(self.device, non_blocking=True) for name, value in tensors.items()})
        if self.graph is None:
            self._record({name: value.to(self.device) for name, value in tensors.items()})
        for name, value in tensors.items():
            self.inputs[name].copy_(value, non_blocking=True)
        assert self.graph is not None and self.result is not None
        self.graph.replay()
        return self.result

    def _record(self, inputs: dict[str, Tensor]) -> None:
        self.inputs, self.graph = inputs, torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles, and lets libraries allocate
                self.run(inputs)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.empty_cache()
        with torch.cuda.graph(self.graph):
            self.result = self.run(inputs)


class Meter:
    """Loss and accuracy by kind of question since the last line of the log."""

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros(3, len(quiz.KINDS), device=device)
        self.since, self.steps = time.perf_counter(), 0

    def add(self, result: Result) -> None:
        values = torch.stack([torch.ones_like(result.loss), result.loss, result.right.float()]) * result.asked
        self.total.index_add_(1, result.kinds, values)
        self.steps += 1

    def line(self) -> dict[str, object]:
        count, loss, right = self.total.cpu()
        seconds = time.perf_counter() - self.since
        kinds = {k: round(float(right[i] / count[i]), 3) for i, k in enumerate(quiz.KINDS) if count[i]}
        out = {"loss": round(float(loss.sum() / count.sum()), 4), "ms": round(1e3 * seconds / self.steps, 1)}
        self.total.zero_()
        self.since, self.steps = time.perf_counter(), 0
        return out | {"right": kinds}


def compiled(model: Model, composer: Composer) -> None:
    """Compile blocks, not the whole: one compilation serves all blocks of a kind."""
    torch._dynamo.config.cache_size_limit = 64
    composer._frames = torch.compile(composer._frames, dynamic=False)
    for block in (*model.blocks, *model.vision.blocks):
        block.compile(dynamic=False)


def run(args: argparse.Namespace) -> None:
    recipe: Recipe = recipes.RECIPES[args.recipe]()
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    began = time.perf_counter()
    device = torch.device(args.device)
    processor = load_processor(weights.locate(weights.DEFAULT))
    model = Model(shaped(recipe, len(processor.tokenizer)), processor)
    if args.start:
        model.load_state_dict(weights.load(args.start).state_dict())
    elif args.recipe in recipes.GOES_ON and not args.resume:
        raise SystemExit(f"--recipe {args.recipe} goes on from a checkpoint: say which with --start")
    model = model.to(device)
    if device.type == "cuda":
        model = model.bfloat16()
    trainer = Trainer(model, recipe)
    start = resumed(trainer, Path(args.out)) if args.resume else 0
    composer = Composer(device)
    if args.compile:
        compiled(model, composer)
    log = Path(args.out) / "log.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    run_phase, done = None, start
    try:
        for phase, step, overall, batch in produced(recipe, start):
            if phase is not run_phase:
                run_phase, step_of, meter = phase, Step(model, composer, phase, args.record), Meter(device)
            rate = rate_at(recipe, phase, step, overall)
            result = step_of(batch)
            meter.add(result)
            norm = trainer.step(rate, result.gradients)
            done = overall + 1
            if not math.isfinite(norm):
                print(f"step {done}: gradient is not finite; skipped", flush=True)
            if done % args.every == 0 or step + 1 == phase.steps:
                line = {
                    "phase": phase.name,
                    "step": done,
                    "rate": round(rate, 6),
                    "norm": round(norm, 2),
                    **meter.line(),
                }
                line["seconds"] = round(time.perf_counter() - began, 1)
                with log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
            if time.perf_counter() - began > args.seconds:
                break
    finally:  # whatever stops it, memory that runs out too: nothing is lost
        finish(model, trainer, done, args)


def resumed(trainer: Trainer, out: Path) -> int:
    """Restore the newest state of an earlier run; the step it stands at."""
    states = sorted(out.glob("state-*"))
    if not states:
        raise SystemExit(f"{out}: no state to resume from; leave out --resume to begin")
    trainer.restore(read_parts(states[-1]))
    return int(states[-1].name.removeprefix("state-"))


def finish(model: Model, trainer: Trainer, step: int, args: argparse.Namespace) -> None:
    """Write the weights as a checkpoint, and the state for a resumed run, bfloat16 in files below 16 MiB."""
    out = Path(args.out)
    older = list(out.glob("state-*"))
    state = out / f"state-{step:08d}"
    if state not in older:  # resumed at its end: nothing was done
        with folder_written_aside(state) as aside:
            write_parts(trainer.state(), aside, compact=True)
    for path in older:
        if path != state:
            shutil.rmtree(path)
    weights.save(model.bfloat16(), out / "checkpoint")
    print(f"step {step}: written to {out}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="default", choices=recipes.RECIPES)
    parser.add_argument("--start", metavar="CHECKPOINT", help="weights to begin with: a folder or `tiny`; else random")
    parser.add_argument("--out", default="runs/default_checkpoint", help="a folder for weights, state and log")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop and save after so many seconds")
    parser.add_argument("--every", type=int, default=50, help="steps between lines of the log")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--record", action=argparse.BooleanOptionalAction, default=True, help="as a CUDA graph")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
