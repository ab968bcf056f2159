"""The soak, in small: it runs, says what it saw, and a memory that grows or a process that leaks makes it fail."""

from __future__ import annotations

import importlib.util
import json
import mmap
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("sklearn")

SCRIPT = Path(__file__).parents[2] / "experiments" / "soak" / "run.py"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("soak_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def notes(soak, resident: list[int], nbytes: list[int]):
    return soak.Notes(np.arange(len(resident) * 10, dtype=np.float32), resident, nbytes, 4, 1)


def test_bounds_hold_on_a_flat_line(soak):
    found = soak.result(notes(soak, [90, *[100] * 99], [7] * 100), 1000, 10)
    assert found["holds"] and found["frames"] == 1000 and found["resident"]["growth"] == 0
    assert found["ms_per_frame"]["first_1000"]["mean"] == pytest.approx(499.5)
    warm = [0] * 9 + [50 << 20] * 91  # what the first tenth adds is warming up
    assert soak.result(notes(soak, warm, [7] * 100), 1000, 10)["holds"]


def test_every_bound_can_fail(soak):
    flat = [100] * 100
    assert not soak.result(notes(soak, flat, [7] * 99 + [8]), 1000, 10)["holds"]
    leak = [number << 16 for number in range(100)]  # 64 KiB a sample: 5.7 MiB over the last nine tenths
    assert soak.result(notes(soak, leak, [7] * 100), 1000, 10)["resident"]["growth"] == 90 << 16
    assert not soak.result(notes(soak, leak, [7] * 100), 1000, 10)["holds"]
    assert not soak.result(notes(soak, flat[:50], [7] * 50), 1000, 10)["holds"], "not yet at the end"


def test_a_leak_of_the_stream_is_seen_and_ends_in_exit_code_1(soak, tmp_path, monkeypatch, capsys):
    """A stream that keeps what it was shown, 735 KiB a frame, in pages of its own: the allocator might fill room that
    earlier tests left."""
    kept, observe = [], soak.Stream.observe

    def leaky(stream, frame):
        pages = mmap.mmap(-1, 20 * frame.pixels.nbytes)
        pages.write(20 * frame.pixels.tobytes())
        kept.append(pages)
        observe(stream, frame)

    monkeypatch.setattr(soak, "HERE", tmp_path)
    monkeypatch.setattr(soak, "ASK_EVERY", 40)
    monkeypatch.setattr(soak.Stream, "observe", leaky)
    assert soak.main(["--random", "--frames", "100"]) == 1
    told = json.loads((tmp_path / "runs" / "soak.json").read_text())
    assert told["questions"]["asked"] == 2 and told["nbytes"]["identical"]
    assert told["resident"]["growth"] > 30 << 20 and not told["holds"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["soak.json"]
    captured = capsys.readouterr()
    assert captured.out.startswith("DOES NOT HOLD: ") and "100 of 100 frames" in captured.err
    assert "min left" in captured.err.splitlines()[0]


def test_the_stream_goes_on_over_the_end_of_a_story(soak, monkeypatch):
    monkeypatch.setattr(soak, "STORY", 8)
    monkeypatch.setattr(soak, "HELDOUT_SETTING", replace(soak.HELDOUT_SETTING, sign_gaps=(1, 2)))
    shown = [next_one for next_one, _ in zip(soak.shown(), range(20), strict=False)]
    assert [frame for _, _, frame in shown] == [*range(8), *range(8), *range(4)]
    assert [int(stories.t0[0]) for _, stories, _ in shown[::8]] == [0, 8, 16]
    assert all(picture.shape == (112, 112, 3) and picture.dtype == np.uint8 for picture, _, _ in shown)
    assert len({picture.tobytes() for picture, _, _ in shown}) == 20


def test_a_result_says_how_it_was_made(soak, tmp_path, capsys):
    out = tmp_path / "new" / "soak.json"
    code = soak.main(["--random", "--frames", "100", "--out", str(out)])
    told = json.loads(out.read_text())
    assert code == (0 if told["holds"] else 1)  # 100 frames are warming up: their growth is not judged here
    assert told["frames"] == told["of"] == 100 and told["nbytes"]["identical"]
    assert told["nbytes"]["first"] > 1e6 and len(told["resident"]["samples_mib"]) == 100
    assert 1 < told["ms_per_frame"]["last_1000"]["median"] < 1000
    assert {"command", "date", "commit", "hardware", "versions", "seconds", "ops"} <= set(told)
    assert capsys.readouterr().out.endswith(f"{out}\n") and list(out.parent.iterdir()) == [out]


def test_a_number_of_frames_that_cannot_be_sampled_is_refused(soak, capsys):
    with pytest.raises(SystemExit) as refused:
        soak.main(["--frames", "250"])
    assert refused.value.code == 2 and "multiple of 100" in capsys.readouterr().err


@pytest.mark.soak
def test_a_hundred_thousand_frames(tmp_path):
    done = subprocess.run([sys.executable, str(SCRIPT), "--out", str(tmp_path / "soak.json")])
    assert done.returncode == 0
    assert json.loads((tmp_path / "soak.json").read_text())["frames"] == 100_000
