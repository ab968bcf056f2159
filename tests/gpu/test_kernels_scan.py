"""The kernels under the delta rule that trains equal the ops' definitions, and through them the float64 recurrence.

Without a GPU they run in triton's interpreter: fewer and smaller shapes, and no bfloat16, whose products it does not
know; float16 takes the same path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before the import below
pytest.importorskip("triton")

from infinitevl import ops  # noqa: E402
from infinitevl.ops import scan as plain  # noqa: E402
from infinitevl.ops.triton import scan as kernels  # noqa: E402
from infinitevl.train import grad_check  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
HALVES = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]
# B, H, N, K, V
SHAPES = [(2, 2, 3, 32, 64), (1, 1, 1, 64, 32)] + ([(1, 16, 20, 128, 256), (3, 16, 5, 128, 256)] if CUDA else [])
# float32: products of three tf32 halves. Halves: definition and kernel round at the same places, but not always to the
# same side: by `eps` of a value at a chunk, what a later chunk makes more of.
TOLERANCE = {torch.float32: 1e-5} | {dtype: 4 * torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16)}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the launchers allocate is NaN until a kernel writes it."""
    empty, like = torch.empty, torch.empty_like
    monkeypatch.setattr(kernels.torch, "empty", lambda *size, **how: empty(*size, **how).fill_(torch.nan))
    monkeypatch.setattr(kernels.torch, "empty_like", lambda x: like(x).fill_(torch.nan))


def drawn(*shape: int, dtype: torch.dtype = torch.float32, size: float = 0.2) -> Tensor:
    return (torch.randn(*shape) * size).to(DEVICE, dtype)


