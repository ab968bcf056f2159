"""Two memories of the same streams, delta states in float32 and rounded to bfloat16 after every frame: how far apart
are the distributions of their answers? `python experiments/state_precision/logits.py CHECKPOINT --out FILE.json`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infinitevl import weights
from infinitevl.config import ConfigError
from infinitevl.eval import batched, recall, record
from infinitevl.eval.batched import Watcher
from infinitevl.memory import Delta, Memory
from infinitevl.model import Model

QUESTIONS = (
    "what does the sign say?",
    "what was the last word?",
    "what was the first word?",
    "when did the light last change?",
    "what digit is shown?",
)
AT_MOST = 8  # tokens of an answer that are compared


@torch.no_grad()
def apart(model: Model, one: Memory, other: Memory, question: str) -> dict[str, float]:
    """How two memories of equal streams differ about a question, along the greedy answer of the first.

    kl: of the next token's distribution, first to second, in nats, mean over tokens of answers; agree: share of tokens
    that both would say; tokens: how many those are, over all rows.
    """
    everyone, stops = torch.arange(len(one.seen), device=model.device), torch.tensor(model.config.stop_tokens)
    ids = [model.processor.chat.tail(question)] * len(everyone)
    states, going = [one.rows(everyone), other.rows(everyone)], torch.ones_like(everyone, dtype=torch.bool)
    sums = torch.zeros(3, dtype=torch.float64, device=model.device)
    for _ in range(AT_MOST):
        (mine, states[0]), (theirs, states[1]) = (batched.feed(model, memory, ids) for memory in states)
        left, right = (model.logits(hidden).double().log_softmax(-1) for hidden in (mine, theirs))
        token = left.argmax(-1)
        kl = (left.exp() * (left - right)).sum(-1)
        sums += torch.stack([kl, (token == right.argmax(-1)).double(), torch.ones_like(kl)])[:, going].sum(1)
        going = going & ~torch.isin(token, stops.to(token))
        ids = [(each,) for each in token.tolist()]
    total, agree, tokens = sums.tolist()
    return {"kl": total / tokens, "agree": agree / tokens, "tokens": int(tokens)}


def states_apart(one: Memory, other: Memory) -> float:
    """Norm of the difference of all delta states over the norm of the first's."""
    pairs = [(a.state, b.state) for a, b in zip(one.blocks, other.blocks, strict=True) if isinstance(a, Delta)]

    def norm(parts: list[Tensor]) -> Tensor:
        return torch.stack([part.double().square().sum() for part in parts]).sum().sqrt()

    return float(norm([a - b for a, b in pairs]) / norm([a for a, _ in pairs]))


def run(model: Model, tokens: int, every: int, streams: int, seed: int) -> list[dict[str, Any]]:
    """A row for each `every` tokens of the streams, up to `tokens`."""
    world, seen = recall.laid_out(model, tokens, streams, seed)
    exact, rounded = Watcher(model, streams), Watcher(model, streams)
    upkeep, rows, due = recall.Upkeep(state_dtype=torch.bfloat16), [], every
    for frame, pixels in enumerate(world.pictures(0, len(seen), model.device)):
        exact.observe(pixels, float(frame))
        rounded.observe(pixels, float(frame))
        upkeep.after(rounded, frame)
        if seen[frame] >= due:
            due += every
            found = {text: apart(model, exact.memory, rounded.memory, text) for text in QUESTIONS}
            rows.append({"tokens": int(seen[frame]), "state": states_apart(exact.memory, rounded.memory)} | found)
        if seen[frame] >= tokens:
            break
    return rows


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=1 << 20, help="of each stream")
    parser.add_argument("--every", type=int, default=1 << 14, help="tokens between two comparisons")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(words)
    if min(args.tokens, args.every, args.streams) < 1 or args.seed < 0:
        parser.error("--tokens, --every and --streams are 1 or more, --seed is 0 or more")
    began = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = weights.load(args.model, device)
    except (weights.CheckpointError, ConfigError) as error:
        parser.exit(3, f"{parser.prog}: {error}\n")
    rows = run(model, args.tokens, args.every, args.streams, args.seed)
    about = {"streams": args.streams, "seconds": round(time.perf_counter() - began, 1), **record.circumstances(model)}
    record.write(args.out, {"rows": rows, **about})
    return 0


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
