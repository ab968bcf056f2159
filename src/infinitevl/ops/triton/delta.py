"""A delta mixer between its projections and its output projection, in Triton: convolution, gates, delta rule, norm.

A chunk takes three launches: `_convolve`; `_prepare` does, for all runs of 64 tokens at once, what does not need the
state; `_scan` carries the state through the runs. A single token takes two: `_token`, `_token_end`. Tail and state
are updated in place.

The *rank* of a token is its place among those that are there: the token of rank j is `order[j]`, or j without `order`.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from infinitevl.memory import Delta
from infinitevl.ops.triton.launch import early
from infinitevl.ops.where import DeltaWeights, Projected, Where

CHUNK = tl.constexpr(64)  # tokens solved at once
TAPS = tl.constexpr(4)  # of the convolution; the last one is the token's own
L2_EPS = tl.constexpr(1e-6)


@triton.jit
def _at(x, tail, order, rank, there, step, C):
    """Pointers to the convolution's inputs at ranks [N] from -3 on; those below 0 are in the tail."""
    token = rank
    if order is not None:
        token = tl.load(order + rank, mask=(rank >= 0) & (rank < there), other=0)
    return tl.where(rank < 0, tail + (rank + (TAPS - 1)) * C, x + token.to(tl.int64) * step)


@triton.jit
def _conv(
    x,
    weight,
    tail,
    order,
    rank,
    there,
    step,
    tap_step,
    channel_step,
    C,
    D: tl.constexpr,
):
    """Convolution and SiLU of D channels at ranks [N] -> [N, D] in x's dtype; 0 from rank `there` on.

    Chunk and tail are two loads and not one through chosen pointers: of those the compiler knows no alignment, and
    reads them two bytes at a time.

    The zeros make the output there 0. They also end the reach of the products' layouts: without them triton 3.6 keeps
    several copies of y, and `_prepare` spills 600 bytes and more.
    """
    column = tl.arange(0, D)
    y = tl.zeros([rank.shape[0], D], tl.float32)
    for tap in tl.static_range(TAPS):
        back = rank + (tap - (TAPS - 1))
        inside = (back >= 0) & (back < there)
        token = back
        if order is not None:
            token = tl.load(order + back, mask=inside, other=0)
        here = x + token.to(tl.int64)[:, None] * step + column[None, :]
        value = tl.load(here, mask=inside[:, None], other=0.0).to(tl.float32)
        before = tail + (back + (TAPS - 1))[:, None] * C + column[None, :]
        value += tl.load(before, mask=(back < 0)[:, None], other=0.0).to(tl.float32)
        y += value * tl.load(weight + column * channel_step + tap * tap_step).to(tl.float32)[None, :]
    y = y / (1 + tl.exp(-y))
    return tl.where((rank < there)[:, None], y, 0.0).to(x.dtype.element_ty)


