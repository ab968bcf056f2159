"""The published architecture's own numbers: logits within 5e-4 in float32, positions equal, in one pass and chunks."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infinitevl import rope, weights
from infinitevl.config import config_from_json
from infinitevl.model import Model

GOLDEN = Path(os.environ.get("INFINITEVL_SHARED", Path(__file__).parents[2].parent / "shared")) / "golden"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="golden data is not here (set INFINITEVL_SHARED)")
TOLERANCE = 5e-4


@pytest.fixture(scope="module")
def model() -> Model:
    model = Model(config_from_json(json.loads((GOLDEN / "config.json").read_text())))
    weights.assign(model, load_file(GOLDEN / "model.safetensors"), "golden")
    return model.eval()


@pytest.fixture(scope="module")
def cases() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "cases.safetensors")


def read(model: Model, cases: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedded tokens and positions of a case."""
    ids = cases[f"{name}.input_ids"]
    kind = {"text": "", "image": "image", "video": "video"}[name]
    if not kind:
        return model.embed(ids), rope.prompt(ids, [], [], model.config)
    patches = cases[f"{name}.pixel_values" + ("_videos" if kind == "video" else "")]
    seconds = cases[f"{name}.second_per_grid_ts"].tolist() if kind == "video" else [0.0] * 9
    grids = [rope.Grid(*map(int, grid), s) for grid, s in zip(cases[f"{name}.{kind}_grid_thw"], seconds, strict=False)]
    tokens = []
    for grid, part in zip(grids, patches.split([g.time * g.rows * g.columns for g in grids]), strict=True):
        tokens.append(model.vision(part.view(grid.time, -1, part.shape[-1]), grid.rows, grid.columns).flatten(0, 1))
    pictures = {"image": ([], []), kind: (grids, []) if kind == "image" else ([], grids)}[kind]
    return model.embed(ids, torch.cat(tokens)), rope.prompt(ids, *pictures, model.config)


@pytest.mark.parametrize("name", ["text", "image", "video"])
@torch.no_grad()
def test_logits_of_one_pass(model, cases, name):
    hidden, positions = read(model, cases, name)
    out, _ = model(hidden, positions)
    assert (model.logits(out) - cases[f"{name}.logits"]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["text", "image", "video"])
@pytest.mark.parametrize("sizes", [(1,), (7, 1, 30), (64,)])
@torch.no_grad()
def test_logits_through_the_memory(model, cases, name, sizes):
    hidden, positions = read(model, cases, name)
    memory, outputs, at, turn = model.empty_memory(), [], 0, 0
    while at < hidden.shape[1]:
        size = sizes[turn % len(sizes)]
        out, memory = model(hidden[:, at : at + size], positions[:, :, at : at + size], memory)
        outputs.append(out)
        at, turn = at + size, turn + 1
    assert (model.logits(torch.cat(outputs, 1)) - cases[f"{name}.logits"]).abs().max() <= TOLERANCE


def test_video_positions(model, cases):
    assert torch.equal(read(model, cases, "video")[1], cases["video.position_ids"])
