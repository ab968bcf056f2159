"""Follow a frame: one frame's numbers -> its pixels, in plain numpy: the definition that `compose` must equal."""

from __future__ import annotations

import numpy as np

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
    Stories,
    X,
    Y,
)

_CENTRES = np.arange(SIZE) * 16 + 8  # of pixels, in 1/16 pixel


def render(stories: Stories, b: int, f: int) -> np.ndarray:
    """Frame f of story b, uint8 [112, 112, 3], by painting one strip after another on the ground."""
    scene = stories.scene[b, f].astype(np.float64)
    canvas = _ground(scene)
    for strip in range(STRIPS):
        record = stories.strips[b, f, strip].astype(int)
        for column in range(SIZE):
            _paint_column(canvas[:, column], record, column)
    canvas = (1 - scene[BLUR]) * canvas + scene[BLUR] * _smooth(canvas)
    canvas = canvas * scene[GAIN] + _noise(int(stories.grain[b, f])) * scene[NOISE] / 127.5
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def _ground(scene: np.ndarray) -> np.ndarray:
    """Two colours, one fading into the other along a line."""
    near, far = scene[GROUND].reshape(2, 3)
    x, y, offset = scene[SLOPE]
    pixel = np.arange(SIZE) + 0.5
    share = np.clip(x * pixel[None, :] + y * pixel[:, None] + offset, 0, 1)[..., None]
    return near * (1 - share) + far * share


def _paint_column(pixels: np.ndarray, record: np.ndarray, column: int) -> None:
    """Paint what a strip has in one picture column; pixels [112, 3] changes in place."""
    along = _CENTRES[column] - record[X]
    cell, texel_x = divmod(along * record[STEP_X] >> 12, atlas.CELL_W)
    if not 0 <= cell < CELLS or record[GLYPH][cell] == atlas.BLANK:
        return
    top = record[Y] + record[RISE][cell] + (along * record[SHEAR] >> 8)
    texel_y = np.clip((_CENTRES - top) * record[STEP_Y] >> 12, 0, atlas.CELL_H - 1)
    value = atlas.atlas()[record[GLYPH][cell], texel_y, texel_x, None].astype(np.float64)
    alpha = record[ALPHA][cell] / 255
    outline, inside = np.minimum(value / 128, 1), np.maximum(value - 128, 0) / 127
    edge, fill = record[EDGE].reshape(CELLS, 3)[cell], record[FILL].reshape(CELLS, 3)[cell]
    paint = edge * (1 - inside) + fill * inside
    pixels[:] = pixels * (1 - outline * alpha) + paint * outline * alpha


def _smooth(canvas: np.ndarray) -> np.ndarray:
    """Weights 1 2 1 in both directions; the border repeats outwards."""
    wide = np.pad(canvas, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = wide[:-2] / 4 + wide[1:-1] / 2 + wide[2:] / 4
    return rows[:, :-2] / 4 + rows[:, 1:-1] / 2 + rows[:, 2:] / 4


def _noise(grain: int) -> np.ndarray:
    """A hash of pixel number and grain, one byte a channel, -127.5 to 127.5: [112, 112, 3]."""
    number = np.arange(SIZE * SIZE, dtype=np.uint32).reshape(SIZE, SIZE)
    mixed: np.ndarray = (number * np.uint32(747796405)) ^ np.uint32(grain & 0xFFFFFFFF)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(739982445)
    mixed = (mixed ^ (mixed >> 12)) * np.uint32(695872825)
    mixed ^= mixed >> 15
    return np.stack([(mixed >> shift) & 255 for shift in (0, 8, 16)], -1).astype(np.float64) - 127.5
