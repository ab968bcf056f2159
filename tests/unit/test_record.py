"""The logic of recorded streams without a GPU: graphs are replaced by the steps themselves, CUDA's streams by nothing.

What a real graph does is tested in tests/gpu; here it is who is asked when, whose memory is where, and what is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from infinitevl import Memory, Sampling, Stream, record, weights
from infinitevl.generate import feed
from infinitevl.model import Model
from infinitevl.record import LENGTHS, SIZES, Recorder, RecordError, Replayed

QUESTION = "what do you see now?"


class Played:
    """`record.Recorded`, running the step at every call on buffers of its own."""

    @torch.inference_mode(False)
    def __init__(self, step, memory: Memory | None, inputs: Sequence[Tensor], priority: int = 0) -> None:
        self.step, self.memory, self.inputs = step, memory, tuple(x.clone() for x in inputs)
        self.outputs = self._run(None if memory is None else memory.clone())

    def _run(self, memory: Memory | None) -> list[Tensor]:
        if memory is None:
            return [x.clone() for x in self.step(*self.inputs)]
        after, *outputs = self.step(memory, *self.inputs)
        record.overwrite(memory, after)
        return [x.clone() for x in outputs]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value)
        with torch.no_grad():
            for place, value in zip(self.outputs, self._run(self.memory), strict=True):
                place.copy_(value)  # fixed buffers: the next replay overwrites what this one returned
        return self.outputs


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    event = {name: lambda self, *_: None for name in ("record", "synchronize", "wait_event", "wait_stream")}
    nothing = type("Nothing", (), {"__init__": lambda self, priority=0: None, **event})
    monkeypatch.setattr(record, "Recorded", Played)
    monkeypatch.setattr(torch.cuda, "Stream", nothing)
    monkeypatch.setattr(torch.cuda, "Event", nothing)
    monkeypatch.setattr(torch.cuda, "current_stream", nothing)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)


@pytest.fixture(scope="module")
def model() -> Model:
    return weights.load()


@pytest.fixture
def endless(model: Model, monkeypatch: pytest.MonkeyPatch) -> Model:
    """Answers of the length asked for: no token ends them."""
    monkeypatch.setattr(model, "config", replace(model.config, stop_tokens=(-1,)))
    return model


def replayed(model: Model) -> Stream:
    stream = Stream(model)
    stream._run = Replayed(model, stream.memory)
    return stream


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (90, 130, 3), dtype=np.uint8) for _ in range(count)]


def pair(model: Model, count: int) -> tuple[Stream, Stream]:
    """A replayed stream and an eager one that have seen the same pictures."""
    streams = replayed(model), Stream(model)
    for number, picture in enumerate(pictures(count)):
        for stream in streams:
            stream.observe(picture, float(number))
    return streams


def assert_alike(one: Memory, other: Memory) -> None:
    """Padded texts round differently; what counts is exact."""
    for (name, a), (_, b) in zip(one.named(), other.named(), strict=True):
        exact = not a.is_floating_point() or a.dtype == torch.float64
        torch.testing.assert_close(a, b, atol=0 if exact else 1e-3, rtol=0 if exact else 1e-3, equal_nan=True, msg=name)


def test_frames_and_stamps_fill_the_memory_as_eager_ones_do(model):
    one, other = pair(model, 9)
    assert (one.frames, one.tokens, one.time) == (other.frames, other.tokens, other.time) == (9, other.tokens, 8.0)
    assert_alike(one.memory, other.memory)


@pytest.mark.parametrize("at_most", [-1, 0, 1, 2, 3, 9])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5, 0.9, seed=3)], ids=["greedy", "drawn"])
def test_answers_are_the_eager_ones(endless, at_most, sampling):
    """With a seed the same numbers are drawn for the same tokens; no token is lost at either end."""
    one, other = pair(endless, 5)
    before = one.memory
    answers = [stream.ask(QUESTION, at_most, sampling=sampling) for stream in (one, other)]
    assert answers[0].text == answers[1].text and answers[0].tokens == answers[1].tokens == max(at_most, 0)
    assert "".join(one.ask_pieces(QUESTION, at_most, sampling)).strip() == answers[0].text
    assert_alike(one.memory, before)


def test_a_stop_token_ends_an_answer_and_is_not_said(model):
    one, other = pair(model, 5)
    said = [stream.ask(QUESTION, at_most=30) for stream in (one, other)]
    assert said[0].text == said[1].text and said[0].tokens == said[1].tokens < 30


def test_a_stream_made_in_inference_mode_goes_on_outside(model):
    with torch.inference_mode():
        one, other = pair(model, 3)
        begun = one.ask_pieces(QUESTION, 6)
        first = next(begun)
    assert (first + "".join(begun)).strip() == other.ask(QUESTION, 6).text
    for stream in (one, other):
        stream.observe(pictures(4)[3], 3.0)
        stream.ask(QUESTION, 2, keep=True)
    assert_alike(one.memory, other.memory)


def test_a_refresh_is_the_eager_one_and_in_place(model):
    """A recorded step holds the addresses of its memory's leaves."""
    one, other = pair(model, 4)
    places = [leaf.data_ptr() for _, leaf in one._run.memory.named()]
    for stream in (one, other):
        stream.refresh(0.5)
        stream.observe(pictures(5)[4], 4.0)
    assert [leaf.data_ptr() for _, leaf in one._run.memory.named()] == places
    assert_alike(one.memory, other.memory)
    without, _ = pair(model, 4)
    without.observe(pictures(5)[4], 4.0)
    with pytest.raises(AssertionError):
        assert_alike(one.memory, without.memory)


