"""Follow a frame: patches [F, P, 1176] -> visual tokens [F, P / 4, D]: patch embedding, blocks, merger.

Attention never crosses frames, so a frame is a row of a batch and every shape is static once its grid is known.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infinitevl import ops
from infinitevl.config import VisionConfig
from infinitevl.layers import GatedMLP, Joint, RMSNorm, fan, in_fp8, sum_onto, widened
from infinitevl.ops.where import Windows


class Layout(NamedTuple):
    """The order in which a grid's patches are worked on: window by window, so that a window is a run of patches.

    order [P]: the patch at each place. back [P / 4]: the place of each merged token. cos, sin float32 [1, P, hd]: the
    rotation at each place.
    """

    order: Tensor
    back: Tensor
    cos: Tensor
    sin: Tensor
    windows: Windows


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # or a layout first made there could never be trained with
def layout(rows: int, columns: int, config: VisionConfig, device: torch.device) -> Layout:
    """The layout of a grid of rows x columns patches, cut into windows from the top left."""
    merge = config.merge_size
    units = torch.arange(rows * columns // merge**2).view(rows // merge, columns // merge)
    side = config.window_pixels // config.patch_size // merge
    cuts = [part.flatten() for band in units.split(side, dim=0) for part in band.split(side, dim=1)]
    unit_order = torch.cat(cuts)
    inside = merge * merge
    order = (unit_order[:, None] * inside + torch.arange(inside)).flatten()
    sizes = [len(cut) * inside for cut in cuts]
    lengths, step = torch.tensor(sizes), torch.arange(max(sizes))
    there = step[None] < lengths[:, None]
    first = (lengths.cumsum(0) - lengths)[:, None]
    place = torch.where(there, first + step, first)
    grid = torch.arange(rows * columns).view(rows // merge, merge, columns // merge, merge)
    raster = grid.permute(0, 2, 1, 3).flatten()[order]
    phase = _phase(raster // columns, raster % columns, config)
    tensors = (order, unit_order.argsort(), phase.cos().float(), phase.sin().float(), place)
    order, back, cos, sin, place = (x.to(device) for x in tensors)
    return Layout(order, back, cos, sin, Windows(place, None if len(set(sizes)) == 1 else there.to(device)))


def _phase(row: Tensor, column: Tensor, config: VisionConfig) -> Tensor:
    """2D rotary, float64 [1, P, hd]: the first half of the frequencies follows rows, the second columns, in patches."""
    quarter = config.head_dim // 4
    frequency = config.rope_theta ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    phase = torch.cat([axis[:, None].double() * frequency for axis in (row, column)], dim=-1)
    return torch.cat([phase, phase], dim=-1)[None]


class VisionAttention(nn.Module):
    """Attention within each window, or within the whole frame."""

    def __init__(self, config: VisionConfig, windowed: bool) -> None:
        super().__init__()
        self.heads, self.windowed = config.num_heads, windowed
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.joint: Joint | None = None
        self.wide: Joint | None = None

    def fuse(self) -> None:
        """The output projection's bias as a column of its weight, 64 columns wider: it then costs nothing."""
        self.wide = widened(self.proj, self.proj.in_features + 64)

    def to_fp8(self) -> None:
        """Both projections' weights in FP8."""
        self.joint, self.wide = in_fp8((self.qkv,)), in_fp8((self.proj,))

    def forward(self, x: Tensor, norm: RMSNorm, where: Layout) -> Tensor:
        """x [F, P, D] in window order -> x + attention(norm(x)); x is consumed."""
        (qkv,) = fan(x, norm, (self.qkv,), self.joint)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))
        windows = where.windows if self.windowed else None
        wide = self.wide if self.wide is not None and self.wide.holds((self.proj,)) else None
        width = self.proj.in_features if wide is None else wide.weight.shape[1]
        out = ops.attend_patches(qkv=qkv, cos=where.cos, sin=where.sin, windows=windows, width=width)
        return sum_onto(x, out, self.proj, wide)


class VisionBlock(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: VisionConfig, windowed: bool) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = VisionAttention(config, windowed)
        self.norm2 = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, where: Layout) -> Tensor:
        """x [F, P, D] in window order -> the same, one block later; x is consumed."""
        return self.mlp(self.attention(x, self.norm1, where), self.norm2)


class Merger(nn.Module):
    """Four neighbouring patches -> one token of the language model; the norm comes first, GELU is exact."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.group = config.merge_size**2
        inner = config.hidden_size * self.group
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.up = nn.Linear(inner, inner)
        self.down = nn.Linear(inner, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[F, P, D] -> [F, P / 4, D of the language model]."""
        x = self.norm(x).unflatten(1, (-1, self.group)).flatten(2)
        return self.down(F.gelu(self.up(x)))


class Vision(nn.Module):
    """Qwen2.5-VL's vision encoder and merger."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.patch_dim, config.hidden_size, bias=False)
        full = config.full_attention_blocks
        self.blocks = nn.ModuleList(VisionBlock(config, number not in full) for number in range(config.depth))
        self.merger = Merger(config)

    def forward(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """patches [F, rows * columns, 1176] in merge order -> tokens [F, rows * columns / 4, D], row by row.

        Raises ValueError where the grid is not the patches' or does not divide into merged tokens.
        """
        config = self.config
        if patches.shape[1] != rows * columns or rows % config.merge_size or columns % config.merge_size:
            raise ValueError(
                f"{patches.shape[1]} patches are no grid of {rows} x {columns} in groups of {config.merge_size} x "
                f"{config.merge_size}"
            )
        where = layout(rows, columns, config, patches.device)
        x = self.embed(patches.to(self.embed.weight.dtype))[:, where.order]
        for block in self.blocks:
            x = block(x, where)
        return self.merger(x)[:, where.back]
