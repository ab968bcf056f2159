"""The loop: it resumes to the bit, stops when told, skips what is not finite, names what is broken."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import infinitevl
from infinitevl import weights
from infinitevl.train import checkpoint
from infinitevl.train.begin import prepared
from infinitevl.train.checkpoint import ResumeError
from infinitevl.train.data import DataError, Feed, parts
from infinitevl.train.loop import DivergedError, train
from infinitevl.train.losses import Loss
from infinitevl.train.masters import Masters, rate_at
from infinitevl.train.parallel import World
from infinitevl.train.recipes import Recipe, RecipeError
from infinitevl.train.sources import open_source
from infinitevl.train.stages import STAGES, Stage
from infinitevl.weights import load

from .conftest import record

Make = Callable[..., Recipe]
ROOT = Path(__file__).parents[2]


def quiet(line: str) -> None: ...


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses_of(out: Path) -> list[float]:
    return [line["loss"] for line in log_of(out) if "loss" in line]


def files_of(place: Path) -> dict[str, bytes]:
    """Every file of a checkpoint but what torch writes as a zip with its own name inside."""
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in sorted(place.rglob("*"))
        if path.is_file() and path.name != checkpoint.RANDOM
    }


def noisy(stage: str) -> Stage:
    """A stage whose loss also draws random numbers, from all three sources."""

    def loss(*given: object) -> Iterator[Loss]:
        for each in STAGES[stage].loss(*given):  # type: ignore[arg-type]
            draw = torch.rand(()) + float(np.random.rand()) + random.random()
            yield each._replace(total=each.total * draw)

    return STAGES[stage]._replace(loss=loss)


# Resume


@pytest.mark.parametrize("stage", ["stage1_layers", "stage2_instruct", "stage3_long"])
def test_a_resumed_run_is_the_run_to_the_bit(stage: str, toy_recipe: Make, tmp_path: Path) -> None:
    """Weights, moments, order of the data over an epoch's end, random numbers, counts and log."""
    recipe, noise = toy_recipe(stage, steps=6, save_every=3), noisy(stage)
    whole = train(recipe, tmp_path / "whole", tell=quiet, stage=noise)

    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        if line.startswith("step 3/6"):
            os.kill(os.getpid(), signal.SIGTERM)  # is seen in step 4, which is finished

    first = train(recipe, tmp_path / "cut", tell=stop, stage=noise)
    assert (first.reason, first.step) == ("interrupted", 4)
    torch.rand(7), np.random.rand(3), random.random()  # another process would stand elsewhere
    rest = train(recipe, tmp_path / "cut", resume=True, tell=quiet, stage=noise)
    assert rest.reason == "end" and rest.checkpoint.name == "step-00000006"
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole") and len(losses_of(tmp_path / "cut")) == 6
    assert files_of(rest.checkpoint) == files_of(whole.checkpoint)
    one, other = (torch.load(each.checkpoint / checkpoint.RANDOM, weights_only=True) for each in (rest, whole))
    assert one["python"] == other["python"] and torch.equal(one["torch"], other["torch"])
    positions = json.loads((rest.checkpoint / "state.json").read_text())["positions"]
    assert sum(positions) > 12  # the run saw more than an epoch of the twelve samples


def test_resume_drops_the_lines_that_are_made_again(toy_recipe: Make, tmp_path: Path) -> None:
    recipe = toy_recipe("stage1_layers", steps=4, save_every=2)
    train(recipe, tmp_path, tell=quiet)
    right = [line["step"] for line in log_of(tmp_path)]
    shutil.rmtree(tmp_path / "step-00000004")  # as if the process was killed after step 4, before it was saved
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # and while it wrote its log
    train(recipe, tmp_path, resume=True, tell=quiet)
    assert [line["step"] for line in log_of(tmp_path)] == right == [1, 2, 3, 4]