def test_answers_under_way_at_once_do_not_mix(endless):
    one, _ = pair(endless, 6)
    given = [(QUESTION, 12, Sampling(1.5, seed=1)), ("when was ZEBRA shown?", 12, Sampling(1.5, seed=2))]
    alone = ["".join(one.ask_pieces(*each)) for each in given]
    first, second = (one.ask_pieces(*each) for each in given)
    said = zip(*itertools.zip_longest(first, second, fillvalue=""), strict=True)
    assert ["".join(pieces) for pieces in said] == alone and alone[0] != alone[1]


def test_an_answer_left_in_the_middle_holds_nobody_up(endless):
    one, _ = pair(endless, 3)
    right = one.ask(QUESTION, 8).text
    next(one.ask_pieces("when was ZEBRA shown?", 8))
    kept = one.ask_pieces("how many red signs were there?", 8)
    next(kept)
    assert one.ask(QUESTION, 8).text == right


def test_an_answer_is_about_the_moment_it_was_asked_at(endless):
    one, other = pair(endless, 3)
    late, right = one.asking(QUESTION, 6), other.ask(QUESTION, 6)
    for number, picture in enumerate(pictures(9)[3:]):
        one.observe(picture, 3.0 + number)
    said = late()
    assert (said.text, said.time) == (right.text, 2.0)


@pytest.mark.parametrize("at_most", [0, 1, 20])
def test_what_is_kept_is_in_the_memory_to_the_token(model, at_most):
    """Cut off, or ended by a stop token: none that was made ahead stays."""
    one, other = pair(model, 3)
    said = [stream.ask(QUESTION, at_most, keep=True).text for stream in (one, other)]
    assert said[0] == said[1] and one.tokens == other.tokens
    assert_alike(one.memory, other.memory)
    for stream in (one, other):
        stream.observe(pictures(1)[0], 9.0)
    assert one.ask(QUESTION, 6).text == other.ask(QUESTION, 6).text


def test_texts_longer_than_any_recorded_length_come_in_pieces(model):
    ids = [5 + number % 40 for number in range(2 * LENGTHS[-1] + 3)]
    recorder = Recorder(model, model.empty_memory())
    hidden = recorder.text(ids).clone()
    right, memory = feed(model, model.empty_memory(), ids)
    torch.testing.assert_close(hidden, right, atol=1e-3, rtol=1e-3)
    assert_alike(recorder.memory, memory)


def test_a_size_too_many_is_refused_with_the_remedy(model):
    recorder, pixels = Recorder(model, model.empty_memory()), torch.zeros(1, 60, 60, 3, dtype=torch.uint8)
    for number in range(SIZES):
        recorder.frame(pixels, (28 * (number + 1), 56), torch.tensor([float(number)]).double())
    with pytest.raises(RecordError, match=f"28x28 would be size number {SIZES + 1} .*28x56, .*make a new stream"):
        recorder.frame(pixels, (28, 28), torch.tensor([9.0]).double())
    assert int(recorder.memory.frames) == SIZES


def test_only_cuda_can_be_recorded(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(RecordError, match="only steps on CUDA can be recorded, these inputs are on cpu"):
        record.record(lambda x: (x,), None, torch.ones(1))


def test_a_model_without_a_window_is_not_recorded(model):
    """Each of its steps looks whether it still fits, which a replay cannot."""
    text = replace(model.config.text, window=None)
    elsewhere = SimpleNamespace(type="cuda")
    bare = SimpleNamespace(config=replace(model.config, text=text), device=elsewhere, processor=model.processor)
    assert type(Stream(bare, model.empty_memory())._run).__name__ == "Eager"  # type: ignore[arg-type]
    bare.config = model.config
    assert type(Stream(bare, model.empty_memory(), eager=True)._run).__name__ == "Eager"  # type: ignore[arg-type]
    assert type(Stream(bare, model.empty_memory())._run).__name__ == "Replayed"  # type: ignore[arg-type]
