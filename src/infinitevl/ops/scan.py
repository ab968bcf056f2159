"""A delta mixer where it trains: chunks of 64 tokens side by side in plain torch, their sequence in ops of their own.

`conv`, `inverse`, `scan` and their backwards are one node each to autograd, torch.compile and checkpointing. They are
defined here in plain torch; on CUDA the kernels of `ops.triton.scan` run. All around them are products and pointwise
math, of which torch.compile makes few kernels. Letters: B rows, H heads, N chunks of C = 64 tokens, key channels K,
value channels V; in the convolution T tokens of C channels.

Kept for the backward, the state before each chunk first of all: at the 4B shape in bfloat16, compiled, 0.9 GB a layer
for 8,192 tokens, 3.8 GB for 32,768. Checkpointing keeps that of one layer at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infinitevl.memory import Delta
from infinitevl.ops import reference
from infinitevl.ops.reference import CHUNK, _chunks, _reach
from infinitevl.ops.where import DeltaWeights, Projected, Where


def gated_delta(*, projected: Projected, weights: DeltaWeights, where: Where, state: Delta) -> tuple[Tensor, Delta]:
    """The contract of `reference.gated_delta`, differentiable in all that is asked for."""
    if where.present is not None:
        return reference.gated_delta(projected=projected, weights=weights, where=where, state=state, rule=delta_rule)
    parts, before, length = projected[:3], state.tail.shape[1], projected.q.shape[1]
    tails = state.tail.split([x.shape[-1] for x in parts], dim=-1)
    given = zip(parts, weights[:3], tails, strict=True)
    convolved = [conv(x, weight, tail, where.segment) for x, weight, tail in given]
    latest = torch.cat([x[:, max(0, length - before) :] for x in parts], dim=-1)
    tail = torch.cat([state.tail, latest], dim=1)[:, latest.shape[1] :]
    out, after = reference.mixed(convolved, projected, weights, where, state.state, delta_rule)
    return out, Delta(tail, after)


def delta_rule(
    *, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, segment: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The contract of `reference.delta_rule` (its docstring has the algebra), differentiable in all but `segment`.

    Operands of products are rounded to v's dtype; gates, decay and the state that is carried stay in the state's.
    """
    dtype, (rows, length) = v.dtype, v.shape[:2]
    within, inward, outward, through = _reach(segment, (rows, length), CHUNK, q.device)
    q, k, v = (_chunks(x.to(dtype), CHUNK).contiguous() for x in (q, k, v))
    g, beta = (_chunks(x.to(state.dtype), CHUNK) for x in (g, beta))
    total = g.cumsum(-1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~within, float("-inf")).exp()
    from_start = total.exp() * inward
    to_end = (total[..., -1:] - total).exp() * outward
    solved = inverse((beta[..., None] * (k @ k.mT) * decay).tril(-1), dtype)
    W = (solved * (beta * from_start)[..., None, :]).to(dtype) @ k
    U = (solved * beta[..., None, :]).to(dtype) @ v
    k_end = (k * to_end[..., None]).to(dtype)
    kept = total[..., -1].exp() * through
    u, before, state = scan(W, U, k_end, kept, state)
    own, past = ((q @ k.mT) * decay).to(dtype) @ u, (q * from_start[..., None]).to(dtype)
    o = torch.baddbmm(own.flatten(0, 2), past.flatten(0, 2), before.flatten(0, 2)).view_as(own)  # its sum: a pass less
    return o.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length], state


# -- the inverse inside a chunk ---------------------------------------------------------------------------------------


@torch.library.custom_op(
    "infinitevl::delta_inverse", mutates_args=(), schema="(Tensor system, ScalarType dtype) -> Tensor"
)
def inverse(system: Tensor, dtype: torch.dtype) -> Tensor:
    """(I + A)^-1, in `dtype`, of strictly lower triangular A [..., C, C]."""
    unit = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device).expand_as(system)
    X = torch.linalg.solve_triangular(system + unit, unit, upper=False, unitriangular=True)
    return X.to(dtype).contiguous()