@triton.jit
def _convolve(
    q,
    k,
    v,
    q_conv,
    k_conv,
    v_conv,
    tail,
    order,
    count,
    mixed,
    length,
    q_step,
    k_step,
    v_step,
    tap_step,
    channel_step,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """Convolution and SiLU of BLOCK_C channels of q, k or v at BLOCK_T ranks, side by side into `mixed`."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    start, row = tl.program_id(1) * BLOCK_C, tl.program_id(2).to(tl.int64)
    C: tl.constexpr = 2 * KEYS + VALUES
    there = length
    if count is not None:
        there = tl.load(count + row).to(tl.int32)
    if order is not None:
        order += row * length
    rank, token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), row * length
    tail += row * (TAPS - 1) * C + start
    if start < KEYS:
        x, weight, step = q + token * q_step + start, q_conv + start * channel_step, q_step
    elif start < 2 * KEYS:
        x, weight, step = k + token * k_step + start - KEYS, k_conv + (start - KEYS) * channel_step, k_step
    else:
        x, weight = v + token * v_step + start - 2 * KEYS, v_conv + (start - 2 * KEYS) * channel_step
        step = v_step
    y = _conv(x, weight, tail, order, rank, there, step, tap_step, channel_step, C, BLOCK_C)
    to = mixed + (token + rank)[:, None] * C + start + tl.arange(0, BLOCK_C)[None, :]
    tl.store(to, y, mask=(rank < length)[:, None])


@triton.jit
def _gates(a, b, A_log, dt_bias):
    """Log decay -exp(A_log) softplus(a + dt_bias) and write strength sigmoid(b), float32.

    log(1 + y) is 2 artanh(y / (2 + y)) by its series, to 1e-8 of itself: the GPU's own logarithm is good to 2e-7 in
    all, which for a half-life of 10,000 tokens (y = 7e-5) is 0.3 % of the decay.
    """
    x = a.to(tl.float32) + dt_bias
    y = tl.exp(-tl.abs(x))
    s = y / (2 + y)
    series = tl.zeros_like(s)
    for n in tl.static_range(8):
        series = series * s * s + 1.0 / (15 - 2 * n)
    softplus = tl.maximum(x, 0.0) + 2 * s * series
    return -tl.exp(A_log) * softplus, 1 / (1 + tl.exp(-b.to(tl.float32)))


@triton.jit
def _dot(A, B, PRECISION: tl.constexpr):
    """A product in float32. "half": 16-bit operands as they are, float32 ones as float16."""
    if PRECISION != "half":
        product = tl.dot(A, B, input_precision=PRECISION)
    elif A.dtype == tl.float32:
        product = tl.dot(A.to(tl.float16), B.to(tl.float16))
    else:
        product = tl.dot(A, B)
    return product


@triton.jit
def _wider(X, B, PRECISION: tl.constexpr):
    """(I + X B)^-1 X where four powers of M = X B vanish: (I + M^2) (X - M X)."""
    M = _dot(X, B, PRECISION)
    Y = X - _dot(M, X, PRECISION)
    return Y + _dot(_dot(M, M, PRECISION), Y, PRECISION)


@triton.jit
def _inverse(A, PRECISION: tl.constexpr):
    """(I + A)^-1 of a strictly lower triangular A [64, 64]: of its blocks of 4 tokens, of 16, then of all 64.

    Blocked substitution as products. Powers of A alone would do on paper, but where keys repeat, A's entries are near
    1, those of its powers near 10^17, and nothing is left of their difference. Here no entry exceeds a few units, so
    float16 has room for them, and its 11 bits are more than the 8 to which the result is rounded in the end.
    """
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    B = tl.where(i // 4 == j // 4, A, 0.0)
    X = tl.where(i == j, 1.0, 0.0) - B
    X += _dot(_dot(B, B, PRECISION), X, PRECISION)
    X = _wider(X, tl.where((i // 16 == j // 16) & (i // 4 != j // 4), A, 0.0), PRECISION)
    return _wider(X, tl.where(i // 16 == j // 16, 0.0, A), PRECISION)


@triton.jit
def _prepare(
    mixed,
    a,
    b,
    A_log,
    dt_bias,
    order,
    count,
    solved,
    kept,
    length,
    a_step,
    b_step,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """What the scan needs of 64 tokens of one head, as columns q~ K | k~ K | W K | q.k 64 | U V of `solved`.

    Norms and gates are float32 factors of the 64 x 64 products, so that q, k and v enter them unrounded. PARTS
    programs share the values and one piece each of the rest.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    head, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    run, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    C, R = H * (2 * K + V), 3 * K + CHUNK + V
    there = length
    if count is not None:
        there = tl.load(count + row).to(tl.int32)
    if run * CHUNK >= there:
        return
    if order is not None:
        order += row * length
    i, key = tl.arange(0, CHUNK), tl.arange(0, K)
    rank = run * CHUNK + i
    token = row * length

    at = _at(a + token * a_step + head, a, order, rank, there, a_step, 0)
    bt = _at(b + token * b_step + head, b, order, rank, there, b_step, 0)
    a_here, b_here = tl.load(at, mask=rank < there, other=0.0), tl.load(bt, mask=rank < there, other=0.0)
    lines = mixed + (token + rank)[:, None] * C + head * K + key[None, :]
    k_here = tl.load(lines + H * K, mask=(rank < there)[:, None], other=0.0)
    g, beta = _gates(a_here, b_here, tl.load(A_log + head), tl.load(dt_bias + head))
    g, beta = tl.where(rank < there, g, 0.0), tl.where(rank < there, beta, 0.0)
    total = tl.cumsum(g.to(tl.float64))  # in float32, sums near -10,000 would leave their differences 3 digits
    apart = (total[:, None] - total[None, :]).to(tl.float32)
    decay = tl.exp(tl.where(i[:, None] >= i[None, :], apart, float("-inf")))
    from_start, to_end = tl.exp(total.to(tl.float32)), tl.exp((tl.sum(g.to(tl.float64)) - total).to(tl.float32))
    wide = k_here.to(tl.float32)
    k_scale = tl.rsqrt(tl.sum(wide * wide, 1) + L2_EPS)
    solved += (((row * tl.num_programs(1) + run) * H + head) * CHUNK + i)[:, None] * R
    if part == PARTS - 1:
        tl.store(solved + K + key[None, :], wide * (k_scale * to_end)[:, None])
        tl.store(kept + (row * tl.num_programs(1) + run) * H + head, tl.exp(tl.sum(g)))
    if part == 0:
        q_here = tl.load(lines, mask=(rank < there)[:, None], other=0.0)
        wide_q = q_here.to(tl.float32)
        q_scale = tl.rsqrt(tl.sum(wide_q * wide_q, 1) + L2_EPS) * (K**-0.5)
        tl.store(solved + key[None, :], wide_q * (q_scale * from_start)[:, None])
        products = _dot(q_here, tl.trans(k_here), PRECISION)
        tl.store(solved + 3 * K + i[None, :], products * q_scale[:, None] * k_scale[None, :] * decay)
    A = _dot(k_here, tl.trans(k_here), PRECISION)
    A *= (beta * k_scale)[:, None] * k_scale[None, :] * decay
    X = _inverse(tl.where(i[:, None] > i[None, :], A, 0.0), PRECISION)
    if part == PARTS - 1:
        W = (X * (beta * k_scale * from_start)[None, :]).to(k_here.dtype)
        tl.store(solved + 2 * K + key[None, :], _dot(W, k_here, PRECISION))
    X = (X * beta[None, :]).to(mixed.dtype.element_ty)
    for block in tl.static_range(V // PARTS // BLOCK_V):
        at_v = part * (V // PARTS) + block * BLOCK_V
        value = at_v + tl.arange(0, BLOCK_V)
        v_lines = mixed + (token + rank)[:, None] * C + 2 * H * K + head * V + value[None, :]
        v_here = tl.load(v_lines, mask=(rank < there)[:, None], other=0.0)
        U = _dot(X, v_here, PRECISION)
        tl.store(solved + 3 * K + CHUNK + value[None, :], U)


@triton.jit
def _shift(x, tail, order, there, step, C, D: tl.constexpr):
    """The tail of D channels after the chunk: its last 3 inputs that are there, from the old tail where these end."""
    line, column = tl.arange(0, TAPS), tl.arange(0, D)[None, :]
    mask = (line < TAPS - 1)[:, None]
    inputs = tl.load(_at(x, tail, order, line + (there - 3), there, step, C)[:, None] + column, mask=mask)
    tl.debug_barrier()  # all of the old tail is read before any of it is overwritten
    tl.store(tail + (line * C)[:, None] + column, inputs, mask=mask)


@triton.jit
def _scan(
    q,
    k,
    v,
    tail,
    state,
    order,
    count,
    solved,
    kept,
    out,
    length,
    q_step,
    k_step,
    v_step,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One head's state S [K, BLOCK_V] through all runs of 64 tokens.

    u = U - W S; o = q~ S + (q.k) u; S <- kept S + k~^T u. The state stays float32 in registers and is rounded only as
    an operand.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    C, R = H * (2 * K + V), 3 * K + CHUNK + V
    runs = tl.cdiv(length, CHUNK)
    there = length
    if count is not None:
        there = tl.load(count + row).to(tl.int32)
    if order is not None:
        order += row * length
    i, key, value = tl.arange(0, CHUNK), tl.arange(0, K), tl.arange(0, BLOCK_V)
    token, channel = row * length, head * V + block * BLOCK_V
    dtype = out.dtype.element_ty
    out += token * (H * V) + channel
    state += (row * H + head) * (K * V) + block * BLOCK_V + key[:, None] * V + value[None, :]
    S = tl.load(state)
    for run in range(tl.cdiv(there, CHUNK)):
        unit = (row * runs + run) * H + head
        keep = tl.load(kept + unit)  # early: its way is as long as the first product
        here = solved + unit * (CHUNK * R)
        lines = here + i[:, None] * R
        S_here = S.to(dtype)
        W = tl.load(lines + 2 * K + key[None, :])
        u = tl.load(lines + 3 * K + CHUNK + block * BLOCK_V + value[None, :]).to(tl.float32)
        u = (u - _dot(W, S_here, PRECISION)).to(dtype)
        o = _dot(tl.load(lines + key[None, :]), S_here, PRECISION)
        o += _dot(tl.load(lines + 3 * K + i[None, :]), u, PRECISION)
        k_end = tl.load(here + K + key[:, None] + i[None, :] * R)  # read as [K, 64]
        S = S * keep + _dot(k_end, u, PRECISION)
        rank = i + run * CHUNK
        at = _at(out, out, order, rank, length, H * V, 0)
        tl.store(at[:, None] + value[None, :], o.to(dtype), mask=(rank < length)[:, None])
    if count is not None:
        for run in range(tl.cdiv(there, CHUNK), runs):
            rank = i + run * CHUNK
            at = _at(out, out, order, rank, length, H * V, 0)
            tl.store(at[:, None] + value[None, :], tl.zeros([CHUNK, BLOCK_V], dtype), mask=(rank < length)[:, None])
    tl.store(state, S)
    tail += row * (TAPS - 1) * C
    _shift(v + token * v_step + channel, tail + 2 * H * K + channel, order, there, v_step, C, BLOCK_V)
    if block == 0:
        _shift(q + token * q_step + head * K, tail + head * K, order, there, q_step, C, K)
        _shift(k + token * k_step + head * K, tail + (H + head) * K, order, there, k_step, C, K)


@triton.jit
def _step(x, weight, tail, tap_step, channel_step, C, D: tl.constexpr):
    """Convolution and SiLU of D channels of one token -> [D], as x's dtype rounds it, in float32."""
    column = tl.arange(0, D)
    weight += column * channel_step
    y = tl.load(x + column).to(tl.float32) * tl.load(weight + (TAPS - 1) * tap_step).to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        y += tl.load(tail + tap * C + column).to(tl.float32) * tl.load(weight + tap * tap_step).to(tl.float32)
    return (y / (1 + tl.exp(-y))).to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def _move(x, tail, C, D: tl.constexpr):
    """The tail of D channels one token on."""
    column = tl.arange(0, D)
    first, second, third = tl.load(tail + C + column), tl.load(tail + 2 * C + column), tl.load(x + column)
    tl.debug_barrier()  # all of the old tail is read before any of it is overwritten
    tl.store(tail + column, first)
    tl.store(tail + C + column, second)
    tl.store(tail + 2 * C + column, third)


@triton.jit
def _normed(x, gate, weight, eps: float, axis: tl.constexpr):
    """RMS norm along `axis`, times weight times silu(gate), all float32."""
    size: tl.constexpr = x.shape[axis]
    x *= tl.expand_dims(tl.rsqrt(tl.sum(x * x, axis) / size + eps), axis)
    return x * weight * gate / (1 + tl.exp(-gate))


@triton.jit
def _token(
    q,
    k,
    v,
    a,
    b,
    q_conv,
    k_conv,
    v_conv,
    A_log,
    dt_bias,
    tail,
    state,
    count,
    out,
    q_step,
    k_step,
    v_step,
    a_step,
    b_step,
    tap_step,
    channel_step,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One token through BLOCK_V columns of one head's state. S^T k and S^T q are read in one pass."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    C = H * (2 * K + V)
    key, channel = tl.arange(0, K), head * V + block * BLOCK_V
    value = tl.arange(0, BLOCK_V)
    out += row * (H * V) + channel + value
    if count is not None:
        if tl.load(count + row) == 0:
            tl.store(out, tl.zeros([BLOCK_V], out.dtype.element_ty))
            return
    state += (row * H + head) * (K * V) + block * BLOCK_V + key[:, None] * V + value[None, :]
    S = tl.load(state)
    tail += row * (TAPS - 1) * C
    line = head * K
    q_here = _step(q + row * q_step + line, q_conv + line * channel_step, tail + line, tap_step, channel_step, C, K)
    k_here = _step(
        k + row * k_step + line, k_conv + line * channel_step, tail + H * K + line, tap_step, channel_step, C, K
    )
    v_here = _step(
        v + row * v_step + channel, v_conv + channel * channel_step, tail + 2 * H * K + channel,
        tap_step, channel_step, C, BLOCK_V,
    )  # fmt: skip
    q_here *= tl.rsqrt(tl.sum(q_here * q_here) + L2_EPS) * (K**-0.5)
    k_here *= tl.rsqrt(tl.sum(k_here * k_here) + L2_EPS)
    a_here, b_here = tl.load(a + row * a_step + head), tl.load(b + row * b_step + head)
    g, beta = _gates(a_here, b_here, tl.load(A_log + head), tl.load(dt_bias + head))
    decay = tl.exp(g)
    u = beta * (v_here - decay * tl.sum(S * k_here[:, None], 0))
    o = decay * tl.sum(S * q_here[:, None], 0) + tl.sum(q_here * k_here) * u
    tl.store(state, decay * S + k_here[:, None] * u[None, :])
    tl.store(out, o.to(out.dtype.element_ty))


@triton.jit
def _token_end(
    q,
    k,
    v,
    gate,
    norm,
    tail,
    count,
    out,
    eps: float,
    q_step,
    k_step,
    v_step,
    gate_step,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One head's gated norm in place, and its tail one token on: `_token`'s programs share the old one."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    C = H * (2 * K + V)
    if count is not None:
        if tl.load(count + row) == 0:
            return
    value = head * V + tl.arange(0, V)
    o = tl.load(out + row * (H * V) + value).to(tl.float32)
    gate_here = tl.load(gate + row * gate_step + value).to(tl.float32)
    weight = tl.load(norm + tl.arange(0, V)).to(tl.float32)
    tail += row * (TAPS - 1) * C
    _move(q + row * q_step + head * K, tail + head * K, C, K)
    _move(k + row * k_step + head * K, tail + (H + head) * K, C, K)
    _move(v + row * v_step + head * V, tail + 2 * H * K + head * V, C, V)
    tl.store(out + row * (H * V) + value, _normed(o, gate_here, weight, eps, 0).to(out.dtype.element_ty))


@triton.jit
def _norm(
    x,
    gate,
    weight,
    out,
    eps: float,
    lines,
    x_step,
    gate_step,
    H: tl.constexpr,
    V: tl.constexpr,
    LINES: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """The gated norm of LINES heads."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    value = tl.arange(0, V)[None, :]
    inside = (line < lines)[:, None]
    at_x, at_gate = line // H * x_step + line % H * V, line // H * gate_step + line % H * V
    x_here = tl.load(x + at_x[:, None] + value, mask=inside, other=0.0).to(tl.float32)
    gate_here = tl.load(gate + at_gate[:, None] + value, mask=inside, other=0.0).to(tl.float32)
    normed = _normed(x_here, gate_here, tl.load(weight + value).to(tl.float32), eps, 1)
    tl.store(out + line[:, None] * V + value, normed.to(out.dtype.element_ty), mask=inside)


class Plan(NamedTuple):
    """How `gated_delta` is cut up and launched; any plan computes the same.

    parts: programs that share one run of 64 tokens of a head. block_v: columns of the state that a scan program
    carries. stages: runs of 64 tokens on their way to it. precision: of products of float32 operands. block_t: tokens
    of a convolution program.
    """

    parts: int
    prepare_warps: int
    block_v: int
    scan_warps: int
    stages: int
    precision: str
    block_t: int


def plan(rows: int, length: int, heads: int, value_dim: int, dtype: torch.dtype) -> Plan:
    """Little work is spread over the GPU's 132 multiprocessors, much of it repeats as little as it can.

    float32 tensors (tests, mostly) take products of three tf32 halves, and one stage, for shared memory.
    """
    parts = 2 if rows * heads * -(-length // CHUNK.value) <= 66 and value_dim >= 32 else 1
    block_v = min(value_dim, 64 if rows > 1 else 32)
    if dtype == torch.float32:
        return Plan(parts, 8, block_v, 4, 1, "tf32x3", 16)
    return Plan(parts, 8 if parts == 2 else 4, block_v, 4, 3, "half", 16)


def gated_delta(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    q_conv: Tensor,
    k_conv: Tensor,
    v_conv: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    tail: Tensor,
    state: Tensor,
    order: Tensor | None,
    count: Tensor | None,
) -> Tensor:
    """Short convolution, gates and gated delta rule of a chunk -> o [B, T, H, V], in v's dtype.

    q, k [B, T, H * K], v [B, T, H * V], a, b [B, T, H]: projections, last dimension contiguous; K and V powers of 2,
    32 or more. *_conv [C, 4]. A_log, dt_bias float32 [H]. tail [B, 3, H * (2 K + V)] and state float32 [B, H, K, V],
    contiguous, are updated in place. order int64 [B, T]: the tokens that are there, in time, then the others; count
    int [B]: how many are there. None: all are. The output of a token that is not there is 0.
    """
    rows, length, heads = a.shape
    weights = (q_conv, k_conv, v_conv, A_log, dt_bias)
    given = plan(rows, length, heads, state.shape[-1], v.dtype)
    return _gated_delta((q, k, v, a, b), weights, tail, state, order, count, given)


def _gated_delta(
    projected: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    tail: Tensor,
    state: Tensor,
    order: Tensor | None,
    count: Tensor | None,
    given: Plan,
) -> Tensor:
    rows, length, heads = projected[-1].shape
    keys, values = state.shape[2:]
    assert tail.is_contiguous() and state.is_contiguous() and all(x.stride(-1) == 1 for x in projected)
    q, k, v, a, b = flat = [x.flatten(0, 1) for x in projected]
    runs = -(-length // CHUNK.value)
    solved = torch.empty(
        rows, runs, heads, CHUNK.value, 3 * keys + CHUNK.value + values, dtype=v.dtype, device=v.device
    )
    kept = torch.empty(rows, runs, heads, dtype=torch.float32, device=v.device)
    out = torch.empty(rows, length, heads, values, dtype=v.dtype, device=v.device)
    sizes = {"H": heads, "K": keys, "V": values, "PRECISION": given.precision}
    mixed = torch.empty(rows, length, tail.shape[-1], dtype=v.dtype, device=v.device)
    block_c = math.gcd(128, heads * keys, heads * values)
    _convolve[(triton.cdiv(length, given.block_t), tail.shape[-1] // block_c, rows)](
        q, k, v, *weights[:3], tail, order, count, mixed, length, *(x.stride(0) for x in flat[:3]), *_taps(weights),
        KEYS=heads * keys, VALUES=heads * values, BLOCK_T=given.block_t, BLOCK_C=block_c, num_warps=4, **early(v),
    )  # fmt: skip
    _prepare[(heads * given.parts, runs, rows)](
        mixed, a, b, *weights[3:], order, count, solved, kept, length, a.stride(0), b.stride(0),
        **sizes, BLOCK_V=min(128, values // given.parts), PARTS=given.parts, num_warps=given.prepare_warps, **early(v),
    )  # fmt: skip
    _scan[(values // given.block_v, heads, rows)](
        q, k, v, tail, state, order, count, solved, kept, out, length, *(x.stride(0) for x in flat[:3]),
        **sizes, BLOCK_V=given.block_v, num_warps=given.scan_warps, num_stages=given.stages, **early(v),
    )  # fmt: skip
    return out


def delta_token(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gate: Tensor,
    q_conv: Tensor,
    k_conv: Tensor,
    v_conv: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm: Tensor,
    eps: float,
    tail: Tensor,
    state: Tensor,
    count: Tensor | None,
) -> Tensor:
    """`gated_delta` and `gated_norm` of a token a row -> [B, 1, H, V]; gate [B, 1, H, V], norm [V], the rest as there.

    count [B]: 1 where the token is there, 0 where it is not and the row stays as it is. None: all are.
    """
    rows, heads, keys, values = state.shape
    assert q.shape[1] == 1 and tail.is_contiguous() and state.is_contiguous()
    given = [x.flatten(0, 1) for x in (q, k, v, a, b, gate.flatten(2))]
    assert all(x.stride(-1) == 1 for x in given)
    out = torch.empty(rows, 1, heads, values, dtype=gate.dtype, device=v.device)
    weights = (q_conv, k_conv, v_conv, A_log, dt_bias)
    sizes = {"H": heads, "K": keys, "V": values}
    block = min(values, 32 if rows <= 4 else 64)
    _token[(values // block, heads, rows)](
        *given[:5], *weights, tail, state, count, out, *(x.stride(0) for x in given[:5]), *_taps(weights),
        **sizes, BLOCK_V=block, num_warps=4, **early(v),
    )  # fmt: skip
    ended = (*given[:3], given[5])
    _token_end[(heads, rows)](
        *ended, norm, tail, count, out, eps, *(x.stride(0) for x in ended), **sizes, num_warps=4, **early(v)
    )
    return out


def _taps(weights: tuple[Tensor, ...]) -> tuple[int, int]:
    """Steps from tap to tap and from channel to channel, the same in all three convolutions."""
    assert weights[0].stride() == weights[1].stride() == weights[2].stride()
    return weights[0].stride(1), weights[0].stride(0)


def gated_norm(*, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of each head times weight times silu(gate): x, gate [B, T, H, V], weight [V] -> likewise, contiguous."""
    heads, values = x.shape[2:]
    lines, block = x.numel() // values, max(1, 1024 // values)
    flat = [y.flatten(2).flatten(0, 1) for y in (x, gate)]
    assert all(y.stride(-1) == 1 for y in flat)
    out = torch.empty(x.shape, dtype=gate.dtype, device=x.device)
    _norm[(triton.cdiv(lines, block),)](
        *flat,
        weight,
        out,
        eps,
        lines,
        *(y.stride(0) for y in flat),
        H=heads,
        V=values,
        LINES=block,
        num_warps=4,
        **early(x),
    )
    return out


def delta_mixer(*, projected: Projected, weights: DeltaWeights, where: Where, state: Delta) -> tuple[Tensor, Delta]:
    """The contract of `reference.gated_delta`, forward only and without segments: the state is written in place."""
    assert where.segment is None
    if weights.q_conv.shape[1] != TAPS.value:
        taps = weights.q_conv.shape[1]
        raise ValueError(
            f"the delta kernels are for convolutions of {TAPS.value} taps, this model has {taps}: run it under "
            "ops.pinned(gated_delta='reference')"
        )
    q, k, v, gate, a, b = projected
    gate = gate.unflatten(-1, (a.shape[-1], -1))
    *mixing, norm, eps = weights
    named = dict(zip(("q_conv", "k_conv", "v_conv", "A_log", "dt_bias"), mixing, strict=True))
    given = {"q": q, "k": k, "v": v, "a": a, "b": b, **named, "tail": state.tail, "state": state.state}
    if q.shape[1] == 1:
        return delta_token(**given, gate=gate, norm=norm, eps=eps, count=where.count), state
    out = gated_delta(**given, order=where.order, count=where.count)
    return gated_norm(x=out, gate=gate, weight=norm, eps=eps), state
