"""Before any step: is the delta rule's gradient, by the implementation that will train, that of the recurrence?

A miscompiled backward (FLA's on Hopper with triton from 3.4 to before 3.7.1) trains without a word and to nothing.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from infinitevl import ops
from infinitevl.config import TextConfig
from infinitevl.ops import reference

INPUTS = ("q", "k", "v", "g", "beta")
TOKENS = 130  # two chunks of 64 and a bit
# Greatest error of a gradient over its greatest entry. float32 rounds at 6e-8 and sums over 130 tokens; bfloat16 inputs
# are the same on both sides, so that what is left is the rounding of products inside a kernel, 2^-8 each.
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


class GradientError(RuntimeError):
    """Training would go by wrong gradients; one line that says what to do."""


def guard(text: TextConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse to start where the delta rule's gradient cannot be trusted on this device."""
    choice = _choice(device, dtype)
    if choice.name == "fla":
        raise GradientError("the delta rule's backward would be FLA's, wrong on Hopper before triton 3.7.1: unpin it")
    found = errors(device, TOKENS, 2, text.delta_key_dim, text.delta_value_dim, dtype)
    worst = max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name])
    if not found[worst] <= LIMITS[dtype]:
        raise GradientError(
            f"the delta rule's gradient in {worst} by {choice.name!r} is off by {found[worst]:.2g} of its size on "
            f"{device} ({LIMITS[dtype]:.0e} is allowed): run with the reference, or another torch or triton"
        )


def errors(
    device: torch.device, tokens: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> dict[str, float]:
    """Error of each input's gradient against a float64 recurrence, over the greatest entry of that gradient."""
    inputs, segment, weight = _case(device, tokens, heads, key_dim, value_dim, dtype)
    got = _gradients(ops.rule(_choice(device, dtype).name), inputs, segment, weight, torch.float32)
    wide = [each.double() for each in inputs]
    right = _gradients(reference.delta_rule_recurrent, wide, segment, weight.double(), torch.float64)
    return {
        name: float((a.double() - b).abs().max() / b.abs().max()) for name, a, b in zip(INPUTS, got, right, strict=True)
    }


def _choice(device: torch.device, dtype: torch.dtype) -> ops.Choice:
    """What trains: a chunk of packed segments that asks for gradients."""
    return ops.choose("gated_delta", device, dtype, gradient=True, segments=True)


def _case(
    device: torch.device, tokens: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v, g, beta as a mixer makes them, two segments, and what the outputs are weighed by."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, tokens, heads, *shape, generator=random).to(device)

    q, k = reference.l2_normalised(draw(key_dim)) * key_dim**-0.5, reference.l2_normalised(draw(key_dim))
    # half-lives from 1 token to 1,000: state that lasts and state that goes
    g = -F.softplus(3 * draw() - 5)
    segment = (torch.arange(tokens, device=device) >= tokens // 3)[None].long()
    return [q, k, draw(value_dim).to(dtype), g, draw().sigmoid()], segment, draw(value_dim)


def _gradients(
    run: object, inputs: list[Tensor], segment: Tensor, weight: Tensor, state_dtype: torch.dtype
) -> tuple[Tensor, ...]:
    assert callable(run)
    leaves = [each.detach().requires_grad_() for each in inputs]
    state = inputs[0].new_zeros(1, inputs[0].shape[2], inputs[0].shape[3], inputs[2].shape[3], dtype=state_dtype)
    out, _ = run(**dict(zip(INPUTS, leaves, strict=True)), state=state, segment=segment)
    return torch.autograd.grad((out.to(weight.dtype) * weight).sum(), leaves)
