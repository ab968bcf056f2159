"""Files that users have: LLaMA-Factory and ShareGPT conversations with pictures and videos -> samples.

A record is {"messages": [{"role", "content"}]} or {"conversations": [{"from", "value"}]}, with "images" and "videos"
beside it for the marks <image> and <video> in the users' words. Answers are learned, all of them, each to its end.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from infinitevl import rope
from infinitevl.config import ModelConfig
from infinitevl.processor import QWEN_TEMPLATE, Ids, Processor, fit, fit_video, resize
from infinitevl.train.data import BrokenSample, DataError, Pictures, Sample, Source
from infinitevl.train.losses import IGNORED
from infinitevl.train.recipes import Recipe
from infinitevl.video import frames

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
MARKS = {"<image>": "image", "<video>": "video"}
_SYSTEM, _USER = "be kind.", "what is this?"  # stand in for words while the format of a system's turn is cut


class Turn(NamedTuple):
    """What one side says; role "system", "user" or "assistant"."""

    role: str
    text: str


class Shown(NamedTuple):
    """A picture or video of a prompt: its kind ("image", "video"), frames, and grid of patches."""

    kind: str
    pictures: Pictures
    grid: rope.Grid


# Records


def turns_of(record: Any) -> list[Turn]:
    """The turns of a record: perhaps a system's, then user and assistant by turns. BrokenSample where it is not so."""
    if not isinstance(record, dict):
        raise BrokenSample(f"a record is a table of keys, not a {type(record).__name__}")
    role, text = ("role", "content") if "messages" in record else ("from", "value")
    listed = record.get("messages", record.get("conversations"))
    if not isinstance(listed, list) or not listed:
        raise BrokenSample("no messages")
    turns = [_turn(each, role, text) for each in listed]
    if turns[0].role != "system" and isinstance(record.get("system"), str) and record["system"]:
        turns.insert(0, Turn("system", record["system"]))
    spoken = [turn.role for turn in turns][turns[0].role == "system" :]
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        order = ", ".join(turn.role for turn in turns[:6])
        raise BrokenSample(f"a system first or none, then user and assistant by turns; here: {order}")
    return turns


def _turn(message: Any, role: str, text: str) -> Turn:
    if not isinstance(message, dict) or not isinstance(message.get(text), str):
        raise BrokenSample(f"a message needs {role!r} and {text!r}, the latter a text")
    if message.get(role) not in ROLES:
        raise BrokenSample(f"{role} is {message.get(role)!r}; known are {', '.join(ROLES)}")
    return Turn(ROLES[message[role]], message[text])


def media_of(record: dict[str, Any], kind: str) -> list[Any]:
    """The pictures ("image") or videos ("video") of a record."""
    given = record.get(f"{kind}s", record.get(kind))
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


def pieces(text: str) -> list[str]:
    """A user's words cut at the marks, which are pieces of their own."""
    found = [text]
    for mark in MARKS:
        found = [cut for piece in found for cut in _cut(piece, mark)]
    return [piece for piece in found if piece]


def _cut(text: str, mark: str) -> list[str]:
    if text in MARKS:
        return [text]
    parts = text.split(mark)
    return [piece for number, part in enumerate(parts) for piece in ([mark, part] if number else [part])]


# Pictures


def load_image(given: Any, folder: Path, processor: Processor, max_pixels: int) -> Shown:
    """A picture of a record: a file's name, bytes, or a PIL image, as large as the recipe allows."""
    pixels = torch.from_numpy(np.array(_opened(given, folder)))[None]
    config = replace(processor.config, max_pixels=max_pixels, min_pixels=min(processor.config.min_pixels, max_pixels))
    size = fit(pixels.shape[1], pixels.shape[2], config)
    return _shown("image", resize(pixels, size), config.patch_size, config.merge_size, 0.0)


