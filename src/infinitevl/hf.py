"""chat and pictures as transformers spells them -> `Model` and `Memory` -> its outputs: the edge to transformers.

    import infinitevl.hf

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=64)

The body is the package's own `Model`, as the submodule `model` with its own names, and the folders are those of
`infinitevl.load` and `infinitevl.save`. `generate` answers one prompt within the fixed memory; streams that go on are
fed with `infinitevl.Stream`. For LoRA: `LoraConfig(target_modules=LORA_TARGETS)`.
Letters: B rows, T tokens, D hidden size, N visual tokens.
"""

# mypy: disable-error-code="override"
# (transformers' signatures are wider than what is supported here, and change from release to release)

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.configuration_utils import PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.image_utils import load_image
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import ProcessorMixin
from transformers.utils.generic import ModelOutput

from infinitevl import processor as pictures
from infinitevl import rope, video, weights
from infinitevl.config import ModelConfig, config_from_json, config_to_json, infinitevl_4b
from infinitevl.memory import Memory
from infinitevl.model import Model
from infinitevl.processor import PADS, QWEN_TEMPLATE, Processor, load_processor, save_processor
from infinitevl.rope import Grid

# The language model's projections, and not those of the vision encoder, whose blocks have an mlp too. The gates a and b
# are 16 numbers wide and stay as they are.
LORA_TARGETS = r"model\.blocks\.\d+\.(mixer\.[qkvgo]|mlp\.(gate|up|down))"

IGNORED_LABEL = -100
PREFILL = 1024  # tokens of a prompt that go through the memory at once: any number gives the same result
_PICTURES = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
# Keys of a config that transformers keeps itself.
_BASE_KEYS = ("name_or_path", "_commit_hash", "dtype", "torch_dtype", "architectures")
_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_NOT_WITH_A_MEMORY = ("cache_implementation", "prefill_chunk_size", "output_attentions", "output_hidden_states")
# Arguments of from_pretrained that say what is done anyway, or name what the core decides (attention: infinitevl.ops).
_WITHOUT_EFFECT = {
    *("trust_remote_code", "use_safetensors", "weights_only", "low_cpu_mem_usage", "attn_implementation"),
    *("_from_auto", "_from_pipeline", "_commit_hash", "user_agent", "use_fast"),
}


# -- configuration ----------------------------------------------------------------------------------------------------


class InfiniteVLConfig(PreTrainedConfig):
    """config.json of a checkpoint, flat or nested, as `model`: the package's own frozen ModelConfig.

    Without arguments, the published 4B model. An unknown key raises ConfigError naming it. What transformers and peft
    ask for by name is derived from `model` and cannot be set: change the ModelConfig instead.
    """

    model_type = "infinite_vl"

    def __init__(self, **content: Any) -> None:
        own = {key: content.pop(key) for key in _BASE_KEYS if key in content}
        self.model = config_from_json({"model_type": self.model_type, **content}) if content else infinitevl_4b()
        super().__init__(**own)
        self.bos_token_id = None
        self.eos_token_id = list(self.model.stop_tokens)
        self.pad_token_id = self.model.stop_tokens[-1]

    @classmethod
    def of(cls, model: ModelConfig) -> InfiniteVLConfig:
        """The configuration of a ModelConfig."""
        return cls(**config_to_json(model))

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        dtype = {} if self.dtype is None else {"dtype": str(self.dtype).removeprefix("torch.")}
        return config_to_json(self.model) | dtype

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: a config.json says everything."""
        return self.to_dict()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InfiniteVLConfig) and (self.model, self.dtype) == (other.model, other.dtype)

    @property
    def vocab_size(self) -> int:
        return self.model.text.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.model.text.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return len(self.model.text.layers)

    @property
    def num_attention_heads(self) -> int:
        return self.model.text.num_heads

    @property
    def num_key_value_heads(self) -> int:
        return self.model.text.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.model.text.head_dim

    @property
    def tie_word_embeddings(self) -> bool:
        return self.model.text.tied_head

    @property
    def image_token_id(self) -> int:
        return self.model.image_token

    @property
    def video_token_id(self) -> int:
        return self.model.video_token


# -- model ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryCache:
    """A Memory where transformers expects its cache: a value, given to `forward` and returned anew.

    length: columns of ids fed so far, padding included. The memory given is consumed; clone it to keep it.
    """

    memory: Memory
    length: int = 0
    # what generate() asks a cache of its own
    is_compileable = False
    is_croppable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far; every layer has seen the same."""
        return self.length


