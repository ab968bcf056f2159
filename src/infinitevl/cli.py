"""Follow a frame: it begins here: `infinitevl watch` and the other verbs. Each parses and calls one function.

Torch and all that needs it is imported inside a verb, so that `infinitevl --help` does not wait for it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from infinitevl.model import Model

EXITS = (
    "Exit codes: 0 all went well; 1 an unexpected error (--debug shows where); 2 a command or source that cannot be "
    "used (no picture in it could be decoded); 3 a checkpoint that cannot be loaded; 4 a memory file that cannot be "
    "used; 5 a source that broke off or is damaged (what could be decoded was watched); 6 a training run whose losses "
    "or gradients were not finite; 130 ended by Ctrl-C or SIGTERM."
)
UNEXPECTED, BAD_INPUT, BAD_CHECKPOINT, BAD_MEMORY, BROKEN_OFF, DIVERGED, INTERRUPTED = 1, 2, 3, 4, 5, 6, 130
REASONS = {"end": 0, "broken": BROKEN_OFF, "interrupted": INTERRUPTED}

app = typer.Typer(
    help="Watch a video of any length with a memory of fixed size, and ask about it at any moment.",
    epilog=EXITS,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
evaluations = typer.Typer(help="Measure a checkpoint.", epilog=EXITS)
app.add_typer(evaluations, name="eval")


class Precision(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Init(StrEnum):
    reference = "reference"
    teacher = "teacher"


ModelName = Annotated[str, typer.Option("--model", help="A checkpoint: tiny (comes along), a folder or a hub id.")]
Checkpoint = Annotated[str, typer.Argument(metavar="MODEL", help="tiny (comes along), a folder or a hub id.")]
Seed = Annotated[int, typer.Option(min=0, help="Another seed, other streams.")]
Out = Annotated[Path | None, typer.Option(help="Write the results to this file as JSON.")]
Plot = Annotated[Path | None, typer.Option(help="Draw them: .png, .pdf, .svg.")]
Rate = Annotated[float | None, typer.Option("--fps", help="Frames a second to look at (default: the checkpoint's).")]
AtMost = Annotated[int, typer.Option("--at-most", min=1, help="Tokens of an answer, at most.")]
Device = Annotated[str | None, typer.Option(help="Where to run (default: cuda where there is one, else cpu).")]
Dtype = Annotated[
    Precision | None, typer.Option(help="Of the weights (default: float32 on a CPU, bfloat16 elsewhere).")
]
Fp8 = Annotated[
    bool,
    typer.Option("--fp8", help="Products by 8-bit weights: faster on Ada and Hopper GPUs, a little less accurate."),
]
RefreshEvery = Annotated[
    int | None,
    typer.Option(min=1, metavar="FRAMES", help="Multiply the delta states by --keep so often: a full memory fades."),
]
Keep = Annotated[float | None, typer.Option(min=0, max=1, help="What --refresh-every leaves (default: 0, a reset).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """The `infinitevl` command; ends the process with one of the documented exit codes."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    usage: Any = typer.BadParameter.__mro__[1]  # what every mistake in a command line is
    try:
        code = app(arguments, prog_name="infinitevl", standalone_mode=False)
    except usage as error:
        of = error.ctx.command_path if getattr(error, "ctx", None) else "infinitevl"
        code = _refuse(f"{error.format_message()} (see {of} --help)", BAD_INPUT)
    sys.exit(code or 0)


def _version(asked: bool) -> None:
    if asked:
        from infinitevl import __version__

        print(__version__)
        raise typer.Exit()


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit.")
    ] = False,
) -> None:
    """What all verbs have in common."""


