"""Follow a frame: a seed -> a story (which sign, object, digit and state when and where) -> the numbers of every frame.

Everything here is arithmetic on whole batches of stories; no pixel is touched. Frame i of a story is at second t0 + i.
A frame is a gradient and eight *strips*, painted in order. A strip is a row of up to six cells of the atlas: a word is
a strip of letters, a group of objects a strip of shapes, a board one wide cell. All that a strip needs is a record of
59 whole numbers (see `STRIP`), so that both renderers compute the same texel of the same cell from integers alone.

Axes: B stories, F frames, E events of one kind (padded: what starts at or after F is never seen), S strips, C cells.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from . import atlas
from .words import HELDOUT_WORDS, TRAIN_WORDS

SIZE = 112  # pixels of a frame's side
CELLS = 6  # of a strip; the longest word
STRIPS = 8
CLUTTER, BOARD, WORD, EMBLEM, GROUP, PROPS = 0, 2, 3, 4, 5, 7  # painting order; clutter and groups are two strips each

# Where a strip's record holds what. Lengths are in 1/16 pixel, steps in texels per 16 pixels / 4096, shear in 1/256.
STRIP = 59
X, Y, STEP_X, STEP_Y, SHEAR = range(5)
GLYPH, RISE, ALPHA = slice(5, 11), slice(11, 17), slice(17, 23)  # one number a cell
FILL, EDGE = slice(23, 41), slice(41, 59)  # red, green, blue of each cell

# Where a frame's scene vector holds what: two colours, gradient (x, y, offset), gain, blur, noise in levels
GROUND, SLOPE, GAIN, BLUR, NOISE = slice(0, 6), slice(6, 9), 9, 10, 11
SCENE = 12

PAIRS = len(atlas.COLOURS) * len(atlas.SHAPES)  # pair = colour * 8 + shape
GHOSTS = 6  # words of a story that never appear: asked about as never seen
_BANDS = np.array([24, 48, 40])  # heights in pixels of the rows for props, sign and objects; their order varies
_ORDERS = np.array([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
_OUTLINE = 25  # grey level around shapes: white and yellow stay apart from a light ground
_ODD = np.array([1, 3, 5, 7, 9, 11])  # weights of the residue that keeps held-out strings apart

Range = tuple[int, int]  # both ends included
Array = np.ndarray


@dataclass(frozen=True)
class Split:
    """What may appear. Training shares no word, digit sample or seed with the held-out splits.

    Fonts are kept from training in HELDOUT_FONTS only, so that they are measured apart from the rest.
    words: of the list; heldout_strings: which part of random strings (see `_set_residue`); space: of seeds.
    """

    name: str
    words: tuple[str, ...]
    fonts: tuple[int, ...]
    digits: range
    space: int
    heldout_strings: bool


TRAIN = Split("train", TRAIN_WORDS, atlas.TRAIN_FONTS, range(atlas.HELDOUT_DIGITS), 1, False)
HELDOUT = Split("heldout", HELDOUT_WORDS, atlas.TRAIN_FONTS, range(atlas.HELDOUT_DIGITS, atlas.DIGIT_SAMPLES), 2, True)
HELDOUT_FONTS = Split("heldout_fonts", HELDOUT_WORDS, atlas.HELDOUT_FONTS, HELDOUT.digits, 3, True)


@dataclass(frozen=True)
class Setting:
    """How dense and how hard a story is. Durations and gaps in frames, both ends included.

    state_frames: between two changes of the door or the light. clutter: opacity of meaningless shapes, 0 to 1.
    noise: amplitude in levels of 255. blur: greatest share of a 3x3 smoothing. jitter: camera shake in pixels.
    latest_start: stories begin at a multiple of four seconds up to this one.
    """

    sign_frames: Range = (2, 5)
    sign_gaps: Range = (4, 12)
    letters: Range = (4, 6)
    random_share: float = 0.5
    object_frames: Range = (2, 5)
    object_gaps: Range = (14, 36)
    digit_frames: Range = (2, 5)
    digit_gaps: Range = (4, 16)
    state_frames: Range = (14, 60)
    clutter: float = 0.45
    noise: float = 10.0
    blur: float = 0.5
    jitter: float = 1.0
    latest_start: int = 0


READING = Setting(
    sign_frames=(1, 2),
    sign_gaps=(0, 1),
    letters=(1, 6),
    object_frames=(1, 3),
    object_gaps=(0, 2),
    digit_frames=(1, 3),
    digit_gaps=(0, 2),
    state_frames=(1, 4),
)
SHORT = Setting(
    sign_frames=(1, 4),
    sign_gaps=(0, 4),
    letters=(2, 6),
    object_frames=(2, 5),
    object_gaps=(2, 10),
    digit_frames=(1, 4),
    digit_gaps=(2, 8),
    state_frames=(4, 16),
)
LONG = Setting()
# between SHORT and LONG: denser than what is tested, so that a short story holds several things to recall
MIXED = Setting(
    sign_frames=(1, 4), sign_gaps=(1, 6), letters=(2, 6), object_gaps=(4, 14), digit_gaps=(2, 10), state_frames=(6, 24)
)
HELDOUT_SETTING = Setting()

MAX_SIGNS, MAX_GROUPS, MAX_DIGITS = 26, 8, 40  # of a story; groups for each of the two rows of objects


@dataclass(frozen=True)
class Events:
    """Things of one kind: visible in frames start <= f < end. Arrays [B, E], never seen where start >= F."""

    start: Array
    end: Array

    def at(self, frames: int) -> Array:
        """The event visible in each frame, E for none: int64 [B, F]. For events that follow each other."""
        stories, events = self.start.shape
        begun = np.zeros((stories, frames + 1), np.int64)
        np.add.at(begun, (np.arange(stories)[:, None], np.minimum(self.start, frames)), 1)
        latest = begun[:, :frames].cumsum(1) - 1
        over = np.arange(frames) >= np.take_along_axis(self.end, np.maximum(latest, 0), 1)
        return np.where((latest < 0) | over, events, latest)


@dataclass(frozen=True)
class Stories:
    """B stories of F frames: what happens in each (for questions) and the numbers of every frame (for pictures).

    letters: int8 [B, E + GHOSTS, 6], places in the alphabet, -1 after the end; the last GHOSTS words never appear.
    sign_pair: [B, E], colour * 8 + shape of each sign's emblem. group_pair, group_count: [B, E], groups of objects:
    first those of the upper row, then those of the lower; two may be visible at once.
    digit: [B, E] value shown. door, light: bool [B, F], open and on. spare: pairs that never appear, [B, >= 14].
    strips: int16 [B, F, 8, 59]. scene: float32 [B, F, 12]. grain: int32 [B, F], the seed of each frame's noise.
    """

    t0: Array
    signs: Events
    letters: Array
    sign_pair: Array
    groups: Events
    group_pair: Array
    group_count: Array
    digits: Events
    digit: Array
    door: Array
    light: Array
    spare: Array
    strips: Array
    scene: Array
    grain: Array

    @property
    def frames(self) -> int:
        return self.door.shape[1]

    def params(self) -> dict[str, Array]:
        """What the composer takes, stories and frames in one axis: {name: [B * F, ...]}."""
        return {
            "strips": self.strips.reshape(-1, STRIPS, STRIP),
            "scene": self.scene.reshape(-1, SCENE),
            "grain": self.grain.reshape(-1),
        }

    def word(self, b: int, sign: int) -> str:
        return "".join(atlas.ALPHABET[letter] for letter in self.letters[b, sign] if letter >= 0)


def make_stories(
    seed: int, streams: int, frames: int, split: Split, setting: Setting, t0: Array | None = None
) -> Stories:
    """`streams` stories of `frames` frames; the same arguments give the same stories.

    t0: [B] seconds, multiples of 4, at which the stories begin; None: drawn up to `setting.latest_start`.
    """
    rng = np.random.default_rng([split.space, seed])
    pairs = rng.random((streams, PAIRS)).argsort(1)
    starts = 4 * rng.integers(0, setting.latest_start // 4 + 1, streams)
    signs = _timeline(rng, streams, frames, setting.sign_frames, setting.sign_gaps, MAX_SIGNS)
    rows = [_timeline(rng, streams, frames, setting.object_frames, setting.object_gaps, MAX_GROUPS) for _ in range(2)]
    digits = _timeline(rng, streams, frames, setting.digit_frames, setting.digit_gaps, MAX_DIGITS)
    groups = Events(np.hstack([row.start for row in rows]), np.hstack([row.end for row in rows]))
    samples = rng.integers(split.digits.start, split.digits.stop, digits.start.shape)
    sign_pair, group_pair, spare = np.split(pairs, np.cumsum([signs.start.shape[1], groups.start.shape[1]]), 1)
    stories = Stories(
        t0=starts if t0 is None else t0,
        signs=signs,
        letters=_words(rng, streams, signs.start.shape[1] + GHOSTS, split, setting),
        sign_pair=sign_pair,
        groups=groups,
        group_pair=group_pair,
        group_count=rng.integers(1, 6, groups.start.shape),
        digits=digits,
        digit=atlas.digit_labels()[samples],
        door=_states(rng, streams, frames, setting.state_frames),
        light=_states(rng, streams, frames, setting.state_frames),
        spare=spare,
        strips=np.zeros((streams, frames, STRIPS, STRIP), np.int16),
        scene=_scene(rng, streams, frames, setting),
        grain=rng.integers(-(2**31), 2**31, (streams, frames), np.int32),
    )
    _stage(rng, stories, rows, samples, split, setting)
    return stories


def _stage(
    rng: np.random.Generator, stories: Stories, rows: list[Events], samples: Array, split: Split, setting: Setting
) -> None:
    """Fill in `stories.strips`: where everything that happens is seen, and how it looks."""
    strips = stories.strips
    streams, frames = strips.shape[:2]
    props, sign, objects = _bands(rng, streams).T
    for strip in range(CLUTTER, BOARD):
        _play(strips, strip, *_clutter(rng, streams, frames, strip, setting))
    _play_signs(rng, stories, sign, split)
    counts, pairs = np.split(stories.group_count, 2, 1), np.split(stories.group_pair, 2, 1)
    for row in range(2):
        table, drift = _group_strips(rng, counts[row], pairs[row], objects + row * _BANDS[2] // 2)
        _play(strips, GROUP + row, rows[row], table, drift)
    _play_props(rng, stories, props, samples)
    reach = round(setting.jitter * 16)
    strips[..., X : Y + 1] += rng.integers(-reach, reach + 1, (streams, frames, 1, 2), np.int16)


def _bands(rng: np.random.Generator, streams: int) -> Array:
    """The top row of the bands of props, sign and objects, int [B, 3]: one of six orders for each story."""
    tops = np.zeros_like(_ORDERS)
    for row, order in enumerate(_ORDERS):
        tops[row, order] = np.cumsum(_BANDS[order]) - _BANDS[order]
    return tops[rng.integers(0, len(_ORDERS), streams)]


def _timeline(rng: np.random.Generator, streams: int, frames: int, lasts: Range, gaps: Range, most: int) -> Events:
    """Events one after another, at most `most`, with a gap before each; times past the end mean never."""
    events = min(most, frames // (lasts[0] + gaps[0]) + 1)
    last = rng.integers(lasts[0], lasts[1] + 1, (streams, events))
    gap = rng.integers(gaps[0], gaps[1] + 1, (streams, events))
    gap[:, 0] = rng.integers(0, gaps[1] + 1, streams)
    start = (gap + last).cumsum(1) - last
    return Events(start, np.minimum(start + last, frames))


def _states(rng: np.random.Generator, streams: int, frames: int, every: Range) -> Array:
    """A thing with two states that changes now and then, bool [B, F]."""
    changes = frames // every[0] + 1
    at = rng.integers(every[0], every[1] + 1, (streams, changes)).cumsum(1)
    flips = np.zeros((streams, frames + 1), np.int64)
    np.add.at(flips, (np.arange(streams)[:, None], np.minimum(at, frames)), 1)
    return (flips[:, :frames].cumsum(1) + rng.integers(0, 2, (streams, 1))) % 2 == 1


def _words(rng: np.random.Generator, streams: int, count: int, split: Split, setting: Setting) -> Array:
    """Words as places in the alphabet, int8 [B, count, 6]; list words differ within a story."""
    shortest, longest = setting.letters
    length = rng.integers(shortest, longest + 1, (streams, count, 1))
    letters = rng.integers(0, len(atlas.ALPHABET), (streams, count, CELLS))
    _set_residue(letters, length, split.heldout_strings)
    letters = np.where(np.arange(CELLS) < length, letters, -1)
    listed = _listed(split.words, shortest, longest)
    if len(listed):
        chosen = rng.random((streams, len(listed))).argsort(1)[:, :count]
        letters = np.where(rng.random((streams, count, 1)) < setting.random_share, letters, listed[chosen])
    return letters.astype(np.int8)


def _set_residue(letters: Array, length: Array, heldout: bool) -> None:
    """Keep random strings of four and more apart: a weighted sum of letters is 7 modulo 8 in held-out ones only.

    Only the last letter moves, and the weights are odd, so each is its own inverse modulo 8.
    """
    last = length - 1
    residue = np.where(np.arange(CELLS) <= last, letters * _ODD, 0).sum(2, keepdims=True) % 8
    move = (7 - residue) if heldout else (residue == 7) * 1
    move = np.where(length >= 4, move * _ODD[last], 0)
    moved = (np.take_along_axis(letters, last, 2) + move) % len(atlas.ALPHABET)
    np.put_along_axis(letters, last, moved, 2)


@functools.cache
def _listed(words: tuple[str, ...], shortest: int, longest: int) -> Array:
    """The list's words of a length, as places in the alphabet, int64 [words, 6]."""
    fit = [word for word in words if shortest <= len(word) <= longest]
    rows = [[atlas.ALPHABET.index(letter) for letter in word] + [-1] * (CELLS - len(word)) for word in fit]
    return np.array(rows, np.int64).reshape(-1, CELLS)