@dataclass
class Output(ModelOutput):
    """What `forward` returns; also read by position, without what is None.

    loss: mean cross-entropy, float32, where labels were given. logits [B, T, vocab]. past_key_values: with use_cache.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: MemoryCache | None = None


class InfiniteVLForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The package's Model behind transformers' interface. `model` is that Model; parameters keep its names."""

    config_class = InfiniteVLConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "video", "text"]
    _no_split_modules = ["Block", "VisionBlock"]
    _is_stateful = True  # no assisted decoding: a memory cannot go back

    def __init__(self, config: InfiniteVLConfig, processor: Processor | None = None) -> None:
        super().__init__(config)
        self.model = Model(config.model, processor)
        self.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: Model has drawn its weights itself."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: InfiniteVLConfig | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        **options: Any,
    ) -> InfiniteVLForConditionalGeneration:
        """A model from a checkpoint's folder or hub id, in evaluation mode.

        dtype: float32 or bfloat16; None or "auto": what config.json says. device_map: one device ("cuda", "cuda:1", 0,
        {"": "cpu"}); None: the CPU. Other options of transformers are refused by name. Raises CheckpointError,
        ConfigError or ValueError, each in one line.
        """
        folder = _folder(pretrained_model_name_or_path, options)
        _refuse_adapter_folder(options.pop("adapter_kwargs", None) or {})
        _refuse("from_pretrained", {key: value for key, value in options.items() if key not in _WITHOUT_EFFECT})
        config = copy.deepcopy(config) or InfiniteVLConfig.from_pretrained(folder)
        body = weights.load(folder, _device(device_map), _dtype(torch_dtype if dtype is None else dtype, config))
        if config.model != body.config:
            raise ValueError(f"config: it differs from {folder / 'config.json'}, which the weights there belong to")
        config.dtype = body.dtype
        config.name_or_path = str(pretrained_model_name_or_path)
        with torch.device("meta"):
            model = cls(config)
        model.model = body
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
            model.generation_config.use_cache = True  # published files carry the setting that training had
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "4GB",
        **options: Any,
    ) -> None:
        """Write the folder that `infinitevl.load` and `from_pretrained` read: published names, a tied head absent.

        state_dict: weights under this class's names, gathered by who shards them. Adapters are refused: peft saves
        them, and `merge_and_unload()` makes one model of both. ValueError before anything is written.
        """
        _refuse("save_pretrained", {"push_to_hub": push_to_hub, **options})
        if not is_main_process:
            return
        body = self.model if state_dict is None else self._with(state_dict)
        _refuse_unsaveable(body)
        shard_bytes = _bytes(max_shard_size)
        self.generation_config.save_pretrained(save_directory)  # checks itself before it writes
        weights.save(body, Path(save_directory), shard_bytes)

    def _with(self, state_dict: dict[str, Tensor]) -> Model:
        """A model of the same kind with weights under this class's names."""
        with torch.device("meta"):
            body = Model(self.model.config, self.model.processor)
        body.load_state_dict({name.removeprefix("model."): value for name, value in state_dict.items()}, assign=True)
        return body

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Linear | None:
        """The head; None where it is tied."""
        return self.model.head

    def resize_token_embeddings(self, *arguments: Any, **options: Any) -> nn.Embedding:
        """Refused: the vocabulary's size is part of the frozen config."""
        raise ValueError("resize_token_embeddings is not supported: make a ModelConfig with another vocab_size instead")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | Sequence[float] | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Output | tuple[Any, ...]:
        """Logits [B, T, vocab] of a prompt, or of what continues one.

        input_ids [B, T] with one image or video token for each visual token, or inputs_embeds [B, T, D] of text.
        attention_mask [B, T], 0 where a token is not there (at either end); with a past also [B, past + T].
        position_ids [3, B, T]; None: the trained rule. pixel_values, pixel_values_videos: the patches of all images, of
        all videos, [N * merge^2, 1176], in the order of their places; their grids [pictures, 3] count patches (time,
        rows, columns). second_per_grid_ts: seconds per temporal grid of each video, None: 1.
        labels [B, T]: the mean cross-entropy of each token given those before it; -100 is left out.
        past_key_values: what came before, consumed; use_cache=True: start one. logits_to_keep: only the last ones.
        Raises ValueError where these do not fit each other.
        """
        _refuse("forward", {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states})
        images, videos = _grids(image_grid_thw, None), _grids(video_grid_thw, second_per_grid_ts)
        seen = self._look(pixel_values, images, "pixel_values, image_grid_thw")
        shown = self._look(pixel_values_videos, videos, "pixel_values_videos, video_grid_thw")
        hidden = self._embed(input_ids, inputs_embeds, seen, shown)
        cache = self._begin(past_key_values, bool(use_cache), hidden.shape[0])
        present = _present(attention_mask, hidden.shape, 0 if cache is None else cache.length)
        if position_ids is None:
            position_ids = self._positions(input_ids, hidden.shape, images, videos, present, cache)
        elif position_ids.shape != (3, *hidden.shape[:2]):
            raise ValueError(f"position_ids must be {[3, *hidden.shape[:2]]}, got {list(position_ids.shape)}")
        hidden, cache = self._run(hidden, position_ids, present, cache)
        logits = self.model.logits(hidden[:, -logits_to_keep:])
        loss = None if labels is None else _loss(logits, labels)
        output = Output(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    def _look(self, patches: Tensor | None, grids: list[Grid], names: str) -> Tensor | None:
        """Visual tokens [N, D] of pictures one after the other."""
        sizes = [grid.time * grid.rows * grid.columns for grid in grids]
        given = 0 if patches is None else len(patches)
        if sum(sizes) != given:
            raise ValueError(f"{names}: {given} patches were given, the grids want {sum(sizes)}")
        if patches is None:
            return None
        tokens = []
        for grid, part in zip(grids, patches.split(sizes), strict=True):
            tokens.append(self.model.vision(part.unflatten(0, (grid.time, -1)), grid.rows, grid.columns).flatten(0, 1))
        return torch.cat(tokens)

    def _embed(
        self, ids: Tensor | None, embedded: Tensor | None, images: Tensor | None, videos: Tensor | None
    ) -> Tensor:
        """[B, T, D], visual tokens in their places."""
        if (ids is None) == (embedded is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        if embedded is not None:
            if images is not None or videos is not None:
                raise ValueError("pictures need their places in input_ids; inputs_embeds are for text")
            return embedded
        assert ids is not None
        return self.model.embed(ids, self._in_order(ids, images, videos))

    def _in_order(self, ids: Tensor, images: Tensor | None, videos: Tensor | None) -> Tensor | None:
        """Visual tokens of images [M, D] and of videos [N, D] as [M + N, D] in the order of their places in ids."""
        if images is None and videos is None:
            return None
        is_image, is_video = ids == self.config.image_token_id, ids == self.config.video_token_id
        for kind, place, tokens in (("image", is_image, images), ("video", is_video, videos)):
            given = 0 if tokens is None else len(tokens)
            if int(place.sum()) != given:
                raise ValueError(f"input_ids have {int(place.sum())} {kind} tokens, the {kind}s given make {given}")
        order = is_video[is_image | is_video].long().argsort(stable=True)  # places of images, then places of videos
        return torch.cat([tokens for tokens in (images, videos) if tokens is not None])[order.argsort()]

    def _begin(self, cache: MemoryCache | None, wanted: bool, rows: int) -> MemoryCache | None:
        """The cache given, or an empty one where wanted. What was fed before ends a run of frames."""
        if cache is None:
            return MemoryCache(self.model.empty_memory(rows)) if wanted else None
        if not isinstance(cache, MemoryCache):
            raise ValueError(
                f"past_key_values must be a MemoryCache, got {type(cache).__name__}: pass what forward gave"
            )
        if len(cache.memory.seen) != rows:
            raise ValueError(f"past_key_values has {len(cache.memory.seen)} rows, this batch {rows}")
        memory = cache.memory
        return MemoryCache(memory._replace(start=torch.full_like(memory.start, torch.nan)), cache.length)

    def _positions(
        self,
        ids: Tensor | None,
        shape: torch.Size,
        images: list[Grid],
        videos: list[Grid],
        present: Tensor | None,
        cache: MemoryCache | None,
    ) -> Tensor:
        """mRoPE positions [3, B, T]: the prompt's rule, shifted behind what came before.

        A continuation without pictures is text, whatever its ids: a sampled id may be that of a picture.
        """
        begins = cache is None or cache.length == 0
        if ids is not None and (begins or images or videos):
            positions = rope.prompt(ids, images, videos, self.model.config, present)
        else:
            there = torch.ones(shape[:2], dtype=torch.bool, device=self.model.device) if present is None else present
            positions = (there.long().cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
        return positions if cache is None else positions + cache.memory.clock[None, :, None]

    def _run(
        self, hidden: Tensor, positions: Tensor, present: Tensor | None, cache: MemoryCache | None
    ) -> tuple[Tensor, MemoryCache | None]:
        """Through the blocks: in one pass, or where there is a memory, in chunks through it."""
        if cache is None:
            return self.model(hidden, positions, present=present)[0], None
        memory, outputs = cache.memory, []
        for at in range(0, hidden.shape[1], PREFILL):
            part = slice(at, at + PREFILL)
            here = None if present is None else present[:, part]
            output, memory = self.model(hidden[:, part], positions[:, :, part], memory, here)
            outputs.append(output)
        return torch.cat(outputs, dim=1), MemoryCache(memory, cache.length + hidden.shape[1])

    # What follows are the places where generate() asks a model how it is fed.

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: MemoryCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The whole prompt first, then the latest token and nothing else: the memory has the rest."""
        common = {"past_key_values": past_key_values, "use_cache": True, "logits_to_keep": 1}
        if not is_first_iteration:
            return common | {"input_ids": input_ids[:, -1:]}
        prompt = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        given = {key: kwargs.get(key) for key in ("position_ids", *_PICTURES)}
        return common | prompt | given | {"attention_mask": attention_mask}

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> None:
        """None: forward has the rule, and generate() would count tokens."""

    def _validate_generation_mode(
        self,
        generation_mode: GenerationMode,
        generation_config: GenerationConfig,
        generation_mode_kwargs: dict[str, Any],
    ) -> None:
        """Refuses beams, assistants and other ways that go back to an earlier state."""
        if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            mode = str(generation_mode.value).replace("_", " ")
            raise ValueError(f"generate: {mode} is not supported: a memory only goes forward; use greedy or sampling")

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """An empty memory. What does not go with one is refused here, where all settings are known."""
        _refuse("generate", {key: getattr(generation_config, key, None) for key in _NOT_WITH_A_MEMORY})
        if generation_config.use_cache is False:
            raise ValueError("generate: use_cache=False is not supported: the memory has a fixed size; leave it out")
        if model_kwargs.get("past_key_values") is not None:
            raise ValueError(
                "generate: past_key_values are not supported: give the whole prompt, or feed a stream with "
                "infinitevl.Stream"
            )
        capacity = max_cache_length + 1 if self.model.config.text.window is None else None
        model_kwargs["past_key_values"] = MemoryCache(self.model.empty_memory(batch_size, capacity))

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Refuses more than one answer to a row: pictures belong to the batch and cannot be repeated row by row."""
        if expand_size != 1:
            raise ValueError(
                f"generate: {expand_size} sequences for a row are not supported: repeat the row in the batch"
            )
        return input_ids, model_kwargs

    def generate_batch(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Refused: continuous batching pages keys and values, of which there are none."""
        raise ValueError("generate_batch is not supported: a memory is not paged; give generate() a left-padded batch")


def _grids(grids: Tensor | None, seconds: Tensor | Sequence[float] | None) -> list[Grid]:
    """grids [pictures, 3] and seconds per temporal grid as `rope` takes them. Qwen2.5-VL's default is a second."""
    sizes = [] if grids is None else grids.tolist()
    times = [1.0] * len(sizes) if seconds is None else [float(second) for second in seconds]
    if len(times) != len(sizes):
        raise ValueError(f"second_per_grid_ts has {len(times)} entries for {len(sizes)} videos")
    return [Grid(time, rows, columns, s) for (time, rows, columns), s in zip(sizes, times, strict=True)]


def _present(mask: Tensor | None, shape: torch.Size, past: int) -> Tensor | None:
    """bool [B, T] of the tokens that are there, from a mask of them or of them and all before."""
    if mask is None:
        return None
    rows, length = shape[:2]
    if mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] not in (length, past + length):
        raise ValueError(f"attention_mask must be {[rows, length]}, got {list(mask.shape)}")
    return mask[:, -length:].bool()


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in float32 of labels [B, T], each predicted by the logits [B, T, vocab] one token before."""
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels must be {list(logits.shape[:2])} like the logits, got {list(labels.shape)}")
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL)


# -- options ----------------------------------------------------------------------------------------------------------


def _refuse(where: str, options: dict[str, Any]) -> None:
    """ValueError naming the first option that asks for something."""
    for name, value in options.items():
        if value is not None and value is not False and value != {} and value != "":
            raise ValueError(f"{where}: {name}={value!r} is not supported; leave it out")


def _refuse_unsaveable(body: Model) -> None:
    """ValueError where there is no processor to save, or an adapter between the model's own parts."""
    _ = body.processor
    for name, _ in body.named_parameters():
        try:
            weights.disk_name(name)
        except KeyError:
            raise ValueError(
                f"save_pretrained: {name} belongs to an adapter: save it with peft, or merge_and_unload() first"
            ) from None


def _refuse_adapter_folder(adapter: dict[str, Any]) -> None:
    """Auto classes load the base model of a folder that holds an adapter, and expect the adapter on top."""
    if path := adapter.get("_adapter_model_path"):
        raise ValueError(
            f"{path} holds an adapter: load its base model, then peft.PeftModel.from_pretrained(model, ...)"
        )


def _folder(where: str | os.PathLike[str], options: dict[str, Any]) -> Path:
    """The local folder of a checkpoint; takes the hub's settings out of `options`."""
    given = {key: options.pop(key) for key in _HUB if key in options}
    given = {key: value for key, value in given.items() if value not in (None, False)}
    if not given or Path(where).expanduser().is_dir():
        return weights.locate(where if isinstance(where, str) else Path(where))
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(where), ignore_patterns=["*.py", "*.bin", "*.pt", "*.pth"], **given))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise weights.CheckpointError(
            f"{where}: it cannot be had from the hub ({reason}); give a local folder"
        ) from None


def _device(device_map: Any) -> torch.device:
    """The one device of a device_map."""
    if isinstance(device_map, dict):
        places = set(device_map.values())
        if len(places) != 1:
            raise ValueError(f"device_map names {len(places)} devices, but a model lives on one: device_map='cuda'")
        device_map = places.pop()
    if device_map is None:
        return torch.device("cpu")
    try:
        return torch.device(device_map)
    except RuntimeError:
        raise ValueError(f"device_map={device_map!r} is not a device; give one, such as device_map='cuda'") from None


def _dtype(dtype: str | torch.dtype | None, config: InfiniteVLConfig) -> torch.dtype | None:
    """float32 or bfloat16; None where neither the caller nor config.json says."""
    wanted = config.dtype if dtype is None or dtype == "auto" else dtype
    if isinstance(wanted, str):
        wanted = getattr(torch, wanted, wanted)
    if wanted not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"dtype must be float32 or bfloat16, got {wanted}")
    return wanted


