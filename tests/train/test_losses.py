"""The losses made in chunks are those of whole logits, gradients too, and whole logits never exist."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infinitevl.train import losses
from infinitevl.train.losses import IGNORED

ROWS, LENGTH, SIZE, WORDS = 2, 13, 8, 37


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "TOKENS", 5)
    monkeypatch.setattr(losses, "WORDS", 16)


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Hidden and head of student and teacher (of another size), labels, which tokens are real."""
    mine, head = torch.randn(ROWS, LENGTH, SIZE, dtype=dtype), torch.randn(WORDS, SIZE, dtype=dtype)
    theirs, other = torch.randn(ROWS, LENGTH, 2 * SIZE, dtype=dtype), torch.randn(WORDS, 2 * SIZE, dtype=dtype)
    labels = torch.randint(WORDS, (ROWS, LENGTH))
    labels[:, ::3] = IGNORED
    real = torch.rand(ROWS, LENGTH) < 0.7
    return mine.requires_grad_(), head.requires_grad_(), theirs, other, labels, real


def gradients(total: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(3.0 * total, of)  # what comes from above is not 1


def assert_close(got: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, right, strict=True):
        assert torch.allclose(one.double(), other, rtol=2e-5, atol=2e-6)  # sums are float32


def test_cross_entropy_is_that_of_whole_logits() -> None:
    mine, head, _, _, labels, _ = case()
    right = F.cross_entropy((mine @ head.mT).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    got = losses.cross_entropy(mine, head, labels)
    assert got.tokens == (labels != IGNORED).sum()
    assert_close((got.total, *gradients(got.total, mine, head)), (right, *gradients(right, mine, head)))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_is_that_of_whole_logits(temperature: float) -> None:
    mine, head, theirs, other, _, real = case()
    student = (mine @ head.mT / temperature).log_softmax(-1)
    teacher = (theirs @ other.mT / temperature).log_softmax(-1)
    right = temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)[real].sum()
    got = losses.divergence(mine, head, real, theirs, other, temperature)
    assert got.tokens == real.sum()
    assert_close((got.total, *gradients(got.total, mine, head)), (right, *gradients(right, mine, head)))


def test_a_student_like_its_teacher_has_nothing_to_learn() -> None:
    mine, head, _, _, _, real = case()
    got = losses.divergence(mine, head, real, mine.detach(), head.detach(), 2.0)
    assert abs(got.total) < 1e-5
    assert gradients(got.total, mine)[0].abs().max() < 1e-5


def test_squared_error_is_of_real_tokens_only() -> None:
    student, teacher = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    real = torch.tensor([[True] * 5, [True, True, False, False, False]])
    student[1, 3] = float("nan")  # padding may hold anything
    got = losses.squared_error(student, teacher, real)
    right = sum(((student[r, t] - teacher[r, t]) ** 2).mean() for r in range(2) for t in range(5) if real[r, t])
    assert got.tokens == 7 and torch.allclose(got.total, torch.as_tensor(right))


def test_padding_has_no_gradient() -> None:
    student = torch.randn(1, 4, 3, requires_grad=True)
    real = torch.tensor([[True, True, False, False]])
    losses.squared_error(student, torch.zeros(1, 4, 3), real).total.backward()
    assert student.grad is not None and student.grad[0, 2:].abs().max() == 0 and student.grad[0, :2].abs().min() > 0


def test_nothing_to_learn_is_zero_with_a_gradient() -> None:
    mine, head, *_ = case()
    got = losses.cross_entropy(mine, head, torch.full((ROWS, LENGTH), IGNORED))
    assert got.total == 0 and got.tokens == 0
    assert gradients(got.total, mine)[0].abs().max() == 0


class Largest(TorchDispatchMode):
    """The most numbers that any result had."""

    numbers = 0

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return out


def test_whole_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "TOKENS", 8)
    monkeypatch.setattr(losses, "WORDS", 64)
    mine, head = torch.randn(1, 256, 4, requires_grad=True), torch.randn(256, 4)
    real, labels = torch.ones(1, 256, dtype=torch.bool), torch.randint(256, (1, 256))
    with Largest() as largest:
        losses.divergence(mine, head, real, mine.detach(), head, 2.0).total.backward()
    assert largest.numbers <= 256 * 4  # hidden itself; a chunk of logits has 8 * 64
    with Largest() as largest:
        losses.cross_entropy(mine, head, labels).total.backward()
    assert largest.numbers <= 8 * 256