def _step(texels: int, pixels: Array) -> Array:
    """How many texels a sixteenth of a pixel is, in 1/4096."""
    return np.rint(texels * 256 / pixels)


def _between(rng: np.random.Generator, low: Array | float, high: Array | float, shape: tuple[int, ...]) -> Array:
    """Uniform numbers from low to high; where there is no room between them, low."""
    return low + np.maximum(np.asarray(high) - low, 0) * rng.random(shape, np.float32)


def _table(shape: tuple[int, ...], x: Array, y: Array, wide: Array, high: Array) -> Array:
    """Records of strips at x, y (pixels) with cells of wide x high pixels, all cells blank: int16 [*shape, 59]."""
    table = np.zeros((*shape, STRIP), np.int16)
    table[..., X], table[..., Y] = np.rint(x * 16), np.rint(y * 16)
    table[..., STEP_X], table[..., STEP_Y] = _step(atlas.CELL_W, wide), _step(atlas.CELL_H, high)
    return table


def _paint(table: Array, fill: Array, edge: Array) -> None:
    """Give all cells of each record the same two colours, [..., 3] each."""
    table[..., FILL] = np.concatenate([fill] * CELLS, -1)
    table[..., EDGE] = np.concatenate([edge] * CELLS, -1)


def _play(strips: Array, strip: int, events: Events, table: Array, drift: Array) -> None:
    """Write the record of the event visible in each frame, moved by `drift` [B, E, 2] (1/16 pixel a frame)."""
    frames = strips.shape[1]
    now = events.at(frames)
    stories, kinds = events.start.shape
    there = (now < kinds)[..., None]
    row = np.minimum(now, kinds - 1) + kinds * np.arange(stories)[:, None]
    since = np.arange(frames) - events.start.reshape(-1)[row]
    record = table.reshape(-1, STRIP)[row]
    record[..., X : Y + 1] += (drift.reshape(-1, 2)[row] * since[..., None]).astype(np.int16)
    strips[:, :, strip] = np.where(there, record, 0)


