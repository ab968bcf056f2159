"""The figure and the table of an experiment, from its results: `python experiments/plot.py distillation`.

Reads results/arms.jsonl, draws results/figure.png, prints the table in markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import runpy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

HERE = Path(__file__).parent
Row = dict[str, Any]
# of the held-out test: what is read in view, in fonts never seen, and what has been out of the window for 1 to 16
PANELS = {"in view": ("now",), "unseen fonts": ("fonts",), "out of the window": ("age1", "age2", "age4", "age8")}


class ResultsError(ValueError):
    """Results that are not there; the message says where they would be."""


def newest(path: Path) -> list[Row]:
    """The rows of results of the scale of the last one, and those of what was not trained, in the order of the recipe's
    arms (others come last): of one arm, seed and number of steps the last.

    ResultsError where there are none.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not rows:
        raise ResultsError(f"{path}: no results there; experiments/arms.py writes them (of a toy run: --toy)")
    rows = [row for row in rows if row["scale"] == rows[-1]["scale"] or not row["steps"]]
    recipe = Path(__file__).with_name(rows[-1]["experiment"]) / "recipe.py"
    arms = [*runpy.run_path(str(recipe))["arms"](round)]
    last = {(row["arm"], row["seed"], row["steps"]): row for row in rows}.values()
    return sorted(last, key=lambda row: arms.index(row["arm"]) if row["arm"] in arms else len(arms))


def final(rows: list[Row]) -> dict[str, list[Row]]:
    """By arm, the last evaluation of each seed."""
    last = {(row["arm"], row["seed"]): row for row in sorted(rows, key=lambda row: row["steps"])}
    return {arm: [last[key] for key in last if key[0] == arm] for arm in dict.fromkeys(row["arm"] for row in rows)}


def share(result: Row, names: Iterable[str]) -> float:
    """Right over asked, over some rows of the held-out test."""
    right, asked = (sum(result[name]["total"][place] for name in names) for place in (0, 1))
    return right / asked if asked else float("nan")


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows by a key, in the order in which keys appear."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def middle(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread(axes: Axes, x: Sequence[float], values: Sequence[Sequence[float]], label: str) -> None:
    """A line through the means, over the range from least to greatest; where nothing was measured there is none."""
    held = [(at, some) for at, some in zip(x, values, strict=True) if not math.isnan(middle(some))]
    if not held:
        return
    x, values = zip(*held, strict=True)
    (line,) = axes.plot(x, [middle(each) for each in values], marker="o", markersize=3, label=label)
    axes.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.15, lw=0)


