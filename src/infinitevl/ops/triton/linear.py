"""Products and what stands around them, on CUDA: norms, gates, rotations, and the product of a few rows by itself.

Up to 16 rows a product is a walk over its weight, as fast as memory gives it: one launch with the norm before it and the
gate or the sum after it. Above, cuBLAS multiplies and small kernels do the rest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

FEW = 16  # rows up to which a product is bound by reading its weight; the smallest side of a tensor-core tile


def rms_norm(*, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`: x [..., D] contiguous."""
    x = x.contiguous()
    size = x.shape[-1]
    out = torch.empty_like(x)
    block = triton.next_power_of_2(size)
    _rms_norm[(x.numel() // size,)](x, weight, out, size, eps, BLOCK=block, num_warps=4 if block <= 2048 else 8)
    return out


@triton.jit
def _rms_norm(x, weight, out, size, eps, BLOCK: tl.constexpr) -> None:
    """One row each."""
    row = tl.program_id(0).to(tl.int64) * size
    at = tl.arange(0, BLOCK)
    there = at < size
    wide = tl.load(x + row + at, mask=there, other=0.0).to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    y = wide.to(out.dtype.element_ty).to(tl.float32)  # rounded before the weight, as the reference does
    y = y * tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row + at, y.to(out.dtype.element_ty), mask=there)


def linear(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, float] | None,
    gated: bool,
    onto: Tensor | None,
) -> Tensor:
    """See `reference.linear`; `onto` is written in place and returned."""
    if x.numel() // x.shape[-1] <= FEW:
        return few_rows(x=x, weight=weight, bias=bias, norm=norm, gated=gated, onto=onto)
    if norm is not None:
        x = rms_norm(x=x, weight=norm[0], eps=norm[1])
    if onto is None:
        y = F.linear(x, weight, bias)
        return gated_silu(y) if gated else y
    if gated:
        return onto.add_(gated_silu(F.linear(x, weight, bias)))
    if bias is not None:
        onto.add_(bias)
    onto.view(-1, onto.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.T)
    return onto


