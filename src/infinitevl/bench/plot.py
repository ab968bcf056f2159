"""The two figures of the paper from a stored result: latency and memory against context length, and streamed frames a
second against frames seen, ours and the Transformer's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from infinitevl.bench.setup import OURS, THEIRS, BenchError
from infinitevl.files import written_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {OURS: "#2563a8", THEIRS: "#c0262d"}
FAINT = "#7b8794"
REAL_TIME = 24  # frames a second


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Writes context.png and stream.png into a folder (made where it is not there). BenchError without matplotlib, or
    for a result without the curves."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BenchError("--plot needs matplotlib: pip install 'infinitevl[synth]'") from None
    curves: dict[str, list[dict[str, Any]]] = {}
    for curve in result["curves"]:
        if curve["x"]:
            curves.setdefault(curve["name"], []).append(curve)
    wanted = {
        "context.png": {"prefill s": "prefill, s", "decode ms": "decode, ms a token", "memory bytes": "memory, MiB"},
        "stream.png": {"frames a second": "frames a second"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for file, panels in wanted.items():
        here = {name: label for name, label in panels.items() if name in curves}
        if not here:
            continue
        figure = Figure(figsize=(4.6 * len(here), 3.8), layout="constrained")
        for axes, (name, label) in zip(figure.subplots(1, len(here), squeeze=False)[0], here.items(), strict=True):
            _panel(axes, name, label, curves[name])
            if name == "prefill s" and any("sampled" in row["note"] for row in result["rows"]):
                axes.set_title("the Transformer's longest: sampled", fontsize=8, color=FAINT)
        figure.suptitle(f"{result['hardware']['name']}, {result['dtype']}, {result['scale']} scale", fontsize=9)
        drawn.append(_written(figure, folder / file))
    if not drawn:
        raise BenchError("nothing to draw: the result has no curves (parts prefill, decode, frame, transformer)")
    return drawn


def _panel(axes: Axes, name: str, label: str, curves: list[dict[str, Any]]) -> None:
    streamed = name == "frames a second"
    for curve in curves:
        scale = 2.0**20 if name == "memory bytes" else 1.0
        style = {"color": COLOURS[curve["whose"]], "label": curve["whose"], "linewidth": 1.6}
        marker = "" if streamed and curve["whose"] == OURS else "o"
        axes.plot(curve["x"], [y / scale for y in curve["y"]], marker=marker, markersize=4, **style)
    axes.set_xscale("log")
    lengths = sorted({x for curve in curves for x in curve["x"]})
    if streamed:
        lengths = [x for x in (4.0**power for power in range(8)) if lengths[0] <= x <= 1.1 * lengths[-1]]
    axes.set_xticks(lengths, [short(x) for x in lengths], minor=False)
    axes.set_xticks([], minor=True)
    if streamed:
        axes.axhline(REAL_TIME, color=FAINT, linewidth=0.8, linestyle="--")
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
    axes.set_xlabel("frames seen" if streamed else "tokens of context")
    axes.set_ylabel(label)
    axes.grid(True, which="major", alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def short(count: float) -> str:
    """512, 4k, 100k, 1M: thousands and millions by powers of two, as lengths are."""
    for size, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}"


def _written(figure: Figure, path: Path) -> Path:
    with written_aside(path) as aside:
        figure.savefig(aside, format=path.suffix[1:], dpi=150)
    return path
