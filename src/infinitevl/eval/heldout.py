"""Follow a frame: the whole held-out test, from a checkpoint to the table of what it got right, controls beside it.

infinitevl eval heldout tiny --out results.json
"""

from __future__ import annotations

import argparse
import json
import math
import time as clock
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infinitevl import weights
from infinitevl.eval import record, room
from infinitevl.eval.batched import tokens_seen
from infinitevl.eval.exam import AT_MOST, CONTROLS, FULL, EvalError, Exam, answers, check_controls
from infinitevl.eval.needles import FRAME
from infinitevl.files import written_aside
from infinitevl.model import Model
from infinitevl.synth import heldout
from infinitevl.synth.heldout import Ask, Score
from infinitevl.synth.world import Stories

RULE = "at every age up to four windows at least twice the best control"
RULE_ROWS = ("age1", "age2", "age4")


def verdict(tables: Mapping[str, Mapping[str, Score]]) -> dict[str, Any] | None:
    """Whether `RULE` holds, with the figures it compares; None where the model or every control is missing.

    A row without questions (of a part of the plan) does not hold.
    """
    controls = [name for name in tables if name != FULL]
    if FULL not in tables or not controls:
        return None
    rows = {}
    for name in RULE_ROWS:
        ours = tables[FULL][name].total.share
        best = max(controls, key=lambda control: tables[control][name].total.share)
        theirs = tables[best][name].total.share
        holds = ours > 0 and ours >= 2 * theirs
        rows[name] = {"model": _plain(ours), "best_control": best, "share": _plain(theirs), "holds": holds}
    holds = all(row["holds"] for row in rows.values())
    return {"rule": RULE, "controls": controls, "rows": rows, "holds": holds}


def _plain(share: float) -> float | None:
    return None if math.isnan(share) else round(share, 4)


@dataclass(frozen=True)
class Report:
    """What a run found. limit: how many streams of each world were watched; None: all, as the test wants it.

    answers: by control, one for each of `asks`. about: checkpoint and circumstances, as plain data.
    """

    asks: tuple[Ask, ...]
    answers: dict[str, list[str]]
    limit: int | None
    about: dict[str, Any]

    @property
    def tables(self) -> dict[str, dict[str, Score]]:
        return {name: heldout.score(given, self.asks) for name, given in self.answers.items()}

    @property
    def partial(self) -> str | None:
        """What is missing, in words; None for the whole test."""
        return None if self.limit is None else f"PARTIAL: the first {self.limit} streams of each world only"

    def markdown(self) -> str:
        """The table, and below it whether the rule holds."""
        lines = [f"**{self.partial}**\n\n" if self.partial else "", heldout.markdown(self.tables)]
        judged = verdict(self.tables)
        if judged is not None:
            kept = "holds" if judged["holds"] else "does not hold"
            lines.append(f"\nRule: {RULE} ({', '.join(judged['controls'])}): {kept}.\n")
        return "".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Everything but the answers, as plain data."""
        tables = {name: heldout.as_json(table) for name, table in self.tables.items()}
        for table in tables.values():
            for row in table.values():
                row["share"] = None if row["total"] == [0, 0] else row["share"]  # JSON has no NaN
        controls = {name: CONTROLS[name] for name in self.answers}
        return {
            "partial": self.partial,
            "questions": len(self.asks),
            **self.about,
            "columns": controls,
            "verdict": verdict(self.tables),
            "tables": tables,
        }

    def write_answers(self, path: Path) -> None:
        """A line of JSON for each line of the plan: what was asked, what is right, and what each control said."""
        with written_aside(path) as aside, aside.open("w") as file:
            for place, ask in enumerate(self.asks):
                given = {name: said[place] for name, said in self.answers.items()}
                asked = {"world": ask.world, "stream": ask.stream, "frame": ask.frame, "rows": ask.rows}
                question = ask.question
                told = {"kind": question.kind, "evidence": question.evidence, "text": question.text}
                file.write(json.dumps(asked | told | {"answer": question.answer, "given": given}) + "\n")


def run(
    where: str | Path = weights.DEFAULT,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    controls: Iterable[str] = CONTROLS,
    limit: int | None = None,
    at_once: int | None = None,
) -> Report:
    """The test of a checkpoint. Progress goes to stderr.

    dtype None: float32 on CPU, bfloat16 elsewhere. limit: only so many streams of each world, for a quick look; the
    report says so (as many as a world has at most are all of them). at_once: questions in a batch (None: 64 on CPU,
    1024 elsewhere, 1.4 MB of memory each; of a model without a window as many as fit).
    EvalError for a control that is unknown or named twice, or a limit that is below 1 or above what worlds have;
    CheckpointError and ConfigError of `weights.load`.
    """
    controls, every = list(controls), heldout.plan()
    check_controls(controls)
    limit = _limited(limit, max(ask.stream for ask in every) + 1)
    model = weights.load(where, device, dtype)
    asks = tuple(ask for ask in every if limit is None or ask.stream < limit)
    worlds = heldout.worlds()
    capacity = room.capacity(model, _longest(model, worlds, asks), asks)
    exam = Exam(model, worlds, asks, at_once or room.forks(model, capacity), capacity=capacity)
    began = clock.perf_counter()
    given = answers(exam, controls)
    about = {
        "checkpoint": {"name": str(where) if where == weights.DEFAULT else Path(where).name}
        | {"sha256": record.checksums(weights.locate(where))},
        "seconds": round(clock.perf_counter() - began, 1),
        "at_most": AT_MOST,
        "at_once": exam.at_once,
        **record.circumstances(model),
    }
    return Report(asks, given, limit, about)


def _limited(limit: int | None, most: int) -> int | None:
    """The limit, None where that is all of a world's `most` streams. EvalError for one that means nothing."""
    if limit is not None and not 1 <= limit <= most:
        raise EvalError(f"a limit of {limit} streams of each world: it must be 1 to {most}, which is all of them")
    return None if limit == most else limit


def _longest(model: Model, worlds: Mapping[str, Stories], asks: Sequence[Ask]) -> int:
    """Tokens of the longest stream that is watched; a late one's stamps have more digits."""
    frames: dict[tuple[str, int], int] = {}
    for ask in asks:
        key = (ask.world, int(worlds[ask.world].t0[ask.stream]))
        frames[key] = max(ask.frame + 1, frames.get(key, 0))
    return max(int(tokens_seen(model, FRAME, [float(t0 + at) for at in range(n)])[-1]) for (_, t0), n in frames.items())


def main(words: Sequence[str] | None = None) -> None:
    """The command line: prints the table, writes the files asked for."""
    parser = argparse.ArgumentParser(prog="python -m infinitevl.eval.heldout", description=run.__doc__)
    parser.add_argument("--model", default=weights.DEFAULT, help="folder, hub id or tiny (default)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--controls", default=",".join(CONTROLS), help="columns wanted, with commas between (default: all)"
    )
    parser.add_argument("--limit", type=int, metavar="STREAMS", help="a quick look at part of the test")
    parser.add_argument("--at-once", type=int, metavar="QUESTIONS")
    parser.add_argument("--out", type=Path, metavar="RESULTS.json")
    parser.add_argument("--answers", type=Path, metavar="ANSWERS.jsonl", help="every question with all answers")
    args = parser.parse_args(words)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    try:
        report = run(args.model, args.device, dtype, args.controls.split(","), args.limit, args.at_once)
    except EvalError as error:
        parser.error(str(error))
    if args.answers:
        report.write_answers(args.answers)
    if args.out:
        record.write(args.out, report.as_json())
    print(report.markdown(), end="")


if __name__ == "__main__":
    main()
