"""Follow a batch: it begins here: conversations with pictures -> ids, labels, positions -> packed rows of tokens.

A row stream r of a run takes samples r, r + batch, r + 2 batch, ... of an endless shuffled order, and fills each row
with as many whole ones as fit, in order. What row comes next is therefore one number for each row stream, whoever makes
it: that is all that a resumed run needs, and why two processes see what one sees.
Letters: B rows, T tokens of one, F frames.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from infinitevl.processor import Size
from infinitevl.train.losses import IGNORED
from infinitevl.train.recipes import Recipe

BROKEN = 1000  # samples in a row that cannot be used before the data as a whole is refused


class DataError(ValueError):
    """Data that a run cannot use at all; one line that names it and says what to do."""


class BrokenSample(ValueError):
    """One sample that cannot be used: it is skipped, counted and named. The message is the reason."""


class Pictures(NamedTuple):
    """Frames of one size that the vision encoder sees at once: uint8 [F, h, w, 3], or numbers that are painted late.

    painted: {"strips", "scene", "grain"} of the synthetic world (pixels are 20 times as large). pair: neighbouring
    frames share a grid, as those of a video in a prompt do; F is even then. tokens: visual tokens of all.
    """

    pixels: Tensor | None
    painted: dict[str, Tensor] | None
    size: Size
    pair: bool
    tokens: int


class Sample(NamedTuple):
    """One conversation. ids, labels [T] (the id that follows; IGNORED where it is not learned), positions [3, T]."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    pictures: tuple[Pictures, ...]


class Source(Protocol):
    """Samples by number. `len` is how many there are; None: it never ends."""

    @property
    def size(self) -> int | None: ...

    def name(self, number: int) -> str: ...

    def sample(self, number: int) -> Sample:
        """Raises BrokenSample."""
        ...


class Batch(NamedTuple):
    """B packed rows. A change of `segment` starts from empty state, convolution and window.

    ids, labels, segment [B, T]; positions [3, B, T]; real bool [B, T]: no padding (which is a last segment of its own).
    pictures in groups of one size; order [visual tokens]: where each visual token of the rows is in the groups' tokens,
    put one after the other.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    segment: Tensor
    real: Tensor
    pictures: tuple[Pictures, ...]
    order: Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        def held(group: Pictures) -> Pictures:
            painted = group.painted and {name: moved(part) for name, part in group.painted.items()}
            return group._replace(pixels=None if group.pixels is None else moved(group.pixels), painted=painted)

        ids, labels, positions, segment, real, order = map(moved, (*self[:5], self.order))
        return Batch(ids, labels, positions, segment, real, tuple(map(held, self.pictures)), order)


class Trouble(NamedTuple):
    """A sample that was skipped, and why."""

    name: str
    reason: str


class Part(NamedTuple):
    """What one process gets at once: a batch, where its row streams stand after it, what was skipped on the way."""

    batch: Batch
    rows: tuple[int, ...]
    after: tuple[int, ...]
    troubles: tuple[Trouble, ...]


@dataclass(frozen=True)
class Order:
    """The order in which `batch` row streams draw from a source: every sample once an epoch, in a new order each."""

    size: int | None
    batch: int
    seed: int

    def number(self, row: int, place: int) -> int:
        """The sample that row stream `row` draws as its `place`-th."""
        drawn = place * self.batch + row
        if self.size is None:
            return drawn
        epoch, at = divmod(drawn, self.size)
        return _scattered(at, self.size, np.random.default_rng([self.seed, epoch]))


def _scattered(at: int, size: int, rng: np.random.Generator) -> int:
    """The place of `at` in a random order of `size` things, without making the order: a Feistel cipher, walked on
    while it leaves the range."""
    half = max(1, (size - 1).bit_length() + 1 >> 1)
    keys = [int(key) for key in rng.integers(1 << 62, size=6)]
    while True:
        left, right = at >> half, at & ((1 << half) - 1)
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & ((1 << half) - 1))
        at = left << half | right
        if at < size:
            return at


def _mixed(value: int) -> int:
    """A 64-bit hash of an integer (the finaliser of SplitMix64)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31


class Rows:
    """Packs the samples of a source into rows. It keeps a sample that did not fit, only to save making it again."""

    def __init__(self, source: Source, order: Order, length: int) -> None:
        self.source, self.order, self.length = source, order, length
        self._spare: dict[int, tuple[int, Sample]] = {}

    def next(self, row: int, place: int) -> tuple[list[Sample], int, list[Trouble]]:
        """The samples of the next row of a stream that stands at `place`, where it stands then, what was skipped."""
        samples: list[Sample] = []
        troubles: list[Trouble] = []
        room = self.length
        while room:
            try:
                sample = self._sample(row, place)
            except BrokenSample as error:
                troubles.append(Trouble(self.source.name(self.order.number(row, place)), str(error)))
                self._check(troubles, samples)
                place += 1
                continue
            if len(sample.ids) > room:
                self._spare[row] = (place, sample)
                break
            samples.append(sample)
            room -= len(sample.ids)
            place += 1
        return samples, place, troubles

    def _sample(self, row: int, place: int) -> Sample:
        kept, sample = self._spare.pop(row, (-1, None))
        if sample is None or kept != place:
            sample = self.source.sample(self.order.number(row, place))
        if len(sample.ids) > self.length:
            raise BrokenSample(f"{len(sample.ids)} tokens, and a row holds {self.length}: raise length or cut it")
        return sample

    def _check(self, troubles: list[Trouble], samples: list[Sample]) -> None:
        """A source of which nothing can be used would be skipped for ever."""
        size = self.order.size
        if not samples and len(troubles) >= (BROKEN if size is None else min(BROKEN, size)):
            first = troubles[0]
            raise DataError(f"{len(troubles)} samples in a row cannot be used; the first, {first.name}: {first.reason}")


