"""The memory is a value of fixed size: copies, rows, files, and files that are refused by name."""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import infinitevl.config
from infinitevl import memory as memories
from infinitevl import rope
from infinitevl.config import ModelConfig, TextConfig, VisionConfig, config_to_json, hybrid
from infinitevl.memory import Delta, Memory, MemoryFileError, Window
from infinitevl.model import Model
from infinitevl.weights import to_disk

WINDOW = 8
MARK = "f" * 64


def config(window: int | None = WINDOW, sinks: int = 0) -> ModelConfig:
    text = TextConfig(
        layers=hybrid(1, 1),
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        window=window,
        sinks=sinks,
        mrope_sections=(2, 3, 3),
        delta_heads=2,
        delta_key_dim=8,
        delta_value_dim=16,
    )
    vision = VisionConfig(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32)
    return ModelConfig(vision, text)


def filled(rows: int = 1, dtype: torch.dtype = torch.float32) -> Memory:
    """A memory in which every leaf holds numbers of its own."""
    blank = Memory.empty(config(), rows, dtype=dtype)
    return blank.map(
        lambda leaf: (
            torch.randn(leaf.shape).to(leaf.dtype) if leaf.is_floating_point() else torch.randint(0, 99, leaf.shape)
        )
    )


def equal(one: Memory, other: Memory) -> bool:
    pairs = zip(one.named(), other.named(), strict=True)
    return all(
        a == b and x.dtype == y.dtype and torch.equal(x.nan_to_num(7.5), y.nan_to_num(7.5)) for (a, x), (b, y) in pairs
    )


@torch.no_grad()
def feed(model: Model, memory: Memory, hidden: Tensor) -> tuple[Tensor, Memory]:
    positions, memory = rope.next_text(memory, hidden.shape[1])
    out, after = model(hidden, positions, memory)
    return out, after


# -- a value ----------------------------------------------------------------------------------------------------------


