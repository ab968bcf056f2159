"""infinitevl bench: the whole command at its smallest, what it refuses, and a gate that closes."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from infinitevl import bench, cli
from infinitevl.bench import aims, breakdown, gate, report, transformer
from infinitevl.bench.plot import draw
from infinitevl.bench.setup import QUICK, THEIRS, Check, Found, Row, Setup, Skipped
from infinitevl.config import ModelConfig
from infinitevl.ops import reference

SOURCE = Path(__file__).parents[2] / "src"


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """`infinitevl bench --quick`, once: the file it wrote and its standard output."""
    out = tmp_path_factory.mktemp("bench") / "quick.json"
    words = ["bench", "--quick", "--device", "cpu", "--out", out.name]
    done = python(f"from infinitevl.cli import main; main({words})", out.parent)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture
def result(smoke: tuple[Path, str]) -> dict:
    return json.loads(smoke[0].read_text())


def test_quick_run_says_it_all(smoke: tuple[Path, str], result: dict) -> None:
    assert json.loads(smoke[1].splitlines()[-1]) == result
    assert (result["format"], result["scale"], result["failed"]) == ("infinitevl.bench", "quick", [])
    assert {"name", "clocks"} <= result["hardware"].keys() and result["versions"]["torch"] == torch.__version__
    parts = {row["part"] for row in result["rows"]}
    assert {part for part in parts if not part.startswith(("breakdown,", "kernels: "))} == {*bench.PARTS, aims.AGAINST}
    names = {(row["part"], row["name"]) for row in result["rows"]}
    assert len(names) == len(result["rows"])
    assert {("frame", "one stream"), ("streams", "4 at once"), ("transformer", "sampled over whole prefill")} <= names
    assert {("state", f"rule alone, {n} tokens: plain PyTorch, in chunks") for n in QUICK.updates} <= names
    assert all(math.isfinite(row["value"]) and row["unit"] for row in result["rows"])
    assert all(row["aim"] is None for row in result["rows"])  # they are for another machine and model
    assert all(skipped["reason"] for skipped in result["skipped"])


def test_gate_walks_every_path_of_both_models(result: dict) -> None:
    gates = result["gate"]
    assert gates["green"]
    walked = [check["path"].split(", ") for check in gates["checks"]]
    assert [path for whose, path, *_ in walked if whose == "InfiniteVL"][2:] == ["eager", "a stream", "a slot of two"]
    assert [path for whose, path, *_ in walked if whose == "Transformer"][2:] == ["eager"]
    assert all(check["error"] <= check["bound"] for check in gates["checks"])


@pytest.mark.parametrize(
    ("part", "whole"),
    [
        ("breakdown", "the whole frame"),
        ("breakdown, 4 streams", "the whole step"),
        ("breakdown, text of 64", "the whole text"),
    ],
)
def test_parts_of_a_step_sum_to_the_whole(result: dict, part: str, whole: str) -> None:
    parts = {row["name"]: row["value"] for row in result["rows"] if row["part"] == part}
    whole = parts.pop(whole)
    parts.pop("vision alone", None)
    assert sum(parts.values()) == pytest.approx(whole)
    assert {breakdown.IDLE, "matrix products"} <= parts.keys()


def test_memory_does_not_grow(result: dict) -> None:
    rows = {row["name"]: row["value"] for row in result["rows"] if row["part"] == "frame"}
    assert rows["bytes grown"] == 0
    assert len({*next(curve["y"] for curve in result["curves"] if curve["name"] == "bytes allocated")}) == 1


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Parts that measure nothing; the names of those that ran."""
    ran: list[str] = []

    def part(name: str) -> Callable[[Setup], Iterator[Found]]:
        def measure(setup: Setup) -> Iterator[Found]:
            ran.append(name)
            yield Row(name, "figure", "ms", 2.0)

        return measure

    monkeypatch.setattr(bench, "PARTS", {name: part(name) for name in bench.PARTS})
    return ran


