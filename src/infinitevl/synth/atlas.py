"""Follow a frame: before it, the atlas: every letter, shape, digit and prop as one 32x48 cell of coverage, drawn once.

A cell's texel tells two coverages at once: from 0 to 128 the outline's grows from none to full, from 128 to 255 the
fill takes over. So one look-up paints an outlined shape, an ink on a card or a plain letter (outline in the board's
colour). The first and last rows of a cell are empty, and so is glyph 0: what lies outside a cell reads nothing.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

CELL_W, CELL_H = 32, 48  # texels of a cell; about 2.3 for a pixel of a frame
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234679"  # without 0 1 5 8, which O I S B are mistaken for
SHAPES = ("circle", "square", "triangle", "star", "diamond", "heart", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white")
PALETTE = ((220, 35, 35), (245, 135, 15), (250, 230, 40), (30, 165, 60), (40, 95, 230), (150, 45, 190), (246, 246, 246))
FONTS = (
    "DejaVuSans-Bold",
    "DejaVuSans",
    "DejaVuSans-Oblique",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono",
    "DejaVuSerif",
    "DejaVuSerif-Italic",
    "cmb10",
    "cmtt10",
    "cmr10",
    "STIXGeneralBolIta",
    "Pillow",
    # held out from training
    "cmss10",
    "DejaVuSerif-Bold",
    "STIXGeneralBol",
)
TRAIN_FONTS, HELDOUT_FONTS = tuple(range(12)), (12, 13, 14)
DIGIT_SAMPLES = 1797
HELDOUT_DIGITS = 1437  # samples from this one on are never trained on: the set is ordered by writer

# glyph numbers
BLANK, SHAPE0 = 0, 1
BOARD, CLOSED, OPEN, LIGHT, CLUTTER0, CLUTTERS = 9, 10, 11, 12, 13, 8
LETTER0 = CLUTTER0 + CLUTTERS
DIGIT0 = LETTER0 + len(FONTS) * len(ALPHABET)
GLYPHS = DIGIT0 + DIGIT_SAMPLES

_FINE = 4  # cells are drawn this many times finer and then averaged
_STROKE = 5  # a letter's strokes grow by that much of 200: hairlines would vanish in cells of 11 pixels
_W, _H = CELL_W * _FINE, CELL_H * _FINE
Polygon = list[tuple[float, float]]


@functools.cache
def atlas() -> np.ndarray:
    """All cells, uint8 [GLYPHS, 48, 32]. Needs the [synth] extra."""
    cells = np.zeros((GLYPHS, CELL_H, CELL_W), np.uint8)
    for number, shape in enumerate(SHAPES):
        cells[SHAPE0 + number] = _shape(shape)
    cells[BOARD] = _board()
    cells[CLOSED], cells[OPEN], cells[LIGHT] = _door(0.78), _door(0.2), _light()
    for number in range(CLUTTERS):
        cells[CLUTTER0 + number] = _clutter(number)
    for number, name in enumerate(FONTS):
        first = LETTER0 + number * len(ALPHABET)
        cells[first : first + len(ALPHABET)] = _letters(name)
    cells[DIGIT0:] = _digits()
    cells[:, [0, -1]] = 0
    return cells


@functools.cache
def digit_labels() -> np.ndarray:
    """What each handwritten sample shows, int8 [1797]."""
    return _extra("sklearn.datasets").load_digits().target.astype(np.int8)


def _extra(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"the stream world needs {name}; install it with: pip install 'infinitevl[synth]'") from error


def _smooth(fine: Image.Image) -> np.ndarray:
    """A finely drawn cell -> texels, softened by about a pixel of a frame so that nearest look-up does not alias."""
    small = fine.resize((CELL_W, CELL_H), Image.Resampling.BOX)
    return np.asarray(small.filter(ImageFilter.BoxBlur(0.6)))


def _shape(name: str) -> np.ndarray:
    """A shape with an outline of one texel in sixteen, filling its cell."""
    outer, inner = Image.new("L", (_W, _H)), Image.new("L", (_W, _H))
    _draw_shape(ImageDraw.Draw(outer), name, 0.0)
    _draw_shape(ImageDraw.Draw(inner), name, 1.0)
    return _two_levels(outer, inner)


def _two_levels(outer: Image.Image, inner: Image.Image) -> np.ndarray:
    both = np.asarray(outer).astype(np.uint16) // 2 + np.asarray(inner).astype(np.uint16) // 2
    return _smooth(Image.fromarray(both.clip(0, 255).astype(np.uint8)))


def _draw_shape(draw: ImageDraw.ImageDraw, name: str, inset: float) -> None:
    edge = 0.03 + 0.075 * inset
    box = (edge * _W, edge * _H, (1 - edge) * _W, (1 - edge) * _H)
    if name in ("circle", "ring"):
        draw.ellipse(box, fill=255)
    else:
        draw.polygon([(x * _W, y * _H) for x, y in _shrunk(_outline(name), inset)], fill=255)
    if name == "ring":
        hole = 0.33 - 0.075 * inset
        draw.ellipse((hole * _W, hole * _H, (1 - hole) * _W, (1 - hole) * _H), fill=0)


def _shrunk(points: Polygon, inset: float) -> Polygon:
    """The polygon pulled towards its middle, so that its outline is about 0.075 of the cell wide."""
    middle_x, middle_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    keep = 1 - 0.2 * inset
    return [(middle_x + (x - middle_x) * keep, middle_y + (y - middle_y) * keep) for x, y in points]


def _outline(name: str) -> Polygon:
    """The shape's corners in a unit cell."""
    if name == "star":
        turns = np.arange(10) * np.pi / 5
        reach = np.where(np.arange(10) % 2, 0.23, 0.52)
        return list(zip(0.5 + reach * np.sin(turns), 0.54 - reach * np.cos(turns), strict=True))
    if name == "heart":
        turn = np.linspace(0, 2 * np.pi, 60, endpoint=False)
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        return list(zip(0.5 + 0.47 * np.sin(turn) ** 3, 0.45 - y * 0.47 / 16, strict=True))
    a, b = 0.35, 0.65
    return {
        "square": [(0.09, 0.09), (0.91, 0.09), (0.91, 0.91), (0.09, 0.91)],
        "triangle": [(0.5, 0.05), (0.97, 0.93), (0.03, 0.93)],
        "diamond": [(0.5, 0.02), (0.88, 0.5), (0.5, 0.98), (0.12, 0.5)],
        "cross": [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)],
    }[name]


