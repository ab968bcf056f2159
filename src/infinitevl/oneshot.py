"""Follow a frame: not a stream's but one of a whole prompt: pictures and recordings, then texts, then one question.

As Qwen2.5-VL is prompted: a picture is a grid of its own, a recording's frames share grids two by two. Pictures wait on
the host and are looked at right before the chunk that has their tokens: the device holds no more for a long prompt.
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
from infinitevl.config import ProcessorConfig
from infinitevl.generate import GREEDY, Sampling, decode
from infinitevl.memory import Memory
from infinitevl.model import Model
from infinitevl.processor import Size, fit, fit_video, patchify, resize
from infinitevl.stream import Answer
from infinitevl.video import PICTURES, Frame, Source, VideoError, frames

TEXTS = frozenset({".md", ".txt"})
CHUNK = 4096  # tokens of a prompt that go through the model at once
GRIDS = 16  # of a recording, that the vision encoder sees at once
HELD = 768  # frames of a recording that wait at their full size; where there are more, all are shrunk as it grows
FRAMES = 65_536  # of one recording, at most: 18 hours, one a second
Progress = Callable[[int, int], None]


class Part(NamedTuple):
    """A picture or a recording of a prompt ("image", "video"): its pictures, uint8 [1, h, w, 3] each and on the host,
    the size at which they are seen, their grid, and how many visual tokens it has."""

    kind: str
    pictures: list[Tensor]
    size: Size
    grid: rope.Grid
    tokens: int


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
    progress: Progress | None = None,
) -> Reply:
    """The answer to one question about pictures and recordings, in the order given, and about texts, which follow them.

    A source's name says what it is: a picture, a text (.txt, .md) or, with any other ending, a recording, sampled at
    `fps` (None: the checkpoint's rate). The prompt goes through a memory of its own in chunks; after each one
    progress(done, total) is called, with tokens. Raises VideoError for a source of which nothing can be decoded, that
    is live, or has more than 65,536 frames.
    """
    began = time.perf_counter()
    rate = model.processor.config.frames_per_second if fps is None else fps
    problems: list[str] = []
    texts = [_text(source) for source in sources if _ends_in(source, TEXTS)]
    parts = [
        _picture(model, source) if _ends_in(source, PICTURES) else _recording(model, source, rate, problems)
        for source in sources
        if not _ends_in(source, TEXTS)
    ]
    hidden, memory = prompt(model, parts, "\n\n".join([*texts, question]), at_most, progress)
    ids = list(decode(model, memory, hidden, at_most, sampling))
    answer = Answer(model.processor.text(ids).strip(), None, len(ids), time.perf_counter() - began)
    return Reply(answer, tuple(problems))


def prompt(
    model: Model, parts: Sequence[Part], question: str, at_most: int, progress: Progress | None = None
) -> tuple[Tensor, Memory]:
    """Hidden [1, D] of the last token of the whole prompt, and the memory after it, with room for an answer."""
    config = model.config
    ids = torch.tensor([model.processor.chat.one_shot([(part.kind, part.tokens) for part in parts], question)])
    images, videos = ([part.grid for part in parts if part.kind == kind] for kind in ("image", "video"))
    positions = rope.prompt(ids, images, videos, config)
    visual = (ids == config.image_token) | (ids == config.video_token)
    total = ids.shape[1]
    memory: Memory | None = model.empty_memory(capacity=total + at_most if config.text.window is None else None)
    pieces = _looked(model, parts)
    left = torch.empty(0, config.text.hidden_size, device=model.device, dtype=model.dtype)
    for start in range(0, total, CHUNK):
        chunk = slice(start, start + CHUNK)
        count = int(visual[:, chunk].sum())
        while len(left) < count:
            left = torch.cat([left, next(pieces)])
        hidden = model.embed(ids[:, chunk].to(model.device), left[:count])
        left = left[count:]
        after, memory = model(hidden, positions[:, :, chunk].to(model.device), memory)
        if progress is not None:
            progress(min(start + CHUNK, total), total)
    assert memory is not None
    return after[:, -1], memory


def _looked(model: Model, parts: Sequence[Part]) -> Iterator[Tensor]:
    """The visual tokens [N, D] of all parts in order, some grids at a time."""
    config = model.processor.config
    for part in parts:
        at_once = GRIDS * config.temporal_patch_size
        for start in range(0, len(part.pictures), at_once):
            pixels = torch.cat(part.pictures[start : start + at_once]).to(model.device)
            patches, grid = patchify(resize(pixels, part.size), config, pair=part.kind == "video")
            yield model.vision(patches, *grid).flatten(0, 1)


def _ends_in(source: str, endings: frozenset[str]) -> bool:
    return Path(source).suffix.lower() in endings and not any(mark in source for mark in "*?[")


def _text(source: str) -> str:
    """What a text file says. VideoError, as for any other source, where it says nothing or cannot be read."""
    try:
        text = Path(source).read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise VideoError(f"{source}: not a text in UTF-8") from None
    except OSError as error:
        raise VideoError(f"{source}: {error.strerror}") from None
    if not text:
        raise VideoError(f"{source}: nothing is written in it")
    return text


def _picture(model: Model, source: str) -> Part:
    config = model.processor.config
    with frames(source) as opened:
        pixels = _tensor(model, next(opened))
    size = _fitted(source, fit, *pixels.shape[1:3], config)
    return _part("image", [resize(pixels, size).cpu()], size, 1, 0.0, config)


def _recording(model: Model, source: str, rate: float, problems: list[str]) -> Part:
    """Frames are held at the size that a single one would have, and shrunk when there are 768, 1,536, 3,072, ...: never
    below what their number asks for in the end, and never much more than the rule for videos has room for."""
    config = model.processor.config
    held: list[Tensor] = []
    with frames(source, fps=rate) as opened:
        if opened.live:
            raise VideoError(f"{opened.name}: it has no end to wait for; use: infinitevl watch {source}")
        for frame in _decoded(opened, problems):
            pixels = _tensor(model, frame)
            if not held:
                shape, full = (pixels.shape[1], pixels.shape[2]), HELD
                largest = _fitted(source, fit_video, 1, *shape, config)
            held.append(resize(pixels, largest).cpu())
            if len(held) == full:
                largest, full = fit_video(full, *shape, config), 2 * full
                held = [resize(each, largest) for each in held]
    size = fit_video(len(held), *shape, config)
    slots = config.temporal_patch_size
    return _part("video", held, size, -(-len(held) // slots), slots / rate, config)


def _part(kind: str, pictures: list[Tensor], size: Size, grids: int, seconds: float, config: ProcessorConfig) -> Part:
    grid = rope.Grid(grids, size[0] // config.patch_size, size[1] // config.patch_size, seconds)
    return Part(kind, pictures, size, grid, grid.time * grid.rows * grid.columns // config.merge_size**2)


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
