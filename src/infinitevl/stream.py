"""Follow a frame: `observe` puts it into the memory; `answer` asks a clone. `Stream` is a memory being fed.

Streaming is not a mode: these are plain functions over a model and a memory, and the memory given is consumed.
"""

from __future__ import annotations

import math
import threading
import time as clock
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from infinitevl import processor as pictures
from infinitevl import weights
from infinitevl.generate import GREEDY, Sampling, decode, feed
from infinitevl.memory import Memory
from infinitevl.model import Model
from infinitevl.record import Replayed
from infinitevl.step import frame_step
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
    check_time(last, frame.time)
    height, width, _ = frame.pixels.shape
    size = size or pictures.fit_frame(height, width, model.processor.config)
    pixels = torch.from_numpy(np.ascontiguousarray(frame.pixels))[None]
    return _seen(model, memory, _stamp(model, last, frame.time), pixels, size, frame.time)


def check_pixels(pixels: np.ndarray) -> None:
    """Raises ValueError for what is no picture: uint8 [H, W, 3] is one."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"a frame is uint8 [height, width, 3], got {pixels.dtype} {list(pixels.shape)}")


def check_time(last: float | None, time: float) -> None:
    """Raises TimeError for a frame's time that is no number, or before the `last` one's."""
    if not math.isfinite(time):
        raise TimeError(f"a frame's time is a number of seconds, got {time}")
    if last is not None and time < last:
        raise TimeError(f"a frame at {time:.3f} s comes after one at {last:.3f} s: times never decrease")


def _stamp(model: Model, last: float | None, time: float) -> Sequence[int]:
    """Ids of the time stamp that the checkpoint wants before a frame at `time`; none where none is due."""
    due = model.processor.stamp_due(last, time)
    return () if due is None else model.processor.stamp_ids(due)


def _seen(
    model: Model, memory: Memory, stamp: Sequence[int], pixels: Tensor, size: tuple[int, int], time: float
) -> Memory:
    """A stamp and one frame, uint8 [1, H, W, 3] on the host, into a memory of one row."""
    if stamp:
        _, memory = feed(model, memory, stamp)
    at = torch.tensor([time], dtype=torch.float64, device=model.device)
    return frame_step(model, memory, pictures.resize(pixels.to(model.device), size), at)


def reply(
    model: Model, memory: Memory, ids: Sequence[int], at_most: int, sampling: Sampling
) -> Generator[int, None, Memory]:
    """Feeds a question's ids, yields its answer's, returns the memory with both in it; the memory given is consumed."""
    hidden, memory = feed(model, memory, ids)
    return (yield from decode(model, memory, hidden, at_most, sampling))


def answer(model: Model, memory: Memory, question: str, at_most: int = 64, sampling: Sampling = GREEDY) -> str:
    """The answer to a question about what a memory has seen. It is asked on a clone: the memory stays as it is."""
    words = model.processor.chat.tail(question)
    return model.processor.text(list(reply(model, memory.clone(), words, at_most, sampling))).strip()


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


class Running(Protocol):
    """How a stream's memory is fed and asked: `Eager` or `record.Replayed`."""

    @property
    def memory(self) -> Memory: ...
    def observe(self, stamp: Sequence[int], pixels: Tensor, size: tuple[int, int], time: float) -> None: ...
    def snapshot(self, at_most: int, sampling: Sampling) -> Any: ...
    def answer(self, asked: Any, ids: Sequence[int], behind: int = ...) -> Iterator[int]: ...
    def keep(self, asked: Any, ids: Sequence[int]) -> None: ...
    def refresh(self, keep: float) -> None: ...


class Eager:
    """A stream's memory fed and asked step by step; `record.Replayed` is the same with recorded steps."""

    def __init__(self, model: Model, memory: Memory) -> None:
        self.model, self.memory = model, memory

    def observe(self, stamp: Sequence[int], pixels: Tensor, size: tuple[int, int], time: float) -> None:
        """A time stamp's ids, or none, and one frame: uint8 [1, H, W, 3] on the host, seen at `size`."""
        # on CUDA kernels write in place: a step that is broken off must not show
        memory = self.memory.clone() if self.model.device.type == "cuda" else self.memory
        self.memory = _seen(self.model, memory, stamp, pixels, size, time)

    def snapshot(self, at_most: int, sampling: Sampling) -> Asked:
        """An answer that starts from the memory as it is now."""
        return Asked(self.memory.clone(), at_most, sampling)

    def answer(self, asked: Asked, ids: Sequence[int], behind: int = 0) -> Generator[int, None, None]:
        """Feeds a question and yields the answer's ids; none is made ahead, whatever `behind` says."""
        asked.memory = yield from reply(self.model, asked.memory, ids, asked.at_most, asked.sampling)

    def keep(self, asked: Asked, ids: Sequence[int]) -> None:
        """Ends an answer with more text, and makes its memory the stream's."""
        _, self.memory = feed(self.model, asked.memory, ids)

    def refresh(self, keep: float) -> None:
        """`Memory.refresh` of the stream's memory."""
        self.memory = self.memory.refresh(keep)


@dataclass
class Asked:
    """An answer in the making."""

    memory: Memory
    at_most: int
    sampling: Sampling


