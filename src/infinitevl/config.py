"""What a model is, as frozen data: shapes, layer pattern, special tokens, and how a checkpoint watches a stream.

Axes used in every docstring: B rows of a batch, T tokens of a chunk, D hidden size, H query heads, G key/value heads,
C channels, K key dim, V value dim, W slots of a window, F frames, P patches of a frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SOFTMAX, DELTA = "softmax", "delta"

# layer_types as other software spells them
_MIXER_OF = {
    SOFTMAX: SOFTMAX,
    DELTA: DELTA,
    "full_attention": SOFTMAX,
    "sliding_attention": SOFTMAX,
    "linear_attention": DELTA,
}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what to do."""


@dataclass(frozen=True)
class VisionConfig:
    """Qwen2.5-VL's vision encoder. Sizes in patches unless the name says pixels."""

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    out_hidden_size: int = 2048
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    window_pixels: int = 112
    full_attention_blocks: tuple[int, ...] = (7, 15, 23, 31)
    in_channels: int = 3
    tokens_per_second: int = 2
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch: channel, time, row, column."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def stride(self) -> int:
        """Pixels of a picture's side that one visual token covers; sides are multiples of it."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class TextConfig:
    """The language model: `layers` names each block's mixer, so the teacher is the same class with another pattern."""

    layers: tuple[str, ...]
    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 11008
    num_heads: int = 16
    num_kv_heads: int = 2
    head_dim: int = 128
    window: int | None = 8192  # tokens a query sees, itself included; None: all of them
    sinks: int = 0  # first tokens of a stream that stay visible for ever
    mrope_sections: tuple[int, int, int] = (16, 24, 24)
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tied_head: bool = True
    delta_heads: int = 16
    delta_key_dim: int = 128
    delta_value_dim: int = 256
    conv_size: int = 4
    delta_norm_eps: float = 1e-5
    attention_bias: bool = True  # q, k, v of the softmax mixer

    def __post_init__(self) -> None:
        unknown = sorted(set(self.layers) - {SOFTMAX, DELTA})
        if unknown:
            raise ConfigError(f"layers: unknown mixer {unknown[0]!r}; known are {SOFTMAX!r} and {DELTA!r}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if 2 * sum(self.mrope_sections) != self.head_dim:
            raise ConfigError(f"mrope_sections {self.mrope_sections} must sum to half of head_dim {self.head_dim}")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window must be at least 1 token, got {self.window}")
        if self.sinks < 0 or (self.sinks and self.window is None):
            raise ConfigError(f"sinks must be 0 or more, and 0 without a window, got {self.sinks}")

    @property
    def qkv_channels(self) -> int:
        """Channels of q, k and v of a delta mixer together: what its convolution runs over."""
        return self.delta_heads * (2 * self.delta_key_dim + self.delta_value_dim)


@dataclass(frozen=True)
class ModelConfig:
    """A whole model. Special tokens are ids of the tokenizer."""

    vision: VisionConfig
    text: TextConfig
    image_token: int = 151655
    video_token: int = 151656
    vision_start_token: int = 151652
    vision_end_token: int = 151653
    stop_tokens: tuple[int, ...] = (151645, 151643)

    def __post_init__(self) -> None:
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ConfigError(
                f"vision.out_hidden_size {self.vision.out_hidden_size} must equal text.hidden_size "
                f"{self.text.hidden_size}"
            )


@dataclass(frozen=True)
class ProcessorConfig:
    """How pictures become patches and how a stream is fed. From a checkpoint's preprocessor_config.json.

    frame_pixels: (height, width) box in pixels into which the frames of a stream are fitted.
    stamp_seconds: a short text stamp with the time is fed every so many seconds; None: never, and the model cannot
    answer "when" beyond its window.
    frames_per_second: rate at which a source is sampled where the user names none.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    frame_pixels: tuple[int, int] = (448, 448)
    stamp_seconds: float | None = None
    frames_per_second: float = 1.0


def hybrid(blocks: int, deltas: int = 3) -> tuple[str, ...]:
    """The published pattern: `blocks` times one softmax mixer and then `deltas` delta mixers."""
    return (SOFTMAX, *(DELTA,) * deltas) * blocks


def infinitevl_4b() -> ModelConfig:
    """The published InfiniteVL-4B (arXiv 2512.08829): 36 layers, softmax at 0, 4, ..., 32; 4,408,381,536 parameters."""
    return ModelConfig(VisionConfig(), TextConfig(layers=hybrid(9)))


def teacher_3b() -> ModelConfig:
    """Qwen2.5-VL-3B: the same model with 36 softmax mixers and no window."""
    return ModelConfig(VisionConfig(), TextConfig(layers=(SOFTMAX,) * 36, window=None))


def tiny(vocab_size: int = 512) -> ModelConfig:
    """The default checkpoint's shape: two hybrid blocks, frames of 112x112 in 16 tokens, a window of 15 s at 1 fps."""
    return ModelConfig(
        VisionConfig(
            depth=4,
            hidden_size=192,
            intermediate_size=416,
            num_heads=6,
            out_hidden_size=256,
            full_attention_blocks=(1, 3),
        ),
        TextConfig(
            layers=hybrid(2),
            vocab_size=vocab_size,
            hidden_size=256,
            intermediate_size=256,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            window=256,
            mrope_sections=(8, 12, 12),
            delta_heads=4,
            delta_key_dim=64,
            delta_value_dim=128,
        ),
        image_token=vocab_size - 2,
        video_token=vocab_size - 1,
        vision_start_token=vocab_size - 5,
        vision_end_token=vocab_size - 4,
        stop_tokens=(vocab_size - 12, vocab_size - 14),
    )


def tiny_processor() -> ProcessorConfig:
    """How the default checkpoint watches: 112x112 frames, a text stamp every four seconds."""
    return ProcessorConfig(min_pixels=28 * 28, max_pixels=112 * 112, frame_pixels=(112, 112), stamp_seconds=4.0)


# ---- config.json: our field -> its key there. A foreign key is used, listed as ignorable, or an error.

_VISION_KEYS = {
    "depth": "depth",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_heads",
    "out_hidden_size": "out_hidden_size",
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
    "window_pixels": "window_size",
    "full_attention_blocks": "fullatt_block_indexes",
    "in_channels": "in_channels",
    "tokens_per_second": "tokens_per_second",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
_TEXT_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "sinks": "attention_sinks",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "delta_heads": "num_linear_heads",
    "delta_key_dim": "linear_head_dim",
    "conv_size": "conv_size",
    "delta_norm_eps": "norm_eps",
    "attention_bias": "attention_bias",
}
# read by name below, not copied field by field
_TEXT_SPECIAL = {
    "num_hidden_layers",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "rope_scaling",
    "rope_parameters",
    "expand_v",
    "num_linear_key_value_heads",
    "tie_word_embeddings",
    "hidden_act",
}
_TOKEN_KEYS = {
    "image_token": "image_token_id",
    "video_token": "video_token_id",
    "vision_start_token": "vision_start_token_id",
    "vision_end_token": "vision_end_token_id",
}
_IGNORABLE = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "in_chans",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "max_position_embeddings",
    "max_window_layers",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "spatial_patch_size",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vision_token_id",
}
_MODEL_TYPES = ("infinite_vl", "qwen2_5_vl")