def _play_signs(rng: np.random.Generator, stories: Stories, band: Array, split: Split) -> None:
    """Board, word and emblem of every sign."""
    signs, shape = stories.signs, stories.signs.start.shape
    letters = stories.letters[:, : shape[1]]
    length = (letters >= 0).sum(2)
    wide = np.minimum(_between(rng, 11, 17, shape), 100 / length)
    high = np.minimum(wide * _between(rng, 1.35, 1.6, shape), 24)
    size = _between(rng, 15, 18.5, shape)
    x, y, box = _layout(rng, length * wide, high, size)
    left, top, drift = _way(rng, signs, box, band[:, None])
    ink, paper = _inks(rng, shape)
    board = _table(shape, left, top, box[0], box[1])
    board[..., GLYPH.start], board[..., ALPHA.start] = atlas.BOARD, 255
    _paint(board, paper, np.clip(paper + np.where(paper > 128, -60, 60), 0, 255))
    word = _table(shape, left + x[0], top + y[0], wide, high)
    font = np.array(split.fonts)[rng.integers(0, len(split.fonts), (*shape, 1))]
    word[..., GLYPH] = np.where(letters >= 0, atlas.LETTER0 + font * len(atlas.ALPHABET) + letters, atlas.BLANK)
    word[..., ALPHA] = 255
    _paint(word, ink, paper)
    emblem = _table(shape, left + x[1], top + y[1], size, size)
    emblem[..., GLYPH.start], emblem[..., ALPHA.start] = atlas.SHAPE0 + stories.sign_pair % len(atlas.SHAPES), 255
    _paint(emblem, _colours(rng, stories.sign_pair), np.full(3, _OUTLINE))
    for strip, table in ((BOARD, board), (WORD, word), (EMBLEM, emblem)):
        _play(stories.strips, strip, signs, table, drift)


