"""Frame(time, uint8) -> `processor.patchify` -> patches [G, P, 1176] -> `vision`; chat -> ids, ids -> text.

Pictures: the size rules (`fit`, `fit_frame`, `fit_video`), `resize`, `patchify`. Words: `Chat`, a checkpoint's own chat
format cut into the ids around what is shown and what is asked, and the time stamps. A `Processor` holds both.
Letters: F frames, G temporal grids, P patches of one grid, h and w sides in pixels.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infinitevl.config import ConfigError, ProcessorConfig

Ids = tuple[int, ...]
Size = tuple[int, int]

# Qwen2.5-VL's chat format, for a tokenizer without a template of its own.
QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type in ('image', 'image_url') or 'image' in part %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part.type == 'video' or 'video' in part %}"
    "{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}

_QUESTION, _ANSWER = "what is this?", "a test."  # stand in for the words of a conversation while its format is cut
_ASPECT = 200  # longest side over shortest that Qwen's size rule accepts
_VIDEO_TOKENS = 128_000  # context that Qwen's video rule plans for; nine tenths of it are for pictures
_SETTINGS = "preprocessor_config.json"
# Keys of a foreign preprocessor_config.json that name what we always do: any other value cannot be followed.
_FIXED: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "do_center_crop": False,
    "do_pad": False,
    "resample": 3,  # bicubic
    "rescale_factor": 1 / 255,
}
# Keys that say nothing about pixels here.
_IGNORED = {
    *("processor_class", "image_processor_type", "video_processor_type", "feature_extractor_type", "auto_map"),
    *("default_to_square", "crop_size", "pad_size", "data_format", "input_data_format", "return_tensors", "device"),
    *("disable_grouping", "do_sample_frames", "fps", "num_frames", "min_frames", "max_frames", "return_metadata"),
    *("video_metadata", "cap_pixels_per_frame", "max_video_tokens", "size_divisor", "use_token_compression"),
}


# -- sizes ------------------------------------------------------------------------------------------------------------


def _check_picture(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"a picture of {height}x{width} pixels has nothing to see; both sides must be at least 1")
    if max(height, width) > _ASPECT * min(height, width):
        raise ValueError(f"a picture of {height}x{width} pixels is too long: one side may be {_ASPECT} times the other")


def _fit(height: int, width: int, stride: int, min_pixels: int, max_pixels: int) -> Size:
    """Sides to the nearest multiple of `stride`; where the area leaves its limits, both scaled and rounded inwards."""
    _check_picture(height, width)
    rows, columns = round(height / stride), round(width / stride)
    area = rows * columns * stride**2
    if area > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / stride)) for side in (height, width))
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / stride) for side in (height, width))
    return rows * stride, columns * stride


def fit(height: int, width: int, config: ProcessorConfig) -> Size:
    """Size in pixels at which an image of `height` x `width` is seen: Qwen2-VL's rule.

    Sides are multiples of patch_size * merge_size, their product lies in [min_pixels, max_pixels] wherever whole
    multiples allow it, the shape is kept. ValueError for an empty picture or one side over 200 times the other.
    """
    return _fit(height, width, config.patch_size * config.merge_size, config.min_pixels, config.max_pixels)


def fit_video(frames: int, height: int, width: int, config: ProcessorConfig) -> Size:
    """Size in pixels of each of `frames` frames of a video file, by Qwen2-VL's rule for videos.

    As `fit`, and the video as a whole stays under 115,200 visual tokens: a frame's max_pixels is cut to its even share
    of them, but not below 1.05 * min_pixels. ValueError as for `fit`, or for no frames.
    """
    if frames < 1:
        raise ValueError(f"a video needs at least one frame, got {frames}")
    stride = config.patch_size * config.merge_size
    budget = int(_VIDEO_TOKENS * stride * stride * 0.9)
    share = min(config.max_pixels, budget * config.temporal_patch_size // frames)
    return _fit(height, width, stride, config.min_pixels, max(share, int(config.min_pixels * 1.05)))


def fit_frame(height: int, width: int, config: ProcessorConfig) -> Size:
    """Size in pixels at which a stream's frames are seen: the largest inside the box `frame_pixels` of their shape.

    Sides are the nearest multiples of patch_size * merge_size, at least one and never outside the box. ValueError as
    for `fit`; ConfigError for a box without room for one visual token.
    """
    _check_picture(height, width)
    stride = config.patch_size * config.merge_size
    rows, columns = (side // stride for side in config.frame_pixels)
    if rows < 1 or columns < 1:
        raise ConfigError(f"frame_pixels {config.frame_pixels} has no room for one token of {stride}x{stride} pixels")
    scale = min(rows / height, columns / width)
    best = min(rows, max(1, round(height * scale))), min(columns, max(1, round(width * scale)))
    return best[0] * stride, best[1] * stride


# -- pixels -----------------------------------------------------------------------------------------------------------


def resize(pixels: Tensor, size: Size) -> Tensor:
    """uint8 [F, H, W, 3] -> uint8 [F, *size, 3], bicubic with antialiasing; the same tensor where the size is right.

    One side after the other and 8 bits between, as Pillow does: within 2 levels of it on any picture and device. (In
    one pass of floats, overshoot at hard edges is cut later, which moves noise by up to 25 levels.)
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise ValueError(f"pixels must be uint8 [frames, height, width, 3], got {pixels.dtype} {list(pixels.shape)}")
    if tuple(pixels.shape[1:3]) == tuple(size):
        return pixels
    planes = pixels.permute(0, 3, 1, 2)
    for step in _steps((pixels.shape[1], pixels.shape[2]), size):
        planes = _scale(planes, step)
    return planes.permute(0, 2, 3, 1)


