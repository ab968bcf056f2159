"""A Qwen2.5-VL folder -> an InfiniteVL folder: most layers' softmax mixers give way to untrained delta mixers.

Vision encoder, embedding, norms, MLPs, head and the softmax layers that stay are the teacher's, bit for bit. One shard
is in memory at a time, whatever the size of the teacher. Letters: D hidden size, H query heads, G key/value heads,
K their dim and the delta mixers' key dim, V = 2K their value dim.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from infinitevl import weights
from infinitevl.config import DELTA, SOFTMAX, ModelConfig, TextConfig
from infinitevl.files import folder_written_aside, written_aside
from infinitevl.model import INIT_STD, Model
from infinitevl.processor import load_processor
from infinitevl.train.folders import can_be_made
from infinitevl.weights import CheckpointError, Stored

WINDOW = 8192  # tokens; of the published checkpoint
DT = 0.001  # with A = 1: a decay of 0.999 a token, a half-life of 693 tokens
SHARD_BYTES = 1 << 30
REPORT = "conversion.json"
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")
# what a checkpoint's folder holds besides weights and config; its weights' index and its model card are not among them
COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja", "generation_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    *LICENCES,
)


class ConvertError(ValueError):
    """A conversion that cannot be done as it was asked for."""


class Init(StrEnum):
    """Where the delta mixers' q, k, v and o come from: drawn at random as the reference does, or the teacher's."""

    reference = "reference"
    teacher = "teacher"


class Step(NamedTuple):
    """How one tensor comes about. what: copied, derived or new; source: the teacher's tensor it is made of."""

    what: str
    how: str
    source: str | None
    like: Tensor  # shape on disk and dtype, on the meta device
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Row:
    """One tensor that was written: its name on disk, and as in `Step`."""

    name: str
    what: str
    how: str
    source: str | None
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Report:
    """What a conversion did; `tensors` has a row for every tensor written. unused: tensors of the teacher not taken."""

    teacher: str
    out: str
    init: str
    seed: int
    config: TextConfig
    licences: tuple[str, ...]
    files: tuple[str, ...]
    tensors: tuple[Row, ...]
    unused: tuple[str, ...]

    def summary(self) -> str:
        """The short form, in lines."""
        text = self.config
        stay = [str(number) for number, mixer in enumerate(text.layers) if mixer == SOFTMAX]
        lines = [
            f"{self.out}: {self._sum()} parameters, from {self.teacher}",
            f"{len(text.layers)} layers: softmax in {', '.join(stay) or 'none'} (window {text.window} tokens), "
            f"delta elsewhere ({text.delta_heads} heads, {text.delta_key_dim} -> {text.delta_value_dim}, "
            f"init {self.init}, seed {self.seed})",
            *(f"{what}: {count} tensors, {self._sum(what)} parameters" for what, count in self._counts().items()),
            f"not taken: {len(self.unused)} of the teacher's tensors",
            f"licence: {self._licence()}",
            f"every tensor and where it comes from: {REPORT}",
        ]
        return "\n".join(lines)

    def _counts(self) -> Counter[str]:
        return Counter(row.what for row in self.tensors)

    def _sum(self, what: str | None = None) -> str:
        rows = [row for row in self.tensors if what in (None, row.what)]
        return f"{sum(math.prod(row.shape) for row in rows):,}"

    def _licence(self) -> str:
        if self.licences:
            return f"the teacher's holds for what is made from it; read {', '.join(self.licences)}"
        return "the teacher's folder has no licence file; its own holds for what is made from it, so look it up"


