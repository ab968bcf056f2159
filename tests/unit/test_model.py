"""The model: what it refuses, float32 where it must be, and gradients that reach everything."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from infinitevl import rope
from infinitevl.config import ModelConfig, TextConfig, VisionConfig, hybrid
from infinitevl.delta import DeltaMixer
from infinitevl.layers import RMSNorm
from infinitevl.model import CapacityError, Model
from infinitevl.ops import reference

CONFIG = ModelConfig(
    VisionConfig(depth=1, hidden_size=16, intermediate_size=20, num_heads=2, out_hidden_size=32),
    TextConfig(
        layers=hybrid(1),
        vocab_size=40,
        hidden_size=32,
        intermediate_size=24,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        window=8,
        mrope_sections=(2, 3, 3),
        delta_heads=2,
        delta_key_dim=8,
        delta_value_dim=16,
    ),
    image_token=30,
    video_token=31,
)


@pytest.fixture
def model() -> Model:
    model = Model(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def gates(model: Model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if name.endswith(("A_log", "dt_bias"))}


def gates_of(mixer: DeltaMixer, hidden: torch.Tensor, present: torch.Tensor | None = None):
    """Log decay and write strength that a mixer gives these tokens."""
    return reference.gates(mixer.a(hidden), mixer.b(hidden), mixer.A_log, mixer.dt_bias, present)


def step(model: Model, length: int = 11, memory=None):
    """`length` random tokens of text through the model."""
    positions = torch.arange(length).expand(3, 1, -1)
    return model(torch.randn(1, length, 32, dtype=model.dtype), positions, memory)


# -- embedding and head -----------------------------------------------------------------------------------------------


def test_visual_tokens_take_the_places_of_pictures_in_order(model):
    ids = torch.tensor([[1, 30, 30, 2], [31, 3, 30, 4]])
    visual = torch.randn(4, 32)
    hidden = model.embed(ids, visual)
    assert torch.equal(hidden[[0, 0, 1, 1], [1, 2, 0, 2]], visual)
    words = ids < 30
    assert torch.equal(hidden[words], model.embedding.weight[ids[words]])
    assert model.bfloat16().embed(ids, visual).dtype == torch.bfloat16


@pytest.mark.parametrize("count", [0, 3, 5])
def test_another_number_of_visual_tokens_is_refused(model, count):
    with pytest.raises(ValueError, match=f"4 visual tokens, the pictures {count}"):
        model.embed(torch.tensor([[30, 30, 31, 30]]), torch.randn(count, 32))


def test_a_model_of_a_bare_config_has_no_processor(model):
    with pytest.raises(ValueError, match="no processor"):
        model.processor  # noqa: B018


def test_the_head_is_the_embedding_where_tied(model):
    assert model.head is None
    hidden = torch.randn(2, 3, 32)
    torch.testing.assert_close(model.logits(hidden), hidden @ model.embedding.weight.T)


# -- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.to(device="cpu", dtype=torch.float16),
        lambda m: m.bfloat16().float().half(),
        lambda m: m.double(),
        lambda m: copy.deepcopy(m).bfloat16(),
        lambda m: m.blocks[1].bfloat16() and m.bfloat16(),
    ],
    ids=["to", "bfloat16", "half", "to both", "there and back", "double", "a copy", "a block"],
)
def test_gates_stay_exact_in_float32(model, cast):
    before = {name: gate.detach().clone() for name, gate in gates(model).items()}
    after = cast(model)
    assert after.dtype != torch.float32 and len(before) == 6
    for name, gate in gates(after).items():
        assert gate.dtype == torch.float32 and torch.equal(gate, before[name]) and gate.requires_grad, name
    rest = {p.dtype for name, p in after.named_parameters() if name not in before}
    assert rest == {after.dtype}


def test_gates_follow_to_another_device(model):
    moved = model.to(device="meta", dtype=torch.bfloat16)
    assert all(gate.device.type == "meta" and gate.dtype == torch.float32 for gate in gates(moved).values())
    back = moved.to_empty(device="cpu")
    assert all(gate.device.type == "cpu" and gate.dtype == torch.float32 for gate in gates(back).values())


@torch.no_grad()
def test_a_bfloat16_model_has_a_float32_state_and_decay(model):
    torch.manual_seed(1)
    right, memory = step(model, memory=model.empty_memory())
    model.bfloat16()
    torch.manual_seed(1)
    low, after = step(model, memory=model.empty_memory())
    assert low.dtype == torch.bfloat16 and (low.float() - right).abs().mean() < 0.05 * right.abs().mean()
    types = {name.split(".")[-1]: leaf.dtype for name, leaf in after.named()}
    assert types["state"] == torch.float32 and types["keys"] == types["tail"] == torch.bfloat16
    assert after.nbytes < memory.nbytes
    mixer = model.blocks[1].mixer
    g, beta = gates_of(mixer, torch.randn(1, 3, 32).bfloat16())
    assert g.dtype == beta.dtype == torch.float32 and (g < 0).all()


@torch.no_grad()
def test_slow_decay_survives_bfloat16(model):
    """A half-life of 10,000 tokens is a decay of 0.99993, which bfloat16 would round to 1: never forgotten."""
    mixer = DeltaMixer(CONFIG.text).bfloat16()
    mixer.a.weight.zero_()
    g, _ = gates_of(mixer, torch.randn(1, 1, 32).bfloat16())
    torch.testing.assert_close(g[0, 0], -torch.log(torch.tensor(2.0)) / torch.tensor([10.0, 10_000.0]))


# -- pieces -----------------------------------------------------------------------------------------------------------


def test_norms_know_their_epsilon():
    """The published epsilons, which random activations of size 1 cannot tell from none: inputs are small here."""
    x = torch.full((1, 4), 1e-3)
    torch.testing.assert_close(RMSNorm(4, 1e-6)(x), torch.full((1, 4), 1 / 2**0.5))
    torch.testing.assert_close(reference.l2_normalised(x / 2), torch.full((1, 4), 0.5e-3 / (1e-6 + 1e-6) ** 0.5))
    assert reference.l2_normalised(torch.zeros(1, 4)).abs().max() == 0


def test_a_token_that_is_not_there_neither_decays_nor_writes(model):
    mixer = model.blocks[1].mixer
    present = torch.tensor([[True, False, True]])
    hidden = torch.randn(1, 3, 32)
    g, beta = gates_of(mixer, hidden, present)
    assert not g[0, 1].any() and not beta[0, 1].any()
    full_g, full_beta = gates_of(mixer, hidden)
    assert torch.equal(g[present], full_g[present]) and torch.equal(beta[present], full_beta[present])


def test_a_new_mixer_starts_with_half_lives_spread_over_its_heads():
    text = replace(CONFIG.text, delta_heads=4)
    mixer = DeltaMixer(text)
    decay = mixer.A_log.exp() * torch.nn.functional.softplus(mixer.dt_bias)
    torch.testing.assert_close(
        torch.log(torch.tensor(2.0)) / decay, torch.tensor([10.0, 100.0, 1e3, 1e4]), rtol=1e-3, atol=0
    )
    assert torch.equal(mixer.q_conv, torch.tensor([0.0, 0, 0, 1]).expand(32, 4))


# -- training ---------------------------------------------------------------------------------------------------------


def test_gradients_reach_every_parameter_and_are_finite(model):
    ids = torch.tensor([[1, 2, 30, 30, 30, 30, 3, 4, 5, 6, 7, 8]])
    tokens = model.vision(torch.randn(1, 16, 1176), 4, 4).flatten(0, 1)
    positions = rope.prompt(ids, [rope.Grid(1, 4, 4)], [], CONFIG)
    hidden, memory = model(model.embed(ids, tokens), positions)
    assert memory is None
    torch.nn.functional.cross_entropy(model.logits(hidden)[0, :-1], ids[0, 1:]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_gradients_pass_through_the_memory(model):
    """Two chunks are one: what the second says about the first one's input is the same as in one pass."""
    hidden = torch.randn(1, 20, 32, requires_grad=True)
    positions = torch.arange(20).expand(3, 1, -1)
    whole, _ = model(hidden, positions)
    (right,) = torch.autograd.grad(whole[:, 12:].square().sum(), hidden)
    _, memory = model(hidden[:, :12], positions[..., :12], model.empty_memory())
    out, _ = model(hidden[:, 12:], positions[..., 12:], memory)
    (got,) = torch.autograd.grad(out.square().sum(), hidden)
    torch.testing.assert_close(got, right, atol=1e-4, rtol=1e-3)
    assert right[:, 0].any()


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_segments_go_without_a_memory(model):
    with pytest.raises(ValueError, match="packed training"):
        model(
            torch.randn(1, 4, 32),
            torch.arange(4).expand(3, 1, -1),
            model.empty_memory(),
            segment=torch.zeros(1, 4, dtype=torch.int64),
        )


