"""Steps on CUDA as recorded graphs: launched once by Python, then replayed for every frame and token, for ever.

A recorded step reads and writes fixed buffers. Its memory is one of them, so a replay advances it in place; what else
changes between replays (pixels, times, ids) is copied into the step's inputs. Nothing in a memory is a Python number,
so a replay does what the step itself would have done.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from infinitevl import rope
from infinitevl.generate import Sampling, draw
from infinitevl.memory import Memory
from infinitevl.model import Model
from infinitevl.processor import resize
from infinitevl.step import see, tables, take

WARM_UP = 2  # eager runs before a capture: kernels are compiled, products chosen and constants made in them
LENGTHS = (16, 64, 256)  # tokens of recorded texts; shorter ones are padded, longer ones come in pieces
SIZES = 4  # frame sizes that one recorder keeps
BEHIND = 2  # tokens that may be made before one is looked at on the host
IN_FLIGHT = 2  # frames that may wait for the GPU
SEE, TAKE, ASK = 0, -1, -2  # who goes first where several run at once: encoding ahead fills what the others leave

Step = Callable[..., Any]


class RecordError(RuntimeError):
    """A step that cannot be recorded; the message gives the reason and what to do instead."""


class Recorded:
    """One step as a graph: `recorded(*inputs)` copies the inputs in, replays, and returns what the step returns.

    memory: what a replay reads and writes, the memory given; None: the step has none. What is returned lives in fixed
    buffers: the next replay overwrites it.
    """

    # one capture at a time in a process: its beginning waits for the device, which ends another's
    _capturing = threading.Lock()

    @torch.inference_mode(False)  # buffers made there could not be written to outside
    def __init__(self, step: Step, memory: Memory | None, inputs: Sequence[Tensor], priority: int = 0) -> None:
        self.memory, self.outputs = memory, list[Tensor]()
        self.inputs = tuple(x.clone() for x in inputs)
        if any(x.device.type != "cuda" for x in self.inputs):
            raise RecordError(f"only steps on CUDA can be recorded, these inputs are on {self.inputs[0].device}")
        self._graph = torch.cuda.CUDAGraph()
        try:
            self._warm_up(step)
            stream = torch.cuda.Stream(priority=priority)
            capture = torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local")
            # the outer stream is gone back to even where the end of a broken capture raises
            with self._capturing, torch.no_grad(), torch.cuda.stream(torch.cuda.current_stream()), capture:
                self._run(step, memory)
        except Exception as error:
            first = error.__context__ or error  # the end of a broken capture hides what broke it
            reason = (str(first).strip() or type(first).__name__).splitlines()[0]
            unrecorded = "eager=True, or --eager, runs it unrecorded"
            raise RecordError(f"the step cannot be recorded: {reason} ({unrecorded})") from error

    def _warm_up(self, step: Step) -> None:
        """Run the step on a copy, on a stream of its own, as captures want it."""
        side, scratch = torch.cuda.Stream(), None if self.memory is None else self.memory.clone()
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._run(step, scratch)
        torch.cuda.current_stream().wait_stream(side)

    def _run(self, step: Step, memory: Memory | None) -> None:
        """The step in place: what it changes ends up in `memory`, what it returns in `outputs`."""
        if memory is None:
            self.outputs = list(step(*self.inputs))
            return
        after, *self.outputs = step(memory, *self.inputs)
        pairs = zip(memory.named(), after.named(), strict=True)
        moved = [(place, leaf) for (_, place), (_, leaf) in pairs if leaf.data_ptr() != place.data_ptr()]
        if moved:
            torch._foreach_copy_([place for place, _ in moved], [leaf for _, leaf in moved])

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value, non_blocking=True)
        self._graph.replay()
        return self.outputs


def record(step: Step, memory: Memory | None, *inputs: Tensor, priority: int = 0) -> Recorded:
    """Record step(memory, *inputs) -> (memory after, more tensors...) over `memory`, which stays as it is; or, without
    a memory, step(*inputs) -> (tensors...). Steps of a lower `priority` number go first where they run at once.

    Raises RecordError with the reason where that is not possible.
    """
    return Recorded(step, memory, inputs, priority)


def overwrite(memory: Memory, other: Memory) -> None:
    """Make one memory equal to another of the same shape, in place."""
    torch._foreach_copy_([leaf for _, leaf in memory.named()], [leaf for _, leaf in other.named()])


class Sight:
    """Frames seen at one size, ahead: while a memory takes one frame, the next one's pixels are already encoded.

    Encoding runs on a CUDA stream of its own. Its tokens are copied into the taking step's input, so that the next
    encoding waits for that copy only.
    """

    def __init__(self, model: Model, memory: Memory, size: tuple[int, int], time: Tensor) -> None:
        self._size, self._device = size, model.device
        self._side, self._taken = torch.cuda.Stream(), torch.cuda.Event()
        pixels = torch.zeros(1, *size, 3, dtype=torch.uint8, device=model.device)
        self._tables = tables(model, pixels)
        self._see = record(lambda pixels: (see(model, pixels),), None, pixels, priority=SEE)
        visual = self._see.outputs[0]
        step = lambda memory, visual, time: (take(model, memory, visual, time),)  # noqa: E731
        self._take = record(step, memory, visual, time.to(model.device), priority=TAKE)

    def __call__(self, pixels: Tensor, time: Tensor) -> None:
        """pixels uint8 [1, H, W, 3] of any size, on the host."""
        frames = torch.cuda.current_stream()
        self._side.wait_event(self._taken)
        with torch.cuda.stream(self._side):
            (visual,) = self._see(resize(pixels.to(self._device, non_blocking=True), self._size))
            seen = torch.cuda.Event()
            seen.record()
        frames.wait_event(seen)
        self._take.inputs[0].copy_(visual)
        self._taken.record()
        self._take(self._take.inputs[0], time)


class Recorder:
    """All recorded steps over one memory of one row: frames by size, texts by length, the next token.

    Each is recorded when first asked for. One thread at a time.
    """

    def __init__(self, model: Model, memory: Memory) -> None:
        self.model, self.memory = model, memory
        self._sights: dict[tuple[int, int], Sight] = {}
        self._texts: dict[int, Recorded] = {}
        self._tokens: dict[bool, Recorded] = {}

    def frame(self, pixels: Tensor, size: tuple[int, int], time: Tensor) -> None:
        """One frame into the memory: uint8 [1, H, W, 3] on the host, seen at `size`; time float64 [1]."""
        if size not in self._sights:
            if len(self._sights) == SIZES:
                known = ", ".join(f"{height}x{width}" for height, width in self._sights)
                raise RecordError(
                    f"frames seen at {size[0]}x{size[1]} would be size number {SIZES + 1} to be recorded "
                    f"({known} are): resize to one of them, or make a new stream from this one's memory"
                )
            self._sights[size] = Sight(self.model, self.memory, size, time)
        self._sights[size](pixels, time)

    def text(self, ids: Sequence[int]) -> Tensor:
        """Text into the memory -> hidden of its last token [1, D], good until the next text. Ends a run of frames."""
        assert ids
        for start in range(0, len(ids), LENGTHS[-1]):
            hidden = self._piece(ids[start : start + LENGTHS[-1]])
        return hidden

    def token(self, token: Tensor, chance: Tensor, settings: Tensor, greedy: bool) -> Tensor:
        """A token [1] into the memory -> the next one [1], good until the next token.

        chance [1, 1] in [0, 1); settings [1, 2]: temperature and top_p. greedy: the likeliest one, whatever they are.
        """
        if greedy not in self._tokens:
            step = self._greedy if greedy else self._drawn
            self._tokens[greedy] = self._record(step, token, chance, settings)
        return self._tokens[greedy](token, chance, settings)[0]

    def _record(self, step: Step, *inputs: Tensor) -> Recorded:
        inputs = tuple(x.to(self.model.device) for x in inputs)
        return record(step, self.memory, *inputs, priority=ASK)

    def _piece(self, ids: Sequence[int]) -> Tensor:
        length = next(length for length in LENGTHS if length >= len(ids))
        padded = torch.tensor([[*ids, *[0] * (length - len(ids))]]).pin_memory()
        count = torch.tensor([len(ids)]).pin_memory()
        if length not in self._texts:
            self._texts[length] = self._record(self._text, padded, count)
        return self._texts[length](padded, count)[0]

    def _text(self, memory: Memory, ids: Tensor, count: Tensor) -> tuple[Memory, Tensor]:
        """ids [1, L], of which the first `count` [1] are there."""
        positions, memory = rope.next_text(memory, ids.shape[1])
        hidden, after = self.model(self.model.embed(ids), positions, memory, count=count)
        assert after is not None
        return after, hidden.gather(1, (count - 1)[:, None, None].expand(-1, -1, hidden.shape[-1]))[:, 0]

    def _greedy(self, memory: Memory, token: Tensor, chance: Tensor, settings: Tensor) -> tuple[Memory, Tensor]:
        after, logits = self._next(memory, token)
        return after, logits.argmax(-1)

    def _drawn(self, memory: Memory, token: Tensor, chance: Tensor, settings: Tensor) -> tuple[Memory, Tensor]:
        after, logits = self._next(memory, token)
        return after, draw(logits, chance, settings[:, :1], settings[:, 1:])

    def _next(self, memory: Memory, token: Tensor) -> tuple[Memory, Tensor]:
        positions, memory = rope.next_text(memory, 1)
        hidden, after = self.model(self.model.embed(token[:, None]), positions, memory)
        assert after is not None
        return after, self.model.logits(hidden[:, -1])


class Answering:
    """One answer in the making: its tokens so far on the GPU and, while another answer is being made, its memory."""

    @torch.inference_mode(False)
    def __init__(self, at_most: int, sampling: Sampling, device: torch.device) -> None:
        at_most = max(at_most, 0)
        self.sampling, self.at_most, self.made = sampling, at_most, 0
        self.parked: Memory | None = None
        self.tokens = torch.zeros(at_most, 1, dtype=torch.int64, device=device)
        self.chances = torch.rand(at_most, 1, 1, device=device, generator=sampling.generator(device))
        settings = torch.tensor([[sampling.temperature or 1.0, sampling.top_p]]).pin_memory()
        self.settings = settings.to(device, non_blocking=True)  # or the host would wait for all frames on their way
        self.said = torch.zeros(at_most, 1, dtype=torch.int64).pin_memory()
        self.events = [torch.cuda.Event() for _ in range(at_most)]

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature == 0

    def note(self, token: Tensor) -> None:
        """The next token, on its way to the host."""
        self.tokens[self.made].copy_(token)
        self.said[self.made].copy_(token, non_blocking=True)
        self.events[self.made].record()
        self.made += 1

    def look(self, number: int) -> int:
        """Token `number`, waited for."""
        self.events[number].synchronize()
        return int(self.said[number])


class Replayed:
    """A stream's memory on CUDA, fed and asked by recorded steps.

    Frames run on the caller's CUDA stream. Questions run beside them, on a stream of their own and on a second memory
    (the scratch), which the answers being made share: an answer whose turn ends is parked in a copy.
    """

    @torch.inference_mode(False)
    def __init__(self, model: Model, memory: Memory) -> None:
        self.model = model
        if any(leaf.is_inference() for _, leaf in memory.named()):
            memory = memory.clone()
        self._live = Recorder(model, memory)
        self._owner: Answering | None = None
        self._turn = threading.RLock()
        self._side = torch.cuda.Stream(priority=ASK)
        frames = torch.cuda.current_stream()
        self._side.wait_stream(frames)
        with torch.cuda.stream(self._side):  # what is allocated here is not reused before this stream is done with it
            self._asker = Recorder(model, memory.clone())
        frames.wait_stream(self._side)
        self._flying: deque[torch.cuda.Event] = deque()

    @property
    def memory(self) -> Memory:
        """The memory itself, not a copy."""
        return self._live.memory

    def observe(self, stamp: Sequence[int], pixels: Tensor, size: tuple[int, int], time: float) -> None:
        """A time stamp's ids, or none, and one frame: uint8 [1, H, W, 3] on the host, seen at `size`.

        Returns before the GPU is done with it, but not before it is done with the frame `IN_FLIGHT` before.
        """
        if len(self._flying) == IN_FLIGHT:
            self._flying.popleft().synchronize()
        if stamp:
            self._live.text(stamp)
        self._live.frame(pixels.pin_memory(), size, torch.tensor([time], dtype=torch.float64).pin_memory())
        event = torch.cuda.Event()
        event.record()
        self._flying.append(event)

    def snapshot(self, at_most: int, sampling: Sampling) -> Answering:
        """An answer that starts from the memory as it is now."""
        with self._turn:
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                asked = Answering(at_most, sampling, self.model.device)
                self._park()
                overwrite(self._asker.memory, self.memory)
            torch.cuda.current_stream().wait_stream(self._side)
            self._owner = asked
        return asked

    def answer(self, asked: Answering, ids: Sequence[int], behind: int = BEHIND) -> Generator[int, None, None]:
        """Feeds a question and yields the answer's ids until a stop token (not yielded).

        The host looks at a token while up to `behind` later ones are made. With behind=0 the answer's memory ends up
        with exactly the question and the yielded ids in it.
        """
        try:
            self._begin(asked, ids)
            for number in range(asked.at_most):
                with self._turned(asked):
                    while asked.made <= min(number + behind, asked.at_most - 1):
                        self._make(asked)
                token = asked.look(number)
                if token in self.model.config.stop_tokens:
                    return
                yield token
            if asked.at_most and not behind:
                with self._turned(asked):
                    self._asker.token(asked.tokens[-1], asked.chances[-1], asked.settings, asked.greedy)
        finally:
            if behind:
                self._release(asked)

    def _begin(self, asked: Answering, ids: Sequence[int]) -> None:
        with self._turned(asked):
            hidden = self._asker.text(ids)
            if asked.at_most:
                logits = self.model.logits(hidden)
                asked.note(logits.argmax(-1) if asked.greedy else draw(logits, asked.chances[0], *asked.settings.T))

    def keep(self, asked: Answering, ids: Sequence[int]) -> None:
        """Ends an answer made with behind=0 with more text, and makes its memory the stream's."""
        frames = torch.cuda.current_stream()
        with self._turned(asked):
            self._asker.text(ids)
            self._side.wait_stream(frames)
            overwrite(self.memory, self._asker.memory)
            frames.wait_stream(self._side)
            self._owner = None

    def refresh(self, keep: float) -> None:
        """`Memory.refresh`, in place."""
        overwrite(self.memory, self.memory.refresh(keep))

    def _make(self, asked: Answering) -> None:
        last = asked.made - 1
        asked.note(self._asker.token(asked.tokens[last], asked.chances[last + 1], asked.settings, asked.greedy))

    @contextmanager
    def _turned(self, asked: Answering) -> Iterator[None]:
        """The scratch belongs to this answer, on the side stream."""
        with self._turn, torch.no_grad(), torch.cuda.stream(self._side):
            if self._owner is not asked:
                self._park()
                assert asked.parked is not None
                overwrite(self._asker.memory, asked.parked)
                self._owner, asked.parked = asked, None
            yield

    def _release(self, asked: Answering) -> None:
        with self._turn:
            if self._owner is asked:
                self._owner = None

    def _park(self) -> None:
        if self._owner is not None:
            self._owner.parked, self._owner = self._asker.memory.clone(), None