def _opened(given: Any, folder: Path) -> Image.Image:
    """The picture, upright and in RGB; its file is closed."""
    if isinstance(given, Image.Image):
        return given.convert("RGB")
    if isinstance(given, dict):  # as HF datasets stores one that is not decoded
        given = io.BytesIO(given["bytes"]) if given.get("bytes") else given.get("path")
    if not isinstance(given, (str, io.BytesIO)):
        raise BrokenSample(f"a picture is a file's name or bytes, not a {type(given).__name__}")
    with Image.open(folder / given if isinstance(given, str) else given) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def load_video(given: Any, folder: Path, processor: Processor, recipe: Recipe) -> Shown:
    """A video of a record, at the recipe's rate or as much slower as its greatest number of frames asks."""
    if not isinstance(given, str):
        raise BrokenSample(f"a video is a file's name, not a {type(given).__name__}")
    path = str(folder / given)
    with frames(path) as opened:
        duration = opened.duration
    rate = min(recipe.fps, recipe.max_frames / duration) if duration else recipe.fps
    config = replace(
        processor.config,
        max_pixels=recipe.max_pixels,
        min_pixels=min(processor.config.min_pixels, recipe.max_pixels),
    )
    held: list[Tensor] = []
    with frames(path, fps=rate) as opened:
        for frame in opened:
            pixels = torch.from_numpy(np.ascontiguousarray(frame.pixels))[None]
            held.append(resize(pixels, fit_video(1, pixels.shape[1], pixels.shape[2], config)))
            if len(held) == recipe.max_frames:
                break
    size = fit_video(len(held), held[0].shape[1], held[0].shape[2], config)
    pixels = resize(torch.cat(held), size)
    slots = config.temporal_patch_size
    pixels = torch.cat([pixels, pixels[-1:].expand(-len(pixels) % slots, -1, -1, -1)])
    return _shown("video", pixels, config.patch_size, config.merge_size, slots / rate, slots)


