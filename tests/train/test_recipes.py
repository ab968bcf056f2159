"""Recipes hold the published figures, take typed changes, and refuse what they do not know by its nearest name."""

from __future__ import annotations

import pytest

from infinitevl.train.recipes import RECIPES, Recipe, RecipeError, differences, recipe


@pytest.mark.parametrize(
    ("name", "lr", "batch", "samples", "length", "pixels"),
    [
        ("stage1_layers", 2e-4, 64, 1_000_000, 8192, 512**2),
        ("stage1_logits", 2e-4, 64, 1_000_000, 8192, 512**2),
        ("stage2_instruct", 5e-5, 256, 8_000_000, 8192, 1344**2),
        ("stage3_long", 2e-5, 64, 1_000_000, 32_768, 512**2),
    ],
)
def test_published_figures(name: str, lr: float, batch: int, samples: int, length: int, pixels: int) -> None:
    made = recipe(name)
    assert (made.lr, made.batch, made.length, made.max_pixels) == (lr, batch, length, pixels)
    assert made.steps * made.batch == samples
    assert (made.beta1, made.beta2, made.weight_decay, made.warmup) == (0.9, 0.999, 0.01, 0.05)


def test_every_stage_is_there_for_4b_and_tiny() -> None:
    stages = ["stage1_layers", "stage1_logits", "stage2_instruct", "stage3_long"]
    assert list(RECIPES) == stages + [f"{stage}_tiny" for stage in stages]
    assert all(RECIPES[name]().stage == name.removesuffix("_tiny") for name in RECIPES)


def test_changes_are_typed_by_their_field() -> None:
    made = recipe("stage1_layers", ["lr=1e-3", "steps=1_000", "compile=false", "data=a=b.json", "trains=mixers+mlp"])
    assert (made.lr, made.steps, made.compile, made.data, made.trains) == (1e-3, 1000, False, "a=b.json", "mixers+mlp")
    assert differences(made, recipe("stage1_layers")) == ["data", "steps", "lr", "trains", "compile"]
    with pytest.raises(AttributeError):
        made.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("stage1_layer", [], "did you mean 'stage1_layers'?"),
        ("zzz", [], "no recipe 'zzz'; there are stage1_layers"),
        ("stage1_layers", ["learning=1"], "no key 'learning' in a recipe"),
        ("stage1_layers", ["warm_up=1"], "no key 'warm_up' in a recipe: did you mean 'warmup'?"),
        ("stage1_layers", ["stage=stage2_instruct"], "no key 'stage'"),
        ("stage1_layers", ["lr"], "'lr' is not key=value"),
        ("stage1_layers", ["lr=1e-4", "lr=2e-4"], "lr is given twice"),
        ("stage1_layers", ["lr=fast"], "lr=fast: it is a number"),
        ("stage1_layers", ["lr=nan"], "lr=nan: it is a number"),
        ("stage1_layers", ["lr=inf"], "lr=inf: it is a number"),
        ("stage1_layers", ["lr=-1"], "lr must be above 0, got -1.0"),
        ("stage1_layers", ["steps=1.5"], "steps=1.5: it is a whole number"),
        ("stage1_layers", ["steps=0"], "steps must be at least 1, got 0"),
        ("stage1_layers", ["compile=yes"], "compile=yes: it is true or false"),
        ("stage1_layers", ["trains=mixer"], "trains=mixer: it is one of 'deltas', 'mixers', 'mixers+mlp', 'all'"),
        ("stage1_layers", ["warmup=5"], "warmup must be a share from 0 to 1, got 5.0"),
        ("stage1_layers", ["workers=-1"], "workers must be 0 or more, got -1"),
        ("stage1_layers", ["beta2=1"], "beta2 must be from 0 to below 1, got 1.0"),
    ],
)
def test_refusals(name: str, changes: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe(name, changes)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_is_checked_however_it_is_made() -> None:
    with pytest.raises(RecipeError, match="batch must be at least 1"):
        Recipe(stage="stage1_layers", batch=0)
