"""Follow a frame: what was asked about it, and what it cost -> one picture: key frames, answers, memory and latency."""

from __future__ import annotations

import importlib.util
import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from infinitevl.files import written_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

FORMATS = ("png", "pdf", "svg")
COLUMNS = 4  # cards in a row
WIDTH, HEADING, PICTURE, LINE, CURVES = 13.0, 0.7, 2.25, 0.23, 2.8  # inches; of a card: its picture, a line below it
LETTERS = 32  # of a line; an answer, printed larger, has fewer
SIDE = 360  # pixels of a key frame's longer side, at most

INK, FAINT, RIGHT, WRONG, BLUE = "#1f2933", "#7b8794", "#1b7f3b", "#c0262d", "#2563a8"


class ReportError(ValueError):
    """A report that cannot be drawn; the message says what to do."""


class Point(NamedTuple):
    """What one frame cost: its time in seconds, milliseconds to take it in, and the bytes of the memory after it."""

    time: float
    milliseconds: float
    nbytes: int


class Moment(NamedTuple):
    """A question: the stream's time in seconds, the frame in view (uint8 [H, W, 3]), the words.

    truth: the right answer where it is known. evidence: when that was last in view, and the frame of that time.
    """

    time: float
    picture: np.ndarray
    question: str
    answer: str
    truth: str | None = None
    evidence: tuple[float, np.ndarray] | None = None

    @property
    def right(self) -> bool | None:
        """Whether the answer is exactly the truth; None where that is not known."""
        return None if self.truth is None else self.answer == self.truth


class Curve:
    """Points of a stream of any length in bounded room: when it is full every second one goes, and the next ones are
    taken half as often."""

    def __init__(self, most: int = 4096) -> None:
        self.points: list[Point] = []
        self._most, self._stride, self._count = most, 1, 0

    def add(self, point: Point) -> None:
        if self._count % self._stride == 0:
            self.points.append(point)
        self._count += 1
        if len(self.points) == self._most:
            self.points, self._stride = self.points[::2], self._stride * 2


def shown(seconds: float) -> str:
    """A time as people read it: 0:42, 61:07, and 0:42.5 where it is not a whole second."""
    tenths = math.floor(seconds * 10 + 1e-6)
    whole = f"{tenths // 600}:{tenths // 10 % 60:02d}"
    return f"{whole}.{tenths % 10}" if tenths % 10 else whole


