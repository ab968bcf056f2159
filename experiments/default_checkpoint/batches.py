"""A seed -> one training batch as numpy arrays: the numbers of every frame, time stamps, questions with answers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from recipe import Phase

from infinitevl.processor import Processor
from infinitevl.synth import questions as quiz
from infinitevl.synth.world import TRAIN, Stories, make_stories

IGNORED = -100  # label of a token whose successor is not learned
LONGEST = 28  # tokens of a question with its answer


class Batch(NamedTuple):
    """One step's numbers. B stories of F frames in S segments, N = B * asks questions after each, L tokens of one.

    strips [B, F, 8, 59], scene [B, F, 12], grain [B, F]: what the composer takes. stamps [B, stamps, tokens of one].
    ids, labels [S, N, L]: questions with their answers, of which only the answers are learned. kinds [S, N].
    """

    strips: np.ndarray
    scene: np.ndarray
    grain: np.ndarray
    stamps: np.ndarray
    ids: np.ndarray
    labels: np.ndarray
    kinds: np.ndarray


def make(phase: Phase, seed: int, processor: Processor, mix: dict[str, float]) -> Batch:
    """The batch of one step; the same seed gives the same batch."""
    frames = phase.length
    stories = make_stories(seed, phase.streams, frames, TRAIN, phase.world)
    rng = np.random.default_rng([seed, 7])
    every = int(processor.config.stamp_seconds or 0)
    stamps = [[processor.stamp_ids(int(t0) + at) for at in range(0, frames, every)] for t0 in stories.t0]
    ends = range(phase.frames - 1, frames, phase.frames)
    asks = [_asks(stories, phase, end, rng, processor, mix) for end in ends]
    ids, labels, kinds = (np.stack(parts) for parts in zip(*asks, strict=True))
    return Batch(stories.strips, stories.scene, stories.grain, np.array(stamps, np.int64), ids, labels, kinds)


def _asks(
    stories: Stories, phase: Phase, frame: int, rng: np.random.Generator, processor: Processor, mix: dict[str, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Up to `asks` questions of each story after `frame`; where there are fewer, rows stay without labels."""
    count = phase.streams * phase.asks
    ids = np.full((count, LONGEST), processor.chat.after[0], np.int64)
    labels = np.full((count, LONGEST), IGNORED, np.int64)
    kinds = np.zeros(count, np.int64)
    names = list(quiz.KINDS)
    for story in range(phase.streams):
        for place, question in enumerate(_drawn(stories, story, frame, phase, rng, mix)):
            at = story * phase.asks + place
            prompt = processor.chat.tail(question.text)
            answer = (*processor.ids(question.answer), processor.chat.after[0])  # <|im_end|>
            ids[at, : len(prompt) + len(answer)] = prompt + answer
            labels[at, len(prompt) - 1 : len(prompt) - 1 + len(answer)] = answer
            kinds[at] = names.index(question.kind)
    return ids, labels, kinds


def _drawn(
    stories: Stories, story: int, frame: int, phase: Phase, rng: np.random.Generator, mix: dict[str, float]
) -> list[quiz.Question]:
    """Kinds are drawn by weight, about the present or the past as the phase says; again where none fits."""
    chosen: list[quiz.Question] = []
    present, past = _weights((*quiz.NOW, *quiz.STATES), mix), _weights((*quiz.RECALL, *quiz.YES_NO), mix)
    for _ in range(4 * phase.asks):
        names, weights = present if rng.random() < phase.now_share else past
        kind = names[int(rng.choice(len(names), p=weights))]
        chosen += quiz.questions(stories, story, frame, rng, kinds=(kind,))
        if len(chosen) == phase.asks:
            break
    return chosen


def _weights(kinds: tuple[str, ...], mix: dict[str, float]) -> tuple[tuple[str, ...], np.ndarray]:
    weights = np.array([mix.get(kind, 1.0) for kind in kinds])
    return kinds, weights / weights.sum()
