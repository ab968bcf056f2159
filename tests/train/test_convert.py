"""`infinitevl convert`: a small Qwen2.5-VL written by transformers becomes an InfiniteVL that loads and streams."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

import infinitevl
from infinitevl import cli, weights
from infinitevl.config import DELTA, SOFTMAX, infinitevl_4b, teacher_3b, tiny
from infinitevl.delta import DeltaMixer
from infinitevl.layers import RMSNorm
from infinitevl.model import Model
from infinitevl.ops import reference
from infinitevl.ops.where import Where
from infinitevl.processor import load_processor
from infinitevl.train.convert import REPORT, ConvertError, Init, convert, every_fourth, student_config
from infinitevl.video import Frame

transformers = pytest.importorskip("transformers")

DIM = 16  # of a head
LICENCE = "Read me: this is the teacher's licence."


class Shape(NamedTuple):
    """Of a teacher: 16 heads on 2 as in 3B, 28 on 4 as in 7B, at small size."""

    heads: int
    kv_heads: int
    layers: int
    tied: bool


SHAPES = {"3B": Shape(8, 1, 5, True), "7B": Shape(14, 2, 4, False)}


def qwen(shape: Shape) -> torch.nn.Module:
    """transformers' model, with weights that make every part of it matter."""
    config, size = tiny(), shape.heads * DIM
    vision = config.vision
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config=dict(
                vocab_size=config.text.vocab_size,
                hidden_size=size,
                intermediate_size=32,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                use_sliding_window=False,
                rope_parameters=dict(rope_theta=1e6, rope_type="default", mrope_section=[2, 3, 3]),
                eos_token_id=config.stop_tokens[0],
            ),
            vision_config=dict(
                depth=1,
                hidden_size=32,
                intermediate_size=40,
                num_heads=2,
                out_hidden_size=size,
                fullatt_block_indexes=[0],
                tokens_per_second=vision.tokens_per_second,
            ),
            image_token_id=config.image_token,
            video_token_id=config.video_token,
            vision_start_token_id=config.vision_start_token,
            vision_end_token_id=config.vision_end_token,
            tie_word_embeddings=shape.tied,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3 if "embed_tokens" in name else parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def written(model: torch.nn.Module, folder: Path, shard: str = "100KB") -> Path:
    """As transformers saves it, in shards, with the default checkpoint's tokenizer and a licence."""
    model.save_pretrained(folder, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(weights.locate("tiny") / name, folder)
    (folder / "LICENSE").write_text(LICENCE)
    (folder / "README.md").write_text("the teacher's model card")
    return folder


class Teacher(NamedTuple):
    """One model, as files, as transformers runs it, and as we do."""

    folder: Path
    theirs: torch.nn.Module
    ours: Model
    shape: Shape


@pytest.fixture(scope="module", params=SHAPES)
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    shape = SHAPES[request.param]
    model = qwen(shape)
    folder = written(model, tmp_path_factory.mktemp("teacher"))
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return Teacher(folder, model, weights.load(folder), shape)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher in bfloat16, for what does not depend on its shape."""
    return written(qwen(SHAPES["3B"]).bfloat16(), tmp_path_factory.mktemp("small"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `infinitevl convert` with some words; exit code and both outputs."""

    def ran(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(["convert", *map(str, words)])
        return int(left.value.code or 0), *capsys.readouterr()

    return ran


def tensors(folder: Path) -> dict[str, Tensor]:
    return {weights.canonical(name): entry.read() for name, entry in weights.stored(folder).items()}


# -- shapes -----------------------------------------------------------------------------------------------------------


def test_of_the_3b_teacher_it_is_the_published_model():
    assert student_config(teacher_3b(), every_fourth(teacher_3b())) == infinitevl_4b()


def test_other_teachers_give_their_own_heads():
    text = replace(teacher_3b().text, layers=(SOFTMAX,) * 80, num_heads=64, num_kv_heads=8, hidden_size=8192)
    large = replace(teacher_3b(), vision=replace(teacher_3b().vision, out_hidden_size=8192), text=text)
    student = student_config(large, every_fourth(large)).text
    assert (student.delta_heads, student.delta_key_dim, student.delta_value_dim) == (64, 128, 256)
    assert student.layers == (SOFTMAX, DELTA, DELTA, DELTA) * 20


# -- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", Init)
def test_it_loads_and_all_but_the_delta_mixers_is_the_teachers(teacher: Teacher, tmp_path: Path, init: Init) -> None:
    convert(teacher.folder, tmp_path / "out", init=init)
    student = weights.load(tmp_path / "out")
    expected = tuple(SOFTMAX if number % 4 == 0 else DELTA for number in range(teacher.shape.layers))
    assert student.config.text.layers == expected and student.config.text.window == 8192
    assert (student.head is None) == teacher.shape.tied
    theirs = dict(teacher.ours.named_parameters())
    rest = {name: p for name, p in student.named_parameters() if not in_delta(name)}
    assert set(theirs) - set(rest) == {name for name in theirs if in_delta(name)}
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in rest.items())


def in_delta(name: str) -> bool:
    words = name.split(".")
    return words[0] == "blocks" and words[2] == "mixer" and int(words[1]) % 4 != 0


@torch.no_grad()
def test_softmax_layers_compute_what_the_teachers_do(teacher: Teacher, tmp_path: Path) -> None:
    """Block 0 of the default pattern, and the logits where all layers stay, against transformers."""
    ids = torch.randint(2, 400, (1, 40))
    positions = torch.arange(40).expand(3, 1, 40)
    right = teacher.theirs(input_ids=ids, position_ids=positions, use_cache=False, output_hidden_states=True)
    convert(teacher.folder, tmp_path / "some")
    student = weights.load(tmp_path / "some")
    first = student.blocks[0](student.embed(ids), student._where(positions, None, None, None)[0], None)[0]
    assert right.hidden_states[1].std() > 0.1
    assert (first - right.hidden_states[1]).abs().max() <= 5e-5
    convert(teacher.folder, tmp_path / "all", layers=range(teacher.shape.layers))
    student = weights.load(tmp_path / "all")
    logits = student.logits(student(student.embed(ids), positions)[0])
    assert (logits - right.logits).abs().max() <= 5e-4


def test_reference_start(teacher: Teacher, tmp_path: Path) -> None:
    convert(teacher.folder, tmp_path / "out")
    mixer = weights.load(tmp_path / "out").blocks[1].mixer
    assert isinstance(mixer, DeltaMixer)
    assert torch.equal(mixer.A_log.exp(), torch.ones(teacher.shape.heads))
    torch.testing.assert_close(F.softplus(mixer.dt_bias), torch.full((teacher.shape.heads,), 0.001), rtol=1e-4, atol=0)
    hidden = torch.randn(1, 3, teacher.shape.heads * DIM)
    g, beta = reference.gates(mixer.a(hidden), mixer.b(hidden), mixer.A_log, mixer.dt_bias, None)
    torch.testing.assert_close(g.exp(), torch.full_like(g, 0.999), rtol=1e-5, atol=0)
    assert torch.equal(beta, torch.full_like(beta, 0.5)) and torch.equal(mixer.norm, torch.ones(2 * DIM))
    for conv in (mixer.q_conv, mixer.k_conv, mixer.v_conv):
        assert torch.equal(conv, torch.tensor([0.0, 0.0, 0.0, 1.0]).expand_as(conv))
    for new in (mixer.q, mixer.k, mixer.v, mixer.g, mixer.o):
        assert 0.019 < new.weight.std() < 0.021


@torch.no_grad()
def test_teacher_start(teacher: Teacher, tmp_path: Path) -> None:
    """With the same gate for both halves of a value the mixer is one of half the value dim with the teacher's weights:
    query head i on key head i // group, values and output projection undivided."""
    convert(teacher.folder, tmp_path / "out", init=Init.teacher)
    student = weights.load(tmp_path / "out")
    mixer, source, shape = student.blocks[1].mixer, teacher.ours.blocks[1].mixer, teacher.shape
    gate = torch.randn(shape.heads, 1, DIM, shape.heads * DIM) * (shape.heads * DIM) ** -0.5
    mixer.g.weight.copy_(gate.expand(-1, 2, -1, -1).flatten(0, 2))
    half = DeltaMixer(replace(student.config.text, delta_value_dim=DIM))
    of = torch.arange(shape.heads) // (shape.heads // shape.kv_heads)
    half.load_state_dict(
        {
            **{name: half.state_dict()[name] for name in ("norm", "q_conv", "k_conv", "v_conv")},
            **{name: mixer.state_dict()[name] for name in ("A_log", "dt_bias", "a.weight", "b.weight")},
            "q.weight": source.q.weight,
            "k.weight": source.k.weight.unflatten(0, (-1, DIM))[of].flatten(0, 1),
            "v.weight": source.v.weight.unflatten(0, (-1, DIM))[of].flatten(0, 1),
            "o.weight": source.o.weight,
            "g.weight": gate.flatten(0, 2),
        }
    )
    where = Where(torch.empty(0), torch.empty(0), torch.arange(12)[None])
    hidden, norm = torch.randn(1, 12, shape.heads * DIM), RMSNorm(shape.heads * DIM, 1e-6)
    right, got = (each(hidden, norm, where, None)[0] for each in (half, mixer))
    assert (right - hidden).std() > 0.05
    torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [None, [], [1, 3]], ids=["every fourth", "none", "1,3"])