@app.command(epilog=EXITS)
def watch(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A video file; a picture, folder or glob; '-' for a pipe; a camera's number; an address.",
        ),
    ],
    model: ModelName = "tiny",
    ask: Annotated[
        list[str] | None,
        typer.Option(
            help="'12s: what is it?' or '0:12: ...' asks right after that second; else at the end. Repeat it."
        ),
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Also read questions from standard input while the stream goes on.")
    ] = False,
    fps: Rate = None,
    save: Annotated[Path | None, typer.Option(help="Write the memory to this file at the end.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on from a memory file: the source follows what it saw.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Draw frames, answers, memory and latency: .png, .pdf, .svg.")
    ] = None,
    at_most: AtMost = 64,
    device: Device = None,
    dtype: Dtype = None,
    eager: Annotated[
        bool, typer.Option("--eager", help="On CUDA, do not record steps as graphs: several times slower.")
    ] = False,
    fp8: Fp8 = False,
    refresh_every: RefreshEvery = None,
    keep: Keep = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Watch a source to its end and answer questions on the way; Ctrl-C ends it cleanly and still writes files.

    With --json the events are start, frame (every 5 seconds), answer, warning and end.
    """
    with _one_line(debug):
        from infinitevl.display import display
        from infinitevl.watch import Question, Settings
        from infinitevl.watch import watch as run

        asked = tuple(Question.parse(words) for words in ask or ())
        kept = _kept(refresh_every, keep)
        settings = Settings(source, asked, interactive, fps, save, resume, report, at_most, eager, refresh_every, kept)
        with display(as_json, interactive) as tell:
            raise typer.Exit(REASONS[run(_load(model, device, dtype, fp8), settings, tell).reason])


@app.command(epilog=EXITS)
def ask(
    words: Annotated[
        list[str],
        typer.Argument(metavar="FILE... QUESTION", help="Images, videos, texts (.txt, .md), and then the question."),
    ],
    model: ModelName = "tiny",
    fps: Rate = None,
    at_most: AtMost = 64,
    device: Device = None,
    dtype: Dtype = None,
    fp8: Fp8 = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer one question about images, recordings and texts, all of them in one prompt; texts come last in it."""
    with _one_line(debug):
        from infinitevl import oneshot
        from infinitevl.display import progress
        from infinitevl.report import printable
        from infinitevl.watch import InputError

        *sources, question = words
        if not sources or not question.strip():
            raise InputError("give at least one image, video or text, and then a question")
        with progress() as tell:
            answer, problems = oneshot.ask(
                _load(model, device, dtype, fp8), sources, question, fps, at_most, progress=tell
            )
        facts = {"question": question, "answer": answer.text, "tokens": answer.tokens, "seconds": answer.seconds}
        print(json.dumps({**facts, "problems": problems}) if as_json else printable(answer.text))
        if problems:
            raise typer.Exit(_refuse("; ".join(problems), BROKEN_OFF))


@app.command(epilog=EXITS)
def doctor(model: ModelName = "tiny", as_json: Json = False, debug: Debug = False) -> None:
    """Show versions, devices, which implementation each op chooses and why, and a checkpoint's size and checksums."""
    with _one_line(debug):
        from infinitevl import doctor as doctors

        found = doctors.examine(model)
        print(json.dumps(found) if as_json else "\n".join(doctors.lines(found)))
        raise typer.Exit(BAD_CHECKPOINT if found["checkpoint"]["problem"] else 0)


