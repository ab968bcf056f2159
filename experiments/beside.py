"""Processes side by side with a time limit, by which every one has had the time to save what it has."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

STOPPED = (130, -signal.SIGTERM)  # a training that saved and ended; one that the signal met between two trainings
SAVING, ENDING = 45.0, 10.0  # seconds before the limit at which processes are told to stop, and are killed


def side_by_side(
    work: Callable[..., None],
    jobs: Mapping[str, tuple[Any, ...]],
    processes: int,
    seconds: float,
    gpus: Sequence[str] = (),
    alone: Collection[str] = (),
) -> dict[str, int]:
    """Call `work` with the arguments of each job, by title, so many at once; the exit codes of those that were begun.

    Before `seconds` are over, or at SIGTERM or Ctrl-C, all that run are sent SIGTERM, and no other is begun. gpus: as
    CUDA_VISIBLE_DEVICES names them; each process sees one alone, that which has the fewest. alone: titles beside which
    none runs, because they take times.
    """
    context, waiting, began = multiprocessing.get_context("spawn"), list(jobs), time.monotonic()
    running: dict[str, BaseProcess] = {}
    on: dict[str, str] = {}
    codes: dict[str, int] = {}
    share = min(1.0, seconds / (2 * SAVING))  # of the times for saving and ending, where the limit is short
    killed: set[str] = set()  # by the limit, and not by a fault of theirs
    stopping = False

    def at_once(title: str) -> int:
        return 1 if any(each in alone for each in (title, *running)) else processes

    with told_to_stop() as told:
        while running or (waiting and not stopping):
            while waiting and len(running) < at_once(waiting[0]) and not stopping:
                title = waiting.pop(0)
                taken = Counter(on[each] for each in running if each in on)
                running[title] = context.Process(target=work, args=jobs[title])
                with seeing(min(gpus, key=lambda gpu: taken[gpu]) if gpus else None) as gpu:
                    running[title].start()
                if gpu is not None:
                    on[title] = gpu
            time.sleep(0.1)
            left = seconds - (time.monotonic() - began)
            if not stopping and (told or left < SAVING * share):
                stopping = True
                for process in running.values():
                    process.terminate()
            if left < ENDING * share:
                for title, process in running.items():
                    process.kill()
                    killed.add(title)
            for title in [title for title, process in running.items() if process.exitcode is not None]:
                code = running.pop(title).exitcode or 0
                codes[title] = STOPPED[0] if title in killed and code == -signal.SIGKILL else code
                print(f"{time.monotonic() - began:5.0f} s  {title}: {ending(codes[title])}", flush=True)
    return codes


@contextmanager
def seeing(gpu: str | None) -> Iterator[str | None]:
    """Processes that are started within see this GPU alone; None: all."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        yield gpu
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


@contextmanager
def told_to_stop() -> Iterator[list[str]]:
    """A list that gets the name of every SIGTERM and Ctrl-C."""
    told: list[str] = []

    def handle(number: int, frame: FrameType | None) -> None:
        told.append(signal.Signals(number).name)

    old = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def ending(code: int) -> str:
    """An exit code in words."""
    words = {0: "done"} | dict.fromkeys(STOPPED, "stopped; --resume goes on")
    return words.get(code, f"failed with {code}: its out.txt says why")
