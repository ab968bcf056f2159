"""Follow a batch: hidden of student and teacher -> what is minimised, as sums over tokens; the loop divides.

Logits of 8,192 tokens x 151,936 words would be 5 GB in float32, and their gradient as much again: they are made in
chunks, and what is kept of each is the gradient of the hidden alone.
Letters: N tokens, D hidden size, V words of the vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # label of a token whose successor is not learned
TOKENS = 1024  # tokens whose logits exist at once
WORDS = 32768  # words of the vocabulary, likewise, in the distillation


class Loss(NamedTuple):
    """A sum over tokens, part of a graph, and how many tokens it is over (an integer tensor without a dimension)."""

    total: Tensor
    tokens: Tensor


def squared_error(student: Tensor, teacher: Tensor, real: Tensor) -> Loss:
    """Squared difference of hidden [B, T, D], mean over channels, over the tokens marked in bool [B, T]."""
    difference = (student.float() - teacher.float()).square().mean(-1)
    return Loss(difference.masked_fill(~real, 0.0).sum(), real.sum())


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Loss:
    """Cross-entropy of the words labels [B, T] (IGNORED: not learned) after hidden [B, T, D], head weight [V, D]."""
    learned = labels != IGNORED
    total = _CrossEntropy.apply(hidden[learned], weight, labels[learned])
    return Loss(total, learned.sum())


def divergence(
    hidden: Tensor, weight: Tensor, real: Tensor, teacher: Tensor, teacher_weight: Tensor, temperature: float
) -> Loss:
    """T^2 * sum_v p_teacher (log p_teacher - log p_student) at temperature T, over the tokens marked in bool [B, T].

    hidden, teacher [B, T, D] with head weights [V, D]; D may differ, V may not. Gradients reach the student only.
    """
    total = _Divergence.apply(hidden[real], weight, teacher[real], teacher_weight, temperature)
    return Loss(total, real.sum())


class _CrossEntropy(torch.autograd.Function):
    """Sum over tokens of -log p(label). The gradient is made beside the loss: d/d logits = p - onehot(label)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        gradients = _Gradients(ctx, hidden, weight)
        total = hidden.new_zeros((), dtype=torch.float32)
        for at in range(0, len(hidden), TOKENS):
            part = slice(at, at + TOKENS)
            scores = (hidden[part] @ weight.mT).float()
            log_total = scores.logsumexp(-1, keepdim=True)
            picked = labels[part, None]
            total += (log_total - scores.gather(1, picked)).sum()
            if gradients.wanted:
                slope = (scores - log_total).exp_()
                slope.scatter_add_(1, picked, torch.full_like(slope[:, :1], -1.0).expand(picked.shape))
                gradients.add(part, slice(None), slope)
        gradients.save(ctx)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return (*_scaled(ctx, scale), None)


class _Divergence(torch.autograd.Function):
    """Sum over tokens of T^2 KL(teacher, student); d/d student's logits = T (p_student - p_teacher)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, temperature: float
    ) -> Tensor:
        gradients = _Gradients(ctx, hidden, weight)
        total = hidden.new_zeros((), dtype=torch.float32)
        for at in range(0, len(hidden), TOKENS):
            part = slice(at, at + TOKENS)
            mine = _log_total(hidden[part], weight, temperature)
            theirs = _log_total(teacher[part], teacher_weight, temperature)
            for words in _word_chunks(weight):
                student = _scores(hidden[part], weight[words], temperature) - mine
                right = _scores(teacher[part], teacher_weight[words], temperature) - theirs
                share = right.exp()
                total += temperature**2 * (share * (right - student)).sum()
                if gradients.wanted:
                    gradients.add(part, words, (student.exp_() - share) * temperature)
        gradients.save(ctx)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return (*_scaled(ctx, scale), None, None, None)


def _scores(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Logits over the temperature, float32."""
    return (hidden @ weight.mT).float() / temperature


def _word_chunks(weight: Tensor) -> list[slice]:
    return [slice(at, at + WORDS) for at in range(0, len(weight), WORDS)]


def _log_total(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """log sum_v exp(logit / T), [N, 1]: what makes scores log-probabilities."""
    parts = [_scores(hidden, weight[words], temperature).logsumexp(-1) for words in _word_chunks(weight)]
    return torch.stack(parts).logsumexp(0)[:, None]


class _Gradients:
    """Gradients of a sum in its hidden (in float32 until it is whole) and, where the head is trained, its weight."""

    def __init__(self, ctx: Any, hidden: Tensor, weight: Tensor) -> None:
        self.of_hidden, self.of_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        self.wanted = self.of_hidden or self.of_weight
        self.inputs = hidden, weight
        self.hidden = torch.zeros_like(hidden, dtype=torch.float32) if self.of_hidden else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if self.of_weight else None

    def add(self, tokens: slice, words: slice, slope: Tensor) -> None:
        """The slope in the logits of some tokens and words, [n, v]."""
        hidden, weight = self.inputs
        slope = slope.to(weight.dtype)
        if self.hidden is not None:
            self.hidden[tokens] += slope @ weight[words]
        if self.weight is not None:
            self.weight[words] += slope.mT @ hidden[tokens]

    def save(self, ctx: Any) -> None:
        hidden, weight = self.inputs
        ctx.of_hidden = None if self.hidden is None else self.hidden.to(hidden.dtype)
        ctx.of_weight = None if self.weight is None else self.weight.to(weight.dtype)


def _scaled(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of one autograd node, times what comes from above."""
    hidden, weight = ctx.of_hidden, ctx.of_weight
    return None if hidden is None else hidden * scale, None if weight is None else weight * scale
