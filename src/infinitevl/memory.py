"""Follow a frame: its keys, values and rank-1 updates -> `Memory`, a stream's whole past in a fixed number of bytes.

A memory is a value: a NamedTuple of tensors (a pytree). Steps take one and return one. No leaf is a Python number: what
changes between steps is a tensor, or a recorded step would replay a lie.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from infinitevl.config import SOFTMAX, ModelConfig, TextConfig
from infinitevl.files import written_aside

FORMAT, VERSION = "infinitevl.memory", "1"
_FLOATS = ("F64", "F32", "F16", "BF16")


class MemoryFileError(ValueError):
    """A file that is not a memory of this model; the message names the mismatch."""


class Window(NamedTuple):
    """What a softmax block still holds. Keys are stored rotated."""

    keys: Tensor  # [B, W, G, hd]
    values: Tensor  # [B, W, G, hd]


class Delta(NamedTuple):
    """What a delta block holds."""

    tail: Tensor  # [B, taps - 1, C] inputs of the convolution before the next token
    state: Tensor  # [B, H, K, V] float32


class Memory(NamedTuple):
    """All that a stream's past is. One row per stream.

    index: token index held by each slot of every window, -1 where empty. seen: tokens so far. frames: frames so far.
    clock: greatest mRoPE position so far plus one. origin, start, last: of the run of frames being fed, the position
    at which it began, the time of its first frame and of its latest one, in seconds; start is NaN between runs, last
    before any frame.
    """

    blocks: tuple[Window | Delta, ...]
    index: Tensor  # type: ignore[assignment]  # [B, W] int64; hides tuple.index
    seen: Tensor  # [B] int64
    frames: Tensor  # [B] int64
    clock: Tensor  # [B] int64
    origin: Tensor  # [B] int64
    start: Tensor  # [B] float64
    last: Tensor  # [B] float64

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        batch: int = 1,
        *,
        capacity: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Memory:
        """A memory that has seen nothing. `capacity` (tokens) is for models without a window, and only for them."""
        text = config.text
        slots = _slots(text, capacity)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=device)

        def block(mixer: str) -> Window | Delta:
            if mixer == SOFTMAX:
                shape = (slots, text.num_kv_heads, text.head_dim)
                return Window(zeros(*shape, dtype=dtype), zeros(*shape, dtype=dtype))
            state = (text.delta_heads, text.delta_key_dim, text.delta_value_dim)
            tail = zeros(text.conv_size - 1, text.qkv_channels, dtype=dtype)
            return Delta(tail, zeros(*state, dtype=torch.float32))

        nothing = torch.full((batch,), math.nan, dtype=torch.float64, device=device)
        return cls(
            blocks=tuple(block(mixer) for mixer in text.layers),
            index=torch.full((batch, slots), -1, dtype=torch.int64, device=device),
            seen=zeros(dtype=torch.int64),
            frames=zeros(dtype=torch.int64),
            clock=zeros(dtype=torch.int64),
            origin=zeros(dtype=torch.int64),
            start=nothing,
            last=nothing.clone(),
        )

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Every leaf with the name it has in a file."""
        for number, block in enumerate(self.blocks):
            for name, leaf in zip(block._fields, block, strict=True):
                yield f"blocks.{number}.{name}", leaf
        for name in self._fields[1:]:
            yield name, getattr(self, name)

    def map(self, function: Callable[[Tensor], Tensor]) -> Memory:
        """The memory with `function` applied to every leaf."""
        blocks = tuple(type(block)(*(function(leaf) for leaf in block)) for block in self.blocks)
        return Memory(blocks, *(function(leaf) for leaf in self[1:]))

    def clone(self) -> Memory:
        """A copy that shares nothing with this one."""
        return self.map(torch.clone)

    def to(self, device: torch.device | str) -> Memory:
        """The memory on another device."""
        return self.map(lambda leaf: leaf.to(device))

    def rows(self, rows: Tensor) -> Memory:
        """The rows named by index [N] (they may repeat), as a memory of N rows."""
        return self.map(lambda leaf: leaf.index_select(0, rows))

    def reset(self, rows: Tensor) -> Memory:
        """The memory with the rows marked in bool [B] emptied and all others untouched."""
        blank = {"index": -1, "start": math.nan, "last": math.nan}

        def emptied(name: str, leaf: Tensor) -> Tensor:
            return leaf.masked_fill(rows.view(-1, *[1] * (leaf.dim() - 1)), blank.get(name, 0))

        return self._rebuilt({name: emptied(name, leaf) for name, leaf in self.named()})

    def refresh(self, keep: float) -> Memory:
        """The memory with every delta state times `keep`, 0 to 1; windows, convolution tails and clocks stay.

        0 empties them; 1 changes nothing. Raises ValueError for a `keep` outside that.
        """
        if not 0 <= keep <= 1:
            raise ValueError(f"keep is a share of the delta states from 0 to 1, got {keep}")
        blocks = (
            block._replace(state=block.state * keep) if isinstance(block, Delta) else block for block in self.blocks
        )
        return self._replace(blocks=tuple(blocks))

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves; the same number for ever."""
        return sum(leaf.nbytes for _, leaf in self.named())

    def _rebuilt(self, leaves: dict[str, Tensor]) -> Memory:
        order = iter([leaves[name] for name, _ in self.named()])
        return self.map(lambda _: next(order))

    def save(self, path: str | Path, fingerprint: str) -> None:
        """Write to `path` (safetensors), aside first and then renamed: a failed save leaves an older file whole."""
        tensors = {name: leaf.detach().cpu().contiguous() for name, leaf in self.named()}
        header = {"format": FORMAT, "version": VERSION, "fingerprint": fingerprint, "checksum": _checksum(tensors)}
        with written_aside(path) as aside:
            safetensors.torch.save_file(tensors, aside, metadata=header)

    @classmethod
    def load(cls, path: str | Path, like: Memory, fingerprint: str) -> Memory:
        """Read a memory shaped as `like` (any number of rows; on its device, in its dtypes) of the model `fingerprint`.

        Raises MemoryFileError naming the mismatch; names, shapes and sizes are checked before anything is allocated.
        """
        about = _check_file(Path(path), like, fingerprint)
        try:
            leaves = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise MemoryFileError(f"{path}: damaged: {error}") from None
        if _checksum(leaves) != about.get("checksum"):
            raise MemoryFileError(f"{path}: damaged: its numbers are not those that were written")
        return like._rebuilt({name: leaves[name].to(leaf.device, leaf.dtype) for name, leaf in like.named()})


def _slots(text: TextConfig, capacity: int | None) -> int:
    if text.window is not None:
        if capacity is not None:
            raise ValueError(f"capacity is for models without a window; this one has a window of {text.window} tokens")
        return text.sinks + text.window
    if capacity is None:
        raise ValueError("a model without a window keeps every token: say for how many with capacity=")
    return capacity


def slot(index: Tensor, slots: int, sinks: int) -> Tensor:
    """The slot of a token: sinks have their own, the others share a ring of slots - sinks."""
    return torch.where(index < sinks, index, sinks + (index - sinks) % (slots - sinks))


def target_slots(index: Tensor, held: Tensor, sinks: int) -> Tensor:
    """Where each token of a chunk is written: index [B, T], held [B, W] -> slot [B, T]; W for one that is not written.

    Not written: tokens that are not there, and those that a later token of the same chunk would overwrite, so that no
    slot is written twice in one call.
    """
    slots = held.shape[1]
    newest = index.amax(dim=1, keepdim=True)
    kept = (index >= 0) & ((index < sinks) | (index > newest - (slots - sinks)))
    return torch.where(kept, slot(index, slots, sinks), slots)


def write(ring: Tensor, target: Tensor, values: Tensor) -> Tensor:
    """The ring [B, W, ...] with values [B, T, ...] at slots target [B, T]; slot W is thrown away."""
    spill = torch.cat([ring, torch.zeros_like(ring[:, :1])], dim=1)
    where = target.view(*target.shape, *[1] * (ring.dim() - 2)).expand_as(values)
    return spill.scatter(1, where, values)[:, :-1]


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file and the bytes of data that follow it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > min(size - 8, 1 << 24):
            raise MemoryFileError(f"{path}: not a memory file (damaged or truncated header)")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise MemoryFileError(f"{path}: not a memory file (its header is not JSON)") from None
    if not isinstance(header, dict):
        raise MemoryFileError(f"{path}: not a memory file (its header is not a table)")
    return header, size - 8 - length


def _checksum(leaves: dict[str, Tensor]) -> str:
    """SHA-256 of the leaves' bytes, in the order of their names."""
    digest = hashlib.sha256()
    for _, leaf in sorted(leaves.items()):
        digest.update(leaf.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_file(path: Path, like: Memory, fingerprint: str) -> dict[str, str]:
    """What the file says about itself, once it is sure to hold leaves of the names, types and shapes of `like`."""
    header, size = _header(path)
    about = header.pop("__metadata__", None)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise MemoryFileError(f"{path}: a safetensors file, but not a memory")
    if about.get("version") != VERSION:
        raise MemoryFileError(f"{path}: memory format {about.get('version')}, this version reads {VERSION}")
    if about.get("fingerprint") != fingerprint:
        theirs = str(about.get("fingerprint"))[:12]
        raise MemoryFileError(f"{path}: memory of another model ({theirs}..., this one is {fingerprint[:12]}...)")
    expected = dict(like.named())
    if set(header) != set(expected):
        odd = sorted(set(header) ^ set(expected))
        raise MemoryFileError(f"{path}: leaves differ from this model's memory: {', '.join(odd[:4])}")
    rows = _entry(header, "seen")[1]
    ends = []
    for name, leaf in expected.items():
        dtype, shape, end = _entry(header, name)
        if shape != [*rows, *leaf.shape[1:]] or len(rows) != 1 or rows == [0]:
            raise MemoryFileError(f"{path}: {name} has shape {shape}, this model's memory {list(leaf.shape)}")
        if dtype not in (_FLOATS if leaf.is_floating_point() else ("I64",)):
            raise MemoryFileError(f"{path}: {name} is of type {dtype}, this model's memory of {leaf.dtype}")
        ends.append(end)
    if max(ends) != size:
        raise MemoryFileError(f"{path}: damaged or truncated: {size} bytes of data, its header promises {max(ends)}")
    return about


def _entry(header: dict[str, Any], name: str) -> tuple[str, list[int], int]:
    """Type, shape and end of a tensor as a safetensors header says them; empty where it says them in another form."""
    match header[name]:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(), int(end)]}:
            return dtype, shape, end
    return "", [], -1