def _steps(now: Size, size: Size) -> list[Size]:
    """The sizes on the way from `now` to `size`: the width first, but where the height loses more than twice as many
    pixels as the width, the height. Pillow 13 orders them so; older ones and torchvision take the width first."""
    height_first = now[0] - size[0] > max(0, 2 * (now[1] - size[1]))
    middle = (size[0], now[1]) if height_first else (now[0], size[1])
    return [step for step, last in ((middle, now), (size, middle)) if step != last]


def _scale(planes: Tensor, size: Size) -> Tensor:
    """uint8 [F, 3, h, w] -> uint8 [F, 3, *size]. Only the CPU scales bytes as they are."""
    if planes.device.type != "cpu":
        return _scale_floats(planes, size)
    return F.interpolate(planes, size=size, mode="bicubic", antialias=True)


def _scale_floats(planes: Tensor, size: Size) -> Tensor:
    """As `_scale`, through float32, rounded and clamped: within one level of it."""
    scaled = F.interpolate(planes.float(), size=size, mode="bicubic", antialias=True)
    return scaled.round_().clamp_(0, 255).to(torch.uint8)


def patchify(pixels: Tensor, config: ProcessorConfig, *, pair: bool) -> tuple[Tensor, Size]:
    """uint8 [F, h, w, 3] -> float32 patches [G, P, 3 * temporal * patch * patch] and their grid (h, w in patches).

    Patches come in merge order (2x2 groups, row by row), each flattened channel, time, row, column, normalised by the
    config's mean and deviation. pair=False: every picture fills both temporal slots, G = F. pair=True: neighbouring
    frames share a grid, an odd last one is repeated, G = ceil(F / 2). Shapes depend on shapes only. ValueError where
    a side is not a multiple of patch_size * merge_size: `resize` first.
    """
    frames, height, width, _ = pixels.shape
    patch, merge, slots = config.patch_size, config.merge_size, config.temporal_patch_size
    if height % (patch * merge) or width % (patch * merge) or not frames:
        raise ValueError(f"cannot cut {frames} frames of {height}x{width}: sides must be multiples of {patch * merge}")
    planes = _normalise(pixels, config)
    if pair:
        planes = torch.cat([planes, planes[-1:].expand(-frames % slots, -1, -1, -1)])
        planes = planes.reshape(-1, slots, *planes.shape[1:])
    else:
        planes = planes[:, None].expand(-1, slots, -1, -1, -1)
    grid = height // patch, width // patch
    cut = planes.reshape(-1, slots, 3, grid[0] // merge, merge, patch, grid[1] // merge, merge, patch)
    # grid, slot, channel, group row, row in group, y, group column, column in group, x
    cut = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return cut.reshape(cut.shape[0], grid[0] * grid[1], 3 * slots * patch * patch), grid


def _normalise(pixels: Tensor, config: ProcessorConfig) -> Tensor:
    """uint8 [F, h, w, 3] -> float32 [F, 3, h, w]. Mean and deviation enter as numbers: a constant tensor would be a
    copy from the host, which a CUDA graph under capture refuses."""
    channels = (pixels.to(torch.float32) / 255).unbind(-1)
    scaled = zip(channels, config.image_mean, config.image_std, strict=True)
    return torch.stack([(channel - mean) / deviation for channel, mean, deviation in scaled], dim=1)


# -- words ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """How one image or video stands in a prompt: ids that open it, the id that stands for each visual token, ids that
    close it."""

    opening: Ids
    pad: int
    closing: Ids


@dataclass(frozen=True)
class Chat:
    """A checkpoint's chat format, cut into ids: before, then parts, then the question, then after.

    before: system turn and start of the user's turn; after: end of that turn and start of the answer; again: what
    stands between an answer's end-of-turn and the next words of the user. What users type is always plain text: a
    control token spelled out in a question stays spelled out. Safe to use from several threads.
    """

    tokenizer: Any
    before: Ids
    after: Ids
    again: Ids
    image: Part
    video: Part

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> Chat:
        """Renders the tokenizer's own template (Qwen2.5-VL's where it has none) around placeholders and cuts there.

        ConfigError where the template does not simply put parts, question and turns one after the other.
        """
        before, after = _cut(_render(tokenizer, []), _QUESTION)
        chat = cls(
            tokenizer=tokenizer,
            before=_control_ids(tokenizer, before),
            after=_control_ids(tokenizer, after),
            again=_again(tokenizer, before, after),
            image=_part(tokenizer, "image", before, after),
            video=_part(tokenizer, "video", before, after),
        )
        whole = _control_ids(tokenizer, _render(tokenizer, ["image", "video"]))
        if chat.one_shot([("image", 1), ("video", 1)], _QUESTION) != whole:
            raise ConfigError("the chat template does not put image, video and question one after the other")
        return chat

    @property
    def head(self) -> Ids:
        """What a memory is fed before the first frame of a stream."""
        return self.before + self.video.opening

    @property
    def reopen(self) -> Ids:
        """What follows the end-of-turn of an answer that is kept, so that the next frame is again inside a video."""
        return self.again + self.video.opening

    def tail(self, question: str) -> Ids:
        """What the clone that answers is fed after the last frame: the video's end, the question, an answer's start."""
        return self.video.closing + self.plain(question) + self.after

    def one_shot(self, parts: list[tuple[str, int]], question: str) -> Ids:
        """A whole prompt: each part ("image" or "video", its number of visual tokens) as pads, then the question."""
        ids = self.before
        for kind, tokens in parts:
            if kind not in PADS or tokens < 1:
                raise ValueError(f"a part is 'image' or 'video' with at least one token, got {kind!r} with {tokens}")
            part = self.image if kind == "image" else self.video
            ids += part.opening + (part.pad,) * tokens + part.closing
        return ids + self.plain(question) + self.after

    def plain(self, text: str) -> Ids:
        """Ids of text as text. Always with the same setting: the tokenizer then never changes under another thread."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


