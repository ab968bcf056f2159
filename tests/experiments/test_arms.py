"""The experiments' own lines run from end to end at toy size; arms stop before a limit, and go on from there."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments"
sys.path.insert(0, str(FOLDER))

import arms  # noqa: E402
import beside  # noqa: E402
import plot  # noqa: E402
import toy  # noqa: E402

from infinitevl import weights  # noqa: E402
from infinitevl.synth import heldout  # noqa: E402
from infinitevl.train.convert import convert  # noqa: E402

EXPERIMENTS = ("distillation", "softmax_share", "length", "saturation", "data", "state_precision", "student")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A folder with the toy's teacher and student."""
    folder = tmp_path_factory.mktemp("toy")
    toy.checkpoints(folder)
    return folder


@pytest.fixture
def few_questions(monkeypatch):
    """The held-out test with what is asked in the first moments of the first stream of each world."""
    asks = tuple(ask for ask in heldout.plan() if ask.stream == 0 and ask.frame < 48)
    monkeypatch.setattr(heldout, "plan", lambda: asks)


def results(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results" / "arms.jsonl").read_text().splitlines()]


def refusal(command: Callable[[], object], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """What a command says that ends with this code; the last line, after the usage."""
    with pytest.raises(SystemExit) as left:
        command()
    assert left.value.code == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_runs_from_end_to_end(tmp_path, checkpoints, few_questions, experiment, capsys):
    for name in ("teacher", "student"):
        (tmp_path / name).symlink_to(checkpoints / name)
    words = [experiment, "--toy", "--processes", "0", "--out", str(tmp_path)]
    assert arms.main(words) == 0
    rows, recipe = results(tmp_path), runpy.run_path(str(FOLDER / experiment / "recipe.py"))
    lines = recipe["arms"](lambda count: 2)
    asked = Counter((name, line) for name in recipe["TOY"] for line in lines[name] if line.startswith(arms.EVALUATES))
    assert Counter((row["arm"], row["line"]) for row in rows) == asked
    for row in rows:
        assert row["experiment"] == experiment and row["versions"]["torch"] and row["hardware"]["cpu"]
        assert (row["tokens"] > 0) == (row["steps"] > 0) == (row["after"] is not None)
        assert ("student" in row) == ("{student}" in row["line"])
    assert plot.draw(experiment, tmp_path / "results").stat().st_size > 5000
    assert "--resume goes on with them" in refusal(lambda: arms.main(words), capsys)
    (tmp_path / "results" / "arms.jsonl").unlink()  # as where runs are kept and results are not
    assert arms.main([*words, "--resume"]) == 0
    assert results(tmp_path) == rows


def trained(lines: list[str]) -> int:
    """Training tokens of an arm, in steps of the common size; a row of stage 3 is four times as long."""
    steps = 0
    for line in lines:
        if line.startswith("train"):
            given = {key: value for key, value in (word.split("=", 1) for word in line.split()[2:])}
            long = 4 if "stage3" in line else 1
            steps += int(given["steps"]) * int(given.get("batch", arms.TRAIN["batch"])) * long
    return steps


@pytest.mark.parametrize("experiment", ["distillation", "softmax_share"])
@pytest.mark.parametrize("scale", [1, 2.5])
def test_all_arms_see_equally_many_tokens(experiment, scale):
    recipe = runpy.run_path(str(FOLDER / experiment / "recipe.py"))
    counts = {name: trained(lines) for name, lines in recipe["arms"](lambda count: round(scale * count)).items()}
    assert len(set(counts.values())) == 1, counts


def test_shares_of_the_data_are_what_they_are_called():
    lines = runpy.run_path(str(FOLDER / "data" / "recipe.py"))["arms"](round)
    whole = trained(lines["all"])
    assert trained(lines["all_undistilled"]) == whole
    assert trained(lines["tenth"]) == pytest.approx(whole / 10, rel=0.02)
    assert trained(lines["fiftieth"]) == pytest.approx(whole / 50, rel=0.1)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_line_can_be_spelled(experiment, tmp_path, monkeypatch):
    """Recipes are known and take their changes; options come in pairs; every seed has arms of its own."""
    from infinitevl.train.recipes import recipe

    place = arms.Place(experiment, tmp_path, "teacher", "student", 1.0, False)
    every = arms.arms(place)
    assert len({arm.title for arm in every}) == len(every) == len({arm.folder for arm in every})
    for arm in every:
        for number, line in enumerate(arm.lines):
            words = arms.spelled(line, arm, place, "last", tmp_path / "out")
            assert "{" not in " ".join(words), number
            if words[0] == "train":
                made = recipe(words[1], words[2 : words.index("--out")])
                assert made.seed == arm.seed and made.compact and made.batch % made.micro == 0


def test_a_scratch_model_has_the_shape_and_nothing_else(tmp_path, checkpoints):
    one, other = tmp_path / "one", tmp_path / "other"
    assert arms.scratch(checkpoints / "student", one, 1) == arms.scratch(checkpoints / "student", other, 2) == 0
    taught, first, second = (weights.load(folder) for folder in (checkpoints / "student", one, other))
    assert first.config == taught.config
    pairs = zip(taught.named_parameters(), first.parameters(), second.parameters(), strict=True)
    for (name, a), b, c in pairs:
        if a.dim() == 2 and name.endswith("weight"):
            assert not torch.equal(a, b) and not torch.equal(b, c), name


def test_stopped_on_the_way_and_resumed(tmp_path, checkpoints, monkeypatch):
    """SIGTERM reaches the training, which saves; the arm goes on from there, and lines that are done are not redone."""
    convert(checkpoints / "teacher", tmp_path / "toys" / "start", window=64)
    folder = tmp_path / "experiments"
    folder.mkdir()
    for name in ("arms.py", "beside.py", "toy.py"):
        (folder / name).symlink_to(FOLDER / name)
    changes = "batch=2 micro=1 workers=0 compile=false length=320 synth_frames=9 log_every=1 device=cpu"
    lines = [
        "convert {teacher} {out} --window 64",
        f"train stage2_instruct_tiny student={{last}} seed={{seed}} steps=16 {changes}",
    ]
    (folder / "short").mkdir()
    (folder / "short" / "recipe.py").write_text(f"SEEDS = (3,)\ndef arms(steps):\n    return {{'one': {lines!r}}}\n")
    command = [sys.executable, str(folder / "arms.py"), "short", "--teacher", str(checkpoints / "teacher")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}"}
    began = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    arm = folder / "short" / "runs" / "one-3"
    log = arm / "1" / "log.jsonl"
    deadline = time.monotonic() + 90
    while not (log.exists() and log.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    began.send_signal(signal.SIGTERM)
    said, _ = began.communicate(timeout=60)
    assert began.returncode == 130 and "stopped; --resume goes on" in said
    journal = [json.loads(line) for line in (arm / "journal.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["code"]) for entry in journal] == [(0, 0), (1, 130)]
    assert 2 <= log.read_text().count("\n") < 16
    done = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + (arm / "out.txt").read_text()
    journal = [json.loads(line) for line in (arm / "journal.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["code"]) for entry in journal] == [(0, 0), (1, 130), (1, 0)]
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 17))


def test_a_limit_ends_everything(tmp_path):
    """What runs when time is over is told to stop, what is deaf to that is killed, what waits is not begun."""
    deaf = tmp_path / "deaf.py"
    deaf.write_text(
        "import signal, time, pathlib\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(tmp_path / 'here')!r}).touch()\ntime.sleep(60)\n"
    )
    jobs = {"short": (str(tmp_path / "short.py"),), "deaf": (str(deaf),), "late": (str(deaf),)}
    (tmp_path / "short.py").write_text("")
    began = time.monotonic()
    codes = beside.side_by_side(runpy.run_path, {"deaf": jobs["deaf"], "short": jobs["short"]}, 2, 10.0)
    assert time.monotonic() - began < 12 and (tmp_path / "here").exists()
    assert codes == {"short": 0, "deaf": beside.STOPPED[0]}  # --resume may go on with it: it did not fail
    codes = beside.side_by_side(time.sleep, {"one": (60,), "late": (60,)}, 1, 3.0)
    assert codes == {"one": -signal.SIGTERM}


def test_processes_are_shared_out_over_gpus(tmp_path, monkeypatch):
    """Each sees one; what is visible here is as before."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert arms.gpus() == ["5", "7"]
    look = tmp_path / "look.py"
    look.write_text(
        "import os, pathlib, tempfile, time\n"
        f"tempfile.mkstemp(prefix=os.environ['CUDA_VISIBLE_DEVICES'] + '-', dir={str(tmp_path)!r})\n"
        f"while len(list(pathlib.Path({str(tmp_path)!r}).glob('[57]-*'))) < 4:\n    time.sleep(0.05)\n"
    )
    codes = beside.side_by_side(runpy.run_path, {f"job{n}": (str(look),) for n in range(4)}, 4, 60.0, arms.gpus())
    assert set(codes.values()) == {0} and os.environ["CUDA_VISIBLE_DEVICES"] == "5,7"
    assert sorted(path.name.split("-")[0] for path in tmp_path.glob("[57]-*")) == ["5", "5", "7", "7"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert arms.gpus() == ["0", "1"]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--only", "half"], "--only and --seeds leave no arm; there are full-1"),
        (["--only", "full-1", "--seeds", "2", "3"], "--only and --seeds leave no arm; there are full-1"),
        (["--teacher", "nowhere"], "nowhere: no checkpoint there"),
        (["--processes", "-3"], "--processes is 0 or more"),
        (["--seconds", "-1"], "--seconds and --scale are above 0"),
        (["--scale", "0"], "--seconds and --scale are above 0"),
    ],
)
def test_refusals(tmp_path, words, match, capsys):
    assert match in refusal(lambda: arms.main(["distillation", "--out", str(tmp_path), *words]), capsys)


def test_a_plot_of_nothing_is_refused_and_one_of_a_toy_run_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plot, "HERE", tmp_path)
    for words in (["distillation"], ["length"], ["data", "--toy"]):
        assert "arms.jsonl: no results there" in refusal(lambda words=words: plot.main(words), capsys)
    results = tmp_path / "distillation" / "runs" / "toy" / "results"
    results.mkdir(parents=True)
    (results / "arms.jsonl").touch()  # as before the first evaluation has ended
    assert "no results there" in refusal(lambda: plot.main(["distillation", "--toy"]), capsys)
    found = {name: {"total": [1, 2]} for name in ("now", "fonts", "age1", "age2", "age4", "age8")}
    about = {
        "experiment": "distillation",
        "arm": "full",
        "seed": 1,
        "line": "eval",
        "steps": 2,
        "tokens": 9,
        "scale": 1.0,
        "result": found,
    }
    (results / "arms.jsonl").write_text(json.dumps(about) + "\n")
    plot.main(["distillation", "--toy"])
    assert (results / "figure.png").stat().st_size > 5000 and "| full | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "words", "code", "says"),
    [
        ("fp8/accuracy.py", "--model nosuch", 3, "nosuch: no such folder"),
        ("fp8/accuracy.py", "--streams 0", 2, "--streams 0: a world has 1 to 96"),
        ("state_precision/logits.py", "nosuch --out x", 3, "nosuch: no such folder"),
        ("state_precision/logits.py", "tiny --out x --streams 0", 2, "--streams are 1 or more"),
        ("state_precision/logits.py", "tiny --out x --every 0", 2, "--tokens, --every"),
    ],
)
def test_scripts_refuse_in_one_line(script, words, code, says, capsys):
    command = runpy.run_path(str(FOLDER / script))["main"]
    assert says in refusal(lambda: command(words.split()), capsys, code)


def test_a_failed_arm_is_named_and_the_others_go_on(tmp_path, capsys):
    """The exit code of a line that fails ends its arm, and the run tells."""
    place = arms.Place("data", tmp_path, "teacher", "student", 1.0, True)
    bad = arms.Arm("bad", 1, ("convert nowhere {out}",), tmp_path / "runs" / "bad-1")
    worse = arms.Arm("worse", 1, ("script logits.py nowhere",), tmp_path / "runs" / "worse-1")
    precise = replace(place, experiment="state_precision", toy=False)
    assert arms.one_by_one([bad], place) | arms.one_by_one([worse, bad], precise) == {"bad-1": 3, "worse-1": 3}
    assert bad.journal[0]["code"] == 3 and "nowhere" in capsys.readouterr().err
    assert beside.ending(3) == "failed with 3: its out.txt says why"


def test_the_table_has_the_last_evaluation_of_each_seed(tmp_path):
    """Of the newest scale only, and of what was not trained; arms as the recipe has them, means over seeds, and least
    to greatest."""

    def line(arm: str, seed: int, steps: int, right: int, scale: float = 1.0) -> str:
        result = {name: {"total": [right, 100]} for name in ("now", "fonts", "age1", "age2", "age4", "age8")}
        about = {"experiment": "data", "arm": arm, "seed": seed, "line": str(steps), "steps": steps, "scale": scale}
        return json.dumps(about | {"tokens": 2_000_000, "result": result}) + "\n"

    path = tmp_path / "arms.jsonl"
    path.write_text(
        line("all", 1, 9, 99, 2.0) + line("gone", 1, 5, 0) + line("all", 1, 5, 10) + line("all", 1, 8, 20)
        + line("untrained", 1, 0, 3, 2.0) + line("all", 2, 5, 0) + line("all", 2, 8, 40) + line("tenth", 1, 8, 7)
    )  # fmt: skip
    said = plot.table(plot.newest(path)).splitlines()[2:]
    assert [row.split(" | ")[0] for row in said] == ["| tenth", "| all", "| gone", "| untrained"]
    assert said[0] == "| tenth | 1 | 2.0 |" + 3 * " 7.0 |"
    assert said[1] == "| all | 2 | 2.0 |" + 3 * " 30.0 (20.0 to 40.0) |"


def test_an_arm_that_takes_times_runs_alone(tmp_path):
    """Nothing is begun beside it, and it is not begun beside anything; others do run at once."""
    here = tmp_path / "here"
    here.mkdir()
    common = f"import os, pathlib, sys, time\nhere = pathlib.Path({str(here)!r})\n(here / str(os.getpid())).touch()\n"
    there, leave = "len(list(here.iterdir()))", "(here / str(os.getpid())).unlink()\n"
    pair, single = tmp_path / "pair.py", tmp_path / "single.py"
    wait = f"end = time.monotonic() + 30\nwhile {there} < 2 and time.monotonic() < end:\n    time.sleep(0.05)\n"
    pair.write_text(f"{common}{wait}met = {there} > 1\ntime.sleep(1)\n{leave}sys.exit(0 if met else 1)\n")
    look = f"most = 0\nfor _ in range(10):\n    most = max(most, {there})\n    time.sleep(0.1)\n"
    single.write_text(f"{common}{look}{leave}sys.exit(most - 1)\n")
    jobs = {"one": (str(pair),), "other": (str(pair),), "timed": (str(single),), "last": (str(single),)}
    codes = beside.side_by_side(runpy.run_path, jobs, 3, 60.0, alone=["timed"])
    assert codes == dict.fromkeys(jobs, 0)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_arms_that_take_times_come_last(experiment, tmp_path):
    every = arms.arms(arms.Place(experiment, tmp_path, "teacher", "student", 1.0, False))
    alone = [arm.alone for arm in every]
    assert alone == sorted(alone) and sum(alone) == (3 if experiment == "length" else 0)
