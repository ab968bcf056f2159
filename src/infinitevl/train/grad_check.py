"""Before any step: is the delta rule's gradient, by the implementation that will train, that of the recurrence?

A miscompiled backward (FLA's on Hopper with triton from 3.4 to before 3.7.1) trains without a word and to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from infinitevl import ops
from infinitevl.config import TextConfig
from infinitevl.ops import reference

INPUTS = ("q", "k", "v", "g", "beta", "state")
TOKENS = 130  # two chunks of 64 and a bit
# Greatest error of a gradient over its greatest entry. float32 rounds at 6e-8 and sums over 130 tokens. In bfloat16
# operands of products are rounded by 2^-9 of themselves, several in a row: the chunks of `ops.scan` come to 1e-2.
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


class GradientError(RuntimeError):
    """Training would go by wrong gradients; one line that says what to do."""


def guard(text: TextConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse to start where the delta rule's gradient cannot be trusted on this device."""
    name = trained_by(device, dtype, text.delta_key_dim, text.delta_value_dim)
    if name == "fla":
        raise GradientError("the delta rule's backward would be FLA's, wrong on Hopper before triton 3.7.1: unpin it")
    if name == "triton":
        raise GradientError("the delta rule would be the kernels' that have no backward: unpin gated_delta='triton'")
    found = errors(device, TOKENS, 2, text.delta_key_dim, text.delta_value_dim, dtype)
    worst = max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name])
    if not found[worst] <= LIMITS[dtype]:
        raise GradientError(
            f"the delta rule's gradient in {worst} by {name!r} is off by {found[worst]:.2g} of its size on "
            f"{device} ({LIMITS[dtype]:.0e} is allowed): run with the reference, or another torch or triton"
        )


def trained_by(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str:
    """The implementation of the delta rule that trains: it is asked for gradients of packed segments."""
    channels = min(key_dim, value_dim)
    return ops.choose("gated_delta", device, dtype, gradient=True, segments=True, channels=channels).name


def errors(
    device: torch.device,
    tokens: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    packed: bool = True,
) -> dict[str, float]:
    """Error of each input's gradient against a float64 recurrence, over the greatest entry of that gradient.

    packed: two segments; else one.
    """
    inputs, weight = _case(device, tokens, heads, key_dim, value_dim, dtype)
    segment = (torch.arange(tokens, device=device) >= tokens // 3)[None].long() if packed else None
    got = _gradients(ops.rule(trained_by(device, dtype, key_dim, value_dim)), inputs, segment, weight)
    wide = [each.double() for each in inputs]
    right = _gradients(reference.delta_rule_recurrent, wide, segment, weight.double())
    return {
        name: float((a.double() - b).abs().max() / b.abs().max()) for name, a, b in zip(INPUTS, got, right, strict=True)
    }


def _case(
    device: torch.device, tokens: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """q, k, v, g, beta as a mixer makes them, a state that was lived in, and what the outputs are weighed by."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=random).to(device)

    def drawn(*shape: int) -> Tensor:
        return draw(tokens, heads, *shape)

    q, k = reference.l2_normalised(drawn(key_dim)) * key_dim**-0.5, reference.l2_normalised(drawn(key_dim))
    # half-lives from 1 token to 1,000: state that lasts and state that goes
    g = -F.softplus(3 * drawn() - 5)
    v, beta, weight = drawn(value_dim).to(dtype), drawn().sigmoid(), drawn(value_dim)
    return [q, k, v, g, beta, draw(heads, key_dim, value_dim)], weight


def _gradients(
    run: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], segment: Tensor | None, weight: Tensor
) -> tuple[Tensor, ...]:
    leaves = [each.detach().requires_grad_() for each in inputs]
    out, _ = run(**dict(zip(INPUTS, leaves, strict=True)), segment=segment)
    return torch.autograd.grad((out.to(weight.dtype) * weight).sum(), leaves)
