"""Attention of patches within their windows, rotated on the way: one launch between a block's two projections."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from infinitevl.ops.reference import attend_rotated, padded
from infinitevl.ops.triton.launch import early
from infinitevl.ops.triton.linear import rotate
from infinitevl.ops.where import Windows

ROWS = 64  # patches of a program; a window of 8 x 8 is one


def attend_patches(*, qkv: Tensor, cos: Tensor, sin: Tensor, windows: Windows | None, width: int) -> Tensor:
    """See `reference.attend_patches`; q and k may be rotated in place.

    Windows of one size take one launch. Whole frames, of which a model has few, and windows cut at the edges are
    rotated by a launch of their own and left to torch's attention.
    """
    if windows is not None and windows.there is None:
        return attend_windows(qkv=qkv, cos=cos, sin=sin, span=windows.place.shape[1], width=width)
    turned = rotate(x=qkv[:, :, :2].flatten(2, 3), cos=cos, sin=sin).unflatten(2, (2, -1))
    return padded(attend_rotated(turned[:, :, 0], turned[:, :, 1], qkv[:, :, 2], windows), width)


def attend_windows(*, qkv: Tensor, cos: Tensor, sin: Tensor, span: int, width: int) -> Tensor:
    """Every `span` patches in a row attend to each other: qkv [F, P, 3, H, hd], not rotated, the last two axes
    contiguous; cos, sin float32 [1, P, hd], their halves equal; P a multiple of span -> [F, P, width]."""
    frames, patches, _, heads, size = qkv.shape
    assert patches % span == 0 and qkv.stride(3) == size and qkv.stride(4) == 1 and cos.is_contiguous()
    out = torch.empty(frames, patches, width, dtype=qkv.dtype, device=qkv.device)
    blocks = triton.cdiv(span, ROWS)
    _attend[(patches // span * blocks, heads, frames)](
        qkv,
        cos,
        sin,
        out,
        *qkv.stride()[:3],
        patches,
        width,
        size**-0.5 * 1.4426950408889634,  # of exp2
        HEADS=heads,
        HALF=size // 2,
        PADDED=max(16, triton.next_power_of_2(size // 2)),
        SPAN=span,
        BLOCKS=blocks,
        ROWS=ROWS,
        MORE=triton.next_power_of_2(width - heads * size),
        num_warps=4,
        **early(qkv),
    )
    return out


@triton.jit
def _angles(cos, sin, patch, there, HALF: tl.constexpr, PADDED: tl.constexpr):
    """Cosines and sines [N, PADDED] of these patches; both halves of a head turn by the same angles."""
    at = tl.arange(0, PADDED)
    inside = there[:, None] & (at < HALF)[None]
    turn = patch[:, None] * (2 * HALF) + at[None]
    return tl.load(cos + turn, mask=inside, other=0.0), tl.load(sin + turn, mask=inside, other=0.0)


@triton.jit
def _halves(x, cosine, sine, patch, there, step, HALF: tl.constexpr, PADDED: tl.constexpr):
    """Both halves [N, PADDED] of one head of these patches, rotated, in x's dtype."""
    at = tl.arange(0, PADDED)
    inside = there[:, None] & (at < HALF)[None]
    here = x + patch.to(tl.int64)[:, None] * step + at[None]
    a = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(here + HALF, mask=inside, other=0.0).to(tl.float32)
    dtype = x.dtype.element_ty
    return (a * cosine - b * sine).to(dtype), (b * cosine + a * sine).to(dtype)


@triton.jit
def _attend(
    qkv,
    cos,
    sin,
    out,
    frame_step,
    patch_step,
    kind_step,
    patches,
    width,
    scale,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    MORE: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """ROWS queries of one head of one window, over the window's keys."""
    window, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    head, frame = tl.program_id(1), tl.program_id(2).to(tl.int64)
    q = qkv + frame * frame_step + head * 2 * HALF
    k, v = q + kind_step, q + 2 * kind_step
    line, at = tl.arange(0, ROWS), tl.arange(0, PADDED)
    asked = block * ROWS + line
    cosine, sine = _angles(cos, sin, window * SPAN + asked, asked < SPAN, HALF, PADDED)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    q_a, q_b = _halves(q, cosine, sine, window * SPAN + asked, asked < SPAN, patch_step, HALF, PADDED)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sum_a, sum_b = tl.zeros([ROWS, PADDED], tl.float32), tl.zeros([ROWS, PADDED], tl.float32)
    for begin in tl.static_range(0, SPAN, ROWS):
        seen = begin + line < SPAN
        patch = window * SPAN + begin + line
        if SPAN > ROWS:  # else the keys are the queries' own patches
            cosine, sine = _angles(cos, sin, patch, seen, HALF, PADDED)
        k_a, k_b = _halves(k, cosine, sine, patch, seen, patch_step, HALF, PADDED)
        score = tl.dot(q_a, tl.trans(k_a), input_precision="ieee")
        score = tl.dot(q_b, tl.trans(k_b), score, input_precision="ieee") * scale
        score = tl.where(seen[None], score, float("-inf"))
        new = tl.maximum(most, tl.max(score, 1))
        weight, kept = tl.exp2(score - new[:, None]), tl.exp2(most - new)
        total, most = total * kept + tl.sum(weight, 1), new
        inside = seen[:, None] & (at < HALF)[None]
        here = v + patch.to(tl.int64)[:, None] * patch_step + at[None]
        weight = weight.to(qkv.dtype.element_ty)
        v_a, v_b = tl.load(here, mask=inside, other=0.0), tl.load(here + HALF, mask=inside, other=0.0)
        sum_a = tl.dot(weight, v_a, sum_a * kept[:, None], input_precision="ieee")
        sum_b = tl.dot(weight, v_b, sum_b * kept[:, None], input_precision="ieee")
    inside = (asked < SPAN)[:, None] & (at < HALF)[None]
    lines = out + (frame * patches + window * SPAN + asked)[:, None] * width
    to = lines + head * (2 * HALF) + at[None]
    tl.store(to, (sum_a / total[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(to + HALF, (sum_b / total[:, None]).to(out.dtype.element_ty), mask=inside)
    if MORE > 0:
        if head == 0:
            more = tl.arange(0, MORE)[None]
            one = tl.where(more == 0, 1.0, 0.0) + tl.zeros([ROWS, 1], tl.float32)
            mask = (asked < SPAN)[:, None] & (HEADS * 2 * HALF + more < width)
            tl.store(lines + HEADS * 2 * HALF + more, one.to(out.dtype.element_ty), mask=mask)
