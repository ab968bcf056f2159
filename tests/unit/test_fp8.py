"""FP8: how values are rounded, when the layout holds, what is refused, and gates that close on a planted fault."""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from infinitevl import Stream, StreamBatch, cli, weights
from infinitevl.bench import fp8 as bench_fp8
from infinitevl.bench import gate
from infinitevl.bench.setup import QUICK, BenchError, Row, Setup
from infinitevl.config import tiny
from infinitevl.layers import GatedMLP, RMSNorm, in_fp8
from infinitevl.model import Model
from infinitevl.ops import fp8, reference
from infinitevl.ops.fp8 import Fp8Error, Quantised, quantised

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def model() -> Model:
    config = tiny(64)
    config = replace(config, vision=replace(config.vision, intermediate_size=100))  # a width that is padded
    model = Model(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@torch.no_grad()
def outputs(model: Model, rows: int = 2, tokens: int = 16) -> list[Tensor]:
    torch.manual_seed(1)
    patches = torch.randn(rows, 64, model.config.vision.patch_dim)
    visual = model.vision(patches, 8, 8)[:, :tokens]
    hidden, memory = model(visual, torch.arange(tokens).expand(3, rows, tokens), model.empty_memory(rows))
    return [visual, hidden, *(leaf for _, leaf in memory.named())]


def off(got: Tensor, right: Tensor) -> float:
    return float((got.double() - right.double()).norm() / right.double().norm())


# -- values and scales ------------------------------------------------------------------------------------------------


def test_a_row_is_scaled_by_its_own_largest_value():
    x = torch.randn(3, 5, 64) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    found = quantised(x)
    assert found.shape == x.shape and found.values.dtype == torch.float8_e4m3fn and found.scale.dtype == torch.float32
    torch.testing.assert_close(found.scale, x.abs().amax(-1) / 448)
    assert (found.values.float().abs().amax(-1) == 448).all()


def test_values_are_rounded_to_the_nearest_of_three_bits():
    """Each by a sixteenth at most, 2.5 % in the mean of squares; those below 2^-6 of 448 by half of 2^-9."""
    x = torch.randn(8, 4096)
    error = (quantised(x).plain() - x).abs()
    step = x.abs().amax(-1, keepdim=True) / 448
    assert (error <= torch.maximum(x.abs() / 16, step * 2**-10) * 1.0001).all()
    assert 0.02 < off(quantised(x).plain(), x) < 0.03


def test_what_e4m3_holds_is_kept():
    x = torch.tensor([[448.0, -1.125, 0.0, 2**-9, 2**-6, -240.0]])
    assert torch.equal(quantised(x).plain(), x)


def test_rows_of_nothing_and_of_no_numbers():
    x = torch.ones(4, 16)
    x[0], x[1], x[2, 3], x[3, 3] = 0, 1e-40, torch.nan, torch.inf
    found = quantised(x)
    assert not found.plain()[:2].any() and (found.scale[:2] > 0).all()
    assert found.plain()[2:].isnan().any(-1).all()  # a fault upstream stays one


def products(rows: int, size: int = 256, channels: int = 48) -> tuple[Tensor, Quantised, Tensor]:
    """x, a weight whose channels are of very different sizes, and their product by plain weights, float64."""
    x, weight = torch.randn(rows, size), torch.randn(channels, size) * torch.logspace(-2, 2, channels)[:, None]
    return x, quantised(weight), x.double() @ weight.double().T


def given(**changed: object) -> dict[str, object]:
    return {"bias": None, "norm": None, "gated": False, "onto": None} | changed


def test_a_product_is_as_far_off_as_two_rounded_factors_make_it():
    x, weight, right = products(64)
    got = fp8.linear(x=x, weight=weight, **given())
    by_channel = (got - right).norm(dim=0) / right.norm(dim=0)
    assert 0.03 < by_channel.mean() < 0.04 and by_channel.max() < 0.06


def test_a_product_of_one_row_rounds_the_weight_only():
    x, weight, _ = products(1)
    got = fp8.linear(x=x, weight=weight, **given())
    torch.testing.assert_close(got, x @ weight.plain().T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 7])
