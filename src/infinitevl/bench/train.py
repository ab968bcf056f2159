"""`infinitevl bench --train`: how fast each stage trains, after a gate of gradients, on random weights and words.

A run is put together from the pieces that `infinitevl train` begins with, and every step is the loop's own: forward,
backward, AdamW on float32 masters, weights. Rows hold conversations of unequal length, text alone. Data is made ahead,
as a run's worker processes make it.
"""

from __future__ import annotations

import importlib.util
import math
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from infinitevl import ops
from infinitevl.bench import models, timing, work
from infinitevl.bench.gate import FACTOR, passed
from infinitevl.bench.setup import Check, Found, Part, Row, Setup, Skipped, Suite
from infinitevl.bench.timing import Mark, Times
from infinitevl.bench.work import Work
from infinitevl.config import ModelConfig
from infinitevl.train import begin, data, grad_check, loop, parallel, recipes
from infinitevl.train.begin import Run
from infinitevl.train.data import Feed, Order, Rows, Sample, packed
from infinitevl.train.log import Log
from infinitevl.train.losses import IGNORED, Loss
from infinitevl.train.masters import Masters
from infinitevl.train.parallel import World
from infinitevl.train.recipes import Recipe
from infinitevl.train.stages import STAGES, Stage

BUDGET = 240.0  # seconds of a whole run
LONGEST = 50.0  # seconds that a part may take, most of them for compiling
ORDER = ("stage2_instruct", "stage1_layers", "stage1_logits", "stage3_long")
DEPTH = 8  # blocks of the model that is checked: every kind, with and without a gradient from the one before
HEADS = 2  # of the delta rule that is checked: a float64 recurrence keeps every state, 4 GiB a head at 4,096 tokens
CEILING = {"loss": 0.1, "gradient": 0.25}  # of plain PyTorch in 16 bits: a gradient beyond points 14 degrees elsewhere
LEAST = 1e-4  # that a step may be from the truth in any dtype: float32 sums in another order
LAPS = FORWARD, BACKWARD, OPTIMISER = "forward", "backward", "optimiser"


@dataclass(frozen=True)
class Sizes:
    """length, long: tokens of a row, and of stage 3's. checked: tokens at which the delta rule's gradient is. steps,
    seconds: at most so many are timed, for about so long, and no fewer than three. rows: of a step that accumulates.
    compiled: blocks by torch.compile."""

    length: int
    long: int
    checked: tuple[int, ...]
    steps: int
    seconds: float
    rows: int
    compiled: bool


FULL = Sizes(8192, 32_768, (130, 4096), 20, 8.0, 8, True)
TINY = Sizes(128, 128, (130,), 3, 0.0, 2, False)
SIZES = {"full": FULL, "quick": TINY, "cpu": TINY}


def suite(world: World) -> Suite:
    """The parts, on the processes that are there. One process measures a stage, several what they gain."""
    parts: dict[str, Part] = {
        "uncompiled": partial(uncompiled, world),
        **{stage: partial(one_stage, world, stage) for stage in ORDER},
        "processes": partial(processes, world),
    }
    return Suite(parts, partial(gate, world), BUDGET, LONGEST, world.size > 1)


# The gate


def gate(world: World, setup: Setup) -> Iterator[Found]:
    """The delta rule's gradient by what will train against a float64 recurrence, then a step of stage 2."""
    text, device, dtype = setup.scale.config.text, setup.device, setup.dtype
    if work.sustained(device) is None:
        yield Skipped("all parts", "MFU and floors", f"known for {', '.join(work.SUSTAINED)} alone")
    shape = text.delta_key_dim, text.delta_value_dim
    for tokens in SIZES[setup.scale.name].checked:
        for name, error in grad_check.errors(device, tokens, HEADS, *shape, dtype).items():
            path = f"the delta rule's gradient in {name}, {tokens:,} tokens"
            yield passed(Check(path, error, grad_check.LIMITS[dtype]))
    setup.quiet()
    yield from check(setup, recipe_of("stage2_instruct", setup, world, False), world)


