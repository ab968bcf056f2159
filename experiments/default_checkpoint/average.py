"""The mean of two checkpoints of one shape, weight by weight: `average.py ONE OTHER OUT`.

Half of the way back to where a short training began often keeps what both ends are good at (Wortsman et al. 2022,
arXiv 2109.01903).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from infinitevl import weights
from infinitevl.files import folder_written_aside


def average(one: str, other: str, out: Path) -> None:
    """Writes the mean, rounded to bfloat16 (decays in float32), with the processor of `one`.

    SystemExit where the two are not of one shape, or something is at `out` already.
    """
    if out.exists():
        raise SystemExit(f"{out} is there already: name a folder that is not, or remove it")
    mean, beside = weights.load(one, dtype=torch.float32), weights.load(other, dtype=torch.float32)
    if mean.config != beside.config:
        raise SystemExit(f"{one} and {other} are not of one shape")
    theirs = beside.state_dict()
    mean.load_state_dict({name: (mine + theirs[name]) / 2 for name, mine in mean.state_dict().items()})
    with folder_written_aside(out) as aside:
        weights.save(mean.bfloat16(), aside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", help="a folder, or `tiny`")
    parser.add_argument("other", help="likewise")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    average(args.one, args.other, args.out)


if __name__ == "__main__":
    main()