@torch.no_grad()
def test_past_its_capacity_a_windowless_model_says_so_and_changes_nothing():
    model = Model(replace(CONFIG, text=replace(CONFIG.text, window=None)))
    _, memory = step(model, 7, model.empty_memory(capacity=10))
    kept = memory.clone()
    with pytest.raises(CapacityError, match="11 tokens do not fit a memory made for 10"):
        step(model, 4, memory)
    assert all(
        torch.equal(a.nan_to_num(9), b.nan_to_num(9))
        for (_, a), (_, b) in zip(memory.named(), kept.named(), strict=True)
    )
    out, memory = step(model, 3, memory)
    assert memory.seen.tolist() == [10] and out.isfinite().all()


@torch.no_grad()
def test_capacity_is_counted_in_tokens_that_are_there():
    model = Model(replace(CONFIG, text=replace(CONFIG.text, window=None)))
    present = torch.tensor([[False] * 6 + [True] * 4, [True] * 5 + [False] * 5])
    positions = torch.arange(10).expand(3, 2, -1)
    _, memory = model(torch.randn(2, 10, 32), positions, model.empty_memory(2, capacity=5), present)
    assert memory.seen.tolist() == [4, 5]
    with pytest.raises(CapacityError, match="6 tokens"):
        model(torch.randn(2, 1, 32), positions[..., :1], memory)


