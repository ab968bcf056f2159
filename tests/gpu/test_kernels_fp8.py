"""The FP8 kernels against their definition in plain torch; in Triton's interpreter where there is no GPU.

Two ways to the same value that differ by a rounding of 16 bits may fall on two neighbouring e4m3, an eighth of the
value apart. So what a kernel rounds is compared by what it stands for, within that step of each value.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from infinitevl.ops import fp8, reference  # noqa: E402
from infinitevl.ops.fp8 import Quantised, quantised  # noqa: E402
from infinitevl.ops.triton import fp8 as kernels  # noqa: E402

if GPU and torch.cuda.get_device_capability() < fp8.CAPABILITY:
    pytest.skip("no FP8 on this GPU", allow_module_level=True)

DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float16  # the interpreter multiplies no bfloat16
ROUNDING = {torch.bfloat16: 2**-6, torch.float16: 2**-9}[DTYPE]  # norm, product, gate and sum, half a unit each
SIZES = [(1, 48, 32), (1, 1296, 48), (2, 64, 16), (17, 256, 48)]
SIZES += [(1, 2048, 12320), (1, 11008, 2048), (16, 2048, 2560), (256, 2048, 2048), (256, 11008, 2048)] if GPU else []


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs begin as NaN, so that a place not written shows."""
    torch.manual_seed(0)
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *given, **kw: plain(*given, **kw).fill_(torch.nan))
    plain_new = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *given, **kw: plain_new(*given, **kw).fill_(torch.nan))


@pytest.fixture(autouse=True)
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter loses the carry of a mantissa that is rounded up to the next power of two (127 to e4m3
    is 64 there) and cuts subnormals off: torch rounds for it."""
    if GPU:
        return
    from triton.runtime import interpreter

    plain = interpreter._convert_float

    def convert(data, source, target, mode):
        if str(target) != "fp8e4nv":
            return plain(data, source, target, mode)
        wide = torch.from_numpy(data.astype("float32"))
        return wide.to(fp8.E4M3).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape).to(DEVICE, DTYPE)


def weight_of(channels: int, size: int) -> Quantised:
    """A weight whose channels are of very different sizes: a scale in the wrong place shows."""
    return quantised((torch.randn(channels, size) * size**-0.5 * torch.logspace(-1, 1, channels)[:, None]).to(DEVICE))


def assert_near(got: Tensor, right: Tensor, bound: float) -> None:
    scale = right.double().abs().amax().clamp(min=1.0)
    assert torch.isfinite(got).all() and (got.double() - right.double()).abs().max() <= scale * bound


def assert_rounds(got: Quantised, right: Tensor) -> None:
    """That `got` is `right` [..., K] in e4m3: scales alike, every value within its own rounding, and a subnormal's."""
    assert got.values.dtype == fp8.E4M3 and got.shape == right.shape and got.scale.shape == right.shape[:-1]
    right = right.double()
    most = right.abs().amax(-1)
    torch.testing.assert_close(got.scale.double() * fp8.MOST, most, rtol=2 * ROUNDING, atol=1e-30)
    step = right.abs() * (2**-4 + 2 * ROUNDING) + most[..., None] / fp8.MOST * 2**-9
    assert ((got.plain(torch.float64) - right).abs() <= step).all()


@pytest.mark.parametrize("rows, size", [(1, 16), (3, 80), (2, 1025), (5, 4096)])
def test_quantised(rows, size):
    x = random(2, rows, size) * torch.logspace(-3, 2, rows, device=DEVICE)[:, None].to(DTYPE)
    got = kernels.quantised(x)
    assert_rounds(got, x)
    right = quantised(x)
    assert torch.equal(got.values.view(torch.uint8), right.values.view(torch.uint8))
    assert torch.equal(got.scale, right.scale)
    assert got.values.float().abs().amax(-1).eq(fp8.MOST).all()


def test_rows_of_nothing_and_of_no_numbers():
    x = random(4, 64)
    x[0], x[1], x[2, 5] = 0, 1e-7, torch.nan
    got = kernels.quantised(x)
    plain = got.plain()
    assert not plain[0].any() and got.scale[0] > 0
    torch.testing.assert_close(plain[1], x[1].float(), rtol=0.07, atol=0)
    assert plain[2, 5].isnan() and plain[3].isfinite().all()