def printable(words: str) -> str:
    """Words on one line; control characters, which would steer a terminal, become question marks."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(words.split()))


def key_frame(pixels: np.ndarray) -> np.ndarray:
    """A copy of uint8 [H, W, 3], shrunk to be kept for the report."""
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    return np.asarray(image)


def check(path: Path) -> None:
    """ReportError where `draw` could not write `path`: to be called before hours of work, not after."""
    if path.suffix.lstrip(".").lower() not in FORMATS:
        raise ReportError(f"{path}: a report is a picture; name it .{', .'.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ReportError("a report needs matplotlib: pip install 'infinitevl[synth]'")


def draw(path: str | Path, title: str, moments: Sequence[Moment], points: Sequence[Point]) -> None:
    """Write the report of a stream to `path`, whole or not at all.

    Above, a card for each moment: the frame in view, the question, the answer (green where right, red where wrong)
    and the truth. Below, over the stream's time: milliseconds per frame and bytes of the memory.
    """
    path = Path(path)
    check(path)
    from matplotlib.figure import Figure

    cards = [Card(moment, _lines(moment)) for moment in moments]
    rows = [cards[first : first + COLUMNS] for first in range(0, len(cards), COLUMNS)]
    heights = [HEADING, *(PICTURE + LINE * (1 + max(len(card.lines) for card in row)) for row in rows), CURVES]
    figure = Figure(figsize=(WIDTH, sum(heights)), facecolor="white", layout=None)
    heading, *places, curves = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _heading(heading, title, moments)
    for place, row, height in zip(places, rows, heights[1:-1], strict=True):
        for card, side in zip(row, place.subfigures(1, COLUMNS, squeeze=False)[0], strict=False):
            _card(side, card, height)
    _curves(curves, points)
    with written_aside(path) as aside, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # an answer may use letters that no bundled font has
        figure.savefig(aside, format=path.suffix[1:].lower(), dpi=110)


def _heading(figure: SubFigure, title: str, moments: Sequence[Moment]) -> None:
    _text(figure, 0.025, 0.5, title, size=16, weight="bold")
    judged = [moment.right for moment in moments if moment.right is not None]
    if judged:
        score = f"{sum(judged)} of {len(judged)} right"
        _text(figure, 0.975, 0.5, score, size=15, weight="bold", ha="right")


def _text(place: Figure | SubFigure, x: float, y: float, words: str, **style: Any) -> None:
    """Words as they are: a dollar sign begins no formula."""
    place.text(x, y, words, **{"va": "center", "color": INK, "parse_math": False, **style})


class Card(NamedTuple):
    """A moment and the lines under its picture, each with its style."""

    moment: Moment
    lines: list[tuple[str, dict[str, Any]]]


def _lines(moment: Moment) -> list[tuple[str, dict[str, Any]]]:
    colour = {True: RIGHT, False: WRONG, None: BLUE}[moment.right]
    question, answer = {"size": 10, "weight": "bold"}, {"size": 11, "weight": "bold", "color": colour}
    lines = [(line, question) for line in _wrapped(moment.question, LETTERS, 3)]
    lines += [(line, answer) for line in _wrapped(moment.answer or "(nothing)", LETTERS - 5, 6)]
    if moment.right is False:
        lines += [(line, {"size": 10, "color": FAINT}) for line in _wrapped(f"truth: {moment.truth}", LETTERS, 2)]
    return lines


def _wrapped(words: str, letters: int, most: int) -> list[str]:
    return textwrap.wrap(printable(words), letters, max_lines=most, placeholder=" ...")


def _card(figure: SubFigure, card: Card, height: float) -> None:
    """The frame in view; to its right, smaller, the one in which the answer was last in view; the words under them."""
    moment, bottom = card.moment, 1 - (PICTURE - 0.1) / height
    tall = (PICTURE - 0.45) / height
    now = figure.add_axes((0.1, bottom, 0.55 if moment.evidence else 0.88, tall))
    _picture(now, moment.picture, f"asked at {shown(moment.time)}", INK)
    if moment.evidence:
        time, picture = moment.evidence
        _picture(figure.add_axes((0.67, bottom, 0.31, tall)), picture, f"last seen {shown(time)}", FAINT)
    for number, (line, style) in enumerate(card.lines):
        _text(figure, 0.1, bottom - LINE * (number + 0.8) / height, line, **style)


def _picture(axes: Axes, picture: np.ndarray, title: str, colour: str) -> None:
    axes.imshow(picture, interpolation="lanczos")
    axes.set_anchor("SW")
    axes.set_title(title, size=9, color=colour, pad=4, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#cbd2d9")


def _curves(figure: SubFigure, points: Sequence[Point]) -> None:
    figure.subplots_adjust(left=0.06, right=0.975, bottom=0.2, top=0.86, wspace=0.16)
    latency, memory = figure.subplots(1, 2)
    times = [point.time for point in points]
    _curve(latency, times, [point.milliseconds for point in points], "milliseconds per frame")
    if points:
        middle = float(np.median([point.milliseconds for point in points]))
        latency.axhline(middle, color=FAINT, linewidth=0.8, linestyle="--")
        latency.set_title(f"milliseconds per frame, median {middle:.1f}", size=11, color=INK, loc="left")
    scale, unit = (2**20, "MiB") if points and points[-1].nbytes >= 2**20 else (2**10, "KiB")
    _curve(memory, times, [point.nbytes / scale for point in points], f"memory, {unit}")
    if points and len({point.nbytes for point in points}) == 1:
        memory.set_title(f"memory, {unit}: {points[-1].nbytes:,} bytes at every frame", size=11, color=INK, loc="left")


def _curve(axes: Axes, times: list[float], values: list[float], title: str) -> None:
    axes.plot(times, values, color=BLUE, linewidth=1.6, marker="." if len(times) < 3 else None)
    axes.set_title(title, size=11, color=INK, loc="left")
    top = np.percentile(values, 99) * 1.3 if values else 1.0  # the first frame, which warms up, may leave the picture
    axes.set_ylim(0, max(float(top), 1e-9))
    axes.set_xlabel("time of the stream", size=9, color=FAINT)
    axes.xaxis.set_major_formatter(lambda seconds, _: shown(max(seconds, 0.0)))
    axes.tick_params(colors=FAINT, labelsize=9)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
