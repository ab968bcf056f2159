"""Checkpoints: names as published, strict in both directions, whole or refused in one line."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import huggingface_hub.errors
import pytest
import torch
from safetensors.torch import load_file, save_file

import infinitevl.config
from infinitevl import weights
from infinitevl.config import ConfigError, ModelConfig, TextConfig, VisionConfig, hybrid
from infinitevl.model import Model
from infinitevl.processor import Processor, load_processor
from infinitevl.weights import CheckpointError

CONFIG = ModelConfig(
    VisionConfig(depth=1, hidden_size=16, intermediate_size=20, num_heads=2, out_hidden_size=32),
    TextConfig(
        layers=hybrid(1, 1),
        vocab_size=40,
        hidden_size=32,
        intermediate_size=24,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        window=8,
        mrope_sections=(2, 3, 3),
        delta_heads=2,
        delta_key_dim=8,
        delta_value_dim=16,
    ),
)
UNTIED = replace(CONFIG, text=replace(CONFIG.text, tied_head=False))

# name on disk and shape, written out by hand from the published layout
ON_DISK = """
visual.patch_embed.proj.weight 16 3 2 14 14
visual.blocks.0.norm1.weight 16
visual.blocks.0.norm2.weight 16
visual.blocks.0.attn.qkv.weight 48 16
visual.blocks.0.attn.qkv.bias 48
visual.blocks.0.attn.proj.weight 16 16
visual.blocks.0.attn.proj.bias 16
visual.blocks.0.mlp.gate_proj.weight 20 16
visual.blocks.0.mlp.gate_proj.bias 20
visual.blocks.0.mlp.up_proj.weight 20 16
visual.blocks.0.mlp.up_proj.bias 20
visual.blocks.0.mlp.down_proj.weight 16 20
visual.blocks.0.mlp.down_proj.bias 16
visual.merger.ln_q.weight 16
visual.merger.mlp.0.weight 64 64
visual.merger.mlp.0.bias 64
visual.merger.mlp.2.weight 32 64
visual.merger.mlp.2.bias 32
model.embed_tokens.weight 40 32
model.layers.0.input_layernorm.weight 32
model.layers.0.post_attention_layernorm.weight 32
model.layers.0.self_attn.q_proj.weight 32 32
model.layers.0.self_attn.q_proj.bias 32
model.layers.0.self_attn.k_proj.weight 16 32
model.layers.0.self_attn.k_proj.bias 16
model.layers.0.self_attn.v_proj.weight 16 32
model.layers.0.self_attn.v_proj.bias 16
model.layers.0.self_attn.o_proj.weight 32 32
model.layers.0.mlp.gate_proj.weight 24 32
model.layers.0.mlp.up_proj.weight 24 32
model.layers.0.mlp.down_proj.weight 32 24
model.layers.1.input_layernorm.weight 32
model.layers.1.post_attention_layernorm.weight 32
model.layers.1.self_attn.A_log 2
model.layers.1.self_attn.dt_bias 2
model.layers.1.self_attn.q_proj.weight 16 32
model.layers.1.self_attn.k_proj.weight 16 32
model.layers.1.self_attn.v_proj.weight 32 32
model.layers.1.self_attn.a_proj.weight 2 32
model.layers.1.self_attn.b_proj.weight 2 32
model.layers.1.self_attn.g_proj.weight 32 32
model.layers.1.self_attn.o_proj.weight 32 32
model.layers.1.self_attn.q_conv1d.weight 16 1 4
model.layers.1.self_attn.k_conv1d.weight 16 1 4
model.layers.1.self_attn.v_conv1d.weight 32 1 4
model.layers.1.self_attn.o_norm.weight 16
model.layers.1.mlp.gate_proj.weight 24 32
model.layers.1.mlp.up_proj.weight 24 32
model.layers.1.mlp.down_proj.weight 32 24
model.norm.weight 32
"""
EXPECTED = {line.split()[0]: tuple(map(int, line.split()[1:])) for line in ON_DISK.strip().splitlines()}


@pytest.fixture(scope="session")
def processor() -> Processor:
    return load_processor(Path(infinitevl.config.__file__).parent / "checkpoints" / "tiny")


def model(processor: Processor | None = None, config: ModelConfig = CONFIG, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    made = Model(config, processor)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def in_memory(name: str) -> str:
    """The other published layout."""
    return re.sub(r"^visual\.", "model.visual.", re.sub(r"^model\.", "model.language_model.", name))


def same(one: Model, other: Model) -> bool:
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return all(a == b and p.dtype == q.dtype and torch.equal(p, q) for (a, p), (b, q) in pairs)


# -- names ------------------------------------------------------------------------------------------------------------


def test_names_and_shapes_are_those_of_the_published_checkpoint():
    assert {name: tuple(tensor.shape) for name, tensor in weights.to_disk(model()).items()} == EXPECTED
    untied = {name: tuple(tensor.shape) for name, tensor in weights.to_disk(model(config=UNTIED)).items()}
    assert untied == EXPECTED | {"lm_head.weight": (40, 32)}


def test_the_whole_published_model_has_a_name_for_every_tensor():
    with torch.device("meta"):
        names = weights.to_disk(Model(infinitevl.config.infinitevl_4b()))
    assert len(names) == 1 + 32 * 12 + 5 + 1 + 9 * 12 + 27 * 18 + 1
    softmax = {name.split(".")[2] for name in names if name.endswith("q_proj.bias")}
    assert softmax == {str(number) for number in range(0, 36, 4)}


@pytest.mark.parametrize("rename", [lambda name: name, in_memory], ids=["on disk", "in memory"])
@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_both_layouts_are_read(rename, config):
    source, target = model(config=config), model(config=config, seed=1)
    assert not same(source, target)
    weights.assign(target, {rename(name): tensor.clone() for name, tensor in weights.to_disk(source).items()}, "here")
    assert same(source, target)
    assert all(parameter.requires_grad for parameter in target.parameters())


def test_a_tied_checkpoint_may_carry_its_head():
    source, target = model(), model(seed=1)
    tensors = weights.to_disk(source)
    weights.assign(target, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, "here")
    assert same(source, target)


def test_an_untied_head_is_used_and_required():
    source = model(config=UNTIED)
    hidden = torch.randn(3, 32)
    assert torch.equal(source.logits(hidden), hidden @ source.head.weight.T)
    assert torch.equal(model().logits(hidden), torch.nn.functional.linear(hidden, model().embedding.weight))
    with pytest.raises(CheckpointError, match="missing lm_head.weight"):
        weights.assign(model(config=UNTIED), weights.to_disk(model()), "here")


def test_everything_that_is_wrong_is_listed_at_once():
    target, tensors = model(), weights.to_disk(model(seed=1))
    before = {name: parameter.clone() for name, parameter in target.named_parameters()}
    tensors["model.visual.blocks.0.attn.proj.bias"] = torch.zeros(16)  # the same tensor in the other layout
    tensors["model.layers.1.self_attn.A_log"] = torch.zeros(3)
    tensors["model.embed_tokens.weight"] = torch.zeros(40, 31)
    tensors["model.layers.0.self_attn.rotary.inv_freq"] = torch.zeros(4)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(4)
    del tensors["model.norm.weight"], tensors["visual.merger.ln_q.weight"]
    with pytest.raises(CheckpointError) as error:
        weights.assign(target, tensors, "folder/x")
    message = str(error.value)
    for part in (
        "folder/x: 7 tensors",
        "missing model.norm.weight",
        "missing visual.merger.ln_q.weight",
        "unexpected model.layers.0.self_attn.rotary.inv_freq",
        "unexpected model.layers.2.mlp.up_proj.weight",
        "model.layers.1.self_attn.A_log has shape (3,), expected (2,)",
        "model.embed_tokens.weight has shape (40, 31), expected (40, 32)",
        "visual.blocks.0.attn.proj.bias given twice",
    ):
        assert part in message
    assert "\n" not in message
    assert all(torch.equal(before[name], p) for name, p in target.named_parameters()), "nothing was put in"


def test_our_own_names_are_not_those_of_a_checkpoint():
    with pytest.raises(CheckpointError, match="unexpected blocks.0.mixer.q.weight"):
        weights.assign(model(), dict(model().named_parameters()), "here")
    with pytest.raises(KeyError, match="mixer.z"):
        weights.disk_name("blocks.0.mixer.z.weight")


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 40_000, 1])
def test_save_and_load(tmp_path, processor, config, shard_bytes):
    source = model(processor, config)
    weights.save(source, tmp_path / "deep" / "new", shard_bytes)
    folder = tmp_path / "deep" / "new"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    stored = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    assert {name: tuple(t.shape) for name, t in stored.items() if name != "lm_head.weight"} == EXPECTED
    assert (files == ["model.safetensors"]) == (shard_bytes == 1 << 30) == (not (folder / weights.INDEX).exists())
    if len(files) > 1:
        index = json.loads((folder / weights.INDEX).read_text())
        assert set(index["weight_map"]) == set(stored) and set(index["weight_map"].values()) == set(files)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    loaded = weights.load(folder)
    assert same(source, loaded) and loaded.config == config and not loaded.training
    assert loaded.processor.config == processor.config
    assert not [name for name in os.listdir(folder) if name.endswith(".part")]


def test_bfloat16_is_stored_as_it_is_and_loaded_as_asked(tmp_path, processor):
    source = model(processor).bfloat16()
    weights.save(source, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    exact = {"model.layers.1.self_attn.A_log", "model.layers.1.self_attn.dt_bias"}
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.float32} == exact
    assert {tensor.dtype for name, tensor in stored.items() if name not in exact} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert same(weights.load(tmp_path, dtype=torch.bfloat16), source)
    assert same(weights.load(tmp_path), model(processor).bfloat16().float())
    assert weights.load(tmp_path).dtype == torch.float32


def test_gates_stored_in_bfloat16_are_float32_when_loaded(tmp_path, processor):
    source = model(processor)
    weights.save(source, tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    mixer = weights.load(tmp_path, dtype=torch.bfloat16).blocks[1].mixer
    assert mixer.A_log.dtype == mixer.dt_bias.dtype == torch.float32
    assert torch.equal(mixer.A_log, source.blocks[1].mixer.A_log.bfloat16().float())


@pytest.mark.parametrize("first, second", [(1, 1 << 30), (1 << 30, 1), (1, 40_000)])
def test_saving_over_an_older_save_leaves_none_of_its_weights(tmp_path, processor, first, second):
    """An index, or a single file, that is left behind would be read in place of the new weights."""
    weights.save(model(processor, seed=1), tmp_path, first)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not ours")
    newer = model(processor, seed=2)
    weights.save(newer, tmp_path, second)
    assert same(weights.load(tmp_path), newer)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"not ours"
    fresh = tmp_path / "fresh"
    weights.save(newer, fresh, second)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in fresh.iterdir()} | {
        "fresh",
        "adapter_model.safetensors",
    }


def test_a_model_without_a_processor_is_not_half_saved(tmp_path):
    with pytest.raises(ValueError, match="no processor"):
        weights.save(model(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_failed_save_leaves_the_older_weights(tmp_path, processor, monkeypatch):
    older = model(processor)
    weights.save(older, tmp_path)

    def half(tensors, name, metadata):
        Path(name).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(weights.safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="No space"):
        weights.save(model(processor, seed=1), tmp_path)
    assert same(weights.load(tmp_path), older)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]


# -- folders that are broken ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, processor) -> Path:
    weights.save(model(processor), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def refused(folder: Path | str, kind: type[Exception] = CheckpointError) -> str:
    with pytest.raises(kind) as error:
        weights.load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("size", [0, 3, 8, 100, -1])
def test_damaged_weights_are_refused(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert str(path) in refused(folder) and "damaged" in refused(folder)


def test_missing_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "model.safetensors: weights are missing" in refused(folder)


def test_a_missing_shard_is_refused(tmp_path, processor):
    weights.save(model(processor), tmp_path, 1)
    (tmp_path / "model-00002-of-00050.safetensors").unlink()
    assert "model-00002-of-00050.safetensors: weights are missing" in refused(tmp_path)


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_a_broken_index_is_refused(folder, content):
    (folder / weights.INDEX).write_text(content)
    assert "not an index of shards" in refused(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"{'a': 1}"])
def test_a_config_that_is_not_json_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    assert "config.json: not JSON" in refused(folder)


def test_a_config_of_another_model_is_refused_with_its_file(folder):
    (folder / "config.json").write_text('{"model_type": "llava"}')
    assert str(folder / "config.json") in refused(folder, ConfigError)
    (folder / "config.json").write_text("[]")
    assert str(folder / "config.json") in refused(folder, ConfigError)


def test_a_folder_of_something_else_is_refused(tmp_path):
    assert "no config.json" in refused(tmp_path)


def test_weights_of_another_config_are_refused(folder):
    content = json.loads((folder / "config.json").read_text())
    content["text_config"]["intermediate_size"] = 25
    (folder / "config.json").write_text(json.dumps(content))
    assert "6 tensors do not fit" in refused(folder)


# -- the hub ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where", ["no/such/folder/here", "/absent", "./absent", "../absent", "absent", "", "a/b/", ".a/b"]
)
def test_what_is_neither_a_folder_nor_an_id_is_refused(where, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    if where:
        assert "no such folder, and not a hub id" in refused(where)
    else:
        refused(where)


@pytest.mark.parametrize(
    "error",
    [OSError("Network is unreachable\nand more"), huggingface_hub.errors.LocalEntryNotFoundError("x"), OSError()],
)
def test_a_hub_that_cannot_be_reached_is_named_with_the_way_out(monkeypatch, error):
    def unreachable(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    message = refused("hustvl/InfiniteVL")
    assert "hustvl/InfiniteVL" in message and "could not be reached" in message and "folder" in message


def test_an_id_that_no_hub_has_is_refused_in_one_line():
    assert "a--b/c" in refused("a--b/c")


def test_offline_says_so(tmp_path):
    """The hub's own offline switch is read when it is imported, so in a process of its own."""
    script = "import infinitevl.weights as w\ntry: w.load('hustvl/InfiniteVL')\nexcept w.CheckpointError as e: print(e)"
    source = str(Path(infinitevl.config.__file__).parents[1])
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]),
    }
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "hustvl/InfiniteVL: the hub could not be reached" in run.stdout and "folder" in run.stdout


