"""The package's shape: who may import whom, and who may know what of other software."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "infinitevl"
FILES = sorted(PACKAGE.rglob("*.py"))

BASE = {"config", "files"}
MIXERS = {"layers", "rope", "attention", "delta", "vision"}
MODEL = BASE | {"memory", "ops", "processor"} | MIXERS | {"model"}
STREAM = MODEL | {"video", "weights", "stream", "generate", "record", "step"}
TASKS = STREAM | {"batch", "train", "eval"}

# A module or subpackage, and what it may import of the others. Neighbours of one row may import each other, never in
# a circle. Nothing imports hf.
MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "files": set(),
    "memory": BASE,
    "ops": BASE | {"memory"},
    **{mixer: BASE | {"memory", "ops"} | MIXERS for mixer in MIXERS},
    "processor": BASE,
    "video": BASE | {"processor"},
    "model": MODEL,
    "weights": BASE | {"model", "processor"},
    "generate": STREAM,
    "step": MODEL,
    "record": MODEL | {"generate", "step"},
    "stream": STREAM,
    "batch": STREAM,
    "synth": BASE,
    "train": TASKS | {"synth"},
    "eval": TASKS | {"__init__", "synth"},
    "hf": STREAM,
    "serve": TASKS,
    "report": BASE,
    "watch": STREAM | {"report"},
    "display": {"report", "watch"},
    "oneshot": STREAM,
    "doctor": STREAM | {"__init__"},
    "bench": TASKS | {"__init__"},
    "cli": TASKS | {"__init__", "synth", "serve", "report", "watch", "display", "oneshot", "doctor", "bench"},
    "__init__": STREAM | {"batch"},
    "__main__": {"cli"},
}
KERNELS = {"triton", "fla"}
FOREIGN = re.compile(
    r"self_attn|linear_attn|lm_head|embed_tokens|layernorm|language_model|model\.visual|patch_embed|\bln_q|_conv1d"
    r"|\b(q|k|v|o|gate|up|down)_proj"
)


def row(file: Path) -> str:
    """The row of MAY_IMPORT that a file of the package belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def parent(file: Path) -> list[str]:
    """The package that a file's relative imports start from, as its parts."""
    return ["infinitevl", *file.relative_to(PACKAGE).parent.parts]


def imports(tree: ast.AST, package: list[str]) -> Iterator[str]:
    """Every name imported, in full: at the top or in a function, by statement or by import_module("name")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) + 1 - node.level] if node.level else []
            yield from (".".join([*up, *filter(None, [node.module]), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def own(name: str) -> str | None:
    """The row of MAY_IMPORT that an imported name falls in; None for another package's."""
    root, _, rest = name.partition(".")
    if root != "infinitevl":
        return None
    first = rest.partition(".")[0]
    return first if first in MAY_IMPORT or (PACKAGE / f"{first}.py").exists() else "__init__"


def strings(tree: ast.AST) -> Iterator[str]:
    """The string constants that are not docstrings."""
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements:
            yield node.value