class Stepped(NamedTuple):
    """A step's mean loss, and the gradients of all that trains by name, float32, whole on every process."""

    loss: float
    gradients: dict[str, Tensor]


def check(setup: Setup, recipe: Recipe, world: World) -> Generator[Found, None, float]:
    """A step of the model's first blocks, as it will be timed: its loss and its gradient, beside the truth. Returns the
    seconds that it took.

    The truth is plain PyTorch in float32, every conversation alone and not packed. Where 16 bits train, the same in
    their dtype sets the measure: the step may be at most twice as far from the truth.
    """
    alone = World(0, 1, world.device)
    # a pin is not seen by the threads of autograd on CUDA, which is where blocks are recomputed
    plainly = replace(recipe, compile=False, checkpointing=False)
    source = Rows(talk(setup, recipe), Order(None, recipe.batch, recipe.seed), recipe.length)
    rows = [source.next(row, 0)[0] for row in range(recipe.batch)]
    single = [part_of([sample], len(sample.ids)) for row in rows for sample in row]
    whole = [part_of(row, recipe.length) for row in rows]
    plain = dict.fromkeys(CEILING, 0.0)
    with ops.pinned(**{op: "reference" for op in ops.OPS}):
        truth = stepped(begun(setup, plainly, alone, DEPTH, exact=True), single)
        if setup.dtype != torch.float32:
            plain = distances(stepped(begun(setup, plainly, alone, DEPTH), single), truth)
    setup.quiet()
    for name, error in plain.items() if setup.dtype != torch.float32 else ():
        yield passed(Check(f"{recipe.stage}, {name}, plain PyTorch", error, CEILING[name]))
    run, mine = begun(setup, recipe, world, DEPTH), whole[world.rank : world.rank + 1]
    began = time.perf_counter()
    ours = stepped(run, mine)
    timing.synchronise(setup.device)
    took = time.perf_counter() - began
    found, kind = distances(ours, truth), "compiled" if recipe.compile else "as it is"
    del run, ours, truth
    setup.quiet()
    least = max(torch.finfo(setup.dtype).eps, LEAST)
    for name, error in found.items():
        yield passed(Check(f"{recipe.stage}, {name}, {kind}", error, max(FACTOR * plain[name], least)))
    return took


def part_of(samples: list[Sample], length: int) -> data.Part:
    """One row as the loop is given it."""
    return data.Part(packed([samples], length), (0,), (0,), ())


def stepped(run: Run, parts: list[data.Part]) -> Stepped:
    """Loss and gradients of a step that is not taken."""
    sums = loop.backward(run, iter(parts), threading.Event())
    run.masters.reduce(sums.tokens)
    gradients = {}
    for name, master in run.masters.masters.items():
        assert master.grad is not None
        gradients[name] = parallel.whole(parallel.like(master.grad, run.masters.live[name]))
    return Stepped(sums.loss / sums.tokens, gradients)


def distances(found: Stepped, truth: Stepped) -> dict[str, float]:
    """Relative errors of the loss and of all gradients as one vector."""
    off = _norm(a - truth.gradients[name] for name, a in found.gradients.items())
    loss = abs(found.loss - truth.loss) / abs(truth.loss)
    return {"loss": loss, "gradient": off / _norm(truth.gradients.values())}


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt())


# What is measured


def uncompiled(world: World, setup: Setup) -> Iterator[Found]:
    """Stage 2 with its blocks as they are (compile=false)."""
    if not SIZES[setup.scale.name].compiled:
        yield Skipped("uncompiled", "all", "nothing is compiled at this size: the other parts are that")
    elif world.size > 1:
        yield from compared(setup, "uncompiled", world, False)
    else:
        yield from speed(setup, "uncompiled", recipe_of("stage2_instruct", setup, world, False), world)


