"""The report: what it shows, in which colours, and what it refuses."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infinitevl import report
from infinitevl.report import Curve, Moment, Point, ReportError, draw, shown

from .conftest import picture

POINTS = [Point(float(second), 20.0 + second % 3, 1_386_544) for second in range(30)]


def drawn(path: Path, *moments: Moment) -> np.ndarray:
    draw(path, "a $title with {things}", moments, POINTS)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def has(pixels: np.ndarray, colour: str) -> bool:
    wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return bool((np.abs(pixels.astype(int) - wanted).max(-1) < 4).sum() > 20)


def moment(answer: str, truth: str | None, evidence: bool = False) -> Moment:
    grey = np.full((112, 112, 3), 128, np.uint8)
    return Moment(10.0, grey, "what $was it?", answer, truth, (2.0, grey) if evidence else None)


@pytest.mark.parametrize(
    ("answer", "truth", "right"), [("ZEBRA", "ZEBRA", True), ("ZEBRA", "LION", False), ("ZEBRA", None, None)]
)
def test_right_is_green_and_wrong_is_red(tmp_path: Path, answer: str, truth: str | None, right: bool | None) -> None:
    pixels = drawn(tmp_path / "report.png", moment(answer, truth))
    assert moment(answer, truth).right is right
    assert (has(pixels, report.RIGHT), has(pixels, report.WRONG)) == (right is True, right is False)


def test_key_frames_are_in_it(tmp_path: Path) -> None:
    odd = np.full((112, 112, 3), (255, 0, 255), np.uint8)
    earlier = np.full((112, 112, 3), (0, 255, 255), np.uint8)
    pixels = drawn(tmp_path / "report.png", Moment(10.0, odd, "q", "a", None, (2.0, earlier)))
    big, small = ((np.abs(pixels.astype(int) - colour).max(-1) < 8).sum() for colour in ((255, 0, 255), (0, 255, 255)))
    assert big > 2 * small > 2000


def test_grows_with_what_there_is(tmp_path: Path) -> None:
    heights = [drawn(tmp_path / "report.png", *[moment("a", "b")] * count).shape[0] for count in (0, 1, 4, 5)]
    assert heights[0] < heights[1] == heights[2] < heights[3]


def test_nothing_to_show_is_a_report_too(tmp_path: Path) -> None:
    draw(tmp_path / "report.svg", "nothing", [], [])
    assert "<svg" in (tmp_path / "report.svg").read_text()


def test_odd_words_are_printed_as_they_are(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    words = "\x1b[0m \u4f60\u597d $\\frac{1}$ " * 20
    drawn(tmp_path / "report.png", moment(words, words), moment("", "x"))
    assert [str(warning.message) for warning in recwarn] == []


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ReportError, match="name it .png, .pdf, .svg"):
        draw(tmp_path / "report.jpg", "", [], [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ReportError, match=r"needs matplotlib: pip install 'infinitevl\[synth\]'"):
        draw(tmp_path / "report.png", "", [], [])
    assert list(tmp_path.iterdir()) == []


def test_curve_is_bounded_and_covers_the_whole_stream() -> None:
    curve = Curve(most=64)
    for second in range(10_000):
        curve.add(Point(float(second), 1.0, 1))
    times = [point.time for point in curve.points]
    assert len(times) < 64 and times[0] == 0.0 and times[-1] > 9_000
    assert len({b - a for a, b in zip(times, times[1:], strict=False)}) == 1  # evenly


def test_key_frame_is_a_small_copy() -> None:
    large = picture(1, 720, 1280)
    assert report.key_frame(large).shape == (203, 360, 3)
    small = picture(1)
    assert np.array_equal(report.key_frame(small), small)
    assert not np.shares_memory(report.key_frame(small), small)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.0, "0:00"), (42.0, "0:42"), (42.5, "0:42.5"), (59.99, "0:59.9"), (3667.0, "61:07")]
)
def test_times(seconds: float, words: str) -> None:
    assert shown(seconds) == words
