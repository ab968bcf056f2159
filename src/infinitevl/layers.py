"""What every block is built of: RMS norm, gated MLP, and linears that share an input as one product.

`Model.fuse` lays weights that read one input side by side. The modules, their parameters and saved files stay as they
are, because a parameter becomes a view of its part. Where a module was since moved, replaced or wrapped (LoRA), the
layout no longer holds and each linear runs by itself: the same numbers, more launches.

`Model.to_fp8` lays e4m3 copies of the same weights beside them. They are other numbers, near ones, so they hold under
narrower terms: no gradient can be asked, and no parameter has changed since.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from infinitevl import ops
from infinitevl.ops.fp8 import STEP, Fp8Error, Quantised, quantised


class Joint(NamedTuple):
    """The weights [N, D] and biases [N] of several linears in one tensor each, or in FP8."""

    weight: Tensor | Quantised
    bias: Tensor | None
    parts: tuple[tuple[Tensor, Tensor | None], ...]  # weight and bias of each linear when this was made: views
    changes: int | None = None  # of the parameters, in place, before they were quantised; None: they are views

    def holds(self, linears: Sequence[nn.Module]) -> bool:
        """Whether these linears still are the parts. Where gradients are asked they must reach the parameters
        themselves."""
        if self.changes is not None and torch.is_grad_enabled():
            return False
        same = all(_is(linear, part) for linear, part in zip(linears, self.parts, strict=True))
        return same and (self.changes is None or self.changes == _changes(linears))


def _is(linear: nn.Module, part: tuple[Tensor, Tensor | None]) -> bool:
    if type(linear) is not nn.Linear:
        return False
    now = (linear.weight, linear.bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in now):
        return False
    return all(
        (x is None) == (y is None) and (x is None or y is None or x.data_ptr() == y.data_ptr())
        for x, y in zip(now, part, strict=True)
    )


def _changes(linears: Sequence[nn.Module]) -> int:
    """How often the parameters were changed in place, as autograd counts it (inference tensors it does not count)."""
    return sum(p._version for linear in linears for p in linear.parameters() if not p.is_inference())


def _part(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return linear.weight.data, None if linear.bias is None else linear.bias.data


@torch.no_grad()
def side_by_side(linears: Sequence[nn.Linear], rows: int | None = None) -> Joint:
    """Lay the weights of `linears` into one tensor, each in `rows` rows (None: as many as it has), zeros after it."""
    rows_of = [rows or linear.out_features for linear in linears]
    first = linears[0]
    weight = first.weight.new_zeros(sum(rows_of), first.in_features)
    bias = None if first.bias is None else first.bias.new_zeros(sum(rows_of))
    at = 0
    for linear, count in zip(linears, rows_of, strict=True):
        part = slice(at, at + linear.out_features)
        _become(linear.weight, weight[part])
        if bias is not None:
            _become(linear.bias, bias[part])
        at += count
    return Joint(weight, bias, tuple(_part(linear) for linear in linears))


@torch.no_grad()
def widened(linear: nn.Linear, columns: int) -> Joint:
    """Lay a linear's weight and then its bias into one weight of `columns` columns, zeros after them: it then reads a
    padded input whose first column of padding is 1, and its bias costs nothing."""
    weight = linear.weight.new_zeros(linear.out_features, columns)
    _become(linear.weight, weight[:, : linear.in_features])
    if linear.bias is not None:
        _become(linear.bias, weight[:, linear.in_features])
    return Joint(weight, None, (_part(linear),))


@torch.no_grad()
def in_fp8(linears: Sequence[nn.Linear], rows: int | None = None, columns: int | None = None) -> Joint:
    """Copies of the weights of `linears`, one below the other, in e4m3 with a scale for each channel.

    rows, columns: what each is padded to with zeros (None: nothing; the channels in all to a multiple of 16). Raises
    Fp8Error for an input that is no multiple of 16 channels wide.
    """
    first = linears[0]
    wide = columns or first.in_features
    if wide % STEP:
        raise Fp8Error(f"FP8 products read multiples of {STEP} channels, this model has a linear of {wide}")
    weight = torch.cat([_padded(linear.weight.data, rows, wide) for linear in linears])
    bias = None if first.bias is None else torch.cat([_padded(linear.bias.data, rows) for linear in linears])
    high = -(-len(weight) // STEP) * STEP
    return Joint(
        quantised(_padded(weight, high, wide)),
        None if bias is None else _padded(bias, high),
        tuple(_part(linear) for linear in linears),
        _changes(linears),
    )


def _padded(x: Tensor, *shape: int | None) -> Tensor:
    """x with zeros behind it up to `shape` (None: as it is)."""
    more = [(wanted or size) - size for size, wanted in zip(x.shape, shape, strict=True)]
    return nn.functional.pad(x, [count for missing in reversed(more) for count in (0, missing)])


def _become(parameter: Tensor, place: Tensor) -> None:
    place.copy_(parameter.data)
    parameter.data = place


def fan(x: Tensor, norm: RMSNorm, linears: Sequence[nn.Module], joint: Joint | None) -> Sequence[Tensor]:
    """norm(x) through linears that share it: one product where `joint` holds their weights."""
    if joint is not None and joint.holds(linears):
        y = ops.linear(x=x, weight=joint.weight, bias=joint.bias, norm=(norm.weight, norm.eps))
        sizes = [len(weight) for weight, _ in joint.parts]
        return y.split([*sizes, y.shape[-1] - sum(sizes)], dim=-1)[: len(sizes)]
    x = norm(x)
    return [linear(x) for linear in linears]


def sum_onto(onto: Tensor, x: Tensor, linear: nn.Module, wide: Joint | None = None) -> Tensor:
    """onto + linear(x), by `wide` where it holds the linear's weight; `onto` is consumed."""
    if wide is not None and wide.holds((linear,)):
        return ops.linear(x=x, weight=wide.weight, bias=wide.bias, onto=onto)
    if type(linear) is nn.Linear:
        return ops.linear(x=x, weight=linear.weight, bias=linear.bias, onto=onto)
    return onto + linear(x)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x=x, weight=self.weight, eps=self.eps)


