"""Follow a frame: a story -> an H.264 file to watch, and beside it what may be asked when, with the true answers."""

from __future__ import annotations

import json
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from ..files import written_aside
from .compose import Composer
from .questions import Question, questions
from .world import HELDOUT, HELDOUT_SETTING, SIZE, Setting, Split, Stories, make_stories

# What a film's questions are about, in order: kind, whether about something never seen, and least frames out of view
_PROGRAMME = (
    ("sign", False, 0),
    ("count_past", False, 4),
    ("word_by_emblem", False, 15),
    ("digit", False, 0),
    ("order", False, 20),
    ("when_word", False, 20),
    ("emblem_by_word", False, 30),
    ("was_word", True, 0),
    ("first_word", False, 30),
    ("word_by_emblem", True, 0),
)


def write(
    path: str | Path,
    seed: int,
    frames: int = 96,
    split: Split = HELDOUT,
    fps: int = 8,
    setting: Setting = HELDOUT_SETTING,
) -> dict[str, Any]:
    """Write one story of `frames` seconds to `path` (H.264) and its questions to the same name ending in .json.

    Returns what the JSON holds: seed, frames, fps, split and questions, each with kind, text, answer, the second `time`
    after whose frame it is asked, and the second `evidence` at which its answer was last in view (-1: never).
    ValueError where `frames` is below 32: too short for questions about the past.
    """
    path = Path(path)
    if frames < 32:
        raise ValueError(f"a film needs at least 32 seconds for its questions, got {frames}; ask for more frames")
    if path.suffix == ".json":
        raise ValueError(f"{path}: the film's name must not end in .json, where its questions go; name it .mp4")
    stories = make_stories(seed, 1, frames, split, setting)
    pictures = Composer()({name: torch.from_numpy(part) for name, part in stories.params().items()}).numpy()
    asked = [_as_plain(question) for question in programme(stories, seed)]
    record = {"seed": seed, "frames": frames, "fps": fps, "split": split.name, "questions": asked}
    with written_aside(path) as aside:
        _encode(aside, pictures, fps)
    with written_aside(path.with_suffix(".json")) as aside:
        aside.write_text(json.dumps(record, indent=1) + "\n")
    return record


def _as_plain(question: Question) -> dict[str, Any]:
    plain = asdict(question)
    return {"time": plain.pop("asked"), **plain}


def programme(stories: Stories, seed: int) -> list[Question]:
    """The film's questions about story 0, by time: now, past, order, when and never seen, spread over its length."""
    rng = np.random.default_rng(seed)
    last = stories.frames - 1
    found: list[Question] = []
    for number, (kind, never, old) in enumerate(_PROGRAMME):
        wanted = last * (number + 3) // (len(_PROGRAMME) + 2)
        told = {question.evidence for question in found if question.evidence >= 0}
        question = _nearest(stories, rng, kind, never, old, wanted, told)
        question = question or _nearest(stories, rng, kind, never, old, wanted, set())
        if question is not None:
            found.append(question)
    return sorted(found, key=lambda question: question.asked)


def _nearest(
    stories: Stories, rng: np.random.Generator, kind: str, never: bool, old: int, wanted: int, told: set[int]
) -> Question | None:
    """The question of a kind at the moment nearest to frame `wanted` that allows one with evidence not yet told."""
    for frame in sorted(range(8, stories.frames), key=lambda frame: abs(frame - wanted)):
        for _ in range(4):  # what is asked about is drawn at random
            asked = questions(stories, 0, frame, rng, (kind,), float(never), (0, max(frame - old, 0)))
            fresh = [each for each in asked if each.evidence not in told and (each.evidence < 0) == never]
            if fresh:
                return fresh[0]
    return None


def _encode(path: Path, pictures: np.ndarray, fps: int) -> None:
    """Pictures [F, 112, 112, 3], each lasting one second at `fps`, as H.264 (yuv420p, crf 16: text stays readable)."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "16", "preset": "veryfast"})
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            for _ in range(fps):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