def one_stage(world: World, stage: str, setup: Setup) -> Iterator[Found]:
    """A stage, on one process."""
    sizes = SIZES[setup.scale.name]
    recipe = recipe_of(stage, setup, world, sizes.compiled)
    if world.size > 1:
        yield Skipped(stage, "all", "one process measures it: run it without torchrun")
    elif recipe.lora_rank and importlib.util.find_spec("peft") is None:
        yield Skipped(stage, "all", "LoRA needs peft, which is not installed: pip install 'infinitevl[train]'")
    else:
        rows = (1, sizes.rows) if stage == "stage2_instruct" else (1,)
        yield from checked_speed(setup, stage, recipe, world, rows)


def processes(world: World, setup: Setup) -> Iterator[Found]:
    """What several processes gain."""
    if world.size > 1:
        yield from compared(setup, "processes", world, SIZES[setup.scale.name].compiled)
        return
    reason = "one process: torchrun --nproc-per-node=2 -m infinitevl bench --train measures two"
    yield Skipped("processes", "all", reason)


def compared(setup: Setup, part: str, world: World, compiled: bool) -> Iterator[Found]:
    """Stage 2 by the first process while the others wait, then by all of them, each with a row of its own."""
    alone, one = World(0, 1, world.device), math.nan
    if world.first:
        recipe = recipe_of("stage2_instruct", setup, alone, compiled)
        one = yield from checked_speed(setup, f"{part}: one", recipe, alone)
    parallel.wait(world)
    recipe = recipe_of("stage2_instruct", setup, world, compiled)
    many = yield from checked_speed(setup, f"{part}: {world.size}", recipe, world)
    yield Row(part, "over one", "x", many / one, note=f"{world.size} processes", floor=world.size)


def checked_speed(
    setup: Setup, part: str, recipe: Recipe, world: World, rows: Sequence[int] = (1,)
) -> Generator[Found, None, float]:
    """`speed`, after a check of what is timed; the gate has checked stage 2 as it is."""
    if recipe.compile:
        torch.compiler.reset()  # it keeps few graphs of a function, and every stage has its own
    took = 0.0
    if recipe.compile or recipe.stage != "stage2_instruct":
        took = yield from check(setup, recipe, world)
    return (yield from speed(setup, part, recipe, world, rows, took))


def speed(
    setup: Setup, part: str, recipe: Recipe, world: World, rows: Sequence[int] = (1,), before: float = 0.0
) -> Generator[Found, None, float]:
    """Times steps of so many rows a process; returns the real tokens a second of the first kind, over all processes.

    before: seconds in which blocks were compiled already.
    """
    setup.quiet()
    if setup.on_gpu:
        torch.cuda.reset_peak_memory_stats(setup.device)
    laps = Laps(setup.device)
    run = begun(setup, recipe, world)
    run.stage = laps.timed(run.stage)
    incoming = iter(run.feed)
    first = timing.latencies(partial(take, run, [next(incoming)], laps), setup.device, 1).p50
    second = timing.latencies(partial(take, run, [next(incoming)], laps), setup.device, 1).p50
    if recipe.compile:
        note = f"a first step takes {first:.3g} s, the one that was checked {before:.3g} s"
        yield Row(part, "compiling", "s", before + first - 2 * second, note=note)
    found = []
    for number in rows:
        groups = [list(islice(incoming, number)) for _ in range(_steps(setup, world, number * second))]
        found.append(timed(run, laps, groups))
        yield from found[-1].told(part, setup.device)
    if setup.on_gpu:
        peak = torch.cuda.max_memory_allocated(setup.device) / 2**30
        yield Row(part, "peak memory", "GiB", peak, note="weights, masters and moments included")
    return found[0].speed


def _steps(setup: Setup, world: World, seconds: float) -> int:
    """How many steps of so many seconds are timed: on every process the same."""
    sizes = SIZES[setup.scale.name]
    return min(parallel.gathered(max(3, min(sizes.steps, int(sizes.seconds / seconds))), world))