def _shown(kind: str, pixels: Tensor, patch: int, merge: int, seconds: float, slots: int = 1) -> Shown:
    height, width = pixels.shape[1], pixels.shape[2]
    grid = rope.Grid(len(pixels) // slots, height // patch, width // patch, seconds)
    tokens = grid.time * grid.rows * grid.columns // merge**2
    return Shown(kind, Pictures(pixels, None, (height, width), kind == "video", tokens), grid)


# Samples


@dataclass(frozen=True)
class Reader:
    """Records -> samples of a checkpoint: its chat format, sizes and positions."""

    processor: Processor
    config: ModelConfig
    recipe: Recipe
    folder: Path

    def sample(self, record: Any) -> Sample:
        """The sample of a record. BrokenSample says what is wrong with one that cannot be used."""
        turns = turns_of(record)
        shown = {kind: [self._load(kind, each) for each in media_of(record, kind)] for kind in MARKS.values()}
        ids, learned, order = self._spelled(turns, shown)
        labels = [after if learns else IGNORED for after, learns in zip(ids[1:], learned[1:], strict=True)]
        tokens = torch.tensor(ids)
        images, videos = ([each.grid for each in order if each.kind == kind] for kind in ("image", "video"))
        positions = rope.prompt(tokens[None], images, videos, self.config)[:, 0]
        return Sample(tokens, torch.tensor([*labels, IGNORED]), positions, tuple(each.pictures for each in order))

    def _load(self, kind: str, given: Any) -> Shown:
        try:
            if kind == "image":
                return load_image(given, self.folder, self.processor, self.recipe.max_pixels)
            return load_video(given, self.folder, self.processor, self.recipe)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's and PyAV's words
            raise BrokenSample(f"{kind} {_short(given)}: {' '.join(str(error).split())}") from error

    def _spelled(self, turns: list[Turn], shown: dict[str, list[Shown]]) -> tuple[list[int], list[bool], list[Shown]]:
        """Ids, whether each is learned, and what is shown in the order of its marks."""
        chat = self.processor.chat
        first = turns[0].text if turns[0].role == "system" else None
        ids: list[int] = list(chat.before if first is None else with_system(self.processor, first))
        learned, order = [False] * len(ids), []
        left = {kind: list(each) for kind, each in shown.items()}
        spoken = [turn for turn in turns if turn.role != "system"]
        for number, turn in enumerate(spoken):
            if turn.role == "user":
                words, seen = self._words(turn.text, left)
                order += seen
                part = [*(chat.again if number else ()), *words, *chat.after]
            else:
                part = [*self.processor.ids(turn.text), chat.after[0]]  # after[0] ends a turn
            ids += part
            learned += [turn.role == "assistant"] * len(part)
        if over := {kind: len(each) for kind, each in left.items() if each}:
            raise BrokenSample(f"more {' and '.join(f'{kind}s' for kind in over)} than marks in the users' words")
        return ids, learned, order

    def _words(self, text: str, left: dict[str, list[Shown]]) -> tuple[list[int], list[Shown]]:
        ids: list[int] = []
        seen: list[Shown] = []
        for piece in pieces(text):
            if piece not in MARKS:
                ids += self.processor.ids(piece)
                continue
            kind = MARKS[piece]
            if not left[kind]:
                raise BrokenSample(f"more marks {piece} than {kind}s")
            seen.append(left[kind].pop(0))
            part = self.processor.chat.image if kind == "image" else self.processor.chat.video
            ids += [*part.opening, *(part.pad,) * seen[-1].pictures.tokens, *part.closing]
        return ids, seen


def with_system(processor: Processor, text: str) -> Ids:
    """What comes before a user's first words where the system says `text` instead of the template's own words."""
    tokenizer = processor.tokenizer
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
    rendered = tokenizer.apply_chat_template(
        messages, chat_template=tokenizer.chat_template or QWEN_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    before, system, rest = rendered.partition(_SYSTEM)
    between, user, _ = rest.partition(_USER)
    if not system or not user:
        raise BrokenSample("the chat template has no place for a system's words")
    control = partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=False)
    return (*control(before), *processor.ids(text), *control(between))


def _short(given: Any) -> str:
    return given if isinstance(given, str) else type(given).__name__


# Sources


@dataclass
class Records:
    """A source of records that are reached by number."""

    reader: Reader
    title: str
    count: int
    record: Callable[[int], Any]
    spelled: str = "{title}[{number}]"

    @property
    def size(self) -> int:
        return self.count

    def name(self, number: int) -> str:
        return self.spelled.format(title=self.title, number=number, line=number + 1)

    def sample(self, number: int) -> Sample:
        return self.reader.sample(self.record(number))


@dataclass
class Joined:
    """Several sources as one, one after the other; shuffling mixes them."""

    sources: Sequence[Records]

    @property
    def size(self) -> int:
        return sum(source.size for source in self.sources)

    def _of(self, number: int) -> tuple[Records, int]:
        for source in self.sources:
            if number < source.size:
                return source, number
            number -= source.size
        raise IndexError(number)

    def name(self, number: int) -> str:
        source, at = self._of(number)
        return source.name(at)

    def sample(self, number: int) -> Sample:
        source, at = self._of(number)
        return source.sample(at)


def open_files(recipe: Recipe, processor: Processor, config: ModelConfig) -> Source:
    """The source that `data` of a recipe names: files and HF datasets, with commas between."""
    opened = [_open(part.strip(), recipe, processor, config) for part in recipe.data.split(",") if part.strip()]
    if not opened:
        raise DataError("no data: say data=FILE.jsonl, data=FILE.json, data=hf:NAME or data=synth")
    for source in opened:
        if not source.size:
            raise DataError(f"{source.title}: there is no record in it")
    return opened[0] if len(opened) == 1 else Joined(opened)


def _open(where: str, recipe: Recipe, processor: Processor, config: ModelConfig) -> Records:
    if where.startswith("hf:"):
        return _from_hub(where, Reader(processor, config, recipe, Path(recipe.media)))
    path = Path(where).expanduser()
    reader = Reader(processor, config, recipe, Path(recipe.media) if recipe.media else path.parent)
    if not path.is_file():
        raise DataError(f"{where}: no such file (data is a .json or .jsonl file, hf:NAME, or synth)")
    if path.suffix == ".jsonl":
        lines = _lines(path)
        return Records(reader, path.name, len(lines), partial(_line_at, path, lines), "{title}:{line}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); a file with a record on each line is named .jsonl") from None
    if not isinstance(content, list):
        raise DataError(f"{where}: it must hold a list of records, not a {type(content).__name__}")
    return Records(reader, path.name, len(content), content.__getitem__)


def _lines(path: Path) -> np.ndarray:
    """Where each line of a file begins, in bytes; empty lines at the end do not count."""
    starts, at = [], 0
    with path.open("rb") as file:
        for line in file:
            starts.append(at)
            at += len(line)
            blank = not line.strip()
    while starts and blank:
        starts.pop()
        blank = False
    return np.array(starts, np.int64)


def _line_at(path: Path, starts: np.ndarray, number: int) -> Any:
    with path.open("rb") as file:
        file.seek(int(starts[number]))
        try:
            return json.loads(file.readline())
        except ValueError as error:
            raise BrokenSample(f"not JSON: {error}") from None


def _from_hub(where: str, reader: Reader) -> Records:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{where}: HF datasets is not installed: pip install 'infinitevl[data]'") from None
    _, name, *split = where.split(":")
    try:
        found = datasets.load_dataset(name, split=split[0] if split else "train")
    except Exception as error:  # its loaders raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{where}: it cannot be loaded: {reason}") from None
    return Records(reader, name, len(found), found.__getitem__)