def _render(tokenizer: Any, parts: list[str], *then: str) -> str:
    """The template's text for one question about `parts`, and then an answer and another question where given."""
    content = [{"type": kind} for kind in parts] + [{"type": "text", "text": _QUESTION}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    for role, text in zip(("assistant", "user"), then, strict=False):
        messages.append({"role": role, "content": [{"type": "text", "text": text}]})
    template = tokenizer.chat_template or QWEN_TEMPLATE
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program of its own and can fail in any way
        raise ConfigError(f"the chat template cannot be rendered: {_line(error)}") from error


def _cut(text: str, mark: str) -> tuple[str, str]:
    """What is before and after the only `mark` in a rendered text."""
    if text.count(mark) != 1:
        raise ConfigError(f"the chat template shows {mark!r} {text.count(mark)} times instead of once")
    before, _, after = text.partition(mark)
    return before, after


def _between(text: str, before: str, after: str) -> str:
    if not (text.startswith(before) and text.endswith(after)):
        raise ConfigError("the chat template changes what stands around a part, an answer or a question")
    return text[len(before) : len(text) - len(after)]


def _part(tokenizer: Any, kind: str, before: str, after: str) -> Part:
    pad = tokenizer.convert_tokens_to_ids(PADS[kind])
    if pad is None or pad == tokenizer.unk_token_id:
        raise ConfigError(f"the tokenizer has no token {PADS[kind]}")
    opening, closing = _cut(_between(_render(tokenizer, [kind]), before, _QUESTION + after), PADS[kind])
    return Part(_control_ids(tokenizer, opening), pad, _control_ids(tokenizer, closing))


def _again(tokenizer: Any, before: str, after: str) -> Ids:
    """The ids between an answer's end-of-turn and the next words of the user."""
    text = _render(tokenizer, [], _ANSWER, _QUESTION)
    ids = _control_ids(tokenizer, _between(text, before + _QUESTION + after + _ANSWER, _QUESTION + after))
    if not ids or ids[0] not in tokenizer.added_tokens_decoder:
        raise ConfigError("the chat template does not end an answer with an end-of-turn token")
    return ids[1:]


def _control_ids(tokenizer: Any, text: str) -> Ids:
    """Ids of the template's own text, in which control tokens mean themselves."""
    return tuple(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False))