def convert(
    teacher: str | Path,
    out: str | Path,
    *,
    layers: Sequence[int] | None = None,
    init: Init = Init.reference,
    window: int = WINDOW,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> Report:
    """Make the checkpoint folder `out` of the Qwen2.5-VL in folder or hub id `teacher`.

    layers: numbers of those that stay softmax (None: every fourth from 0); window: tokens that they see; seed: of what
    is drawn. Raises ConvertError for layers that the teacher does not have, CheckpointError or ConfigError for a
    teacher that cannot be used, FileExistsError where `out` is there already, ConvertError where it cannot be made or
    lies in the teacher's folder; then nothing is written.
    """
    _check_out(Path(teacher).expanduser().resolve(), Path(out))
    with folder_written_aside(out) as aside:
        folder = weights.locate(teacher)
        found, tensors = _read(folder)
        config = student_config(found, every_fourth(found) if layers is None else layers, window)
        load_processor(folder)  # refuses, before any work, what `load` would refuse after it
        steps = dict(_steps(found, config, tensors, init, seed))
        weights.write_tensors(aside, {n: s.like for n, s in steps.items()}, lambda n: steps[n].make(), shard_bytes)
        weights.write_config(aside, config, tensors[weights.disk_name("norm.weight")].like.dtype)
        files = _companions(folder, aside)
        rows = tuple(_row(name, step) for name, step in steps.items())
        unused = sorted(set(tensors) - {step.source for step in steps.values()})
        report = Report(str(teacher), str(out), init, seed, config.text, _licences(files), files, rows, tuple(unused))
        with written_aside(aside / REPORT) as file:
            file.write_text(json.dumps(asdict(report), indent=1) + "\n")
    return report


def _check_out(teacher: Path, out: Path) -> None:
    """Refuses, before any work, a folder that cannot be made, and one in the teacher's own, which stays as it is."""
    if teacher.is_dir() and teacher in out.resolve().parents:
        raise ConvertError(f"{out}: lies in the teacher's folder; give a folder outside of it")
    if not can_be_made(out.absolute().parent):
        raise ConvertError(f"{out}: nothing can be written there; give a folder that can be made")


def every_fourth(teacher: ModelConfig) -> range:
    """The layers that stay softmax where none are named: 0, 4, 8, ..."""
    return range(0, len(teacher.text.layers), 4)


def student_config(teacher: ModelConfig, layers: Sequence[int], window: int | None = WINDOW) -> ModelConfig:
    """The teacher's config with softmax in `layers` and delta mixers elsewhere: as many heads as the teacher has query
    heads, key dim its head dim, value dim twice that. Of Qwen2.5-VL-3B it is `infinitevl_4b()`."""
    text, last = teacher.text, len(teacher.text.layers) - 1
    if wrong := [number for number in layers if not 0 <= number <= last]:
        raise ConvertError(f"layers: there is no layer {wrong[0]}; the teacher has layers 0 to {last}")
    if twice := [number for number, count in Counter(layers).items() if count > 1]:
        raise ConvertError(f"layers: {twice[0]} is named twice")
    changed = replace(
        text,
        layers=tuple(SOFTMAX if number in layers else DELTA for number in range(last + 1)),
        window=window,
        delta_heads=text.num_heads,
        delta_key_dim=text.head_dim,
        delta_value_dim=2 * text.head_dim,
    )
    return replace(teacher, text=changed)


# -- the teacher ------------------------------------------------------------------------------------------------------


def _read(folder: Path) -> tuple[ModelConfig, dict[str, Stored]]:
    """The config of a teacher, and its tensors, unread, by their names on disk; all there and of the right shapes."""
    config = weights.read_config(folder)
    if DELTA in config.text.layers:
        number = config.text.layers.index(DELTA)
        raise CheckpointError(f"{folder}: layer {number} is a delta layer; a teacher has softmax layers only")
    found = weights.stored(folder)
    weights.assign(_unfilled(config), {name: tensor.like for name, tensor in found.items()}, str(folder))
    return config, {weights.canonical(name): tensor for name, tensor in found.items()}


def _unfilled(config: ModelConfig) -> Model:
    with torch.device("meta"):
        return Model(config)


def _companions(folder: Path, out: Path) -> tuple[str, ...]:
    """Copies what is neither weights nor config; the names of what was there."""
    names = sorted({path.name for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()})
    for name in names:
        shutil.copyfile(folder / name, out / name)
    return tuple(names)


def _licences(files: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in files if any(Path(name).match(pattern) for pattern in LICENCES))


# -- tensors ----------------------------------------------------------------------------------------------------------


def _steps(
    teacher: ModelConfig, student: ModelConfig, tensors: Mapping[str, Stored], init: Init, seed: int
) -> Iterator[tuple[str, Step]]:
    """Each tensor of the student by its name on disk, in the order of the model."""
    for name, parameter in _unfilled(student).named_parameters():
        disk = weights.disk_name(name)
        shape = weights.disk_shape(name, parameter.shape, student)
        part = _delta_part(name, student.text)
        if part is None:
            source = tensors[disk]
            yield disk, Step("copied", "as it is", disk, source.like, source.read)
        elif init == Init.teacher and part in DERIVED:
            yield disk, _derived(part, disk, tensors[disk], shape, student.text)
        else:
            yield disk, _new(part, disk, parameter, shape, _dtype(name, parameter, tensors), seed)


def _delta_part(name: str, text: TextConfig) -> str | None:
    """What a parameter is in its delta mixer, such as "q.weight"; None for one that is in none."""
    words = name.split(".", 3)
    inside = words[0] == "blocks" and words[2] == "mixer" and text.layers[int(words[1])] == DELTA
    return words[3] if inside else None


def _dtype(name: str, parameter: Tensor, tensors: Mapping[str, Stored]) -> torch.dtype:
    """Of a new tensor: float32 where the mixer keeps it whatever the model's, else that of the layer's norm."""
    if name.endswith(("A_log", "dt_bias")):
        return parameter.dtype
    norm = ".".join([*name.split(".")[:2], "norm_mixer.weight"])
    return tensors[weights.disk_name(norm)].like.dtype


def _derived(part: str, disk: str, source: Stored, shape: tuple[int, ...], text: TextConfig) -> Step:
    how, function = DERIVED[part]
    like = torch.empty(shape, dtype=source.like.dtype, device="meta")
    return Step("derived", how, disk, like, lambda: function(source.read(), text).contiguous())


def _new(part: str, disk: str, parameter: Tensor, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Step:
    how, function = NEW[part]
    like = torch.empty(shape, dtype=dtype, device="meta")
    ours = parameter.shape
    return Step("new", how, None, like, lambda: function(ours, _generator(seed, disk)).to(dtype).reshape(shape))


def _generator(seed: int, name: str) -> torch.Generator:
    """One for each tensor, so that its numbers depend on nothing but the seed and its name."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def _keys(k: Tensor, text: TextConfig) -> Tensor:
    """[G*K, D] -> [H*K, D]: every key head repeated for the query heads that it serves."""
    heads = k.unflatten(0, (text.num_kv_heads, -1))
    return heads.repeat_interleave(text.num_heads // text.num_kv_heads, 0).flatten(0, 1)


def _values(v: Tensor, text: TextConfig) -> Tensor:
    """[G*K, D] -> [H*V, D]: as for keys, and both halves of a value are the teacher's."""
    heads = _keys(v, text).unflatten(0, (text.num_heads, -1))
    return torch.cat([heads, heads], dim=1).flatten(0, 1)


def _output(o: Tensor, text: TextConfig) -> Tensor:
    """[D, H*K] -> [D, H*V]: half of the teacher's for either half of a value, so that their sum is the teacher's."""
    heads = o.unflatten(1, (text.num_heads, -1)) / 2
    return torch.cat([heads, heads], dim=2).flatten(1)


def _normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.empty(shape).normal_(0, INIT_STD, generator=generator)


def _identity(shape: torch.Size, generator: torch.Generator) -> Tensor:
    taps = torch.zeros(shape)
    taps[:, -1] = 1
    return taps


def _filled(value: float) -> Callable[[torch.Size, torch.Generator], Tensor]:
    return lambda shape, _: torch.full(shape, value)


# part of a delta mixer -> words for the report, and the function
DERIVED: dict[str, tuple[str, Callable[[Tensor, TextConfig], Tensor]]] = {
    "q.weight": ("the teacher's q without its bias", lambda q, _: q),
    "k.weight": ("the teacher's k without its bias, each head repeated for its query heads", _keys),
    "v.weight": (
        "the teacher's v without its bias, each head repeated for its query heads and in both halves",
        _values,
    ),
    "o.weight": ("half of the teacher's o, for both halves of each head's value", _output),
}
_DRAWN = (f"normal, deviation {INIT_STD}", _normal)
_CONVOLUTION = ("identity: 1 on the last tap", _identity)
NEW: dict[str, tuple[str, Callable[[torch.Size, torch.Generator], Tensor]]] = {
    **{f"{name}.weight": _DRAWN for name in "qkvgo"},
    **{f"{name}_conv": _CONVOLUTION for name in "qkv"},
    "a.weight": ("0", _filled(0.0)),
    "b.weight": ("0: beta = 0.5", _filled(0.0)),
    "A_log": ("0: A = 1", _filled(0.0)),
    "dt_bias": (f"softplus(dt_bias) = {DT}", _filled(math.log(math.expm1(DT)))),
    "norm": ("1", _filled(1.0)),
}


def _row(name: str, step: Step) -> Row:
    dtype = str(step.like.dtype).removeprefix("torch.")
    return Row(name, step.what, step.how, step.source, tuple(step.like.shape), dtype)
