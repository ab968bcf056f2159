"""The state update by itself: the same work on the same numbers by every implementation, on whatever device is there.

Two tables. The rule alone (q, k, v, decays and strengths to outputs and the new state): plain PyTorch token by token
and in chunks, the latter compiled, and FLA's kernels. The whole op, from a mixer's projections to its gated norm, by
every implementation behind the door: ours is written as one and has no rule alone.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infinitevl import ops
from infinitevl.bench import timing
from infinitevl.bench.gate import CEILING, GateError
from infinitevl.bench.setup import Found, Row, Setup, Skipped
from infinitevl.memory import Delta
from infinitevl.ops import reference
from infinitevl.ops.where import DeltaWeights, Projected, Where

CHECKED = 64  # tokens of the comparison with float64
FLA = "FLA"
NAMES = {
    "recurrent": "plain PyTorch, token by token",
    "scan": "ours, in training",
    "reference": "plain PyTorch, in chunks",
    "fla": FLA,
    "triton": "ours",
}
COMPILED = "torch.compile, in chunks"
COMPILING = 100.0  # seconds, at most, for 64 chunks
Run = Callable[[], Any]


class _Inputs:
    """Random numbers of one size, as a mixer makes them."""

    def __init__(self, length: int, setup: Setup) -> None:
        heads, keys, values = setup.scale.shape
        make = torch.Generator(setup.device).manual_seed(length)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=setup.device, generator=make)

        dtype = setup.dtype
        self.projected = Projected(
            q=random(1, length, heads * keys).to(dtype),
            k=random(1, length, heads * keys).to(dtype),
            v=random(1, length, heads * values).to(dtype),
            gate=random(1, length, heads * values).to(dtype),
            a=random(1, length, heads).to(dtype),
            b=random(1, length, heads).to(dtype),
        )
        q, k, v = ((0.5 * random(channels, 4)).to(dtype) for channels in (heads * keys, heads * keys, heads * values))
        decays = random(heads) - 4.0  # half-lives of about 40 tokens
        norm = torch.ones(values, dtype=dtype, device=setup.device)
        self.weights = DeltaWeights(q, k, v, torch.zeros_like(decays), decays, norm, 1e-5)
        index = torch.arange(length, device=setup.device)[None]
        nothing = torch.empty(0, device=setup.device)
        self.where = Where(nothing, nothing, index, seen=torch.zeros(1, dtype=torch.int64, device=setup.device))
        tail = random(1, 3, heads * (2 * keys + values)).to(dtype)
        self.state = Delta(tail, 0.1 * random(1, heads, keys, values))
        unit = [F.normalize(random(1, length, heads, keys), dim=-1) for _ in range(2)]
        self.rule: dict[str, Any] = {
            "q": (unit[0] * keys**-0.5).to(dtype),
            "k": unit[1].to(dtype),
            "v": self.projected.v.unflatten(-1, (heads, values)),
            "g": -F.softplus(random(1, length, heads) - 4.0),
            "beta": random(1, length, heads).sigmoid(),
            "state": self.state.state,
            "segment": None,
        }


def measure(setup: Setup) -> Iterator[Found]:
    """The part "state"."""
    rules, missing = _rules(setup)
    yield from missing
    doors = [name for name in ops.IMPLEMENTATIONS["gated_delta"] if _there(name, setup)]
    yield from _whole_missing(setup, doors)
    yield from _check(rules, doors, setup)
    for length in setup.scale.updates:
        inputs = _Inputs(length, setup)
        for name, rule in rules.items():
            if name == COMPILED and length > 1000 and setup.left < COMPILING:
                reason = f"compiling takes {COMPILING:.0f} s, and less are left (--only state runs it)"
                yield Skipped("state", f"rule alone, {length:,} tokens: {name}", reason)
                continue
            yield from _timed(f"rule alone, {length:,} tokens: {name}", partial(rule, **inputs.rule), setup)
        for name in doors:
            run = partial(_whole, name, inputs)
            yield from _timed(f"whole op, {length:,} tokens: {NAMES[name]}", run, setup)


def _rules(setup: Setup) -> tuple[dict[str, Callable[..., Any]], list[Skipped]]:
    """Who can compute the rule alone here, and why the others cannot."""
    rules: dict[str, Callable[..., Any]] = {
        NAMES["recurrent"]: reference.delta_rule_recurrent,
        NAMES["reference"]: reference.delta_rule,
        NAMES["scan"]: ops.rule("scan"),
    }
    missing = []
    if reason := _no_compiler(setup):
        missing.append(Skipped("state", "rule alone: torch.compile", reason))
    else:
        rules[COMPILED] = torch.compile(reference.delta_rule, dynamic=False)
    if reason := _no_fla(setup):
        missing.append(Skipped("state", "rule alone: FLA", reason))
    else:
        from infinitevl.ops import fla

        rules[NAMES["fla"]] = fla.delta_rule
    return rules, missing


def _no_compiler(setup: Setup) -> str | None:
    if not setup.scale.compiled:
        return "compiling takes longer than all else at this scale"
    if setup.on_gpu:
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    return None if shutil.which("c++") or shutil.which("g++") or shutil.which("clang++") else "no C++ compiler here"


def _no_fla(setup: Setup) -> str | None:
    if not setup.on_gpu:
        return "its kernels need a GPU"
    return None if importlib.util.find_spec("fla") else "fla-core is not installed"


def _there(name: str, setup: Setup) -> bool:
    if name == "fla":
        return _no_fla(setup) is None
    return name != "triton" or (setup.on_gpu and importlib.util.find_spec("triton") is not None)


def _whole_missing(setup: Setup, doors: list[str]) -> Iterator[Skipped]:
    for name in ops.IMPLEMENTATIONS["gated_delta"]:
        if name not in doors:
            yield Skipped("state", f"whole op: {NAMES[name]}", "needs a GPU, and its package")


@torch.no_grad()
def _whole(name: str, inputs: _Inputs) -> Any:
    with ops.pinned(gated_delta=name):
        return ops.gated_delta(
            projected=inputs.projected, weights=inputs.weights, where=inputs.where, state=inputs.state
        )


def _check(rules: dict[str, Callable[..., Any]], doors: list[str], setup: Setup) -> Iterator[Skipped]:
    """Every implementation against the plainest one before its first figure; those too far off are left out.

    Raises GateError where that is ours or the plain reference.
    """
    inputs = _Inputs(CHECKED, setup)
    wide: dict[str, Any] = {name: x if x is None else x.double() for name, x in inputs.rule.items()}
    truth = reference.delta_rule_recurrent(**wide)
    for name in list(rules):
        if complaint := _complaint(f"rule alone: {name}", rules[name](**inputs.rule), truth, setup):
            del rules[name]
            yield complaint
    begin = inputs.state
    inputs.state = Delta(begin.tail.clone(), begin.state.clone())
    out, after = _whole("recurrent", inputs)
    for name in list(doors):
        inputs.state = Delta(begin.tail.clone(), begin.state.clone())
        ours, state = _whole(name, inputs)
        if complaint := _complaint(f"whole op: {NAMES[name]}", (ours, state.state), (out, after.state), setup):
            doors.remove(name)
            yield complaint


def _complaint(name: str, found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], setup: Setup) -> Skipped | None:
    """Why an implementation has no figure; None where it is close enough to the truth."""
    pairs = zip(found, truth, strict=True)
    error = max(float((ours.double() - right.double()).norm() / right.double().norm()) for ours, right in pairs)
    if error <= CEILING[setup.dtype]:
        return None
    reason = f"{error:.2e} from the truth, at most {CEILING[setup.dtype]:.0e} is rounding"
    if FLA in name:
        return Skipped("state", name, reason)
    raise GateError(f"gate: state update, {name}: {reason}")


@torch.no_grad()
def _timed(name: str, run: Run, setup: Setup) -> Iterator[Found]:
    """As it is called, and on a GPU also recorded, without what Python and launches cost."""
    run()
    took = timing.latencies(run, setup.device, setup.scale.eager, most=3.0)
    yield Row("state", name, "us", 1e6 * took.p50, 1e6 * took.p99, len(took.seconds), "called")
    if not setup.on_gpu:
        return
    if took.p50 > 0.2:
        yield Skipped("state", f"{name}, recorded", "too many kernels to record")
        return
    try:
        again = timing.recorded(run)
    except RuntimeError as error:
        yield Skipped("state", f"{name}, recorded", f"cannot be recorded: {' '.join(str(error).split())[:80]}")
        return
    took = timing.intervals(lambda _: again(), setup.device, 50, warm=3)
    yield Row("state", f"{name}, recorded", "us", 1e6 * took.p50, 1e6 * took.p99, 50)