def stamp(seconds: float) -> str:
    """A time of the stream as it is written between frames: minutes and whole seconds, "0:42", "61:07"."""
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"a time stamp needs a time of 0 or more seconds, got {seconds}")
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@dataclass(frozen=True)
class Processor:
    """What turns pictures and words into what a checkpoint was trained on: its settings, tokenizer and chat format."""

    config: ProcessorConfig
    tokenizer: Any
    chat: Chat

    def stamp_due(self, last: float | None, now: float) -> float | None:
        """The latest multiple of stamp_seconds in (last, now], in seconds; None where there is none or no stamps are
        used. last: time of the frame before, None before the first frame, which is always stamped."""
        every = self.config.stamp_seconds
        if every is None:
            return None
        count = math.floor(now / every)
        return count * every if last is None or count > math.floor(last / every) else None

    def stamp_ids(self, seconds: float) -> Ids:
        """What is fed between two frames of a stream: the video closes, "m:ss", the video opens again."""
        return self.chat.video.closing + self.ids(stamp(seconds)) + self.chat.video.opening

    def ids(self, text: str) -> Ids:
        """Ids of plain text; control tokens spelled out in it stay text."""
        return self.chat.plain(text)

    def text(self, ids: Iterable[int]) -> str:
        """The text that ids spell, control tokens left out; an incomplete UTF-8 character becomes U+FFFD."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


# -- files ------------------------------------------------------------------------------------------------------------


def load_processor(folder: Path) -> Processor:
    """The processor of a checkpoint's folder: tokenizer files, chat template and preprocessor_config.json.

    Reads that folder only, never the network. ConfigError names what is missing or cannot be followed.
    """
    from transformers import AutoTokenizer, PreTrainedConfig

    config = _read_settings(folder / _SETTINGS)
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise ConfigError(f"{folder} has no tokenizer.json: copy the checkpoint's tokenizer files there")
    try:
        # Without leave, or transformers would stop to ask for it where the folder names code of its own; with an empty
        # config, or it would read the folder's and complain about a model that is not its own.
        tokenizer = AutoTokenizer.from_pretrained(folder, config=PreTrainedConfig(), trust_remote_code=False)
    except Exception as error:  # its parsers raise bare Exceptions, KeyErrors and more
        raise ConfigError(f"the tokenizer files in {folder} cannot be read: {_line(error)}") from error
    apart = folder / "chat_template.json"  # where older checkpoints keep their processor's template, which wins
    if apart.is_file():
        tokenizer.chat_template = _read_json(apart).get("chat_template") or tokenizer.chat_template
    return Processor(config, tokenizer, Chat.from_tokenizer(tokenizer))


def save_processor(processor: Processor, folder: Path) -> None:
    """Writes tokenizer files and preprocessor_config.json into `folder`; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".processor-", dir=folder) as aside:
        processor.tokenizer.save_pretrained(aside)
        (Path(aside) / _SETTINGS).write_text(preprocessor_json(processor.config), encoding="utf-8")
        for written in sorted(Path(aside).iterdir()):
            os.replace(written, folder / written.name)


