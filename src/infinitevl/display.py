"""Follow a frame: what `watch` tells about it, shown on a terminal, as plain lines in a pipe, or as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from infinitevl.report import printable, shown
from infinitevl.watch import Answered, Ended, Event, Seen, Started, Tell, Warned

EVERY = 5.0  # seconds of real time between two lines of progress
NAMES = {Started: "start", Seen: "frame", Answered: "answer", Warned: "warning", Ended: "end"}
ENDS = {"end": "end of the source", "broken": "end of what could be read", "interrupted": "interrupted"}


@contextmanager
def display(as_json: bool = False, interactive: bool = False, every: float = EVERY) -> Iterator[Tell]:
    """Where to tell events: a bar and lines on a terminal, lines in a pipe, or JSON, all on standard output.

    Frames are shown on the bar, or every so many seconds in lines and in JSON, or not at all where somebody types.
    """
    if as_json:
        yield _Lines(_json, every)
    elif sys.stdout.isatty() and not interactive:
        with _bar() as tell:
            yield tell
    else:
        yield _Lines(_plain, None if interactive else every)


@contextmanager
def progress() -> Iterator[Callable[[int, int], None]]:
    """Where to tell (done, total) tokens of a long prompt: a bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("tokens read, left"), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=done < total)


Write = Callable[[Event], list[str]]


class _Lines:
    """Prints the lines of every event, but of frames only one in `every` seconds; None: none."""

    def __init__(self, write: Write, every: float | None) -> None:
        self._write, self._every, self._latest = write, every, time.monotonic()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Seen):
            now = time.monotonic()
            if self._every is None or now - self._latest < self._every:
                return
            self._latest = now
        sys.stdout.write("".join(f"{line}\n" for line in self._write(event)))
        sys.stdout.flush()


@contextmanager
def _bar() -> Iterator[Tell]:
    """A bar at the bottom of the terminal, which frames move, and everything else as lines above it."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
    from rich.text import Text

    columns = SpinnerColumn(), BarColumn(bar_width=20), TextColumn("{task.description}", markup=False)
    with Progress(*columns, transient=True) as bar:
        task, began = bar.add_task("", total=None), 0.0

        def tell(event: Event) -> None:
            nonlocal began
            if isinstance(event, Seen):
                bar.update(task, completed=event.time - began, description=_state(event))
                return
            if isinstance(event, Started):
                began = event.resumed_at or 0.0
                bar.update(task, total=event.seconds)
            for line in _plain(event):
                bar.console.print(Text(line, style="yellow" if isinstance(event, Warned) else ""), soft_wrap=True)

        yield tell


def _json(event: Event) -> list[str]:
    return [json.dumps({"event": NAMES[type(event)], **asdict(event)})]


def _plain(event: Event) -> list[str]:
    """An event in words, as lines."""
    match event:
        case Started():
            return _started(event)
        case Seen():
            return [_state(event)]
        case Answered():
            return answered(event)
        case Warned():
            return [f"note: {printable(event.message)}"]
        case Ended():
            return _ended(event)


def _started(event: Started) -> list[str]:
    kind = "live" if event.live else "" if event.seconds is None else shown(event.seconds)
    lines = [
        f"watching {event.source}{f' ({kind})' if kind else ''}, {event.frames_per_second:g} fps, "
        f"on {event.device} in {event.dtype}, memory {event.memory_bytes:,} bytes"
    ]
    if event.resumed_at is not None:
        lines.append(f"going on after {shown(event.resumed_at)}")
    if event.interactive:
        lines.append("type a question and Enter at any time; Ctrl-D ends the questions, Ctrl-C the watch")
    return lines


def _state(event: Seen) -> str:
    dropped = f", dropped {event.dropped:,}" if event.dropped else ""
    return (
        f"{shown(event.time)}  frame {event.frames:,}, {event.rate:.1f} a second, {event.ms:.1f} ms, "
        f"{event.tokens:,} tokens, memory {event.memory_bytes:,} bytes{dropped}"
    )


def answered(event: Answered) -> list[str]:
    """A question, its answer, and what it cost, as lines."""
    when = "before any frame" if event.time is None else shown(event.time)
    return [
        f"[{when}] {printable(event.question)}",
        f"    -> {printable(event.answer) or '(nothing)'}",
        f"    {event.tokens:,} tokens seen, memory {event.memory_bytes:,} bytes, {_pace(event)}, "
        f"answered in {event.answer_seconds:.2f} s",
    ]


def _pace(event: Answered | Ended) -> str:
    if event.ms_per_frame is None or event.ms_per_frame_recent is None:
        return "no frame yet"
    return f"{event.ms_per_frame:.1f} ms per frame (lately {event.ms_per_frame_recent:.1f})"


def _ended(event: Ended) -> list[str]:
    at = "before any frame" if event.time is None else f"at {shown(event.time)}"
    dropped = f", dropped {event.dropped:,}" if event.dropped else ""
    lines = [
        f"{ENDS[event.reason]} {at}: {event.frames:,} frames, {event.rate:.1f} a second, {event.tokens:,} tokens, "
        f"memory {event.memory_bytes:,} bytes, {_pace(event)}{dropped}"
    ]
    lines += [f"memory saved to {event.saved}"] if event.saved else []
    return lines + ([f"report drawn to {event.report}"] if event.report else [])
