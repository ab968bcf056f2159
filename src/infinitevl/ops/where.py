"""What the tokens of a chunk have in common for every block, and what a delta mixer hands to its op."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Where(NamedTuple):
    """Where the tokens of a chunk stand; built once per chunk by `Model.forward` and shared by all blocks.

    cos, sin float32 [B, T, hd]: rotations of the tokens. index [B, T]: tokens before each, -1 for one that is not
    there. present bool [B, T] or None when all are there; then also count [B], how many are, and order [B, T], the
    place of the j-th token that is there (those that are not come last), None where they are the first of their row.
    segment [B, T] or None: a token sees only its own segment (packed training); then also bounds int32 [S + 1], where
    segments begin (`flash.bounds`), on CUDA when all tokens are there. With a memory: seen [B] tokens before the chunk,
    held [B, W] the ring's index before it, target [B, T] the slot each token is written to.
    """

    cos: Tensor
    sin: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    present: Tensor | None = None
    order: Tensor | None = None
    count: Tensor | None = None  # type: ignore[assignment]  # hides tuple.count
    segment: Tensor | None = None
    seen: Tensor | None = None
    held: Tensor | None = None
    target: Tensor | None = None
    bounds: Tensor | None = None


class Placed(NamedTuple):
    """A chunk's place in a memory: index and target [B, T] as in `Where`; held [B, W], seen and clock [B] after it."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    target: Tensor
    held: Tensor
    seen: Tensor
    clock: Tensor


class Windows(NamedTuple):
    """The windows of a frame whose patches are in window order.

    place [windows, largest]: the place of each patch of each window, its first one repeated where a window is small;
    there (bool, likewise) tells them apart, None when all windows are of one size.
    """

    place: Tensor
    there: Tensor | None


class Projected(NamedTuple):
    """A delta mixer's projections of a chunk: q, k [B, T, H * K], v and gate [B, T, H * V], a and b [B, T, H]."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    a: Tensor
    b: Tensor


class DeltaWeights(NamedTuple):
    """A delta mixer's other weights: convolutions [C, taps], A_log and dt_bias float32 [H], norm [V] with its eps."""

    q_conv: Tensor
    k_conv: Tensor
    v_conv: Tensor
    A_log: Tensor
    dt_bias: Tensor
    norm: Tensor
    eps: float
