"""Follow a frame: `observe` puts it into the memory; `answer` asks a clone. `Stream` is a memory being fed.

Streaming is not a mode: these are plain functions over a model and a memory, and the memory given is consumed.
"""

from __future__ import annotations

import math
import threading
import time as clock
from collections import deque
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from infinitevl import processor as pictures
from infinitevl import rope, weights
from infinitevl.generate import GREEDY, Sampling, decode, feed
from infinitevl.memory import Memory
from infinitevl.model import Model
from infinitevl.video import Frame


class TimeError(ValueError):
    """A frame from before the one seen last (the message names both times), or of no time at all."""


class Answer(NamedTuple):
    """What the model said: time of the stream when it was asked (None before any frame), tokens and seconds it took."""

    text: str
    time: float | None
    tokens: int
    seconds: float


def begin(model: Model, batch: int = 1, capacity: int | None = None) -> Memory:
    """A memory that holds the head of the chat format and waits for the first frame."""
    _, memory = feed(model, model.empty_memory(batch, capacity), model.processor.chat.head)
    return memory


@torch.no_grad()
def frame_step(model: Model, memory: Memory, pixels: Tensor, time: Tensor) -> Memory:
    """One frame into the memory: pixels uint8 [B, h, w, 3] of the size the model sees, time float64 [B] in seconds.

    Tensors in, tensors out: this is the step that can be recorded and replayed.
    """
    patches, (rows, columns) = pictures.patchify(pixels, model.processor.config, pair=False)
    merge = model.config.vision.merge_size
    positions, memory = rope.next_frame(memory, time, rows // merge, columns // merge, model.config)
    _, after = model(model.vision(patches, rows, columns), positions, memory)
    assert after is not None
    return after


def last_time(memory: Memory) -> float | None:
    """Time of the latest frame in seconds (of the first row), None before any."""
    last = float(memory.last[0])
    return None if np.isnan(last) else last


def observe(model: Model, memory: Memory, frame: Frame, size: tuple[int, int] | None = None) -> Memory:
    """One frame into a memory of one row, with the time stamp the checkpoint wants before it.

    size: (height, width) at which the model sees it; None: what the checkpoint's frame size makes of its shape.
    Raises TimeError where frame.time is before the last one or not finite.
    """
    last = last_time(memory)
    if not math.isfinite(frame.time):
        raise TimeError(f"a frame's time is a number of seconds, got {frame.time}")
    if last is not None and frame.time < last:
        raise TimeError(f"a frame at {frame.time:.3f} s comes after one at {last:.3f} s: times never decrease")
    processor = model.processor
    stamp = processor.stamp_due(last, frame.time)
    if stamp is not None:
        _, memory = feed(model, memory, processor.stamp_ids(stamp))
    pixels = torch.from_numpy(np.ascontiguousarray(frame.pixels)).to(model.device)[None]
    size = size or pictures.fit_frame(pixels.shape[1], pixels.shape[2], processor.config)
    time = torch.tensor([frame.time], dtype=torch.float64, device=model.device)
    return frame_step(model, memory, pictures.resize(pixels, size), time)


def reply(
    model: Model, memory: Memory, question: str, at_most: int, sampling: Sampling
) -> Generator[int, None, Memory]:
    """Feeds a question, yields its answer's ids, returns the memory with both in it; the memory given is consumed."""
    hidden, memory = feed(model, memory, model.processor.chat.tail(question))
    return (yield from decode(model, memory, hidden, at_most, sampling))


def answer(model: Model, memory: Memory, question: str, at_most: int = 64, sampling: Sampling = GREEDY) -> str:
    """The answer to a question about what a memory has seen. It is asked on a clone: the memory stays as it is."""
    return model.processor.text(reply(model, memory.clone(), question, at_most, sampling)).strip()


class Turns:
    """A lock that is taken first come, first served: a camera without pauses would keep a plain one to itself."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()  # who waits, in order; the first has the lock

    def __enter__(self) -> None:
        mine = object()
        with self._changed:
            self._queue.append(mine)
            try:
                self._changed.wait_for(lambda: self._queue[0] is mine)
            except BaseException:  # Ctrl-C while waiting: the others must not wait for one who left
                self._queue.remove(mine)
                self._changed.notify_all()
                raise

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._queue.popleft()
            self._changed.notify_all()


class Stream:
    """A memory that is being fed. One camera thread and any number of asking threads may share it.

    Order: first come, first served; a question is about exactly the frames whose `observe` returned before the question
    took its clone. Only `ask(keep=True)` makes frames wait for the whole answer, because it writes.
    """

    def __init__(self, model: Model, memory: Memory | None = None) -> None:
        if memory is not None and len(memory.seen) != 1:
            raise ValueError(f"a stream's memory has one row, this one {len(memory.seen)}: take one with memory.rows()")
        self.model = model
        self._memory = begin(model) if memory is None else memory
        self._size: tuple[int, int] | None = None
        self._lock = Turns()

    @property
    def memory(self) -> Memory:
        """A clone of the memory as it is now."""
        with self._lock:
            return self._memory.clone()

    @property
    def time(self) -> float | None:
        """Time of the latest frame in seconds, None before any."""
        return last_time(self._memory)

    @property
    def frames(self) -> int:
        """Frames seen so far, those before a save included."""
        return int(self._memory.frames[0])

    @property
    def tokens(self) -> int:
        """Tokens seen so far: frames, stamps, kept questions and answers."""
        return int(self._memory.seen[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the memory; the same number for ever."""
        return self._memory.nbytes

    def observe(self, frame: Frame | np.ndarray, time: float | None = None) -> None:
        """The next frame: a Frame, or uint8 pixels [H, W, 3] with a time in seconds (default: one sampling step later).

        The first frame sets the size at which all are seen. Raises TimeError and ValueError (pixels) before anything
        is changed.
        """
        pixels = frame.pixels if isinstance(frame, Frame) else frame
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"a frame is uint8 [height, width, 3], got {pixels.dtype} {list(pixels.shape)}")
        with self._lock:
            if time is None:
                time = frame.time if isinstance(frame, Frame) else self._next_time()
            size = self._size or pictures.fit_frame(pixels.shape[0], pixels.shape[1], self.model.processor.config)
            self._memory = observe(self.model, self._memory, Frame(time, pixels), size)
            self._size = size

    def _next_time(self) -> float:
        last = self.time
        return 0.0 if last is None else last + 1 / self.model.processor.config.frames_per_second

    def ask(self, question: str, at_most: int = 64, keep: bool = False, sampling: Sampling = GREEDY) -> Answer:
        """An answer about all that was seen so far. keep=True leaves both in the memory, for follow-ups."""
        began = clock.perf_counter()
        with self._lock:
            time, memory = self.time, self._memory.clone()
            if keep:
                ids, memory = _drained(reply(self.model, memory, question, at_most, sampling))
                self._memory = self._turned(memory)
        if not keep:
            ids, _ = _drained(reply(self.model, memory, question, at_most, sampling))
        text = self.model.processor.text(ids).strip()
        return Answer(text, time, len(ids), clock.perf_counter() - began)

    def _turned(self, memory: Memory) -> Memory:
        """The memory after a kept answer: its turn is ended and a new video begun, ready for frames or a question."""
        ids = (self.model.config.stop_tokens[0], *self.model.processor.chat.reopen)
        return feed(self.model, memory, ids)[1]

    def ask_pieces(self, question: str, at_most: int = 64, sampling: Sampling = GREEDY) -> Iterator[str]:
        """The answer as it is being said, in pieces of text; asked when the first piece is wanted."""
        memory, ids, said = self.memory, [], ""
        for token in reply(self.model, memory, question, at_most, sampling):
            ids.append(token)
            text = self.model.processor.text(ids)
            if text != said and not text.endswith("\ufffd"):  # half a character
                yield text[len(said) :]
                said = text
        rest = self.model.processor.text(ids)[len(said) :]
        if rest:
            yield rest

    def fork(self) -> Stream:
        """A second stream with this one's past and a future of its own."""
        with self._lock:
            twin = Stream(self.model, self._memory.clone())
            twin._size = self._size
            return twin

    def save(self, path: str | Path) -> None:
        """Write the memory to a file; `Stream.load` continues from it, in another process or on another device."""
        self.memory.save(path, weights.fingerprint(self.model))

    @classmethod
    def load(cls, path: str | Path, model: Model, capacity: int | None = None) -> Stream:
        """A stream that continues from a saved memory; `capacity` as it was made with, for models without a window.

        Raises MemoryFileError naming what does not fit.
        """
        like = model.empty_memory(capacity=capacity)
        return cls(model, Memory.load(path, like, weights.fingerprint(model)))


def _drained(generator: Generator[int, None, Memory]) -> tuple[list[int], Memory]:
    """All that a generator yields, and what it returns."""
    ids = []
    while True:
        try:
            ids.append(next(generator))
        except StopIteration as stop:
            return ids, stop.value
