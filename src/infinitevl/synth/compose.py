"""Follow a frame: a frame's numbers -> its pixels, for thousands of frames at once, in torch on any device.

The same picture as `render`, which says in plain words what is painted. Whole words are one look-up: pixel -> cell ->
texel of the atlas, in integers, so that every device reads the same texel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import atlas
from .world import (
    ALPHA,
    BLUR,
    CELLS,
    EDGE,
    FILL,
    GAIN,
    GLYPH,
    GROUND,
    NOISE,
    RISE,
    SHEAR,
    SIZE,
    SLOPE,
    STEP_X,
    STEP_Y,
    STRIPS,
    X,
    Y,
)

_TEXELS = atlas.CELL_W * atlas.CELL_H


class Composer:
    """Paints frames on `device`, `slice_frames` at a time (about 1 MB of scratch for each frame of a slice)."""

    def __init__(self, device: torch.device | str = "cpu", slice_frames: int | None = None) -> None:
        self.device = torch.device(device)
        self.slice_frames = slice_frames or (8 if self.device.type == "cpu" else 1024)
        self.atlas = torch.from_numpy(atlas.atlas().reshape(-1)).to(self.device)
        self.middle = torch.arange(SIZE, device=self.device, dtype=torch.int32) * 16 + 8  # pixel centres, 1/16 pixel
        number = torch.arange(SIZE * SIZE, device=self.device, dtype=torch.int32).view(SIZE, SIZE)
        self.salt = (
            number * 747796405
        )  # int32 wraps, here and in `_noise`; made once: a compiler would fold it too wide

    @torch.no_grad()
    def __call__(self, params: dict[str, Tensor]) -> Tensor:
        """`Stories.params()` as tensors ({name: [N, ...]}, any device) -> uint8 [N, 112, 112, 3]."""
        count = params["strips"].shape[0]
        out = torch.empty(count, SIZE, SIZE, 3, dtype=torch.uint8, device=self.device)
        for first in range(0, count, self.slice_frames):
            part = slice(first, first + self.slice_frames)
            strips, scene, grain = (params[name][part].to(self.device) for name in ("strips", "scene", "grain"))
            out[part] = self._frames(strips.int(), scene, grain).permute(0, 2, 3, 1)
        return out

    def _frames(self, strips: Tensor, scene: Tensor, grain: Tensor) -> Tensor:
        """One slice: [n, 8, 59], [n, 12], [n] -> uint8 [n, 3, 112, 112]."""
        canvas = self._ground(scene)
        cell, texel, top = self._columns(strips)
        for strip in range(STRIPS):
            record = strips[:, strip]
            value = self._texels(record, texel[:, strip], top[:, strip])
            _blend(canvas, value, record, cell[:, strip])
        canvas = _smooth(canvas, scene[:, BLUR, None, None, None]) * scene[:, GAIN, None, None, None]
        canvas += self._noise(grain) * (scene[:, NOISE, None, None, None] / 127.5)
        return canvas.add_(0.5).clamp_(0, 255).to(torch.uint8)

    def _ground(self, scene: Tensor) -> Tensor:
        x, y, offset = (scene[:, SLOPE.start + place, None, None] for place in range(3))
        pixel = self.middle.float() / 16
        share = (x * pixel + (y * pixel[:, None] + offset)).clamp_(0, 1)[:, None]
        near, far = scene[:, GROUND].unflatten(1, (2, 3, 1, 1)).unbind(1)
        return near + (far - near) * share

    def _columns(self, strips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For every strip and picture column: the cell, its first texel in the atlas plus the texel column, its top."""
        along = self.middle - strips[..., X, None]
        across = (along * strips[..., STEP_X, None]) >> 12
        cell = across >> 5  # 32 texels a cell
        outside = (cell < 0) | (cell >= CELLS)
        cell = cell.clamp(0, CELLS - 1).long()
        glyph = strips[..., GLYPH].gather(2, cell).masked_fill_(outside, atlas.BLANK)
        top = strips[..., Y, None] + strips[..., RISE].gather(2, cell) + ((along * strips[..., SHEAR, None]) >> 8)
        return cell, glyph * _TEXELS + (across & 31), top

    def _texels(self, record: Tensor, texel: Tensor, top: Tensor) -> Tensor:
        """The atlas's value under every pixel, float [n, 112, 112] in 0..255."""
        row = ((self.middle[:, None] - top[:, None]) * record[:, STEP_Y, None, None]) >> 12
        index = row.clamp_(0, atlas.CELL_H - 1).mul_(atlas.CELL_W).add_(texel[:, None])
        return self.atlas.index_select(0, index.flatten()).view(index.shape).float()

    def _noise(self, grain: Tensor) -> Tensor:
        """Hashed noise from -127.5 to 127.5, [n, 3, 112, 112]: a byte of the same integer for each channel."""
        mixed = self.salt ^ grain[:, None, None]
        mixed = (mixed ^ ((mixed >> 15) & 0x1FFFF)) * 739982445
        mixed = (mixed ^ ((mixed >> 12) & 0xFFFFF)) * 695872825
        mixed ^= (mixed >> 15) & 0x1FFFF
        return torch.stack([(mixed >> shift) & 255 for shift in (0, 8, 16)], 1) - 127.5


def _blend(canvas: Tensor, value: Tensor, record: Tensor, cell: Tensor) -> None:
    """Paint one strip on the canvas in place: its outline up to value 128, its fill from there on."""
    fill, edge = (_spread(record[:, colour], cell) for colour in (FILL, EDGE))
    alpha = record[:, ALPHA].gather(1, cell)[:, None] / 255  # [n, 1, 112]
    cover = (value / 128).clamp_(max=1).mul_(alpha)[:, None]
    inner = ((value - 128) / 127).clamp_(min=0).mul_(alpha)[:, None]
    canvas.mul_(1 - cover).addcmul_(edge, cover).addcmul_(fill - edge, inner)


def _spread(colours: Tensor, cell: Tensor) -> Tensor:
    """Colours of cells [n, 18] -> of picture columns [n, 3, 1, 112]."""
    by_cell = colours.unflatten(1, (CELLS, 3)).transpose(1, 2)
    return by_cell.gather(2, cell[:, None].expand(-1, 3, -1)).float()[:, :, None]


def _smooth(canvas: Tensor, share: Tensor) -> Tensor:
    """Mix in `share` of a 3x3 binomial smoothing; pixels outside repeat the border."""
    out = canvas
    for axis in (2, 3):
        first, last = out.narrow(axis, 0, 1), out.narrow(axis, SIZE - 1, 1)
        before = torch.cat([first, out.narrow(axis, 0, SIZE - 1)], axis)
        after = torch.cat([out.narrow(axis, 1, SIZE - 1), last], axis)
        out = (before + after).mul_(0.25).add_(out, alpha=0.5)
    return torch.lerp(canvas, out, share)
