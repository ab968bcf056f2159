"""Toy models for the training tests: a student of two delta layers and two softmax ones, and its softmax teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infinitevl import weights
from infinitevl.config import DELTA, SOFTMAX, ModelConfig, tiny
from infinitevl.model import Model
from infinitevl.processor import Processor, load_processor
from infinitevl.train import recipes
from infinitevl.train.recipes import Recipe

LAYERS = (SOFTMAX, DELTA, DELTA, SOFTMAX)
WINDOW = 40  # shorter than the conversations


def toy(layers: tuple[str, ...], window: int | None) -> ModelConfig:
    """The default checkpoint's shape, an eighth as wide."""
    small = tiny()
    vision = replace(
        small.vision,
        depth=2,
        hidden_size=32,
        intermediate_size=32,
        num_heads=2,
        out_hidden_size=32,
        full_attention_blocks=(1,),
    )
    text = replace(
        small.text,
        layers=layers,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        mrope_sections=(2, 3, 3),
        window=window,
        delta_heads=2,
        delta_key_dim=16,
        delta_value_dim=32,
    )
    return replace(small, vision=vision, text=text)


@pytest.fixture(scope="session")
def processor() -> Processor:
    return load_processor(weights.locate("tiny"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, processor: Processor) -> dict[str, str]:
    """Folders of a teacher and a student that share all but the delta mixers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints")
    teacher, student = Model(toy((SOFTMAX,) * 4, None), processor), Model(toy(LAYERS, WINDOW), processor)
    taught = dict(teacher.named_parameters())
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
        for name, parameter in student.named_parameters():
            if name in taught and taught[name].shape == parameter.shape:
                parameter.copy_(taught[name])
    for name, model in (("teacher", teacher), ("student", student)):
        weights.save(model, folder / name)
    return {"teacher": str(folder / "teacher"), "student": str(folder / "student")}


def record(question: str, answer: str, **more: object) -> dict[str, object]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve conversations in a .jsonl, some with one of two pictures."""
    folder = tmp_path_factory.mktemp("data")
    for name, size in (("a", (56, 56)), ("b", (84, 56))):
        pixels = np.random.default_rng(len(name)).integers(0, 255, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    words = "the red ring came with WHEAT and then a door was shut".split()
    records = []
    for number in range(12):
        question = " ".join(words[number % 5 : number % 5 + 3])
        if number % 3 == 0:
            picture = "ab"[number % 2]
            records.append(record(f"<image>{question}?", words[-number % 7], images=[f"{picture}.png"]))
        else:
            records.append(record(f"{question}?", " ".join(words[number % 4 :])))
    path = folder / "chat.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


@pytest.fixture
def toy_recipe(checkpoints: dict[str, str], data: Path) -> Callable[..., Recipe]:
    """A recipe of a stage at toy size, with changes."""

    def make(stage: str, **changes: object) -> Recipe:
        small: dict[str, object] = {
            "data": str(data),
            "student": checkpoints["student"],
            "teacher": checkpoints["teacher"] if stage.startswith("stage1") else "",
            "steps": 4,
            "batch": 4,
            "micro": 2,
            "length": 96,
            "lr": 3e-3,
            "workers": 0,
            "log_every": 1,
            "save_every": 100,
            "tensorboard": False,
            "lora_rank": 4 if stage == "stage3_long" else 0,
            "device": "cpu",
        }
        return replace(recipes.recipe(stage), **(small | changes))

    return make
