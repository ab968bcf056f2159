"""The arms of an experiment, side by side on a GPU or more: `python experiments/arms.py distillation --seconds 540`.

An experiment's `recipe.py` names its SEEDS and its `arms`, each a list of command lines of `infinitevl`. They run as
processes (those that it names in ALONE last, one at a time, because they take times), all stop before a time limit,
`--resume` goes on from what is on disk, and every evaluation adds a line of JSON to `results/arms.jsonl`. Words in
braces: {teacher} and {student}, checkpoints; {last}, what the line before made; {model}, its weights; {out}, where a
line writes; {seed}.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import runpy
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import toy
from beside import STOPPED, side_by_side

from infinitevl import Model, cli, weights
from infinitevl.files import folder_written_aside
from infinitevl.train.checkpoint import checkpoints, history, model_folder

HERE = Path(__file__).parent
TEACHER = HERE / "default_checkpoint" / "teacher"
# an arm has one core: neither torch nor the tokenizer nor the compiler may take them all
CORES = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
# of every training where its line does not say otherwise: saved when it ends and when it is stopped; without workers,
# because while an arm makes a batch (23 ms) the others have the GPU
TRAIN = {"batch": "8", "micro": "8", "workers": "0", "compile": "true", "compact": "true", "tensorboard": "false"}
TRAIN |= {"log_every": "20", "save_every": "1000000", "keep": "9"}
EVALUATES = ("eval", "script")
KEPT = ("commit", "date", "versions", "hardware", "dtype")  # of an evaluation's file, beside what it found
LEFT = (*KEPT, "command", "ops", "columns", "checkpoint")


@dataclass(frozen=True)
class Place:
    """What the arms of an experiment share: where runs/ and results/ lie, checkpoints, and times the steps."""

    experiment: str
    out: Path
    teacher: str
    student: str
    scale: float
    toy: bool

    @property
    def results(self) -> Path:
        return self.out / "results" / "arms.jsonl"

    def steps(self, count: int) -> int:
        """The steps of what a recipe counts as so many."""
        return 2 if self.toy else max(1, round(count * self.scale))


@dataclass(frozen=True)
class Arm:
    """One way to a model, with one seed: lines that are run in order, each with a place of its own in `folder`."""

    name: str
    seed: int
    lines: tuple[str, ...]
    folder: Path
    alone: bool = False  # takes times: no other runs beside it

    @property
    def title(self) -> str:
        return f"{self.name}-{self.seed}"

    @property
    def journal(self) -> list[dict[str, Any]]:
        """How lines ended, each time they were run."""
        path = self.folder / "journal.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def arms(place: Place) -> list[Arm]:
    """All arms of an experiment, seed by seed, those of ALONE last; those of ONCE with the first seed only. A toy run
    has those of TOY."""
    recipe = runpy.run_path(str(HERE / place.experiment / "recipe.py"))
    lines, once, alone = recipe["arms"](place.steps), recipe.get("ONCE", ()), recipe.get("ALONE", ())
    first, *others = recipe["SEEDS"]
    pairs = [(name, first) for name in (recipe["TOY"] if place.toy else lines)]
    pairs += [(name, seed) for seed in others for name in lines if name not in once and not place.toy]
    runs = place.out / "runs"
    every = [Arm(name, seed, tuple(lines[name]), runs / f"{name}-{seed}", name in alone) for name, seed in pairs]
    return sorted(every, key=lambda arm: arm.alone)


# One arm


def run(arm: Arm, place: Place) -> int:
    """The lines of an arm that are not done yet; 0, or the exit code of the first that does not end well."""
    finished, last = {entry["line"] for entry in arm.journal if entry["code"] == 0}, place.teacher
    for number, line in enumerate(arm.lines):
        out = arm.folder / str(number)
        if number not in finished:
            print(f"{arm.title}: {line}", flush=True)
            words, began = spelled(line, arm, place, last, out), time.perf_counter()
            code = do(words, place, out, arm.seed)
            if torch.cuda.is_available():  # what a line held of the GPU is for the other arms
                gc.collect()
                torch.cuda.empty_cache()
            entry = {"line": number, "code": code, "seconds": round(time.perf_counter() - began, 1)}
            if code == 0 and words[0] in EVALUATES:
                entry["row"] = row(arm, place, number, words[2], json.loads(out.read_text()))
            with (arm.folder / "journal.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")
            if code:
                return code
        last = last if line.startswith(EVALUATES) else str(out)
    return 0


def spelled(line: str, arm: Arm, place: Place, last: str, out: Path) -> list[str]:
    """The words of a line, with what is common to all of its kind; in a toy run with toy numbers."""
    names = {"teacher": place.teacher, "student": place.student, "last": last, "model": model_folder(last), "out": out}
    words = line.format(**names, seed=arm.seed).split()
    if words[0] == "train":
        changes = TRAIN | dict(word.split("=", 1) for word in words[2:]) | (toy.TRAIN if place.toy else {})
        changed = [f"{key}={value}" for key, value in changes.items()]
        return [*words[:2], *changed, "--out", str(out), *(["--resume"] if checkpoints(out) else [])]
    if words[0] in EVALUATES:
        options = dict(zip(words[3::2], words[4::2], strict=True)) | (toy.EVALUATIONS[words[1]] if place.toy else {})
        return [*words[:3], *(word for pair in options.items() for word in pair), "--out", str(out)]
    return words


def do(words: list[str], place: Place, out: Path, seed: int) -> int:
    """One line, in this process; its exit code."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if words[0] in ("convert", "scratch") and out.exists():  # whole or absent: ended before it could be noted
        return 0
    if words[0] == "scratch":
        return scratch(Path(words[1]), out, seed)
    try:
        if words[0] == "script":
            return runpy.run_path(str(HERE / place.experiment / words[1]))["main"](words[2:])
        cli.main(words)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def scratch(like: Path, out: Path, seed: int) -> int:
    """A checkpoint of the shape of `like` that has learned nothing, not even what a teacher knows."""
    shape = weights.load(like)
    torch.manual_seed(seed)
    with folder_written_aside(out) as aside:
        weights.save(Model(shape.config, shape.processor), aside)
    return 0


