"""Each stage: the exact list of what trains, what its loss is by hand, and that it learns that and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import infinitevl
from infinitevl import ops, weights
from infinitevl.config import DELTA
from infinitevl.model import Model
from infinitevl.processor import Processor
from infinitevl.train import forward, log, lora
from infinitevl.train.begin import prepared
from infinitevl.train.convert import convert
from infinitevl.train.data import Batch, Pictures, packed
from infinitevl.train.forward import embedded, place, through
from infinitevl.train.loop import train
from infinitevl.train.recipes import Recipe, RecipeError
from infinitevl.train.sources import open_source
from infinitevl.train.stages import STAGES

from .conftest import LAYERS, WINDOW, toy

Make = Callable[..., Recipe]
DELTAS = [n for n, mixer in enumerate(LAYERS) if mixer == DELTA]
OF_DELTA = ["q_conv", "k_conv", "v_conv", "norm", "A_log", "dt_bias", *(f"{part}.weight" for part in "qkvabgo")]
OF_SOFTMAX = [*(f"{part}.{kind}" for part in "qkv" for kind in ("weight", "bias")), "o.weight"]


def expected(trains: str) -> set[str]:
    """What is to train, written down apart from the package."""
    deltas = {f"blocks.{n}.mixer.{name}" for n in (1, 2) for name in OF_DELTA}
    softmax = {f"blocks.{n}.mixer.{name}" for n in (0, 3) for name in OF_SOFTMAX}
    mlps = {f"blocks.{n}.mlp.{part}.weight" for n in range(4) for part in ("gate", "up", "down")}
    return {"deltas": deltas, "mixers": deltas | softmax, "mixers+mlp": deltas | softmax | mlps}[trains]


@pytest.mark.parametrize(
    ("stage", "trains", "what"),
    [
        ("stage1_layers", "all", "deltas"),  # not a choice there
        ("stage1_logits", "all", "deltas"),
        ("stage2_instruct", "deltas", "deltas"),
        ("stage2_instruct", "mixers", "mixers"),
        ("stage2_instruct", "mixers+mlp", "mixers+mlp"),
        ("stage3_long", "mixers", "mixers"),
    ],
)
def test_what_trains(stage: str, trains: str, what: str, toy_recipe: Make) -> None:
    model = Model(toy(LAYERS, WINDOW))
    names = prepared(model, STAGES[stage], toy_recipe(stage, trains=trains, lora_rank=0))
    assert len(names) == len(set(names)) and set(names) == expected(what)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected(what)


def test_all_is_all(toy_recipe: Make) -> None:
    model = Model(toy(LAYERS, WINDOW))
    names = prepared(model, STAGES["stage2_instruct"], toy_recipe("stage2_instruct", trains="all"))
    assert names == [name for name, _ in model.named_parameters()]


def test_what_trains_with_lora(toy_recipe: Make) -> None:
    """Text blocks only, every projection but a and b; never the vision encoder, whose blocks have names like these."""
    model = Model(toy(LAYERS, WINDOW))
    names = prepared(model, STAGES["stage3_long"], toy_recipe("stage3_long"))
    parts = {n: "qkvgo" if n in DELTAS else "qkvo" for n in range(4)}
    bases = {f"blocks.{n}.mixer.{part}" for n in parts for part in parts[n]}
    bases |= {f"blocks.{n}.mlp.{part}" for n in range(4) for part in ("gate", "up", "down")}
    assert set(names) == {f"{base}.lora_{side}.default.weight" for base in bases for side in "AB"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(names)


def test_nothing_to_train_is_refused(toy_recipe: Make) -> None:
    teacher = Model(toy(("softmax",) * 4, None))
    with pytest.raises(RecipeError, match="there is nothing to train"):
        prepared(teacher, STAGES["stage1_layers"], toy_recipe("stage1_layers"))


def test_names_in_short() -> None:
    names = [*(f"blocks.{n}.mixer.q.weight" for n in (1, 2, 3, 5, 6, 7, 9)), "norm.weight"]
    assert log.spelled(names) == ["blocks.{1-3,5-7,9}.mixer.q.weight", "norm.weight"]


# Losses by hand


@pytest.fixture
def batch(processor: Processor, toy_recipe: Make) -> Batch:
    """Two rows, one of two conversations, one padded."""
    source = open_source(toy_recipe("stage2_instruct"), processor, toy(LAYERS, WINDOW))
    samples = [source.sample(n) for n in range(3)]
    return packed([samples[:2], samples[2:]], sum(len(each.ids) for each in samples[:2]))


def test_layer_loss_is_that_of_whole_models(checkpoints: dict[str, str], batch: Batch, toy_recipe: Make) -> None:
    """Each delta block alone on what the teacher's block before it gave; and the gradient stays in its block."""
    student, teacher = (weights.load(checkpoints[name]) for name in ("student", "teacher"))
    recipe = toy_recipe("stage1_layers")
    prepared(student, STAGES["stage1_layers"], recipe)
    right = []
    with torch.no_grad():
        hidden, where = embedded(teacher, batch), place(teacher, batch)
        for number, block in enumerate(teacher.blocks):
            after = block(hidden, where, None)[0]
            if number in DELTAS:
                error = student.blocks[number](hidden, where, None)[0] - after
                right.append(float(error.pow(2).mean(-1)[batch.real].sum()))
            hidden = after
    got = []
    for number, loss in zip(DELTAS, STAGES["stage1_layers"].loss(student, teacher, batch, recipe), strict=True):
        got.append(loss.total.item())
        assert loss.tokens == batch.real.sum()
        loss.total.backward()
        reached = {name.split(".")[1] for name, p in student.named_parameters() if p.grad is not None}
        assert reached == {str(number)}
        student.zero_grad()
    assert got == pytest.approx(right, rel=1e-5) and min(right) > 0