def test_norm_bias_gate_and_sum_are_those_of_the_plain_product(rows):
    """By a weight and rows that e4m3 holds exactly, FP8 is no rounding at all."""
    x = torch.randint(-8, 9, (rows, 32)).float()
    x[:, 0] = 448
    weight = torch.randint(-8, 9, (24, 32)).float()
    weight[:, 0] = 448
    bias, onto = torch.randn(24), torch.randn(rows, 12)
    got = fp8.linear(x=x, weight=quantised(weight), bias=bias, norm=None, gated=True, onto=onto)
    torch.testing.assert_close(got, reference.linear(x=x, weight=weight, bias=bias, norm=None, gated=True, onto=onto))
    norm = (torch.rand(32), 1e-6)
    normed = reference.rms_norm(x=x, weight=norm[0], eps=norm[1])
    got = fp8.linear(x=x, weight=quantised(weight), bias=bias, norm=norm, gated=False, onto=None)
    assert torch.equal(
        got, fp8.linear(x=normed, weight=quantised(weight), bias=bias, norm=None, gated=False, onto=None)
    )


def test_torchs_scaled_product_is_the_definition():
    """What the kernels call: rows of scales [M, 1] and [1, N], the weight column by column."""
    x, weight, _ = products(17)
    rounded = quantised(x)
    got = torch._scaled_mm(
        rounded.values, weight.values.T, scale_a=rounded.scale[:, None], scale_b=weight.scale[None], out_dtype=x.dtype
    )
    torch.testing.assert_close(got, fp8.linear(x=x, weight=weight, **given()), rtol=1e-4, atol=1e-3)


# -- the layout -------------------------------------------------------------------------------------------------------


def test_a_model_in_fp8_is_near_the_plain_one(model):
    plain = outputs(model)
    assert model.to_fp8() is model
    errors = [off(got, right) for got, right in zip(outputs(model), plain, strict=True) if right.is_floating_point()]
    assert 0.01 < errors[0] < 0.1 and 0.01 < errors[1] < 0.2


def test_every_linear_of_every_block_is_in_fp8_and_nothing_else(model, monkeypatch):
    model.to_fp8()
    seen: list[tuple[int, ...]] = []
    plain = fp8.linear
    monkeypatch.setattr(fp8, "linear", lambda **given: seen.append(given["weight"].shape) or plain(**given))
    called: list[nn.Module] = []
    monkeypatch.setattr(
        nn.Linear, "forward", lambda self, x: called.append(self) or nn.functional.linear(x, self.weight, self.bias)
    )
    outputs(model)
    assert len(seen) == 4 * (len(model.vision.blocks) + len(model.blocks))
    merger = model.vision.merger
    assert called == [model.vision.embed, merger.up, merger.down]
    assert all(channels % 16 == 0 and size % 16 == 0 for channels, size in seen)


@torch.no_grad()
def test_padding_changes_nothing():
    mlp, norm, x = GatedMLP(32, 20, bias=True), RMSNorm(32, 1e-6), torch.randn(5, 32)
    mlp.to_fp8()
    y = reference.rms_norm(x=x, weight=norm.weight, eps=norm.eps)
    gate, up = ((quantised(y).plain() @ quantised(each.weight).plain().T + each.bias) for each in (mlp.gate, mlp.up))
    inner = nn.functional.silu(gate) * up
    right = x + quantised(inner).plain() @ quantised(mlp.down.weight).plain().T + mlp.down.bias
    torch.testing.assert_close(mlp(x.clone(), norm), right, rtol=1e-4, atol=1e-4)


def test_streams_questions_and_batches_run_in_fp8(monkeypatch):
    """With gradients enabled around them, as they are by default: else the plain weights would run unseen."""
    calls = []
    plain = fp8.linear
    monkeypatch.setattr(fp8, "linear", lambda **given: calls.append(1) or plain(**given))
    model = weights.load(fp8=True)
    linears = 4 * (len(model.vision.blocks) + len(model.blocks))
    pixels = torch.randint(0, 256, (112, 112, 3), dtype=torch.uint8).numpy()
    stream = Stream(model)
    stream.observe(pixels, 0.0)
    assert len(calls) >= linears
    calls.clear()
    stream.ask("what was the last word?", at_most=1)
    assert calls and len(calls) % (4 * len(model.blocks)) == 0
    calls.clear()
    batch = StreamBatch(model, 2)
    batch.observe({batch.open(): pixels}, 0.0)
    assert len(calls) >= linears


