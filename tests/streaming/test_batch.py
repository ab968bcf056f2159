"""StreamBatch: every slot sees and says what a stream of its own would, whatever the others do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from infinitevl import Frame, Stream, StreamBatch, batch, rope, stream, weights
from infinitevl.batch import SlotError
from infinitevl.config import tiny
from infinitevl.memory import Memory, MemoryFileError
from infinitevl.model import Model
from infinitevl.processor import load_processor
from infinitevl.stream import TimeError

QUESTION = "what does the sign say?"
# Rows of one product are summed in another order than a row alone: 1e-6 a step, and it does not grow.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model() -> Model:
    """Random weights of a size at which what was seen decides what is said; a window of six frames."""
    torch.manual_seed(0)
    config = replace(tiny(), text=replace(tiny().text, window=100))
    made = Model(config, load_processor(weights.locate("tiny")))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3 if name == "embedding.weight" else 1.5 * parameter.shape[1] ** -0.5)
    return made.eval()


def picture(number: int, height: int = 112, width: int = 112) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def row(streams: StreamBatch, slot: int) -> Memory:
    """A clone of a slot's memory, open or not."""
    return streams._memory.rows(torch.tensor([slot]))


def same(one: Memory, other: Memory) -> bool:
    """Bit for bit, NaN equal to NaN."""
    pairs = zip(one.named(), other.named(), strict=True)
    return all(torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)) for (_, a), (_, b) in pairs)


def near(got: Memory, right: Memory) -> bool:
    """Numbers that count are the same, the others within the tolerance."""
    for (_, one), (_, other) in zip(got.named(), right.named(), strict=True):
        exact = not one.is_floating_point() or one.dtype == torch.float64
        if not torch.allclose(one.double(), other.double(), rtol=0, atol=0 if exact else TOLERANCE, equal_nan=True):
            return False
    return True


class Pair:
    """A batch, and beside it the stream that each of its slots should be."""

    def __init__(self, model: Model, slots: int, recorded: bool = False) -> None:
        self.batch, self.model = StreamBatch(model, slots), model
        self.batch._eager = not recorded
        self.alone: dict[int, Stream] = {}

    def open(self) -> int:
        slot = self.batch.open()
        assert slot not in self.alone
        self.alone[slot] = Stream(self.model)
        return slot

    def close(self, slot: int) -> None:
        self.batch.close(slot)
        del self.alone[slot]

    def observe(self, frames: dict[int, Frame]) -> None:
        paused = [slot for slot in range(self.batch.slots) if slot not in frames]
        before = {slot: row(self.batch, slot) for slot in paused}
        self.batch.observe(frames)
        assert all(same(row(self.batch, slot), before[slot]) for slot in paused), "a paused slot moved"
        for slot, frame in frames.items():
            self.alone[slot].observe(frame)

    def check(self) -> None:
        assert self.batch.opened == tuple(sorted(self.alone))
        for slot, right in self.alone.items():
            assert near(row(self.batch, slot), right.memory), f"slot {slot}"
            assert self.batch.time(slot) == right.time


def irregular(slot: int, count: int) -> Iterator[Frame | None]:
    """Frames with pauses and uneven times, from another second on in every slot: stamps of two lengths come due."""
    draw = np.random.default_rng(slot)
    time = (0.0, 597.5, 31.0)[slot % 3]
    for number in range(count):
        time += float(draw.choice([0.0, 0.4, 1.0, 3.7]))
        yield None if draw.random() < 0.3 else Frame(time, picture(1000 * slot + number))