def test_what_is_made_streams(teacher: Teacher, tmp_path: Path, layers: list[int] | None) -> None:
    convert(teacher.folder, tmp_path / "out", layers=layers, window=64)
    stream = infinitevl.Stream(infinitevl.load(tmp_path / "out"))
    sizes = set()
    for second in range(6):
        pixels = np.random.default_rng(second).integers(0, 256, (112, 112, 3), dtype=np.uint8)
        stream.observe(Frame(float(second), pixels))
        sizes.add(stream.nbytes)
    assert len(sizes) == 1 and stream.ask("what is it?", at_most=3).tokens <= 3


# -- the report -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", Init)
def test_report_lists_every_tensor(teacher: Teacher, tmp_path: Path, init: Init) -> None:
    convert(teacher.folder, tmp_path / "out", init=init)
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    rows = {row["name"]: row for row in report["tensors"]}
    made, source = tensors(tmp_path / "out"), tensors(teacher.folder)
    assert {name: (list(t.shape), str(t.dtype)) for name, t in made.items()} == {
        name: (row["shape"], f"torch.{row['dtype']}") for name, row in rows.items()
    }
    copied = {name for name, row in rows.items() if row["what"] == "copied"}
    assert copied == {name for name in made if name in source and torch.equal(made[name], source[name])} - {
        name for name in made if rows[name]["what"] == "derived"
    }
    deltas = [number for number in range(teacher.shape.layers) if number % 4]
    derived = {name for name, row in rows.items() if row["what"] == "derived"}
    projections = {f"model.layers.{n}.self_attn.{part}_proj.weight" for n in deltas for part in "qkvo"}
    biases = {f"model.layers.{n}.self_attn.{part}_proj.bias" for n in deltas for part in "qkv"}
    assert derived == (projections if init == Init.teacher else set())
    assert all((row["source"] is None) == (row["what"] == "new") for row in rows.values())
    assert set(report["unused"]) == biases | (projections - derived) and all(row["how"] for row in rows.values())


