"""Follow a frame: its tokens look back over the window -> hidden. The softmax mixer.

Attend, then write: a chunk attends over ring ++ chunk and only then writes its last tokens into the ring, so that any
chunking gives the same result.
"""

from __future__ import annotations

from torch import Tensor, nn

from infinitevl import ops
from infinitevl.config import TextConfig
from infinitevl.layers import Joint, RMSNorm, fan, in_fp8, side_by_side, sum_onto
from infinitevl.memory import Window
from infinitevl.ops.where import Where


class SoftmaxMixer(nn.Module):
    """Grouped-query attention with multimodal RoPE over a sliding window (or, without one, over everything)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.window, self.sinks = config.window, config.sinks
        size, bias = config.hidden_size, config.attention_bias
        self.q = nn.Linear(size, self.heads * self.head_dim, bias=bias)
        self.k = nn.Linear(size, self.kv_heads * self.head_dim, bias=bias)
        self.v = nn.Linear(size, self.kv_heads * self.head_dim, bias=bias)
        self.o = nn.Linear(self.heads * self.head_dim, size, bias=False)
        self.joint: Joint | None = None
        self.wide: Joint | None = None

    def fuse(self) -> None:
        """Lay the projections' weights side by side."""
        self.joint = side_by_side((self.q, self.k, self.v))

    def to_fp8(self) -> None:
        """The projections' weights in FP8."""
        self.joint, self.wide = in_fp8((self.q, self.k, self.v)), in_fp8((self.o,))

    def forward(
        self, hidden: Tensor, norm: RMSNorm, where: Where, state: Window | None
    ) -> tuple[Tensor, Window | None]:
        """hidden [B, T, D] -> hidden + mixed(norm(hidden)) and the window with the chunk written to it (None stays
        None)."""
        parts = fan(hidden, norm, (self.q, self.k, self.v), self.joint)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in parts)
        out, state = ops.attend(q=q, k=k, v=v, where=where, state=state, window=self.window, sinks=self.sinks)
        return sum_onto(hidden, out.flatten(2), self.o, self.wide), state