@inverse.register_kernel("cuda")
def _(system: Tensor, dtype: torch.dtype) -> Tensor:
    from infinitevl.ops.triton import scan as kernels

    return kernels.inverse(system, dtype)


@inverse.register_fake
def _(system: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(system.shape, dtype=dtype, device=system.device)


def _inverse_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.wide = inputs[0].dtype
    ctx.save_for_backward(output)


def _inverse_backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
    """d(X) = -X d(A) X. What this gives above the diagonal, the caller's mask drops."""
    (X,) = ctx.saved_tensors
    return -(X.mT @ slope @ X.mT).to(ctx.wide), None


inverse.register_autograd(_inverse_backward, setup_context=_inverse_setup)


# -- the state from chunk to chunk ------------------------------------------------------------------------------------


@torch.library.custom_op(
    "infinitevl::delta_scan",
    mutates_args=(),
    schema="(Tensor W, Tensor U, Tensor k_end, Tensor kept, Tensor state) -> (Tensor, Tensor, Tensor)",
)
def scan(W: Tensor, U: Tensor, k_end: Tensor, kept: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The state S through all chunks: u = U - W S, then S <- kept S + k_end^T u.

    W, k_end [B, H, N, C, K], U [B, H, N, C, V] in the dtype of products; kept [B, H, N], state [B, H, K, V] in that of
    the state -> u as U, S before each chunk as products take it [B, H, N, K, V], and the state after the last.
    """
    us, before = [], []
    for n in range(W.shape[2]):
        before.append(state.to(U.dtype))
        us.append((U[:, :, n].to(state.dtype) - _product(W[:, :, n], before[-1], state)).to(U.dtype))
        state = kept[:, :, n, None, None] * state + _product(k_end[:, :, n].mT, us[-1], state)
    return torch.stack(us, dim=2), torch.stack(before, dim=2), state


@torch.library.custom_op(
    "infinitevl::delta_scan_backward",
    mutates_args=(),
    schema="(Tensor W, Tensor k_end, Tensor kept, Tensor du, Tensor dbefore, Tensor dafter)"
    " -> (Tensor, Tensor, Tensor)",
)
def scan_backward(
    W: Tensor, k_end: Tensor, kept: Tensor, du: Tensor, dbefore: Tensor, dafter: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same walk in reverse, D the gradient of the state: dU = du + k_end D, then D <- kept D + dbefore - W^T dU.

    du, dbefore, dafter: gradients of what `scan` returned -> dU; D after each chunk, [B, H, N, K, V] as products take
    it; the gradient of the first state.
    """
    dUs, slopes, slope = [], [], dafter
    for n in reversed(range(W.shape[2])):
        slopes.append(slope.to(W.dtype))
        dUs.append((du[:, :, n].to(slope.dtype) + _product(k_end[:, :, n], slopes[-1], slope)).to(W.dtype))
        slope = kept[:, :, n, None, None] * slope + dbefore[:, :, n] - _product(W[:, :, n].mT, dUs[-1], slope)
    return torch.stack(dUs[::-1], dim=2), torch.stack(slopes[::-1], dim=2), slope


def _product(a: Tensor, b: Tensor, wide: Tensor) -> Tensor:
    """a @ b of rounded operands, summed in the dtype of `wide`."""
    return a.to(wide.dtype) @ b.to(wide.dtype)


@scan.register_kernel("cuda")
def _(W: Tensor, U: Tensor, k_end: Tensor, kept: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from infinitevl.ops.triton import scan as kernels

    return kernels.scan(W, U, k_end, kept, state)


@scan_backward.register_kernel("cuda")
def _(
    W: Tensor, k_end: Tensor, kept: Tensor, du: Tensor, dbefore: Tensor, dafter: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from infinitevl.ops.triton import scan as kernels

    return kernels.scan_backward(W, k_end, kept, du, dbefore, dafter)


@scan.register_fake
def _(W: Tensor, U: Tensor, k_end: Tensor, kept: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return U.new_empty(U.shape), U.new_empty(*kept.shape, *state.shape[2:]), state.new_empty(state.shape)


@scan_backward.register_fake
def _(
    W: Tensor, k_end: Tensor, kept: Tensor, du: Tensor, dbefore: Tensor, dafter: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return W.new_empty(du.shape), W.new_empty(dbefore.shape), dafter.new_empty(dafter.shape)


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    W, _, k_end, kept, _ = inputs
    ctx.save_for_backward(W, k_end, kept, *output[:2])


def _scan_backward(ctx: Any, du: Tensor, dbefore: Tensor, dafter: Tensor) -> tuple[Tensor, ...]:
    W, k_end, kept, u, before = ctx.saved_tensors
    dU, slopes, dstate = scan_backward(W, k_end, kept, du, dbefore, dafter)
    dkept = (before.to(kept.dtype) * slopes).sum((-2, -1))
    return -(dU @ before.mT), dU, u @ slopes.mT, dkept, dstate


scan.register_autograd(_scan_backward, setup_context=_scan_setup)


# -- the convolution --------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "infinitevl::delta_conv",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor tail, Tensor? segment) -> Tensor",
)
def conv(x: Tensor, weight: Tensor, tail: Tensor, segment: Tensor | None) -> Tensor:
    """The output of `reference.causal_conv` where all tokens are there: an op, since its backward would go over
    float32 copies of all channels for every tap."""
    return reference.causal_conv(x=x, weight=weight, tail=tail, present=None, segment=segment)[0]


@torch.library.custom_op(
    "infinitevl::delta_conv_backward",
    mutates_args=(),
    schema="(Tensor slope, Tensor x, Tensor weight, Tensor tail, Tensor? segment) -> (Tensor, Tensor, Tensor)",
)
def conv_backward(
    slope: Tensor, x: Tensor, weight: Tensor, tail: Tensor, segment: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight (float32) and tail; slope that of the output."""
    length, taps = x.shape[1], weight.shape[1]
    line, wide = torch.cat([tail, x], dim=1).float(), weight.float()
    terms = [_meets(line[:, tap : tap + length], segment, taps - 1 - tap) for tap in range(taps)]
    y = torch.stack([term * wide[:, tap] for tap, term in enumerate(terms)]).sum(0)
    share = y.sigmoid()
    dy = slope.float() * share * (1 + y * (1 - share))
    dweight = torch.stack([(dy * term).sum((0, 1)) for term in terms], dim=1)
    dline = torch.zeros_like(line)
    for tap in range(taps):
        dline[:, tap : tap + length] += _meets(dy, segment, taps - 1 - tap) * wide[:, tap]
    dtail, dx = (part.clone() for part in dline.to(x.dtype).split([taps - 1, length], dim=1))
    return dx, dweight, dtail


def _meets(x: Tensor, segment: Tensor | None, back: int) -> Tensor:
    """x [B, T, C], 0 at tokens that do not see the one `back` before them; with segments none sees what was before."""
    if segment is None or not back:
        return x
    same = torch.zeros_like(segment, dtype=torch.bool)
    same[:, back:] = segment[:, back:] == segment[:, :-back]
    return x * same[..., None]


@conv.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, tail: Tensor, segment: Tensor | None) -> Tensor:
    from infinitevl.ops.triton import scan as kernels

    return kernels.conv(x, weight, tail, segment)


@conv_backward.register_kernel("cuda")
def _(slope: Tensor, x: Tensor, weight: Tensor, tail: Tensor, segment: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from infinitevl.ops.triton import scan as kernels

    return kernels.conv_backward(slope, x, weight, tail, segment)


@conv.register_fake
def _(x: Tensor, weight: Tensor, tail: Tensor, segment: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@conv_backward.register_fake
def _(slope: Tensor, x: Tensor, weight: Tensor, tail: Tensor, segment: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=torch.float32), x.new_empty(tail.shape)


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _conv_backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, tail, segment = ctx.saved_tensors
    dx, dweight, dtail = conv_backward(slope, x, weight, tail, segment)
    return dx, dweight.to(weight.dtype), dtail.to(tail.dtype), None


conv.register_autograd(_conv_backward, setup_context=_conv_setup)
