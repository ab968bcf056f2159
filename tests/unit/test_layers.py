"""Weights side by side: the same numbers, the same names and files, and separate products where the layout was lost."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from infinitevl import ops, weights
from infinitevl.config import tiny
from infinitevl.layers import GatedMLP, RMSNorm
from infinitevl.model import Model


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    config = tiny(64)
    config = replace(config, vision=replace(config.vision, intermediate_size=100))  # a width that is padded
    model = Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def outputs(model: Model) -> list[Tensor]:
    torch.manual_seed(1)
    patches = torch.randn(2, 64, model.config.vision.patch_dim)
    visual = model.vision(patches, 8, 8)
    positions = torch.arange(16).expand(3, 2, 16)
    hidden, memory = model(visual, positions, model.empty_memory(2))
    return [visual, hidden, *(leaf for _, leaf in memory.named())]


def products(monkeypatch: pytest.MonkeyPatch, model: Model) -> int:
    """How many products one pass makes."""
    calls = []
    plain = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *given: calls.append(1) or plain(*given))
    outputs(model)
    monkeypatch.undo()
    return len(calls)


@torch.no_grad()
def test_fused_weights_give_the_same_numbers_in_fewer_products(model, monkeypatch):
    plain, before = outputs(model), products(monkeypatch, model)
    named = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert model.fuse() is model
    for got, right in zip(outputs(model), plain, strict=True):
        torch.testing.assert_close(got, right, atol=2e-5, rtol=1e-5, equal_nan=True)
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == {
        name: parameter.shape for name, parameter in named.items()
    }
    assert all(torch.equal(parameter, named[name]) for name, parameter in model.named_parameters())
    saved = 5 * 6 + 2 * 2 + 8 + 4  # of 6 in a delta mixer, 3 in a softmax mixer and 2 in an MLP, one is left
    assert before - products(monkeypatch, model) == saved


@torch.no_grad()
def test_saved_files_of_a_fused_model_are_the_same(tmp_path):
    model = weights.load()
    weights.save(model, tmp_path / "plain")
    weights.save(model.fuse(), tmp_path / "fused")
    one, other = (tmp_path / name / "model.safetensors" for name in ("plain", "fused"))
    assert one.read_bytes() == other.read_bytes()
    assert weights.fingerprint(model) == weights.fingerprint(weights.load())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double().float(),
        copy.deepcopy,
        lambda model: (
            model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True) and model
        ),
    ],
    ids=["moved", "copied", "assigned"],
)
@torch.no_grad()
def test_weights_that_moved_on_are_used_and_not_the_old_layout(model, change, monkeypatch):
    """A layout that outlived its parameters would answer with stale weights."""
    before = products(monkeypatch, model)
    model = change(model.fuse())
    for parameter in model.parameters():
        parameter.mul_(1.1)
    assert products(monkeypatch, model) == before
    fresh = Model(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    for got, right in zip(outputs(model), outputs(fresh), strict=True):
        torch.testing.assert_close(got, right, atol=0, rtol=0, equal_nan=True)


@torch.no_grad()
def test_a_change_in_place_reaches_the_fused_layout(model):
    model.fuse()
    for parameter in model.parameters():
        parameter.mul_(1.1)
    fresh = Model(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    for got, right in zip(outputs(model), outputs(fresh), strict=True):
        torch.testing.assert_close(got, right, atol=2e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["gate", "down"])
@torch.no_grad()
def test_a_wrapped_linear_is_called_itself(name):
    """As LoRA does: the layout must not go past it."""
    mlp, norm, x = GatedMLP(8, 12, bias=False), RMSNorm(8, 1e-6), torch.randn(2, 8)
    mlp.fuse()
    plain = mlp(x, norm) - x
    setattr(mlp, name, nn.Sequential(getattr(mlp, name), nn.Hardtanh(0, 0.001)))
    assert not torch.allclose(mlp(x, norm) - x, plain)


def test_biases_trained_alone_learn(model):
    model.fuse().requires_grad_(False)
    block = model.blocks[0].mixer
    for linear in (block.q, block.k, block.v):
        linear.bias.requires_grad_()
    outputs(model)[1].square().sum().backward()
    assert block.v.bias.grad is not None and block.v.bias.grad.any()


@torch.no_grad()
def test_a_bias_taken_away_is_gone(model):
    block = model.fuse().blocks[0].mixer
    with_bias = outputs(model)[1]
    block.v.bias = None
    assert not torch.allclose(outputs(model)[1], with_bias)


def test_a_layout_left_behind_is_let_go(model):
    model.fuse().double()
    assert all(getattr(module, name, None) is None for module in model.modules() for name in ("joint", "wide"))


def test_gradients_reach_the_parameters_of_a_fused_model(model):
    """A padded, joined product would send them to the layout: parameters must get them, or training learns nothing."""
    plain = copy.deepcopy(model)
    for one in (plain, model.fuse()):
        outputs(one)[1].square().sum().backward()
    for (name, parameter), right in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (parameter.grad is None) == (right.grad is None), name
        if right.grad is not None:
            torch.testing.assert_close(parameter.grad, right.grad, atol=1e-4, rtol=1e-3)


def test_ops_are_all_pinned_by_name():
    with ops.pinned(**{op: "reference" for op in ops.OPS}):
        assert all(ops.choose(op, torch.device("cuda"), torch.bfloat16).reason == "pinned" for op in ops.OPS)
