"""The synthetic world as data that never ends: a seed -> a story watched as a stream, with questions asked on the way.

A sample is what `Stream` would have fed: the chat's head, stamps and frames by turns, and after each segment questions
with their answers, each kept and the video opened again after it. Pictures travel as the composer's numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from infinitevl import rope
from infinitevl.config import ModelConfig
from infinitevl.memory import Memory
from infinitevl.processor import Processor, fit_frame
from infinitevl.synth import questions as quiz
from infinitevl.synth.world import LONG, READING, SHORT, SIZE, TRAIN, Setting, Stories, make_stories
from infinitevl.train.data import Pictures, Sample
from infinitevl.train.losses import IGNORED
from infinitevl.train.recipes import Recipe

SETTINGS = {
    "reading": READING,
    "short": SHORT,
    "long": LONG,
    # denser than what is tested, so that a short story holds several things to recall
    "mixed": Setting(
        sign_frames=(1, 4),
        sign_gaps=(1, 6),
        letters=(2, 6),
        object_gaps=(4, 14),
        digit_gaps=(2, 10),
        state_frames=(6, 24),
    ),
}
# how often a kind of question is drawn against the others of the present or of the past; 1 where it is not named
WEIGHTS = {
    "sign": 3.0,
    "emblem_now": 1.5,
    "door": 0.3,
    "light": 0.3,
    "word_by_emblem": 2.0,
    "emblem_by_word": 1.5,
    "count_past": 1.5,
    "first_word": 0.5,
}


class Fed(NamedTuple):
    """A run of tokens that is fed at once; learned: the model itself says it."""

    ids: list[int]
    positions: Tensor  # [3, T]
    learned: bool


@dataclass
class Synthetic:
    """Sample n is the story of seed n of the recipe's own space of seeds."""

    processor: Processor
    config: ModelConfig
    recipe: Recipe

    size = None

    def name(self, number: int) -> str:
        return f"synth {number}"

    def sample(self, number: int) -> Sample:
        recipe, seed = self.recipe, self.recipe.seed * 1_000_000_007 + number
        stories = make_stories(seed, 1, recipe.synth_frames, TRAIN, SETTINGS[recipe.synth_setting])
        fed = list(self._fed(stories, np.random.default_rng([seed, 7])))
        ids = [token for part in fed for token in part.ids]
        learned = [part.learned for part in fed for _ in part.ids]
        labels = [after if learns else IGNORED for after, learns in zip(ids[1:], learned[1:], strict=True)]
        painted = {name: torch.from_numpy(part) for name, part in stories.params().items()}
        tokens = recipe.synth_frames * self._side[0] * self._side[1]
        pictures = Pictures(None, painted, self._frame, False, tokens)
        positions = torch.cat([part.positions for part in fed], 1)
        return Sample(torch.tensor(ids), torch.tensor([*labels, IGNORED]), positions, (pictures,))

    @property
    def _frame(self) -> tuple[int, int]:
        """Pixels at which the model sees a frame."""
        return fit_frame(SIZE, SIZE, self.processor.config)

    @property
    def _side(self) -> tuple[int, int]:
        """Visual tokens of a frame: rows, columns."""
        stride = self.config.vision.stride
        return self._frame[0] // stride, self._frame[1] // stride

    def _fed(self, stories: Stories, rng: np.random.Generator) -> Iterator[Fed]:
        """What a stream of this story feeds, with its positions."""
        recipe, chat, clocks = self.recipe, self.processor.chat, _Clocks(self.config)
        yield clocks.text(chat.head)
        before: float | None = None
        for frame in range(recipe.synth_frames):
            now = float(stories.t0[0] + frame)
            stamp = self.processor.stamp_due(before, now)
            if stamp is not None:
                yield clocks.text(self.processor.stamp_ids(stamp))
            yield clocks.frame(now, *self._side, chat.video.pad)
            before = now
            if (frame + 1) % recipe.synth_segment == 0 or frame + 1 == recipe.synth_frames:
                for question in drawn(stories, frame, rng, recipe.synth_asks, recipe.synth_now):
                    yield clocks.text(chat.tail(question.text))
                    yield clocks.text((*self.processor.ids(question.answer), chat.after[0]), learned=True)
                    yield clocks.text(chat.reopen)


class _Clocks:
    """The clocks of a stream's memory, without its blocks: `rope` gives the positions."""

    def __init__(self, config: ModelConfig) -> None:
        zero, nothing = torch.zeros(1, dtype=torch.int64), torch.full((1,), torch.nan, dtype=torch.float64)
        self.config = config
        self.memory = Memory((), torch.zeros(1, 0, dtype=torch.int64), zero, zero, zero, zero, nothing, nothing)

    def text(self, ids: tuple[int, ...], learned: bool = False) -> Fed:
        positions, self.memory = rope.next_text(self.memory, len(ids))
        self._advance(positions)
        return Fed(list(ids), positions[:, 0], learned)

    def frame(self, time: float, rows: int, columns: int, pad: int) -> Fed:
        now = torch.tensor([time], dtype=torch.float64)
        positions, self.memory = rope.next_frame(self.memory, now, rows, columns, self.config)
        self._advance(positions)
        return Fed([pad] * (rows * columns), positions[:, 0], False)

    def _advance(self, positions: Tensor) -> None:
        """As `Model.forward` does."""
        latest = positions.amax((0, 2)) + 1
        self.memory = self.memory._replace(clock=torch.maximum(self.memory.clock, latest))


def drawn(stories: Stories, frame: int, rng: np.random.Generator, asks: int, now_share: float) -> list[quiz.Question]:
    """Up to `asks` questions after a frame: kinds by weight, about the present or the past; again where none fits."""
    chosen: list[quiz.Question] = []
    present, past = _weights((*quiz.NOW, *quiz.STATES)), _weights((*quiz.RECALL, *quiz.YES_NO))
    for _ in range(4 * asks):
        names, weights = present if rng.random() < now_share else past
        kind = names[int(rng.choice(len(names), p=weights))]
        chosen += quiz.questions(stories, 0, frame, rng, kinds=(kind,))
        if len(chosen) == asks:
            break
    return chosen


def _weights(kinds: tuple[str, ...]) -> tuple[tuple[str, ...], np.ndarray]:
    weights = np.array([WEIGHTS.get(kind, 1.0) for kind in kinds])
    return kinds, weights / weights.sum()