def test_every_leaf_is_a_tensor_and_none_a_python_number():
    memory = Memory.empty(config(), 2)
    leaves, shape = pytree.tree_flatten(memory)
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    assert len(leaves) == len(list(memory.named())) == 2 + 2 + len(Memory._fields) - 1
    assert all(leaf.shape[0] == 2 for leaf in leaves)
    assert isinstance(pytree.tree_unflatten(leaves, shape), Memory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_config_and_the_state_is_float32(dtype):
    memory = Memory.empty(config(sinks=3), 2, dtype=dtype)
    slots, size = WINDOW + 3, dtype.itemsize
    window = 2 * slots * 1 * 16 * size
    delta = 3 * 2 * (8 + 8 + 16) * size + 2 * 8 * 16 * 4
    clocks = slots * 8 + 8 * (len(Memory._fields) - 2)
    assert memory.nbytes == 2 * (window + delta + clocks)
    assert memory.blocks[1].state.dtype == torch.float32 and memory.blocks[1].tail.dtype == dtype


def test_the_published_models_memory_is_127_mib():
    memory = Memory.empty(infinitevl.config.infinitevl_4b(), device="meta", dtype=torch.bfloat16)
    assert round(memory.nbytes / 2**20, 1) == 127.3
    deltas = [block for block in memory.blocks if isinstance(block, Delta)]
    assert sum(block.state.nbytes for block in deltas) == 56_623_104
    assert (
        sum(block.keys.nbytes + block.values.nbytes for block in memory.blocks if isinstance(block, Window))
        == 75_497_472
    )


@pytest.mark.parametrize("sinks", [0, 3])
def test_bytes_stay_the_same_for_a_hundred_windows(sinks):
    model = Model(config(sinks=sinks))
    memory = model.empty_memory()
    size, tokens = memory.nbytes, 0
    for turn in range(100 * WINDOW // 5 + 1):
        _, memory = feed(model, memory, torch.randn(1, 5 + turn % 2, 32))
        tokens += 5 + turn % 2
        assert memory.nbytes == size
    held = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for _, leaf in memory.named()}
    assert sum(held.values()) <= size * (WINDOW + 2) / WINDOW, "leaves keep more alive than they show"
    assert tokens >= 100 * WINDOW and memory.seen.tolist() == [tokens] and memory.clock.tolist() == [tokens]
    newest = range(tokens - WINDOW, tokens)
    assert sorted(memory.index[0].tolist()) == [*range(sinks), *newest]


def test_a_clone_shares_nothing():
    memory = filled(2)
    twin = memory.clone()
    assert equal(memory, twin)
    before = {leaf.data_ptr() for _, leaf in memory.named()}
    assert before.isdisjoint(leaf.data_ptr() for _, leaf in twin.named())
    for _, leaf in twin.named():
        leaf.zero_()
    assert not equal(memory, twin)


def test_rows_are_picked_and_repeated():
    memory = filled(3)
    picked = memory.rows(torch.tensor([2, 0, 2, 1]))
    for (name, leaf), (_, old) in zip(picked.named(), memory.named(), strict=True):
        assert torch.equal(leaf, torch.stack([old[2], old[0], old[2], old[1]])), name


def test_reset_empties_the_marked_rows_only():
    memory, fresh = filled(3), Memory.empty(config(), 1)
    memory.blocks[1].state[1] = math.nan  # a row that went wrong must be gone as well
    kept = memory.rows(torch.tensor([0, 2]))
    after = memory.reset(torch.tensor([False, True, False]))
    assert equal(after.rows(torch.tensor([1])), fresh)
    assert equal(after.rows(torch.tensor([0, 2])), kept)


def test_to_moves_every_leaf():
    assert {leaf.device.type for _, leaf in filled().to("meta").named()} == {"meta"}


def test_capacity_goes_with_no_window():
    assert Memory.empty(config(window=None), capacity=50).index.shape == (1, 50)
    with pytest.raises(ValueError, match="capacity="):
        Memory.empty(config(window=None))
    with pytest.raises(ValueError, match="window of 8"):
        Memory.empty(config(), capacity=50)


# -- the ring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sinks", [0, 3])
def test_no_slot_is_written_twice_and_the_newest_stay(sinks):
    slots = WINDOW + sinks
    for length in (1, WINDOW, WINDOW + 1, 3 * WINDOW + 2):
        for start in (0, 1, 5, 40):
            index = torch.arange(start, start + length)[None]
            target = memories.target_slots(index, torch.full((1, slots), -1), sinks)[0]
            written = target[target < slots]
            assert len(written) == len(set(written.tolist()))
            kept = index[0][target < slots].tolist()
            assert kept == [i for i in index[0].tolist() if i < sinks or i > start + length - 1 - WINDOW]
            assert all(
                int(t) == (i if i < sinks else sinks + (i - sinks) % WINDOW) for i, t in zip(kept, written, strict=True)
            )


def test_tokens_that_are_not_there_are_not_written():
    ring = torch.randn(2, WINDOW, 4)
    index = torch.tensor([[-1, 20, 21], [-1, -1, -1]])
    target = memories.target_slots(index, torch.full((2, WINDOW), -1), 0)
    assert target.tolist() == [[WINDOW, 4, 5], [WINDOW] * 3]
    values = torch.randn(2, 3, 4)
    after = memories.write(ring, target, values)
    right = ring.clone()
    right[0, 4], right[0, 5] = values[0, 1], values[0, 2]
    assert torch.equal(after, right)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_file_gives_back_every_bit(tmp_path, dtype, rows):
    memory = filled(rows, dtype)
    memory.start.fill_(math.nan)
    memory.save(tmp_path / "stream.mem", MARK)
    like = Memory.empty(config(), 1, dtype=dtype)
    assert equal(Memory.load(tmp_path / "stream.mem", like, MARK), memory)
    assert os.listdir(tmp_path) == ["stream.mem"]


def test_a_memory_in_use_can_be_saved(tmp_path):
    """Leaves of a memory in use may be views of something larger; only their own bytes are written."""
    model = Model(config())
    _, memory = feed(model, model.empty_memory(2), torch.randn(2, 11, 32))
    memory.save(tmp_path / "a", MARK)
    assert equal(Memory.load(tmp_path / "a", model.empty_memory(), MARK), memory)
    assert (tmp_path / "a").stat().st_size < memory.nbytes + 4096


def test_a_bfloat16_memory_goes_on_in_float32(tmp_path):
    memory = filled(1, torch.bfloat16)
    memory.save(tmp_path / "a", MARK)
    back = Memory.load(tmp_path / "a", Memory.empty(config()), MARK)
    assert back.blocks[0].keys.dtype == torch.float32
    assert torch.equal(back.blocks[0].keys, memory.blocks[0].keys.float())
    assert torch.equal(back.blocks[1].state, memory.blocks[1].state)


CONTINUE = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from infinitevl import rope, weights
from infinitevl.config import config_from_json
from infinitevl.memory import Memory
from infinitevl.model import Model
folder = sys.argv[1]
torch.set_num_threads(int(sys.argv[2]))
model = Model(config_from_json(json.load(open(folder + "/config.json"))))
weights.assign(model, load_file(folder + "/weights"), folder)
memory = Memory.load(folder + "/stream.mem", model.empty_memory(), weights.fingerprint(model))
hidden = load_file(folder + "/hidden")["hidden"]
positions, memory = rope.next_text(memory, hidden.shape[1])
with torch.no_grad():
    out, memory = model(hidden, positions, memory)
save_file({"out": out, **{name: leaf.contiguous() for name, leaf in memory.named()}}, folder + "/after")
"""


def test_going_on_in_a_new_process_is_going_on(tmp_path):
    from infinitevl.weights import fingerprint

    model = Model(config())
    _, memory = feed(model, model.empty_memory(), torch.randn(1, 3 * WINDOW + 1, 32))
    memory.save(tmp_path / "stream.mem", fingerprint(model))
    hidden = torch.randn(1, 13, 32)
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(model.config)))
    safetensors.torch.save_file(to_disk(model), tmp_path / "weights")
    safetensors.torch.save_file({"hidden": hidden}, tmp_path / "hidden")
    source = str(Path(infinitevl.config.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", CONTINUE, str(tmp_path), str(torch.get_num_threads())]
    subprocess.run(command, check=True, env=environment, timeout=120)
    out, memory = feed(model, memory, hidden)
    after = safetensors.torch.load_file(tmp_path / "after")
    assert torch.equal(after.pop("out"), out)
    for name, leaf in memory.named():
        assert torch.equal(after[name].nan_to_num(7.5), leaf.nan_to_num(7.5)), name


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_file_may_be_read_by_whom_the_umask_lets(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        filled().save(tmp_path / "a.mem", MARK)
    finally:
        os.umask(before)
    assert (tmp_path / "a.mem").stat().st_mode & 0o777 == mode
    assert [path.name for path in tmp_path.iterdir()] == ["a.mem"]


def test_a_failed_save_leaves_the_older_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "stream.mem"
    old = filled()
    old.save(path, MARK)

    def half(tensors, name, metadata):
        Path(name).write_bytes(path.read_bytes()[:700])
        raise OSError("No space left on device")

    monkeypatch.setattr(memories.safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        filled().save(path, MARK)
    monkeypatch.undo()
    assert equal(Memory.load(path, Memory.empty(config()), MARK), old)
    assert os.listdir(tmp_path) == ["stream.mem"]


@pytest.fixture
def saved(tmp_path, monkeypatch) -> Path:
    """A good file; from here on reading tensors is forbidden, since a bad one must be refused before that."""
    path = tmp_path / "stream.mem"
    filled().save(path, MARK)

    def forbidden(*_, **__):
        raise AssertionError("tensors were read from a file that should have been refused")

    monkeypatch.setattr(memories.safetensors.torch, "load_file", forbidden)
    monkeypatch.setattr(pickle, "load", forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    return path


def refused(path: Path, like: Memory | None = None, mark: str = MARK) -> str:
    with pytest.raises(MemoryFileError) as error:
        Memory.load(path, like or Memory.empty(config()), mark)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def rewritten(path: Path, change) -> None:
    """The file with its header changed: `change` gets the header's table and may return the bytes after it."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    data = change(header) or data
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


def test_a_truncated_file_is_refused_wherever_it_ends(saved):
    whole = saved.read_bytes()
    head = 8 + struct.unpack("<Q", whole[:8])[0]
    ends = {0, 1, 7, 8, 9, head - 1, head, head + 1, len(whole) - 1, *range(2, len(whole), len(whole) // 50)}
    for end in sorted(ends):
        saved.write_bytes(whole[:end])
        assert "truncated" in refused(saved), end
    saved.write_bytes(whole + b"\0")
    assert "truncated" in refused(saved)


def test_noise_in_the_header_is_refused(saved, monkeypatch):
    monkeypatch.undo()
    whole = saved.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    for at in [*range(8), *range(8, 8 + length, 29)]:
        saved.write_bytes(whole[:at] + bytes([whole[at] ^ 0x15]) + whole[at + 1 :])
        refused(saved)


def test_noise_in_the_numbers_is_refused(saved, monkeypatch):
    monkeypatch.undo()
    whole = saved.read_bytes()
    for at in range(len(whole) - 1, len(whole) // 2, -len(whole) // 7):
        saved.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert "damaged" in refused(saved)


FOREIGN = {
    "nothing": b"",
    "zeros": bytes(4096),
    "text": b"hello " * 99,
    "ones": b"\xff" * 64,
    "a deep list": struct.pack("<Q", 10**5) + b"[" * 10**5,
}


@pytest.mark.parametrize("content", FOREIGN)
def test_a_file_of_something_else_is_refused(saved, content):
    saved.write_bytes(FOREIGN[content])
    assert "not a memory file" in refused(saved)


class Trap:
    """Unpickling one would raise."""

    def __reduce__(self):
        return eval, ("1 / 0",)


@pytest.mark.parametrize(
    "write",
    [lambda path: pickle.dump(Trap(), path.open("wb")), lambda path: torch.save({"seen": torch.zeros(1)}, path)],
)
def test_a_pickle_is_refused_and_never_read(saved, write):
    saved.unlink()
    write(saved)
    assert "not a memory file" in refused(saved)


def test_another_safetensors_file_is_refused(saved):
    safetensors.torch.save_file({"weight": torch.zeros(3)}, saved)
    assert "not a memory" in refused(saved)
    safetensors.torch.save_file({"weight": torch.zeros(3)}, saved, metadata={"format": "pt"})
    assert "not a memory" in refused(saved)


def test_another_models_memory_is_refused_by_name(saved):
    message = refused(saved, mark="0a" * 32)
    assert "another model" in message and MARK[:12] in message and "0a0a0a0a0a0a" in message


def test_another_version_is_refused(saved):
    rewritten(saved, lambda header: header["__metadata__"].update(version="2"))
    assert "memory format 2, this version reads 1" in refused(saved)


def test_a_renamed_leaf_is_refused(saved):
    rewritten(saved, lambda header: header.update({"blocks.0.key": header.pop("blocks.0.keys")}))
    message = refused(saved)
    assert "blocks.0.key" in message and "blocks.0.keys" in message


def test_a_missing_leaf_is_refused(saved):
    rewritten(saved, lambda header: header.pop("clock") and None)
    assert "clock" in refused(saved)


@pytest.mark.parametrize("name", ["blocks.0.keys", "blocks.1.state", "index", "seen"])
def test_a_wrong_shape_is_refused_with_both(saved, name):
    def grow(header):
        header[name]["shape"] = [*header[name]["shape"], 2]

    rewritten(saved, grow)
    message = refused(saved)
    assert "has shape" in message and (name in message or name == "seen")


def test_rows_must_agree_and_be_there(saved):
    def shrunk(header):
        for entry in header.values():
            if "shape" in entry:
                entry["shape"][:1] = [0]

    rewritten(saved, lambda header: header["clock"].update(shape=[2]))
    assert "clock has shape [2]" in refused(saved)
    filled().save(saved, MARK)
    rewritten(saved, shrunk)
    assert "has shape [0" in refused(saved)


@pytest.mark.parametrize("name, dtype", [("index", "F64"), ("blocks.1.state", "I64"), ("start", "I64")])
def test_a_wrong_type_is_refused(saved, name, dtype):
    rewritten(saved, lambda header: header[name].update(dtype=dtype))
    assert f"{name} is of type {dtype}" in refused(saved)


@pytest.mark.parametrize("entry", [None, 3, [], {"shape": 4}, {"dtype": "F32", "shape": [1], "data_offsets": "x"}])
def test_a_header_of_another_form_is_refused(saved, entry):
    rewritten(saved, lambda header: header.update(seen=entry))
    refused(saved)
    rewritten(saved, lambda header: header.update(__metadata__=entry))
    refused(saved)


def test_a_header_that_promises_terabytes_is_refused(saved):
    def huge(header):
        for entry in header.values():
            if "shape" in entry:
                entry["shape"][0] = 2**40
                entry["data_offsets"] = [0, 2**50]

    rewritten(saved, huge)
    assert "truncated" in refused(saved)


def test_a_memory_of_another_capacity_is_refused(saved):
    open_ended = config(window=None)
    Memory.empty(open_ended, capacity=50).save(saved, MARK)
    message = refused(saved, Memory.empty(open_ended, capacity=60))
    assert "50" in message and "60" in message


def test_no_file_is_said_as_such(tmp_path):
    with pytest.raises(FileNotFoundError):
        Memory.load(tmp_path / "none", Memory.empty(config()), MARK)
