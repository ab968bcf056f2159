"""What FP8 costs in accuracy: the held-out streams, watched and asked by the same checkpoint with and without it.

Two models see the same frames. After each frame at which something is asked, both answer on a fork of their memory,
and both are shown the right answer: how far their probabilities of its tokens are apart (KL divergence, in nats), and
whether they would have said the same token. Exit code 1 where a bound of the gate fails.
"""

from __future__ import annotations

import argparse
import math
import sys
import time as clock
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from infinitevl import rope, stream, weights
from infinitevl.config import ConfigError
from infinitevl.eval import batched, record
from infinitevl.eval.exam import AT_MOST, Exam, painted
from infinitevl.memory import Memory
from infinitevl.model import Model
from infinitevl.ops.fp8 import Fp8Error
from infinitevl.synth import heldout
from infinitevl.synth.heldout import Ask
from infinitevl.synth.world import Stories

HERE = Path(__file__).parent
STREAMS = 8  # of each world: the whole test has 96 and 64
DIVERGENCE = 0.05  # nats a token, in the mean: what is said is a twentieth less likely, as a rule
ERRORS = 2.0  # standard errors of the paired difference by which FP8 may have fewer right


class Found(NamedTuple):
    """One question. divergence, same: one for each token of the right answer and its end."""

    ask: Ask
    plain: str
    rounded: str
    divergence: list[float]
    same: list[bool]


def compared(plain: Model, rounded: Model, streams: int) -> Iterator[Found]:
    """Every question about the first `streams` streams of each world."""
    asks = [ask for ask in heldout.plan() if ask.stream < streams]
    exam = Exam(plain, heldout.worlds(), asks, at_once=64)
    for world, stories in exam.worlds.items():
        if lines := exam.lines(world):
            yield from _watched(exam, (plain, rounded), lines, stories)


@torch.no_grad()
def _watched(exam: Exam, models: tuple[Model, Model], lines: dict[int, list[int]], stories: Stories) -> Iterator[Found]:
    """The streams of a world side by side, seen by both models."""
    streams = sorted({exam.asks[line].stream for asked in lines.values() for line in asked})
    memories = [stream.begin(model, len(streams)) for model in models]
    for frame, pixels in enumerate(painted(stories, streams, max(lines) + 1, models[0].device)):
        times = (stories.t0[streams] + float(frame)).tolist()
        memories = [batched.observe(*pair, pixels, times) for pair in zip(models, memories, strict=True)]
        asked = [exam.asks[line] for line in lines.get(frame, [])]
        if asked:
            rows = torch.tensor([streams.index(ask.stream) for ask in asked], device=models[0].device)
            yield from _asked(models, [memory.rows(rows) for memory in memories], asked)


def _asked(models: tuple[Model, Model], memories: Sequence[Memory], asks: Sequence[Ask]) -> Iterator[Found]:
    """What both say, and how they take the right answers. The memories' rows are the questions'."""
    shown = [
        [_shown(model, memory, ask, row) for row, ask in enumerate(asks)] for model, memory in _zip(models, memories)
    ]
    texts = [ask.question.text for ask in asks]
    said = [batched.answers(model, memory, texts, AT_MOST) for model, memory in _zip(models, memories)]
    for row, ask in enumerate(asks):
        one, other = shown[0][row], shown[1][row]
        divergence = (one.exp() * (one - other)).sum(-1)
        same = one.argmax(-1) == other.argmax(-1)
        yield Found(ask, said[0][row], said[1][row], divergence.tolist(), same.tolist())


def _zip(models: tuple[Model, Model], memories: Sequence[Memory]) -> Iterator[tuple[Model, Memory]]:
    return zip(models, memories, strict=True)


def _shown(model: Model, memory: Memory, ask: Ask, row: int) -> Tensor:
    """Log-probabilities float64 [L, V] of what follows, at each token of the right answer and at its end."""
    processor = model.processor
    tail, answer = processor.chat.tail(ask.question.text), tuple(processor.ids(ask.question.answer))
    ids = torch.tensor([tail + answer], device=model.device)
    fork = memory.rows(torch.tensor([row], device=model.device))
    positions, fork = rope.next_text(fork, ids.shape[1])
    hidden, _ = model(model.embed(ids), positions, fork)
    return model.logits(hidden[0, len(tail) - 1 :]).double().log_softmax(-1)


def summary(found: Sequence[Found]) -> dict[str, object]:
    """Right answers of both, what they disagree in, and the divergence, with the bounds of the gate."""
    right = [(each.plain == each.ask.question.answer, each.rounded == each.ask.question.answer) for each in found]
    lost, won = right.count((True, False)), right.count((False, True))
    divergence = torch.tensor([token for each in found for token in each.divergence])
    same = [token for each in found for token in each.same]
    allowed = ERRORS * math.sqrt(lost + won)
    mean = float(divergence.mean())
    return {
        "questions": len(found),
        "right": {"plain": sum(one for one, _ in right), "fp8": sum(other for _, other in right)},
        "right_only": {"plain": lost, "fp8": won},
        "same_answer": sum(each.plain == each.rounded for each in found) / len(found),
        "tokens": len(same),
        "same_token": sum(same) / len(same),
        "divergence": {"mean": mean, "p50": _quantile(divergence, 0.5), "p99": _quantile(divergence, 0.99)},
        "gate": {
            "divergence": {"at_most": DIVERGENCE, "found": mean, "green": mean <= DIVERGENCE},
            "answers_lost": {"at_most": allowed, "found": lost - won, "green": lost - won <= allowed},
        },
    }


def _quantile(values: Tensor, share: float) -> float:
    return float(values.double().quantile(share))


def by_row(found: Sequence[Found]) -> dict[str, dict[str, float]]:
    """Questions and right answers of each row of the held-out table, and its mean divergence."""
    rows: dict[str, list[Found]] = {}
    for each in found:
        for name in each.ask.rows:
            rows.setdefault(name, []).append(each)
    return {name: _row(rows[name]) for name in (row.name for row in heldout.ROWS) if name in rows}


def _row(found: Sequence[Found]) -> dict[str, float]:
    divergence = [token for each in found for token in each.divergence]
    return {
        "questions": len(found),
        "plain": sum(each.plain == each.ask.question.answer for each in found) / len(found),
        "fp8": sum(each.rounded == each.ask.question.answer for each in found) / len(found),
        "divergence": sum(divergence) / len(divergence),
    }


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=weights.DEFAULT)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--streams", type=int, default=STREAMS, help="of each world (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "accuracy.json")
    asked = parser.parse_args(words)
    most = max(ask.stream for ask in heldout.plan()) + 1
    if not 1 <= asked.streams <= most:
        parser.error(f"--streams {asked.streams}: a world has 1 to {most}")
    began = clock.perf_counter()
    try:
        plain, rounded = (weights.load(asked.model, asked.device, fp8=fp8) for fp8 in (False, True))
    except (weights.CheckpointError, ConfigError) as error:
        parser.exit(3, f"{parser.prog}: {error}\n")
    except Fp8Error as error:  # a device that cannot do this
        parser.error(str(error))
    found = list(compared(plain, rounded, asked.streams))
    told = summary(found) | {"rows": by_row(found), "streams": asked.streams}
    record.write(asked.out, told | {"seconds": clock.perf_counter() - began} | record.circumstances(plain))
    print(f"{len(found)} questions; right: {told['right']}, {told['gate']}")
    return 0 if all(each["green"] for each in told["gate"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
