"""What `ops.scan` leaves to kernels, in Triton: the inverse inside chunks, the state's walk over them and back, and the
convolution.

A walk is bound by the way from one chunk to the next, two products and the state's rounding between them, and not by
memory: what can be done for all chunks at once is left to the products around it. Tiles are read from memory in the
orientation that a product wants.

ptxas 12.8, which triton 3.6 brings, computes the address of a product's operand from a register that nothing wrote
where two operands were given the same place in shared memory. That happens where a walk is no loop of loads under way:
so its number of chunks is never compiled in, and 16 bits take two stages or more (`tests/gpu/sass.py` looks for it).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from infinitevl.ops.triton.delta import CHUNK, _dot, _inverse


@triton.jit
def _invert(system, out, PRECISION: tl.constexpr) -> None:
    """(I + A)^-1 of the A [64, 64] of one chunk of one head."""
    at = tl.program_id(0).to(tl.int64) * (CHUNK * CHUNK)
    at += tl.arange(0, CHUNK)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    X = _inverse(tl.load(system + at), PRECISION)
    tl.store(out + at, X.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["chunks"])
def _walk(
    W,
    U,
    k_end,
    kept,
    state,
    u,
    before,
    after,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One head's S [K, BLOCK_V] through all chunks: float32 in registers, rounded as an operand and as what is kept."""
    column, unit = tl.program_id(0) * BLOCK_V, tl.program_id(1).to(tl.int64)
    i, key, value = tl.arange(0, CHUNK), tl.arange(0, K), column + tl.arange(0, BLOCK_V)
    square = key[:, None] * V + value[None, :]
    S = tl.load(state + unit * (K * V) + square)
    for n in range(chunks):
        at = unit * chunks + n
        keep = tl.load(kept + at)  # early: its way is as long as the first product
        lines = at * (CHUNK * V) + i[:, None] * V + value[None, :]
        W_here = tl.load(W + at * (CHUNK * K) + i[:, None] * K + key[None, :])
        k_here = tl.load(k_end + at * (CHUNK * K) + key[:, None] + i[None, :] * K)  # read as [K, 64]
        U_here = tl.load(U + lines).to(tl.float32)
        S_here = S.to(U.dtype.element_ty)
        u_here = (U_here - _dot(W_here, S_here, PRECISION)).to(U.dtype.element_ty)
        S = S * keep + _dot(k_here, u_here, PRECISION)
        tl.store(before + at * (K * V) + square, S_here)
        tl.store(u + lines, u_here)
    tl.store(after + unit * (K * V) + square, S)