@app.command(epilog=EXITS)
def bench(
    train: Annotated[bool, typer.Option("--train", help="The speed of training; by torchrun on several GPUs.")] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="Frames, decode and streams by 8-bit weights.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="The tiny model, in under a minute.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Sample nothing, whatever time it takes.")] = False,
    only: Annotated[str | None, typer.Option(help="Parts to run, with commas between (default: all).")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result to this file as JSON.")] = None,
    against: Annotated[Path | None, typer.Option(help="Print ratios to an earlier result.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the two figures into this folder.")] = None,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Measure speed and memory on this machine, once a gate of correctness is green; the last line is JSON.

    Exit code 1 where the gate is not green (then there are no figures) or a part failed (the others are shown).
    """
    with _one_line(debug):
        from infinitevl import bench as benches
        from infinitevl.bench.gate import GateError
        from infinitevl.watch import InputError

        options = benches.Options(quick, full, device, () if only is None else tuple(only.split(",")), train, fp8)
        try:
            went_well = benches.command(options, out, against, plot)
        except benches.BenchError as error:
            raise InputError(str(error)) from error
        except GateError as error:
            raise typer.Exit(_refuse(str(error), UNEXPECTED)) from None
        raise typer.Exit(0 if went_well else UNEXPECTED)


@app.command(epilog=EXITS)
def synth(
    out: Annotated[Path, typer.Argument(metavar="OUT.mp4", help="The video; its questions go to OUT.json.")],
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another story.")] = 0,
    frames: Annotated[int, typer.Option(min=32, help="Seconds of the world.")] = 96,
    fps: Annotated[int, typer.Option(min=1, help="Frames a second in the file; the world changes every second.")] = 8,
    debug: Debug = False,
) -> None:
    """Write a video of the synthetic world (H.264), and beside it questions with their true answers as JSON."""
    with _one_line(debug):
        from infinitevl.synth import film
        from infinitevl.watch import InputError, check_place

        check_place(out)
        try:
            record = film.write(out, seed, frames, fps=fps)
        except ValueError as error:
            raise InputError(str(error)) from error
        asked = f"{len(record['questions'])} questions in {out.with_suffix('.json')}"
        print(f"{out}: {frames} s at {fps} frames a second; {asked}")


@app.command(epilog=EXITS)
def convert(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="A Qwen2.5-VL: a folder or a hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make; one that is there is refused.")],
    layers: Annotated[
        str | None,
        typer.Option(help="Layers that stay softmax, such as 0,4,8, or none (default: every fourth from 0)."),
    ] = None,
    init: Annotated[
        Init, typer.Option(help="Start q, k, v, o of the delta layers at random, or from the teacher's.")
    ] = Init.reference,
    window: Annotated[int, typer.Option(min=1, help="Tokens that the softmax layers see.")] = 8192,
    seed: Annotated[int, typer.Option(help="Of what is drawn at random.")] = 0,
    debug: Debug = False,
) -> None:
    """Make an untrained InfiniteVL of a Qwen2.5-VL: most softmax layers give way to delta layers, the rest is kept.

    OUT/conversion.json lists every tensor: copied, derived or new.
    """
    with _one_line(debug):
        from infinitevl.train import convert as conversion

        kind = conversion.Init(init.value)
        print(conversion.convert(teacher, out, layers=_numbers(layers), init=kind, window=window, seed=seed).summary())


@app.command(epilog=EXITS)
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="stage1_layers, stage1_layers_tiny, and so on.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe, such as student=FOLDER data=chat.jsonl."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Checkpoints and log go to this folder (default: runs/RECIPE).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint there.")] = False,
    debug: Debug = False,
) -> None:
    """Train one stage: 1a (stage1_layers), 1b (stage1_logits), 2 (stage2_instruct) or 3 (stage3_long), each also _tiny.

    SIGTERM and Ctrl-C save and end it; --resume goes on to the bit. On several GPUs: torchrun --nproc-per-node=N
    -m infinitevl train ...
    """
    with _one_line(debug):
        from infinitevl.train import loop, recipes

        chosen = recipes.recipe(recipe, changes or ())
        raise typer.Exit(REASONS[loop.train(chosen, out or Path("runs") / recipe, resume).reason])


@evaluations.command(epilog=EXITS)
def heldout(
    model: Checkpoint = "tiny",
    controls: Annotated[str | None, typer.Option(help="Columns, with commas between (default: all).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many streams of each world: a quick look.")] = None,
    out: Out = None,
    device: Device = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """The held-out test of the synthetic world: the table of what a checkpoint gets right, controls beside it."""
    with _one_line(debug):
        from infinitevl.eval import heldout as test
        from infinitevl.eval import record
        from infinitevl.watch import check_place

        if out is not None:
            check_place(out)
        wanted = list(test.CONTROLS) if controls is None else controls.split(",")
        result = test.run(model, *_place(device, dtype), wanted, limit)
        if out is not None:
            record.write(out, result.as_json())
        print(result.markdown(), end="")


@evaluations.command(epilog=EXITS)
def recall(
    model: Checkpoint = "tiny",
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, max=100_000_000, help="Greatest age of what is asked for (default: 16384 on a CPU, else 524288)."
        ),
    ] = None,
    streams: Annotated[int | None, typer.Option(min=1, help="Side by side (default: 4 on a CPU, else 32).")] = None,
    controls: Annotated[
        str, typer.Option(help="Columns, with commas between; full is the model itself.")
    ] = "full,no_delta,blind",
    refresh_every: RefreshEvery = None,
    keep: Keep = None,
    state_dtype: Annotated[
        Precision, typer.Option(help="Round the delta states to it after every frame.")
    ] = Precision.float32,
    seed: Seed = 0,
    out: Out = None,
    plot: Plot = None,
    device: Device = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Recall by age: what was shown once in a long stream, asked for half a window later, then 1, 2, 4 ... windows.

    On a CPU about three minutes; half a million tokens want a GPU.
    """
    with _one_line(debug):
        import torch

        from infinitevl.eval import figure
        from infinitevl.eval import recall as test

        upkeep = test.Upkeep(refresh_every, _kept(refresh_every, keep), getattr(torch, state_dtype))
        columns = controls.split(",")
        test.check_columns(columns, test.COLUMNS)
        _check_places(out, plot)
        result = test.run(model, *_place(device, dtype), tokens, streams, columns, upkeep, seed)
        _written(result.as_json(), out, plot, figure.recall)
        print(result.markdown(), end="")


@evaluations.command(epilog=EXITS)
def length(
    model: Checkpoint = "tiny",
    frames: Annotated[
        int | None, typer.Option(min=8, help="Of the longest stream (default: 512 on a CPU, else 4096).")
    ] = None,
    streams: Annotated[int | None, typer.Option(min=1, help="Side by side (default: 8 on a CPU, else 32).")] = None,
    controls: Annotated[str, typer.Option(help="full, or full,no_delta.")] = "full",
    eager: Annotated[bool, typer.Option("--eager", help="On CUDA, do not record steps as graphs.")] = False,
    seed: Seed = 0,
    out: Out = None,
    plot: Plot = None,
    device: Device = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Accuracy, time of a frame and bytes of memory after 8, 32, 128 ... frames, for models without a window too."""
    with _one_line(debug):
        from infinitevl.eval import figure
        from infinitevl.eval import length as test

        columns = controls.split(",")
        test.check_columns(columns, test.COLUMNS)
        _check_places(out, plot)
        result = test.run(model, *_place(device, dtype), frames, streams, columns, eager, seed)
        _written(result.as_json(), out, plot, figure.length)
        print(result.markdown(), end="")


def _check_places(out: Path | None, plot: Path | None) -> None:
    """Refuses files that could not be written, before the hours of work."""
    from infinitevl.eval import figure
    from infinitevl.watch import check_place

    for path in filter(None, (out, plot)):
        check_place(path)
    if plot is not None:
        figure.check(plot)


def _written(result: dict[str, Any], out: Path | None, plot: Path | None, draw: Callable[..., None]) -> None:
    """A result as JSON and as a figure, where they are wanted."""
    from infinitevl.eval import record

    if out is not None:
        record.write(out, result)
    if plot is not None:
        draw(result, plot)


def _load(where: str, device: str | None, dtype: Precision | None, fp8: bool = False) -> Model:
    from infinitevl.weights import load

    model = load(where, *_place(device, dtype), fp8)
    if fp8 and model.device.type == "cpu":
        typer.echo("infinitevl: --fp8 on a CPU is slow: it shows what FP8 costs in accuracy, not its speed", err=True)
    return model


def _place(device: str | None, dtype: Precision | None) -> tuple[str, torch.dtype | None]:
    """Where to run, and in which dtype (None: the usual one there). InputError for a device that is not there."""
    import torch

    from infinitevl.watch import InputError

    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that it does not know or have
        raise InputError(f"--device {name}: torch finds no such device here (cpu is one)") from error
    return name, None if dtype is None else getattr(torch, dtype)


def _kept(refresh_every: int | None, keep: float | None) -> float:
    """The share that --refresh-every leaves."""
    from infinitevl.watch import InputError

    if keep is not None and refresh_every is None:
        raise InputError("--keep says what --refresh-every leaves: give both")
    return keep or 0.0


def _numbers(words: str | None) -> list[int] | None:
    """The layers of --layers: numbers with commas between, or "none"."""
    from infinitevl.watch import InputError

    if words is None:
        return None
    try:
        return [] if words == "none" else [int(word) for word in words.split(",")]
    except ValueError:
        raise InputError(f"--layers {words!r}: give numbers with commas between, such as 0,4,8, or none") from None


# Errors


@contextmanager
def _one_line(debug: bool) -> Iterator[None]:
    """Within it, an error ends the command with one line on standard error (the traceback too, for --debug)."""
    try:
        with _terminable():
            yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        raise typer.Exit(_refuse("interrupted", INTERRUPTED)) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads: what is left must not fail again
        raise typer.Exit(UNEXPECTED) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        code = _code(error)
        hint = f"unexpected {type(error).__name__}, --debug shows where: " if code == UNEXPECTED else ""
        raise typer.Exit(_refuse(hint + _line(error), code)) from None


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does; `watch` and `train` hear both themselves, and save first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _code(error: Exception) -> int:
    """The exit code of an error."""
    from infinitevl.config import ConfigError
    from infinitevl.eval.exam import EvalError
    from infinitevl.memory import MemoryFileError
    from infinitevl.ops.fp8 import Fp8Error
    from infinitevl.report import ReportError
    from infinitevl.train.checkpoint import ResumeError
    from infinitevl.train.convert import ConvertError
    from infinitevl.train.data import DataError
    from infinitevl.train.grad_check import GradientError
    from infinitevl.train.loop import DivergedError
    from infinitevl.train.recipes import RecipeError
    from infinitevl.video import VideoError
    from infinitevl.watch import InputError
    from infinitevl.weights import CheckpointError

    kinds: dict[Any, int] = {
        (VideoError, InputError, ReportError, ConvertError, OSError, ImportError): BAD_INPUT,
        (Fp8Error, RecipeError, DataError, ResumeError, GradientError, EvalError): BAD_INPUT,
        (CheckpointError, ConfigError): BAD_CHECKPOINT,
        (MemoryFileError,): BAD_MEMORY,
        (DivergedError,): DIVERGED,
    }
    return next((code for kind, code in kinds.items() if isinstance(error, kind)), UNEXPECTED)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _refuse(message: str, code: int) -> int:
    print(f"infinitevl: {message}", file=sys.stderr)
    return code
