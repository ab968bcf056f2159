"""Freshness of the delta states: figures known in closed form, and a walk that is the model's own."""

from __future__ import annotations

import math

import pytest
import torch

from infinitevl import stream
from infinitevl.eval import batched, freshness
from infinitevl.eval.batched import Watcher
from infinitevl.memory import Delta

from .conftest import small

FRAMES = torch.randint(0, 256, (6, 2, 112, 112, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("values", "rank"),
    [([1.0, 1.0, 1.0, 1.0], 4.0), ([7.0, 0.0, 0.0, 0.0], 1.0), ([0.0] * 4, 0.0), ([3.0, 1.0], math.exp(0.5623351))],
)
def test_effective_ranks_are_known(values, rank):
    assert float(freshness.effective_rank(torch.tensor(values))) == pytest.approx(rank, rel=1e-5)


def test_states_are_told_head_by_head(tiny_model):
    memory = stream.begin(tiny_model, 3)
    blocks = list(memory.blocks)
    state = torch.zeros_like(blocks[2].state)
    state[:, 0] = 2 * torch.eye(*state.shape[2:])  # 16 directions, all alike
    state[:, 1, 3, 5] = torch.tensor([1.0, 2.0, 3.0])  # one direction
    blocks[2] = Delta(blocks[2].tail, state)
    rows = freshness.states(memory._replace(blocks=tuple(blocks)))
    assert [(row["block"], row["head"]) for row in rows] == [(b, h) for b in (1, 2, 3) for h in (0, 1)]
    assert rows[2]["norm"] == pytest.approx(8.0) and rows[2]["rank"] == pytest.approx(16.0, rel=1e-4)
    assert rows[3]["norm"] == pytest.approx(2.0) and rows[3]["rank"] == pytest.approx(1.0)


def test_a_constant_decay_has_the_half_life_and_age_of_the_formula():
    """g = -0.01 a token for one head, -1 for the other: what is t tokens old weighs exp(g t)."""
    model, tokens = small(), 0
    for block in model.blocks[1:]:
        block.mixer.a.weight.data.zero_()
        block.mixer.A_log.data.zero_()
        block.mixer.dt_bias.data.copy_(torch.log(torch.expm1(torch.tensor([0.01, 1.0]))))
    frames = [(pixels, float(second)) for second, pixels in enumerate(FRAMES)]
    rows = freshness.ages(model, stream.begin(model, 2), frames)
    seen = batched.tokens_seen(model, (112, 112), [time for _, time in frames])
    tokens = int(seen[-1]) - len(model.processor.chat.head)
    assert len(rows) == 6 and all(row["tokens"] == tokens for row in rows)
    for row in rows:
        rate = (0.01, 1.0)[row["head"]]
        weights = [math.exp(-rate * old) for old in range(tokens)]
        age = sum(old * weight for old, weight in enumerate(weights)) / sum(weights)
        assert row["half_life"] == pytest.approx(math.log(2) / rate, rel=1e-5)
        assert row["age"] == pytest.approx(age, rel=1e-5)


@torch.no_grad()
def test_the_walk_leaves_the_memory_that_the_model_would(tiny_model, monkeypatch):
    after = []
    through = freshness._through
    monkeypatch.setattr(freshness, "_through", lambda *words: after.append(through(*words)) or after[-1])
    watcher = Watcher(tiny_model, 2)
    frames = [(pixels, 3.0 * second) for second, pixels in enumerate(FRAMES)]
    for pixels, time in frames:
        watcher.observe(pixels, time)
    freshness.ages(tiny_model, stream.begin(tiny_model, 2), frames)
    for (name, ours), (_, right) in zip(after[-1].named(), watcher.memory.named(), strict=True):
        assert torch.equal(ours.nan_to_num(-1), right.nan_to_num(-1)), name


def test_a_head_that_never_decays_has_no_half_life(tiny_model):
    model = small()
    for block in model.blocks[1:]:
        block.mixer.A_log.data.fill_(-math.inf)
    rows = freshness.ages(model, stream.begin(model, 2), [(FRAMES[0], 0.0)])
    assert {row["half_life"] for row in rows} == {None}
    assert {row["age"] for row in rows} == {(row["tokens"] - 1) / 2 for row in rows}