def _layout(rng: np.random.Generator, wide: Array, high: Array, size: Array) -> tuple[Array, Array, Array]:
    """Where word and emblem lie on a board: x [2, B, E], y [2, B, E], and the board's width and height [2, B, E].

    The emblem is above or below the word, or left or right of it where that fits.
    """
    beside = (wide + size + 10 <= SIZE - 4) & (rng.random(wide.shape) < 0.5)
    second = rng.random(wide.shape) < 0.5  # the emblem comes after the word
    width = np.where(beside, wide + size + 8, np.maximum(wide, size) + 6)
    height = np.where(beside, np.maximum(high, size), high + size) + 4
    apart = _between(rng, 3, width - 3 - size, wide.shape)
    word_x = np.where(beside, np.where(second, 3, size + 5), (width - wide) / 2)
    emblem_x = np.where(beside, np.where(second, wide + 5, 3), apart)
    word_y = np.where(beside, (height - high) / 2, np.where(second, 2, size + 2))
    emblem_y = np.where(beside, (height - size) / 2, np.where(second, high + 2, 2))
    return np.stack([word_x, emblem_x]), np.stack([word_y, emblem_y]), np.stack([width, height])


def _way(rng: np.random.Generator, signs: Events, box: Array, band: Array) -> tuple[Array, Array, Array]:
    """Where signs of a size begin, left and top in pixels [B, E], and a slow drift [B, E, 2] in 1/16 pixel a frame.

    Start and end lie inside the frame and the band.
    """
    shape = signs.start.shape
    right, bottom = np.maximum(SIZE - 1 - box[0], 1), band + np.maximum(_BANDS[1] - box[1], 0)
    left, top = _between(rng, 1, right, shape), _between(rng, band, bottom, shape)
    end_x = np.clip(left + _between(rng, -4, 4, shape), 1, right)
    end_y = np.clip(top + _between(rng, -3, 3, shape), band, bottom)
    steps = np.maximum(signs.end - signs.start, 1)
    return left, top, np.trunc(np.stack([(end_x - left) / steps, (end_y - top) / steps], -1) * 16)


