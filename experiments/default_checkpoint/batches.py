"""A seed -> one training batch as numpy arrays: the numbers of every frame, time stamps, questions with answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from recipe import Phase

from infinitevl.processor import Processor
from infinitevl.synth import questions as quiz
from infinitevl.synth.world import TRAIN, Stories, make_stories

IGNORED = -100  # label of a token whose successor is not learned
LONGEST = 28  # tokens of a question with its answer
# what a stream's earlier stories may have shown is not denied: kinds of question about all of it, and kinds whose "not
# seen" and "never" are. Words are so many that few come again; colours and shapes do, and of what came twice the last
# counts.
OF_ALL = ("first_word", "was_pair")
NEVER = ("word_by_emblem", "count_past", "when_state")


class Batch(NamedTuple):
    """One step's numbers. B stories of F frames in S segments, N = B * asks questions after each, L tokens of one.

    fresh [B]: has the stream seen nothing before?
    strips [B, F, 8, 59], scene [B, F, 12], grain [B, F]: what the composer takes. stamps [B, stamps, tokens of one].
    ids, labels [S, N, L]: questions with their answers, of which only the answers are learned. kinds [S, N].
    """

    fresh: np.ndarray
    strips: np.ndarray
    scene: np.ndarray
    grain: np.ndarray
    stamps: np.ndarray
    ids: np.ndarray
    labels: np.ndarray
    kinds: np.ndarray


def make(phase: Phase, step: int, seed: int, processor: Processor, mix: dict[str, float]) -> Batch:
    """The batch of one step of a phase; the same phase, step and seed give the same batch."""
    frames, fresh, begin = phase.length, np.ones(phase.streams, bool), None
    if phase.chapters > 1:
        before, begin = np.array([phase.age(step, stream) for stream in range(phase.streams)]).T
        fresh = before == 0
    stories = make_stories(seed, phase.streams, frames, TRAIN, phase.world, begin)
    rng = np.random.default_rng([seed, 7])
    every = int(processor.config.stamp_seconds or 0)
    stamps = [[processor.stamp_ids(int(t0) + at) for at in range(0, frames, every)] for t0 in stories.t0]
    ends = range(phase.frames - 1, frames, phase.frames)
    asks = [_asks(stories, phase, end, rng, processor, mix, fresh) for end in ends]
    ids, labels, kinds = (np.stack(parts) for parts in zip(*asks, strict=True))
    return Batch(fresh, stories.strips, stories.scene, stories.grain, np.array(stamps, np.int64), ids, labels, kinds)


def _asks(
    stories: Stories,
    phase: Phase,
    frame: int,
    rng: np.random.Generator,
    processor: Processor,
    mix: dict[str, float],
    fresh: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Up to `asks` questions of each story after `frame`; where there are fewer, rows stay without labels."""
    count = phase.streams * phase.asks
    ids = np.full((count, LONGEST), processor.chat.after[0], np.int64)
    labels = np.full((count, LONGEST), IGNORED, np.int64)
    kinds = np.zeros(count, np.int64)
    names = list(quiz.KINDS)
    for story in range(phase.streams):
        for place, question in enumerate(_drawn(stories, story, frame, phase, rng, mix, bool(fresh[story]))):
            at = story * phase.asks + place
            prompt = processor.chat.tail(question.text)
            answer = (*processor.ids(question.answer), processor.chat.after[0])  # <|im_end|>
            ids[at, : len(prompt) + len(answer)] = prompt + answer
            labels[at, len(prompt) - 1 : len(prompt) - 1 + len(answer)] = answer
            kinds[at] = names.index(question.kind)
    return ids, labels, kinds


def _drawn(
    stories: Stories,
    story: int,
    frame: int,
    phase: Phase,
    rng: np.random.Generator,
    mix: dict[str, float],
    fresh: bool,
) -> list[quiz.Question]:
    """Kinds are drawn by weight, about the present or the past as the phase says; again where none fits.

    fresh: the stream has seen no other story; of one that has, nothing is asked about all of it, and nothing that comes
    again in every story is called unseen.
    """
    chosen: list[quiz.Question] = []
    recall = [kind for kind in (*quiz.RECALL, *quiz.YES_NO) if fresh or kind not in OF_ALL]
    present, past = _weights((*quiz.NOW, *quiz.STATES), mix), _weights(recall, mix)
    for _ in range(4 * phase.asks):
        names, weights = present if rng.random() < phase.now_share else past
        kind = names[int(rng.choice(len(names), p=weights))]
        never = None if fresh or kind not in NEVER else 0.0
        chosen += quiz.questions(stories, story, frame, rng, kinds=(kind,), never=never)
        if len(chosen) == phase.asks:
            break
    return chosen


def _weights(kinds: Sequence[str], mix: dict[str, float]) -> tuple[Sequence[str], np.ndarray]:
    weights = np.array([mix.get(kind, 1.0) for kind in kinds])
    return kinds, weights / weights.sum()