def _board() -> np.ndarray:
    outer, inner = Image.new("L", (_W, _H)), Image.new("L", (_W, _H))
    ImageDraw.Draw(outer).rectangle((0, 0, _W, _H), fill=255)
    ImageDraw.Draw(inner).rectangle((0.02 * _W, 0.05 * _H, 0.98 * _W, 0.95 * _H), fill=255)
    return _two_levels(outer, inner)


def _door(width: float) -> np.ndarray:
    """A frame (outline) with a panel (fill) of that share of its width: wide when closed, narrow when open."""
    outer, inner = Image.new("L", (_W, _H)), Image.new("L", (_W, _H))
    ImageDraw.Draw(outer).rectangle((0.04 * _W, 0.04 * _H, 0.96 * _W, 0.96 * _H), fill=255)
    panel = ImageDraw.Draw(inner)
    panel.rectangle((0.11 * _W, 0.11 * _H, (0.11 + width) * _W, 0.96 * _H), fill=255)
    if width > 0.5:
        panel.ellipse((0.7 * _W, 0.5 * _H, 0.82 * _W, 0.6 * _H), fill=0)
    return _two_levels(outer, inner)


def _light() -> np.ndarray:
    """A bulb on its socket."""
    outer, inner = Image.new("L", (_W, _H)), Image.new("L", (_W, _H))
    ImageDraw.Draw(outer).ellipse((0.04 * _W, 0.03 * _H, 0.96 * _W, 0.76 * _H), fill=255)
    ImageDraw.Draw(outer).rectangle((0.3 * _W, 0.7 * _H, 0.7 * _W, 0.97 * _H), fill=255)
    ImageDraw.Draw(inner).ellipse((0.14 * _W, 0.11 * _H, 0.86 * _W, 0.68 * _H), fill=255)
    return _two_levels(outer, inner)


def _clutter(number: int) -> np.ndarray:
    """Blobs, bars and bent lines: things that mean nothing."""
    rng = np.random.default_rng([77, number])
    picture = Image.new("L", (_W, _H))
    draw = ImageDraw.Draw(picture)
    if number < 3:
        spots = rng.uniform(0.25, 0.75, (5, 2))
        for x, y in spots:
            r = rng.uniform(0.1, 0.25)
            draw.ellipse(((x - r) * _W, (y - r) * _H, (x + r) * _W, (y + r) * _H), fill=255)
    elif number < 6:
        points = [(x * _W, y * _H) for x, y in rng.uniform(0.05, 0.95, (4, 2))]
        draw.line(points, fill=255, width=int(_W * rng.uniform(0.06, 0.14)), joint="curve")
    else:
        draw.polygon([(x * _W, y * _H) for x, y in rng.uniform(0.05, 0.95, (5, 2))], fill=255)
    return _smooth(picture.filter(ImageFilter.GaussianBlur(6)))


def _font(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if name == "Pillow":
        return ImageFont.load_default(size)
    folder = Path(_extra("matplotlib").get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size)


def _letters(name: str) -> np.ndarray:
    """The alphabet in one font: on one baseline, capitals 0.74 of the cell high, wide ones squeezed to fit."""
    font = _font(name, 200)
    _, top, _, bottom = font.getbbox("H", anchor="ls", stroke_width=_STROKE)
    tall = 0.74 * _H / (bottom - top)
    return np.stack([_letter(font, mark, tall) for mark in ALPHABET])


def _letter(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, mark: str, tall: float) -> np.ndarray:
    left, top, right, bottom = (int(side) for side in font.getbbox(mark, anchor="ls", stroke_width=_STROKE))
    ink = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(ink).text((-left, -top), mark, fill=255, font=font, anchor="ls", stroke_width=_STROKE)
    wide = min((right - left) * tall * 1.04, 0.9 * _W)  # a frame's cells are about 1.5 times as high as wide
    high = min((bottom - top) * tall, 0.85 * _H)  # some fonts' J and Q reach far below the line
    ink = ink.resize((max(int(wide), 1), max(int(high), 1)), Image.Resampling.BILINEAR)
    cell = Image.new("L", (_W, _H))
    cell.paste(ink, (int((_W - wide) / 2), int(0.87 * _H + top * tall)))
    return _smooth(cell)


def _digits() -> np.ndarray:
    """Handwritten digits (scikit-learn's 8x8 samples, 0 to 16) as ink (fill) on a card (outline)."""
    samples = _extra("sklearn.datasets").load_digits().images / 16 * 255
    cells = np.full((DIGIT_SAMPLES, CELL_H, CELL_W), 128, np.uint8)
    inside = (CELL_W - 6, CELL_H - 8)
    for cell, sample in zip(cells, samples.astype(np.uint8), strict=True):
        ink = np.asarray(Image.fromarray(sample).resize(inside, Image.Resampling.BICUBIC)).astype(np.uint16)
        cell[4:-4, 3:-3] = 128 + ink * 127 // 255
    return cells
