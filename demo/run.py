"""The demo: writes a film, watches it, asks about what is shown and what is long gone, and draws demo/report.png.

What is asked, and when, comes from the film alone (`synth.film`): one question of each kind at the moment that its
place in the programme and the least age of its evidence ask for. Nothing is chosen by what the model gets right.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import torch

import infinitevl
from infinitevl import report
from infinitevl.config import ConfigError
from infinitevl.synth import film
from infinitevl.watch import Answered, Ended, Event, Question, Seen, Settings, Warned, watch
from infinitevl.weights import CheckpointError

HERE = Path(__file__).parent
SEED, SECONDS, FPS = 7, 96, 8
AT_MOST = 12  # tokens of an answer; the longest right one has 6


def main(model: str = "tiny", folder: Path = HERE) -> int:
    """Runs it all with a checkpoint, writes out/film.mp4 and report.png into `folder`; how many answers are right."""
    path = folder / "out" / "film.mp4"
    path.parent.mkdir(exist_ok=True)
    asked = film.write(path, SEED, SECONDS, fps=FPS)["questions"]
    print(f"wrote {_short(path)}: {SECONDS} s of the synthetic world, with words, digits and fonts never trained on")
    print("watching it as this would, which anyone can run:\n")
    print(command(path, asked) + "\n")
    torch.set_num_threads(1)  # a frame of 16 tokens gains little from a second one, and waits for it on a busy machine
    loaded, told = infinitevl.load(model), list[Event]()
    window = loaded.config.text.window or 0
    ended = watch(loaded, settings(path, asked), lambda event: _told(told, event, asked, window))
    answers = [event for event in told if isinstance(event, Answered)]
    right = sum(said.answer == question["answer"] for said, question in zip(answers, asked, strict=True))
    _close(told, ended)
    title = f"{path.name}: {ended.frames} frames, {ended.tokens:,} tokens, one memory of {ended.memory_bytes:,} bytes"
    report.draw(folder / "report.png", title, moments(path, answers, asked), points(told))
    print(f"{right} of {len(asked)} answers are right, letter for letter; see {_short(folder / 'report.png')}")
    return right


def settings(path: Path, asked: list[dict[str, Any]]) -> Settings:
    questions = tuple(Question(question["text"], question["time"]) for question in asked)
    return Settings(str(path), questions, fps=1, at_most=AT_MOST)


def command(path: Path, asked: list[dict[str, Any]]) -> str:
    """The same watch as a command line."""
    words = (f"{question['time']}s: {question['text']}" for question in asked)
    asks = (f"    --ask {shlex.quote(question)}" for question in words)
    return " \\\n".join([f"infinitevl watch {_short(path)} --fps 1 --at-most {AT_MOST}", *asks])


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _told(told: list[Event], event: Event, asked: list[dict[str, Any]], window: int) -> None:
    """Keeps an event; prints an answer beside the truth."""
    told.append(event)
    if isinstance(event, Warned):
        print(f"note: {event.message}")
    if isinstance(event, Answered):
        question = asked[sum(isinstance(each, Answered) for each in told) - 1]
        print("\n".join(beside(event, question, window)), flush=True)


def beside(said: Answered, question: dict[str, Any], window: int) -> list[str]:
    """An answer beside the truth, as lines. window: tokens that the model's softmax blocks still see."""
    assert said.question == question["text"] and said.time is not None
    mark = "right" if said.answer == question["answer"] else "WRONG"
    answer = report.printable(said.answer) or "(nothing)"
    return [
        f"[{report.shown(said.time)}] {said.question}",
        f"       {answer:<18} truth: {question['answer']:<18} {mark}   {age(said, question, window)}",
        f"       memory {said.memory_bytes:,} bytes, {said.ms_per_frame:.1f} ms per frame, "
        f"{said.tokens:,} tokens seen so far",
    ]


def age(said: Answered, question: dict[str, Any], window: int) -> str:
    """How long what was asked about has been out of view, in seconds and in windows."""
    seconds = question["time"] - question["evidence"]
    if question["evidence"] < 0:
        return "never shown"
    windows = seconds * said.tokens / (question["time"] + 1) / window
    return "in view" if seconds == 0 else f"out of view for {seconds} s ({windows:.1f} windows)"


def _close(told: list[Event], ended: Ended) -> None:
    sizes = {event.memory_bytes for event in told if isinstance(event, Seen)}
    pace = f"{ended.ms_per_frame:.1f} ms per frame (median), {ended.rate:.1f} frames a second with the answers"
    print(f"\n{ended.frames} frames, {ended.tokens:,} tokens; {pace}")
    print(f"memory after each frame: {', '.join(f'{size:,} bytes' for size in sorted(sizes))}")


def moments(path: Path, answers: list[Answered], asked: list[dict[str, Any]]) -> list[report.Moment]:
    """The report's cards, with the frame that was in view and the one that held the answer."""
    with infinitevl.frames(path, fps=1) as source:
        pictures = [frame.pixels for frame in source]
    cards = []
    for said, question in zip(answers, asked, strict=True):
        time, seen = question["time"], question["evidence"]
        gone = (float(seen), pictures[seen]) if 0 <= seen < time else None
        cards.append(report.Moment(time, pictures[time], said.question, said.answer, question["answer"], gone))
    return cards


def points(told: list[Event]) -> list[report.Point]:
    return [report.Point(event.time, event.ms, event.memory_bytes) for event in told if isinstance(event, Seen)]


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except (CheckpointError, ConfigError) as error:
        sys.exit(str(error))
