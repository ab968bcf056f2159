"""Which parameters train: exact lists of names, made from the layer pattern and never by a search for a word."""

from __future__ import annotations

from infinitevl.config import DELTA
from infinitevl.model import Model
from infinitevl.train import lora
from infinitevl.train.recipes import Recipe


def chosen(model: Model, recipe: Recipe) -> list[str]:
    """What `trains` of a recipe means for a model: names in the model's order. With LoRA, its matrices there alone."""
    if recipe.lora_rank:
        return lora.names(model)
    parts = {
        "deltas": delta_mixers(model),
        "mixers": [name for name, _ in model.named_parameters() if part(name) == "mixer"],
        "mixers+mlp": [name for name, _ in model.named_parameters() if part(name) in ("mixer", "mlp")],
        "all": [name for name, _ in model.named_parameters()],
    }
    return parts[recipe.trains]


def part(name: str) -> str | None:
    """The part of a block that a parameter belongs to: "mixer", "mlp", a norm; None outside the text blocks."""
    pieces = name.split(".")
    return pieces[2] if pieces[0] == "blocks" else None


def delta_mixers(model: Model) -> list[str]:
    """Everything in the delta mixers: projections, convolutions, norm, A_log and dt_bias; not the block's own norms."""
    layers = model.config.text.layers
    return [
        name
        for name, _ in model.named_parameters()
        if part(name) == "mixer" and layers[int(name.split(".")[1])] == DELTA
    ]