class Timed(NamedTuple):
    """Steps of `rows` rows a process: their laps in seconds, real tokens of all processes, the work of this one, graphs
    compiled meanwhile; passes: how often they were taken until none was."""

    recipe: Recipe
    rows: int
    laps: list[dict[str, float]]
    tokens: int
    work: Work
    graphs: int
    passes: int = 1

    @property
    def seconds(self) -> list[float]:
        return [sum(each.values()) for each in self.laps]

    @property
    def speed(self) -> float:
        """Real tokens a second."""
        return self.tokens / sum(self.seconds)

    def told(self, part: str, device: torch.device) -> Iterator[Found]:
        """The rows of a result: all of them for steps of one row, the speed alone for others."""
        steps, most = len(self.laps), work.sustained(device)
        size = steps * self.rows * self.recipe.batch * self.recipe.length
        name = "real tokens" if self.rows == 1 else f"real tokens, {self.rows} rows a step"
        note = f"{100 * self.tokens / size:.1f} % of rows of {self.recipe.length:,} tokens; an optimiser step every "
        note += "row" if self.rows == 1 else f"{self.rows} rows"
        least = None if most is None else self.work.needed / most
        yield Row(part, name, "tokens/s", self.speed, None, steps, note, least and self.tokens / least)
        if self.rows > 1:
            return
        took, needed, again = Times(self.seconds), self.work.needed / steps, self.work.again / steps
        note = f"{needed / 1e12:.4g} TFLOP must be done, {again / 1e12:.4g} more recompute blocks"
        yield Row(part, "step", "ms", 1e3 * took.p50, 1e3 * took.p99, steps, note, least and 1e3 * least / steps)
        for lap in LAPS:
            share = Times([each[lap] for each in self.laps])
            yield Row(part, lap, "ms", 1e3 * share.p50, 1e3 * share.p99, steps)
        if least is not None and most is not None:
            busy = least / sum(self.seconds)
            note = f"of {most / 1e12:.0f} TFLOP/s; {100 * busy * (1 + again / needed):.3g} % with what is recomputed"
            yield Row(part, "MFU", "%", 100 * busy, None, steps, note)
        if self.recipe.compile:
            note = f"the rows were taken {self.passes} times: a run meets each number of conversations in a row once"
            yield Row(part, "graphs compiled while timed", "graphs", self.graphs, note=note if self.passes > 1 else "")


def timed(run: Run, laps: Laps, groups: list[list[data.Part]]) -> Timed:
    """A step of each group of rows; once more where a graph was compiled in one, which takes as long as many steps."""
    taken = _passed_once(run, laps, groups)
    if any(parallel.gathered(taken.graphs, run.world)):
        taken = _passed_once(run, laps, groups)._replace(passes=2)
    if run.counts.skipped_steps:
        raise RuntimeError("a step was not finite and skipped: its time is none of a step")
    return taken


def _passed_once(run: Run, laps: Laps, groups: list[list[data.Part]]) -> Timed:
    laps.steps.clear()
    tokens, graphs = run.counts.tokens, _graphs(run.recipe)
    for group in groups:
        take(run, group, laps)
    tokens, graphs = run.counts.tokens - tokens, _graphs(run.recipe) - graphs
    done = [work.of(run, part.batch) for group in groups for part in group]
    counted = Work(sum(each.needed for each in done), sum(each.again for each in done))
    return Timed(run.recipe, len(groups[0]), laps.seconds(), tokens, counted, graphs)


def take(run: Run, parts: list[data.Part], laps: Laps) -> None:
    """A step of the loop."""
    laps.begin()
    loop.step(run, iter(parts), threading.Event())
    laps.end(OPTIMISER)


def _graphs(recipe: Recipe) -> int:
    """How many graphs torch.compile has made in this process."""
    if not recipe.compile:
        return 0
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