def run(model: Model, recorded: bool = False) -> None:
    """Three slots, one closed and begun anew half way, checked against three streams and the fourth that follows."""
    pair = Pair(model, 3, recorded)
    for _ in range(3):
        pair.open()
    for half in range(2):
        for shown in zip(*(irregular(slot + 3 * half, 11) for slot in range(3)), strict=True):
            # the first two go on where they were; the third is another stream now
            late = 700.0 * half
            frames = {slot: Frame(f.time + late, f.pixels) for slot, f in enumerate(shown) if f is not None}
            pair.observe(frames)
        pair.check()
        if half == 0:
            pair.close(2)
            assert pair.open() == 2
    for slot, right in pair.alone.items():
        said, wanted = pair.batch.ask(slot, QUESTION, at_most=12), right.ask(QUESTION, at_most=12)
        assert said[:3] == wanted[:3] and said.seconds > 0
    assert len({right.ask(QUESTION, at_most=12).text for right in pair.alone.values()}) == 3
    assert all(right.tokens > model.config.text.window for right in pair.alone.values())


def test_slots_equal_streams_alone_and_paused_ones_do_not_move(model: Model) -> None:
    run(model)


class Replays:
    """What a recorded step does, on any device: over its own memory and inputs of the shapes that it was recorded for.

    What it computes is what `step` was when it was recorded: nothing but its inputs and its memory may change.
    """

    made = 0

    def __init__(self, step: Callable, memory: Memory, *inputs: torch.Tensor) -> None:
        type(self).made += 1
        self.step, self.memory, self.inputs = make_fx(step)(memory, *inputs), memory, [x.clone() for x in inputs]

    def __call__(self, *inputs: torch.Tensor) -> None:
        for place, value in zip(self.inputs, inputs, strict=True):
            assert (place.shape, place.dtype, place.device) == (value.shape, value.dtype, value.device)
            place.copy_(value)
        with torch.no_grad():
            (after,) = self.step(self.memory, *self.inputs)
        batch.overwrite(self.memory, after)