def config_from_json(content: dict[str, Any]) -> ModelConfig:
    """A ModelConfig from a config.json, flat or with a nested text_config, of InfiniteVL or of Qwen2.5-VL.

    Raises ConfigError naming the key where one is missing, unknown or of a value this code does not implement.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"a config is a table of keys, not a {type(content).__name__}")
    kind = content.get("model_type")
    if kind not in _MODEL_TYPES:
        raise ConfigError(f"model_type is {kind!r}; this package reads {' and '.join(_MODEL_TYPES)}")
    nested = content.get("text_config")
    outer = {key: value for key, value in content.items() if key not in ("text_config", "vision_config")}
    text = {**outer, **nested} if nested else outer
    known = {*_TEXT_KEYS.values(), *_TEXT_SPECIAL, *_TOKEN_KEYS.values(), *_IGNORABLE, "eos_token_id"}
    _refuse_unknown(text, known, "config")
    vision = content.get("vision_config")
    if not isinstance(vision, dict):
        raise ConfigError("vision_config is missing")
    vision_config = _read_vision(vision, text.get("hidden_size"))
    tokens = {ours: text[key] for ours, key in _TOKEN_KEYS.items() if key in text}
    return ModelConfig(vision_config, _read_text(text, kind), **tokens, stop_tokens=_stops(text.get("eos_token_id")))


def _stops(value: Any) -> tuple[int, ...]:
    """The published config names one end token; its chat format also ends at <|endoftext|>, two ids before."""
    if value is None:
        return ModelConfig.stop_tokens
    if isinstance(value, int):
        return (value, value - 2)
    return tuple(value)


def _refuse_unknown(content: dict[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(content) - known)
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}: remove it, or use a version that knows it")


def _take(content: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {ours: content[key] for ours, key in names.items() if content.get(key) is not None}


def _require_silu(content: dict[str, Any], where: str) -> None:
    if content.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{where}.hidden_act is {content['hidden_act']!r}; only 'silu' is implemented")


def _read_vision(content: dict[str, Any], text_size: int | None) -> VisionConfig:
    _refuse_unknown(content, {*_VISION_KEYS.values(), *_IGNORABLE, "hidden_act", "rope_parameters"}, "vision_config")
    _require_silu(content, "vision_config")
    rope = content.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") not in ("axial", "default"):
        raise ConfigError(f"vision_config.rope_parameters: type {rope['rope_type']!r} is not implemented")
    values = {"out_hidden_size": text_size} | _take(content, _VISION_KEYS) | _take(rope, {"rope_theta": "rope_theta"})
    values["full_attention_blocks"] = tuple(values.get("full_attention_blocks", VisionConfig.full_attention_blocks))
    return VisionConfig(**values)


def _read_text(content: dict[str, Any], kind: str) -> TextConfig:
    _require_silu(content, "config")
    for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        if key not in content:
            raise ConfigError(f"config: {key} is missing")
    values = _take(content, _TEXT_KEYS)
    values.setdefault("head_dim", values["hidden_size"] // values["num_heads"])
    values["layers"] = _read_layers(content, kind)
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    values["rope_theta"] = float(rope.get("rope_theta", content.get("rope_theta", TextConfig.rope_theta)))
    values["mrope_sections"] = tuple(rope.get("mrope_section", TextConfig.mrope_sections))
    if rope.get("rope_type", rope.get("type", "default")) not in ("default", "mrope"):
        raise ConfigError(f"rope_scaling: type {rope.get('rope_type', rope.get('type'))!r} is not implemented")
    values["window"] = _read_window(content, kind)
    values["tied_head"] = bool(content.get("tie_word_embeddings", kind == "infinite_vl"))
    heads = values.setdefault("delta_heads", TextConfig.delta_heads)
    if content.get("num_linear_key_value_heads", heads) != heads:
        raise ConfigError("num_linear_key_value_heads must equal num_linear_heads: delta heads cannot be grouped")
    key_dim = values.setdefault("delta_key_dim", TextConfig.delta_key_dim)
    values["delta_value_dim"] = round(key_dim * content.get("expand_v", 2))
    return TextConfig(**values)


def _read_window(content: dict[str, Any], kind: str) -> int | None:
    """Qwen2.5-VL's configs carry a window that is switched off."""
    on = content.get("use_sliding_window", kind == "infinite_vl")
    if on and kind == "qwen2_5_vl":
        raise ConfigError("use_sliding_window: a window on some of Qwen2.5-VL's layers only is not implemented")
    return content.get("sliding_window", TextConfig.window) if on else None


