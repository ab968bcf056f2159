"""Checkpoints on disk: one table of names between ours and the published ones, strict in both directions.

On disk a checkpoint has the layout of Qwen2.5-VL (`visual.*`, `model.layers.N.*`); in the memory of other software it
is `model.visual.*`, `model.language_model.*`. Both are read; the first is written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from infinitevl.config import ConfigError, ModelConfig, config_from_json, config_to_json
from infinitevl.files import written_aside
from infinitevl.model import Model
from infinitevl.processor import load_processor, save_processor

DEFAULT = "tiny"
INDEX = "model.safetensors.index.json"
FINGERPRINT_BYTES = 4096

# ours -> on disk; {} stands for a block's number
_RENAMES = (
    (r"vision\.embed\.weight", "visual.patch_embed.proj.weight"),
    (r"vision\.blocks\.(\d+)\.attention\.(qkv|proj)\.(weight|bias)", r"visual.blocks.\1.attn.\2.\3"),
    (r"vision\.blocks\.(\d+)\.mlp\.(gate|up|down)\.(weight|bias)", r"visual.blocks.\1.mlp.\2_proj.\3"),
    (r"vision\.blocks\.(\d+)\.(norm[12])\.weight", r"visual.blocks.\1.\2.weight"),
    (r"vision\.merger\.norm\.weight", "visual.merger.ln_q.weight"),
    (r"vision\.merger\.up\.(weight|bias)", r"visual.merger.mlp.0.\1"),
    (r"vision\.merger\.down\.(weight|bias)", r"visual.merger.mlp.2.\1"),
    (r"embedding\.weight", "model.embed_tokens.weight"),
    (r"blocks\.(\d+)\.norm_mixer\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"blocks\.(\d+)\.norm_mlp\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"blocks\.(\d+)\.mlp\.(gate|up|down)\.weight", r"model.layers.\1.mlp.\2_proj.weight"),
    (r"blocks\.(\d+)\.mixer\.([qkvabgo])\.(weight|bias)", r"model.layers.\1.self_attn.\2_proj.\3"),
    (r"blocks\.(\d+)\.mixer\.([qkv])_conv", r"model.layers.\1.self_attn.\2_conv1d.weight"),
    (r"blocks\.(\d+)\.mixer\.norm", r"model.layers.\1.self_attn.o_norm.weight"),
    (r"blocks\.(\d+)\.mixer\.(A_log|dt_bias)", r"model.layers.\1.self_attn.\2"),
    (r"norm\.weight", "model.norm.weight"),
    (r"head\.weight", "lm_head.weight"),
)
_IN_MEMORY = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message lists everything that is wrong with it."""


def disk_name(name: str) -> str:
    """The published name of one of our parameters."""
    for pattern, replacement in _RENAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    raise KeyError(f"no published name for {name}")


def disk_shape(name: str, shape: torch.Size, config: ModelConfig) -> tuple[int, ...]:
    """The shape a parameter has on disk: there, patches and convolutions are not flattened."""
    vision = config.vision
    if name == "vision.embed.weight":
        return (shape[0], vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    if name.endswith("_conv"):
        return (shape[0], 1, shape[1])
    return tuple(shape)


def to_disk(model: Model) -> dict[str, Tensor]:
    """All parameters under their published names and shapes."""
    return {
        disk_name(name): p.detach().reshape(disk_shape(name, p.shape, model.config))
        for name, p in model.named_parameters()
    }


def assign(model: Model, tensors: Mapping[str, Tensor], source: str) -> None:
    """Make tensors in either published layout the model's parameters, as they are: nothing is copied.

    Raises CheckpointError listing all that differ; then the model is as it was.
    """
    found = {canonical(name): name for name in tensors}
    tied = model.head is None
    expected = {disk_name(name): name for name, _ in model.named_parameters()}
    extra = set(found) - set(expected) - ({"lm_head.weight"} if tied else set())
    problems = [f"missing {name}" for name in sorted(set(expected) - set(found))]
    problems += [f"unexpected {found[name]}" for name in sorted(extra)]
    problems += [f"{name} given twice" for name in sorted(set(tensors) - set(found.values()))]
    parameters = dict(model.named_parameters())
    for disk, ours in expected.items():
        if disk in found:
            shape = disk_shape(ours, parameters[ours].shape, model.config)
            if tuple(tensors[found[disk]].shape) != shape:
                problems.append(f"{found[disk]} has shape {tuple(tensors[found[disk]].shape)}, expected {shape}")
    if problems:
        raise CheckpointError(f"{source}: {len(problems)} tensors do not fit the config: " + "; ".join(problems))
    fitting = {ours: tensors[found[disk]].reshape(parameters[ours].shape) for disk, ours in expected.items()}
    exact = {name: tensor.float() for name, tensor in fitting.items() if name.endswith(("A_log", "dt_bias"))}
    model.load_state_dict(fitting | exact, assign=True)


def canonical(name: str) -> str:
    """A tensor's name as it stands on disk, whichever layout it came in."""
    for pattern, replacement in _IN_MEMORY:
        name = re.sub(pattern, replacement, name)
    return name


def load(
    where: str | Path = DEFAULT,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    fp8: bool = False,
) -> Model:
    """A model from a local folder, a hub id such as "hustvl/InfiniteVL", or "tiny", the checkpoint that comes along.

    dtype None: float32 on CPU, bfloat16 elsewhere. On CUDA weights are laid out for speed (`Model.fuse`). fp8: the
    products of all blocks by e4m3 weights, beside the others (`Model.to_fp8`). Raises CheckpointError, ConfigError or
    Fp8Error in one line.
    """
    folder = locate(where)
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with torch.device("meta"):
        model = Model(read_config(folder), load_processor(folder))
    assign(model, dict(_tensors(folder, device)), str(folder))
    model = model.to(device=device, dtype=dtype).eval()
    if device.type == "cuda":
        model.fuse()
    return model.to_fp8() if fp8 else model


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a checkpoint folder."""
    path = folder / "config.json"
    try:
        return config_from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        models = sorted(folder.glob("step-*/model"))
        hint = f"it is a run's; its newest checkpoint is {models[-1]}" if models else "is it a checkpoint folder?"
        raise CheckpointError(f"{folder}: no config.json there; {hint}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None


def locate(where: str | Path) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded (or found in the hub's cache)."""
    if where == DEFAULT:
        return Path(__file__).parent / "checkpoints" / DEFAULT
    folder = Path(where).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(where)):
        raise CheckpointError(f"{where}: no such folder, and not a hub id (owner/name)")
    return _download(str(where))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "LICENSE*"]))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0][:200]
        raise CheckpointError(
            f"{name}: the hub could not be reached and nothing is in its cache ({reason}); download the files "
            f"elsewhere and give their folder instead"
        ) from None


