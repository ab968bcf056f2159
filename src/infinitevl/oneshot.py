"""Follow a frame: not a stream's but one of a whole prompt, pictures and recordings first and then one question.

As Qwen2.5-VL is prompted: a picture is a grid of its own, a recording's frames share grids two by two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from infinitevl import rope
from infinitevl.generate import GREEDY, Sampling, decode
from infinitevl.memory import Memory
from infinitevl.model import Model
from infinitevl.processor import Size, fit, fit_video, patchify, resize
from infinitevl.stream import Answer
from infinitevl.video import PICTURES, Frame, Source, VideoError, frames

CHUNK = 4096  # tokens of a prompt that go through the model at once
GRIDS = 16  # pictures that the vision encoder sees at once
FRAMES = 768  # of one recording, at most: they are all held


class Part(NamedTuple):
    """A picture or a recording of a prompt: its kind ("image", "video"), visual tokens [N, D], and their grid."""

    kind: str
    visual: Tensor
    grid: rope.Grid


class Reply(NamedTuple):
    """An answer, and what was wrong with the recordings it is about: a line for each that broke off."""

    answer: Answer
    problems: tuple[str, ...]


@torch.no_grad()
def ask(
    model: Model,
    sources: Sequence[str],
    question: str,
    fps: float | None = None,
    at_most: int = 64,
    sampling: Sampling = GREEDY,
) -> Reply:
    """The answer to one question about pictures and recordings, in the order given.

    A source whose name ends as a picture's does is one; everything else is a recording, sampled at `fps` (None: the
    checkpoint's rate). The prompt goes through a memory of its own in chunks. Raises VideoError for a source of which
    nothing can be decoded, that is live, or has more than 768 frames.
    """
    began = time.perf_counter()
    rate = model.processor.config.frames_per_second if fps is None else fps
    problems: list[str] = []
    parts = [
        _picture(model, source) if _is_picture(source) else _recording(model, source, rate, problems)
        for source in sources
    ]
    hidden, memory = prompt(model, parts, question, at_most)
    ids = list(decode(model, memory, hidden, at_most, sampling))
    answer = Answer(model.processor.text(ids).strip(), None, len(ids), time.perf_counter() - began)
    return Reply(answer, tuple(problems))


def prompt(model: Model, parts: Sequence[Part], question: str, at_most: int) -> tuple[Tensor, Memory]:
    """Hidden [1, D] of the last token of the whole prompt, and the memory after it, with room for an answer."""
    ids = model.processor.chat.one_shot([(part.kind, len(part.visual)) for part in parts], question)
    tokens = torch.tensor([ids], device=model.device)
    images, videos = ([part.grid for part in parts if part.kind == kind] for kind in ("image", "video"))
    positions = rope.prompt(tokens, images, videos, model.config)
    hidden = model.embed(tokens, torch.cat([part.visual for part in parts]))
    room = len(ids) + at_most if model.config.text.window is None else None
    memory: Memory | None = model.empty_memory(capacity=room)
    for start in range(0, len(ids), CHUNK):
        chunk = slice(start, start + CHUNK)
        after, memory = model(hidden[:, chunk], positions[:, :, chunk], memory)
    assert memory is not None
    return after[:, -1], memory


def _is_picture(source: str) -> bool:
    return Path(source).suffix.lower() in PICTURES and not any(mark in source for mark in "*?[")


def _picture(model: Model, source: str) -> Part:
    with frames(source) as opened:
        pixels = _tensor(model, next(opened))
    size = _fitted(source, fit, *pixels.shape[1:3], model.processor.config)
    patches, grid = patchify(resize(pixels, size), model.processor.config, pair=False)
    return Part("image", _looked(model, patches, grid), rope.Grid(1, *grid))


def _recording(model: Model, source: str, rate: float, problems: list[str]) -> Part:
    """Frames are held at the size that a single one would have; only a long recording is then shrunk further."""
    config = model.processor.config
    held: list[Tensor] = []
    with frames(source, fps=rate) as opened:
        if opened.live:
            raise VideoError(f"{opened.name}: it has no end to wait for; use: infinitevl watch {source}")
        for frame in _decoded(opened, problems):
            pixels = _tensor(model, frame)
            if not held:
                shape = pixels.shape[1], pixels.shape[2]
                largest = _fitted(source, fit_video, 1, *shape, config)
            held.append(resize(pixels, largest))
    size = fit_video(len(held), *shape, config)
    patches, grid = patchify(resize(torch.cat(held), size), config, pair=True)
    seconds = config.temporal_patch_size / rate
    return Part("video", _looked(model, patches, grid), rope.Grid(len(patches), *grid, seconds))


def _decoded(opened: Source, problems: list[str]) -> Iterator[Frame]:
    """The frames that decode; what breaks off after them is noted. VideoError where there are none, or too many."""
    count = 0
    try:
        for frame in opened:
            count += 1
            if count > FRAMES:
                break
            yield frame
    except VideoError as error:
        if not count:
            raise
        problems.append(str(error))
    if count > FRAMES:
        raise VideoError(f"{opened.name}: more than {FRAMES} frames; use a lower --fps, or: infinitevl watch")


def _tensor(model: Model, frame: Frame) -> Tensor:
    """uint8 [1, H, W, 3] on the model's device."""
    return torch.from_numpy(np.ascontiguousarray(frame.pixels)).to(model.device)[None]


def _fitted(source: str, rule: Callable[..., Size], *of: Any) -> Size:
    """The size by a rule; where the shape cannot be fitted, a VideoError that names the source."""
    try:
        return rule(*of)
    except ValueError as error:
        raise VideoError(f"{source}: {error}") from error


def _looked(model: Model, patches: Tensor, grid: Size) -> Tensor:
    """Patches [G, P, 1176] -> visual tokens [G * P / 4, D], some grids at a time."""
    seen = [model.vision(part, *grid) for part in patches.split(GRIDS)]
    return torch.cat(seen).flatten(0, 1)
