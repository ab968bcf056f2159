"""Follow a frame: its tokens rewrite the delta state and read it -> hidden. The gated delta mixer (paper, 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infinitevl import ops
from infinitevl.attention import Where
from infinitevl.config import TextConfig
from infinitevl.memory import Delta

L2_EPS = 1e-6


def l2_normalised(x: Tensor) -> Tensor:
    """x [..., K] in float32, divided by its length; the epsilon is inside the root."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


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

    def forward(self, hidden: Tensor, where: Where, state: Delta | None) -> tuple[Tensor, Delta | None]:
        """hidden [B, T, D] -> [B, T, D] and the state after the chunk (None stays None)."""
        begin = state if state is not None else self._empty(hidden)
        joined = torch.cat([self.q(hidden), self.k(hidden), self.v(hidden)], dim=-1)
        joined, tail = ops.causal_conv(
            x=joined,
            weight=torch.cat([self.q_conv, self.k_conv, self.v_conv]),
            tail=begin.tail,
            present=where.present,
            segment=where.segment,
        )
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        q, k, v = joined.split([keys, keys, values], dim=-1)
        g, beta = self._gates(hidden, where.present)
        out, after = ops.delta_rule(
            q=l2_normalised(q.unflatten(-1, (self.heads, -1))) * self.key_dim**-0.5,
            k=l2_normalised(k.unflatten(-1, (self.heads, -1))),
            v=v.unflatten(-1, (self.heads, -1)),
            g=g,
            beta=beta,
            state=begin.state,
            segment=where.segment,
        )
        gate = self.g(hidden).unflatten(-1, (self.heads, -1))
        out = ops.gated_norm(x=out, gate=gate, weight=self.norm, eps=self.eps)
        return self.o(out.flatten(2)), None if state is None else Delta(tail, after)

    def _gates(self, hidden: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log decay g, write strength beta, float32 [B, T, H]; a token that is not there decays and writes nothing."""
        g = -self.A_log.exp() * F.softplus(self.a(hidden).float() + self.dt_bias)
        beta = self.b(hidden).float().sigmoid()
        if present is None:
            return g, beta
        return g * present[..., None], beta * present[..., None]

    def _empty(self, hidden: Tensor) -> Delta:
        rows = hidden.shape[0]
        channels = self.heads * (2 * self.key_dim + self.value_dim)
        state = hidden.new_zeros(rows, self.heads, self.key_dim, self.value_dim, dtype=torch.float32)
        return Delta(hidden.new_zeros(rows, self.taps - 1, channels), state)