@torch.no_grad()
def test_saved_files_and_fingerprint_stay(tmp_path):
    model = weights.load(fp8=True)
    assert model.blocks[0].mixer.joint.weight.values.dtype == torch.float8_e4m3fn
    plain = weights.load()
    assert plain.blocks[0].mixer.joint is None  # off unless asked for
    weights.save(plain, tmp_path / "plain")
    weights.save(model, tmp_path / "fp8")
    one, other = (tmp_path / name / "model.safetensors" for name in ("plain", "fp8"))
    assert one.read_bytes() == other.read_bytes()
    assert weights.fingerprint(model) == weights.fingerprint(plain)


def _trained(model: Model) -> Model:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return model


@pytest.mark.parametrize(
    "change",
    [_trained, lambda model: model.double().float(), copy.deepcopy],
    ids=["changed in place", "moved", "copied"],
)
def test_parameters_that_moved_on_are_used_and_not_the_old_copy(model, change):
    changed = change(model.to_fp8())
    fresh = Model(model.config).eval()
    fresh.load_state_dict(changed.state_dict())
    for got, right in zip(outputs(changed), outputs(fresh), strict=True):
        torch.testing.assert_close(got, right, atol=0, rtol=0, equal_nan=True)


def test_it_goes_with_a_move_and_stays_without_one(model):
    assert model.to_fp8().to("cpu").float().blocks[0].mixer.joint is not None
    rounded = outputs(model)[1]
    model.double()
    assert all(getattr(module, name, None) is None for module in model.modules() for name in ("joint", "wide"))
    assert not torch.equal(outputs(model.float())[1], rounded)


@pytest.mark.parametrize("frozen", [False, True])
def test_where_gradients_are_enabled_the_parameters_are_used(model, frozen):
    """Frozen ones too: a gradient that passes through them would meet the rounding, which has none."""
    plain, gradients = copy.deepcopy(model), []
    for one in (plain, model.to_fp8()):
        one.requires_grad_(not frozen)
        patches = torch.ones(1, 64, one.config.vision.patch_dim, requires_grad=True)
        hidden, _ = one(one.vision(patches, 8, 8), torch.arange(16).expand(3, 1, 16))
        hidden.square().sum().backward()
        gradients.append([patches.grad, *(parameter.grad for parameter in one.parameters())])
    for got, right in zip(*gradients, strict=True):
        assert (got is None) == (right is None)
        if got is not None:
            torch.testing.assert_close(got, right)


@torch.no_grad()
def test_a_wrapped_linear_is_called_itself(model):
    """As LoRA does: the copy must not go past it."""
    mixer = model.to_fp8().blocks[0].mixer
    before = outputs(model)[1]
    mixer.o = nn.Sequential(mixer.o, nn.Hardtanh(0, 0.001))
    assert not torch.allclose(outputs(model)[1], before)