def test_command_says_what_it_did(run: Callable, small: Path, tmp_path: Path) -> None:
    code, out, err = run(small, tmp_path / "out", "--layers", "0,2", "--init", "teacher", "--window", 100, "--seed", 7)
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    count = sum(tensor.numel() for tensor in tensors(tmp_path / "out").values())
    assert f"{count:,} parameters, from {small}" in out
    assert "softmax in 0, 2 (window 100 tokens)" in out and "8 heads, 16 -> 32, init teacher, seed 7" in out
    assert "licence: the teacher's holds for what is made from it; read LICENSE" in out
    assert report["licences"] == ["LICENSE"] and (tmp_path / "out" / "LICENSE").read_text() == LICENCE
    text = weights.read_config(tmp_path / "out").text
    assert (text.layers, text.window) == ((SOFTMAX, DELTA, SOFTMAX, DELTA, DELTA), 100)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        {"config.json", REPORT, "model.safetensors", *report["files"]}
    )
    assert {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"} < set(report["files"])
    assert "README.md" not in report["files"]


def test_a_teacher_without_a_licence_file_is_said(run: Callable, small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "teacher")
    (tmp_path / "teacher" / "LICENSE").unlink()
    assert "has no licence file" in run(tmp_path / "teacher", tmp_path / "out")[1]


def test_dtypes_are_the_teachers_but_for_the_decay(small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "out", init=Init.teacher)
    for name, tensor in tensors(tmp_path / "out").items():
        exact = name.endswith(("A_log", "dt_bias"))
        assert tensor.dtype == (torch.float32 if exact else torch.bfloat16), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    model = weights.load(tmp_path / "out", dtype=torch.bfloat16)
    assert model.blocks[1].mixer.A_log.dtype == torch.float32


def test_same_numbers_for_a_seed_whatever_the_shards(small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "whole", seed=1)
    convert(small, tmp_path / "cut", seed=1, shard_bytes=50_000)
    convert(small, tmp_path / "other", seed=2)
    whole, cut, other = (tensors(tmp_path / name) for name in ("whole", "cut", "other"))
    assert len(list((tmp_path / "cut").glob("model-*.safetensors"))) > 3
    assert list((tmp_path / "whole").glob("model*.safetensors")) == [tmp_path / "whole" / "model.safetensors"]
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items()) and set(whole) == set(cut)
    first = [f"model.layers.{number}.self_attn.q_proj.weight" for number in (1, 2)]
    assert not torch.equal(whole[first[0]], other[first[0]]) and not torch.equal(whole[first[0]], whole[first[1]])


def test_a_model_of_ours_with_softmax_layers_only_is_a_teacher_too(tmp_path: Path) -> None:
    config = tiny()
    text = replace(config.text, layers=(SOFTMAX,) * 4, window=None)
    weights.save(Model(replace(config, text=text), load_processor(weights.locate("tiny"))), tmp_path / "teacher")
    convert(tmp_path / "teacher", tmp_path / "out", window=256)
    made = weights.load(tmp_path / "out").config
    assert made == replace(config, text=replace(config.text, layers=(SOFTMAX, DELTA, DELTA, DELTA)))


