"""Hidden of a question's last token -> token ids of an answer, one at a time, on a memory of its own."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from infinitevl import rope
from infinitevl.memory import Memory
from infinitevl.model import Model


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. temperature 0: the most likely one (greedy). top_p: from the smallest set of that mass."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature must be >= 0 and top_p in (0, 1], got {self.temperature} and {self.top_p}")

    def generator(self, device: torch.device) -> torch.Generator:
        """A source of random numbers, seeded where a seed is given."""
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


GREEDY = Sampling()


def pick(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """logits [B, vocab] -> ids [B]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    chances = (logits.float() / sampling.temperature).softmax(-1)
    ordered, order = chances.sort(-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= sampling.top_p, 0.0)
    drawn = torch.multinomial(ordered, 1, generator=generator)
    return order.gather(-1, drawn)[:, 0]


@torch.no_grad()
def feed(model: Model, memory: Memory, ids: tuple[int, ...] | list[int]) -> tuple[Tensor, Memory]:
    """Text ids into every row of a memory -> hidden of the last one [B, D] and the memory. Ends a run of frames."""
    rows = memory.seen.shape[0]
    tokens = torch.tensor(ids, device=model.device).expand(rows, -1)
    positions, memory = rope.next_text(memory, len(ids))
    hidden, after = model(model.embed(tokens), positions, memory)
    assert after is not None
    return hidden[:, -1], after


def decode(
    model: Model, memory: Memory, hidden: Tensor, at_most: int, sampling: Sampling
) -> Generator[int, None, Memory]:
    """Yields ids until a stop token (not yielded) or `at_most`; returns the memory with the yielded ids in it.

    memory: of one row, given up to this call. hidden [1, D]: of the last token fed.
    """
    generator = sampling.generator(model.device)
    for _ in range(at_most):
        with torch.no_grad():
            token = int(pick(model.logits(hidden), sampling, generator))
        if token in model.config.stop_tokens:
            break
        yield token
        hidden, memory = feed(model, memory, [token])
    return memory
