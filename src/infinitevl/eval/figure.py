"""Follow a frame: how long it is remembered, as a curve. Draws what `recall` and `length` found, from their JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infinitevl.eval.exam import FULL, EvalError
from infinitevl.files import written_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")
OURS, FAINT, INK = "#2563a8", "#7b8794", "#1f2933"
DASHES = {"no_delta": "--", "blind": ":"}


class FigureError(EvalError):
    """A figure that cannot be drawn; the message says what to do."""


def check(path: Path) -> None:
    """FigureError for a path that cannot become a figure, before hours of work."""
    if path.suffix[1:].lower() not in FORMATS:
        raise FigureError(f"{path}: cannot draw that kind of file: name it .{', .'.join(FORMATS)}")
    _figure()


def _figure() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FigureError("--plot needs matplotlib: pip install 'infinitevl[synth]'") from None
    return Figure


def recall(result: dict[str, Any], path: Path) -> None:
    """Accuracy against the age of the evidence, in windows and tokens, on a logarithmic axis: the model with its 95 %
    interval, what the controls get (chance), and where the window ends. Raises FigureError as `check` does."""
    check(path)
    figure = _figure()(figsize=(7.6, 4.2), layout="constrained")
    axes = figure.subplots()
    points, window = result["ages"], result["window"]
    x = [point["windows"] for point in points]
    for column in result["columns"]:
        share = [point[column]["share"] for point in points]
        if column == FULL:
            low, high = ([point[column][end] for point in points] for end in ("low", "high"))
            axes.fill_between(x, low, high, color=OURS, alpha=0.18, linewidth=0)
            axes.plot(x, share, color=OURS, marker="o", markersize=4, label=column)
        else:
            axes.plot(x, share, color=FAINT, linestyle=DASHES[column], label=f"chance: {column}")
    _axis(axes, x, "age of the evidence in windows, and in tokens", lambda age: f"{age:g}\n{age * window:,.0f}")
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.annotate("out of the window", (1, 1.0), xytext=(4, -2), textcoords="offset points", va="top", fontsize=8)
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("right answers, with the 95 % interval")
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    kinds = ", ".join(result["headline"])
    figure.suptitle(f"{result['checkpoint']['name']}, {result['streams']} streams: {kinds}", fontsize=8)
    _write(figure, path)


def length(result: dict[str, Any], path: Path) -> None:
    """Accuracy with its 95 % interval, time of a step (p50 to p90) and memory of a stream against its length in frames.

    Raises FigureError as `check` does."""
    check(path)
    figure = _figure()(figsize=(12.0, 3.8), layout="constrained")
    points = [point for point in result["lengths"] if "refused" not in point]
    x = [point["frames"] for point in points]
    accuracy, time, memory = figure.subplots(1, 3)
    for column in result["columns"]:
        for row, colour in (("now", INK), ("past", OURS)):
            asked = [(point["frames"], point[column][row]) for point in points if point[column][row]["asked"]]
            at, (share, low, high) = [at for at, _ in asked], _parts([each for _, each in asked])
            style = {"color": colour, "linestyle": DASHES.get(column, "-"), "marker": "o", "markersize": 4}
            accuracy.vlines(at, low, high, color=colour, alpha=0.4, linewidth=3 if column == FULL else 1)
            accuracy.plot(at, share, label=f"{row}, {column}", **style)
    accuracy.set_ylim(-0.02, 1.02)
    accuracy.legend(frameon=False, fontsize=8)
    middle, slow = ([point[name] for point in points] for name in ("milliseconds", "milliseconds_p90"))
    time.vlines(x, middle, slow, color=OURS, alpha=0.4, linewidth=3)
    time.plot(x, middle, color=OURS, marker="o", markersize=4)
    memory.plot(x, [point["bytes"] / 2**20 for point in points], color=OURS, marker="o", markersize=4)
    labels = ("right answers, with the 95 % interval", "ms a step, p50 to p90", "MiB a stream")
    for axes, label in zip((accuracy, time, memory), labels, strict=True):
        _axis(axes, x, "frames of the stream", lambda frames: f"{frames:,}")
        axes.set_ylabel(label)
    for axes in (time, memory):
        axes.set_ylim(bottom=0)
    told = f"{result['checkpoint']['name']}, {result['streams']} streams: accuracy, time and memory by length of stream"
    figure.suptitle(told, fontsize=9)
    _write(figure, path)


def _parts(counts: list[dict[str, Any]]) -> tuple[list[float], list[float], list[float]]:
    """Shares, and the ends of their intervals."""
    share, low, high = ([each[name] for each in counts] for name in ("share", "low", "high"))
    return share, low, high


def _axis(axes: Axes, x: list[float], label: str, told: Callable[[float], str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [told(each) for each in x], fontsize=7)
    axes.set_xticks([], minor=True)
    axes.set_xlabel(label)
    axes.grid(True, which="major", alpha=0.25)


def _write(figure: Figure, path: Path) -> None:
    with written_aside(path) as aside:
        figure.savefig(aside, format=path.suffix[1:].lower(), dpi=150)