# -- memory -----------------------------------------------------------------------------------------------------------


def test_one_shard_is_in_memory_at_a_time(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, seen, sizes = 50_000, [], []
    save_file = safetensors.torch.save_file

    def watched(shard: dict[str, Tensor], *rest: object, **more: object) -> None:
        assert [name for name, tensor in seen if tensor() is not None] == []
        seen.extend((name, weakref.ref(tensor)) for name, tensor in shard.items())
        sizes.append((len(shard), sum(tensor.nbytes for tensor in shard.values())))
        save_file(shard, *rest, **more)

    monkeypatch.setattr(safetensors.torch, "save_file", watched)
    convert(small, tmp_path / "out", init=Init.teacher, shard_bytes=limit)
    assert len(sizes) > 3 and all(count == 1 or size <= limit for count, size in sizes)
    assert {name for name, _ in seen} == set(tensors(tmp_path / "out"))


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers that cannot be used."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("shardless", "damaged", "indexless", "wordless", "other", "lacking", "misshapen"):
        shutil.copytree(small, folder / name)
    shards = {name: sorted((folder / name).glob("model-*.safetensors")) for name in ("shardless", "damaged")}
    shards["shardless"][-1].unlink()
    shards["damaged"][-1].write_bytes(shards["damaged"][-1].read_bytes()[:-10])
    (folder / "indexless" / weights.INDEX).unlink()
    (folder / "wordless" / "tokenizer.json").unlink()
    (folder / "other" / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    for name, tensor in (("lacking", None), ("misshapen", torch.zeros(3))):
        found = {**tensors(small), "model.norm.weight": tensor}
        shutil.rmtree(folder / name)
        shutil.copytree(small, folder / name, ignore=shutil.ignore_patterns("model*"))
        kept = {key: value.contiguous() for key, value in found.items() if value is not None}
        safetensors.torch.save_file(kept, folder / name / "model.safetensors")
    shutil.copytree(weights.locate("tiny"), folder / "hybrid")
    shutil.copytree(small, folder / "good")
    (folder / "empty").mkdir()
    (folder / "file").touch()
    return folder


REFUSALS = [
    ("./good ./new --layers 0,5", 2, "there is no layer 5; the teacher has layers 0 to 4"),
    ("./good ./new --layers 0,-1", 2, "there is no layer -1"),
    ("./good ./new --layers 0,2,2", 2, "2 is named twice"),
    ("./good ./new --layers a,b", 2, "--layers 'a,b'"),
    ("./good ./new --init nope", 2, "--init"),
    ("./good ./new --window 0", 2, "--window"),
    ("./good", 2, "Missing argument"),
    ("./good ./empty", 2, "is there already"),
    ("./good ./file", 2, "is there already"),
    ("./good ./file/new", 2, "nothing can be written there"),
    ("./good ./good/new", 2, "lies in the teacher's folder"),
    ("./good ./good/new/deep", 2, "lies in the teacher's folder"),
    ("./missing ./new", 3, "no such folder"),
    ("./empty ./new", 3, "no config.json"),
    ("./other ./new", 3, "model_type is 'llama'"),
    ("./hybrid ./new", 3, "layer 1 is a delta layer"),
    ("./shardless ./new", 3, "weights are missing"),
    ("./damaged ./new", 3, "damaged"),
    ("./indexless ./new", 3, "weights are missing"),
    ("./wordless ./new", 3, "no tokenizer.json"),
    ("./lacking ./new", 3, "missing model.norm.weight"),
    ("./misshapen ./new", 3, "model.norm.weight has shape (3,)"),
]


@pytest.mark.parametrize(("words", "code", "says"), REFUSALS, ids=[case[0] for case in REFUSALS])
def test_refused_in_one_line(run: Callable, place: Path, words: str, code: int, says: str) -> None:
    before = sorted(path.name for path in place.iterdir())
    got, out, err = run(*(f"{place}{word[1:]}" if word.startswith("./") else word for word in words.split()))
    assert (got, out) == (code, ""), err
    assert err.startswith("infinitevl: ") and err.count("\n") == 1 and says in err
    assert sorted(path.name for path in place.iterdir()) == before


def test_layers_are_checked_in_python_too(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="there is no layer 9"):
        convert(small, tmp_path / "out", layers=[9])


def test_broken_off_leaves_nothing(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file, calls = safetensors.torch.save_file, []

    def full(*given: object, **more: object) -> None:
        calls.append(given)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        save_file(*given, **more)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        convert(small, tmp_path / "out", shard_bytes=50_000)
    assert len(calls) == 3 and list(tmp_path.iterdir()) == []
