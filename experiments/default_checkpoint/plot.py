"""The curves of a training run: `python experiments/default_checkpoint/plot.py [LOG.jsonl OUT.png]`.

Without files it draws those of the committed checkpoint: results/curve.jsonl, results/curve.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).parent / "results"
SHOWN = {
    "sign": "the sign now",
    "digit": "handwritten digit now",
    "word_by_emblem": "word by its emblem",
    "emblem_by_word": "emblem by its word",
    "when_word": "when a word was shown",
    "count_past": "count of objects gone",
    "was_word": "was a word shown?",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, nargs="?", default=HERE / "curve.jsonl")
    parser.add_argument("out", type=Path, nargs="?", default=HERE / "curve.png")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.log.read_text().splitlines()]
    steps = [line["step"] for line in lines]
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, height_ratios=(1, 2))
    above.semilogy(steps, [line["loss"] for line in lines], color="black")
    above.set_ylabel("loss per answer token")
    for kind, label in SHOWN.items():
        points = [(line["step"], line["right"][kind]) for line in lines if kind in line["right"]]
        below.plot(*zip(*points, strict=True), label=label)
    below.set(ylabel="whole answer right (fresh training stories)", xlabel="step", ylim=(0, 1.02))
    below.legend(fontsize=8, loc="lower right")
    phases = ", ".join(dict.fromkeys(line["phase"] for line in lines))
    ends = [before["step"] for before, line in zip(lines, lines[1:], strict=False) if before["phase"] != line["phase"]]
    for axes in (above, below):
        for end in ends:
            axes.axvline(end, color="grey", linewidth=0.6, linestyle="--")
    above.set_title(f"training on the synthetic world: {phases}", fontsize=10)
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
