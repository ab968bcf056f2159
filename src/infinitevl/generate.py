"""Hidden of a question's last token -> token ids of an answer, one at a time, on a memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
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
CHUNK = 8192  # tokens of a long text that go through the model at once


def pick(logits: Tensor, sampling: Sampling, chance: Tensor) -> Tensor:
    """logits [B, vocab], chance [B, 1] in [0, 1) -> ids [B]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return draw(logits, chance, sampling.temperature, sampling.top_p)


def draw(logits: Tensor, chance: Tensor, temperature: float | Tensor, top_p: float | Tensor) -> Tensor:
    """logits [B, vocab] -> ids [B]: where `chance` [B, 1] in [0, 1) falls among the likeliest tokens that make up
    top_p. Tensors in, tensors out: the same draw eager and recorded."""
    chances = (logits.float() / temperature).softmax(-1)
    ordered, order = chances.sort(-1, descending=True)
    reached = ordered.cumsum(-1)
    reached = ordered.masked_fill(reached - ordered >= top_p, 0.0).cumsum(-1)
    place = (reached <= chance * reached[:, -1:]).sum(-1, keepdim=True)
    return order.gather(-1, place.clamp(max=logits.shape[-1] - 1))[:, 0]


def feed(model: Model, memory: Memory, ids: Sequence[int]) -> tuple[Tensor, Memory]:
    """Text ids into every row of a memory -> hidden of the last one [B, D] and the memory. Ends a run of frames."""
    return prefill(model, memory, torch.tensor(ids, device=model.device).expand(len(memory.seen), -1))


@torch.no_grad()
def prefill(
    model: Model,
    memory: Memory,
    ids: Tensor,
    chunk: int = CHUNK,
    progress: Callable[[int, int], None] | None = None,
    there: Tensor | None = None,
) -> tuple[Tensor, Memory]:
    """Text of any length into a memory -> hidden of the last token [B, D] and the memory. Ends a run of frames.

    ids int64 [B, N] on any device: `chunk` tokens at a time go to the model's, so that nothing there grows with N.
    progress(done, total) is called after every chunk, with tokens. there: bool [B], the rows that the text is for;
    None: all. The others stay as they are, bit for bit, and their hidden means nothing.
    Raises ValueError for ids that are not [B, N] of the memory's rows, for none, and for a chunk below 1.
    """
    if ids.dim() != 2 or len(ids) != len(memory.seen) or not ids.shape[1] or chunk < 1:
        wanted = f"[{len(memory.seen)}, 1 or more], chunks of 1 or more"
        raise ValueError(f"a text is ids {wanted}; got {list(ids.shape)}, chunks of {chunk}")
    total = ids.shape[1]
    for start in range(0, total, chunk):
        tokens = ids[:, start : start + chunk].to(model.device)
        positions, memory = rope.next_text(memory, tokens.shape[1], there)
        count = None if there is None else there * tokens.shape[1]
        hidden, after = model(model.embed(tokens), positions, memory, count=count)
        assert after is not None
        memory = after
        if progress is not None:
            progress(start + tokens.shape[1], total)
    return hidden[:, -1], memory


def decode(
    model: Model, memory: Memory, hidden: Tensor, at_most: int, sampling: Sampling
) -> Generator[int, None, Memory]:
    """Yields ids until a stop token (not yielded) or `at_most`; returns the memory with the yielded ids in it.

    memory: of one row, given up to this call. hidden [1, D]: of the last token fed.
    """
    generator = sampling.generator(model.device)
    for chance in torch.rand(max(at_most, 0), 1, 1, device=model.device, generator=generator):
        with torch.no_grad():
            token = int(pick(model.logits(hidden), sampling, chance))
        if token in model.config.stop_tokens:
            break
        yield token
        hidden, memory = feed(model, memory, [token])
    return memory