def test_logits_loss_is_that_of_whole_logits(checkpoints: dict[str, str], batch: Batch, toy_recipe: Make) -> None:
    student, teacher = (weights.load(checkpoints[name]) for name in ("student", "teacher"))
    recipe = toy_recipe("stage1_logits", temperature=2.0)
    with torch.no_grad():
        (loss,) = STAGES["stage1_logits"].loss(student, teacher, batch, recipe)
        one, other = (
            (model.logits(through(model, embedded(model, batch), place(model, batch), False)) / 2).log_softmax(-1)
            for model in (student, teacher)
        )
    right = 4 * (other.exp() * (other - one)).sum(-1)
    assert torch.allclose(loss.total, right[batch.real].sum(), rtol=1e-4)
    assert loss.tokens == batch.real.sum() < batch.real.numel()


def test_checkpointing_changes_nothing(checkpoints: dict[str, str], batch: Batch, toy_recipe: Make) -> None:
    found = []
    for checkpointing in (True, False):
        student = weights.load(checkpoints["student"])
        recipe = toy_recipe("stage2_instruct", checkpointing=checkpointing)
        names = prepared(student, STAGES["stage2_instruct"], recipe)
        (loss,) = STAGES["stage2_instruct"].loss(student, None, batch, recipe)
        loss.total.backward()
        found.append([p.grad for name, p in student.named_parameters() if name in names])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True))


def test_what_is_recomputed_in_another_thread_is_what_was_pinned(
    checkpoints: dict[str, str], batch: Batch, toy_recipe: Make
) -> None:
    """On CUDA autograd has threads of its own, in which no pin was set."""
    student = weights.load(checkpoints["student"])
    recipe = toy_recipe("stage2_instruct", checkpointing=True)
    prepared(student, STAGES["stage2_instruct"], recipe)
    with ops.pinned(gated_delta="scan"):
        (loss,) = STAGES["stage2_instruct"].loss(student, None, batch, recipe)
        with ThreadPoolExecutor(1) as other:
            other.submit(loss.total.backward).result()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters() if p.requires_grad)


