"""infinitevl bench --train: the whole command at its smallest, its gate, its arithmetic, and two processes."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from infinitevl import bench, cli
from infinitevl.bench import setup, train, work
from infinitevl.bench.setup import Found, Row, Setup
from infinitevl.bench.work import Work
from infinitevl.config import DELTA, SOFTMAX, tiny
from infinitevl.ops import reference
from infinitevl.train import data, loop
from infinitevl.train.begin import Run
from infinitevl.train.parallel import World
from infinitevl.train.recipes import Recipe

SOURCE = Path(__file__).parents[2] / "src"
ALONE = World(0, 1, torch.device("cpu"))
STAGES = ["stage2_instruct", "stage1_layers", "stage1_logits", "stage3_long"]
COMMAND = """
from pathlib import Path
from infinitevl.cli import main
try:
    main(['bench', '--train', '--quick', '--device', 'cpu', {}])
finally:
    left = [each.read_text().strip() for each in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in left if "gloo" in name], left  # they may abort a process that ends before them
"""


def processes(more: str, folder: Path, count: int) -> list[tuple[int, str, str]]:
    """The command in so many processes, as torchrun would start them: how each ended, and what it said."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    shared = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", COMMAND.format(more)],
            cwd=folder,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        said = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, *words) for rank, words in zip(ranks, said, strict=True)]


@pytest.fixture(scope="module")
def smoke() -> dict:
    """The result of `infinitevl bench --train --quick`, once; in this process: peft takes seconds to import."""
    result = bench.run(bench.Options(quick=True, device="cpu", train=True), tell=lambda line: None)
    assert result is not None
    return result


def test_quick_run_measures_every_stage(smoke: dict) -> None:
    assert (smoke["format"], smoke["scale"], smoke["failed"]) == ("infinitevl.bench", "quick", [])
    rows = {(row["part"], row["name"]): row for row in smoke["rows"]}
    each = ("real tokens", "step", "forward", "backward", "optimiser")
    accumulated = ("stage2_instruct", "real tokens, 2 rows a step")
    assert set(rows) == {(stage, name) for stage in STAGES for name in each} | {accumulated}
    assert len(rows) == len(smoke["rows"])
    assert all(math.isfinite(row["value"]) and row["value"] > 0 for row in rows.values())
    assert all(row["aim"] is None and row["floor"] is None for row in rows.values())
    assert {skipped["part"] for skipped in smoke["skipped"]} == {"all parts", "uncompiled", "processes"}


def test_parts_of_a_step_are_the_step(smoke: dict) -> None:
    """As medians of three steps they sum to it about."""
    value = {(row["part"], row["name"]): row["value"] for row in smoke["rows"]}
    for stage in STAGES:
        parts = sum(value[stage, lap] for lap in train.LAPS)
        assert parts == pytest.approx(value[stage, "step"], rel=0.5)


def test_gate_has_the_rule_and_every_stage(smoke: dict) -> None:
    checks = smoke["gate"]["checks"]
    paths = [check["path"] for check in checks]
    assert smoke["gate"]["green"] and all(check["error"] <= check["bound"] for check in checks)
    assert all(f"the delta rule's gradient in {name}, 130 tokens" in paths for name in ("q", "k", "v", "g", "beta"))
    assert [path for path in paths if "gradient, as it is" in path] == [
        f"{each}, gradient, as it is" for each in STAGES
    ]


# The gate