# -- tokens that are not there ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("window, capacity", [(5, None), (None, 20)])
def test_the_first_tokens_of_a_row_by_count_are_those_by_mask(window, capacity):
    model = Model(replace(CONFIG, text=replace(CONFIG.text, window=window)))
    hidden, positions = torch.randn(4, 10, 32), torch.arange(10).expand(3, 4, -1) * 3
    count = torch.tensor([10, 0, 3, 7])
    present = torch.arange(10) < count[:, None]
    memory = model(torch.randn(4, 7, 32), positions[..., :7], model.empty_memory(4, capacity=capacity))[1]
    right, masked = model(hidden, positions, memory.clone(), present=present)
    got, counted = model(hidden, positions, memory.clone(), count=count)
    assert torch.equal(got[present], right[present])
    for (name, ours), (_, theirs) in zip(counted.named(), masked.named(), strict=True):
        assert torch.equal(ours.nan_to_num(9), theirs.nan_to_num(9)), name
    assert counted.seen.tolist() == [17, 7, 10, 14] and counted.clock.tolist() == [28, 19, 19, 19]
    alone = [model(hidden, positions, count=count)[0], model(hidden, positions, present=present)[0]]
    assert torch.equal(alone[0][present], alone[1][present])


def test_what_is_there_is_said_once():
    model = Model(CONFIG)
    with pytest.raises(ValueError, match="not by both"):
        model(
            torch.randn(1, 4, 32), torch.arange(4).expand(3, 1, -1), None, torch.ones(1, 4).bool(), None, torch.ones(1)
        )