def _inks(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Two far-apart colours, ink and paper, [*shape, 3] each: dark on light or light on dark."""
    dark = rng.integers(5, 75, (*shape, 3))
    light = rng.integers(175, 250, (*shape, 3))
    swap = rng.random((*shape, 1)) < 0.4
    return np.where(swap, light, dark), np.where(swap, dark, light)


def _colours(rng: np.random.Generator, pairs: Array) -> Array:
    """The colour of each pair, a little different each time, int [..., 3]."""
    named = np.array(atlas.PALETTE)[pairs // len(atlas.SHAPES)]
    return np.clip(named + rng.integers(-10, 11, named.shape), 0, 255)


def _group_strips(rng: np.random.Generator, count: Array, pairs: Array, top: Array) -> tuple[Array, Array]:
    """Objects of one row: `count` equal shapes in some of six cells; records [B, E, 59] and no drift [B, E, 2]."""
    shape = count.shape
    size = _between(rng, 15, 18, shape)
    x = _between(rng, 1, SIZE - 1 - CELLS * size, shape)
    y = top[:, None] + _between(rng, 1, 19 - size, shape)
    table = _table(shape, x, y, size, size)
    there = rng.random((*shape, CELLS)).argsort(-1) < count[..., None]
    table[..., GLYPH] = np.where(there, (atlas.SHAPE0 + pairs % len(atlas.SHAPES))[..., None], atlas.BLANK)
    table[..., RISE] = rng.integers(-16, 17, (*shape, CELLS))
    table[..., ALPHA] = 255
    _paint(table, _colours(rng, pairs), np.full(3, _OUTLINE))
    return table, rng.integers(-6, 7, (*shape, 2)) * np.array([1, 0])


def _clutter(
    rng: np.random.Generator, streams: int, frames: int, strip: int, setting: Setting
) -> tuple[Events, Array, Array]:
    """Meaningless drifting shapes over the whole frame: small ones in strip 0, large ones in strip 1."""
    lasts = 24
    events = _timeline(rng, streams, frames, (lasts, lasts), (0, 0), frames // lasts + 2)
    shape = events.start.shape
    wide = _between(rng, 12, 21, shape) * (1 + strip)
    table = _table(shape, _between(rng, -40 * strip - 10, 10, shape), np.zeros(shape), wide, wide * 1.5)
    cells = (*shape, CELLS)
    table[..., GLYPH] = atlas.CLUTTER0 + rng.integers(0, atlas.CLUTTERS, cells)
    table[..., RISE] = rng.integers(-20 * 16, 100 * 16, cells)
    table[..., ALPHA] = rng.random(cells) * (255 * setting.clutter)
    table[..., SHEAR] = rng.integers(-90, 91, shape)
    table[..., FILL] = table[..., EDGE] = rng.integers(20, 236, (*shape, 18))
    return events, table, rng.integers(-14, 15, (*shape, 2))


def _play_props(rng: np.random.Generator, stories: Stories, top: Array, samples: Array) -> None:
    """Door and light, each in a cell of its own for the whole story, and digits in the other four in turn."""
    strip, door, light = stories.strips[:, :, PROPS], stories.door, stories.light[..., None]
    streams, frames = door.shape
    shape = (streams, 1)
    strip[:] = _table(shape, np.full(shape, 2.0), top[:, None] + 0.5, np.full(shape, 18), np.full(shape, 23))
    place = rng.random((streams, CELLS)).argsort(1)
    wood = rng.integers([90, 50, 20], [190, 130, 90], (streams, 1, 3))
    wood = np.where(door[..., None], wood + 50, wood)  # an open door's panel is seen from the side, in the light
    _set_cell(strip, place[:, :1], np.where(door, atlas.OPEN, atlas.CLOSED), wood, np.full(3, 15))
    bulb = np.where(light, np.array([255, 240, 130]), np.array([60, 60, 75]))
    _set_cell(strip, place[:, 1:2], np.full(door.shape, atlas.LIGHT), bulb, np.full(3, 110))
    shown, kinds = stories.digits.at(frames), samples.shape[1]
    number = atlas.DIGIT0 + np.take_along_axis(samples, np.minimum(shown, kinds - 1), 1)
    ink, paper = _inks(rng, shape)
    spot = np.take_along_axis(place, 2 + shown % 4, 1)
    _set_cell(strip, spot, np.where(shown < kinds, number, atlas.BLANK), ink, paper)


def _set_cell(strip: Array, cell: Array, glyph: Array, fill: Array, edge: Array) -> None:
    """Put glyph [B, F] with its colours in cell [B, F or 1] of each frame's record in strip [B, F, 59]."""
    rows, frame = np.ogrid[: strip.shape[0], : strip.shape[1]]
    strip[rows, frame, GLYPH.start + cell] = glyph
    strip[rows, frame, ALPHA.start + cell] = np.where(glyph == atlas.BLANK, 0, 255)
    for channel in range(3):
        strip[rows, frame, FILL.start + 3 * cell + channel] = fill[..., channel]
        strip[rows, frame, EDGE.start + 3 * cell + channel] = edge[..., channel]


def _scene(rng: np.random.Generator, streams: int, frames: int, setting: Setting) -> Array:
    """Ground, light and lens of every frame, float32 [B, F, 12]; the light swings slowly."""
    scene = np.empty((streams, frames, SCENE), np.float32)
    scene[..., GROUND] = rng.integers(30, 225, (streams, 1, 6))
    turn = rng.uniform(0, 2 * np.pi, (streams, 1)) + np.arange(frames) * rng.uniform(-0.02, 0.02, (streams, 1))
    reach = rng.uniform(0.4, 1.2, (streams, 1)) / SIZE
    along, across = np.cos(turn) * reach, np.sin(turn) * reach
    scene[..., SLOPE] = np.stack([along, across, 0.5 - (along + across) * SIZE / 2], -1)
    swing = np.sin(np.arange(frames) * rng.uniform(0.03, 0.3, (streams, 1)) + rng.uniform(0, 6.3, (streams, 1)))
    scene[..., GAIN] = rng.uniform(0.85, 1.1, (streams, 1)) + 0.08 * swing
    scene[..., BLUR] = rng.uniform(0, setting.blur, (streams, 1))
    scene[..., NOISE] = rng.uniform(0, setting.noise, (streams, 1))
    return scene
