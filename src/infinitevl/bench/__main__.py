"""`python -m infinitevl.bench`: the verb `infinitevl bench`, on machines without the command line's own packages."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from infinitevl import bench
from infinitevl.bench.gate import GateError


def main() -> int:
    """0 all went well; 1 the gate was not green or a part failed; 2 what was asked for cannot be measured."""
    parser = argparse.ArgumentParser(prog="python -m infinitevl.bench", description=bench.__doc__)
    parser.add_argument("--train", action="store_true", help="the speed of training; by torchrun on several GPUs")
    parser.add_argument("--fp8", action="store_true", help="frames, decode and streams by e4m3 weights")
    parser.add_argument("--quick", action="store_true", help="the tiny model, in under a minute")
    parser.add_argument("--full", action="store_true", help="nothing sampled and no limit of time")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--only", default="", help="parts with commas between: " + ", ".join(bench.PARTS))
    parser.add_argument("--out", type=Path, help="write the result to this file as JSON")
    parser.add_argument("--against", type=Path, help="print ratios to this earlier result")
    parser.add_argument("--plot", type=Path, help="draw the two figures into this folder")
    asked = parser.parse_args()
    only = tuple(name for name in asked.only.split(",") if name)
    options = bench.Options(asked.quick, asked.full, asked.device, only, asked.train, asked.fp8)
    try:
        return 0 if bench.command(options, asked.out, asked.against, asked.plot) else 1
    except bench.BenchError as error:
        print(f"infinitevl: {error}", file=sys.stderr)
        return 2
    except GateError as error:
        print(f"infinitevl: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