def row(arm: Arm, place: Place, number: int, model: str, found: dict[str, Any]) -> dict[str, Any]:
    """The line of results of an evaluation: of which model, how that came about, what was found and how."""
    past = history(model)
    trained = [entry["seconds"] for entry in arm.journal if arm.lines[entry["line"]].startswith("train")]
    about = {"experiment": place.experiment, "arm": arm.name, "seed": arm.seed, "line": arm.lines[number]}
    if "{student}" in arm.lines[number]:
        about["student"] = place.student
    return about | {
        "scale": place.scale,
        "after": past[-1]["stage"] if past else None,
        "steps": sum(each["steps"] for each in past),
        "tokens": sum(each["tokens"] for each in past),
        "seconds": round(sum(trained), 1),
        "result": found["tables"]["full"] if "tables" in found else {k: v for k, v in found.items() if k not in LEFT},
        **{name: found[name] for name in KEPT if name in found},
    }


def collect(place: Place, every: list[Arm]) -> None:
    """Add to the results what the journals have and they lack: runs may be kept where results are not."""
    rows = [json.dumps(entry["row"]) for arm in every for entry in arm.journal if "row" in entry]
    held = place.results.read_text().splitlines() if place.results.exists() else []
    place.results.parent.mkdir(parents=True, exist_ok=True)
    with place.results.open("a") as file:
        file.writelines(f"{line}\n" for line in rows if line not in held)


def one_by_one(chosen: list[Arm], place: Place) -> dict[str, int]:
    """The exit codes of arms that are run in this process, until one is stopped."""
    codes: dict[str, int] = {}
    for arm in chosen:
        codes[arm.title] = run(arm, place)
        if codes[arm.title] in STOPPED:
            break
    return codes


