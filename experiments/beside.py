"""Processes side by side with a time limit, by which every one has had the time to save what it has."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

STOPPED = (130, -signal.SIGTERM)  # a training that saved and ended; one that the signal met between two trainings
SAVING, ENDING = 45.0, 10.0  # seconds before the limit at which processes are told to stop, and are killed


def side_by_side(
    work: Callable[..., None], jobs: Mapping[str, tuple[Any, ...]], processes: int, seconds: float
) -> dict[str, int]:
    """Call `work` with the arguments of each job, by title, so many at once; the exit codes of those that were begun.

    Before `seconds` are over, or at SIGTERM or Ctrl-C, all that run are sent SIGTERM, and no other is begun.
    """
    context, waiting, began = multiprocessing.get_context("spawn"), list(jobs), time.monotonic()
    running: dict[str, BaseProcess] = {}
    codes: dict[str, int] = {}
    share = min(1.0, seconds / (2 * SAVING))  # of the times for saving and ending, where the limit is short
    stopping = False
    with told_to_stop() as told:
        while running or (waiting and not stopping):
            while waiting and len(running) < processes and not stopping:
                title = waiting.pop(0)
                running[title] = context.Process(target=work, args=jobs[title])
                running[title].start()
            time.sleep(0.1)
            left = seconds - (time.monotonic() - began)
            if not stopping and (told or left < SAVING * share):
                stopping = True
                for process in running.values():
                    process.terminate()
            if left < ENDING * share:
                for process in running.values():
                    process.kill()
            for title in [title for title, process in running.items() if process.exitcode is not None]:
                codes[title] = running.pop(title).exitcode or 0
                print(f"{time.monotonic() - began:5.0f} s  {title}: {ending(codes[title])}", flush=True)
    return codes


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