def test_a_hub_id_is_a_folder_once_it_is_downloaded(monkeypatch, folder):
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.append(name) or str(folder)
    )
    assert same(weights.load("hustvl/InfiniteVL"), weights.load(folder)) and asked == ["hustvl/InfiniteVL"]


# -- who a model is ---------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_the_models_whatever_its_dtype(tmp_path, processor):
    """A checkpoint is bf16: loaded as float32 or bf16, in shards or not, it is the same model."""
    weights.save(model(processor).bfloat16(), tmp_path / "one")
    one = weights.load(tmp_path / "one")
    mark = weights.fingerprint(one)
    assert re.fullmatch(r"[0-9a-f]{64}", mark)
    assert weights.fingerprint(weights.load(tmp_path / "one", dtype=torch.bfloat16)) == mark
    weights.save(one, tmp_path / "two", 1)
    assert weights.fingerprint(weights.load(tmp_path / "two")) == mark
    assert weights.fingerprint(one.bfloat16()) == mark
    exact = model()
    assert weights.fingerprint(exact) == weights.fingerprint(copy.deepcopy(exact).bfloat16())


def test_a_fingerprint_is_nobody_elses():
    mark = weights.fingerprint(model())
    assert weights.fingerprint(model(seed=1)) != mark
    for part, change in (("text", {"window": 9}), ("text", {"norm_eps": 1e-5}), ("vision", {"tokens_per_second": 4})):
        config = replace(CONFIG, **{part: replace(getattr(CONFIG, part), **change)})
        assert weights.fingerprint(model(config=config)) != mark
    for name in EXPECTED:
        other = model()
        with torch.no_grad():
            next(tensor for ours, tensor in weights.to_disk(other).items() if ours == name).view(-1)[0] += 0.5
        assert weights.fingerprint(other) != mark, name
