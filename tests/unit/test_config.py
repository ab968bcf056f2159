"""Configs: presets and their sizes, config.json in every form that is around, and what is refused by name."""

from __future__ import annotations

import copy
import json
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from infinitevl.config import (
    DELTA,
    SOFTMAX,
    ConfigError,
    ModelConfig,
    TextConfig,
    VisionConfig,
    config_from_json,
    config_to_json,
    hybrid,
    infinitevl_4b,
    teacher_3b,
    tiny,
)
from infinitevl.model import Model

# Qwen2.5-VL-3B-Instruct as published
QWEN_3B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}


def changed(content: dict, **values) -> dict:
    """A copy with keys set; `vision__key` and `text__key` reach inside, None takes a key away."""
    content = copy.deepcopy(content)
    for name, value in values.items():
        part, _, key = name.rpartition("__")
        table = content[f"{part}_config"] if part else content
        table[key] = value
        if value is None:
            del table[key]
    return content


@pytest.fixture(scope="session")
def published(shared) -> dict:
    return json.loads((shared / "golden" / "published_config.json").read_text())


# -- presets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, millions, total",
    [
        (infinitevl_4b, {"vision": 668.7, "embedding": 311.2}, 4_408_381_536),
        (teacher_3b, {"vision": 668.7, "embedding": 311.2}, 3_754_622_976),
    ],
)
def test_parameters_are_those_of_the_published_models(preset, millions, total):
    with torch.device("meta"):
        model = Model(preset())
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    for part, count in millions.items():
        assert round(sum(p.numel() for p in getattr(model, part).parameters()) / 1e6, 1) == count
    untied = replace(preset(), text=replace(preset().text, tied_head=False))
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Model(untied).parameters()) == total + 151936 * 2048


def test_the_published_pattern():
    text = infinitevl_4b().text
    assert [number for number, mixer in enumerate(text.layers) if mixer == SOFTMAX] == list(range(0, 36, 4))
    assert len(text.layers) == 36 and set(text.layers) == {SOFTMAX, DELTA}
    assert teacher_3b().text == replace(text, layers=(SOFTMAX,) * 36, window=None)
    assert hybrid(2, 1) == (SOFTMAX, DELTA) * 2


def test_configs_are_frozen():
    with pytest.raises(FrozenInstanceError):
        tiny().text.window = 3


# -- config.json ------------------------------------------------------------------------------------------------------


def test_the_published_config_is_the_preset(published):
    assert config_from_json(published) == infinitevl_4b()


def test_the_golden_config_is_read(shared):
    config = config_from_json(json.loads((shared / "golden" / "config.json").read_text()))
    assert config.text.layers == hybrid(2) and config.text.window == 24 and config.text.delta_value_dim == 64
    assert config.text.mrope_sections == (4, 6, 6) and config.image_token == 500


def test_flat_and_nested_are_the_same(published):
    outer = {"model_type", "architectures", "vision_config", "transformers_version", "auto_map"}
    outer |= {key for key in published if key.endswith("_token_id")}
    nested = {key: value for key, value in published.items() if key in outer}
    nested["text_config"] = {key: value for key, value in published.items() if key not in outer}
    nested["text_config"]["model_type"] = "infinite_vl_text"
    assert config_from_json(nested) == config_from_json(published) == infinitevl_4b()


def test_qwens_config_is_the_teacher():
    assert config_from_json(QWEN_3B) == teacher_3b()


def test_qwens_config_with_rope_parameters_is_the_teacher():
    rope = {"rope_theta": 1000000.0, "rope_type": "default", "mrope_section": [16, 24, 24]}
    assert config_from_json(changed(QWEN_3B, rope_scaling=None, rope_theta=None, rope_parameters=rope)) == teacher_3b()


def test_qwens_config_as_transformers_writes_it_is_the_teacher():
    transformers = pytest.importorskip("transformers")
    written = transformers.Qwen2_5_VLConfig(**changed(QWEN_3B, model_type=None)).to_dict()
    assert "text_config" in written and "rope_parameters" in written["text_config"]
    written["tie_word_embeddings"] = True
    assert config_from_json(json.loads(json.dumps(written))) == teacher_3b()