class Stream:
    """A memory that is being fed. One camera thread and any number of asking threads may share it.

    Order: first come, first served; a question is about exactly the frames whose `observe` returned before the question
    took its clone. Only `ask(keep=True)` makes frames wait for the whole answer, because it writes.

    On CUDA every step is recorded as a graph when it is first met (the first frame and the first question take a second
    longer) and replayed from then on; `observe` returns before the GPU is done. eager=True runs them unrecorded, and so
    does a model without a window, which must look whether each step still fits. All threads use one CUDA stream.
    """

    def __init__(self, model: Model, memory: Memory | None = None, eager: bool = False) -> None:
        if memory is not None and len(memory.seen) != 1:
            raise ValueError(f"a stream's memory has one row, this one {len(memory.seen)}: take one with memory.rows()")
        memory = begin(model) if memory is None else memory
        recorded = model.device.type == "cuda" and model.config.text.window is not None and not eager
        self.model = model
        self._run: Running = Replayed(model, memory) if recorded else Eager(model, memory)
        self._last = last_time(memory)
        self._size: tuple[int, int] | None = None
        self._eager = eager
        self._lock = Turns()

    @property
    def memory(self) -> Memory:
        """A clone of the memory as it is now."""
        with self._lock:
            return self._run.memory.clone()

    @property
    def time(self) -> float | None:
        """Time of the latest frame in seconds, None before any."""
        return self._last

    @property
    def frames(self) -> int:
        """Frames seen so far, those before a save included."""
        return int(self._run.memory.frames[0])

    @property
    def tokens(self) -> int:
        """Tokens seen so far: frames, stamps, kept questions and answers."""
        return int(self._run.memory.seen[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the memory; the same number for ever."""
        return self._run.memory.nbytes

    def observe(self, frame: Frame | np.ndarray, time: float | None = None) -> None:
        """The next frame: a Frame, or uint8 pixels [H, W, 3] with a time in seconds (default: one sampling step later).

        The first frame sets the size at which all are seen. Raises TimeError and ValueError (pixels) before anything
        is changed.
        """
        pixels = frame.pixels if isinstance(frame, Frame) else frame
        check_pixels(pixels)
        with self._lock:
            if time is None:
                time = frame.time if isinstance(frame, Frame) else self._next_time()
            check_time(self._last, time)
            size = self._size or pictures.fit_frame(pixels.shape[0], pixels.shape[1], self.model.processor.config)
            stamp = _stamp(self.model, self._last, time)
            self._run.observe(stamp, torch.from_numpy(np.ascontiguousarray(pixels))[None], size, time)
            self._size, self._last = size, time

    def _next_time(self) -> float:
        last = self.time
        return 0.0 if last is None else last + 1 / self.model.processor.config.frames_per_second

    def ask(self, question: str, at_most: int = 64, keep: bool = False, sampling: Sampling = GREEDY) -> Answer:
        """An answer about all that was seen so far. keep=True leaves both in the memory, for follow-ups."""
        if not keep:
            return self.asking(question, at_most, sampling)()
        began, words = clock.perf_counter(), self.model.processor.chat.tail(question)
        with self._lock:
            time, asked = self.time, self._run.snapshot(at_most, sampling)
            ids = list(self._run.answer(asked, words, behind=0))
            self._run.keep(asked, (self.model.config.stop_tokens[0], *self.model.processor.chat.reopen))
        return self._said(ids, time, began)

    def asking(self, question: str, at_most: int = 64, sampling: Sampling = GREEDY) -> Callable[[], Answer]:
        """An answer about what was seen until now; the function returned makes it, whatever is seen meanwhile."""
        began, words = clock.perf_counter(), self.model.processor.chat.tail(question)
        with self._lock:
            time, asked = self.time, self._run.snapshot(at_most, sampling)
        return lambda: self._said(list(self._run.answer(asked, words)), time, began)

    def _said(self, ids: list[int], time: float | None, began: float) -> Answer:
        text = self.model.processor.text(ids).strip()
        return Answer(text, time, len(ids), clock.perf_counter() - began)

    def ask_pieces(self, question: str, at_most: int = 64, sampling: Sampling = GREEDY) -> Iterator[str]:
        """The answer as it is being said, in pieces of text; asked when the first piece is wanted."""
        with self._lock:
            asked = self._run.snapshot(at_most, sampling)
        ids: list[int] = []
        said = ""
        for token in self._run.answer(asked, self.model.processor.chat.tail(question)):
            ids.append(token)
            text = self.model.processor.text(ids)
            if text != said and not text.endswith("\ufffd"):  # half a character
                yield text[len(said) :]
                said = text
        rest = self.model.processor.text(ids)[len(said) :]
        if rest:
            yield rest

    def refresh(self, keep: float) -> None:
        """Let what the delta states hold fade: each times `keep`, 0 (emptied) to 1 (as it is). Windows stay.

        Called every so many frames it keeps states from filling up, on streams far longer than a model was trained on;
        a model without delta layers has none. Raises ValueError.
        """
        with self._lock:
            self._run.refresh(keep)

    def fork(self) -> Stream:
        """A second stream with this one's past and a future of its own."""
        with self._lock:
            twin = Stream(self.model, self._run.memory.clone(), self._eager)
            twin._size = self._size
            return twin

    def save(self, path: str | Path) -> None:
        """Write the memory to a file; `Stream.load` continues from it, in another process or on another device."""
        self.memory.save(path, weights.fingerprint(self.model))

    @classmethod
    def load(cls, path: str | Path, model: Model, capacity: int | None = None, eager: bool = False) -> Stream:
        """A stream that continues from a saved memory; `capacity` as it was made with, for models without a window.

        Raises MemoryFileError naming what does not fit.
        """
        like = model.empty_memory(capacity=capacity)
        return cls(model, Memory.load(path, like, weights.fingerprint(model)), eager)