def work(arm: Arm, place: Place) -> None:
    """An arm in a process of its own; what it says goes to a file."""
    arm.folder.mkdir(parents=True, exist_ok=True)
    with (arm.folder / "out.txt").open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch._dynamo.config.recompile_limit = 64  # stages and row lengths of one process: more than the 8 it allows
    sys.exit(run(arm, place))


# The command


def gpus() -> list[str]:
    """The CUDA devices that are there, named as CUDA_VISIBLE_DEVICES names them."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name for name in named.split(",") if name][:count] if named else [str(n) for n in range(count)]


class ArmsError(ValueError):
    """A command line that cannot be run as it is; the message says what to change."""


def execute(place: Place, only: str | None, seeds: Sequence[int], processes: int, seconds: float, resume: bool) -> int:
    """Run an experiment as the command line says; its exit code: 1 where an arm failed, 130 where some are not done.

    ArmsError for arms that are not there, runs that are, and a teacher that lacks.
    """
    every = arms(place)
    chosen = [arm for arm in every if only in (None, arm.name, arm.title) and (not seeds or arm.seed in seeds)]
    if not chosen:
        raise ArmsError(f"--only and --seeds leave no arm; there are {', '.join(arm.title for arm in every)}")
    if not resume and any(arm.journal for arm in chosen):
        raise ArmsError(f"{place.out / 'runs'} holds runs of these arms: --resume goes on with them, or remove them")
    lacks = not Path(place.teacher, "config.json").is_file()
    if lacks and any("{teacher}" in line for arm in chosen for line in arm.lines):
        raise ArmsError(f"{place.teacher}: no checkpoint there; experiments/default_checkpoint/README.md trains one")
    if processes:
        alone = [arm.title for arm in chosen if arm.alone]
        codes = side_by_side(work, {arm.title: (arm, place) for arm in chosen}, processes, seconds, gpus(), alone)
    else:
        codes = one_by_one(chosen, place)
    collect(place, every)
    ended = sum(code == 0 for code in codes.values())
    failed = sum(code not in (0, *STOPPED) for code in codes.values())
    print(f"{ended} of {len(chosen)} arms done, {failed} failed; results: {place.results}", flush=True)
    return 1 if failed else 0 if ended == len(chosen) else STOPPED[0]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {path.parent.name for path in HERE.glob("*/recipe.py")} - {"default_checkpoint"}
    parser.add_argument("experiment", choices=sorted(known))
    parser.add_argument("--only", metavar="ARM", help="ARM, or ARM-SEED")
    parser.add_argument("--seeds", type=int, nargs="+", default=(), help="these alone (default: all)")
    parser.add_argument("--seconds", type=float, default=1e6, help="all arms have ended within so many")
    parser.add_argument(
        "--processes", type=int, default=16, help="arms at once, shared out over all GPUs; 0: one by one, in this one"
    )
    parser.add_argument("--resume", action="store_true", help="go on from what is on disk")
    parser.add_argument("--scale", type=float, default=1.0, help="times the steps that the recipe says")
    parser.add_argument("--teacher", default=str(TEACHER), help="a checkpoint of softmax layers only")
    parser.add_argument("--student", default="tiny", help="a trained checkpoint, for what trains none")
    parser.add_argument("--toy", action="store_true", help="a smoke test: random teacher, two steps a stage")
    parser.add_argument("--out", type=Path, help="folder for runs/ and results/ (default: the experiment's)")
    args = parser.parse_args(words)
    if args.processes < 0 or not args.seconds > 0 or not 0 < args.scale < math.inf:
        parser.error("--processes is 0 or more, --seconds and --scale are above 0")
    os.environ |= CORES | os.environ
    out = args.out or HERE / args.experiment / ("runs/toy" if args.toy else "")
    if args.toy:
        args.teacher, args.student = toy.checkpoints(out)
    place = Place(args.experiment, out, args.teacher, args.student, args.scale, args.toy)
    try:
        return execute(place, args.only, args.seeds, args.processes, args.seconds, args.resume)
    except ArmsError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