@pytest.mark.parametrize("fault", ["delta rule", "ring", "slots"])
def test_no_figures_where_the_gate_is_not_green(
    run: Callable, measured: list[str], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    plant(fault, monkeypatch)
    said = run("bench", "--quick", "--device", "cpu")
    assert (said.code, said.out, measured) == (cli.UNEXPECTED, "", [])
    last = said.err.splitlines()[-1]
    assert last.startswith("infinitevl: gate: InfiniteVL, ") and last.endswith("no figures")


def plant(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong line: in the delta rule, in the ring, in a batch."""
    if fault == "delta rule":
        right = reference.delta_rule

        def forgets(**given: object) -> tuple:
            return right(**given | {"g": given["g"] * 1.01})

        monkeypatch.setattr(reference, "delta_rule", forgets)
    elif fault == "ring":
        from infinitevl import memory

        slot = memory.slot
        monkeypatch.setattr(memory, "slot", lambda index, slots, sinks: (slot(index, slots, sinks) // 2) * 2)
    else:
        from infinitevl.batch import StreamBatch

        there = StreamBatch._there
        monkeypatch.setattr(StreamBatch, "_there", lambda self, slots: torch.ones_like(there(self, slots)))


def test_no_figure_of_a_transformer_that_is_wrong(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(setup: Setup, whose: str, config: ModelConfig) -> Iterator[Check]:
        yield Check(f"{whose}, first path", 0.0, 1.0)
        if whose == THEIRS:
            raise gate.GateError("gate: too far: no figures")

    monkeypatch.setattr(gate, "check", check)
    said = run("bench", "--quick", "--device", "cpu", "--only", "transformer")
    found = json.loads(said.out.splitlines()[-1])
    assert said.code == cli.UNEXPECTED and found["rows"] == []
    assert found["failed"] == [{"part": "transformer", "error": "GateError: gate: too far: no figures"}]


def test_only_some_parts(run: Callable, measured: list[str], open_gate: None) -> None:
    assert run("bench", "--quick", "--device", "cpu", "--only", "state,decode").code == 0
    assert measured == ["state", "decode"]


@pytest.fixture
def open_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what comes after it."""
    monkeypatch.setattr(gate, "check", lambda setup, whose, config: iter(()))


def test_a_part_that_fails_does_not_take_the_others_along(
    run: Callable, measured: list[str], open_gate: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(setup: Setup) -> Iterator[Found]:
        yield Row("prefill", "before", "ms", 1.0)
        raise RuntimeError("two\nlines")

    def too_large(setup: Setup) -> Iterator[Found]:
        yield Skipped("decode", "one", "no room")
        raise torch.OutOfMemoryError("full")

    monkeypatch.setitem(bench.PARTS, "prefill", broken)
    monkeypatch.setitem(bench.PARTS, "decode", too_large)
    said = run("bench", "--quick", "--device", "cpu")
    found = json.loads(said.out.splitlines()[-1])
    assert said.code == cli.UNEXPECTED
    assert found["failed"] == [{"part": "prefill", "error": "RuntimeError: two lines"}]
    assert [skipped["reason"] for skipped in found["skipped"]] == ["no room", "not enough memory: full"]
    assert measured == [name for name in bench.PARTS if name not in ("prefill", "decode")]
    assert "FAILED: prefill: RuntimeError: two lines" in said.out


def test_out_of_time(run: Callable, measured: list[str], open_gate: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BUDGET", bench.LONGEST)
    said = run("bench", "--quick", "--device", "cpu")
    skipped = json.loads(said.out.splitlines()[-1])["skipped"]
    assert measured == [] and [each["part"] for each in skipped] == list(bench.PARTS)
    assert run("bench", "--quick", "--full", "--device", "cpu").code == 0 and measured == list(bench.PARTS)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--only", "frame,frames"), "infinitevl: --only frames: the parts are frame, breakdown, decode,"),
        (("--only", ""), "infinitevl: --only : the parts are frame, breakdown, decode,"),
        (("--device", "tpu"), "infinitevl: --device tpu: "),
        (("--against", "none.json"), "infinitevl: none.json: cannot be read as a result: "),
        (("--out", "none/x.json"), "infinitevl: none/x.json: nothing can be written there"),
        (("--plot", "file"), "no folder that can be written to"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, str], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    said = run("bench", "--quick", *words)
    assert (said.code, said.out, said.err.count("\n")) == (cli.BAD_INPUT, "", 1)
    assert complaint in said.err


def test_foreign_file_to_compare_with(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"format": "other"}')
    said = run("bench", "--quick", "--against", tmp_path / "other.json")
    assert said.code == cli.BAD_INPUT and "not a result of infinitevl bench" in said.err


def test_against_prints_ratios(
    run: Callable, smoke: tuple[Path, str], result: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = copy.deepcopy(result)
    row = next(row for row in now["rows"] if row["name"] == "one stream")
    row["value"] *= 2
    now["rows"].append(row | {"name": "a new figure"})
    monkeypatch.setattr(bench, "run", lambda options, tell: now)
    said = run("bench", "--quick", "--against", smoke[0])
    line = next(line for line in said.out.splitlines() if " one stream " in line)
    assert said.code == 0 and line.split()[-2:] == [report.number(row["value"] / 2), "2"]
    assert f"then: {result['hardware']['name']}" in said.out and "unlike" not in said.out
    new = next(line for line in said.out.splitlines() if "a new figure" in line)
    assert new.split()[-1] == "frames/s"
    now["dtype"] = "bfloat16"
    assert "note: dtype differ" in run("bench", "--quick", "--against", smoke[0]).out


def test_figures_from_a_stored_result(result: dict, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = draw(result, tmp_path / "figures")
    assert [path.name for path in drawn] == ["context.png", "stream.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    whose = {(curve["name"], curve["whose"]) for curve in result["curves"] if curve["x"]}
    wanted = ("prefill s", "decode ms", "memory bytes", "frames a second")
    assert {(name, who) for name in wanted for who in ("InfiniteVL", "Transformer")} <= whose
    with pytest.raises(bench.BenchError, match="nothing to draw"):
        draw(result | {"curves": []}, tmp_path)


def test_aims_are_for_the_full_model_on_an_h200() -> None:
    row = Row("frame", "one stream", "frames/s", 117.0)
    beside = aims.beside(row, "NVIDIA H200", "full")
    assert (beside["aim"], beside["stretch"], beside["floor"]) == (130, 150, 240)
    assert beside["reached"] == pytest.approx(0.9)
    assert aims.beside(row, "NVIDIA H200", "quick")["aim"] is None
    assert aims.beside(row, "NVIDIA GeForce RTX 4090", "full")["aim"] is None
    assert aims.reached(8.0, aims.Aim(aims.LOWER, 6)) == pytest.approx(0.75)
    assert [aims.reached(value, aims.Aim(aims.LOWER, 0)) for value in (0, 512)] == [1, 0]


def test_every_aim_has_its_row() -> None:
    """Names of the full scale, so that no aim is left without a figure by a rename."""
    scale = bench.FULL
    names = {("prefill", f"prefill of {length:,} tokens") for length in scale.lengths}
    names |= {("streams", f"{slots} at once") for slots in (1, *scale.slots)}
    names |= {("decode", f"{scale.slots[-1]} streams")}
    for name in ("prefill of {:,} tokens", "after {:,} tokens", "frames after {:,} tokens"):
        names |= {(aims.AGAINST, name.format(length)) for length in scale.lengths}
    fixed = {("decode", "1 stream"), ("streams", "memory of each further stream")}
    fixed |= {
        (part, name) for part, name in aims.AIMS if part in ("frame", "question", "transformer") and "FP8" not in name
    }
    fixed |= {("stage2_instruct", "real tokens"), ("processes", "over one")}  # of --train
    fixed |= {("frame", "one stream, FP8"), ("decode", "1 stream, FP8")}  # of --fp8
    assert set(aims.AIMS) == names | fixed


def test_ratios_to_the_transformer() -> None:
    rows = [
        Row("frame", "one stream", "frames/s", 120.0),
        Row("decode", "after 8 tokens", "tokens/s", 30.0),
        Row("transformer", "after 8 tokens", "tokens/s", 10.0, note="sampled"),
        Row("transformer", "frames after 8 tokens", "frames/s", 240.0),
        Row("transformer", "prefill of 8 tokens", "tokens/s", 1.0),
    ]
    found = {row.name: (row.value, row.note) for row in aims.against_transformer(rows)}
    assert found == {"after 8 tokens": (3.0, "sampled"), "frames after 8 tokens": (0.5, "")}


def test_sampled_prefill_is_the_sum_of_its_chunks() -> None:
    """A chunk's cost that grows with the cache is summed exactly, beyond the last sample too."""
    length, chunk = 1 << 20, 8192
    depths = [length * part // 8 for part in range(8)]
    exact = sum(0.1 + 3e-6 * start for start in range(0, length, chunk))
    assert transformer.integral(depths, [0.1 + 3e-6 * depth for depth in depths], length, chunk) == pytest.approx(exact)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", "matrix products"),
        ("cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>", "matrix products"),
        ("_one_row", "matrix products"),
        ("pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("_attend_kernel", "attention"),
        ("_prepare", "delta rule"),
        ("chunk_gated_delta_rule_fwd_kernel_h_blockdim64", "delta rule"),
        ("_rms_norm", "norms, rotations, sums"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>", "norms, rotations, sums"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("something else", breakdown.REST),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert breakdown.kind(name) == kind


def test_runs_where_little_else_is_installed(tmp_path: Path) -> None:
    """The module form needs none of the command line's packages."""
    blocked = "import sys\nfor name in ('typer', 'rich', 'transformers', 'matplotlib'): sys.modules[name] = None\n"
    code = blocked + "import runpy; sys.argv = ['bench', '--quick', '--only', 'none']\n"
    code += "runpy.run_module('infinitevl.bench', run_name='__main__')"
    done = python(code, tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("infinitevl: --only none: the parts are frame,")