class Laps:
    """Where the time of steps goes, on the device's own clock: a stage's loss is asked for by the loop, which takes
    each part of it backward before it asks for the next."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[list[tuple[str, Mark]]] = []

    def begin(self) -> None:
        self.steps.append([("", timing.mark(self.device))])

    def end(self, lap: str) -> None:
        """What ran since the last mark was `lap`."""
        self.steps[-1].append((lap, timing.mark(self.device)))

    def timed(self, stage: Stage) -> Stage:
        """The stage with marks around its forward and its backward; the rest of a step is the optimiser's."""

        def loss(*given: Any) -> Iterator[Loss]:
            self.end(OPTIMISER)
            for each in stage.loss(*given):
                self.end(FORWARD)
                yield each
                self.end(BACKWARD)

        return stage._replace(loss=loss)

    def seconds(self) -> list[dict[str, float]]:
        """Seconds of each lap of each step."""
        timing.synchronise(self.device)
        return [_summed(marks) for marks in self.steps]


def _summed(marks: list[tuple[str, Mark]]) -> dict[str, float]:
    spent = dict.fromkeys(LAPS, 0.0)
    for (_, before), (lap, after) in zip(marks, marks[1:], strict=False):
        spent[lap] += timing.between(before, after)
    return spent


# What is trained


def recipe_of(stage: str, setup: Setup, world: World, compiled: bool) -> Recipe:
    """The published recipe with rows of this run's length, one for each process in a step."""
    sizes = SIZES[setup.scale.name]
    length = sizes.long if stage == "stage3_long" else sizes.length
    return replace(recipes.RECIPES[stage](), length=length, batch=world.size, compile=compiled)


def begun(setup: Setup, recipe: Recipe, world: World, depth: int | None = None, exact: bool = False) -> Run:
    """A run at its first step, on random weights. depth: the model's first blocks alone; exact: the same weights in
    float32."""
    stage, scale = STAGES[recipe.stage], setup.scale
    student = models.random_model(cut(scale.config, depth), setup.device, setup.dtype, scale.processor)
    teacher = None
    if stage.teacher:
        teacher = models.random_model(cut(scale.teacher, depth), setup.device, setup.dtype, scale.processor)
        models.prepared(teacher)
    torch.manual_seed(recipe.seed)  # LoRA's are random too
    names = begin.prepared(student, stage, recipe)
    for model in (student, teacher):
        if model is not None:
            parallel.shard(model.float() if exact else model, world)
    if recipe.compile:
        begin.compile_blocks(student)
    masters = Masters(student, names, recipe, world)
    feed = Feed(partial(talk, setup, recipe), recipe, range(world.rank, world.rank + 1), [0] * recipe.batch)
    log = Log(Path(), recipe.steps, 1, False, None, 0)
    return Run(recipe, stage, world, Path(), student, teacher, masters, feed, log, {}, [0] * recipe.batch)


def cut(config: ModelConfig, depth: int | None) -> ModelConfig:
    """The same widths and mixers in the first blocks alone; None: all of them."""
    return config if depth is None else replace(config, text=replace(config.text, layers=config.text.layers[:depth]))


def talk(setup: Setup, recipe: Recipe) -> Talk:
    """What rows are packed with: conversations of 1/64 to 8/64 of a row, in stage 3 of 8/64 to 24/64."""
    shortest, longest = (8, 24) if recipe.stage == "stage3_long" else (1, 8)
    words = min(setup.scale.config.stop_tokens) // 2
    return Talk(words, recipe.length * shortest // 64, recipe.length * longest // 64)


@dataclass(frozen=True)
class Talk:
    """A source of conversations of random words, short ones more often than long ones; the second half is an answer."""

    words: int
    shortest: int
    longest: int

    size = None

    def name(self, number: int) -> str:
        return f"talk {number}"

    def sample(self, number: int) -> Sample:
        random = np.random.default_rng([5, number])
        length = round(self.shortest * (self.longest / self.shortest) ** random.random())
        ids = torch.from_numpy(random.integers(0, self.words, length))
        labels = ids.roll(-1)
        labels[: length // 2 - 1], labels[-1] = IGNORED, IGNORED
        return Sample(ids, labels, torch.arange(length).expand(3, -1), ())