def transformers_names(tree: ast.AST, package: list[str]) -> Iterator[str]:
    """What a file uses of transformers, by import or as an attribute, in full."""
    names = [name for name in imports(tree, package) if name.startswith("transformers.")]
    attributes = (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    yield from [*names, *(a for a in attributes if a.startswith("transformers."))]


def bases(tree: ast.AST) -> Iterator[str]:
    classes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    yield from (ast.unparse(base) for node in classes for base in node.bases)


def layering(file: Path, tree: ast.AST) -> Iterator[str]:
    here = row(file)
    if here not in MAY_IMPORT:
        yield f"{here} has no row in MAY_IMPORT: say what it may import"
    for name in imports(tree, parent(file)):
        there = own(name)
        if there is not None and there != here and there not in MAY_IMPORT.get(here, set()):
            yield f"{here} must not import {there} ({name})"


def knowledge(file: Path, tree: ast.AST) -> Iterator[str]:
    here = row(file)
    roots = {name.partition(".")[0] for name in imports(tree, parent(file))}
    if here != "ops":
        yield from (f"only ops may import {name}" for name in sorted(roots & KERNELS))
    if here not in ("weights", "hf"):
        yield from (f"foreign tensor name outside weights: {text!r}" for text in strings(tree) if FOREIGN.search(text))
    if here != "hf":
        yield from transformers_outside_hf(file, tree)


def transformers_outside_hf(file: Path, tree: ast.AST) -> Iterator[str]:
    """Outside hf.py transformers gives tokenizers, an empty config for them, and its version."""
    used = set(transformers_names(tree, parent(file)))
    allowed = re.compile(r"transformers\.(\w*Tokenizer\w*|PreTrainedConfig|__version__)(\..*)?")
    yield from (f"only hf may use {name}" for name in sorted(used) if not allowed.fullmatch(name))
    last = {name.rpartition(".")[2] for name in used}
    yield from (f"only hf may subclass {base}" for base in bases(tree) if base.rpartition(".")[2] in last)


def complaints(file: Path, source: str) -> list[str]:
    tree = ast.parse(source)
    return [*layering(file, tree), *knowledge(file, tree)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_file_keeps_to_its_place(file: Path) -> None:
    assert complaints(file, file.read_text(encoding="utf-8")) == []


def test_no_circles() -> None:
    graph: dict[str, set[str]] = {}
    for file in FILES:
        reached = {own(name) for name in imports(ast.parse(file.read_text(encoding="utf-8")), parent(file))}
        graph.setdefault(row(file), set()).update({there for there in reached if there} - {row(file)})
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    assert "config" in order


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("memory.py", "from infinitevl.model import Model", "memory must not import model"),
        ("memory.py", "def f():\n    from infinitevl import stream", "memory must not import stream"),
        ("memory.py", "from . import ops", "memory must not import ops"),
        ("ops/triton/scan.py", "from ...model import Model", "ops must not import model"),
        ("attention.py", "import infinitevl.hf", "attention must not import hf"),
        ("cli.py", "from infinitevl import hf", "cli must not import hf"),
        ("model.py", "import importlib\nimportlib.import_module('infinitevl.synth.world')", "must not import synth"),
        ("stream.py", "from infinitevl import Stream", "stream must not import __init__"),
        ("helpers.py", "", "helpers has no row"),
        ("delta.py", "import triton.language as tl", "only ops may import triton"),
        ("delta.py", "from fla.ops import chunk", "only ops may import fla"),
        ("model.py", "name = f'model.layers.{i}.self_attn.q_proj.weight'", "foreign tensor name"),
        ("stream.py", "from transformers.cache_utils import DynamicCache", "only hf may use transformers.cache_utils"),
        ("stream.py", "import transformers\ntransformers.AutoModel.from_config(c)", "only hf may use transformers."),
        (
            "processor.py",
            "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): ...",
            "only hf may subclass PreTrainedTokenizerFast",
        ),
    ],
)
def test_planted_fault_is_found(file: str, source: str, complaint: str) -> None:
    assert complaint in "\n".join(complaints(PACKAGE / file, source))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("ops/fla.py", "import fla\nfrom . import reference\nfrom ..memory import slot"),
        ("attention.py", '"""Reads self_attn.q_proj of others."""\nfrom infinitevl.rope import rotate'),
        ("weights.py", "name = 'model.embed_tokens.weight'\nfrom infinitevl.model import Model"),
        ("hf.py", "from transformers import PreTrainedModel\nclass Edge(PreTrainedModel): ..."),
        ("processor.py", "from transformers import AutoTokenizer\nAutoTokenizer.from_pretrained('x')"),
        ("cli.py", "from infinitevl import load\nfrom infinitevl.synth import world\nimport transformers"),
        ("eval/recall.py", "from ..synth import heldout\nfrom infinitevl.stream import Stream"),
    ],
)
def test_what_is_allowed_passes(file: str, source: str) -> None:
    assert complaints(PACKAGE / file, source) == []
