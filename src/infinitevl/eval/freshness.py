"""Follow a frame: what is left of it in the delta states: how large they are, how full, and how old what they hold.

Rows are plain data, one a head: `states` looks at a memory, `ages` at the gates while a stream goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from infinitevl import rope, stream
from infinitevl.delta import DeltaMixer
from infinitevl.memory import Delta, Memory
from infinitevl.model import Block, Model
from infinitevl.ops.reference import gates
from infinitevl.step import see

SAMPLE = 8  # rows of a memory that are looked at: a singular value decomposition a head


def states(memory: Memory) -> list[dict[str, Any]]:
    """For each delta block and head the state's Frobenius norm and effective rank, means over at most 8 rows.

    Effective rank: the exponential of the entropy of the singular values, as shares of their sum; 1 for a state of one
    rank, min(K, V) at most, 0 for an empty one.
    """
    found = []
    for number, block in enumerate(memory.blocks):
        if isinstance(block, Delta):
            values = torch.linalg.svdvals(block.state[:SAMPLE].float().cpu())  # [B, H, min(K, V)]
            norms, ranks = values.square().sum(-1).sqrt().mean(0), effective_rank(values).mean(0)
            for head, (norm, rank) in enumerate(zip(norms.tolist(), ranks.tolist(), strict=True)):
                found.append({"block": number, "head": head, "norm": norm, "rank": rank})
    return found


def effective_rank(values: Tensor) -> Tensor:
    """Singular values [..., N] -> the exponential of their entropy [...]."""
    total = values.sum(-1, keepdim=True)
    shares = values / total.clamp(min=torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum(-1).exp() * (total[..., 0] > 0)


@torch.no_grad()
def ages(model: Model, memory: Memory, frames: Iterable[tuple[Tensor, float]]) -> list[dict[str, Any]]:
    """What the gates of each delta block and head do while a memory (given up) sees frames, means over its rows.

    frames: uint8 [B, H, W, 3] of the size that the model sees, with their times in seconds; stamps are fed where due.
    half_life: tokens after which half is left, at the mean log decay; None where nothing decays. age: in tokens, of
    what was written since the first of these frames, each token weighted by what the decays left of it. `tokens`: how
    many that were. Writing also erases (the rule replaces what a key held), which neither figure counts.
    """
    sums: dict[int, _Sums] = {}
    last = stream.last_time(memory)
    for pixels, time in frames:
        due = model.processor.stamp_due(last, time)
        if due is not None:
            ids = torch.tensor(model.processor.stamp_ids(due), device=model.device).expand(len(pixels), -1)
            positions, memory = rope.next_text(memory, ids.shape[1])
            memory = _through(model, memory, model.embed(ids), positions, sums)
        times = torch.full((len(pixels),), time, dtype=torch.float64, device=model.device)
        visual = see(model, pixels.to(model.device))
        positions, memory = rope.next_frame(memory, times, visual.shape[1], visual.shape[2], model.config)
        memory = _through(model, memory, visual.flatten(1, 2), positions, sums)
        last = time
    return [row for number, each in sums.items() for row in each.rows(number)]


def _through(model: Model, memory: Memory, hidden: Tensor, positions: Tensor, sums: dict[int, _Sums]) -> Memory:
    """A chunk through all blocks as `Model.forward` takes it, the log decays of delta blocks noted on the way."""
    where, begun = model._where(positions, memory, None, None)
    assert begun is not None
    hidden, after = hidden.clone(), []
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        if isinstance(block.mixer, DeltaMixer):
            sums.setdefault(number, _Sums()).add(decays(block, hidden))
        hidden, state = block(hidden, where, begun.blocks[number])
        after.append(state)
    return begun._replace(blocks=tuple(after))


def decays(block: Block, hidden: Tensor) -> Tensor:
    """Log decay of each token and head of a delta block, float32 [B, T, H], for what the block is given."""
    mixer = block.mixer
    assert isinstance(mixer, DeltaMixer)
    normed = block.norm_mixer(hidden)
    return gates(mixer.a(normed), mixer.b(normed), mixer.A_log, mixer.dt_bias, None)[0]


class _Sums:
    """Running sums over tokens of one block, [B, H] each: log decays, weights left, and weights times ages."""

    def __init__(self) -> None:
        self.tokens = 0
        self.log, self.weight, self.aged = torch.zeros(()), torch.zeros(()), torch.zeros(())

    def add(self, g: Tensor) -> None:
        """g [B, T, H]."""
        for log in g.double().cpu().unbind(1):
            left = log.exp()
            self.aged = left * (self.aged + self.weight)  # all that is there grows a token older
            self.weight = left * self.weight + 1
            self.log = self.log + log
            self.tokens += 1

    def rows(self, block: int) -> list[dict[str, Any]]:
        mean, age = (self.log / self.tokens).mean(0).tolist(), (self.aged / self.weight).mean(0).tolist()
        return [
            {
                "block": block,
                "head": head,
                "half_life": -math.log(2) / mean[head] if mean[head] < 0 else None,
                "age": age[head],
                "tokens": self.tokens,
            }
            for head in range(len(mean))
        ]
