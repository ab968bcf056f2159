"""Streams watched side by side, eager and recorded, hold what each stream alone would."""

from __future__ import annotations

import pytest
import torch

from infinitevl import stream
from infinitevl.eval import recall
from infinitevl.eval.batched import Watcher, tokens_seen
from infinitevl.eval.exam import without_delta
from infinitevl.memory import Delta, Memory
from infinitevl.model import CapacityError
from infinitevl.video import Frame

from .conftest import small

TIMES = [0.0, 1.0, 2.0, 5.5, 8.0, 59.0, 61.0, 600.0]  # stamps of two lengths, and frames without one
PIXELS = torch.randint(
    0, 256, (len(TIMES), 3, 112, 112, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
)


def fed(watcher: Watcher) -> Watcher:
    for pixels, time in zip(PIXELS, TIMES, strict=True):
        watcher.observe(pixels, time)
    return watcher


def alike(one: Memory, other: Memory, bound: float) -> bool:
    pairs = zip(one.named(), other.named(), strict=True)
    return all(torch.allclose(a, b, atol=bound, rtol=bound, equal_nan=True) for (_, a), (_, b) in pairs)


def test_rows_are_streams_of_their_own(tiny_model):
    together = fed(Watcher(tiny_model, 3)).memory
    for row in range(3):
        memory = stream.begin(tiny_model)
        for number, time in enumerate(TIMES):
            memory = stream.observe(tiny_model, memory, Frame(time, PIXELS[number, row].numpy()))
        assert alike(together.rows(torch.tensor([row])), memory, 1e-4)


def test_recorded_steps_give_the_eager_memory_to_the_bit(tiny_model, played):
    watcher = fed(Watcher(tiny_model, 3, recorded=True))
    assert alike(watcher.memory, fed(Watcher(tiny_model, 3)).memory, 0.0)
    assert played.made == 3, "a frame's step and two lengths of stamps are recorded once each"


@pytest.mark.parametrize("recorded", [False, True])
def test_a_change_between_frames_is_what_the_next_frame_finds(tiny_model, played, recorded):
    watcher = fed(Watcher(tiny_model, 2 + 1, recorded=recorded))
    before, place = watcher.memory, watcher.memory.blocks[1].state.data_ptr()
    watcher.change(without_delta)
    assert all(not block.state.any() for block in watcher.memory.blocks if isinstance(block, Delta))
    assert not recorded or (watcher.memory is before and before.blocks[1].state.data_ptr() == place)


def test_tokens_are_counted_as_the_memory_does(tiny_model):
    watcher = Watcher(tiny_model, 3)
    for number, count in enumerate(tokens_seen(tiny_model, (112, 112), TIMES)):
        watcher.observe(PIXELS[number], TIMES[number])
        assert watcher.memory.seen.tolist() == [count] * 3


@pytest.mark.parametrize("recorded", [False, True])
def test_a_memory_without_a_window_takes_what_it_was_made_for(played, recorded, monkeypatch):
    model = small(window=None)
    if recorded:
        monkeypatch.setattr(model, "_check_capacity", lambda *_: None)  # a replay does not look
    needed = int(tokens_seen(model, (112, 112), TIMES)[-1])
    assert fed(Watcher(model, 3, needed, recorded)).memory.seen.tolist() == [needed] * 3
    with pytest.raises(CapacityError, match=f"{needed} tokens do not fit a memory made for {needed - 1}"):
        fed(Watcher(model, 3, needed - 1, recorded))


def test_times_never_decrease(tiny_model):
    watcher = fed(Watcher(tiny_model, 3))
    with pytest.raises(stream.TimeError, match="599.000 s comes after one at 600.000"):
        watcher.observe(PIXELS[0], 599.0)


# -- upkeep -----------------------------------------------------------------------------------------------------------


def states(memory: Memory) -> list[torch.Tensor]:
    return [block.state for block in memory.blocks if isinstance(block, Delta)]


@pytest.mark.parametrize("recorded", [False, True])
def test_states_are_refreshed_after_every_so_many_frames(tiny_model, played, recorded):
    watcher, upkeep = Watcher(tiny_model, 3, recorded=recorded), recall.Upkeep(refresh_every=2, keep=0.25)
    for frame in range(4):
        watcher.observe(PIXELS[frame], float(frame))
        before = watcher.memory.clone()
        upkeep.after(watcher, frame)
        share = 0.25 if frame % 2 else 1.0
        assert all(
            torch.equal(share * old, new) for old, new in zip(states(before), states(watcher.memory), strict=True)
        )


def test_states_are_rounded_after_every_frame_and_nothing_else_is(tiny_model):
    watcher, upkeep = Watcher(tiny_model, 3), recall.Upkeep(state_dtype=torch.bfloat16)
    watcher.observe(PIXELS[0], 0.0)
    before = watcher.memory.clone()
    upkeep.after(watcher, 0)
    for (name, old), (_, new) in zip(before.named(), watcher.memory.named(), strict=True):
        wanted = old.bfloat16().float() if name.endswith("state") else old
        assert torch.equal(wanted.nan_to_num(-1), new.nan_to_num(-1)), name
    assert not all(torch.equal(old, new) for old, new in zip(states(before), states(watcher.memory), strict=True))


def test_no_upkeep_leaves_the_memory_alone(tiny_model):
    watcher = fed(Watcher(tiny_model, 3))
    before = watcher.memory
    recall.Upkeep().after(watcher, 7)
    assert watcher.memory is before


@pytest.mark.parametrize(("words", "says"), [({"refresh_every": 0}, "every 0"), ({"keep": 1.5}, "got 1.5")])
def test_upkeep_that_means_nothing_is_refused(words, says):
    with pytest.raises(ValueError, match=says):
        recall.Upkeep(**words)


@torch.no_grad()
def test_refresh_keeps_windows_tails_and_clocks(tiny_model):
    memory = fed(Watcher(tiny_model, 3)).memory
    for keep in (0.0, 0.5, 1.0):
        kept = memory.clone()
        after = memory.refresh(keep)
        assert alike(memory, kept, 0.0), "a pure function"
        for (name, old), (_, new) in zip(memory.named(), after.named(), strict=True):
            wanted = keep * old if name.endswith("state") else old
            assert torch.equal(wanted.nan_to_num(-1), new.nan_to_num(-1)), name
    for keep in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1, got"):
            memory.refresh(keep)


@torch.no_grad()
def test_a_reset_leaves_the_window_its_answers():
    """In a model whose delta layers add nothing, what is said is the window's, and a reset does not change it."""
    model = small()
    for block in model.blocks[1:]:
        block.mixer.o.weight.zero_()
    memory = fed(Watcher(model, 3)).memory.rows(torch.tensor([0]))
    before = stream.answer(model, memory, "what does the sign say?", 8)
    assert stream.answer(model, memory.refresh(0.0), "what does the sign say?", 8) == before != ""
    memory.blocks[0].values.zero_()
    assert stream.answer(model, memory, "what does the sign say?", 8) != before, "the answer depends on the window"
