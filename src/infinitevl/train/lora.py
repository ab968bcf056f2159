"""LoRA by peft on the text blocks of a model: added in place, merged into a copy of the weights when it is saved."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from infinitevl.files import written_aside
from infinitevl.model import Model

# Full matches only: the vision encoder has blocks too. Its other names (a, b, convolutions, A_log) LoRA cannot take.
TARGETS = r"blocks\.\d+\.(mixer\.[qkvgo]|mlp\.(gate|up|down))"
MATRIX = re.compile(TARGETS + r"\.lora_[AB]\.default\.weight")
NAME = "default"


def add(model: Model, rank: int, alpha: int) -> None:
    """Put LoRA beside every projection of the text blocks. The result computes what it did: B starts at zero."""
    from peft import LoraConfig, inject_adapter_in_model

    dtype = model.dtype
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS), model, adapter_name=NAME)
    model.to(dtype)


def names(model: Model) -> list[str]:
    """The names of LoRA's matrices."""
    return [name for name, _ in model.named_parameters() if MATRIX.fullmatch(name)]


def merged(tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Parameters of a model with LoRA -> those of a plain one: W + scale * B A, summed in float32."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if MATRIX.fullmatch(name):
            continue
        stem, base, rest = name.partition(".base_layer")
        if base and rest == ".weight":
            a, b = (tensors[f"{stem}.lora_{side}.{NAME}.weight"].float() for side in "AB")
            tensor = (tensor.float() + scale * (b @ a)).to(tensor.dtype)
        plain[stem + rest] = tensor
    return plain


def save(tensors: dict[str, Tensor], folder: Path, recipe_rank: int, alpha: int, base: str) -> None:
    """Write LoRA's matrices as a peft adapter for `infinitevl.hf`'s model."""
    folder.mkdir(parents=True, exist_ok=True)
    matrices = {
        f"base_model.model.model.{name.replace(f'.{NAME}.', '.')}": tensor.contiguous()
        for name, tensor in tensors.items()
        if MATRIX.fullmatch(name)
    }
    with written_aside(folder / "adapter_model.safetensors") as aside:
        save_file(matrices, aside, metadata={"format": "pt"})
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "r": recipe_rank,
        "lora_alpha": alpha,
        "target_modules": r"model\." + TARGETS,
        "base_model_name_or_path": base,
        "bias": "none",
        "task_type": None,
        "inference_mode": True,
    }
    with written_aside(folder / "adapter_config.json") as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n")


def scale_of(rank: int, alpha: int) -> float:
    """What LoRA multiplies B A by."""
    return alpha / rank