def _bytes(size: int | str) -> int:
    """max_shard_size in bytes: a number, or digits and a unit such as "5GB"."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)B", size.strip().upper())
    if match is None:
        raise ValueError(f"max_shard_size must be a number of bytes or such as '5GB', got {size!r}")
    return int(match[1]) * 1000 ** " KMGT".index(match[2] or " ")


# -- processor --------------------------------------------------------------------------------------------------------


class InfiniteVLProcessor(ProcessorMixin):
    """Text, images and videos -> what `forward` takes, with the package's own Processor (`.processor`).

    An image is a path, an address, a PIL image or uint8 [height, width, 3]; a video a path or address, uint8 [frames,
    height, width, 3] or a list of images. Needs no torchvision.
    """

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.chat_template = processor.tokenizer.chat_template or QWEN_TEMPLATE

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> InfiniteVLProcessor:
        """The processor of a checkpoint's folder or hub id. Raises ConfigError or CheckpointError in one line."""
        folder = _folder(pretrained_model_name_or_path, options)
        without_effect = _WITHOUT_EFFECT | {"dtype", "torch_dtype", "device_map"}  # pipelines pass the model's
        _refuse("from_pretrained", {key: value for key, value in options.items() if key not in without_effect})
        return cls(load_processor(folder))

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **options: Any
    ) -> None:
        """Write tokenizer files and preprocessor_config.json."""
        _refuse("save_pretrained", {"push_to_hub": push_to_hub, **options})
        save_processor(self.processor, Path(save_directory))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.processor.config}, {type(self.tokenizer).__name__})"

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        *,
        fps: float | None = None,
        padding: bool | str = True,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """input_ids and attention_mask [B, T], padded on the left, and the pictures' patches and grids.

        text: one prompt or several, with one <|image_pad|> or <|video_pad|> where each picture belongs; images and
        videos in that order (lists of lists, one for each prompt, are joined). fps: frames a second at which videos are
        sampled from files, or were by who gives frames; None: the checkpoint's rate.
        Raises ValueError where places and pictures differ in number.
        """
        _check_layout(padding, return_tensors)
        config = self.processor.config
        fps = config.frames_per_second if fps is None else fps
        seen = [self._patches(_image(image)[None], pair=False) for image in _flat(images, _is_image)]
        shown = [self._patches(_clip(clip, fps), pair=True) for clip in _flat(videos, _is_video)]
        prompts = [text] if isinstance(text, str) else list(text or ())
        data = self._batch(self._fill(prompts, {"image": seen, "video": shown}))
        data |= _stacked(seen, "pixel_values", "image_grid_thw")
        data |= _stacked(shown, "pixel_values_videos", "video_grid_thw")
        if shown:
            # plain numbers: a cast of all floats to bfloat16 would round them
            data["second_per_grid_ts"] = [config.temporal_patch_size / fps] * len(shown)
        return BatchFeature(data)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        fps: float | None = None,
        processor_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """A conversation, or a list of them, as text; with tokenize=True as ids, with return_dict=True as all inputs.

        A message's content is text or a list of parts: {"type": "text", "text": ...}, {"type": "image", "image": ...}
        and {"type": "video", "video": ...}, where "url" and "path" are read as well.
        """
        several = not (isinstance(conversation[0], dict) or hasattr(conversation[0], "role"))
        conversations = list(conversation) if several else [conversation]
        prompts = self.tokenizer.apply_chat_template(
            conversations,
            chat_template=chat_template or self.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        if not tokenize:
            return prompts if several else prompts[0]
        options = {"padding": padding, "return_tensors": return_tensors, "fps": fps, **(processor_kwargs or {})}
        images, videos = (list(_shown(conversations, kind)) for kind in ("image", "video"))
        inputs = self(images=images, text=prompts, videos=videos, **options)
        return inputs if return_dict else inputs["input_ids"]

    def _patches(self, pixels: Tensor, pair: bool) -> tuple[Tensor, Grid]:
        """uint8 [F, h, w, 3] -> patches [G * P, 1176] and their grid."""
        config = self.processor.config
        frames, height, width, _ = pixels.shape
        size = pictures.fit_video(frames, height, width, config) if pair else pictures.fit(height, width, config)
        patches, (rows, columns) = pictures.patchify(pictures.resize(pixels, size), config, pair=pair)
        return patches.flatten(0, 1), Grid(len(patches), rows, columns)

    def _fill(self, prompts: list[str], shown: dict[str, list[tuple[Tensor, Grid]]]) -> list[str]:
        """Prompts with each picture's one pad repeated for each of its visual tokens."""
        merge = self.processor.config.merge_size
        counts = {
            PADS[kind]: iter([grid.time * grid.rows * grid.columns // merge**2 for _, grid in parts])
            for kind, parts in shown.items()
        }

        def pads(place: re.Match[str]) -> str:
            count = next(counts[place[0]], None)
            if count is None:
                raise ValueError(f"the text has more {place[0]} than there are pictures for")
            return place[0] * count

        filled = [re.sub("|".join(map(re.escape, counts)), pads, prompt) for prompt in prompts]
        for pad, left in counts.items():
            if next(left, None) is not None:
                raise ValueError(f"more pictures were given than the text has {pad} for")
        return filled

    def _batch(self, prompts: list[str]) -> dict[str, Any]:
        """input_ids and attention_mask [B, T], padded on the left."""
        if not prompts:
            return {}
        rows = [self.tokenizer.encode(p, add_special_tokens=False, split_special_tokens=False) for p in prompts]
        length, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        if pad is None and any(len(row) < length for row in rows):
            raise ValueError("prompts of different lengths need a pad_token: the tokenizer has none")
        return {
            "input_ids": torch.tensor([[pad] * (length - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        }


def _check_layout(padding: bool | str, return_tensors: str | None) -> None:
    if padding not in (True, False, "longest"):
        raise ValueError(f"padding={padding!r} is not supported: prompts are padded on the left to the longest of them")
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors={return_tensors!r} is not supported; only 'pt' is")


def _stacked(parts: list[tuple[Tensor, Grid]], patches: str, grids: str) -> dict[str, Tensor]:
    """Patches and grids of pictures under their names; nothing where there are none."""
    if not parts:
        return {}
    sizes = [[grid.time, grid.rows, grid.columns] for _, grid in parts]
    return {patches: torch.cat([part for part, _ in parts]), grids: torch.tensor(sizes)}


def _is_image(value: Any) -> bool:
    return not isinstance(value, list | tuple) and getattr(value, "ndim", 3) == 3


def _is_video(value: Any) -> bool:
    """A path, pixels, or a list of pictures that are not paths: those would be videos of their own."""
    if isinstance(value, list | tuple):
        return bool(value) and not isinstance(value[0], str | os.PathLike) and _is_image(value[0])
    return True


def _flat(values: Any, is_one: Callable[[Any], bool]) -> Iterator[Any]:
    """The pictures in a picture, a list of them, or lists of lists; None is none."""
    if values is None:
        return
    if is_one(values):
        yield values
        return
    for value in values:
        yield from _flat(value, is_one)


def _image(image: Any) -> Tensor:
    """Pixels uint8 [height, width, 3] of a picture."""
    if isinstance(image, os.PathLike):
        image = os.fspath(image)
    pixels = image if isinstance(image, Tensor | np.ndarray) else np.array(load_image(image))
    pixels = torch.as_tensor(pixels)
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels must be uint8 [height, width, 3], got {pixels.dtype} {list(pixels.shape)}")
    return pixels


def _clip(clip: Any, fps: float) -> Tensor:
    """Pixels uint8 [frames, height, width, 3] of a video, files sampled at `fps`."""
    if isinstance(clip, str | os.PathLike):
        with video.frames(os.fspath(clip), fps=fps) as source:
            if source.live:
                raise ValueError(f"{source.name}: a live source has no end; watch it with infinitevl.Stream")
            clip = [frame.pixels for frame in source]
    return torch.stack([_image(frame) for frame in clip])


def _shown(conversations: Iterable[Any], kind: str) -> Iterator[Any]:
    """The pictures of a kind in the order in which conversations show them."""
    for part in _parts(conversations):
        if part.get("type", kind if kind in part else None) not in (kind, f"{kind}_url"):
            continue
        picture = next((part[key] for key in (kind, f"{kind}_url", "url", "path") if part.get(key) is not None), None)
        if picture is None:
            raise ValueError(f"a part of type {kind!r} shows nothing: give it {{'type': {kind!r}, {kind!r}: ...}}")
        yield picture["url"] if isinstance(picture, dict) else picture


def _parts(conversations: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Every part of every message whose content is a list."""
    for conversation in conversations:
        for message in conversation:
            if not isinstance(message["content"], str):
                yield from message["content"]


# -- Auto classes -----------------------------------------------------------------------------------------------------


def _register() -> None:
    AutoConfig.register(InfiniteVLConfig.model_type, InfiniteVLConfig, exist_ok=True)
    AutoModelForImageTextToText.register(InfiniteVLConfig, InfiniteVLForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(InfiniteVLConfig, InfiniteVLProcessor, exist_ok=True)


def _own_processor_first(others: Callable[..., Any]) -> Callable[..., Any]:
    """AutoProcessor.from_pretrained for which a folder's model_type comes before a processor_class named in it.

    Published files name Qwen2_5_VLProcessor, which needs torchvision, and transformers would go by that name before it
    looks at what is registered. For any other model_type `others` is called as ever.
    """

    def from_pretrained(pretrained_model_name_or_path: Any, **options: Any) -> Any:
        hub = {key: options[key] for key in _HUB if key in options}
        try:
            content, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub)
        except (OSError, ValueError):  # no config.json to go by
            content = {}
        if content.get("model_type") == InfiniteVLConfig.model_type:
            return InfiniteVLProcessor.from_pretrained(pretrained_model_name_or_path, **options)
        return others(pretrained_model_name_or_path, **options)

    return from_pretrained


_register()
_OTHERS = AutoProcessor.from_pretrained
AutoProcessor.from_pretrained = staticmethod(_own_processor_first(_OTHERS))  # type: ignore[method-assign]
