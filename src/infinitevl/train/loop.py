"""The one training loop. It is handed a stage and knows nothing of it: parts of a batch -> sums -> gradients."""

from __future__ import annotations

import itertools
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from infinitevl.train import checkpoint, parallel
from infinitevl.train.begin import Run, begin
from infinitevl.train.data import Part, Trouble, parts
from infinitevl.train.log import Tell
from infinitevl.train.masters import rate_at
from infinitevl.train.recipes import Recipe
from infinitevl.train.stages import STAGES, Stage

ADVICE = (
    "lower the learning rate of the delta layers first (delta_scale=0.1), then lr; raise warmup; look at what the last "
    "steps were trained on"
)


class DivergedError(RuntimeError):
    """Losses or gradients were not finite for too many steps in a row; the message says what to change."""


class Outcome(NamedTuple):
    """How a run ended ("end" or "interrupted"), after which step, and its newest checkpoint."""

    reason: str
    step: int
    checkpoint: Path


class Sums(NamedTuple):
    """A step's sums over all processes: the loss, the tokens that it is over, real tokens, who was told to stop."""

    loss: float
    tokens: float
    real: float
    stop: float


def train(recipe: Recipe, out: Path, resume: bool = False, tell: Tell = print, stage: Stage | None = None) -> Outcome:
    """Run a recipe to its end, or until SIGTERM or Ctrl-C, which save first; checkpoints and log go to `out`.

    stage: None, the recipe's own. Raises RecipeError, DataError, ResumeError, GradientError and CheckpointError before
    anything is written, DivergedError after too many steps in a row that were not finite.
    """
    with parallel.world(recipe.device) as world, _told_to_stop() as told:
        talk = tell if world.first else None
        # without a name: with one this frame would hold the run, and that the process group, when the world ends
        return _steps(begin(recipe, stage or STAGES[recipe.stage], out, resume, world, talk), told)


def _steps(run: Run, told: threading.Event) -> Outcome:
    incoming, steps = parts(run.feed, run.world.device), run.recipe.steps
    try:
        while run.step < steps:
            stop = step(run, itertools.islice(incoming, run.feed.parts), told)
            if stop or run.step == steps or run.step % run.recipe.save_every == 0:
                run.log.say(f"step {run.step}: saved to {_save(run)}")
            if stop:
                break
    finally:
        run.log.close()
    reason = "end" if run.step == steps else "interrupted"
    return Outcome(reason, run.step, checkpoint.checkpoints(run.out)[-1][1])


def step(run: Run, incoming: Iterator[Part], told: threading.Event) -> bool:
    """One step from the parts that this process has in it; whether any process was told to stop."""
    sums = backward(run, incoming, told)
    tokens = max(sums.tokens, 1.0)
    norm, share = run.masters.reduce(tokens), rate_at(run.recipe, run.step)
    run.step += 1
    run.counts.tokens += int(sums.real)
    if math.isfinite(sums.loss) and math.isfinite(norm):
        run.masters.step(share, norm)
        run.masters.clear()
        run.counts.failed = 0
        facts = {"norm": norm, "lr": run.recipe.lr * share, **_seen(run)}
        run.log.step(run.step, sums.loss / tokens, int(sums.real), facts)
    else:
        run.masters.clear()
        _skip(run, sums.loss, norm)
    return sums.stop > 0


def backward(run: Run, incoming: Iterator[Part], told: threading.Event) -> Sums:
    """The gradients of this process's share of a step, in the masters; the sums over all processes."""
    sums = torch.zeros(4, dtype=torch.float64, device=run.world.device)
    troubles: list[Trouble] = []
    for part in incoming:
        batch = part.batch.to(run.world.device)
        for loss in run.stage.loss(run.student, run.teacher, batch, run.recipe):
            loss.total.backward()  # type: ignore[no-untyped-call]
            sums[:2] += torch.stack([loss.total.detach().double(), loss.tokens.double()])
        run.masters.accumulate()
        sums[2] += batch.real.sum()
        for row, after in zip(part.rows, part.after, strict=True):
            run.positions[row] = after
        troubles += part.troubles
    sums[3] += told.is_set()
    _name(run, [each for some in parallel.gathered(troubles, run.world) for each in some])
    return Sums(*parallel.summed(sums, run.world).tolist())


def _name(run: Run, troubles: list[Trouble]) -> None:
    """Count the samples that were skipped, and name them."""
    run.counts.skipped_samples += len(troubles)
    for trouble in troubles:
        run.log.event(run.step + 1, skipped_sample=trouble.name, reason=trouble.reason)
        run.log.say(f"skipped {trouble.name}: {trouble.reason}")


def _skip(run: Run, loss: float, norm: float) -> None:
    """Count a step that was not taken. DivergedError after too many in a row."""
    run.counts.failed += 1
    run.counts.skipped_steps += 1
    found = f"loss {loss:.3g}, norm of the gradient {norm:.3g}"
    run.log.event(run.step, skipped_step=found, **_seen(run))
    run.log.say(f"step {run.step}: skipped, not finite: {found}")
    if run.counts.failed >= run.recipe.patience:
        raise DivergedError(f"{run.counts.failed} steps in a row were not finite, up to step {run.step}: {ADVICE}")


def _seen(run: Run) -> dict[str, int]:
    return {name: value for name, value in asdict(run.counts).items() if name != "failed"}


def _save(run: Run) -> Path:
    """A checkpoint of the run as it stands; every process comes here."""
    share = len(run.feed.mine)
    own = run.positions[run.world.rank * share :][:share]
    done = {"stage": run.recipe.stage, "steps": run.step, "tokens": run.counts.tokens, "data": run.recipe.data}
    state: dict[str, Any] = {
        **run.about,
        "positions": [place for some in parallel.gathered(own, run.world) for place in some],
        "counts": asdict(run.counts),
        "updates": run.masters.updates,
    }
    history = [*run.about["before"], done]

    def write_model(folder: Path) -> None:
        checkpoint.write_model(run.student, run.recipe, folder, run.world, history)

    return checkpoint.save(run.out, run.step, run.masters.state(), state, write_model, run.world, run.recipe)


@contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """Set by SIGTERM or Ctrl-C: the step in hand is finished and saved. A second Ctrl-C ends the process at once."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def handle(number: int, frame: object) -> None:
        told.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
