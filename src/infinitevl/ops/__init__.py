"""The one door to the ops: `place` (and `angles`), `rms_norm`, `linear`, `linear_fp8` (and `mlp_fp8`),
`attend_patches`, `attend`, `gated_delta`.

Keywords only, state in and state out. Which implementation runs is decided per call by `choose`, a rule over the
tensors' device and dtype and over what is asked; it can be pinned, and `infinitevl doctor` prints it. There is no
fallback: an implementation that fails raises.

The plain-torch reference never changes what it is given, and neither do `scan` and `flash`, which train on CUDA. The
other kernels, which run only where no gradient is asked, write the state they are given, the rotated projections and
the sum in `linear` in place: the memory given to a step is consumed, and projections are fresh.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infinitevl.memory import Delta, Window
from infinitevl.ops import flash, fp8, reference, scan
from infinitevl.ops.fp8 import Quantised
from infinitevl.ops.where import DeltaWeights, Placed, Projected, Where, Windows

OPS = ("place", "rms_norm", "linear", "linear_fp8", "attend_patches", "attend", "gated_delta")
IMPLEMENTATIONS = {op: ("reference", "triton") for op in OPS} | {
    "attend": ("reference", "flash", "triton"),
    "gated_delta": ("reference", "recurrent", "fla", "scan", "triton"),
}
HALF = (torch.bfloat16, torch.float16)
SMALLEST = 32  # channels of a delta head below which the kernels were found wrong on an H200 (16, with triton 3.6)

_pins: ContextVar[dict[str, str] | None] = ContextVar("pinned ops", default=None)


class Choice(NamedTuple):
    """The implementation that runs, and why."""

    name: str
    reason: str


@torch.compiler.assume_constant_result
def _pinned(op: str) -> str | None:
    """The pin of an op; a compiled function keeps the one it was compiled under."""
    return (_pins.get() or {}).get(op)


def choose(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    gradient: bool = False,
    segments: bool = False,
    channels: int = SMALLEST,
    masked: bool = False,
) -> Choice:
    """Which implementation of `op` runs for tensors on `device`, with or without a gradient or packed segments.

    channels: the fewest that a delta head has as key or value. masked: tokens that are not there, or sinks.
    """
    pinned = _pinned(op)
    if pinned:
        return Choice(pinned, "pinned")
    if device.type != "cuda":
        return Choice("reference", f"plain torch: device is {device.type}")
    if dtype not in HALF and op != "place":
        return Choice("reference", f"plain torch: the kernels are for 16-bit models, this is {dtype}")
    if channels < SMALLEST:
        return Choice("reference", f"plain torch: delta heads of {channels} channels, the kernels want {SMALLEST}")
    if not _has_triton():
        return Choice("reference", "plain torch: triton is not installed")
    if op == "gated_delta" and (gradient or segments):
        return Choice("scan", "CUDA, 16 bit, gradient or segments: chunks in plain torch, their sequence a kernel")
    if op == "attend" and segments and not masked:
        return Choice("flash", "CUDA, 16 bit, segments: torch's FlashAttention")
    if gradient or (op == "attend" and segments):
        return Choice("reference", "plain torch: the kernels have no backward and no segments")
    if torch.compiler.is_compiling():
        return Choice("reference", "plain torch: torch.compile makes the kernel")
    return Choice("triton", "CUDA, 16 bit, no gradient")


@torch.compiler.assume_constant_result
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@contextmanager
def pinned(**implementations: str) -> Iterator[None]:
    """Within the block, run the named implementation of an op: `with pinned(gated_delta="recurrent"): ...`."""
    for op, name in implementations.items():
        if name not in IMPLEMENTATIONS.get(op, ()):
            raise ValueError(f"no implementation {name!r} of op {op!r}; there are {IMPLEMENTATIONS.get(op, OPS)}")
    token = _pins.set({**(_pins.get() or {}), **implementations})
    try:
        yield
    finally:
        _pins.reset(token)


def _asks_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def rms_norm(*, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm; see `reference.rms_norm`."""
    if choose("rms_norm", x.device, x.dtype, _asks_gradient(x, weight)).name == "triton":
        from infinitevl.ops.triton.linear import rms_norm as run
    else:
        run = reference.rms_norm
    return run(x=x, weight=weight, eps=eps)