def test_resume_refuses_another_recipe_or_student(
    toy_recipe: Make, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    student = tmp_path / "student"
    shutil.copytree(checkpoints["student"], student)
    recipe = toy_recipe("stage1_layers", steps=2, student=str(student))
    train(recipe, tmp_path / "run", tell=quiet)
    with pytest.raises(ResumeError, match="holds a run at step 2: --resume goes on with it"):
        train(recipe, tmp_path / "run", tell=quiet)
    with pytest.raises(ResumeError, match="the run was begun with steps=2, lr=0.003: say the same"):
        train(replace(recipe, lr=1e-5, steps=9), tmp_path / "run", resume=True, tell=quiet)
    assert train(replace(recipe, keep=7, workers=0), tmp_path / "run", resume=True, tell=quiet).step == 2  # was done
    model = load(student)
    with torch.no_grad():
        model.norm.weight += 1
    infinitevl.save(model, student)
    with pytest.raises(ResumeError, match="are not those that the run was begun with"):
        train(recipe, tmp_path / "run", resume=True, tell=quiet)
    with pytest.raises(ResumeError, match="no checkpoint to resume from"):
        train(recipe, tmp_path / "none", resume=True, tell=quiet)
    assert not (tmp_path / "none").exists()


# Stopping


def test_sigterm_saves_and_ends_a_process_with_its_code(toy_recipe: Make, data: Path, tmp_path: Path) -> None:
    """The command as users run it, killed gently and then for good."""
    recipe = toy_recipe("stage1_layers")
    keys = ("student", "teacher", "data", "batch", "micro", "length", "workers", "log_every", "tensorboard", "device")
    changes = [
        f"{key}={str(getattr(recipe, key)).lower() if key == 'tensorboard' else getattr(recipe, key)}" for key in keys
    ]
    command = [sys.executable, "-m", "infinitevl", "train", "stage1_layers", *changes, "steps=100000", "save_every=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def run(*more: str, after: int, number: int) -> tuple[int, int]:
        process = subprocess.Popen(
            [*command, "--out", str(tmp_path / "run"), *more], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(f"step {after}/"):
                process.send_signal(number)
                break
        process.stdout.read()
        steps = [step for step, _ in checkpoint.checkpoints(tmp_path / "run")]
        return process.wait(), steps[-1]

    code, step = run(after=3, number=signal.SIGTERM)
    assert code == 130 and step >= 4
    code, later = run("--resume", after=step + 3, number=signal.SIGKILL)
    assert code == -signal.SIGKILL and later >= step + 2
    infinitevl.load(tmp_path / "run" / f"step-{later:08d}" / "model")


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(
    toy_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call of the second save that changes the disk is the last one of some run: what has a checkpoint's name then
    loads and goes on."""
    recipe = toy_recipe("stage1_layers", steps=2, save_every=1, keep=1, batch=2)
    calls, limit, saved = 0, 10**9, []

    class Killed(BaseException): ...

    def counted(function: Callable) -> Callable:
        def call(*given: object, **more: object) -> object:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise Killed
            return function(*given, **more)

        return call

    def note(line: str) -> None:
        if "saved to" in line:
            saved.append(calls)

    for owner, name in (
        *((checkpoint, "save_file"), (checkpoint.os, "replace"), (checkpoint.shutil, "rmtree"), (torch, "save")),
        *((Path, "write_text"), (weights.safetensors.torch, "save_file")),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    train(recipe, tmp_path / "whole", tell=note)
    first, second = saved
    held = []
    for limit in range(first, second):
        calls, out = 0, tmp_path / str(limit)
        with pytest.raises(Killed):
            train(recipe, out, tell=quiet)
        limit = 10**9
        held.append([step for step, _ in checkpoint.checkpoints(out)])
        infinitevl.load(checkpoint.model_folder(str(out)))
        if calls % 4 == 0:
            assert train(recipe, out, resume=True, tell=quiet).step == 2
            assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    assert [step for step, _ in itertools.groupby(map(tuple, held))] == [(1,), (1, 2), (2,)]


def test_a_compact_state_is_small_and_near(toy_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 in parts of a limit, from which a run goes on almost as if it had not stopped."""
    monkeypatch.setattr(checkpoint, "SMALL_PART_BYTES", 20_000)
    whole, small = (toy_recipe("stage2_instruct", steps=6, save_every=3, compact=compact) for compact in (False, True))
    train(whole, tmp_path / "whole", tell=quiet)
    last = train(small, tmp_path / "small", tell=quiet).checkpoint
    files = list(last.glob("state-*.safetensors"))
    assert len(files) > 3 and all(path.stat().st_size < 20_000 + 5_000 for path in files)
    full = (tmp_path / "whole" / last.name / "state-00001.safetensors").stat().st_size
    assert sum(path.stat().st_size for path in files) < 0.6 * full
    shutil.rmtree(last)
    train(small, tmp_path / "small", resume=True, tell=quiet)
    one, other = losses_of(tmp_path / "small"), losses_of(tmp_path / "whole")
    assert one[:3] == other[:3] and one != other and one == pytest.approx(other, rel=1e-2)


def test_only_the_newest_checkpoints_stay(toy_recipe: Make, tmp_path: Path) -> None:
    outcome = train(toy_recipe("stage1_layers", steps=5, save_every=1, keep=2), tmp_path, tell=quiet)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [4, 5]
    assert checkpoint.model_folder(str(tmp_path)) == str(outcome.checkpoint / "model")


# What is not finite


def poisoned(stage: str, steps: set[int], where: str) -> Stage:
    """A stage with NaN in the loss, or in a gradient under a finite loss, at some of its steps (of one part each)."""
    step = 0

    def loss(student, *rest: object) -> Iterator[Loss]:  # noqa: ANN001
        nonlocal step
        step += 1
        for each in STAGES[stage].loss(student, *rest):  # type: ignore[arg-type]
            if step in steps and where == "loss":
                each = each._replace(total=each.total * float("nan"))
            if step in steps and where == "gradient":
                weight = student.blocks[1].mixer.A_log
                zero = (weight - weight).sum()
                each = each._replace(total=each.total + zero.sqrt().nan_to_num(0.0) * 0 + zero.abs().sqrt())
            yield each

    return STAGES[stage]._replace(loss=loss)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(where: str, toy_recipe: Make, tmp_path: Path) -> None:
    recipe = toy_recipe("stage2_instruct", steps=5, micro=4, patience=2)
    said: list[str] = []
    outcome = train(recipe, tmp_path, tell=said.append, stage=poisoned("stage2_instruct", {2, 4}, where))
    assert outcome.reason == "end"
    assert sum("skipped, not finite" in line for line in said) == 2 and "skipped: 2 steps, 0 samples" in said[-2]
    assert [line["step"] for line in log_of(tmp_path) if "skipped_step" in line] == [2, 4]
    state = json.loads((outcome.checkpoint / "state.json").read_text())
    assert state["updates"] == 3 and state["counts"]["skipped_steps"] == 2
    model = infinitevl.load(outcome.checkpoint / "model")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_skipped_step_changes_nothing(toy_recipe: Make, tmp_path: Path) -> None:
    recipe = toy_recipe("stage2_instruct", steps=2, micro=4, save_every=1)
    train(recipe, tmp_path, tell=quiet, stage=poisoned("stage2_instruct", {2}, "gradient"))
    one, two = (path for _, path in checkpoint.checkpoints(tmp_path))
    assert files_of(one)["state-00001.safetensors"] == files_of(two)["state-00001.safetensors"]
    assert files_of(one)["model/model.safetensors"] == files_of(two)["model/model.safetensors"]


def test_too_many_in_a_row_end_the_run_with_what_to_change(toy_recipe: Make, tmp_path: Path) -> None:
    recipe = toy_recipe("stage2_instruct", steps=9, micro=4, patience=3)
    with pytest.raises(DivergedError) as error:
        train(recipe, tmp_path, tell=quiet, stage=poisoned("stage2_instruct", set(range(3, 9)), "loss"))
    assert "3 steps in a row were not finite, up to step 5: lower the learning rate of the delta layers first" in str(
        error.value
    )


# Data


def test_a_broken_sample_is_skipped_counted_and_named(toy_recipe: Make, tmp_path: Path) -> None:
    rows = [record(f"{n}?", "yes") for n in range(6)] + [record("<image>?", "no", images=["gone.png"]), {"x": 1}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    said: list[str] = []
    recipe = toy_recipe("stage2_instruct", steps=3, data=str(tmp_path / "a.jsonl"))
    outcome = train(recipe, tmp_path / "run", tell=said.append)
    named = [line for line in log_of(tmp_path / "run") if "skipped_sample" in line]
    assert {line["skipped_sample"] for line in named} == {"a.jsonl:7", "a.jsonl:8"}
    assert any(line.startswith("skipped a.jsonl:7: image gone.png: ") for line in said)
    counts = json.loads((outcome.checkpoint / "state.json").read_text())["counts"]
    assert counts["skipped_samples"] == len(named) >= 2
    assert f"skipped: 0 steps, {len(named)} samples" in said[-2]


def test_data_of_which_nothing_can_be_used_ends_the_run(toy_recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n' * 3)
    with pytest.raises(DataError, match=r"3 samples in a row cannot be used; the first, a.jsonl:\d: no messages"):
        train(toy_recipe("stage2_instruct", data=str(tmp_path / "a.jsonl")), tmp_path / "run", tell=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"student": ""}, RecipeError, "student= names the checkpoint"),
        ({"teacher": ""}, RecipeError, "stage1_layers distils: teacher="),
        ({"data": ""}, RecipeError, "data= names what is trained on"),
        ({"data": "none.json"}, DataError, "none.json: no such file"),
        ({"device": "foo"}, RecipeError, "device=foo: "),
        ({"batch": 3, "micro": 2}, RecipeError, "batch=3 is not a multiple of micro=2 rows on each of 1 processes"),
        ({"lora_rank": 4}, RecipeError, "lora_rank is for stage3_long"),
        ({"teacher": "tiny"}, RecipeError, "teacher and student differ in hidden_size: 256 and 32"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    changes: dict, error: type, said: str, toy_recipe: Make, tmp_path: Path
) -> None:
    with pytest.raises(error) as found:
        train(toy_recipe("stage1_layers", **changes), tmp_path / "run", tell=quiet)
    assert said in str(found.value) and "\n" not in str(found.value)
    assert not (tmp_path / "run").exists()


# The optimiser


def test_the_rate_rises_and_falls(toy_recipe: Make) -> None:
    recipe = toy_recipe("stage1_layers", steps=100)
    rates = [rate_at(recipe, step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False)) and 0 < rates[99] < 1e-3
    assert rates[5 + 95 // 2] == pytest.approx(0.5, abs=0.02)


def test_what_decays_and_at_which_rate(toy_recipe: Make, checkpoints: dict[str, str]) -> None:
    model = load(checkpoints["student"])
    names = [name for name, _ in model.named_parameters()]
    recipe = toy_recipe("stage2_instruct", delta_scale=0.1)
    kept = Masters(model, names, recipe, World(0, 1, torch.device("cpu")))
    groups = {id(p): group for group in kept.optimizer.param_groups for p in group["params"]}
    flat = ("A_log", "dt_bias", "bias", "_conv", "norm", "norm_mixer.weight", "norm_mlp.weight", "norm1.weight")
    flat = (*flat, "norm2.weight", "merger.norm.weight", "norm.weight")
    for name in names:
        group = groups[id(kept.masters[name])]
        assert group["weight_decay"] == (0.0 if name.endswith(flat) else 0.01), name
        assert group["scale"] == (0.1 if name.startswith(("blocks.1.mixer.", "blocks.2.mixer.")) else 1.0), name
    assert len(groups) == len(names)


def test_the_gradient_is_a_mean_over_tokens_for_any_accumulation(toy_recipe: Make, tmp_path: Path) -> None:
    """Four parts of one row and one part of four rows are the same step, though the rows hold different numbers of
    tokens."""
    for micro in (1, 4):
        train(toy_recipe("stage2_instruct", steps=3, micro=micro), tmp_path / str(micro), tell=quiet)
    one, other = log_of(tmp_path / "1"), log_of(tmp_path / "4")
    for a, b in zip(one, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["norm"] == pytest.approx(b["norm"], rel=1e-4)


@pytest.mark.parametrize("stage", ["stage1_layers", "stage2_instruct"])
def test_loss_and_gradient_are_means_over_what_the_loss_is_about(
    stage: str, toy_recipe: Make, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    """The first line of the log by hand: of layers and real tokens, or of the words of answers, over all parts."""
    recipe = toy_recipe(stage, steps=1)
    train(recipe, tmp_path, tell=quiet)
    student, teacher = load(checkpoints["student"]), load(checkpoints["teacher"])
    names = prepared(student, STAGES[stage], recipe)
    feed = Feed(partial(open_source, recipe, student.processor, student.config), recipe, range(4), [0] * 4)
    totals, tokens = [], 0
    for part in itertools.islice(parts(feed, torch.device("cpu")), 2):
        learned = {"stage1_layers": 2 * part.batch.real.sum(), "stage2_instruct": (part.batch.labels >= 0).sum()}
        tokens += int(learned[stage])
        totals += [loss.total for loss in STAGES[stage].loss(student, teacher, part.batch, recipe)]
    mean = torch.stack(totals).sum() / tokens
    slopes = torch.autograd.grad(mean, [dict(student.named_parameters())[name] for name in names])
    (line,) = log_of(tmp_path)
    assert line["loss"] == pytest.approx(mean.item(), rel=1e-5)
    assert line["norm"] == pytest.approx(float(torch.nn.utils.get_total_norm(slopes)), rel=1e-4)


def test_a_step_is_adamw_with_clipping(toy_recipe: Make, checkpoints: dict[str, str]) -> None:
    """Against torch's own AdamW on the whole, clipped by torch's own."""
    recipe = toy_recipe("stage2_instruct", clip=0.5, weight_decay=0.0)
    one, other = load(checkpoints["student"]), load(checkpoints["student"])
    names = [name for name, _ in one.named_parameters()]
    kept = Masters(one, names, recipe, World(0, 1, torch.device("cpu")))
    theirs = torch.optim.AdamW(other.parameters(), lr=recipe.lr, weight_decay=0.0)
    for step in range(3):
        torch.manual_seed(step)
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad / 7
        kept.accumulate()
        norm = kept.reduce(7.0)
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)), rel=1e-5)
        kept.step(1.0, norm)
        kept.clear()
        theirs.step()
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6), name


def test_bfloat16_weights_follow_float32_masters(toy_recipe: Make, tmp_path: Path) -> None:
    """Steps too small for bfloat16 still add up, and A_log and dt_bias stay float32."""
    recipe = toy_recipe("stage1_layers", steps=4, dtype="bfloat16", lr=1e-5)
    outcome = train(recipe, tmp_path, tell=quiet)
    state = checkpoint.load_file(outcome.checkpoint / "state-00001.safetensors")
    model, before = (load(where, dtype=torch.float32) for where in (outcome.checkpoint / "model", recipe.student))
    name = "blocks.1.mixer.q.weight"
    master, live = state[f"master.{name}"], dict(model.named_parameters())[name]
    assert master.dtype == torch.float32 and torch.equal(master.bfloat16().float(), live)
    start = dict(before.named_parameters())[name].bfloat16().float()
    assert 0 < (master - start).abs().max() < 1e-4 and (live == start).float().mean() > 0.5
    assert model.blocks[1].mixer.A_log.dtype == torch.float32
    assert torch.equal(state["master.blocks.1.mixer.A_log"], model.blocks[1].mixer.A_log)


# What is said


def test_the_log_and_the_progress_line(toy_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from infinitevl.train import begin

    monkeypatch.setattr(begin, "peak", lambda device: 1e9)
    said: list[str] = []
    train(toy_recipe("stage1_layers", steps=4, log_every=2), tmp_path, tell=said.append)
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    assert set(lines[0]) == {
        *("step", "loss", "norm", "lr", "tokens", "skipped_samples", "skipped_steps", "tokens_per_second", "mfu")
    }
    assert lines[1]["tokens"] > lines[0]["tokens"] > 0 and 0 < lines[0]["mfu"]
    shown = next(line for line in said if line.startswith("step 2/4"))
    assert all(word in shown for word in ("loss ", "tokens/s", "MFU ", " left", "lr 3.00e-03"))


def test_where_the_peak_is_not_known_no_mfu_is_said(
    toy_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infinitevl.train import begin

    monkeypatch.setattr(begin, "peak", lambda device: None)
    said: list[str] = []
    train(toy_recipe("stage1_layers", steps=1), tmp_path, tell=said.append)
    shown = next(line for line in said if line.startswith("step 1/1"))
    assert "tokens/s" in shown and "MFU" not in shown and "mfu" not in log_of(tmp_path)[0]


def test_tensorboard_gets_the_same(toy_recipe: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(toy_recipe("stage1_layers", steps=3, tensorboard=True), tmp_path, tell=quiet)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses_of(tmp_path))


def test_without_tensorboard_the_log_says_so(toy_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from infinitevl.train import log

    monkeypatch.setattr(log.importlib.util, "find_spec", lambda name: None)
    said: list[str] = []
    train(toy_recipe("stage1_layers", steps=1, tensorboard=True), tmp_path, tell=said.append)
    assert any("tensorboard is not installed" in line for line in said) and losses_of(tmp_path)


def test_flops_are_counted_by_what_runs(checkpoints: dict[str, str]) -> None:
    from infinitevl.train.log import flops_per_token

    student, teacher = load(checkpoints["student"]), load(checkpoints["teacher"])
    q, mlp, kv = 32 * 32, 3 * 32 * 48, 32 * 16
    softmax, delta = 2 * q + 2 * kv + mlp, 2 * q + 3 * 32 * 64 + 2 * 32 * 2 + 2 * (32 + 32 + 64) * 2 + mlp
    names = [name for name, _ in student.named_parameters() if name.startswith("blocks.1.mixer.q.")]
    assert flops_per_token(student, teacher, names, False) == 2 * 4 * softmax + 4 * 2 * delta + 2 * q
    assert flops_per_token(student, None, names, True) == 4 * 2 * (softmax + delta) + 2 * q


def test_durations() -> None:
    from infinitevl.train.log import duration

    assert [duration(s) for s in (5, 65, 3700, 90000)] == ["5 s", "1 min 5 s", "1 h 1 min", "1 d 1 h"]