def walk(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """W, U, k_end, kept and the first state; some chunks keep nothing, some all. Keys are of length 1 or so, as a
    mixer makes them: 20 chunks of longer ones leave float16."""
    B, H, N, K, V = shape
    kept = torch.rand(B, H, N).round(decimals=1).to(DEVICE)
    state = torch.randn(B, H, K, V).to(DEVICE)
    W, k_end = (drawn(B, H, N, 64, K, dtype=dtype, size=K**-0.5) for _ in range(2))
    U = drawn(B, H, N, 64, V, dtype=dtype)
    return [W, U, k_end, kept, state]


def slopes(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Gradients of what the walk returns."""
    B, H, N, K, V = shape
    du, dbefore = drawn(B, H, N, 64, V, dtype=dtype), drawn(B, H, N, K, V, dtype=dtype)
    return [du, dbefore, torch.randn(B, H, K, V).to(DEVICE)]


def assert_same(got: tuple[Tensor, ...], right: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for number, (ours, theirs) in enumerate(zip(got, right, strict=True)):
        assert ours.dtype == theirs.dtype and ours.is_contiguous() and torch.isfinite(ours).all()
        error, scale = (ours.double() - theirs.double()).abs().max(), theirs.double().abs().max()
        assert error <= TOLERANCE[dtype] * scale, f"result {number} is off by {error / scale:.1e} of its largest"


def defined(op, *given: Tensor) -> tuple[Tensor, ...]:
    """An op by its definition, in plain torch on the CPU: on CUDA the op itself is the kernel."""
    return tuple(x.to(DEVICE) for x in op(*(x.cpu() for x in given)))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_walk_equals_its_definition(shape, dtype):
    given = walk(shape, dtype)
    assert_same(kernels.scan(*given), defined(plain.scan, *given), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_walk_back_equals_its_definition(shape, dtype):
    W, _, k_end, kept, _ = walk(shape, dtype)
    given = (W, k_end, kept, *slopes(shape, dtype))
    assert_same(kernels.scan_backward(*given), defined(plain.scan_backward, *given), dtype)


@pytest.mark.parametrize("changed", [{"block_v": 32}, {"block_v": 64}, {"warps": 8}, {"stages": 2}, {"stages": 4}])
def test_every_plan_computes_the_same(monkeypatch, changed):
    shape, chosen = (1, 2, 4, 64, 128), kernels.plan
    W, U, k_end, kept, state = walk(shape, torch.float16)
    back = (W, k_end, kept, *slopes(shape, torch.float16))
    right = kernels.scan(W, U, k_end, kept, state), kernels.scan_backward(*back)
    monkeypatch.setattr(kernels, "plan", lambda *asked: chosen(*asked)._replace(**changed))
    got = kernels.scan(W, U, k_end, kept, state), kernels.scan_backward(*back)
    for ours, theirs in zip(got, right, strict=True):
        assert_same(ours, theirs, torch.float16)


def test_inputs_need_not_be_contiguous():
    given = walk(SHAPES[0], torch.float32)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    assert not turned[0].is_contiguous()
    for ours, theirs in zip(kernels.scan(*turned), kernels.scan(*given), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_inverse(dtype):
    """Of systems as keys make them, the last one of keys that are all equal, whose powers would reach 10^17."""
    system = torch.rand(2, 3, 1, 64, 64, device=DEVICE) * torch.randint(-1, 2, (2, 3, 1, 1, 64), device=DEVICE) * 0.2
    system[-1, -1] = 0.993
    system = system.tril(-1)
    unit = torch.eye(64, dtype=torch.float64, device=DEVICE)
    right = torch.linalg.inv(system.double() + unit)
    got = kernels.inverse(system, dtype)
    assert got.dtype == dtype and not got.triu(1).any()
    # operands are float16 at best: 4 products in a row of their rounding, and that of the result
    limit = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(torch.float16).eps + torch.finfo(dtype).eps
    assert (got.double() - right).abs().max() < limit * right.abs().max()


# -- the convolution --------------------------------------------------------------------------------------------------


def convolution(rows: int, tokens: int, channels: int, dtype: torch.dtype) -> list[Tensor]:
    """Inputs as a view of joint projections, weight, and a tail that was lived in."""
    x = torch.randn(rows, tokens, channels + 16).to(DEVICE, dtype)[..., 16:]
    return [x, torch.randn(channels, 4).to(DEVICE, dtype), torch.randn(rows, 3, channels).to(DEVICE, dtype)]


def packing(rows: int, tokens: int, kind: str) -> Tensor | None:
    """Another one in each row."""
    at = torch.arange(tokens, device=DEVICE).expand(rows, -1)
    later = torch.arange(rows, device=DEVICE)[:, None] * (tokens // 2)
    return {"whole": None, "one": at * 0, "three": (at * 3 + later) // tokens, "each": at}[kind]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("kind", ["whole", "one", "three", "each"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 15, 16, 17, 70] + ([1025] if CUDA else []))
def test_the_convolution_and_its_gradients(tokens, kind, dtype):
    """In halves the definition computes in float32 too: they differ by the result's rounding."""
    given, segment = convolution(2, tokens, 96, dtype), packing(2, tokens, kind)
    slope = torch.randn(2, tokens, 96).to(DEVICE, dtype)
    on_cpu = None if segment is None else segment.cpu()
    right = plain.conv(*(x.cpu() for x in given), on_cpu).to(DEVICE)
    assert_same((kernels.conv(*given, segment),), (right,), dtype)
    found = plain.conv_backward(slope.cpu(), *(x.cpu() for x in given), on_cpu)
    for name, ours, theirs in zip(
        ("x", "weight", "tail"), kernels.conv_backward(slope, *given, segment), found, strict=True
    ):
        theirs, scale = theirs.to(DEVICE), max(1.0, float(theirs.abs().max()))
        assert ours.dtype == theirs.dtype and torch.isfinite(ours).all(), name
        assert (ours - theirs).abs().max() <= TOLERANCE[dtype] * scale, name


def test_rows_of_a_convolution_do_not_meet():
    """Over several blocks of tokens and channels."""
    x, weight, tail = convolution(2, 40, 384, torch.float32)
    together = kernels.conv(x, weight, tail, None)
    for row in (slice(0, 1), slice(1, 2)):
        assert torch.equal(kernels.conv(x[row], weight, tail[row], None), together[row])


# -- the whole rule ---------------------------------------------------------------------------------------------------


@pytest.fixture
def launched() -> Iterator[None]:
    """Without a GPU: the ops run the kernels, in the interpreter."""
    if CUDA:
        yield
        return
    with torch.library._scoped_library("infinitevl", "IMPL") as library:
        library.impl("delta_inverse", kernels.inverse, "CPU")
        library.impl("delta_scan", kernels.scan, "CPU")
        library.impl("delta_scan_backward", kernels.scan_backward, "CPU")
        library.impl("delta_conv", kernels.conv, "CPU")
        library.impl("delta_conv_backward", kernels.conv_backward, "CPU")
        yield


LENGTHS = [1, 63, 64, 65, 130] + ([1025, 4096] if CUDA else [])
HEADS = [(128, 256), (64, 128)] if CUDA else [(32, 64)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if CUDA else [torch.float32])
@pytest.mark.parametrize("key_dim, value_dim", HEADS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_gradients_are_those_of_the_recurrence(tokens, key_dim, value_dim, dtype, packed, launched):
    with ops.pinned(gated_delta="scan"):
        found = grad_check.errors(DEVICE, tokens, 2, key_dim, value_dim, dtype, packed)
    print(f"\n{tokens} tokens, {key_dim}/{value_dim}, {dtype}, packed {packed}: {found}")
    assert max(found.values()) < grad_check.LIMITS[dtype], found
