"""Follow a frame: its place in time, rows and columns -> positions [3, B, T], integers, as multimodal RoPE wants them.

The rule is that of the published checkpoints (transformers 4.57): a picture's tokens share a temporal position, and
text continues at the greatest position so far plus one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from infinitevl import ops
from infinitevl.config import ModelConfig, TextConfig
from infinitevl.memory import Memory


class Angles(NamedTuple):
    """Cosine and sine of the rotation of each token, float32 [B, T, hd], for the rotate-half convention."""

    cos: Tensor
    sin: Tensor


class Grid(NamedTuple):
    """Patches of one image or video of a prompt: temporal, rows, columns (before merging)."""

    time: int
    rows: int
    columns: int
    seconds: float = 0.0  # seconds per temporal grid; 0 for images


def angles(positions: Tensor, config: TextConfig) -> Angles:
    """Angles of mRoPE positions [3, B, T]: each range of frequencies follows time, row or column (`mrope_sections`)."""
    frequency = _frequency(config.rope_theta, config.head_dim // 2, positions.device)
    return Angles(*ops.angles(positions=positions, frequency=frequency, sections=config.mrope_sections))


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _frequency(theta: float, half: int, device: torch.device) -> Tensor:
    """float64 [half], made once: on a GPU every launch of a token counts."""
    return theta ** (-torch.arange(half, dtype=torch.float64, device=device) / half)


def next_text(memory: Memory, length: int, there: Tensor | None = None) -> tuple[Tensor, Memory]:
    """Positions [3, B, length] of text that follows, and the memory with its run of frames ended.

    there: bool [B], the rows that the text is for; None: all. The others' clocks stay.
    """
    at = memory.clock[:, None] + torch.arange(length, device=memory.clock.device)
    start = torch.full_like(memory.start, torch.nan) if there is None else memory.start.masked_fill(there, torch.nan)
    return at.expand(3, -1, -1), memory._replace(start=start)


def next_frame(
    memory: Memory, time: Tensor, rows: int, columns: int, config: ModelConfig, there: Tensor | None = None
) -> tuple[Tensor, Memory]:
    """Positions [3, B, rows * columns] of a frame at `time` (seconds, float64 [B]) and the memory, its run extended.

    rows, columns count tokens. t = origin + floor(tokens_per_second * (time - start)), h = origin + row,
    w = origin + column, where origin is the position at which this run of frames began and start its first time.
    there: bool [B], the rows that have a frame; None: all. The others' clocks stay; their positions mean nothing.
    """
    there = torch.ones_like(memory.start, dtype=torch.bool) if there is None else there
    fresh = memory.start.isnan() & there
    origin = torch.where(fresh, memory.clock, memory.origin)
    start = torch.where(fresh, time, memory.start)
    t = origin + (config.vision.tokens_per_second * (time - start)).floor().long()
    places = origin[None, :, None] + grid(rows, columns, time.device)
    positions = torch.cat([t[None, :, None].expand(-1, -1, rows * columns), places])
    last = torch.where(there, time, memory.last)
    return positions, memory._replace(frames=memory.frames + there, origin=origin, start=start, last=last)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def grid(rows: int, columns: int, device: torch.device) -> Tensor:
    """Row and column of every token of a frame, [2, 1, rows * columns]."""
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    return torch.stack([row, torch.arange(columns, device=device).repeat(rows)])[:, None]


def prompt(
    ids: Tensor, images: Sequence[Grid], videos: Sequence[Grid], config: ModelConfig, present: Tensor | None = None
) -> Tensor:
    """Positions [3, B, T] of whole prompts: ids [B, T] with image and video tokens, grids in the order they appear.

    present bool [B, T] marks real tokens; the others get position 0. Raises ValueError where tokens and grids differ.
    """
    left = {config.image_token: list(images), config.video_token: list(videos)}
    positions = torch.zeros(3, *ids.shape, dtype=torch.int64)
    there = torch.ones_like(ids, dtype=torch.bool) if present is None else present
    for row in range(ids.shape[0]):
        keep = there[row].cpu()
        positions[:, row, keep] = _prompt_row(ids[row].cpu()[keep].tolist(), left, config)
    if left[config.image_token] or left[config.video_token]:
        raise ValueError(f"{sum(map(len, left.values()))} pictures more than the prompt has places for")
    return positions.to(ids.device)


def _prompt_row(ids: list[int], left: dict[int, list[Grid]], config: ModelConfig) -> Tensor:
    parts: list[Tensor] = []
    at = clock = 0
    while at < len(ids):
        if ids[at] in left:
            part = clock + _grid_positions(_next_grid(left, ids, at, config), config)
        else:
            end = next((i for i in range(at, len(ids)) if ids[i] in left), len(ids))
            part = (clock + torch.arange(end - at)).expand(3, -1)
        parts.append(part)
        at += part.shape[1]
        clock = int(part.max()) + 1
    return torch.cat(parts, dim=1) if parts else torch.zeros(3, 0, dtype=torch.int64)


def _next_grid(left: dict[int, list[Grid]], ids: list[int], at: int, config: ModelConfig) -> Grid:
    token = ids[at]
    if not left[token]:
        raise ValueError("the prompt has places for more pictures than were given")
    grid = left[token].pop(0)
    count = grid.time * grid.rows * grid.columns // config.vision.merge_size**2
    if ids[at : at + count] != [token] * count:
        raise ValueError(f"a picture of {count} tokens does not fit its place in the prompt (token {at})")
    return grid


def _grid_positions(grid: Grid, config: ModelConfig) -> Tensor:
    merge = config.vision.merge_size
    # seconds per grid are cut to an integer before they are multiplied: the rule the checkpoints were trained with
    step = int(grid.seconds) * config.vision.tokens_per_second
    t = torch.arange(grid.time) * step
    rows, columns = torch.arange(grid.rows // merge), torch.arange(grid.columns // merge)
    return torch.stack([axis.flatten() for axis in torch.meshgrid(t, rows, columns, indexing="ij")])
