"""What every block is built of: RMS norm, gated MLP, and linears that share an input as one product.

Weights side by side: `Model.fuse` lays them out; the modules, their parameters and saved files stay as they are, because a parameter becomes
a view of its part. Where a module was since moved, replaced or wrapped (LoRA), the layout no longer holds and each linear
runs by itself: the same numbers, more launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from infinitevl import ops


class Joint(NamedTuple):
    """The weights [N, D] and biases [N] of several linears in one tensor each."""

    weight: Tensor
    bias: Tensor | None
    parts: tuple[Tensor, ...]  # the views that the linears' weights were when this was made

    def holds(self, linears: Sequence[nn.Module]) -> bool:
        """Whether these linears still are the parts. Where gradients are asked they must reach the parameters
        themselves."""
        graded = torch.is_grad_enabled()
        return all(
            type(linear) is nn.Linear
            and linear.weight.data_ptr() == part.data_ptr()
            and not (graded and linear.weight.requires_grad)
            for linear, part in zip(linears, self.parts, strict=True)
        )


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
    return Joint(weight, bias, tuple(linear.weight.data for linear in linears))


@torch.no_grad()
def widened(linear: nn.Linear, columns: int) -> Joint:
    """Lay a linear's weight into one of `columns` columns, zeros after it: it then reads a padded input."""
    weight = linear.weight.new_zeros(linear.out_features, columns)
    _become(linear.weight, weight[:, : linear.in_features])
    return Joint(weight, linear.bias, (linear.weight.data,))


def _become(parameter: nn.Parameter, place: Tensor) -> None:
    place.copy_(parameter.data)
    parameter.data = place


def fan(x: Tensor, norm: RMSNorm, linears: Sequence[nn.Module], joint: Joint | None) -> Sequence[Tensor]:
    """norm(x) through linears that share it: one product where `joint` holds their weights."""
    if joint is not None and joint.holds(linears):
        y = ops.linear(x=x, weight=joint.weight, bias=joint.bias, norm=(norm.weight, norm.eps))
        return y.split([len(part) for part in joint.parts], dim=-1)
    x = norm(x)
    return [linear(x) for linear in linears]


def sum_onto(onto: Tensor, x: Tensor, linear: nn.Module) -> Tensor:
    """onto + linear(x); `onto` is consumed."""
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

    def fuse(self) -> None:
        """Gate and up side by side, padded to a width that is a multiple of 64: 3,420 channels are not 16-byte rows,
        and a product over them takes four times as long. Exact: silu(0) * 0 = 0."""
        width = -(-self.gate.out_features // 64) * 64
        self.joint = side_by_side((self.gate, self.up), width)
        self.wide = widened(self.down, width)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """x [..., D] -> x + mlp(norm(x)); x is consumed."""
        if self.joint is None or self.wide is None or not self._fused(self.joint, self.wide):
            y = norm(x)
            return sum_onto(x, nn.functional.silu(self.gate(y)) * self.up(y), self.down)
        inner = ops.linear(
            x=x, weight=self.joint.weight, bias=self.joint.bias, norm=(norm.weight, norm.eps), gated=True
        )
        return ops.linear(x=inner, weight=self.wide.weight, bias=self.wide.bias, onto=x)

    def _fused(self, joint: Joint, wide: Joint) -> bool:
        return joint.holds((self.gate, self.up)) and wide.holds((self.down,))