def preprocessor_json(config: ProcessorConfig) -> str:
    """The text of a preprocessor_config.json, in Qwen2-VL's keys and ours."""
    return json.dumps({"image_processor_type": "Qwen2VLImageProcessor", **asdict(config)}, indent=2) + "\n"


def _line(error: Exception) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} has no {path.name}: copy the checkpoint's file there") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {_line(error)}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def _read_settings(path: Path) -> ProcessorConfig:
    """preprocessor_config.json, Qwen2-VL's or ours; an unknown key or a value that cannot be followed is an error."""
    keys = _read_json(path)
    keys = {**_pixel_limits(keys.pop("size", None) or {}, path), **keys}
    known = {field.name for field in fields(ProcessorConfig)}
    values: dict[str, Any] = {}
    for key, value in keys.items():
        if key in known:
            values[key] = tuple(value) if isinstance(value, list) else value
        elif key in _FIXED and value not in (None, _FIXED[key]):
            raise ConfigError(f"{path}: {key} is {value!r}; only {_FIXED[key]!r} is supported")
        elif key not in _FIXED and key not in _IGNORED:
            raise ConfigError(f"{path}: unknown key {key!r}")
    _check_values(values, path)
    config = ProcessorConfig(**values)
    if config.min_pixels > config.max_pixels:
        raise ConfigError(f"{path}: min_pixels {config.min_pixels} exceeds max_pixels {config.max_pixels}")
    return config


def _pixel_limits(size: dict[str, Any], path: Path) -> dict[str, Any]:
    """min_pixels and max_pixels from `size` in its two spellings."""
    names = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
    limits = {names.get(key, key): value for key, value in size.items()}
    unknown = sorted(set(limits) - set(names.values()))
    if unknown:
        raise ConfigError(f"{path}: unknown key {unknown[0]!r} in size")
    return limits


def _check_values(values: dict[str, Any], path: Path) -> None:
    """Every number positive, tuples of the default's length; means may be anything, stamp_seconds may be null."""
    for key, value in values.items():
        default = getattr(ProcessorConfig(), key)
        numbers = value if isinstance(default, tuple) else (value,)
        wanted = len(default) if isinstance(default, tuple) else 1
        kind = (int, float) if key.endswith(("_mean", "_std", "_second", "_seconds")) else int
        good = isinstance(numbers, tuple) and len(numbers) == wanted
        good = good and all(isinstance(n, kind) and not isinstance(n, bool) for n in numbers)
        good = good and (key == "image_mean" or all(n > 0 for n in numbers))
        if not good and not (key == "stamp_seconds" and value is None):
            raise ConfigError(f"{path}: {key} cannot be {value!r}")