def linear(
    *,
    x: Tensor,
    weight: Tensor | Quantised,
    bias: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    onto: Tensor | None = None,
) -> Tensor:
    """A product with what stands around it in a block: norm before, gated SiLU after, sum at the end; see `reference`,
    and `fp8` for a quantised weight.

    `onto` is consumed.
    """
    if isinstance(weight, Quantised):
        return _fp8(x).linear(x=x, weight=weight, bias=bias, norm=norm, gated=gated, onto=onto)
    gradient = _asks_gradient(x, weight, bias, norm[0] if norm else None, onto)
    if choose("linear", x.device, x.dtype, gradient).name == "triton":
        from infinitevl.ops.triton.linear import linear as run
    else:
        run = reference.linear
    return run(x=x, weight=weight, bias=bias, norm=norm, gated=gated, onto=onto)


def mlp_fp8(*, x: Tensor, norm: tuple[Tensor, float], up: fp8.Linear, down: fp8.Linear) -> Tensor:
    """A whole MLP by quantised weights, as a residual; see `fp8.mlp`. x is consumed."""
    return _fp8(x).mlp(x=x, norm=norm, up=up, down=down)


def _fp8(x: Tensor) -> Any:
    """Where products by quantised weights come from. They are asked for where no gradient is (`layers.Joint.holds`)."""
    if choose("linear_fp8", x.device, x.dtype).name == "triton":
        from infinitevl.ops.triton import fp8 as module

        return module
    return fp8


def angles(*, positions: Tensor, frequency: Tensor, sections: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Cosine and sine of multimodal RoPE; see `reference.angles`."""
    run = _where(positions).angles
    return run(positions=positions, frequency=frequency, sections=sections)


def place(*, positions: Tensor, seen: Tensor, clock: Tensor, held: Tensor, sinks: int, count: Tensor | None) -> Placed:
    """Indices and slots of a chunk; see `reference.place`."""
    return _where(positions).place(positions=positions, seen=seen, clock=clock, held=held, sinks=sinks, count=count)


def _where(positions: Tensor) -> Any:
    """Where `angles` and `place` come from."""
    if choose("place", positions.device, torch.int64).name == "triton":
        from infinitevl.ops.triton import place as module

        return module
    return reference


def attend_patches(*, qkv: Tensor, cos: Tensor, sin: Tensor, windows: Windows | None, width: int) -> Tensor:
    """Rotary attention of patches within their windows or their frame; see `reference.attend_patches`."""
    if choose("attend_patches", qkv.device, qkv.dtype, _asks_gradient(qkv)).name == "triton":
        from infinitevl.ops.triton.vision import attend_patches as run
    else:
        run = reference.attend_patches
    return run(qkv=qkv, cos=cos, sin=sin, windows=windows, width=width)


def attend(
    *, q: Tensor, k: Tensor, v: Tensor, where: Where, state: Window | None, window: int | None, sinks: int
) -> tuple[Tensor, Window | None]:
    """Rotary softmax attention over ring ++ chunk, then the chunk into the ring; see `reference.attend_window`."""
    gradient, masked = _asks_gradient(q, k, v, *(state or ())), where.present is not None or sinks > 0
    name = choose("attend", q.device, q.dtype, gradient, where.segment is not None, masked=masked).name
    run: Callable[..., tuple[Tensor, Window | None]] = flash.attend if name == "flash" else reference.attend_window
    if name == "triton":
        from infinitevl.ops.triton.attention import attend as run
    return run(q=q, k=k, v=v, where=where, state=state, window=window, sinks=sinks)


def gated_delta(*, projected: Projected, weights: DeltaWeights, where: Where, state: Delta) -> tuple[Tensor, Delta]:
    """Convolution, gates, the gated delta rule and the gated norm; see `reference.gated_delta`."""
    q = projected.q
    tensors = (*projected, *weights[:-1], *state)
    gradient, channels = _asks_gradient(*tensors), min(state.state.shape[2:])
    name = choose("gated_delta", q.device, q.dtype, gradient, where.segment is not None, channels).name
    if name == "triton":
        from infinitevl.ops.triton.delta import delta_mixer

        return delta_mixer(projected=projected, weights=weights, where=where, state=state)
    if name == "scan":
        return scan.gated_delta(projected=projected, weights=weights, where=where, state=state)
    return reference.gated_delta(projected=projected, weights=weights, where=where, state=state, rule=rule(name))


def rule(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The delta rule alone as an implementation of `gated_delta` computes it; see `reference.delta_rule_recurrent`."""
    if name == "fla":
        from infinitevl.ops import fla

        return fla.delta_rule
    rules = {"reference": reference.delta_rule, "recurrent": reference.delta_rule_recurrent, "scan": scan.delta_rule}
    return rules[name]