def test_pictures_are_seen_as_many_at_once_as_have_so_many_patches(
    checkpoints: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small frames many at once, a large one alone: the tokens are the same."""
    model = weights.load(checkpoints["student"])
    pixels = torch.randint(0, 256, (5, 56, 84, 3), dtype=torch.uint8)
    group = Pictures(pixels, None, (56, 84), False, 5 * 6)
    right, seen = forward._looked(model, group), []
    see = model.vision.forward
    monkeypatch.setattr(
        model.vision, "forward", lambda patches, *grid: seen.append(len(patches)) or see(patches, *grid)
    )
    for patches, at_once in ((2**16, [5]), (50, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr(forward, "PATCHES", patches)
        torch.testing.assert_close(forward._looked(model, group), right)
        assert seen == at_once
        seen.clear()


# Runs


def losses_of(said: list[str]) -> list[float]:
    return [float(match[1]) for line in said if (match := re.search(r"loss (\S+)", line))]


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_stage_learns_and_leaves_the_rest(
    stage: str, toy_recipe: Make, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    said: list[str] = []
    outcome = train(toy_recipe(stage, steps=6), tmp_path, tell=said.append)
    assert outcome.reason == "end" and outcome.step == 6
    losses = losses_of(said)
    assert len(losses) == 6 and losses[-1] < 0.9 * losses[0]
    before, after = weights.load(checkpoints["student"]), infinitevl.load(outcome.checkpoint / "model")
    moved = {
        n for (n, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if not torch.equal(a, b)
    }
    if stage == "stage3_long":
        assert moved == {name.partition(".lora_")[0] + ".weight" for name in lora_names()}
    else:
        assert moved == expected("mixers" if stage == "stage2_instruct" else "deltas")
    count = len(lora_names()) if stage == "stage3_long" else len(moved)
    assert f"trains {count} tensors" in "\n".join(said)


def lora_names() -> list[str]:
    model = Model(toy(LAYERS, WINDOW))
    lora.add(model, 4, 8)
    return lora.names(model)


def test_convert_and_four_stages_in_a_row(toy_recipe: Make, checkpoints: dict[str, str], tmp_path: Path) -> None:
    """Each begins from the folder of the run before it, the first from a converted teacher; the last one streams."""
    student = str(tmp_path / "converted")
    convert(checkpoints["teacher"], Path(student), layers=[0, 3], window=WINDOW)
    for number, stage in enumerate(STAGES):
        said: list[str] = []
        train(toy_recipe(stage, steps=1, student=student), tmp_path / stage, tell=said.append)
        assert said[0].count("(1 steps)") == number
        student = str(tmp_path / stage)
    model = infinitevl.load(tmp_path / "stage3_long" / "step-00000001" / "model")
    stream = infinitevl.Stream(model)
    stream.observe(torch.zeros(56, 56, 3, dtype=torch.uint8).numpy())
    assert stream.frames == 1


def test_lora_saved_merged_and_alone_are_the_same(toy_recipe: Make, tmp_path: Path, batch: Batch) -> None:
    hf = pytest.importorskip("infinitevl.hf")
    peft = pytest.importorskip("peft")
    recipe = toy_recipe("stage3_long", steps=2)
    merged = train(recipe, tmp_path / "merged", tell=lambda line: None).checkpoint / "model"
    alone = train(toy_recipe("stage3_long", steps=2, merge=False), tmp_path / "alone", tell=lambda line: None)
    assert not (alone.checkpoint / "model").exists()
    base = hf.InfiniteVLForConditionalGeneration.from_pretrained(recipe.student, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, alone.checkpoint / "adapter")
    one = infinitevl.load(merged)
    ids = batch.ids[1:, :20]
    with torch.no_grad():
        right = one.logits(one(one.embed(ids), torch.arange(20).expand(3, 1, 20))[0])
        got = adapted(input_ids=ids, position_ids=torch.arange(20).expand(3, 1, 20)).logits
    assert torch.allclose(got, right, atol=2e-5)
