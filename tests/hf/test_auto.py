"""Auto classes on a checkpoint's folder, whoever wrote it, and save_pretrained: both doors read what either writes."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import infinitevl
import infinitevl.hf as hf
from infinitevl import weights
from infinitevl.config import ConfigError, ModelConfig, config_to_json, infinitevl_4b
from infinitevl.model import Model

from .conftest import drawn, one_line, picture, tiny_config


def load(folder: Path, **options) -> hf.InfiniteVLForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(folder, **options)


def assert_same(one: Model, other: Model) -> None:
    assert one.config == other.config
    theirs = dict(other.named_parameters())
    assert set(theirs) == {name for name, _ in one.named_parameters()}
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


def flat(config: ModelConfig) -> dict:
    """config.json as the published one is: text keys outside, one stop token, settings of training."""
    content = config_to_json(config)
    text = {key: value for key, value in content.pop("text_config").items() if key != "model_type"}
    published = {"attn_implementation": "flash_attention_2", "use_cache": False, "torch_dtype": "float32"}
    auto = {
        "AutoConfig": "configuration_x.XConfig",
        "AutoModel": "modeling_x.X",
        "AutoProcessor": "Qwen2_5_VLProcessor",
    }
    return content | text | published | {"auto_map": auto, "eos_token_id": config.stop_tokens[0]}


@pytest.fixture
def published(folder: Path, core: Model, tmp_path: Path) -> Path:
    """The folder as others write it: flat config, names in memory, shards, another processor's name."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    layout = {re.sub(r"^model\.", "model.language_model.", n): t for n, t in tensors.items() if n.startswith("model.")}
    layout |= {f"model.{name}": tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    assert len(layout) == len(tensors)
    names = sorted(layout)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: layout[name] for name in part}, tmp_path / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in shards.items() for name in part}
    (tmp_path / weights.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(flat(core.config)))
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    settings["processor_class"] = "Qwen2_5_VLProcessor"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    generation = {"do_sample": True, "temperature": 0.3, "use_cache": False, "eos_token_id": 7, "pad_token_id": 9}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return tmp_path


def test_auto_classes_read_a_saved_folder(core: Model, folder: Path) -> None:
    config, model, processor = AutoConfig.from_pretrained(folder), load(folder), AutoProcessor.from_pretrained(folder)
    assert type(config) is hf.InfiniteVLConfig and config.model == core.config
    assert type(model) is hf.InfiniteVLForConditionalGeneration and not model.training
    assert type(processor) is hf.InfiniteVLProcessor and processor.processor.config == core.processor.config
    assert_same(core, model.model)
    assert model.name_or_path == str(folder) and model.dtype == torch.float32 == model.config.dtype
    assert model.generation_config.eos_token_id == list(core.config.stop_tokens)


def test_auto_classes_read_the_published_layout(core: Model, published: Path, folder: Path) -> None:
    assert AutoConfig.from_pretrained(published).model == core.config  # stops: the one named and the one two before
    model, processor = load(published), AutoProcessor.from_pretrained(published)
    assert_same(core, model.model)
    assert type(processor) is hf.InfiniteVLProcessor
    assert model.generation_config.eos_token_id == 7 and model.generation_config.temperature == 0.3
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=2).shape == (1, 4)
    assert_same(load(published, trust_remote_code=True).model, core)


def test_published_config(shared: Path, tmp_path: Path) -> None:
    shutil.copy(shared / "golden" / "published_config.json", tmp_path / "config.json")
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model == infinitevl_4b() == hf.InfiniteVLConfig().model
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (151936, 2048, 36)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (16, 2, 128)
    assert config.tie_word_embeddings and (config.image_token_id, config.video_token_id) == (151655, 151656)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert model.num_parameters() == 4_408_381_536


