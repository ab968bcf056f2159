"""Stream 100,000 frames of the synthetic world through one memory and see whether anything grows: `make soak`.

Watched: the memory's bytes (never another number), the process's resident memory (less than 4 MiB more than after the
first tenth), milliseconds per frame. A question is asked now and then, as a user would. Exit code 1 if a bound fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import time as clock
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infinitevl import weights
from infinitevl.config import tiny
from infinitevl.eval import record
from infinitevl.model import Model
from infinitevl.processor import load_processor
from infinitevl.stream import Stream
from infinitevl.synth.compose import Composer
from infinitevl.synth.questions import questions
from infinitevl.synth.world import HELDOUT, HELDOUT_SETTING, Stories, make_stories
from infinitevl.video import Frame

HERE = Path(__file__).parent
FRAMES = 100_000
STORY = 256  # frames of one story; the stream goes from one to the next without a break
ASK_EVERY = 250  # frames between questions
SAMPLES = 100  # times that memory is looked at, evenly spread: every thousand frames of the whole run
GROWTH = 4 << 20  # bytes of resident memory that the last nine tenths may add


@dataclass
class Notes:
    """What was seen so far. resident and nbytes at every sample, ms of every frame, questions asked and right."""

    ms: np.ndarray
    resident: list[int] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    asked: int = 0
    right: int = 0


def resident() -> int:
    """Bytes of this process that are in memory now (VmRSS)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("the soak reads VmRSS in /proc/self/status, which this system does not have: run it on Linux")


def shown() -> Iterator[tuple[np.ndarray, Stories, int]]:
    """Picture after picture without end, with the story it belongs to and its frame there."""
    composer = Composer()
    second = 0
    for seed in range(10**9):
        stories = make_stories(seed, 1, STORY, HELDOUT, HELDOUT_SETTING, t0=np.array([second]))
        numbers = {name: torch.from_numpy(part) for name, part in stories.params().items()}
        for frame in range(STORY):
            picture = composer({name: part[frame : frame + 1] for name, part in numbers.items()})
            yield picture[0].numpy(), stories, frame
        second += STORY


def soak(stream: Stream, frames: int, every: int) -> Iterator[Notes]:
    """Streams `frames` frames; yields the notes after every `every` of them."""
    notes, rng = Notes(np.full(frames, np.nan, np.float32)), np.random.default_rng(0)
    for number, (picture, stories, frame) in zip(range(frames), shown(), strict=False):
        began = clock.perf_counter()
        stream.observe(Frame(float(number), picture))
        notes.ms[number] = 1e3 * (clock.perf_counter() - began)
        if number % ASK_EVERY == ASK_EVERY - 1:
            asked = questions(stories, 0, frame, rng)
            question = asked[int(rng.integers(len(asked)))]
            notes.asked += 1
            notes.right += stream.ask(question.text, at_most=12).text == question.answer
        if number % every == every - 1:
            notes.resident.append(resident())
            notes.nbytes.append(stream.nbytes)
            yield notes


def result(notes: Notes, frames: int, every: int) -> dict[str, Any]:
    """Figures and bounds of the frames seen so far, as plain data."""
    seen = every * len(notes.resident)
    early = notes.resident[max(0, len(notes.resident) // 10 - 1)]
    grown = notes.resident[-1] - early
    first, last = notes.ms[: min(1000, seen)], notes.ms[max(0, seen - 1000) : seen]
    same = len(set(notes.nbytes)) == 1
    return {
        "claim": "the memory of a stream never grows, and neither does the process",
        "frames": seen,
        "of": frames,
        "nbytes": {"first": notes.nbytes[0], "last": notes.nbytes[-1], "identical": same},
        "resident": {
            "after_a_tenth": early,
            "last": notes.resident[-1],
            "growth": grown,
            "bound": GROWTH,
            "most": max(notes.resident),
            "samples_mib": [round(each / 2**20, 2) for each in notes.resident],
        },
        "ms_per_frame": {"first_1000": _spread(first), "last_1000": _spread(last)},
        "questions": {"asked": notes.asked, "right": notes.right},
        "holds": same and grown < GROWTH and seen == frames,
    }


def _spread(ms: np.ndarray) -> dict[str, float]:
    middle, late = np.percentile(ms, [50, 99])
    return {"mean": round(float(ms.mean()), 2), "median": round(float(middle), 2), "p99": round(float(late), 2)}


def tell(notes: Notes, frames: int, every: int, seconds: float) -> None:
    """One line on stderr."""
    seen = every * len(notes.resident)
    rate = seen / seconds
    print(
        f"{seen:,} of {frames:,} frames  {rate:.1f}/s  {(frames - seen) / rate / 60:.1f} min left"
        f"  memory {notes.nbytes[-1]:,} B  resident {notes.resident[-1] / 2**20:.1f} MiB"
        f"  {notes.right} of {notes.asked} questions right",
        file=sys.stderr,
        flush=True,
    )


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=weights.DEFAULT)
    parser.add_argument("--random", action="store_true", help="random weights of the default model's shape")
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--threads", type=int, default=1, help="torch threads; a small model gains nothing from more")
    parser.add_argument(
        "--out", type=Path, help="default: results/soak.json, or runs/soak.json for another run than that"
    )
    args = parser.parse_args(words)
    every = args.frames // SAMPLES
    if not every or args.frames % SAMPLES:
        parser.error(f"--frames must be a multiple of {SAMPLES}")
    torch.set_num_threads(args.threads)
    model = _random() if args.random else weights.load(args.model)
    whole = args.frames == FRAMES and not args.random
    out = args.out or HERE / ("results" if whole else "runs") / "soak.json"
    return watch(model, args.frames, every, out)


def _random() -> Model:
    torch.manual_seed(0)
    processor = load_processor(weights.locate(weights.DEFAULT))
    return Model(tiny(len(processor.tokenizer)), processor).eval()


def watch(model: Model, frames: int, every: int, out: Path) -> int:
    """Soaks; what was found so far lies beside `out` until the end, when it takes its place. Returns the exit code."""
    about, began = record.circumstances(model), clock.perf_counter()
    part = out.with_suffix(".part.json")
    for notes in soak(Stream(model), frames, every):
        seconds = clock.perf_counter() - began
        found = result(notes, frames, every) | {"seconds": round(seconds, 1)} | about
        record.write(part, found)
        tell(notes, frames, every, seconds)
    os.replace(part, out)
    print(f"{'holds' if found['holds'] else 'DOES NOT HOLD'}: {out}")
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
