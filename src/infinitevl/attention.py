"""Follow a frame: its tokens look back over the window -> hidden. The softmax mixer.

Attend, then write: a chunk attends over ring ++ chunk and only then writes its last tokens into the ring, so that any
chunking gives the same result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from infinitevl import memory, ops
from infinitevl.config import TextConfig
from infinitevl.memory import Window
from infinitevl.rope import Angles, rotate


class Where(NamedTuple):
    """Where the tokens of a chunk stand; built once per chunk by `Model.forward` and shared by all blocks.

    angles: rotations of the tokens. index [B, T]: tokens before each, -1 for one that is not there. present bool
    [B, T] or None when all are there. segment [B, T] or None: a token sees only its own segment (packed training).
    held [B, W] or None: the ring's index before this chunk. target [B, T] or None: the slot each token is written to.
    """

    angles: Angles
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    present: Tensor | None = None
    segment: Tensor | None = None
    held: Tensor | None = None
    target: Tensor | None = None


class SoftmaxMixer(nn.Module):
    """Grouped-query attention with mRoPE over a sliding window (paper, section 3.2)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.window, self.sinks = config.window, config.sinks
        size, bias = config.hidden_size, config.attention_bias
        self.q = nn.Linear(size, self.heads * self.head_dim, bias=bias)
        self.k = nn.Linear(size, self.kv_heads * self.head_dim, bias=bias)
        self.v = nn.Linear(size, self.kv_heads * self.head_dim, bias=bias)
        self.o = nn.Linear(self.heads * self.head_dim, size, bias=False)

    def forward(self, hidden: Tensor, where: Where, state: Window | None) -> tuple[Tensor, Window | None]:
        """hidden [B, T, D] -> [B, T, D] and the window with the chunk written to it (None stays None)."""
        q = rotate(self.q(hidden).unflatten(-1, (self.heads, self.head_dim)), where.angles)
        k = rotate(self.k(hidden).unflatten(-1, (self.kv_heads, self.head_dim)), where.angles)
        v = self.v(hidden).unflatten(-1, (self.kv_heads, self.head_dim))
        keys, values, k_index = k, v, where.index
        if state is not None:
            assert where.held is not None and where.target is not None
            keys = torch.cat([state.keys, k], dim=1)
            values = torch.cat([state.values, v], dim=1)
            k_index = torch.cat([where.held, where.index], dim=1)
            state = Window(memory.write(state.keys, where.target, k), memory.write(state.values, where.target, v))
        out = ops.attend(
            q=q,
            k=keys,
            v=values,
            q_index=where.index,
            k_index=k_index,
            window=self.window,
            sinks=self.sinks,
            q_segment=where.segment,
            k_segment=where.segment,
        )
        return self.o(out.flatten(2)), state