@pytest.mark.parametrize("name", ["text", "image", "video"])
@torch.no_grad()
def test_golden_logits(shared: Path, folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(shared / "golden" / file, tmp_path / file)
    cases = load_file(shared / "golden" / "cases.safetensors")
    given = {k.removeprefix(f"{name}."): v for k, v in cases.items() if k.startswith(f"{name}.")}
    logits, positions = given.pop("logits"), given.pop("position_ids", None)
    model = load(tmp_path)
    assert (model(**given).logits - logits).abs().max() <= 5e-4
    assert (model(**given, use_cache=True).logits - logits).abs().max() <= 5e-4
    assert positions is None or torch.equal(model(**given, position_ids=positions).logits, model(**given).logits)


def test_config_round_trip(core: Model, tmp_path: Path) -> None:
    config = hf.InfiniteVLConfig.of(core.config)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again == config and again.model == core.config
    assert weights.read_config(tmp_path) == core.config
    other = hf.InfiniteVLConfig.of(replace(core.config, stop_tokens=(1, 2)))
    assert other != config and other.get_text_config() is other
    with pytest.raises(ConfigError, match="'windows'"):
        hf.InfiniteVLConfig(**config.to_dict(), windows=3)
    with pytest.raises(AttributeError):
        config.vocab_size = 3


def test_auto_processor_of_other_models_is_untouched(folder: Path, tmp_path: Path) -> None:
    chosen = hf._own_processor_first(lambda where, **options: (where, options))
    assert chosen(tmp_path, revision="x") == (tmp_path, {"revision": "x"})  # no config.json
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    assert chosen(tmp_path) == (tmp_path, {})
    assert type(chosen(folder)) is hf.InfiniteVLProcessor


def test_dtypes(folder: Path, core: Model, tmp_path: Path) -> None:
    for options in ({"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}, {"dtype": torch.bfloat16}):
        model = load(folder, **options)
        assert model.dtype == torch.bfloat16 == model.config.dtype
        kept = {name: p.dtype for name, p in model.named_parameters() if p.dtype != torch.bfloat16}
        assert set(kept.values()) == {torch.float32} and len(kept) == 6  # A_log and dt_bias of three delta mixers
        assert all(name.endswith(("A_log", "dt_bias")) for name in kept)
    model.save_pretrained(tmp_path)
    assert load(tmp_path).dtype == load(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert load(tmp_path, dtype=torch.float32).dtype == torch.float32
    made = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    assert made.dtype == torch.bfloat16 and made.model.blocks[1].mixer.A_log.dtype == torch.float32


@pytest.mark.parametrize("device_map", [None, "cpu", torch.device("cpu"), {"": "cpu"}])
def test_one_device(folder: Path, device_map) -> None:
    assert load(folder, device_map=device_map).device.type == "cpu"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device_map": "auto"}, "one, such as device_map='cuda'"),
        ({"device_map": {"model.vision": "cpu", "model.blocks": "meta"}}, "2 devices"),
        ({"dtype": "float16"}, "float32 or bfloat16"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
        ({"variant": "fp16"}, "variant"),
        ({"output_loading_info": True}, "output_loading_info"),
        ({"no_such_option": 1}, "no_such_option"),
    ],
)
def test_loading_that_is_not_supported_is_refused(folder: Path, options: dict, words: str) -> None:
    with pytest.raises(ValueError) as error:
        load(folder, **options)
    assert words in one_line(error.value)


def test_config_of_another_model_is_refused(folder: Path, core: Model) -> None:
    other = hf.InfiniteVLConfig.of(replace(core.config, stop_tokens=(1, 2)))
    with pytest.raises(ValueError, match="differs"):
        load(folder, config=other)


def test_damaged_folder_is_one_line(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(weights.CheckpointError) as error:
        load(tmp_path)
    assert "missing model.norm.weight" in one_line(error.value)


def test_hub_without_network_is_one_line(tmp_path: Path) -> None:
    for revision in ({}, {"revision": "0123"}):
        with pytest.raises(weights.CheckpointError) as error:
            hf.InfiniteVLForConditionalGeneration.from_pretrained(
                "nobody/nothing", local_files_only=True, cache_dir=str(tmp_path), **revision
            )
        assert "folder" in one_line(error.value)


@pytest.mark.parametrize("tied", [True, False])
def test_save_pretrained_is_read_by_both_doors(processor, tmp_path: Path, tied: bool) -> None:
    core = drawn(tiny_config(processor, tied_head=tied), processor)
    model = hf.InfiniteVLForConditionalGeneration(hf.InfiniteVLConfig.of(core.config), processor)
    model.model.load_state_dict(core.state_dict())
    model.generation_config.update(do_sample=True, temperature=0.5)
    model.save_pretrained(tmp_path)
    assert_same(core, infinitevl.load(tmp_path))
    assert_same(core, load(tmp_path).model)
    assert load(tmp_path).generation_config.temperature == 0.5
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "model.layers.0.self_attn.q_proj.weight" in names and "visual.patch_embed.proj.weight" in names
    assert ("lm_head.weight" in names) is not tied
    assert (model.get_output_embeddings() is None) is tied


def test_save_pretrained_in_shards_and_from_a_state_dict(core: Model, model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    assert_same(core, load(tmp_path).model)
    doubled = {name: value * 2 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=doubled)
    again = load(tmp_path).model
    assert torch.equal(again.blocks[1].mixer.A_log, core.blocks[1].mixer.A_log * 2)
    assert_same(core, model.model)


def test_save_pretrained_refuses_what_it_cannot_do(model, tmp_path: Path) -> None:
    for options in ({"push_to_hub": True}, {"variant": "x"}, {"max_shard_size": "big"}):
        with pytest.raises(ValueError) as error:
            model.save_pretrained(tmp_path / "new", **options)
        assert next(iter(options)) in one_line(error.value)
    model.save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


def test_a_made_model_learns_its_processor(core: Model, tmp_path: Path) -> None:
    torch.manual_seed(5)
    bare = AutoModelForImageTextToText.from_config(hf.InfiniteVLConfig.of(core.config))
    torch.manual_seed(5)
    assert_same(bare.model, Model(core.config))  # drawn by the core alone
    with pytest.raises(ValueError, match="no processor"):
        bare.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    made = AutoModelForImageTextToText.from_config(hf.InfiniteVLConfig.of(core.config), processor=core.processor)
    made.save_pretrained(tmp_path)
    assert_same(made.model, infinitevl.load(tmp_path))


def test_embeddings_and_what_is_refused_of_a_model(core: Model, model) -> None:
    assert model.get_input_embeddings() is model.model.embedding
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        model.resize_token_embeddings(600)
    with pytest.raises(ValueError, match="does not support"):
        model.gradient_checkpointing_enable()


def test_pipeline(folder: Path) -> None:
    from PIL import Image
    from transformers import pipeline

    ask = pipeline("image-text-to-text", model=str(folder))
    image = Image.fromarray(picture(40, 60).numpy())
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what is this?"}]
    (answer,) = ask(text=[{"role": "user", "content": content}], max_new_tokens=3, return_full_text=False)
    assert isinstance(answer["generated_text"], str)
