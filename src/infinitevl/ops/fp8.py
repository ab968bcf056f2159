"""FP8 in plain torch: what a product of e4m3 values is. The definition, and what laptops and tests run.

A row (a channel of a weight, a token of what it is multiplied with) is divided by a scale of its own, which takes its
largest value to 448, the largest e4m3, and rounded. 3 bits of mantissa round by 2.5 % of a value (rms), so a product of
two rounded factors is 3.5 % of itself away from the exact one, whatever its length.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from infinitevl.ops import reference

E4M3 = torch.float8_e4m3fn
MOST = 448.0  # the largest e4m3
LEAST = 2.0**-100  # a row whose values are all below it is as good as zero; its scale still has an inverse
STEP = 16  # scaled products take sizes that are multiples of it
CAPABILITY = (8, 9)  # Ada; Hopper is 9.0


class Fp8Error(ValueError):
    """FP8 was asked for where it cannot be; the message says why, in one line."""


class Quantised(NamedTuple):
    """e4m3 values [..., N, K] and a float32 scale of each row [..., N]: values * scale is what they stand for."""

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def plain(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What they stand for, [..., N, K]."""
        return self.values.to(dtype) * self.scale.to(dtype)[..., None]


Linear = tuple[Quantised, Tensor | None]  # weight and bias


def quantised(x: Tensor) -> Quantised:
    """x [..., K] rounded to e4m3 with a scale for each row; not finite stays so."""
    wide = x.float()
    most = wide.abs().amax(-1).clamp(min=LEAST)
    return Quantised((wide * (most.reciprocal() * MOST)[..., None]).to(E4M3), most * (1 / MOST))


def linear(
    *,
    x: Tensor,
    weight: Quantised,
    bias: Tensor | None,
    norm: tuple[Tensor, float] | None,
    gated: bool,
    onto: Tensor | None,
) -> Tensor:
    """`reference.linear` by a quantised weight [N, K]: x [..., K] is quantised too (after the norm), unless it is one
    row: its product waits for the weight and not for arithmetic, so rounding x would buy nothing. What comes between
    two products is in x's dtype: a rounding more or less would move a value to the next e4m3, an eighth away."""
    y = x if norm is None else reference.rms_norm(x=x, weight=norm[0], eps=norm[1])
    wide = torch.promote_types(x.dtype, torch.float32)
    y = y.to(wide) if x.numel() == x.shape[-1] else quantised(y).plain(wide)
    y = F.linear(y, weight.plain(wide), None if bias is None else bias.to(wide)).to(x.dtype)
    return reference.finished(y.to(wide), gated, onto).to(x.dtype)


def mlp(*, x: Tensor, norm: tuple[Tensor, float], up: Linear, down: Linear) -> Tensor:
    """x + down(silu(gate) * rest) of norm(x) [..., D]; the first half of the channels of `up` [2 N, D] is the gate."""
    inner = linear(x=x, weight=up[0], bias=up[1], norm=norm, gated=True, onto=None)
    return linear(x=inner, weight=down[0], bias=down[1], norm=None, gated=False, onto=x)


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Raises Fp8Error where no product of e4m3 runs. A CPU runs the definition: it is slow, and tells what FP8 costs
    in accuracy."""
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise Fp8Error(f"FP8 runs on CUDA (and, for its accuracy alone, on the CPU), not on {device.type}")
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        wanted, there = (".".join(map(str, each)) for each in (CAPABILITY, found))
        name = torch.cuda.get_device_name(device)
        raise Fp8Error(f"FP8 needs compute capability {wanted} (Ada, Hopper or later), {name} has {there}")
    if dtype != torch.bfloat16:
        raise Fp8Error(f"FP8 products are for bfloat16 models, this one is {str(dtype).removeprefix('torch.')}")
    if importlib.util.find_spec("triton") is None:
        raise Fp8Error("FP8 needs triton, which is not installed here")
