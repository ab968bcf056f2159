"""Follow a frame: beside those of other streams, each a row of one memory, all advanced in one step.

Slots are fixed, so that every step has one shape and can be recorded: a row without a frame is in it and does not move.
"""

from __future__ import annotations

import time as clock
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from infinitevl import processor as pictures
from infinitevl import weights
from infinitevl.generate import GREEDY, Sampling, prefill
from infinitevl.memory import Memory
from infinitevl.model import Model
from infinitevl.processor import Ids, Size
from infinitevl.record import IN_FLIGHT, Recorded, Replayed, overwrite, record
from infinitevl.step import frame_step, tables
from infinitevl.stream import Answer, Eager, Stream, Turns, begin, check_pixels, check_time, last_time
from infinitevl.video import Frame


class SlotError(ValueError):
    """A slot that is not open, or one more than there are."""


class _Shown(NamedTuple):
    """A frame that was looked at and found good: seconds, pixels, the ids of the stamp before it (empty: none)."""

    time: float
    pixels: np.ndarray
    stamp: Ids


class StreamBatch:
    """Up to `slots` streams in one memory: a step advances those that have a frame and leaves the others as they are.

    What a slot sees and says is what a `Stream` of its own would. Any number of threads may share it: first come, first
    served, as with a `Stream`. size: (height, width) at which the model sees all frames; None: that of the first one.
    On CUDA the step is recorded when the first frame comes, and questions as those of a `Stream`; eager=True runs both
    unrecorded. Raises ValueError for a model without a window, less than one slot, or a size that cannot be cut into
    tokens.
    """

    @torch.inference_mode(False)  # what is recorded writes to this memory wherever it is replayed
    def __init__(self, model: Model, slots: int, size: Size | None = None, eager: bool = False) -> None:
        if slots < 1:
            raise ValueError(f"a batch has 1 slot or more, got {slots}")
        if model.config.text.window is None:
            raise ValueError("a batch of streams runs on for ever: this model keeps every token and cannot")
        stride = model.processor.config.patch_size * model.processor.config.merge_size
        if size is not None and (min(size) < stride or size[0] % stride or size[1] % stride):
            raise ValueError(f"frames of {size[0]}x{size[1]}: both sides must be multiples of {stride}")
        self.model, self.slots = model, slots
        self._memory = model.empty_memory(slots)
        self._times: dict[int, float | None] = {}  # the open slots, and when each one's latest frame was
        self._size = size
        self._recorded: Recorded | None = None
        self._tables: tuple[object, ...] = ()
        self._flying: deque[torch.cuda.Event] = deque()
        self._eager = eager or model.device.type != "cuda"
        asked = model.empty_memory()  # a copy of the row that the latest question is about
        self._asker: Any = Eager(model, asked) if self._eager else Replayed(model, asked)
        self._lock = Turns()

    @property
    def opened(self) -> tuple[int, ...]:
        """The slots that are open."""
        return tuple(sorted(self._times))

    @property
    def nbytes(self) -> int:
        """Bytes of the memory of all slots, open or not; the same number for ever."""
        return self._memory.nbytes

    def time(self, slot: int) -> float | None:
        """Time of a slot's latest frame in seconds, None before any. Raises SlotError."""
        self._check_open(slot)
        return self._times[slot]

    def open(self) -> int:
        """A free slot, its past forgotten and waiting for a first frame. Raises SlotError where none is free."""
        return self._open(begin(self.model))

    def close(self, slot: int) -> None:
        """Ends a stream; its slot is free for another. Raises SlotError."""
        with self._lock:
            self._check_open(slot)
            del self._times[slot]

    def observe(self, frames: Mapping[int, Frame | np.ndarray], time: float | None = None) -> None:
        """The next frame of each slot named, in one step: Frames, or uint8 pixels [H, W, 3], of any sizes.

        time: seconds, of all of them; None: a Frame's own, and for pixels one sampling step after the slot's last.
        Raises SlotError, TimeError and ValueError (pixels), naming the slot, before anything is changed.
        """
        with self._lock:
            shown = {slot: self._checked(slot, frame, time) for slot, frame in frames.items()}
            if not shown:
                return
            size = self._size or self._fitted(next(iter(shown.values())).pixels)
            pixels = self._pixels(shown, size)
            memory = self._stamped({slot: each.stamp for slot, each in shown.items() if each.stamp})
            times = torch.zeros(self.slots, dtype=torch.float64)
            times[list(shown)] = torch.tensor([each.time for each in shown.values()], dtype=torch.float64)
            self._memory = self._step(memory, pixels, self._sent(times), self._there(shown))
            self._size = size
            self._times.update({slot: each.time for slot, each in shown.items()})

    def ask(
        self, slot: int, question: str, at_most: int = 64, keep: bool = False, sampling: Sampling = GREEDY
    ) -> Answer:
        """An answer about all that a slot has seen; keep=True leaves both in its memory. Raises SlotError."""
        began = clock.perf_counter()
        words = self.model.processor.chat.tail(question)
        with self._lock:
            time = self.time(slot)
            self._copy(self._asker.memory, self._row(slot))
            asked = self._asker.snapshot(at_most, sampling)
            if keep:
                ids = list(self._asker.answer(asked, words, behind=0))
                self._asker.keep(asked, (self.model.config.stop_tokens[0], *self.model.processor.chat.reopen))
                self._write(slot, self._asker.memory)
        if not keep:
            ids = list(self._asker.answer(asked, words))
        text = self.model.processor.text(ids).strip()
        return Answer(text, time, len(ids), clock.perf_counter() - began)

    def refresh(self, slot: int, keep: float) -> None:
        """Let what a slot's delta states hold fade, as `Stream.refresh` does. Raises SlotError and ValueError."""
        with self._lock:
            self._write(slot, self._row(slot).refresh(keep))

    def fork(self, slot: int) -> Stream:
        """A stream with a slot's past and a future of its own. Raises SlotError."""
        with self._lock:
            stream = Stream(self.model, self._row(slot), self._eager)
            stream._size = self._size
            return stream

    def save(self, slot: int, path: str | Path) -> None:
        """Write a slot's memory to a file, such as `Stream.save` writes. Raises SlotError."""
        with self._lock:
            memory = self._row(slot)
        memory.save(path, weights.fingerprint(self.model))

    def load(self, path: str | Path) -> int:
        """A free slot that continues from a saved memory. Raises MemoryFileError, and SlotError where none is free."""
        memory = Memory.load(path, self.model.empty_memory(), weights.fingerprint(self.model))
        if len(memory.seen) != 1:
            raise ValueError(f"{path}: a slot's memory has one row, this one {len(memory.seen)}")
        return self._open(memory)

    def _open(self, memory: Memory) -> int:
        with self._lock:
            slot = next((slot for slot in range(self.slots) if slot not in self._times), None)
            if slot is None:
                raise SlotError(f"all {self.slots} slots are open: close one first")
            self._write(slot, memory)
            self._times[slot] = last_time(memory)
            return slot

    def _row(self, slot: int) -> Memory:
        """A copy of a slot's memory."""
        self._check_open(slot)
        return self._memory.rows(torch.tensor([slot], device=self.model.device))

    def _write(self, slot: int, memory: Memory) -> None:
        """A memory of one row into a slot, in place: 16 slots of the published model are 2 GB, too much to copy."""
        self._copy(self._memory.map(lambda leaf: leaf[slot : slot + 1]), memory)

    @torch.inference_mode()  # or a memory that was made there could not be written to outside
    def _copy(self, memory: Memory, other: Memory) -> None:
        overwrite(memory, other)

    def _step(self, memory: Memory, *inputs: Tensor) -> Memory:
        """One frame each into the rows that have one, as `frame_step` does; replayed where it is recorded."""
        if self._eager:
            return frame_step(self.model, memory, *inputs)
        if memory is not self._memory:
            self._copy(self._memory, memory)
        if self._recorded is None:
            self._tables = tables(self.model, inputs[0])
            self._recorded = record(lambda *rest: (frame_step(self.model, *rest),), self._memory, *inputs)
        if len(self._flying) == IN_FLIGHT:
            self._flying.popleft().synchronize()
        self._recorded(*inputs)
        event = torch.cuda.Event()
        event.record()
        self._flying.append(event)
        return self._memory

    def _check_open(self, slot: int) -> None:
        if slot not in self._times:
            opened = ", ".join(map(str, self.opened)) or "none"
            raise SlotError(f"slot {slot} is not open (open: {opened})")

    def _checked(self, slot: int, frame: Frame | np.ndarray, time: float | None) -> _Shown:
        """A slot's frame with its time and stamp; raises what `observe` says."""
        self._check_open(slot)
        try:
            pixels = frame.pixels if isinstance(frame, Frame) else frame
            check_pixels(pixels)
            self._fitted(pixels)
            now = self._checked_time(slot, frame, time)
            stamp = self.model.processor.stamp_due(self._times[slot], now)
            return _Shown(now, pixels, () if stamp is None else self.model.processor.stamp_ids(stamp))
        except ValueError as error:
            raise type(error)(f"slot {slot}: {error}") from None

    def _checked_time(self, slot: int, frame: Frame | np.ndarray, time: float | None) -> float:
        last = self._times[slot]
        following = 0.0 if last is None else last + 1 / self.model.processor.config.frames_per_second
        if time is None:
            time = frame.time if isinstance(frame, Frame) else following
        check_time(last, time)
        return time

    def _fitted(self, pixels: np.ndarray) -> Size:
        """The size at which a batch that begins with this frame sees all; ValueError for one that cannot be seen."""
        return pictures.fit_frame(pixels.shape[0], pixels.shape[1], self.model.processor.config)

    def _pixels(self, shown: Mapping[int, _Shown], size: Size) -> Tensor:
        """uint8 [slots, *size, 3]: the pictures at the size the model sees, those of one shape resized together."""
        pixels = None
        for shape in {each.pixels.shape for each in shown.values()}:
            of_shape = {slot: each for slot, each in shown.items() if each.pixels.shape == shape}
            host = np.zeros((self.slots, *shape), dtype=np.uint8)
            for slot, each in of_shape.items():
                host[slot] = each.pixels
            seen = pictures.resize(self._sent(torch.from_numpy(host)), size)
            mine = self._there(of_shape).view(-1, 1, 1, 1)
            pixels = seen if pixels is None else torch.where(mine, seen, pixels)
        assert pixels is not None
        return pixels

    def _sent(self, x: Tensor) -> Tensor:
        """A tensor of the host on the model's device; on CUDA the host does not wait for what is queued there."""
        if self.model.device.type != "cuda":
            return x
        return x.pin_memory().to(self.model.device, non_blocking=True)

    def _stamped(self, stamps: Mapping[int, Ids]) -> Memory:
        """The memory with each slot's stamp in it, those of one length in one call."""
        memory = self._memory
        for length in sorted({len(ids) for ids in stamps.values()}):
            due = {slot: ids for slot, ids in stamps.items() if len(ids) == length}
            ids = torch.zeros(self.slots, length, dtype=torch.int64)
            ids[list(due)] = torch.tensor(list(due.values()))
            _, memory = prefill(self.model, memory, self._sent(ids), there=self._there(due))
        return memory

    def _there(self, slots: Mapping[int, object]) -> Tensor:
        """bool [slots]: which of them are named."""
        there = torch.zeros(self.slots, dtype=torch.bool)
        there[list(slots)] = True
        return self._sent(there)
