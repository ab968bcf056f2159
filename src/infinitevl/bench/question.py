"""From a question to the first token of its answer, known on the host: while nothing else runs, and under a camera."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from infinitevl.bench.setup import Found, Row, Setup
from infinitevl.bench.streams import STEP, pictures
from infinitevl.bench.timing import Times, synchronise
from infinitevl.stream import Stream

RATE = 24.0  # frames a second of the camera
PAUSE = 0.05  # seconds between two questions: no multiple of the camera's period


def measure(setup: Setup) -> Iterator[Found]:
    """The part "question"."""
    stream = Stream(setup.model)
    for number, picture in enumerate(pictures(setup)):
        stream.observe(picture, STEP * number)
    count = setup.scale.questions
    _asked(stream, setup, 3)  # makes what is made once
    took = _asked(stream, setup, count)
    note = f"a question of {_tokens(setup)} tokens"
    yield Row("question", "first token, idle", "ms", 1e3 * took.p50, 1e3 * took.p99, count, note)
    with camera(stream, setup) as seen:
        took = _asked(stream, setup, count)
    rate = seen["frames"] / seen["seconds"]
    note = f"p99, while frames come at {RATE:g} a second ({rate:.3g} were taken in)"
    yield Row("question", "first token under load, p50", "ms", 1e3 * took.p50, None, count)
    yield Row("question", "first token under load, p99", "ms", 1e3 * took.p99, None, count, note)


def _tokens(setup: Setup) -> int:
    return len(setup.model.processor.chat.tail(_question(0)))


def _question(number: int) -> str:
    """31 words, another beginning every time."""
    return f"q{number} " + "what does the sign over the door say now " * 3 + "and since when"


def _asked(stream: Stream, setup: Setup, count: int) -> Times:
    """Seconds from the call to the first token; the rest of the answer is not waited for."""
    seconds = []
    for number in range(count):
        synchronise(setup.device)
        began = time.perf_counter()
        next(stream.ask_pieces(_question(number), at_most=1), None)
        seconds.append(time.perf_counter() - began)
        time.sleep(PAUSE)
    return Times(seconds)


@contextmanager
def camera(stream: Stream, setup: Setup) -> Iterator[dict[str, float]]:
    """While the block runs a thread feeds frames, RATE a second; afterwards: how many, in how many seconds."""
    pool, over, failed = pictures(setup), threading.Event(), []
    seen = {"frames": 0.0, "seconds": 0.0}
    at = stream.time or 0.0

    def feed() -> None:
        try:
            began, number = time.perf_counter(), 0
            while not over.wait(max(0.0, began + number / RATE - time.perf_counter())):
                stream.observe(pool[number % len(pool)], at + STEP * (number + 1))
                number += 1
            seen.update(frames=number, seconds=time.perf_counter() - began)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=feed, name="camera")
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
    if failed:
        raise failed[0]
