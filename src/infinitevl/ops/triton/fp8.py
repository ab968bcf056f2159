"""FP8 on CUDA: torch's scaled product, and kernels that round its input where they make it.

A norm or a gate before a product writes e4m3 and a scale for each row instead of 16 bits, at no launch more. What a
mixer leaves is rounded by a launch of its own, and a sum takes one after the product: 3 launches more a block, 204 in a
frame of the 4B model. One row walks over its weight as in `linear.one_row`, at half the bytes and no launch more.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from infinitevl.ops import fp8
from infinitevl.ops.fp8 import Quantised
from infinitevl.ops.triton.launch import early
from infinitevl.ops.triton.linear import add_parts, gated_silu, one_row

MOST, INVERSE = tl.constexpr(fp8.MOST), tl.constexpr(1 / fp8.MOST)
LEAST = tl.constexpr(fp8.LEAST)


def linear(
    *,
    x: Tensor,
    weight: Quantised,
    bias: Tensor | None,
    norm: tuple[Tensor, float] | None,
    gated: bool,
    onto: Tensor | None,
) -> Tensor:
    """See `ops.fp8.linear`; `onto` is written in place and returned."""
    if x.numel() == x.shape[-1]:
        values, scale = weight
        return one_row(x=x, weight=values, scale=scale, bias=bias, norm=norm, gated=gated, onto=onto)
    y = product(quantised(x) if norm is None else normed(x, *norm), weight, bias, x.dtype)
    y = gated_silu(y) if gated else y
    return y if onto is None else add_parts(onto, y[None])


def mlp(*, x: Tensor, norm: tuple[Tensor, float], up: fp8.Linear, down: fp8.Linear) -> Tensor:
    """See `ops.fp8.mlp`; x is written in place and returned."""
    if x.numel() == x.shape[-1]:
        inner = linear(x=x, weight=up[0], bias=up[1], norm=norm, gated=True, onto=None)
        return linear(x=inner, weight=down[0], bias=down[1], norm=None, gated=False, onto=x)
    rounded = gated(product(normed(x, *norm), *up, x.dtype))
    return add_parts(x, product(rounded, *down, x.dtype)[None])


def product(x: Quantised, weight: Quantised, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [..., K] weight^T + bias in `dtype`, by torch: [..., N]. Both scales are applied to the finished sums, which
    the tensor cores keep in fewer bits than float32 (`use_fast_accum`): far less than the rounding of the factors."""
    size = x.shape[-1]
    y = torch._scaled_mm(
        x.values.view(-1, size),
        weight.values.T,
        scale_a=x.scale.view(-1, 1),
        scale_b=weight.scale.view(1, -1),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return y.view(*x.shape[:-1], -1)


def quantised(x: Tensor) -> Quantised:
    """See `ops.fp8.quantised`: x [..., K]."""
    x = x.contiguous()
    out, block, warps = _rows(x, x.shape[-1])
    _quantise[(out.scale.numel(),)](x, *out, x.shape[-1], BLOCK=block, num_warps=warps, **early(x))
    return out


def normed(x: Tensor, weight: Tensor, eps: float) -> Quantised:
    """The RMS norm of x [..., K], quantised."""
    x = x.contiguous()
    out, block, warps = _rows(x, x.shape[-1])
    _normed[(out.scale.numel(),)](x, weight, *out, x.shape[-1], eps, BLOCK=block, num_warps=warps, **early(x))
    return out


def gated(x: Tensor) -> Quantised:
    """silu of the first half of the channels times the second, quantised: [..., 2 N] -> [..., N]."""
    out, block, warps = _rows(x, x.shape[-1] // 2)
    _gated[(out.scale.numel(),)](x, *out, x.shape[-1] // 2, BLOCK=block, num_warps=warps, **early(x))
    return out


def _rows(x: Tensor, size: int) -> tuple[Quantised, int, int]:
    """Room for rows of `size` e4m3, and the block and warps that take one at once: 16 or 32 values a thread."""
    values = torch.empty(*x.shape[:-1], size, dtype=fp8.E4M3, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(size)
    return Quantised(values, scale), block, 4 if block <= 2048 else 8 if block <= 4096 else 16


@triton.jit
def _round(y, values, scale, row, at, there, size) -> None:
    """One row y (float32, zeros after its end) as e4m3, and its scale, to the bit as the definition has them."""
    most = tl.maximum(tl.max(tl.abs(y), axis=0), LEAST)
    tl.store(scale + row, most * INVERSE)
    y = y * (tl.div_rn(1.0, most) * MOST)
    tl.store(values + row * size + at, y.to(values.dtype.element_ty), mask=there)


@triton.jit
def _quantise(x, values, scale, size, BLOCK: tl.constexpr, EARLY: tl.constexpr) -> None:
    """One row each."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    y = tl.load(x + row * size + at, mask=at < size, other=0.0).to(tl.float32)
    _round(y, values, scale, row, at, at < size, size)


@triton.jit
def _normed(x, weight, values, scale, size, eps, BLOCK: tl.constexpr, EARLY: tl.constexpr) -> None:
    """One row each; rounded to x's dtype where `linear.rms_norm` does so."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < size
    factor = tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    wide = tl.load(x + row * size + at, mask=there, other=0.0).to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    dtype = x.dtype.element_ty
    y = (wide.to(dtype).to(tl.float32) * factor).to(dtype).to(tl.float32)
    _round(y, values, scale, row, at, there, size)


@triton.jit
def _gated(x, values, scale, size, BLOCK: tl.constexpr, EARLY: tl.constexpr) -> None:
    """One row each; rounded to x's dtype in between, as the definition does."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    there = at < size
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(x + row * 2 * size + at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * size + size + at, mask=there, other=0.0).to(tl.float32)
    y = (gate * tl.sigmoid(gate) * up).to(x.dtype.element_ty).to(tl.float32)
    _round(y, values, scale, row, at, there, size)