def test_one_recorded_step_does_for_all(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that pause, stamps, a slot used again: the step that was recorded for the first frame is right for each."""
    monkeypatch.setattr(Replays, "made", 0)
    monkeypatch.setattr(batch, "record", Replays)
    monkeypatch.setattr(torch.cuda, "Event", Mock)
    run(model, recorded=True)
    assert Replays.made == 1


def without_there(function: Callable) -> Callable:
    """The planted fault: a step that does not ask who has a frame."""
    return lambda *rest: function(*rest[: 5 if function.__name__ == "next_frame" else 2])


@pytest.mark.parametrize("name", ["next_frame", "next_text"])
def test_clocks_that_ignore_pauses_are_found_out(model: Model, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope, name, without_there(getattr(rope, name)))
    with pytest.raises(AssertionError, match="a paused slot moved"):
        run(model)


def test_tokens_that_ignore_pauses_are_found_out(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda hidden, positions, memory, count: forward(hidden, positions, memory))
    with pytest.raises(AssertionError, match="a paused slot moved"):
        run(model)


def test_a_slot_that_is_not_emptied_is_found_out(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamBatch, "_write", lambda self, slot, memory: None)
    with pytest.raises(AssertionError, match="slot 0"):
        run(model)


@pytest.mark.parametrize("there", [[True, False, True], [False, False, False]])
def test_a_step_leaves_paused_rows_bit_identical(model: Model, there: list[bool]) -> None:
    """Whatever stands in the place of their frames and times."""
    memory = stream.begin(model, 3)
    pixels = torch.from_numpy(np.stack([picture(number) for number in range(3)]))
    for second in range(8):  # through the window, so that rings are full
        memory = stream.frame_step(model, memory, pixels, torch.tensor([second, 2.0 * second, 9.0]).double())
    before, mask = memory.clone(), torch.tensor(there)
    time = torch.tensor([9.0 if each else float("nan") for each in there]).double().nan_to_num(-1e9)
    after = stream.frame_step(model, memory, pixels, time, mask)
    for number, moves in enumerate(there):
        one = torch.tensor([number])
        assert same(after.rows(one), before.rows(one)) is not moves
    whole = stream.frame_step(model, before.clone(), pixels, torch.full_like(time, 9.0))
    masked = stream.frame_step(model, before.clone(), pixels, torch.full_like(time, 9.0), torch.ones(3).bool())
    assert near(masked, whole)


def test_a_kept_answer_stays_in_its_slot(model: Model) -> None:
    pair = Pair(model, 2)
    for slot in (pair.open(), pair.open()):
        pair.observe({slot: Frame(1.0 + slot, picture(slot))})
    other = row(pair.batch, 0)
    said = pair.batch.ask(1, QUESTION, at_most=4, keep=True)
    assert said[:3] == pair.alone[1].ask(QUESTION, at_most=4, keep=True)[:3]
    assert same(row(pair.batch, 0), other)
    pair.check()
    pair.observe({0: Frame(5.0, picture(8)), 1: Frame(5.0, picture(9))})
    pair.check()
    before = row(pair.batch, 1)
    assert pair.batch.ask(1, QUESTION, at_most=4).time == 5.0
    assert same(row(pair.batch, 1), before), "without keep nothing stays"


def test_pixels_come_one_sampling_step_later_and_a_time_holds_for_all(model: Model) -> None:
    streams = StreamBatch(model, 2)
    one, two = streams.open(), streams.open()
    assert streams.time(one) is None and streams.ask(one, QUESTION, at_most=1).time is None
    streams.observe({one: picture(0)})
    streams.observe({one: picture(1), two: Frame(7.0, picture(2))})
    assert (streams.time(one), streams.time(two)) == (1.0, 7.0)
    streams.observe({one: picture(3), two: Frame(8.0, picture(4))}, time=9.5)
    assert (streams.time(one), streams.time(two)) == (9.5, 9.5)
    assert row(streams, two).last.tolist() == [9.5] and row(streams, two).frames.tolist() == [2]
    streams.observe({})
    assert row(streams, two).frames.tolist() == [2]


def test_frames_of_many_shapes_are_seen_at_one_size(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    step = batch.frame_step
    monkeypatch.setattr(batch, "frame_step", lambda *rest: (seen.append(rest[2]), step(*rest))[1])
    shapes = [(112, 224), (300, 90), (112, 224), (56, 112)]
    for size, wanted in ((None, (56, 112)), ((84, 28), (84, 28))):
        streams = StreamBatch(model, 4, size)
        slots = [streams.open() for _ in shapes]
        streams.observe({slot: picture(slot, *shape) for slot, shape in zip(slots, shapes, strict=True)})
        right = [
            stream.pictures.resize(torch.from_numpy(picture(slot, *shape))[None], wanted)[0]
            for slot, shape in zip(slots, shapes, strict=True)
        ]
        assert torch.equal(seen[-1], torch.stack(right))
        streams.observe({2: picture(5)})
        assert seen[-1].shape == (4, *wanted, 3)
        twin = streams.fork(0)
        twin.observe(picture(6, 112, 28))
        assert twin._size == wanted


def test_nothing_grows_and_slots_are_named_from_nought(model: Model) -> None:
    streams = StreamBatch(model, 3)
    assert streams.nbytes == 3 * model.empty_memory().nbytes and streams.opened == ()
    assert [streams.open() for _ in range(3)] == [0, 1, 2] == list(streams.opened)
    nbytes = streams.nbytes
    streams.observe({0: picture(0), 2: picture(1)})
    streams.close(1)
    assert (streams.opened, streams.nbytes) == ((0, 2), nbytes)
    assert streams.open() == 1 and same(row(streams, 1), Stream(model).memory)


# -- files and forks --------------------------------------------------------------------------------------------------


def test_a_saved_slot_goes_on_as_a_stream_and_a_saved_stream_as_a_slot(model: Model, tmp_path: Path) -> None:
    pair = Pair(model, 3)
    for slot in (pair.open(), pair.open()):
        for second in range(5):
            pair.observe({slot: Frame(slot + 1.5 * second, picture(10 * slot + second))})
    pair.batch.save(1, tmp_path / "slot")
    again = Stream.load(tmp_path / "slot", model)
    assert same(again.memory, row(pair.batch, 1))
    pair.alone[1].save(tmp_path / "stream")
    slot = pair.batch.load(tmp_path / "stream")
    assert slot == 2 and same(row(pair.batch, 2), pair.alone[1].memory) and pair.batch.time(2) == 7.0
    pair.alone[2] = Stream.load(tmp_path / "stream", model)
    for second in (7.0, 8.25, 12.5):
        frame = Frame(second, picture(int(second)))
        pair.observe({2: frame, 1: frame})
        again.observe(frame)
    pair.check()
    assert near(again.memory, pair.alone[1].memory)
    texts = {each.ask(QUESTION, at_most=12).text for each in (again, pair.alone[1], pair.batch.fork(1))}
    assert texts == {pair.batch.ask(2, QUESTION, at_most=12).text}


def test_a_fork_has_the_same_past_and_a_future_of_its_own(model: Model) -> None:
    streams = StreamBatch(model, 2)
    slot = streams.open()
    streams.observe({slot: picture(0)})
    before, twin = row(streams, slot), streams.fork(slot)
    twin.observe(picture(1))
    assert twin.frames == 2 and same(row(streams, slot), before)
    streams.observe({slot: picture(1)})
    assert near(row(streams, slot), twin.memory)


def test_a_slot_is_refreshed_and_no_other(model: Model) -> None:
    streams = StreamBatch(model, 2)
    slots = streams.open(), streams.open()
    streams.observe({slot: picture(0) for slot in slots})
    before = [row(streams, slot) for slot in slots]
    streams.refresh(slots[1], 0.25)
    assert same(row(streams, slots[0]), before[0])
    assert same(row(streams, slots[1]), before[1].refresh(0.25)) and not same(row(streams, slots[1]), before[1])
    with pytest.raises(SlotError):
        streams.refresh(7, 0.25)


def test_files_that_do_not_fit_open_nothing(model: Model, tmp_path: Path) -> None:
    streams = StreamBatch(model, 1)
    (tmp_path / "damaged").write_bytes(b"no memory" * 100)
    with pytest.raises(MemoryFileError):
        streams.load(tmp_path / "damaged")
    stream.begin(model, 2).save(tmp_path / "two", weights.fingerprint(model))
    with pytest.raises(ValueError, match="has one row, this one 2"):
        streams.load(tmp_path / "two")
    assert streams.opened == ()
    Stream(model).save(tmp_path / "one")
    streams.load(tmp_path / "one")
    with pytest.raises(SlotError, match="all 1 slots are open"):
        streams.load(tmp_path / "one")


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "error", "message"),
    [
        (Frame(2.0, picture(1)), TimeError, r"slot 1: .*2\.000 s comes after one at 3\.000 s"),
        (Frame(float("nan"), picture(1)), TimeError, "slot 1: .*got nan"),
        (Frame(9.0, picture(1).astype(np.float32)), ValueError, "slot 1: .*got float32"),
        (Frame(9.0, picture(1)[..., 0]), ValueError, r"slot 1: .*got uint8 \[112, 112\]"),
        (Frame(9.0, picture(1, 0, 9)), ValueError, "slot 1: .*nothing to see"),
        (Frame(9.0, picture(1, 2, 900)), ValueError, "slot 1: .*too long"),
    ],
)
def test_one_bad_frame_changes_no_slot(model: Model, frame: Frame, error: type, message: str) -> None:
    """The good frame before it is not taken either, though its stamp is due."""
    streams = StreamBatch(model, 2)
    slots = streams.open(), streams.open()
    streams.observe({slot: picture(slot) for slot in slots}, time=3.0)
    before = streams._memory.clone()
    with pytest.raises(error, match=message):
        streams.observe({0: Frame(9.0, picture(5)), 1: frame})
    assert same(streams._memory, before) and (streams.time(0), streams.time(1)) == (3.0, 3.0)
    streams.observe({0: Frame(9.0, picture(5)), 1: Frame(3.0, picture(6))})
    assert streams.time(0) == 9.0


def test_a_refused_first_frame_does_not_set_the_size(model: Model) -> None:
    streams = StreamBatch(model, 1)
    streams.open()
    with pytest.raises(TimeError):
        streams.observe({0: Frame(float("inf"), picture(1, 56, 112))})
    assert streams._size is None


@pytest.mark.parametrize("slot", [1, 2, -1, "0"])
def test_a_slot_that_is_not_open_is_refused(model: Model, slot: object, tmp_path: Path) -> None:
    streams = StreamBatch(model, 2)
    streams.open(), streams.close(streams.open())
    before = streams._memory.clone()
    for refused in (
        lambda: streams.observe({0: picture(0), slot: picture(1)}),
        lambda: streams.ask(slot, QUESTION),
        lambda: streams.ask(slot, QUESTION, keep=True),
        lambda: streams.fork(slot),
        lambda: streams.save(slot, tmp_path / "memory"),
        lambda: streams.time(slot),
        lambda: streams.close(slot),
    ):
        with pytest.raises(SlotError, match=rf"slot {slot} is not open \(open: 0\)"):
            refused()
    assert same(streams._memory, before) and not list(tmp_path.iterdir())


def test_more_streams_than_slots_are_refused(model: Model) -> None:
    streams = StreamBatch(model, 2)
    streams.open(), streams.open()
    with pytest.raises(SlotError, match="all 2 slots are open"):
        streams.open()
    streams.close(0)
    assert streams.open() == 0


def test_batches_that_cannot_be_are_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="1 slot or more, got 0"):
        StreamBatch(model, 0)
    for size in ((100, 112), (112, 0), (112, 30)):
        with pytest.raises(ValueError, match="multiples of 28"):
            StreamBatch(model, 1, size)
    windowless = Model(replace(model.config, text=replace(model.config.text, window=None)), model.processor)
    with pytest.raises(ValueError, match="keeps every token"):
        StreamBatch(windowless, 1)


# -- threads and modes ------------------------------------------------------------------------------------------------


def test_cameras_users_and_comers_in_threads(model: Model) -> None:
    """Two cameras of their own pace, one user of each, and slots that come and go; every slot equals its stream."""
    streams, wrong = StreamBatch(model, 3), []
    slots = streams.open(), streams.open()

    def camera(slot: int) -> None:
        for second in range(10):
            streams.observe({slot: Frame(float(second), picture(10 * slot + second))})

    def user(slot: int) -> None:
        for _ in range(4):
            streams.ask(slot, QUESTION, at_most=2)

    def comer() -> None:
        for _ in range(4):
            slot = streams.open()
            streams.observe({slot: picture(99)})
            streams.close(slot)

    def guarded(work: Callable, *of: int) -> None:
        try:
            work(*of)
        except BaseException as error:
            wrong.append(error)

    works = [*((each, slot) for each in (camera, user) for slot in slots), (comer,)]
    threads = [threading.Thread(target=guarded, args=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads) and not wrong, wrong
    for slot in slots:
        alone = Stream(model)
        for second in range(10):
            alone.observe(Frame(float(second), picture(10 * slot + second)))
        assert near(row(streams, slot), alone.memory)


def test_a_batch_made_in_inference_mode_goes_on_outside(model: Model) -> None:
    with torch.inference_mode():
        streams = StreamBatch(model, 2)
        streams.observe({streams.open(): picture(0)})
    assert streams.open() == 1
    streams.observe({0: picture(1), 1: picture(2)})
    streams.ask(0, QUESTION, at_most=1, keep=True)
    assert row(streams, 0).frames.tolist() == [2]
