"""A small random model of two kinds of layers, and CUDA's graphs replaced by the steps themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from infinitevl import record, weights
from infinitevl.config import hybrid, tiny
from infinitevl.memory import Memory
from infinitevl.model import Model
from infinitevl.processor import load_processor

WINDOW = 48  # tokens: under three frames


def small(window: int | None = WINDOW, layers: tuple[str, ...] = hybrid(1)) -> Model:
    """Random weights; answers mean nothing, but tell apart what was seen."""
    torch.manual_seed(0)
    config = tiny()
    vision = replace(config.vision, depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64)
    vision = replace(vision, full_attention_blocks=(0,))
    sizes = {"layers": layers, "window": window, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    sizes |= {"mrope_sections": (2, 3, 3), "delta_heads": 2, "delta_key_dim": 16, "delta_value_dim": 32}
    model = Model(
        replace(config, vision=vision, text=replace(config.text, **sizes)), load_processor(weights.locate("tiny"))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5)
        model.embedding.weight.normal_(0, 0.3)
        model.embedding.weight[list(model.config.stop_tokens)] *= 2.2
    return model.eval()


@pytest.fixture(scope="module")
def tiny_model() -> Model:
    return small()


class Played:
    """`record.Recorded` on a CPU: the step itself, at every call, on buffers of its own."""

    made = 0

    def __init__(self, step, memory: Memory, inputs, priority: int = 0) -> None:
        self.step, self.memory, self.inputs = step, memory, tuple(x.clone() for x in inputs)
        Played.made += 1

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value)
        with torch.no_grad():
            after, *_ = self.step(self.memory.clone(), *self.inputs)
            record.overwrite(self.memory, after)
        return []


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> type[Played]:
    Played.made = 0
    monkeypatch.setattr(record, "Recorded", Played)
    return Played
