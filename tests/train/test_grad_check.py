"""The guard before training: right gradients pass, wrong ones and FLA's known-bad backward are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infinitevl import ops
from infinitevl.ops import reference
from infinitevl.train import grad_check
from infinitevl.train.grad_check import GradientError, errors, guard
from infinitevl.train.loop import train
from infinitevl.train.recipes import Recipe

from .conftest import LAYERS, WINDOW, toy

CPU = torch.device("cpu")
TEXT = toy(LAYERS, WINDOW).text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_has_the_recurrences_gradient(dtype: torch.dtype) -> None:
    found = errors(CPU, 130, 2, 16, 32, dtype)
    assert set(found) == {"q", "k", "v", "g", "beta", "state"}
    assert max(found.values()) < grad_check.LIMITS[dtype] / 4
    guard(TEXT, CPU, dtype)


class _Halved(torch.autograd.Function):
    """The same number with a gradient that is a tenth too small, as a miscompiled kernel gives."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, slope: Tensor) -> Tensor:
        return 0.9 * slope


@pytest.mark.parametrize("of", ["k", "g"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_gradient_is_refused(of: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.rule("reference")

    def wrong(**given: Tensor) -> tuple[Tensor, Tensor]:
        return right(**given | {of: _Halved.apply(given[of])})  # type: ignore[arg-type]

    monkeypatch.setattr(ops, "rule", lambda name: wrong)
    with pytest.raises(GradientError, match=f"the delta rule's gradient in {of} by 'reference' is off by 0.1"):
        guard(TEXT, CPU, dtype)


def test_a_gradient_that_is_not_a_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(**given: Tensor) -> tuple[Tensor, Tensor]:
        out, state = reference.delta_rule(**given)  # type: ignore[arg-type]
        return out * (out - out).abs().sqrt().exp(), state  # 1, with an infinite slope

    monkeypatch.setattr(ops, "rule", lambda name: wrong)
    with pytest.raises(GradientError, match="off by nan"):
        guard(TEXT, CPU, torch.float32)


def test_flas_backward_is_refused_before_anything_is_written(toy_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with ops.pinned(gated_delta="fla"), pytest.raises(GradientError, match="would be FLA's, wrong on Hopper"):
        train(toy_recipe("stage1_layers"), tmp_path / "run", tell=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_kernels_without_a_backward_are_refused() -> None:
    with ops.pinned(gated_delta="triton"), pytest.raises(GradientError, match="have no backward: unpin"):
        guard(TEXT, CPU, torch.float32)


def test_the_guard_asks_the_door_for_this_models_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: object())
    cuda = torch.device("cuda")
    assert grad_check.trained_by(cuda, torch.bfloat16, 64, 128) == "scan"
    assert grad_check.trained_by(cuda, torch.bfloat16, 16, 32) == "reference"
    assert grad_check.trained_by(cuda, torch.float32, 64, 128) == "reference"