ODD = ModelConfig(
    VisionConfig(
        depth=3,
        hidden_size=96,
        intermediate_size=50,
        num_heads=3,
        out_hidden_size=64,
        patch_size=16,
        window_pixels=64,
        full_attention_blocks=(0, 2),
        tokens_per_second=5,
        norm_eps=1e-5,
        rope_theta=500.0,
    ),
    TextConfig(
        layers=(DELTA, SOFTMAX, DELTA),
        vocab_size=99,
        hidden_size=64,
        intermediate_size=70,
        num_heads=6,
        num_kv_heads=3,
        head_dim=20,
        window=17,
        sinks=4,
        mrope_sections=(2, 3, 5),
        rope_theta=3e4,
        norm_eps=1e-4,
        tied_head=False,
        delta_heads=3,
        delta_key_dim=11,  # 11 * (15 / 11) is less than 15
        delta_value_dim=15,
        conv_size=3,
        delta_norm_eps=1e-3,
        attention_bias=False,
    ),
    image_token=7,
    video_token=8,
    vision_start_token=9,
    vision_end_token=10,
    stop_tokens=(11, 12, 13),
)


@pytest.mark.parametrize("config", [infinitevl_4b(), teacher_3b(), tiny(), ODD], ids=["4b", "teacher", "tiny", "odd"])
def test_what_is_written_is_read_back(config):
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config


def test_every_field_of_the_odd_config_is_odd():
    """A field at its default would pass the round trip without being written."""
    for part, other in ((ODD.text, TextConfig(layers=())), (ODD.vision, VisionConfig())):
        same = {name for name, value in vars(part).items() if value == getattr(other, name)}
        assert same <= {"temporal_patch_size", "merge_size", "in_channels"}


def test_layer_types_name_the_pattern(published):
    types = ["linear_attention", "sliding_attention", "full_attention", *["linear_attention"] * 33]
    layers = config_from_json(changed(published, layer_types=types)).text.layers
    assert layers == (DELTA, SOFTMAX, SOFTMAX, *(DELTA,) * 33)


def test_a_window_that_is_switched_off_is_none(published):
    assert config_from_json(changed(published, use_sliding_window=False)).text.window is None
    assert config_from_json(changed(published, use_sliding_window=None)).text.window == 8192
    assert config_from_json(changed(published, sliding_window=None)).text.window == 8192


def test_stop_tokens(published):
    assert config_from_json(published).stop_tokens == (151645, 151643)
    assert config_from_json(changed(published, eos_token_id=[5, 6])).stop_tokens == (5, 6)
    assert config_from_json(changed(published, eos_token_id=None)).stop_tokens == (151645, 151643)
    assert config_from_json(published | {"eos_token_id": None}).stop_tokens == (151645, 151643)


@pytest.mark.parametrize(
    "values, named",
    [
        ({"num_experts": 8}, "'num_experts'"),
        ({"vision__num_position_embeddings": 8}, "'num_position_embeddings'"),
        ({"model_type": "llava"}, "'llava'"),
        ({"model_type": None}, "None"),
        ({"vision_config": None}, "vision_config is missing"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"num_hidden_layers": 35}, "35 is not a multiple of 4"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"vision__hidden_act": "quick_gelu"}, "vision_config.hidden_act is 'quick_gelu'"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [16, 24, 24]}}, "'yarn'"),
        ({"vision__rope_parameters": {"rope_type": "linear"}}, "'linear'"),
        ({"num_linear_key_value_heads": 4}, "num_linear_key_value_heads"),
        ({"layer_types": ["mamba"] * 36}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 35}, "layer_types must name 36"),
        ({"rope_scaling": {"type": "default", "mrope_section": [16, 24]}}, "mrope_sections"),
        ({"num_key_value_heads": 3}, "num_kv_heads 3"),
        ({"sliding_window": 0}, "window must be at least 1"),
        ({"vision__out_hidden_size": 100}, "out_hidden_size 100"),
        ({"model_type": "qwen2_5_vl"}, "use_sliding_window"),
        ({"attention_sinks": -1}, "sinks"),
        ({"attention_sinks": 4, "use_sliding_window": False}, "sinks"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(published, values, named):
    with pytest.raises(ConfigError) as error:
        config_from_json(changed(published, **values))
    assert named in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_key_inside_text_config_is_refused():
    content = config_to_json(tiny())
    content["text_config"]["num_experts"] = 4
    with pytest.raises(ConfigError, match="'num_experts'"):
        config_from_json(content)


def test_an_unknown_mixer_is_refused():
    with pytest.raises(ConfigError, match="'mamba'"):
        TextConfig(layers=("mamba",))
