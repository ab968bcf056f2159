"""Every bash and python block of the README runs, in the README's order, in one copy of the project.

A block under `<!-- not run: reason -->` is left out; only installing, the make targets, and what needs a GPU may be.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
SECONDS = 300  # for one block

_FENCE = re.compile(r"(?:^<!-- not run: (?P<reason>.+?) -->\n+)?^```(?P<language>.*)\n(?P<code>[\s\S]*?)^```$", re.M)
_INSTALLING = re.compile(r"(git clone|cd|make( (demo|test|test-newest|soak))?|(python3? -m )?pip install)\b.*|#.*|")
_ON_A_GPU = re.compile(r"cuda|experiments/|benchmarks/")
_RUN = ("bash", "python")
_SHOWN = ("text", "json", "toml")  # output and file contents


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, code, line in the file, and the reason why it is not run, if it is not."""

    language: str
    code: str
    line: int
    reason: str | None = None


def blocks(text: str) -> Iterator[Block]:
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start("language")) + 1
        yield Block(found["language"].strip(), found["code"], line, found["reason"])


def run(block: Block, folder: Path) -> None:
    """Runs the block in `folder`; AssertionError with its last output unless it ends well within SECONDS."""
    shell = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*shell, block.code],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    said = f"README.md line {block.line} ended with {done.returncode}:\n{block.code}\n{done.stdout[-4000:]}"
    assert done.returncode == 0, said


def excused(block: Block) -> bool:
    """Whether a block may be left out: it installs or is a make target, or it says that it needs a GPU and uses one."""
    if "GPU" in (block.reason or "") and _ON_A_GPU.search(block.code):
        return True
    return all(_INSTALLING.fullmatch(line.strip()) for line in block.code.splitlines())


BLOCKS = list(blocks(README.read_text(encoding="utf-8"))) if README.exists() else []
RUN = [block for block in BLOCKS if block.language in _RUN and block.reason is None]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, without environments and caches; a block may use files that an earlier one wrote."""
    copy = tmp_path_factory.mktemp("readme") / "project"
    left = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", "build", "dist", "runs")
    return Path(shutil.copytree(ROOT, copy, ignore=left))


@pytest.mark.parametrize("block", RUN, ids=lambda block: f"line-{block.line}")
def test_block_runs(block: Block, project: Path) -> None:
    run(block, project)


def test_readme_has_blocks_of_both_kinds() -> None:
    assert {block.language for block in RUN} == set(_RUN)


def test_every_fence_is_a_block_with_a_known_language() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(re.findall(r"^\s*(```|~~~)", text, re.M)) == 2 * len(BLOCKS)
    assert [b.line for b in BLOCKS if b.language not in (*_RUN, *_SHOWN)] == []


def test_only_what_cannot_run_here_is_left_out() -> None:
    assert [(b.line, b.reason) for b in BLOCKS if b.reason is not None and not excused(b)] == []


SAMPLE = """\
<!-- not run: installs -->
```bash
git clone somewhere
make demo
```

```python
print(1)
```
```text
 1
```
<!-- not run: slow -->

```bash
infinitevl watch film.mp4
```
"""


def test_sample_is_read() -> None:
    first, second, third, last = blocks(SAMPLE)
    assert first == Block("bash", "git clone somewhere\nmake demo\n", 2, "installs")
    assert second == Block("python", "print(1)\n", 7)
    assert (third.language, third.reason) == ("text", None)
    assert (last.line, last.reason) == (15, "slow")
    assert excused(first) and not excused(last)


def test_a_gpu_must_be_said_and_used() -> None:
    assert excused(Block("python", "load('x', device='cuda')\n", 1, "needs a GPU"))
    assert not excused(Block("python", "load('x', device='cuda')\n", 1, "slow"))
    assert not excused(Block("bash", "infinitevl watch film.mp4\n", 1, "needs a GPU"))


@pytest.mark.parametrize(
    "language, code", [("bash", "false\ntrue\n"), ("bash", "false | cat\n"), ("python", "1 / 0\n")]
)
def test_failing_block_fails(language: str, code: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"README.md line 7 ended with"):
        run(Block(language, code, 7), tmp_path)


def test_blocks_see_this_environment(tmp_path: Path) -> None:
    run(Block("bash", 'test "$(python -c "import sys; print(sys.prefix)")" = "' + sys.prefix + '"\n', 1), tmp_path)