@pytest.mark.parametrize("rows, size", [(1, 16), (3, 80), (2, 1025), (5, 2048)])
def test_normed(rows, size):
    x, weight = random(2, rows, size), random(size)
    right = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    assert_rounds(kernels.normed(x, weight, 1e-6), right)


@pytest.mark.parametrize("channels", [16, 1025, 3456])
def test_gated(channels):
    x = random(3, 2 * channels)
    gate, up = x.double().chunk(2, dim=-1)
    assert_rounds(kernels.gated(x), gate * gate.sigmoid() * up)


@pytest.mark.parametrize("gated, normed, biased, summed", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize("rows, size, channels", SIZES)
def test_linear(rows, size, channels, gated, normed, biased, summed):
    x, weight = random(rows, size), weight_of(channels * (2 if gated else 1), size)
    bias = random(len(weight.scale)) if biased else None
    norm = (random(size), 1e-6) if normed else None
    onto = random(rows, channels) if summed else None
    given = {"x": x, "weight": weight, "bias": bias, "norm": norm, "gated": gated}
    right = fp8.linear(**given, onto=onto)
    got = kernels.linear(**given | {"x": x[None]}, onto=None if onto is None else onto[None])
    assert got.shape == (1, rows, channels) and got.dtype == DTYPE
    if summed:
        assert got.data_ptr() == onto.data_ptr()
    assert_close(got[0], right, size)


def assert_close(got: Tensor, right: Tensor, size: int) -> None:
    """Kernels and definition round at the same places, but not always to the same side: four roundings at random are a
    quarter of `ROUNDING`'s four at their worst (rms). Where one of a few hundred values fell on the next e4m3 because
    float32 was summed in another order: half a percent. The tensor cores' own sums keep 14 bits and cut the rest every
    32 channels. A scale, gate or bias in the wrong place is tens of percent."""
    bound = 0.005 + ROUNDING / 4 + (size / 32 * 2**-14 if GPU else 0)
    difference = (got.double() - right.double()).norm() / right.double().norm()
    assert torch.isfinite(got).all() and difference <= bound
    assert_near(got, right, 6 * bound)


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("biased", [False, True])
def test_mlp(rows, biased):
    x, norm = random(1, rows, 64), (random(64), 1e-6)
    up = (weight_of(2 * 128, 64), random(2 * 128) if biased else None)
    down = (weight_of(64, 128), random(64) if biased else None)
    right = fp8.mlp(x=x, norm=norm, up=up, down=down)
    got = kernels.mlp(x=x, norm=norm, up=up, down=down)
    assert got.data_ptr() == x.data_ptr()
    assert_close(got, right, 128)


@pytest.mark.skipif(not GPU, reason="graphs need a CUDA device")
@pytest.mark.parametrize("rows", [1, 2, 256])
def test_it_can_be_recorded(rows):
    """Capturing runs nothing; a replay gives to the bit what a call gives."""
    norm, up, down = (random(2048), 1e-6), (weight_of(2 * 1024, 2048), None), (weight_of(2048, 1024), random(2048))
    x, onto = random(1, rows, 2048), random(1, rows, 2048)

    def run(x: Tensor, onto: Tensor) -> Tensor:
        x = kernels.linear(x=x, weight=weight, bias=None, norm=norm, gated=False, onto=onto)
        return kernels.mlp(x=x, norm=norm, up=up, down=down)

    weight = weight_of(2048, 2048)
    right = run(x, onto.clone())
    buffer, graph = onto.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(x, buffer)
    buffer.copy_(onto)
    graph.replay()
    assert torch.isfinite(right).all() and torch.equal(buffer, right)


@pytest.mark.parametrize("rows", [1, 5])
def test_one_row_is_not_rounded_and_more_are(rows):
    """The kernels keep to the definition: by plain weights that e4m3 holds exactly, one row is as good as exact."""
    x, weight = random(rows, 256), weight_of(48, 256)
    exact = reference.linear(
        x=x.double(), weight=weight.plain(torch.float64), bias=None, norm=None, gated=False, onto=None
    )
    got = kernels.linear(x=x, weight=weight, bias=None, norm=None, gated=False, onto=None)
    error = float((got.double() - exact).norm() / exact.norm())
    assert error < ROUNDING if rows == 1 else 0.015 < error < 0.035
