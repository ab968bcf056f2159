"""Attention of packed rows by torch's own FlashAttention: only what a segment and its window hold is computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from infinitevl.memory import Window
from infinitevl.ops import reference
from infinitevl.ops.where import Where

KERNEL = torch.ops.aten._flash_attention_forward  # with a backward that has the window too; CUDA, 16 bit only


def bounds(segment: Tensor) -> Tensor:
    """segment [B, T] -> int32 [S + 1]: where segments begin in the rows put one after the other, and the end.

    Waits for the device, which knows how many there are: for once a batch.
    """
    begins = segment != segment.roll(1, dims=1)
    begins[:, 0] = True
    return F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=segment.numel()).int()


def attend(
    *, q: Tensor, k: Tensor, v: Tensor, where: Where, state: Window | None, window: int | None, sinks: int
) -> tuple[Tensor, None]:
    """The contract of `reference.attend_window` for packed rows, differentiable in q, k and v.

    Raises ValueError for what it is not for: a memory, sinks, tokens that are not there, or where no `bounds` are.
    """
    if state is not None or sinks or where.bounds is None:
        raise ValueError("flash: for packed rows on CUDA, all there, without memory and sinks: use the reference")
    shape, length, left = q.shape[:2], q.shape[1], None if window is None else window - 1
    q, k = (reference.rotate(x=x, cos=where.cos, sin=where.sin) for x in (q, k))
    lines = [x.flatten(0, 1) for x in (q, k, v)]
    out, *_ = KERNEL(
        *lines, where.bounds, where.bounds, length, length, 0.0, True, False, window_size_left=left, window_size_right=0
    )
    return out.unflatten(0, shape), None