def legend(axes: Axes) -> None:
    """Names of the lines, where there are any."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def curves(rows: list[Row], figure: Figure) -> None:
    """Held-out accuracy against training tokens, a line for each arm."""
    for axes, (title, names) in zip(figure.subplots(1, len(PANELS), sharex=True), PANELS.items(), strict=True):
        for arm, some in grouped(rows, lambda row: row["arm"]).items():
            points = sorted(grouped(some, lambda row: row["steps"]).values(), key=lambda same: same[0]["steps"])
            x = [middle([row["tokens"] for row in same]) / 1e6 for same in points]
            spread(axes, x, [[share(row["result"], names) for row in same] for same in points], arm)
        axes.set(title=title, xlabel="training tokens, millions", ylim=(-0.02, 1.02))
    legend(axes)


def bars(rows: list[Row], figure: Figure) -> None:
    """Held-out accuracy at the end of each arm, a dot for each seed."""
    groups = final(rows)
    for axes, (title, names) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS.items(), strict=True):
        for place, some in enumerate(groups.values()):
            values = [share(row["result"], names) for row in some]
            axes.bar(place, middle(values), color="#2563a8", alpha=0.6)
            axes.plot([place] * len(values), values, "k.", markersize=4)
        axes.set_xticks(range(len(groups)), list(groups), rotation=60, ha="right", fontsize=7)
        axes.set(title=title, ylim=(0, 1.02))


def lengths(rows: list[Row], figure: Figure) -> None:
    """Accuracy, time of a frame and bytes of memory against the length of the stream; times of the arms time_*, which
    ran alone, and all else of the others."""
    panels = figure.subplots(1, 4)
    for (arm, after), some in grouped(rows, lambda row: (row["arm"], row["after"])).items():
        timed = arm.startswith("time_")
        held = [point for row in some for point in row["result"]["lengths"] if "refused" not in point]
        points = sorted(grouped(held, lambda point: point["frames"]).items())
        label = arm.removeprefix("time_") if after is None else f"{arm}, {after}"
        for axes, name in zip(panels, ("now", "past", "milliseconds", "bytes"), strict=True):
            if timed != (name == "milliseconds"):
                continue
            values = [[measured(point, name) for point in same] for _, same in points]
            spread(axes, [frames for frames, _ in points], values, label)
    for axes, title in zip(panels, ("in view", "out of view", "ms a frame", "bytes a stream"), strict=True):
        axes.set(title=title, xlabel="frames", xscale="log", yscale="linear" if "view" in title else "log")
    legend(panels[0])
    legend(panels[2])


def measured(point: Row, name: str) -> float:
    """A row of questions of one length, or what else was measured there; NaN where nothing could be asked."""
    value = point["full"][name]["share"] if name in point["full"] else point[name]
    return float("nan") if value is None else value


def ages(rows: list[Row], figure: Figure) -> None:
    """Recall by the age of the evidence; beside it how far two states' answers are apart, by the longest run."""
    apart = [row["result"]["rows"] for row in rows if "rows" in row["result"]]
    recalled = [row for row in rows if "ages" in row["result"]]
    panels = list(figure.subplots(1, bool(recalled) + bool(apart), squeeze=False)[0])
    if recalled:
        recalls(recalled, panels.pop(0))
    if apart:
        found = max(apart, key=len)
        for question in (name for name in found[0] if name.endswith("?")):
            panels[0].plot([each["tokens"] for each in found], [each[question]["kl"] for each in found], label=question)
        panels[0].set(yscale="log", xlabel="tokens seen", ylabel="KL, float32 to bfloat16 state, nats a token")
        legend(panels[0])


def recalls(recalled: list[Row], axes: Axes) -> None:
    """A line for each arm, over its seeds."""
    for arm, some in grouped(recalled, lambda row: row["arm"]).items():
        held = [point for row in some for point in row["result"]["ages"]]
        points = sorted(grouped(held, lambda point: point["tokens"]).items())
        values = [[point["full"]["share"] for point in same] for _, same in points]
        spread(axes, [tokens for tokens, _ in points], values, arm)
    axes.set(xscale="log", xlabel="age of the evidence, tokens", ylabel="right", ylim=(-0.02, 1.02))
    legend(axes)


FIGURES = {
    "distillation": curves,
    "student": curves,
    "softmax_share": bars,
    "data": bars,
    "length": lengths,
    "saturation": ages,
    "state_precision": ages,
}


def table(rows: list[Row]) -> str:
    """The last evaluation of each arm of the held-out test: mean over seeds, and least to greatest of several."""
    lines = [f"| arm | seeds | tokens, millions | {' | '.join(PANELS)} |", "|---|---:|---:|" + "---:|" * len(PANELS)]
    for arm, some in final(rows).items():
        values = [[100 * share(row["result"], names) for row in some] for names in PANELS.values()]
        ranges = [f" ({min(each):.1f} to {max(each):.1f})" if len(each) > 1 else "" for each in values]
        cells = [f"{middle(each):.1f}{between}" for each, between in zip(values, ranges, strict=True)]
        tokens = middle([row["tokens"] for row in some]) / 1e6
        lines.append(f"| {arm} | {len(some)} | {tokens:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(experiment: str, results: Path) -> Path:
    """Draw the figure of an experiment beside its results; the file."""
    figure = plt.figure(figsize=(12, 4), layout="constrained")
    FIGURES[experiment](newest(results / "arms.jsonl"), figure)
    figure.savefig(results / "figure.png", dpi=110)
    plt.close(figure)
    return results / "figure.png"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment", choices=sorted(FIGURES))
    parser.add_argument("--out", type=Path, help="the folder of its results/ (default: the experiment's)")
    parser.add_argument("--toy", action="store_true", help="what arms.py --toy found, where it leaves that")
    args = parser.parse_args(words)
    results = (args.out or HERE / args.experiment / ("runs/toy" if args.toy else "")) / "results"
    try:
        if FIGURES[args.experiment] in (curves, bars):
            print(table(newest(results / "arms.jsonl")))
        print(draw(args.experiment, results))
    except ResultsError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