def test_a_fused_model_keeps_its_names(model):
    named = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.fuse().to_fp8()
    assert all(torch.equal(parameter, named[name]) for name, parameter in model.named_parameters())
    assert 0.01 < off(outputs(model)[1], outputs(copy.deepcopy(model))[1]) < 0.2


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "installed", "words"),
    [
        (CUDA, torch.bfloat16, (8, 0), True, "compute capability 8.9"),
        (CUDA, torch.float16, (9, 0), True, "for bfloat16 models, this one is float16"),
        (CUDA, torch.bfloat16, (9, 0), False, "needs triton"),
        (torch.device("mps"), torch.bfloat16, (9, 0), True, "not on mps"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(monkeypatch, device, dtype, capability, installed, words):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(fp8.importlib.util, "find_spec", lambda name: object() if installed else None)
    with pytest.raises(Fp8Error, match=words) as error:
        fp8.check(device, dtype)
    assert "\n" not in str(error.value)


def test_what_can_be_is_not_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(fp8.importlib.util, "find_spec", lambda name: object())
    fp8.check(CUDA, torch.bfloat16)
    fp8.check(CPU, torch.float32)


def test_a_width_that_no_product_takes_is_refused():
    with pytest.raises(Fp8Error, match="multiples of 16 channels.*24"):
        in_fp8([nn.Linear(24, 16)])


def test_the_command_line_refuses_in_one_line(monkeypatch, capsys):
    def refuse(device: torch.device, dtype: torch.dtype) -> None:
        raise Fp8Error("FP8 needs another GPU")

    monkeypatch.setattr(fp8, "check", refuse)
    with pytest.raises(SystemExit) as ended:
        cli.main(["watch", "film.mp4", "--fp8", "--device", "cpu"])
    assert ended.value.code == cli.BAD_INPUT
    assert capsys.readouterr().err == "infinitevl: FP8 needs another GPU\n"


# -- gates ------------------------------------------------------------------------------------------------------------


def test_the_gate_of_bench_passes_what_is_right():
    setup = Setup(QUICK, CPU, False, fp8=True)
    found = dict(bench_fp8.blocks(setup, QUICK.config))
    assert len(found) == QUICK.config.vision.depth + len(QUICK.config.text.layers)
    assert 0 < min(found.values()) and max(found.values()) <= bench_fp8.BLOCK


@pytest.mark.parametrize("fault", ["scale twice", "another channel's scale", "no scale of the weight"])
def test_the_gate_of_bench_closes(monkeypatch, fault):
    plain = Quantised.plain

    def wrong(self: Quantised, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.values.dim() > 2:  # activations
            return plain(self, dtype)
        scale = {
            "scale twice": self.scale.square(),
            "another channel's scale": self.scale.roll(1),
            "no scale of the weight": torch.full_like(self.scale, float(self.scale.mean())),
        }[fault]
        return plain(self._replace(scale=scale), dtype)

    monkeypatch.setattr(Quantised, "plain", wrong)
    with pytest.raises(gate.GateError, match="in FP8.*no figures"):
        list(bench_fp8.check(Setup(QUICK, CPU, False, fp8=True)))


def test_rows_of_bench_are_named_and_have_aims(monkeypatch):
    from infinitevl.bench import aims

    monkeypatch.setitem(bench_fp8.PARTS, "frame", lambda setup: iter([Row("frame", "one stream", "frames/s", 180.0)]))
    (row,) = bench_fp8.suite(CPU, 1.0, 1.0).parts["frame"](Setup(QUICK, CPU, False, fp8=True))
    assert row.name == "one stream, FP8"
    beside = aims.beside(row, "NVIDIA H200", "full")
    assert (beside["aim"], beside["floor"], beside["reached"]) == (180, 450, 1.0)


def test_bench_refuses_where_there_is_no_fp8(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(BenchError, match="--fp8: FP8 needs"):
        bench_fp8.suite(CUDA, 1.0, 1.0)


@pytest.fixture
def accuracy(monkeypatch):
    """The experiment's script as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "experiments" / "fp8"))
    import accuracy

    yield accuracy
    del sys.modules["accuracy"]


def found(accuracy, right: list[tuple[bool, bool]], divergence: float) -> list:
    from infinitevl.synth import heldout

    ask = heldout.plan()[0]
    said = {True: ask.question.answer, False: "?"}
    return [accuracy.Found(ask, said[one], said[other], [divergence], [True]) for one, other in right]


def test_the_experiments_gate(accuracy):
    both, lost, won = (True, True), (True, False), (False, True)
    told = accuracy.summary(found(accuracy, [both] * 50 + [lost] * 5 + [won] * 3, 0.01))
    assert told["right"] == {"plain": 55, "fp8": 53} and told["right_only"] == {"plain": 5, "fp8": 3}
    assert all(each["green"] for each in told["gate"].values())
    told = accuracy.summary(found(accuracy, [both] * 50 + [lost] * 9 + [won], 0.06))
    assert not any(each["green"] for each in told["gate"].values())
    assert math.isclose(told["gate"]["answers_lost"]["at_most"], 2 * math.sqrt(10))
