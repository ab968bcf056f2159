"""Follow a frame: many streams at once, a row of one memory each: their frames, their stamps, greedy answers of forks.

The steps are those that `stream` and `generate` take for one row; here every row has words and times of its own, so
texts are padded on the left and a row without any is left as it is. A `Watcher` is for streams that share their times:
nothing is padded, and on CUDA its steps are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from infinitevl import processor as pictures
from infinitevl import rope, stream
from infinitevl.generate import prefill
from infinitevl.memory import Memory
from infinitevl.model import CapacityError, Model
from infinitevl.processor import Ids, Size
from infinitevl.record import Recorded, overwrite, record
from infinitevl.step import frame_step, tables


@torch.no_grad()
def feed(model: Model, memory: Memory, texts: Sequence[Ids]) -> tuple[Tensor, Memory]:
    """Ids of its own into every row -> hidden of each row's last one [B, D] and the memory.

    A row with text ends its run of frames; one without does not change, and its hidden means nothing.
    """
    longest = max(map(len, texts))
    gaps = torch.tensor([longest - len(ids) for ids in texts], device=model.device)[:, None]
    tokens = torch.tensor([(0,) * (longest - len(ids)) + tuple(ids) for ids in texts], device=model.device)
    present = torch.arange(longest, device=model.device) >= gaps
    positions, begun = rope.next_text(memory, longest)
    begun = begun._replace(start=torch.where(present[:, -1], begun.start, memory.start))
    full = all(len(ids) == longest for ids in texts)  # the shorter path where nothing is padded
    hidden, after = model(model.embed(tokens), positions - gaps, begun, None if full else present)
    assert after is not None
    return hidden[:, -1], after


def observe(model: Model, memory: Memory, pixels: Tensor, times: Sequence[float]) -> Memory:
    """One frame into every row: uint8 [B, H, W, 3] at `times` (seconds, [B]), each after the stamp that is due.

    The rule of `stream.observe`. ValueError where a row's time is before its last one.
    """
    processor = model.processor
    last = [None if time != time else time for time in memory.last.tolist()]  # NaN before any frame
    if any(before is not None and now < before for before, now in zip(last, times, strict=True)):
        raise ValueError(f"times never decrease: {list(times)} after {last}")
    due = [processor.stamp_due(before, now) for before, now in zip(last, times, strict=True)]
    stamps = [() if time is None else processor.stamp_ids(time) for time in due]
    if any(stamps):
        _, memory = feed(model, memory, stamps)
    pixels = pixels.to(model.device)
    size = pictures.fit_frame(pixels.shape[1], pixels.shape[2], processor.config)
    time = torch.tensor(times, dtype=torch.float64, device=model.device)
    return frame_step(model, memory, pictures.resize(pixels, size), time)


@torch.no_grad()
def answers(model: Model, memory: Memory, questions: Sequence[str], at_most: int) -> list[str]:
    """The greedy answer of each row to its question, as `stream.answer` gives it; the memory given is consumed."""
    chat, stops = model.processor.chat, torch.tensor(model.config.stop_tokens, device=model.device)
    hidden, memory = feed(model, memory, [chat.tail(question) for question in questions])
    row = torch.arange(len(questions), device=model.device)  # the question that each row of the memory answers
    going = torch.ones_like(row, dtype=torch.bool)
    said = torch.full((len(questions), at_most), -1, device=model.device)
    for step in range(at_most):
        token = model.logits(hidden).argmax(-1)
        going = going & ~torch.isin(token, stops)
        said[row[going], step] = token[going]
        left = int(going.sum())
        if not left or step + 1 == at_most:
            break
        if 2 * left <= len(row):  # rows that ended are dropped by halves: a row weighs a megabyte
            kept = going.nonzero()[:, 0]
            memory, row, token, going = memory.rows(kept), row[kept], token[kept], going[kept]
        hidden, memory = feed(model, memory, [(each,) for each in token.tolist()])
    texts = ([each for each in ids if each >= 0] for ids in said.tolist())
    return [model.processor.text(ids).strip() for ids in texts]


def tokens_seen(model: Model, size: Size, times: Sequence[float]) -> np.ndarray:
    """How many tokens a stream has seen after each of its frames, of `size` (pixels) and at `times`: int64 [F]."""
    processor = model.processor
    height, width = pictures.fit_frame(*size, processor.config)
    stride = processor.config.patch_size * processor.config.merge_size
    frame = (height // stride) * (width // stride)
    due = [processor.stamp_due(last, now) for last, now in zip([None, *times], times, strict=False)]
    stamps = [0 if time is None else len(processor.stamp_ids(time)) for time in due]
    return len(processor.chat.head) + np.cumsum(frame + np.array(stamps, np.int64))


class Watcher:
    """Streams side by side, a row of `memory` each, whose frames come at the same times.

    recorded: the steps are recorded when first met and replayed from then on, with the numbers of the eager ones; None:
    on CUDA. capacity (tokens) is for models without a window. A recorded step advances `memory` in place: ask copies of
    its rows (`Memory.rows`).
    """

    def __init__(self, model: Model, streams: int, capacity: int | None = None, recorded: bool | None = None) -> None:
        self.model = model
        self.memory = stream.begin(model, streams, capacity)
        self.recorded = model.device.type == "cuda" if recorded is None else recorded
        self._room = capacity
        self._tokens = len(model.processor.chat.head)  # seen by each row; a replay does not look whether more fit
        self._last: float | None = None
        self._steps: dict[tuple[object, ...], Recorded] = {}
        self._tables: tuple[object, ...] = ()  # what a recorded step reads and does not hold itself

    def observe(self, pixels: Tensor, time: float) -> None:
        """One frame into every row: uint8 [B, H, W, 3] at `time` (seconds), after the stamp where one is due.

        Raises TimeError for a time before the last one, CapacityError where a memory without a window is full.
        """
        stream.check_time(self._last, time)
        processor, device = self.model.processor, self.model.device
        due = processor.stamp_due(self._last, time)
        if due is not None:
            ids = torch.tensor(processor.stamp_ids(due), device=device).expand(len(pixels), -1)
            self._step(self._say, ids.shape[1], ids)
        size = pictures.fit_frame(pixels.shape[1], pixels.shape[2], processor.config)
        seen = pictures.resize(pixels.to(device), size)
        times = torch.full((len(pixels),), time, dtype=torch.float64, device=device)
        stride = processor.config.patch_size * processor.config.merge_size
        self._step(self._take, size[0] * size[1] // stride**2, seen, times)
        self._last = time

    def change(self, function: Callable[[Memory], Memory]) -> None:
        """Puts what `function` makes of the memory in its place."""
        with torch.no_grad():
            after = function(self.memory)
            if self.recorded:
                overwrite(self.memory, after)
            else:
                self.memory = after

    def _say(self, memory: Memory, ids: Tensor) -> Memory:
        return prefill(self.model, memory, ids)[1]

    def _take(self, memory: Memory, pixels: Tensor, times: Tensor) -> Memory:
        return frame_step(self.model, memory, pixels, times)

    def _step(self, step: Callable[..., Memory], tokens: int, *inputs: Tensor) -> None:
        """A step of so many tokens a row, over the memory; each kind and shape is recorded once."""
        self._tokens += tokens
        if self._room is not None and self._tokens > self._room:
            raise CapacityError(f"{self._tokens} tokens do not fit a memory made for {self._room}")
        if not self.recorded:
            self.memory = step(self.memory, *inputs)
            return
        kind = (step.__name__, *(tuple(each.shape) for each in inputs))
        if kind not in self._steps:
            if step == self._take:
                self._tables += tables(self.model, inputs[0])
            self._steps[kind] = record(lambda memory, *rest: (step(memory, *rest),), self.memory, *inputs)
        self._steps[kind](*inputs)