@pytest.mark.parametrize("fault", ["delta rule", "packing", "a step that is NaN"])
def test_no_figures_where_the_gate_is_not_green(run: Callable, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    measured: list[str] = []
    monkeypatch.setattr(train, "speed", lambda *given: iter(measured.append("speed") or ()))
    plant(fault, monkeypatch)
    said = run("bench", "--train", "--quick", "--device", "cpu")
    assert (said.code, said.out, measured) == (cli.UNEXPECTED, "", [])
    last = said.err.splitlines()[-1]
    assert last.startswith("infinitevl: gate: ") and last.endswith("no figures")
    assert ("the delta rule's gradient" if fault == "delta rule" else "stage2_instruct") in last


def plant(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong line: in the rule, in where conversations of a row begin, in the loss."""
    if fault == "delta rule":
        right = reference.delta_rule
        monkeypatch.setattr(reference, "delta_rule", lambda **given: right(**given | {"g": given["g"] * 1.01}))
    elif fault == "packing":
        packed = train.packed

        def joined(rows: list, length: int) -> data.Batch:
            batch = packed(rows, length)
            return batch._replace(segment=batch.segment.clamp(min=1) - 1)  # the first two become one

        monkeypatch.setattr(train, "packed", joined)
    else:
        stepped = train.stepped

        def broken(run: Run, parts: list[data.Part]) -> train.Stepped:
            found = stepped(run, parts)
            return found._replace(gradients={name: each * math.nan for name, each in found.gradients.items()})

        monkeypatch.setattr(train, "stepped", broken)


def test_a_stage_that_is_wrong_has_no_figures(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate walks stage 2; another stage is checked before it is timed."""
    from infinitevl.train import stage1_layers

    right = stage1_layers.squared_error
    wrong = lambda mine, theirs, real: right(mine, theirs * 1.01, real)  # noqa: E731
    checked = train.check
    calls: list[str] = []

    def check(setup: Setup, recipe: Recipe, world: World) -> Iterator[Found]:
        calls.append(recipe.stage)
        if recipe.stage == "stage2_instruct":
            return 0.0
        honest = train.begun

        def begun(*given: object, **more: object) -> Run:
            if not more.get("exact"):
                monkeypatch.setattr(stage1_layers, "squared_error", wrong)
            return honest(*given, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(train, "begun", begun)
        return (yield from checked(setup, recipe, world))

    monkeypatch.setattr(train, "check", check)
    said = run("bench", "--train", "--quick", "--device", "cpu", "--only", "stage1_layers")
    found = json.loads(said.out.splitlines()[-1])
    assert said.code == cli.UNEXPECTED and found["rows"] == []
    assert calls == ["stage2_instruct", "stage1_layers"]
    assert found["failed"][0]["part"] == "stage1_layers" and "no figures" in found["failed"][0]["error"]


# What is asked for


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Speeds that are not measured; part and world of each that was asked for. The gate is open."""
    asked: list[tuple[str, int]] = []

    def speed(setup: Setup, part: str, recipe: Recipe, world: World, *more: object) -> Iterator[Found]:
        asked.append((part, world.size))
        yield Row(part, "real tokens", "tokens/s", 1.5 * world.size)
        return 1.5 * world.size

    monkeypatch.setattr(train, "speed", speed)
    monkeypatch.setattr(train, "check", lambda *given: speed_of_nothing())
    monkeypatch.setattr(train, "gate", lambda world, setup: iter(()))
    return asked


def speed_of_nothing() -> Iterator[Found]:
    yield from ()
    return 0.0


def test_only_some_parts(run: Callable, told: list) -> None:
    assert run("bench", "--train", "--quick", "--device", "cpu", "--only", "stage3_long,stage1_layers").code == 0
    assert told == [("stage3_long", 1), ("stage1_layers", 1)]


def test_all_parts(run: Callable, told: list, tmp_path: Path) -> None:
    said = run("bench", "--train", "--quick", "--device", "cpu", "--out", tmp_path / "x.json")
    assert said.code == 0 and told == [(stage, 1) for stage in STAGES]
    result = json.loads((tmp_path / "x.json").read_text())
    assert json.loads(said.out.splitlines()[-1]) == result and result["options"]["train"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--only", "frame"), "infinitevl: --only frame: the parts are uncompiled, stage2_instruct, stage1_layers,"),
        (("--plot", "figures"), "infinitevl: --plot: --train has no figures to draw"),
        (("--device", "tpu"), "infinitevl: --device tpu: "),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(run: Callable, words: tuple[str, str], complaint: str) -> None:
    said = run("bench", "--train", "--quick", *words)
    assert (said.code, said.out, said.err.count("\n")) == (cli.BAD_INPUT, "", 1)
    assert complaint in said.err


def test_a_stage_without_peft_is_skipped(run: Callable, told: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    said = run("bench", "--train", "--quick", "--device", "cpu", "--only", "stage3_long")
    skipped = json.loads(said.out.splitlines()[-1])["skipped"]
    assert told == [] and "needs peft" in skipped[0]["reason"]


# Several processes


def test_two_processes_are_compared_with_one(tmp_path: Path) -> None:
    """The second says nothing; a step of both is checked against a step of one."""
    (code, out, err), (other, silent, said) = processes("'--only', 'stage1_layers,processes'", tmp_path, 2)
    assert (code, other) == (0, 0), f"{err}\n{said}"
    assert silent == ""
    result = json.loads(out.splitlines()[-1])
    value = {(row["part"], row["name"]): row["value"] for row in result["rows"]}
    gain = value["processes: 2", "real tokens"] / value["processes: one", "real tokens"]
    assert value["processes", "over one"] == pytest.approx(gain)
    assert "stage1_layers" in {skipped["part"] for skipped in result["skipped"]}


# Arithmetic


def scale(layers: tuple[str, ...], window: int | None = 5) -> setup.Scale:
    """Blocks of few channels."""
    text = replace(
        tiny().text,
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
    vision = replace(tiny().vision, depth=1, out_hidden_size=32, full_attention_blocks=(0,))
    config = replace(tiny(), text=text, vision=vision)
    teacher = replace(config, text=replace(text, layers=(SOFTMAX,) * len(layers), window=None))
    return replace(setup.QUICK, config=config, teacher=teacher)


def small(layers: tuple[str, ...], stage: str, **changes: object) -> Run:
    here = Setup(scale(layers), torch.device("cpu"), False)
    return train.begun(here, replace(train.recipe_of(stage, here, ALONE, False), **changes), ALONE)


def row(*lengths: int) -> data.Batch:
    """Conversations in one row without padding, the second half of each an answer."""
    samples = [conversation(length) for length in lengths]
    return data.packed([samples], sum(lengths))


def conversation(length: int) -> data.Sample:
    return train.Talk(100, length, length).sample(length)


def test_work_of_stage_2_by_hand() -> None:
    """A softmax block and a delta block, 12 tokens in conversations of 8 and 4, of which 4 + 2 are learned."""
    run = small((SOFTMAX, DELTA), "stage2_instruct")
    inputs = 32 * (32 + 16 + 16)  # q, k, v of 2 and 1 heads of 16
    softmax, mlp = inputs + 32 * 32, 3 * 32 * 48
    delta = 32 * (32 + 32 + 64 + 64 + 2 + 2) + 64 * 32  # q, k, v, g, a, b and o
    seen = (1 + 2 + 3 + 4 + 5 + 5 + 5 + 5) + (1 + 2 + 3 + 4)  # a window of 5
    scores, rule = 4 * 2 * 16 * seen, 6 * 2 * 16 * 32 * 12
    forward = 2 * 12 * (softmax + mlp + delta + mlp) + scores + rule
    gradients = 2 * 12 * (32 * 32 + mlp + delta + mlp) + 2 * (scores + rule)  # of what is read; of ids there is none
    own = 2 * 12 * (softmax + delta)
    head = 2 * 2 * (4 + 2) * 512 * 32
    assert work.of(run, row(8, 4)) == Work(forward + gradients + own + head, forward)
    assert work.conversations(row(8, 4)) == [8, 4]


def test_padding_is_no_work() -> None:
    run, batch = small((SOFTMAX, DELTA), "stage2_instruct"), row(8, 4)
    padded = data.packed([[conversation(8), conversation(4)]], 40)
    assert work.of(run, padded) == work.of(run, batch)


@pytest.mark.parametrize("stage", STAGES)
def test_products_are_those_that_autograd_makes(stage: str) -> None:
    """torch's own count of every product with a weight, forward and backward."""
    layers = (SOFTMAX, DELTA, DELTA, SOFTMAX, DELTA)
    run, batch = small(layers, stage, checkpointing=False, lora_rank=4 * (stage == "stage3_long")), row(8, 4)
    with FlopCounterMode(display=False) as counter:
        loop.backward(run, iter([data.Part(batch, (0,), (0,), ())]), train.threading.Event())
    counted = counter.get_flop_counts()["Global"]
    products = sum(flops for op, flops in counted.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    scores, rule = 4 * 2 * 16 * work.pairs([8, 4], 5), 6 * 2 * 16 * 32 * 12
    mixing = {
        "stage1_layers": 3 * 3 * rule + 5 * 4 * 2 * 16 * work.pairs([8, 4], None),
        # the first block's scores have no gradient: nothing before the first delta block trains
        "stage1_logits": 3 * 3 * rule + (1 + 3) * scores + 5 * 4 * 2 * 16 * work.pairs([8, 4], None),
    }.get(stage, 3 * 3 * rule + 2 * 3 * scores)
    again = {"stage1_logits": 2 * 2 * 12 * 512 * 32}.get(stage, 0)  # scores of both are made twice, to save memory
    assert work.of(run, batch).needed - mixing == products - again


def test_what_is_recomputed_is_where_a_gradient_passes() -> None:
    layers = (SOFTMAX, DELTA)
    kept = work.of(small(layers, "stage2_instruct", checkpointing=False), row(8, 4))
    again = work.of(small(layers, "stage2_instruct"), row(8, 4))
    assert (kept.again, kept.needed) == (0, again.needed)
    first = 2 * 12 * (32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48) + 4 * 2 * 16 * work.pairs([8, 4], 5)
    assert work.of(small(layers, "stage1_logits"), row(8, 4)).again == again.again - first
    assert work.of(small(layers, "stage1_layers"), row(8, 4)).again == 0


@pytest.mark.parametrize(("window", "count"), [(None, 6 + 1), (2, 5 + 1), (1, 3 + 1), (9, 6 + 1)])
def test_pairs(window: int | None, count: int) -> None:
    assert work.pairs([3, 1], window) == count


def test_speed_mfu_and_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of one and three seconds, 900 real tokens of 1,000, on a device that keeps up 100 FLOP/s."""
    monkeypatch.setattr(work, "sustained", lambda device: 100.0)
    recipe = replace(train.recipes.stage2_instruct(), length=500, batch=1)
    laps = [{"forward": 0.25, "backward": 0.5, "optimiser": 0.25}, {"forward": 0.5, "backward": 2.0, "optimiser": 0.5}]
    taken = train.Timed(recipe, 1, laps, 900, Work(80, 40), 0)
    rows = {each.name: each for each in taken.told("part", torch.device("cpu")) if isinstance(each, Row)}
    assert rows["real tokens"].value == 900 / 4 and rows["real tokens"].floor == pytest.approx(900 / 0.8)
    assert rows["real tokens"].note.startswith("90.0 % of rows of 500 tokens")
    assert rows["step"].value == 2000 and rows["step"].floor == pytest.approx(400)
    assert rows["MFU"].value == pytest.approx(100 * 80 / (4 * 100)) and "30 % with" in rows["MFU"].note
    assert [rows[lap].value for lap in train.LAPS] == [375, 1250, 375]
    many = list(replace_rows(taken, 8).told("part", torch.device("cpu")))
    assert [each.name for each in many] == ["real tokens, 8 rows a step"]


def replace_rows(taken: train.Timed, rows: int) -> train.Timed:
    return taken._replace(rows=rows)


def test_rows_are_timed_again_where_a_block_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    run, compiled = small((SOFTMAX, DELTA), "stage2_instruct"), [3, 0, 0]
    taken = train.Timed(run.recipe, 1, [], 9, Work(1, 0), 0)
    monkeypatch.setattr(train, "_passed_once", lambda *given: taken._replace(graphs=compiled.pop(0)))
    for passes in (2, 1):
        found = train.timed(run, train.Laps(torch.device("cpu")), [])
        assert (found.graphs, found.passes) == (0, passes)
    assert compiled == []
    run.counts.skipped_steps = 1
    compiled.append(0)
    with pytest.raises(RuntimeError, match="not finite"):
        train.timed(run, train.Laps(torch.device("cpu")), [])


def test_laps_are_what_the_loop_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks of a clock that the test moves: two losses of a stage, then the optimiser."""
    now = [0.0]
    monkeypatch.setattr(train.timing, "mark", lambda device: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    def loss(*given: object) -> Iterator[int]:
        for number in range(2):
            passes(1.0)
            yield number

    laps = train.Laps(torch.device("cpu"))
    stage = laps.timed(train.STAGES["stage1_layers"]._replace(loss=loss))  # type: ignore[arg-type]
    laps.begin()
    passes(0.125)
    for _ in stage.loss():  # type: ignore[call-arg]
        passes(10.0)
    passes(100.0)
    laps.end(train.OPTIMISER)
    assert laps.seconds() == [{"forward": 2.0, "backward": 20.0, "optimiser": 100.125}]


# What is trained on


def test_rows_are_conversations_of_unequal_length() -> None:
    here = Setup(replace(setup.QUICK, name="full"), torch.device("cpu"), False)
    for stage, least in (("stage2_instruct", 10), ("stage3_long", 2)):
        recipe = train.recipe_of(stage, here, ALONE, True)
        assert recipe.length == (32_768 if stage == "stage3_long" else 8192) and recipe.compile
        source = partial(train.talk, here, recipe)
        batch = next(iter(data.Feed(source, recipe, range(1), [0]))).batch
        lengths = work.conversations(batch)
        assert len(lengths) >= least and len(set(lengths)) > 1 and sum(lengths) > 0.7 * recipe.length
        share = float((batch.labels[batch.real] != train.IGNORED).float().mean())
        assert share == pytest.approx(0.5, abs=0.02)
        assert_labels_follow(batch)


def assert_labels_follow(batch: data.Batch) -> None:
    """A label is the next id of the same conversation, and positions begin anew."""
    ids, labels, segment = batch.ids[0], batch.labels[0], batch.segment[0]
    learned: Tensor = (labels[:-1] != train.IGNORED).nonzero().flatten()
    assert torch.equal(labels[learned], ids[learned + 1]) and torch.equal(segment[learned], segment[learned + 1])
    begins = (segment[1:] != segment[:-1]).nonzero().flatten() + 1
    assert not batch.positions[:, 0, begins].any()
