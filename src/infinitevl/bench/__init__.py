"""`infinitevl bench`: every figure of speed beside its aim, after a gate of correctness, in one process; with --train
those of training, also in several.

A part measures one thing and yields what it found; `run` calls the parts in order and returns one result, as data.
It needs torch and numpy (matplotlib for `--plot`), so that `python -m infinitevl.bench` runs where little else is.
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from infinitevl.bench import (
    aims,
    breakdown,
    fp8,
    frame,
    gate,
    hardware,
    question,
    report,
    state_update,
    streams,
    text,
    transformer,
)
from infinitevl.bench.setup import (
    CPU,
    FULL,
    OURS,
    QUICK,
    BenchError,
    Check,
    Curve,
    Found,
    Part,
    Row,
    Setup,
    Skipped,
    Suite,
)

PARTS: dict[str, Part] = {
    "frame": frame.measure,
    "breakdown": breakdown.measure,
    "decode": text.decode,
    "prefill": text.prefill,
    "streams": streams.measure,
    "question": question.measure,
    "transformer": transformer.measure,
    "state": state_update.measure,
}
BUDGET = 430.0  # seconds after which no further part begins: none takes more than 80, and a run eight minutes
LONGEST = 80.0  # seconds of the longest part: with less left, none is begun
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What to measure. device None: cuda where there is one. only: parts to run; empty: all. train: the suite of
    training, fp8: that of e4m3 weights, else that of streams."""

    quick: bool = False
    full: bool = False
    device: str | None = None
    only: tuple[str, ...] = ()
    train: bool = False
    fp8: bool = False


def told(line: str) -> None:
    """Progress goes to standard error: standard output is the result's."""
    print(line, file=sys.stderr, flush=True)


def command(options: Options, out: Path | None, against: Path | None, plot: Path | None, tell: Tell = told) -> bool:
    """The whole command: measures, prints the table and, as the last line, the JSON. Whether every part ended well.

    Raises BenchError for what cannot be done (before anything is measured), GateError where the gate is not green.
    """
    if options.train and options.fp8:
        raise BenchError("--fp8: nothing is trained in FP8")
    if (options.train or options.fp8) and plot is not None:
        raise BenchError(f"--plot: --{'train' if options.train else 'fp8'} has no figures to draw")
    then = None if against is None else report.read(against)
    report.check_places(out, plot)
    result = run(options, tell)
    if result is None:
        return True
    print("\n".join(report.lines(result, then)))
    if out is not None:
        report.write(out, result)
    if plot is not None:
        from infinitevl.bench.plot import draw

        tell(f"drawn: {', '.join(str(path) for path in draw(result, plot))}")
    print(report.as_line(result), flush=True)
    return not result["failed"]


def run(options: Options, tell: Tell = told) -> dict[str, Any] | None:
    """Gate, then every part; the result as JSON has it, None in any but the first of several processes. Raises
    BenchError and GateError.

    A part that fails is told with its traceback and listed under "failed"; the others go on.
    """
    device = device_of(options)
    if options.fp8:
        return measured(options, fp8.suite(device, BUDGET, LONGEST), device, tell)
    if not options.train:
        suite = Suite(PARTS, lambda setup: gate.check(setup, OURS, setup.scale.config), BUDGET, LONGEST)
        return measured(options, suite, device, tell)
    from infinitevl.bench import train
    from infinitevl.train import parallel

    with parallel.world(options.device or "") as world:
        result = measured(options, train.suite(world), world.device, tell if world.first else lambda line: None)
    return result if world.first else None


def measured(options: Options, suite: Suite, device: torch.device, tell: Tell) -> dict[str, Any]:
    """The result of one suite on one device, as `run` returns it."""
    if unknown := [name for name in options.only if name not in suite.parts]:
        raise BenchError(f"--only {unknown[0]}: the parts are {', '.join(suite.parts)}")
    began = time.perf_counter()
    setup = prepare(options, device, math.inf if options.full else began + suite.budget)

    def say(line: str) -> None:
        tell(f"[{time.perf_counter() - began:5.0f} s] {line}")

    about = {
        "format": report.FORMAT,
        "version": report.VERSION,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "options": asdict(options),
        "scale": setup.scale.name,
        "dtype": str(setup.dtype).removeprefix("torch.") + (", FP8" if setup.fp8 else ""),
        **hardware.about(setup.device),
    }
    say(f"{about['hardware']['name']}, {setup.scale.name} scale, {about['dtype']}; gate")
    found = left_out(setup)
    for each in suite.gate(setup):
        found.append(each)
        say(each.told())
    failed = _parts(setup, suite, options, say, found)
    rows = [each for each in found if isinstance(each, Row)]
    rows += aims.against_transformer(rows)
    return {
        **about,
        "gate": {"green": True, "checks": [each._asdict() for each in found if isinstance(each, Check)]},
        "rows": [aims.beside(row, about["hardware"]["name"], setup.scale.name) for row in rows],
        "skipped": [each._asdict() for each in found if isinstance(each, Skipped)],
        "curves": [each._asdict() for each in found if isinstance(each, Curve)],
        "failed": failed,
        "hardware_after": hardware.clocks(setup.device),
        "seconds": time.perf_counter() - began,
    }


def _parts(setup: Setup, suite: Suite, options: Options, say: Tell, found: list[Found]) -> list[dict[str, str]]:
    """Runs the parts, puts what they find into `found`, and says which failed."""
    failed = []
    for name in options.only or suite.parts:
        if setup.left < suite.longest:
            left = f"less than {suite.longest:.0f} of {suite.budget:.0f} s are left"
            found.append(Skipped(name, "all", f"out of time: {left} (--only {name} runs it alone)"))
            continue
        say(name)
        try:
            for each in suite.parts[name](setup):
                found.append(each)
                say(each.told())
        except torch.OutOfMemoryError as error:
            if suite.together:
                raise
            found.append(Skipped(name, "the rest", f"not enough memory: {report.line(error)}"))
        except Exception as error:
            if suite.together:
                raise  # the other processes wait for this one: it ends, and torchrun ends them
            say(traceback.format_exc())
            failed.append({"part": name, "error": f"{type(error).__name__}: {report.line(error)}"})
        setup.quiet()
    return failed


def device_of(options: Options) -> torch.device:
    """The device that is asked for. BenchError where it is not there."""
    there = torch.cuda.is_available()
    try:
        device = torch.device(options.device or ("cuda" if there else "cpu"))
    except RuntimeError as error:
        raise BenchError(f"--device {options.device}: {report.line(error)}") from None
    if device.type not in ("cuda", "cpu"):
        raise BenchError(f"--device {device}: it measures on cuda and cpu")
    if device.type == "cuda" and not there:
        raise BenchError("--device cuda: torch finds no CUDA device here")
    return device


def prepare(options: Options, device: torch.device, deadline: float) -> Setup:
    """Device and scale of a run."""
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # events and recorded steps go to the current one
    scale = QUICK if options.quick else FULL if device.type == "cuda" else CPU
    return Setup(scale, device, options.full, deadline, options.fp8)


def left_out(setup: Setup) -> list[Found]:
    """What a run on this device cannot measure at all."""
    if setup.scale is not CPU:
        return []
    return [Skipped("model", "InfiniteVL-4B", "no GPU: a step would take minutes; the tiny model stands in")]
