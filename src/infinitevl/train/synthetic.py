"""The synthetic world as data that never ends: a seed -> a story watched as a stream, with questions asked on the way.

A sample is what `Stream` would have fed: the chat's head, stamps and frames by turns, and here and there questions with
their answers, each kept and the video opened again after it. Nothing that was answered is asked again in its story, and
many stories are long before the first question comes, as those of the held-out test are. Pictures travel as the
composer's numbers.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from infinitevl.config import ModelConfig
from infinitevl.processor import Ids, Processor, fit_frame
from infinitevl.synth import atlas
from infinitevl.synth import questions as quiz
from infinitevl.synth.world import LONG, MIXED, READING, SHORT, SIZE, TRAIN, Setting, Stories, make_stories
from infinitevl.train.data import DataError, Pictures, Sample
from infinitevl.train.losses import IGNORED
from infinitevl.train.recipes import Recipe

LATEST_START = 600  # seconds; stories that all began at 0:00 left every later stamp unlearned
# the settings that stories take in turn
SETTINGS = {
    name: tuple(replace(each, latest_start=LATEST_START) for each in turns)
    for name, turns in {
        "reading": (READING,),
        "short": (SHORT,),
        "mixed": (MIXED,),
        "long": (LONG,),
        "varied": (MIXED, LONG, LONG),
    }.items()
}
# how often a kind of question is drawn against the others of the present or of the past; 1 where it is not named
WEIGHTS = {
    "sign": 3.0,
    "emblem_now": 1.5,
    "door": 0.3,
    "light": 0.3,
    "word_by_emblem": 3.0,  # the slowest to learn, with the order of words
    "emblem_by_word": 1.5,
    "order": 2.0,
    "word_at": 1.5,
    "when_word": 1.5,
    "count_past": 1.5,
    "first_word": 0.5,
}
STAGES = typing.get_args(typing.get_type_hints(Recipe)["stage"])
TOGETHER = 4  # stories made at once: a third of the time of one by one


class Fed(NamedTuple):
    """A run of tokens that is fed at once; learned: the model itself says it."""

    ids: Ids
    positions: np.ndarray  # [3, T]
    learned: bool


@dataclass
class Synthetic:
    """Sample n is a story of its own for every seed and stage: no stage sees those of another again."""

    processor: Processor
    config: ModelConfig
    recipe: Recipe

    size = None

    def __post_init__(self) -> None:
        """DataError where no story fits a row: its frames alone are too many tokens."""
        least = self.recipe.synth_frames * self._side[0] * self._side[1]
        if least > self.recipe.length:
            raise DataError(
                f"length={self.recipe.length}: the {self.recipe.synth_frames} frames of a story are {least} tokens; "
                "raise length, or lower synth_frames"
            )

    def name(self, number: int) -> str:
        return f"synth {number}"

    def sample(self, number: int) -> Sample:
        stories, b, rng = self.story(number)
        fed = list(self._fed(stories, b, rng))
        learned = np.array([part.learned for part in fed for _ in part.ids])
        ids = np.array([token for part in fed for token in part.ids])
        labels = np.append(np.where(learned[1:], ids[1:], IGNORED), IGNORED)
        positions = np.concatenate([part.positions for part in fed], 1)
        painted = {name: torch.from_numpy(getattr(stories, name)[b]) for name in ("strips", "scene", "grain")}
        tokens = stories.frames * self._side[0] * self._side[1]
        pictures = Pictures(None, painted, self._frame, False, tokens)
        return Sample(torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(positions), (pictures,))

    def story(self, number: int) -> tuple[Stories, int, np.random.Generator]:
        """The stories that sample `number` is one of, which of them, and the random numbers of its questions."""
        block, b = divmod(number, TOGETHER)
        recipe, turns = self.recipe, SETTINGS[self.recipe.synth_setting]
        space = recipe.seed * len(STAGES) + STAGES.index(recipe.stage)
        seed = space * 1_000_000_007 + block
        stories = _made(seed, recipe.synth_frames, turns[block % len(turns)])
        return stories, b, np.random.default_rng([seed, b, 7])

    @functools.cached_property
    def _frame(self) -> tuple[int, int]:
        """Pixels at which the model sees a frame."""
        return fit_frame(SIZE, SIZE, self.processor.config)

    @functools.cached_property
    def _side(self) -> tuple[int, int]:
        """Visual tokens of a frame: rows, columns."""
        stride = self.config.vision.stride
        return self._frame[0] // stride, self._frame[1] // stride

    def _fed(self, stories: Stories, b: int, rng: np.random.Generator) -> Iterator[Fed]:
        """What a stream of this story feeds, with its positions."""
        chat, clocks = self.processor.chat, _Clocks(self.config, *self._side, self.processor.chat.video.pad)
        asked = asked_in(stories, b, rng, self.recipe)
        yield clocks.text(chat.head)
        before: float | None = None
        for frame in range(stories.frames):
            now = float(stories.t0[b] + frame)
            stamp = self.processor.stamp_due(before, now)
            if stamp is not None:
                yield clocks.text(self.processor.stamp_ids(stamp))
            yield clocks.frame(now)
            before = now
            for question in asked.get(frame, ()):
                yield clocks.text(chat.tail(question.text))
                yield clocks.text((*self.processor.ids(question.answer), chat.after[0]), learned=True)
                yield clocks.text(chat.reopen)


@functools.lru_cache(maxsize=8)
def _made(seed: int, frames: int, setting: Setting) -> Stories:
    return make_stories(seed, TOGETHER, frames, TRAIN, setting)


class _Clocks:
    """The clocks of a stream's memory as whole numbers, by the rules of `rope.next_text` and `rope.next_frame`.

    A test holds them to a stream's; tensors of one number each took most of the time of a sample.
    """

    def __init__(self, config: ModelConfig, rows: int, columns: int, pad: int) -> None:
        self.rate, self.clock, self.origin, self.start = config.vision.tokens_per_second, 0, 0, -1.0
        self.grid = np.stack([np.zeros(rows * columns, np.int64), *np.indices((rows, columns)).reshape(2, -1)])
        self.pads = (pad,) * (rows * columns)

    def text(self, ids: Ids, learned: bool = False) -> Fed:
        at = np.arange(self.clock, self.clock + len(ids))
        self.clock, self.start = self.clock + len(ids), -1.0
        return Fed(ids, np.broadcast_to(at, (3, len(ids))), learned)

    def frame(self, time: float) -> Fed:
        if self.start < 0:
            self.origin, self.start = self.clock, time
        positions = self.origin + self.grid
        positions[0] += int(self.rate * (time - self.start))
        self.clock = max(self.clock, int(positions.max()) + 1)
        return Fed(self.pads, positions, False)


def asked_in(stories: Stories, b: int, rng: np.random.Generator, recipe: Recipe) -> dict[int, list[quiz.Question]]:
    """What is asked in story b, by the frame after which it is: as many places as the story has segments.

    The last is its last frame, the others lie anywhere from a frame on that is as likely early as late.
    """
    places = min(max(1, stories.frames // recipe.synth_segment), stories.frames)
    first = int(rng.integers(stories.frames - places + 1))
    others = rng.choice(np.arange(first, stories.frames - 1), places - 1, replace=False)
    said: set[frozenset[str]] = set()
    return {
        frame: drawn(stories, b, frame, rng, recipe.synth_asks, recipe.synth_now, said)
        for frame in sorted([*others.tolist(), stories.frames - 1])
    }


def drawn(
    stories: Stories,
    b: int,
    frame: int,
    rng: np.random.Generator,
    asks: int,
    now_share: float,
    said: set[frozenset[str]],
) -> list[quiz.Question]:
    """Up to `asks` questions after a frame: kinds by weight, about the present or the past; again where none fits.

    said: the things that answers in this story have told of each other; what they tell is not asked. Extended.
    """
    chosen: dict[str, quiz.Question] = {}
    for _ in range(4 * asks):
        past = rng.random() >= now_share
        names, weights = _PAST if past else _PRESENT
        kind = names[int(np.searchsorted(weights, rng.random(), side="right"))]
        for question in quiz.questions(stories, b, frame, rng, kinds=(kind,)):
            told = {things(question)} if past else set()
            if question.text not in chosen and not told & said:
                chosen[question.text] = question
                said |= told
        if len(chosen) == asks:
            break
    return list(chosen.values())


def things(question: quiz.Question) -> frozenset[str]:
    """The words, times, numbers, colours and shapes that a question and its answer tell of each other."""
    words = f"{question.text} {question.answer}".replace("?", "").split()
    return frozenset(word for word in words if not word.islower() or word.startswith((*atlas.COLOURS, *atlas.SHAPES)))


def _weighed(kinds: tuple[str, ...]) -> tuple[tuple[str, ...], np.ndarray]:
    """Kinds, and the running sum of their shares."""
    weights = np.array([WEIGHTS.get(kind, 1.0) for kind in kinds]).cumsum()
    return kinds, weights / weights[-1]


_PRESENT, _PAST = _weighed((*quiz.NOW, *quiz.STATES)), _weighed((*quiz.RECALL, *quiz.YES_NO))