class GatedMLP(nn.Module):
    """onto + down(silu(gate(norm(x))) * up(norm(x))), as a residual: x is normed, and the sum goes onto x."""

    def __init__(self, size: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(size, inner, bias=bias)
        self.up = nn.Linear(size, inner, bias=bias)
        self.down = nn.Linear(inner, size, bias=bias)
        self.joint: Joint | None = None
        self.wide: Joint | None = None

    @torch.no_grad()
    def fuse(self) -> None:
        """Gate and up side by side, padded to a width that is a multiple of 64: 3,420 channels are not 16-byte rows,
        and a product over them takes four times as long. Exact: silu(0) * 0 = 0.

        A bias of `down` is one more column of its weight, and meets a 1: silu(16) / 16, 1 in bfloat16 and 1 - 1e-7 in
        float32, which a gate without weights and a bias of 16 gives.
        """
        inner, biased = self.gate.out_features, self.down.bias is not None
        width = -(-(inner + biased) // 64) * 64
        self.joint = side_by_side((self.gate, self.up), width)
        self.wide = widened(self.down, width)
        if self.joint.bias is not None:
            self.joint.bias[inner], self.joint.bias[width + inner] = 16.0, 1 / 16

    def to_fp8(self) -> None:
        """Gate and up one below the other in FP8, and down, padded as in `fuse`."""
        width = -(-self.gate.out_features // 64) * 64
        self.joint = in_fp8((self.gate, self.up), rows=width)
        self.wide = in_fp8((self.down,), columns=width)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """x [..., D] -> x + mlp(norm(x)); x is consumed."""
        up, down, scale = self.joint, self.wide, (norm.weight, norm.eps)
        if up is None or down is None or not self._fused(up, down):
            y = norm(x)
            return sum_onto(x, nn.functional.silu(self.gate(y)) * self.up(y), self.down)
        if isinstance(up.weight, Quantised) and isinstance(down.weight, Quantised):
            return ops.mlp_fp8(x=x, norm=scale, up=(up.weight, up.bias), down=(down.weight, down.bias))
        inner = ops.linear(x=x, weight=up.weight, bias=up.bias, norm=scale, gated=True)
        return ops.linear(x=inner, weight=down.weight, onto=x)

    def _fused(self, joint: Joint, wide: Joint) -> bool:
        return joint.holds((self.gate, self.up)) and wide.holds((self.down,))
