"""A tiny random model with the default checkpoint's tokenizer, and the folder it is saved to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import infinitevl.hf as hf
from infinitevl import rope, weights
from infinitevl.config import ModelConfig, TextConfig, VisionConfig, hybrid
from infinitevl.model import Model
from infinitevl.processor import Processor, load_processor

WINDOW = 24  # tokens: two small pictures and a question overflow it


def tiny_config(processor: Processor, **text: object) -> ModelConfig:
    """A model small enough for tests, with the tokens of the tokenizer."""
    token = processor.tokenizer.convert_tokens_to_ids
    sizes: dict = {
        "layers": hybrid(1),
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "window": WINDOW,
        "mrope_sections": (2, 3, 3),
        "delta_heads": 2,
        "delta_key_dim": 16,
        "delta_value_dim": 32,
    }
    vision = VisionConfig(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=48, full_attention_blocks=(1,)
    )
    return ModelConfig(
        vision,
        TextConfig(**(sizes | text)),
        image_token=token("<|image_pad|>"),
        video_token=token("<|video_pad|>"),
        vision_start_token=token("<|vision_start|>"),
        vision_end_token=token("<|vision_end|>"),
        stop_tokens=(token("<|im_end|>"), token("<|endoftext|>")),
    )


def drawn(config: ModelConfig, processor: Processor) -> Model:
    """Random weights, in which every parameter tells: none is all zeros, ones, or small."""
    generator = torch.Generator().manual_seed(1)
    model = Model(config, processor).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.25)
    return model


@pytest.fixture(scope="session")
def processor() -> Processor:
    return load_processor(weights.locate("tiny"))


@pytest.fixture(scope="session")
def core(processor: Processor) -> Model:
    return drawn(tiny_config(processor), processor)


@pytest.fixture(scope="session")
def folder(core: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    weights.save(core, path)
    return path


@pytest.fixture
def model(folder: Path) -> hf.InfiniteVLForConditionalGeneration:
    """Fresh for every test: tests train it."""
    return hf.InfiniteVLForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="session")
def edge(processor: Processor) -> hf.InfiniteVLProcessor:
    return hf.InfiniteVLProcessor(processor)


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def clip(frames: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.stack([picture(height, width, seed * 100 + n) for n in range(frames)])


def looked(core: Model, patches: Tensor | None, grids: Tensor | None) -> list[Tensor]:
    """Visual tokens of each picture, by hand."""
    if patches is None or grids is None:
        return []
    parts = patches.split([int(t * h * w) for t, h, w in grids])
    return [
        core.vision(part.view(int(t), int(h * w), -1), int(h), int(w)).flatten(0, 1)
        for part, (t, h, w) in zip(parts, grids, strict=True)
    ]


def by_hand(core: Model, inputs: dict) -> tuple[Tensor, Tensor]:
    """Hidden [1, T, D] and positions of one row's inputs, with the core's own functions and nothing of hf."""
    ids = inputs["input_ids"]
    assert ids.shape[0] == 1 and bool(inputs["attention_mask"].all())
    images, videos = inputs.get("image_grid_thw"), inputs.get("video_grid_thw")
    tokens = {
        core.config.image_token: looked(core, inputs.get("pixel_values"), images),
        core.config.video_token: looked(core, inputs.get("pixel_values_videos"), videos),
    }
    seconds = inputs.get("second_per_grid_ts") or []
    still = [rope.Grid(*map(int, grid)) for grid in (images if images is not None else [])]
    moving = [rope.Grid(*map(int, g), s) for g, s in zip(videos if videos is not None else [], seconds, strict=True)]
    hidden, at = core.embed(ids).clone(), 0
    while at < ids.shape[1]:
        waiting = tokens.get(int(ids[0, at]))
        if waiting:
            part = waiting.pop(0)
            hidden[0, at : at + len(part)] = part
            at += len(part)
        else:
            at += 1
    return hidden, rope.prompt(ids, still, moving, core.config)


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text and "\n" not in text and len(text) < 400
    return text
