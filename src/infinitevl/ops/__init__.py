"""The one door to the four ops: `attend`, `delta_rule`, `causal_conv`, `gated_norm`.

Pure functions with keywords only, state in and state out. Which implementation runs is decided per call by `choose`,
a rule over the tensors' device and what is asked; it can be pinned, and `infinitevl doctor` prints it. There is no
fallback: an implementation that fails raises.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from infinitevl.ops import reference

OPS = ("attend", "delta_rule", "causal_conv", "gated_norm")
IMPLEMENTATIONS = {op: ("reference",) for op in OPS} | {"delta_rule": ("reference", "recurrent", "fla")}

_pins: ContextVar[dict[str, str] | None] = ContextVar("pinned ops", default=None)


class Choice(NamedTuple):
    """The implementation that runs, and why."""

    name: str
    reason: str


@torch.compiler.assume_constant_result
def _pinned(op: str) -> str | None:
    """The pin of an op; a compiled function keeps the one it was compiled under."""
    return (_pins.get() or {}).get(op)


def choose(op: str, device: torch.device, gradient: bool = False, segments: bool = False) -> Choice:
    """Which implementation of `op` runs for tensors on `device`, with or without a gradient or packed segments."""
    pinned = _pinned(op)
    if pinned:
        return Choice(pinned, "pinned")
    if op != "delta_rule":
        return Choice("reference", "the only implementation")
    if device.type != "cuda":
        return Choice("reference", f"plain torch, in chunks: device is {device.type}")
    if gradient:
        return Choice("reference", "plain torch: FLA's backward is wrong or refused on Hopper before triton 3.7.1")
    if segments:
        return Choice("reference", "plain torch: packed segments")
    if importlib.util.find_spec("fla") is None:
        return Choice("reference", "plain torch: fla-core is not installed (pip install 'infinitevl[gpu]')")
    return Choice("fla", "CUDA, forward only")


@contextmanager
def pinned(**implementations: str) -> Iterator[None]:
    """Within the block, run the named implementation of an op: `with pinned(delta_rule="recurrent"): ...`."""
    for op, name in implementations.items():
        if name not in IMPLEMENTATIONS.get(op, ()):
            raise ValueError(f"no implementation {name!r} of op {op!r}; there are {IMPLEMENTATIONS.get(op, OPS)}")
    token = _pins.set({**(_pins.get() or {}), **implementations})
    try:
        yield
    finally:
        _pins.reset(token)


def attend(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    window: int | None,
    sinks: int,
    q_segment: Tensor | None,
    k_segment: Tensor | None,
) -> Tensor:
    """Softmax attention masked by token index; see `reference.attend`."""
    return reference.attend(
        q=q,
        k=k,
        v=v,
        q_index=q_index,
        k_index=k_index,
        window=window,
        sinks=sinks,
        q_segment=q_segment,
        k_segment=k_segment,
    )


def delta_rule(
    *, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, segment: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gated delta rule; see `reference.delta_rule_recurrent` for what it computes."""
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, g, beta, state))
    name = choose("delta_rule", q.device, gradient, segment is not None).name
    if name == "fla":
        from infinitevl.ops import fla

        run = fla.delta_rule
    else:
        run = reference.delta_rule_recurrent if name == "recurrent" else reference.delta_rule
    return run(q=q, k=k, v=v, g=g, beta=beta, state=state, segment=segment)


def causal_conv(
    *, x: Tensor, weight: Tensor, tail: Tensor, present: Tensor | None, segment: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution and SiLU; see `reference.causal_conv`."""
    return reference.causal_conv(x=x, weight=weight, tail=tail, present=present, segment=segment)


def gated_norm(*, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gated RMS norm of each head; see `reference.gated_norm`."""
    return reference.gated_norm(x=x, gate=gate, weight=weight, eps=eps)