def gated_silu(x: Tensor) -> Tensor:
    """silu of the first half of the channels times the second: [..., 2 N] -> [..., N]."""
    size = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], size)
    block = 1024
    _gated_silu[(out.numel() // size, triton.cdiv(size, block))](x, out, size, BLOCK=block, num_warps=4)
    return out


@triton.jit
def _gated_silu(x, out, size, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    gate = tl.load(x + row * 2 * size + at, mask=there).to(tl.float32)
    up = tl.load(x + row * 2 * size + size + at, mask=there)
    silu = (gate * tl.sigmoid(gate)).to(up.dtype).to(tl.float32)  # rounded before the product, as the reference does
    tl.store(out + row * size + at, (silu * up.to(tl.float32)).to(up.dtype), mask=there)


def rotate(*, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `reference.rotate`, in place: x [B, T, H, hd], last axis contiguous; cos, sin [B or 1, T, hd]."""
    rows, length, heads, size = x.shape
    assert x.stride(-1) == 1 and cos.stride() == sin.stride() and cos.stride(-1) == 1
    per_row = 0 if cos.shape[0] == 1 else cos.stride(0)
    _rotate[(length, rows)](
        x,
        cos,
        sin,
        *x.stride()[:3],
        per_row,
        cos.stride(1),
        heads,
        size // 2,
        HEADS=triton.next_power_of_2(heads),
        HALF=triton.next_power_of_2(size // 2),
        num_warps=4,
    )
    return x


@triton.jit
def _rotate(
    x, cos, sin, x_row, x_token, x_head, angle_row, angle_token, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr
) -> None:
    """All heads of one token."""
    token, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, at = tl.arange(0, HEADS), tl.arange(0, HALF)
    there = (head < heads)[:, None] & (at < half)[None]
    first = x + row * x_row + token * x_token + head[:, None] * x_head + at[None]
    angle = row * angle_row + token * angle_token + at
    a = tl.load(first, mask=there).to(tl.float32)
    b = tl.load(first + half, mask=there).to(tl.float32)
    cos_a = tl.load(cos + angle, mask=at < half)[None]
    sin_a = tl.load(sin + angle, mask=at < half)[None]
    cos_b = tl.load(cos + angle + half, mask=at < half)[None]
    sin_b = tl.load(sin + angle + half, mask=at < half)[None]
    tl.store(first, (a * cos_a - b * sin_a).to(x.dtype.element_ty), mask=there)
    tl.store(first + half, (b * cos_b + a * sin_b).to(x.dtype.element_ty), mask=there)


def few_rows(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, float] | None,
    gated: bool,
    onto: Tensor | None,
    block: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """`linear` of at most 16 rows in one launch; `block` (channels, depth, stages, warps) overrides the choice."""
    outer, size = x.shape[:-1], x.shape[-1]
    x = x.reshape(-1, size)
    rows = len(x)
    channels = weight.shape[0] // 2 if gated else weight.shape[0]
    out = x.new_empty(rows, channels) if onto is None else onto.view(rows, channels)
    wide, deep, stages, warps = block or _blocks(channels, size, gated)
    assert x.stride(-1) == 1 and weight.stride(-1) == 1 and rows <= FEW
    _few_rows[(triton.cdiv(channels, wide),)](
        x,
        weight,
        bias,
        None if norm is None else norm[0],
        0.0 if norm is None else norm[1],
        out,
        rows,
        channels,
        x.stride(0),
        weight.stride(0),
        SIZE=size,
        ONTO=onto is not None,
        GATED=gated,
        WIDE=wide,
        DEEP=deep,
        num_stages=stages,
        num_warps=warps,
    )
    return out.view(*outer, channels)


def _blocks(channels: int, size: int, gated: bool) -> tuple[int, int, int, int]:
    """Channels and depth of a tile, stages, warps: enough programs to keep 132 multiprocessors reading."""
    wide = 16 if channels <= 4096 or gated else 32
    return wide, 256, 4, 4


@triton.jit
def _few_rows(
    x,
    weight,
    bias,
    norm,
    eps,
    out,
    rows,
    channels,
    x_row,
    weight_row,
    SIZE: tl.constexpr,
    ONTO: tl.constexpr,
    GATED: tl.constexpr,
    WIDE: tl.constexpr,
    DEEP: tl.constexpr,
) -> None:
    """WIDE channels of all rows. The norm's scale is one number a row, so it is applied to the finished product."""
    channel = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    row, depth = tl.arange(0, 16), tl.arange(0, DEEP)
    here = weight + channel.to(tl.int64)[:, None] * weight_row + depth[None]
    above = here + channels.to(tl.int64) * weight_row
    mine = x + row[None] * x_row + depth[:, None]
    there, known = (channel < channels)[:, None], (row < rows)[None]
    product = tl.zeros([WIDE, 16], tl.float32)
    second = tl.zeros([WIDE, 16], tl.float32)
    squares = tl.zeros([16], tl.float32)
    for at in range(0, SIZE, DEEP):
        inside = depth < SIZE - at
        w = tl.load(here + at, mask=there & inside[None], other=0.0)
        y = tl.load(mine + at, mask=known & inside[:, None], other=0.0)
        if norm is not None:
            wide = y.to(tl.float32)
            squares += tl.sum(wide * wide, axis=0)
            scale = tl.load(norm + at + depth, mask=inside, other=0.0).to(tl.float32)
            y = (wide * scale[:, None]).to(y.dtype)
        product = tl.dot(w, y, product)
        if GATED:
            second = tl.dot(tl.load(above + at, mask=there & inside[None], other=0.0), y, second)
    if norm is not None:
        scale = tl.rsqrt(squares / SIZE + eps)[None]
        product, second = product * scale, second * scale
    if bias is not None:
        product += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[:, None]
        if GATED:
            second += tl.load(bias + channels + channel, mask=channel < channels, other=0.0).to(tl.float32)[:, None]
    if GATED:
        product = product * tl.sigmoid(product) * second
    to = out + row[None] * channels + channel[:, None]
    if ONTO:
        product += tl.load(to, mask=there & known, other=0.0).to(tl.float32)
    tl.store(to, product.to(out.dtype.element_ty), mask=there & known)