def _read_layers(content: dict[str, Any], kind: str) -> tuple[str, ...]:
    count = content["num_hidden_layers"]
    names = content.get("layer_types")
    if kind == "qwen2_5_vl":
        return (SOFTMAX,) * count
    if names is None:
        if count % 4:
            raise ConfigError(f"num_hidden_layers {count} is not a multiple of 4: say the pattern in layer_types")
        return hybrid(count // 4)
    unknown = sorted(set(names) - set(_MIXER_OF))
    if unknown or len(names) != count:
        raise ConfigError(f"layer_types must name {count} mixers out of {sorted(_MIXER_OF)}")
    return tuple(_MIXER_OF[name] for name in names)


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """The content of a config.json that `config_from_json` and transformers' Auto classes read back."""
    text = config.text
    if text.delta_value_dim % text.delta_key_dim:
        expand: float = text.delta_value_dim / text.delta_key_dim
    else:
        expand = text.delta_value_dim // text.delta_key_dim
    nested = {key: getattr(text, ours) for ours, key in _TEXT_KEYS.items() if ours != "rope_theta"}
    nested |= {
        "model_type": "infinite_vl_text",
        "num_hidden_layers": len(text.layers),
        "layer_types": [{SOFTMAX: "sliding_attention", DELTA: "linear_attention"}[mixer] for mixer in text.layers],
        "use_sliding_window": text.window is not None,
        "sliding_window": text.window,
        "rope_theta": text.rope_theta,
        "rope_scaling": {"mrope_section": list(text.mrope_sections), "rope_type": "default", "type": "default"},
        "num_linear_key_value_heads": text.delta_heads,
        "expand_v": expand,
        "hidden_act": "silu",
        "tie_word_embeddings": text.tied_head,
    }
    vision = {key: getattr(config.vision, ours) for ours, key in _VISION_KEYS.items()}
    vision["fullatt_block_indexes"] = list(config.vision.full_attention_blocks)
    return {
        "architectures": ["InfiniteVLQwen2_5_VLForConditionalGeneration"],
        "model_type": "infinite_vl",
        "text_config": nested,
        "vision_config": vision | {"hidden_act": "silu"},
        "eos_token_id": list(config.stop_tokens),
        "tie_word_embeddings": text.tied_head,
        **{key: getattr(config, ours) for ours, key in _TOKEN_KEYS.items()},
    }