class Stored(NamedTuple):
    """A tensor of a checkpoint that is not read yet. like: its shape and dtype, on the meta device."""

    path: Path
    key: str
    like: Tensor

    def read(self) -> Tensor:
        """The tensor, on the CPU; its file stays mapped only as long as it lives."""
        with _opened(self.path, torch.device("cpu")) as file:
            return file.get_tensor(self.key)


def stored(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder by its name there, unread: constant memory for a checkpoint of any size.

    Raises CheckpointError for a file that is missing or damaged.
    """
    return {
        key: Stored(path, key, tensor.to("meta")) for path, key, tensor in _placed_tensors(folder, torch.device("cpu"))
    }


def _tensors(folder: Path, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a folder, from one file or from the shards its index names."""
    return ((key, tensor) for _, key, tensor in _placed_tensors(folder, device))


def _placed_tensors(folder: Path, device: torch.device) -> Iterator[tuple[Path, str, Tensor]]:
    """Every tensor of a folder with its file and its name there. On the CPU they are mapped, and read when used."""
    for name in _weight_files(folder):
        with _opened(folder / name, device) as file:
            yield from ((folder / name, key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118 (not a dict)


@contextmanager
def _opened(path: Path, device: torch.device) -> Iterator[Any]:
    if not path.exists():
        raise CheckpointError(f"{path}: weights are missing")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None


def _weight_files(folder: Path) -> list[str]:
    index = folder / INDEX
    if not index.exists():
        return ["model.safetensors"]
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of shards: {error!r}") from None


def save(model: Model, folder: str | Path, shard_bytes: int = 4 << 30) -> None:
    """Write config, weights (published layout, in shards of at most `shard_bytes`) and processor to a folder."""
    folder, processor = Path(folder), model.processor
    folder.mkdir(parents=True, exist_ok=True)
    tensors = to_disk(model)
    write_tensors(folder, tensors, lambda name: tensors[name].cpu().contiguous(), shard_bytes)
    write_config(folder, model.config, model.dtype)
    save_processor(processor, folder)


def write_tensors(
    folder: Path, like: Mapping[str, Tensor], tensor: Callable[[str], Tensor], shard_bytes: int = 4 << 30
) -> None:
    """Write tensors to a folder in shards of at most `shard_bytes` (a larger tensor has its own), with their index.

    like: tensors of the names, shapes and dtypes to write, meta ones will do; tensor: called for each name when its
    shard is written, so that no more than one shard is in memory.
    """
    shards = _shards(like, shard_bytes)
    names = _shard_names(len(shards))
    for name, keys in zip(names, shards, strict=True):
        with written_aside(folder / name) as aside:
            safetensors.torch.save_file({key: tensor(key) for key in keys}, aside, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        total = sum(like[key].nbytes for key in weight_map)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _remove_stale(folder, {*names, INDEX} if len(shards) > 1 else set(names))


def write_config(folder: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    """Write config.json; `dtype`, that of the weights, is for other software."""
    _write_json(folder / "config.json", config_to_json(config) | {"dtype": str(dtype).removeprefix("torch.")})


def _remove_stale(folder: Path, names: set[str]) -> None:
    """Weights of an earlier save in other shards go: a reader would find the old index or single file first."""
    for path in (folder / INDEX, *folder.glob("model*.safetensors")):
        if path.name not in names and re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", path.name):
            path.unlink(missing_ok=True)


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """The names of each shard, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with written_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n")


def fingerprint(model: Model) -> str:
    """SHA-256 of the config and of name, shape and first 4 KiB (as bfloat16) of every tensor.

    Device, dtype and the layout of prepared weights do not enter, so a memory moves between them.
    """
    digest = hashlib.sha256(json.dumps(config_to_json(model.config), sort_keys=True).encode())
    for name, tensor in sorted(to_disk(model).items()):
        head = tensor.flatten()[: FINGERPRINT_BYTES // 2].to(torch.bfloat16).cpu().view(torch.int16)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(head.numpy().tobytes())
    return digest.hexdigest()