def packed(rows: Sequence[Sequence[Sample]], length: int) -> Batch:
    """Rows of samples as one batch, each filled up with padding."""
    shape = (len(rows), length)
    ids, segment = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels, positions = torch.full(shape, IGNORED), torch.zeros(3, *shape, dtype=torch.int64)
    real = torch.zeros(shape, dtype=torch.bool)
    for row, samples in enumerate(rows):
        at = 0
        for number, sample in enumerate(samples):
            part = slice(at, at + len(sample.ids))
            ids[row, part], labels[row, part], segment[row, part] = sample.ids, sample.labels, number
            positions[:, row, part] = sample.positions
            at = part.stop
        segment[row, at:], real[row, :at] = len(samples), True
    return Batch(ids, labels, positions, segment, real, *grouped([p for row in rows for s in row for p in s.pictures]))


def grouped(pictures: Sequence[Pictures]) -> tuple[tuple[Pictures, ...], Tensor]:
    """Pictures in groups of one size and kind, and where in the groups' tokens those of each are, in their order."""
    kinds: dict[tuple[Size, bool, bool], list[int]] = {}
    for number, picture in enumerate(pictures):
        kinds.setdefault((picture.size, picture.pair, picture.painted is None), []).append(number)
    groups, places, at = [], [torch.zeros(0, dtype=torch.int64)] * (len(pictures) + 1), 0
    for members in kinds.values():
        groups.append(_joined([pictures[number] for number in members]))
        for number in members:
            places[number] = torch.arange(at, at + pictures[number].tokens)
            at += pictures[number].tokens
    return tuple(groups), torch.cat(places)


def _joined(pictures: Sequence[Pictures]) -> Pictures:
    first = pictures[0]._replace(tokens=sum(each.tokens for each in pictures))
    if first.painted is None:
        return first._replace(pixels=torch.cat([each.pixels for each in pictures if each.pixels is not None]))
    parts = [each.painted for each in pictures if each.painted is not None]
    return first._replace(painted={name: torch.cat([part[name] for part in parts]) for name in first.painted})


class Feed(IterableDataset[Part]):
    """The parts of one process, in order, for ever; each of its workers makes every so-manieth of them.

    mine: the row streams of this process, `micro` to a part. start: where all streams of the run stand.
    """

    def __init__(self, opened: Callable[[], Source], recipe: Recipe, mine: range, start: Sequence[int]) -> None:
        self.opened, self.recipe, self.mine, self.start = opened, recipe, mine, list(start)

    @property
    def parts(self) -> int:
        """Parts that this process has in each step."""
        return len(self.mine) // self.recipe.micro

    def __iter__(self) -> Iterator[Part]:
        worker, recipe = get_worker_info(), self.recipe
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        source = self.opened()
        rows = Rows(source, Order(source.size, recipe.batch, recipe.seed), recipe.length)
        at = {row: self.start[row] for row in self.mine}
        while True:
            for number in range(first, self.parts, every):
                yield self._part(rows, self.mine[number * recipe.micro :][: recipe.micro], at)

    def _part(self, rows: Rows, which: range, at: dict[int, int]) -> Part:
        filled, troubles = [], []
        for row in which:
            samples, at[row], skipped = rows.next(row, at[row])
            filled.append(samples)
            troubles += skipped
        return Part(packed(filled, rows.length), tuple(which), tuple(at[row] for row in which), tuple(troubles))


def parts(feed: Feed, device: torch.device) -> Iterator[Part]:
    """The parts of a feed, made ahead by worker processes where the recipe has any. Raises DataError."""
    workers = shared_by(feed.parts, min(feed.recipe.workers, cores()))
    loader = DataLoader(
        feed,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # or it would draw from the run's own random numbers
        multiprocessing_context="spawn" if workers else None,  # a fork of a process with CUDA or threads may hang
        prefetch_factor=2 if workers else None,
        worker_init_fn=_quiet,
    )
    try:
        yield from loader
    except DataError as error:  # a worker's comes as its whole traceback, of which the last line is the message
        message = str(error).splitlines()[-1].removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")
        raise DataError(message) from None


def cores() -> int:
    """The cores that this process may use: more workers than that would wait for each other."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shared_by(parts: int, most: int) -> int:
    """How many workers, `most` at the most, share the parts of a step evenly; 0: none."""
    return next((workers for workers in range(min(parts, most), 0, -1) if parts % workers == 0), 0)


def _as_it_is(part: Any) -> Any:
    return part


def _quiet(worker: int) -> None:
    """A worker leaves signals to the process that trains, and the cores to the other workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
