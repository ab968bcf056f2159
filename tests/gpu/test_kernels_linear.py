"""The Triton kernels around products against the reference; in Triton's interpreter where there is no GPU."""

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

from infinitevl.ops import reference  # noqa: E402
from infinitevl.ops.triton import linear as kernels  # noqa: E402
from infinitevl.ops.triton import vision  # noqa: E402
from infinitevl.ops.where import Windows  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16 if GPU else torch.float16]  # the interpreter multiplies no bfloat16
SIZES = [(1, 40, 24), (1, 1300, 33), (17, 256, 40)]
SIZES += [(1, 2048, 12320), (1, 11008, 2048), (16, 2048, 2560)] if GPU else []
SIZES += [(65, 8192, 40), (64, 8192, 40)] + ([(256, 11008, 2048)] if GPU else [])  # in parts, and just not


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs begin as NaN, so that a place not written shows."""
    torch.manual_seed(0)
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *given, plain=plain, **kw: plain(*given, **kw).fill_(torch.nan))
    plain_new = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *given, **kw: plain_new(*given, **kw).fill_(torch.nan))


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32).to(DEVICE, dtype)


def assert_near(got: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """`right` is float64. Up to seven roundings of half a unit each lie between (norm, product, gate, sum)."""
    scale = max(1.0, float(right.abs().max()))
    bound = scale * {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
    assert torch.isfinite(got).all() and (got.double() - right).abs().max() <= bound


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.double() for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, size", [(1, 5), (3, 64), (2, 100), (5, 1280)])
def test_rms_norm(rows, size, dtype):
    x, weight = random(2, rows, size, dtype=dtype), random(size, dtype=dtype)
    got = kernels.rms_norm(x=x, weight=weight, eps=1e-6)
    right = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    assert got.dtype == dtype
    assert_near(got, right, dtype)
    small = kernels.rms_norm(x=x * 1e-3, weight=weight, eps=1e-2)  # an epsilon that counts
    assert small.abs().max() < 0.2 * weight.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 36, 1025])
def test_gated_silu(channels, dtype):
    x = random(3, 2 * channels, dtype=dtype)
    gate, up = x.double().chunk(2, dim=-1)
    assert_near(kernels.gated_silu(x), gate * gate.sigmoid() * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("shape", [(1, 5), (3, 7, 1025)])
def test_add_parts_in_place(shape, count, dtype):
    onto, parts = random(*shape, dtype=dtype), random(count, *shape, dtype=dtype)
    right = onto.double() + parts.double().sum(0)
    got = kernels.add_parts(onto, parts)
    assert got.data_ptr() == onto.data_ptr()
    assert_near(got, right, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, heads, size", [(1, 2, 8), (2, 5, 80), (3, 3, 128)])
def test_rotate_in_place(rows, heads, size, dtype):
    joint = random(rows, 7, heads + 2, size, dtype=dtype)
    phase = torch.randn(1 if rows == 2 else rows, 7, size // 2, dtype=torch.float64).repeat(1, 1, 2).to(DEVICE)
    cos, sin = phase.cos().float(), phase.sin().float()
    before = joint.clone()
    x = joint[:, :, :heads]  # a view with the strides of the whole
    right = reference.rotate(x=x.double(), cos=cos.double(), sin=sin.double())
    got = kernels.rotate(x=x, cos=cos, sin=sin)
    assert got.data_ptr() == joint.data_ptr()
    assert_near(got, right, dtype)
    assert torch.equal(joint[:, :, heads:], before[:, :, heads:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated, normed, biased, summed", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize("rows, size, channels", SIZES)
def test_linear(rows, size, channels, gated, normed, biased, summed, dtype):
    x, weight = random(rows, size, dtype=dtype), random(channels * (2 if gated else 1), size, dtype=dtype) * size**-0.5
    bias = random(len(weight), dtype=dtype) if biased else None
    norm = (random(size, dtype=dtype), 1e-6) if normed else None
    onto = random(rows, channels, dtype=dtype) if summed else None
    w64, b64, x64, o64 = wide(weight, bias, x, onto)
    n64 = (norm[0].double(), norm[1]) if norm else None
    right = reference.linear(x=x64, weight=w64, bias=b64, norm=n64, gated=gated, onto=o64)
    got = kernels.linear(
        x=x[None], weight=weight, bias=bias, norm=norm, gated=gated, onto=None if onto is None else onto[None]
    )
    assert got.shape == (1, rows, channels) and got.dtype == dtype
    if summed:
        assert got.data_ptr() == onto.data_ptr()
    assert_near(got[0], right, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("more", [0, 1, 24])
@pytest.mark.parametrize("frames, patches, size, span", [(2, 128, 80, 64), (1, 48, 16, 16), (1, 192, 32, 96)])
def test_attention_of_windows_of_one_size(frames, patches, size, span, more, dtype):
    qkv = random(frames, patches, 3, 2, size, dtype=dtype)
    phase = torch.randn(1, patches, size // 2, dtype=torch.float64).repeat(1, 1, 2).to(DEVICE)
    place = torch.arange(patches, device=DEVICE).view(-1, span)
    given = {"cos": phase.cos(), "sin": phase.sin(), "windows": Windows(place, None), "width": 2 * size + more}
    right = reference.attend_patches(qkv=qkv.double(), **given)
    got = vision.attend_patches(qkv=qkv, **(given | {"cos": phase.cos().float(), "sin": phase.sin().float()}))
    assert got.is_contiguous()
    assert_near(got, right, dtype)