@triton.jit(do_not_specialize=["chunks"])
def _walk_back(
    W,
    k_end,
    kept,
    du,
    dbefore,
    dafter,
    dU,
    slopes,
    dstate,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """The gradient D [K, BLOCK_V] of one head's state from the last chunk to the first."""
    column, unit = tl.program_id(0) * BLOCK_V, tl.program_id(1).to(tl.int64)
    i, key, value = tl.arange(0, CHUNK), tl.arange(0, K), column + tl.arange(0, BLOCK_V)
    square = key[:, None] * V + value[None, :]
    D = tl.load(dafter + unit * (K * V) + square)
    read = tl.load(dbefore + (unit * chunks + chunks - 1) * (K * V) + square)
    for back in range(chunks):
        at = unit * chunks + (chunks - 1 - back)
        keep = tl.load(kept + at)
        lines = at * (CHUNK * V) + i[:, None] * V + value[None, :]
        k_here = tl.load(k_end + at * (CHUNK * K) + i[:, None] * K + key[None, :])
        W_here = tl.load(W + at * (CHUNK * K) + key[:, None] + i[None, :] * K)  # read as [K, 64]
        du_here = tl.load(du + lines).to(tl.float32)
        D_here = D.to(du.dtype.element_ty)
        # minus a product with -D: a sum would have du as the product's first value, and the product wait for it
        dU_here = (du_here - _dot(k_here, (-D).to(du.dtype.element_ty), PRECISION)).to(du.dtype.element_ty)
        D = D * keep + read.to(tl.float32) - _dot(W_here, dU_here, PRECISION)
        read = tl.load(dbefore + tl.maximum(at - 1, 0) * (K * V) + square)  # a chunk ahead: only products' operands are
        tl.store(slopes + at * (K * V) + square, D_here)
        tl.store(dU + lines, dU_here)
    tl.store(dstate + unit * (K * V) + square, D)


@triton.jit
def _sees(segment, t, back: tl.constexpr, length):
    """Whether tokens t [N] see the one `back` before them in their chunk: bool [N]."""
    seen = (t >= back) & (t < length)
    if segment is not None:
        own = tl.load(segment + t, mask=seen, other=0)
        seen = seen & (own == tl.load(segment + t - back, mask=seen, other=0))
    return seen


@triton.jit
def _read(x, tail, segment, t, back: tl.constexpr, length, step, C, column, TAPS: tl.constexpr):
    """What tokens t [N] see `back` before them, [N, D] in float32; with segments nobody sees the tail."""
    seen = _sees(segment, t, back, length)[:, None]
    value = tl.load(x + (t - back).to(tl.int64)[:, None] * step + column, mask=seen, other=0.0).to(tl.float32)
    if segment is None:
        before = (t >= 0) & (t < back)
        held = tl.load(tail + (t - back + (TAPS - 1))[:, None] * C + column, mask=before[:, None], other=0.0)
        value += held.to(tl.float32)
    return value


@triton.jit
def _convolved(x, weight, tail, segment, t, length, step, C, column, TAPS: tl.constexpr):
    """The convolution at tokens t [N] before its SiLU, [N, D]."""
    y = tl.zeros([t.shape[0], column.shape[1]], tl.float32)
    for tap in tl.static_range(TAPS):
        taken = tl.load(weight + column * TAPS + tap).to(tl.float32)
        y += _read(x, tail, segment, t, TAPS - 1 - tap, length, step, C, column, TAPS) * taken
    return y


@triton.jit
def _conv(
    x,
    weight,
    tail,
    segment,
    out,
    length,
    row_step,
    step,
    C,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Convolution and SiLU of BLOCK_C channels at BLOCK_T tokens."""
    row, column = tl.program_id(2).to(tl.int64), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    if segment is not None:
        segment += row * length
    y = _convolved(x + row * row_step, weight, tail + row * (TAPS - 1) * C, segment, t, length, step, C, column, TAPS)
    to = out + (row * length + t)[:, None] * C + column
    tl.store(to, (y / (1 + tl.exp(-y))).to(out.dtype.element_ty), mask=(t < length)[:, None])


@triton.jit
def _conv_back(
    slope,
    x,
    weight,
    tail,
    segment,
    dx,
    dweight,
    dtail,
    length,
    row_step,
    step,
    C,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Gradients at BLOCK_T places of tail ++ chunk, and what they add to the weight's; y is computed again."""
    row, column = tl.program_id(2).to(tl.int64), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    s = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T) - (TAPS - 1)
    x, slope, tail = x + row * row_step, slope + row * length * C, tail + row * (TAPS - 1) * C
    if segment is not None:
        segment += row * length
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    dweight += ((row * tl.num_programs(1) + tl.program_id(1)) * C + column) * TAPS
    for tap in tl.static_range(TAPS):
        t = s + (TAPS - 1 - tap)  # the tokens that see the places s by this tap
        seen = _sees(segment, t, TAPS - 1 - tap, length)
        if segment is None:
            seen = seen | ((s < 0) & (t >= 0) & (t < length))
        y = _convolved(x, weight, tail, segment, t, length, step, C, column, TAPS)
        share = 1 / (1 + tl.exp(-y))
        dy = tl.load(slope + t.to(tl.int64)[:, None] * C + column, mask=seen[:, None], other=0.0).to(tl.float32)
        dy = dy * share * (1 + y * (1 - share))
        total += dy * tl.load(weight + column * TAPS + tap).to(tl.float32)
        held = _read(x, tail, segment, t, TAPS - 1 - tap, length, step, C, column, TAPS)
        tl.store(dweight + tap, tl.sum(dy * held, 0, keep_dims=True))
    total = total.to(dx.dtype.element_ty)
    tl.store(dx + (row * length + s)[:, None] * C + column, total, mask=((s >= 0) & (s < length))[:, None])
    to = dtail + (row * (TAPS - 1) + s + (TAPS - 1))[:, None] * C + column
    tl.store(to, total, mask=(s < 0)[:, None])


class Plan(NamedTuple):
    """How a walk is cut up and launched; any plan computes the same. block_v: columns of the state in a program.
    stages: chunks on their way to it, two or more in 16 bits (see above). precision: of products of float32 operands,
    as `delta._dot` has it."""

    block_v: int
    warps: int
    stages: int
    precision: str


def plan(heads: int, value_dim: int, dtype: torch.dtype) -> Plan:
    """For so many heads, those of all rows: narrow programs while the GPU's 132 multiprocessors hold all at once.

    float32 tensors (tests, mostly) take products of three tf32 halves, and one stage, for shared memory.
    """
    block_v = min(value_dim, 32 if heads * value_dim // 32 <= 132 else 64)
    warps = 4 if block_v <= 32 else 8  # of 4, each would hold more of the state than its registers do
    return Plan(block_v, 4, 1, "tf32x3") if dtype == torch.float32 else Plan(block_v, warps, 3, "half")


def inverse(system: Tensor, dtype: torch.dtype) -> Tensor:
    """See `ops.scan.inverse`: float32 [..., 64, 64]."""
    assert system.shape[-2:] == (CHUNK.value, CHUNK.value) and system.dtype == torch.float32
    system = system.contiguous()
    out = torch.empty(system.shape, dtype=dtype, device=system.device)
    precision = "tf32x3" if dtype == torch.float32 else "half"
    _invert[(system.numel() // CHUNK.value**2,)](system, out, PRECISION=precision, num_warps=4)
    return out


def scan(W: Tensor, U: Tensor, k_end: Tensor, kept: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.scan.scan`: chunks of 64, K and V powers of 2, 32 or more."""
    inputs = [x.contiguous() for x in (W, U, k_end, kept, state)]
    out = torch.empty_like(inputs[1]), _states(U, kept, state), torch.empty_like(inputs[4])
    _launch(_walk, inputs, out, state, U.dtype)
    return out


def scan_backward(
    W: Tensor, k_end: Tensor, kept: Tensor, du: Tensor, dbefore: Tensor, dafter: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.scan.scan_backward`."""
    inputs = [x.contiguous() for x in (W, k_end, kept, du, dbefore, dafter)]
    out = torch.empty_like(inputs[3]), _states(W, kept, dafter), torch.empty_like(inputs[5])
    _launch(_walk_back, inputs, out, dafter, W.dtype)
    return out


def _states(like: Tensor, kept: Tensor, state: Tensor) -> Tensor:
    """Room for a state a chunk, [B, H, N, K, V] in the dtype of `like`."""
    return torch.empty(*kept.shape, *state.shape[2:], dtype=like.dtype, device=like.device)


def _launch(kernel: Any, inputs: list[Tensor], out: tuple[Tensor, ...], state: Tensor, dtype: torch.dtype) -> None:
    rows, heads, keys, values = state.shape
    chunks = out[0].shape[2]
    assert out[0].shape[3] == CHUNK.value and state.dtype == torch.float32
    given = plan(rows * heads, values, dtype)
    kernel[(values // given.block_v, rows * heads)](
        *inputs, *out, chunks, K=keys, V=values, BLOCK_V=given.block_v, PRECISION=given.precision,
        num_warps=given.warps, num_stages=given.stages,
    )  # fmt: skip


def conv(x: Tensor, weight: Tensor, tail: Tensor, segment: Tensor | None) -> Tensor:
    """See `ops.scan.conv`: channels a multiple of 16."""
    x, rest, grid, sizes = _conv_launch(x, weight, tail, segment, x.shape[1], 16, 128)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _conv[grid](x, *rest, out, x.shape[1], x.stride(0), x.stride(1), x.shape[2], **sizes, num_warps=4)
    return out


def conv_backward(
    slope: Tensor, x: Tensor, weight: Tensor, tail: Tensor, segment: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.scan.conv_backward`. Each program writes its own share of the weight's gradient, in float32."""
    rows, length, channels = x.shape
    x, rest, grid, sizes = _conv_launch(x, weight, tail, segment, length + weight.shape[1] - 1, 32, 64)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dtail = torch.empty(tail.shape, dtype=x.dtype, device=x.device)
    shares = torch.empty(rows, grid[1], *weight.shape, dtype=torch.float32, device=x.device)
    _conv_back[grid](
        slope.contiguous(), x, *rest, dx, shares, dtail, length, x.stride(0), x.stride(1), channels, **sizes,
        num_warps=4,
    )  # fmt: skip
    return dx, shares.sum((0, 1)), dtail


def _conv_launch(
    x: Tensor, weight: Tensor, tail: Tensor, segment: Tensor | None, places: int, block_t: int, block_c: int
) -> tuple[Tensor, tuple[Tensor | None, ...], tuple[int, int, int], dict[str, int]]:
    """Inputs as the kernels want them, and the grid of programs over so many places of a row."""
    x = x if x.stride(2) == 1 else x.contiguous()
    rest = weight.contiguous(), tail.contiguous(), None if segment is None else segment.contiguous()
    sizes = {"TAPS": weight.shape[1], "BLOCK_T": block_t, "BLOCK_C": math.gcd(block_c, x.shape[2])}
    return x, rest, (x.shape[2] // sizes["BLOCK_C"], -(-places // block_t), len(x)), sizes
