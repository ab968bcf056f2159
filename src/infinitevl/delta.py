"""Follow a frame: its tokens rewrite the delta state and read it -> hidden. The gated delta mixer (paper, 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from infinitevl import ops
from infinitevl.config import TextConfig
from infinitevl.layers import Joint, RMSNorm, fan, in_fp8, side_by_side, sum_onto
from infinitevl.memory import Delta
from infinitevl.ops.where import DeltaWeights, Projected, Where


class DeltaMixer(nn.Module):
    """Gated DeltaNet: short convolution on q, k, v, then S <- exp(g) S + k (beta (v - (exp(g) S)^T k))^T, o = S^T q.

    A_log, dt_bias, the decay g and the state are float32 whatever the model's dtype.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads, self.key_dim, self.value_dim = config.delta_heads, config.delta_key_dim, config.delta_value_dim
        self.eps, self.taps = config.delta_norm_eps, config.conv_size
        size, keys, values = config.hidden_size, self.heads * self.key_dim, self.heads * self.value_dim
        self.q = nn.Linear(size, keys, bias=False)
        self.k = nn.Linear(size, keys, bias=False)
        self.v = nn.Linear(size, values, bias=False)
        self.a = nn.Linear(size, self.heads, bias=False)
        self.b = nn.Linear(size, self.heads, bias=False)
        self.g = nn.Linear(size, values, bias=False)
        self.o = nn.Linear(values, size, bias=False)
        self.q_conv = nn.Parameter(torch.empty(keys, self.taps))
        self.k_conv = nn.Parameter(torch.empty(keys, self.taps))
        self.v_conv = nn.Parameter(torch.empty(values, self.taps))
        self.norm = nn.Parameter(torch.empty(self.value_dim))
        self.A_log = nn.Parameter(torch.empty(self.heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(self.heads, dtype=torch.float32))
        self.joint: Joint | None = None
        self.wide: Joint | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from scratch: half-lives spread over the heads from 10 to 10,000 tokens, convolutions the identity."""
        half_lives = torch.logspace(1, 4, self.heads)
        dt = math.log(2) / half_lives
        with torch.no_grad():
            self.A_log.zero_()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) == dt
            self.norm.fill_(1.0)
            for conv in (self.q_conv, self.k_conv, self.v_conv):
                conv.zero_()
                conv[:, -1] = 1.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeltaMixer:
        exact = (self.A_log.data, self.dt_bias.data)
        super()._apply(fn, recurse)
        for parameter, value in zip((self.A_log, self.dt_bias), exact, strict=True):
            if parameter.dtype != torch.float32:
                parameter.data = value.to(parameter.device)
        return self

    def fuse(self) -> None:
        """Lay the projections' weights side by side, and the convolutions' tap by tap: channels become neighbours."""
        self.joint = side_by_side(self._projections())
        convs = (self.q_conv, self.k_conv, self.v_conv)
        taps = torch.cat([conv.data for conv in convs]).T.contiguous()
        for conv, part in zip(convs, taps.split([len(conv) for conv in convs], dim=1), strict=True):
            conv.data = part.T

    def to_fp8(self) -> None:
        """The projections' weights in FP8, those of decay and write strength among them: apart they would cost a
        product and a norm more."""
        self.joint, self.wide = in_fp8(self._projections()), in_fp8((self.o,))

    def _projections(self) -> tuple[nn.Linear, ...]:
        return self.q, self.k, self.v, self.g, self.a, self.b

    def forward(self, hidden: Tensor, norm: RMSNorm, where: Where, state: Delta | None) -> tuple[Tensor, Delta | None]:
        """hidden [B, T, D] -> hidden + mixed(norm(hidden)) and the state after the chunk (None stays None)."""
        out, after = ops.gated_delta(
            projected=Projected(*fan(hidden, norm, self._projections(), self.joint)),
            weights=DeltaWeights(self.q_conv, self.k_conv, self.v_conv, self.A_log, self.dt_bias, self.norm, self.eps),
            where=where,
            state=self._empty(hidden) if state is None else state,
        )
        return sum_onto(hidden, out.flatten(2), self.o, self.wide), None if state is None else after

    def _empty(self, hidden: Tensor) -> Delta:
        rows = hidden.shape[0]
        channels = self.heads * (2 * self.key_dim + self.value_dim)
        state = hidden.new_zeros(rows, self.heads, self.key_dim, self.value_dim, dtype=torch.float32)
        return Delta(hidden.new_zeros(rows, self.taps - 1, channels), state)
