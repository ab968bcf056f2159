"""Products and what stands around them, on CUDA: norms, gates, sums, rotations, and the product of one row by itself.

The product of one row is a walk over its weight, as fast as memory gives it: one launch with the norm before it and the
gate or the sum after it. For more rows cuBLAS multiplies and small kernels do the rest. A frame's product over 8,192
channels or more has too few tiles for the GPU's multiprocessors: it is cut in four, and a kernel sums the parts.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from infinitevl.ops.triton.launch import early

PARTS, PARTED_ROWS, PARTED_SIZE = 4, range(65, 257), 8192  # what is cut: 22 us a product and norm, whole 27 (H200)


def rms_norm(*, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`: x [..., D] contiguous."""
    x = x.contiguous()
    size = x.shape[-1]
    out = torch.empty_like(x)
    block = triton.next_power_of_2(size)
    warps = 4 if block <= 2048 else 8
    _rms_norm[(x.numel() // size,)](x, weight, out, size, eps, BLOCK=block, num_warps=warps, **early(x))
    return out


@triton.jit
def _rms_norm(x, weight, out, size, eps, BLOCK: tl.constexpr, EARLY: tl.constexpr) -> None:
    """One row each."""
    row = tl.program_id(0).to(tl.int64) * size
    at = tl.arange(0, BLOCK)
    there = at < size
    scale = tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    wide = tl.load(x + row + at, mask=there, other=0.0).to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    y = wide.to(out.dtype.element_ty).to(tl.float32)  # rounded before the weight, as the reference does
    tl.store(out + row + at, (y * scale).to(out.dtype.element_ty), mask=there)


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
    if x.numel() == x.shape[-1]:
        return one_row(x=x, weight=weight, bias=bias, norm=norm, gated=gated, onto=onto)
    if norm is not None:
        x = rms_norm(x=x, weight=norm[0], eps=norm[1])
    if onto is None:
        y = F.linear(x, weight, bias)
        return gated_silu(y) if gated else y
    if gated:
        return onto.add_(gated_silu(F.linear(x, weight, bias)))
    if bias is not None:
        add_bias(onto, bias)
    x, flat = x.reshape(-1, x.shape[-1]), onto.view(-1, onto.shape[-1])
    if len(x) in PARTED_ROWS and x.shape[1] >= PARTED_SIZE and x.shape[1] % (8 * PARTS) == 0:
        pieces = x.unflatten(1, (PARTS, -1)).transpose(0, 1), weight.unflatten(1, (PARTS, -1)).permute(1, 2, 0)
        add_parts(flat, torch.bmm(*pieces))
    else:
        flat.addmm_(x, weight.T)
    return onto


def add_parts(onto: Tensor, parts: Tensor) -> Tensor:
    """onto [...] + the sum of parts [P, ...], in float32 and in place, both contiguous."""
    assert onto.is_contiguous() and parts.is_contiguous() and parts.shape[1:] == onto.shape
    count, block = onto.numel(), 1024
    grid = (triton.cdiv(count, block),)
    _add_parts[grid](onto, parts, count, PARTS=len(parts), BLOCK=block, num_warps=4, **early(onto))
    return onto


@triton.jit
def _add_parts(onto, parts, count, PARTS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.load(onto + at, mask=at < count).to(tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * count + at, mask=at < count).to(tl.float32)
    tl.store(onto + at, total.to(onto.dtype.element_ty), mask=at < count)


def add_bias(x: Tensor, bias: Tensor) -> None:
    """x [..., D] + bias [D], in place, x contiguous."""
    assert x.is_contiguous()
    size, block = x.shape[-1], 1024
    _add_bias[(x.numel() // size, triton.cdiv(size, block))](x, bias, size, BLOCK=block, num_warps=4, **early(x))


@triton.jit
def _add_bias(x, bias, size, BLOCK: tl.constexpr, EARLY: tl.constexpr) -> None:
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    more = tl.load(bias + at, mask=at < size, other=0.0).to(tl.float32)
    here = x + tl.program_id(0).to(tl.int64) * size + at
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    y = tl.load(here, mask=at < size, other=0.0).to(tl.float32) + more
    tl.store(here, y.to(x.dtype.element_ty), mask=at < size)


def gated_silu(x: Tensor) -> Tensor:
    """silu of the first half of the channels times the second: [..., 2 N] -> [..., N]."""
    size = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], size)
    block = 1024
    _gated_silu[(out.numel() // size, triton.cdiv(size, block))](x, out, size, BLOCK=block, num_warps=4, **early(x))
    return out


@triton.jit
def _gated_silu(x, out, size, BLOCK: tl.constexpr, EARLY: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
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
        HALF=size // 2,
        HEADS=triton.next_power_of_2(heads),
        PADDED=triton.next_power_of_2(size // 2),
        num_warps=4,
        **early(x),
    )
    return x


@triton.jit
def _rotate(
    x,
    cos,
    sin,
    x_row,
    x_token,
    x_head,
    angle_row,
    angle_token,
    heads,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """All heads of one token."""
    token, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, at = tl.arange(0, HEADS), tl.arange(0, PADDED)
    there = (head < heads)[:, None] & (at < HALF)[None]
    first = x + row * x_row + token * x_token + head[:, None] * x_head + at[None]
    angle = row * angle_row + token * angle_token + at
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    a = tl.load(first, mask=there).to(tl.float32)
    b = tl.load(first + HALF, mask=there).to(tl.float32)
    cos_a = tl.load(cos + angle, mask=at < HALF)[None]
    sin_a = tl.load(sin + angle, mask=at < HALF)[None]
    cos_b = tl.load(cos + angle + HALF, mask=at < HALF)[None]
    sin_b = tl.load(sin + angle + HALF, mask=at < HALF)[None]
    tl.store(first, (a * cos_a - b * sin_a).to(x.dtype.element_ty), mask=there)
    tl.store(first + HALF, (b * cos_b + a * sin_b).to(x.dtype.element_ty), mask=there)


def one_row(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, float] | None,
    gated: bool,
    onto: Tensor | None,
    scale: Tensor | None = None,
) -> Tensor:
    """`linear` of one row, in one launch. scale: of each channel of an e4m3 weight."""
    size = x.shape[-1]
    channels = weight.shape[0] // 2 if gated else weight.shape[0]
    out = x.new_empty(*x.shape[:-1], channels) if onto is None else onto
    assert x.is_contiguous() and out.is_contiguous() and weight.stride(-1) == 1
    wide, deep, warps = blocks_of(channels, size, gated, weight.itemsize)
    _one_row[(triton.cdiv(channels, wide),)](
        x,
        weight,
        scale,
        bias,
        None if norm is None else norm[0],
        0.0 if norm is None else norm[1],
        out,
        channels,
        weight.stride(0),
        SIZE=size,
        ONTO=onto is not None,
        GATED=gated,
        WIDE=wide,
        DEEP=deep,
        GROUP=16 if weight.itemsize == 1 else 1,
        num_warps=warps,
        **early(x),
    )
    return out


def blocks_of(channels: int, size: int, gated: bool, itemsize: int = 2) -> tuple[int, int, int]:
    """Channels and depth of a tile, and warps: enough bytes on their way to keep the memory busy."""
    if itemsize == 1:  # as many bytes, and few instructions for each: unpacking them takes half of those there are
        wide, deep = (8, 2048) if channels > 4096 and not gated else (4, 2048)
    else:
        wide, deep = (2, 2048) if gated or channels > 4096 else (4, 1024) if size > 4096 else (8, 512)
    return wide, min(deep, triton.next_power_of_2(size)), 4


@triton.jit
def _one_row(
    x,
    weight,
    scale,
    bias,
    norm,
    eps,
    out,
    channels,
    weight_row,
    SIZE: tl.constexpr,
    ONTO: tl.constexpr,
    GATED: tl.constexpr,
    WIDE: tl.constexpr,
    DEEP: tl.constexpr,
    GROUP: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """WIDE channels. The norm's scale is one number, so it is applied to the finished product.

    The first tile of the weight is on its way before x is waited for, and every next one before the last is used.
    """
    channel = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    depth = tl.arange(0, DEEP)
    there = (channel < channels)[:, None]
    here = weight + channel.to(tl.int64)[:, None] * weight_row + depth[None]
    above = here + channels.to(tl.int64) * weight_row
    w = _tile(here, there, depth, 0, SIZE, DEEP)
    w_above = _tile(above, there, depth, 0, SIZE, DEEP) if GATED else w
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    product = tl.zeros([WIDE, DEEP // GROUP], tl.float32)
    second = tl.zeros([WIDE, DEEP // GROUP], tl.float32)
    squares = tl.zeros([DEEP], tl.float32)
    for at in tl.static_range(0, SIZE, DEEP):
        y = tl.load(x + at + depth, mask=depth < SIZE - at, other=0.0).to(tl.float32)
        if norm is not None:
            squares += y * y
            y = y * tl.load(norm + at + depth, mask=depth < SIZE - at, other=0.0).to(tl.float32)
        now, now_above = w, w_above
        if at + DEEP < SIZE:
            w = _tile(here, there, depth, at + DEEP, SIZE, DEEP)
            w_above = _tile(above, there, depth, at + DEEP, SIZE, DEEP) if GATED else w
        product += _grouped(now.to(tl.float32) * y[None], WIDE, DEEP, GROUP)
        if GATED:
            second += _grouped(now_above.to(tl.float32) * y[None], WIDE, DEEP, GROUP)
    total, total_above = tl.sum(product, 1), tl.sum(second, 1)
    if norm is not None:
        length = tl.rsqrt(tl.sum(squares, 0) / SIZE + eps)
        total, total_above = total * length, total_above * length
    inside = channel < channels
    if scale is not None:
        total *= tl.load(scale + channel, mask=inside, other=0.0)
        if GATED:
            total_above *= tl.load(scale + channels + channel, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            total_above += tl.load(bias + channels + channel, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        total = total * tl.sigmoid(total) * total_above
    if ONTO:
        total += tl.load(out + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + channel, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _grouped(x, WIDE: tl.constexpr, DEEP: tl.constexpr, GROUP: tl.constexpr):
    """Sums [WIDE, DEEP // GROUP] of GROUP neighbours each, which one thread loads: fewer registers to sum in."""
    if GROUP == 1:
        return x
    return tl.sum(tl.reshape(x, [WIDE, DEEP // GROUP, GROUP]), 2)


@triton.jit
def _tile(here, there, depth, at, SIZE: tl.constexpr, DEEP: tl.constexpr):
    """A tile of the weight from depth `at` on; read once, so it need not stay in the cache."""
    inside = there & (depth < SIZE - at)[None]
    return tl.load(here + at, mask=inside, other=0.0, eviction_policy="evict_first")
