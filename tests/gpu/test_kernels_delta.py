"""The gated-delta kernels equal the reference, composed of its ops and computed in float64.

Without a GPU they run in triton's interpreter: fewer and smaller shapes, and no bfloat16, whose products it does not
know; float16 takes the same path.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before the import below
pytest.importorskip("triton")

from infinitevl.ops import reference  # noqa: E402
from infinitevl.ops.triton import delta  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
HALVES = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]
LENGTHS = [1, 2, 3, 5, 63, 64, 65, 130] + ([256, 1025] if CUDA else [])
EPS = 1e-6
# float32: products of tf32 halves are off by 1e-6 on a GPU; the interpreter's, of float32, by 5e-7, hard cases 2e-6.
# Halves: operands of five products are rounded in a row, the state at every 64 tokens, each by half of `eps` of its
# largest. They add up to at most 2.7 of `eps` of the largest result here (float16), and a lost term to far more.
TOLERANCE = {torch.float32: 1e-5} | {dtype: 4 * torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16)}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Whatever the launchers allocate, outputs and scratch, is NaN until a kernel writes it."""
    empty = torch.empty
    monkeypatch.setattr(delta.torch, "empty", lambda *size, **how: empty(*size, **how).fill_(torch.nan))


class Given(NamedTuple):
    """One mixer's projections of a chunk, its weights, and what it holds."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    gate: Tensor
    q_conv: Tensor
    k_conv: Tensor
    v_conv: Tensor
    A_log: Tensor
    dt_bias: Tensor
    norm: Tensor
    tail: Tensor
    state: Tensor

    def part(self, tokens: slice) -> Given:
        return Given(*(x[:, tokens] for x in self[:6]), *self[6:])

    def of(self, *names: str) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in names}


CHUNK_INPUTS = ("q", "k", "v", "a", "b", "q_conv", "k_conv", "v_conv", "A_log", "dt_bias", "tail", "state")


def given(length, rows=2, heads=2, key_dim=32, value_dim=64, dtype=torch.float32) -> Given:
    """Projections as views of one joint one; half-lives from 1 to 1,000 tokens; a state that was lived in."""
    keys, values = heads * key_dim, heads * value_dim
    joint = torch.randn(rows, length, 2 * keys + 2 * values + 2 * heads + 16).to(dtype)
    q, k, v, gate, a, b, _ = joint.split([keys, keys, values, values, heads, heads, 16], dim=-1)
    convs = [torch.randn(size, 4) * 0.5 for size in (keys, keys, values)]
    tail = torch.randn(rows, 3, 2 * keys + values)
    mine = [q, k, v, a, b, gate.unflatten(-1, (heads, -1)), *(x.to(dtype) for x in convs)]
    mine += [torch.zeros(heads), torch.linspace(-7, 0, heads), (torch.rand(value_dim) + 0.5).to(dtype)]
    return Given(*(x.to(DEVICE) for x in [*mine, tail.to(dtype), torch.randn(rows, heads, key_dim, value_dim)]))


class Result(NamedTuple):
    out: Tensor
    tail: Tensor
    state: Tensor


def expected(x: Given, present: Tensor | None = None) -> Result:
    """What `DeltaMixer.forward` computes, in float64 from the convolution on."""
    heads, key_dim = x.state.shape[1:3]
    joined, tail = reference.causal_conv(
        x=torch.cat([x.q, x.k, x.v], dim=-1),
        weight=torch.cat([x.q_conv, x.k_conv, x.v_conv]),
        tail=x.tail,
        present=present,
        segment=None,
    )
    sizes = [x.q.shape[-1], x.k.shape[-1], x.v.shape[-1]]
    q, k, v = (y.double().unflatten(-1, (heads, -1)) for y in joined.split(sizes, dim=-1))
    g = -x.A_log.double().exp() * F.softplus(x.a.double() + x.dt_bias)
    beta = x.b.double().sigmoid()
    if present is not None:
        g, beta = g * present[..., None], beta * present[..., None]
    q, k = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6) for y in (q, k))
    out, state = reference.delta_rule_recurrent(
        q=q * key_dim**-0.5, k=k, v=v, g=g, beta=beta, state=x.state.double(), segment=None
    )
    return Result(out, tail, state)


def places(present: Tensor) -> tuple[Tensor, Tensor]:
    """Order and count of the tokens that are there."""
    return (~present).to(torch.int8).argsort(dim=1, stable=True).int(), present.sum(1)


def run(x: Given, present: Tensor | None = None) -> Result:
    """The kernels, on copies of what they update."""
    x = x._replace(tail=x.tail.clone(), state=x.state.clone())
    order, count = (None, None) if present is None else places(present)
    out = delta.gated_delta(**x.of(*CHUNK_INPUTS), order=order, count=count)
    return Result(out, x.tail, x.state)


def assert_same(got: Result, right: Result, dtype: torch.dtype, present: Tensor | None = None) -> None:
    there = slice(None) if present is None else present
    assert got.out.dtype == dtype and got.out.is_contiguous() and torch.isfinite(got.out).all()
    for name, ours, theirs in (("output", got.out[there], right.out[there]), ("state", got.state, right.state)):
        error, scale = (ours - theirs).abs().max(), theirs.abs().max()
        assert error <= TOLERANCE[dtype] * scale, f"{name} is off by {error / scale:.1e} of its largest"
    assert torch.equal(got.tail, right.tail)
    assert present is None or not got.out[~present].any()


# -- a chunk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_a_chunk_equals_the_reference(length):
    x = given(length)
    assert_same(run(x), expected(x), torch.float32)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("length", [3, 130])
def test_half_precision_stays_at_its_rounding(length, dtype):
    x = given(length, key_dim=64, value_dim=128, heads=1, dtype=dtype)
    assert_same(run(x), expected(x), dtype)


SHAPES = [(1, 1, 128, 256), (3, 1, 64, 64)] + ([(4, 16, 128, 256), (16, 4, 64, 128)] if CUDA else [])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("rows, heads, key_dim, value_dim", SHAPES)
def test_sizes_of_heads(rows, heads, key_dim, value_dim, dtype):
    x = given(70, rows, heads, key_dim, value_dim, dtype)
    assert_same(run(x), expected(x), dtype)


def test_every_plan_computes_the_same(monkeypatch):
    x, plan = given(70, heads=1, value_dim=128), delta.plan
    for changed in ({"parts": 1}, {"parts": 2}, {"block_v": 16}, {"block_v": 128}, {"prepare_warps": 4}):
        monkeypatch.setattr(delta, "plan", lambda *shape, changed=changed: plan(*shape)._replace(**changed))
        assert_same(run(x), expected(x), torch.float32)


def test_chunks_in_sequence_equal_one():
    x = given(130, heads=1)
    right, outputs, held = run(x), [], x
    for begin, end in ((0, 1), (1, 65), (65, 67), (67, 130)):
        got = run(held.part(slice(begin, end)))
        outputs.append(got.out)
        held = held._replace(tail=got.tail, state=got.state)
    assert_same(Result(torch.cat(outputs, dim=1), held.tail, held.state), right, torch.float32)


def test_projections_need_not_be_views_of_one():
    x = given(66, heads=1)
    apart = x._replace(**{name: getattr(x, name).clone() for name in ("q", "k", "v", "a", "b")})
    for ours, theirs in zip(run(apart), run(x), strict=True):
        assert torch.equal(ours, theirs)


# -- tokens that are not there ----------------------------------------------------------------------------------------


def masks(length: int) -> dict[str, Tensor]:
    at = torch.arange(length, device=DEVICE)
    return {
        "right padding": torch.stack([at < length - 3, at < 2, at < length]),
        "left padding": torch.stack([at >= 3, at >= length - 1, at >= length - 66]),
        "holes": torch.stack([at % 3 != 1, at % 7 == 5, (at < 4) | (at > length - 4)]),
        "paused": torch.stack([at >= 0, at < 0, at < 1]),
    }


@pytest.mark.parametrize("kind", ["right padding", "left padding", "holes", "paused"])
@pytest.mark.parametrize("length", [5, 130])
def test_tokens_that_are_not_there_are_skipped(kind, length):
    x, present = given(length, rows=3), masks(length)[kind]
    assert_same(run(x, present), expected(x, present), torch.float32, present)


@pytest.mark.parametrize("kind", ["right padding", "paused"])
@pytest.mark.parametrize("length", [5, 130])
def test_tokens_that_come_first_need_no_order(kind, length):
    x, present = given(length, rows=3), masks(length)[kind]
    right, x = run(x, present), x._replace(tail=x.tail.clone(), state=x.state.clone())
    out = delta.gated_delta(**x.of(*CHUNK_INPUTS), order=None, count=present.sum(1))
    for ours, theirs in zip(Result(out, x.tail, x.state), right, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("length", [1, 130])
def test_a_paused_row_stays_as_it_is(length):
    x = given(length)
    x.state[1, 0, 0, :2] = torch.tensor([-0.0, torch.nan])  # what arithmetic, even with 0, would change or spread
    got = run(x, torch.tensor([True, False], device=DEVICE)[:, None].expand(2, length))
    assert torch.equal(got.state[1].view(torch.int32), x.state[1].view(torch.int32))
    assert torch.equal(got.tail[1], x.tail[1]) and torch.equal(got.out[1], torch.zeros_like(got.out[1]))


def test_what_is_not_there_is_not_read():
    x, present = given(70, heads=1), torch.arange(70, device=DEVICE).expand(2, 70) < 66
    right = run(x, present)
    for name in ("q", "k", "v", "a", "b"):
        getattr(x, name)[:, 66:] = torch.nan
    for ours, theirs in zip(run(x, present), right, strict=True):
        assert torch.equal(ours, theirs)


# -- hard numbers -----------------------------------------------------------------------------------------------------

LONG = 1025 if CUDA else 200


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_decay_to_nothing_within_a_token(dtype):
    x = given(LONG, heads=1, dtype=dtype)
    x = x._replace(A_log=x.A_log + 3, dt_bias=x.dt_bias + 9)
    assert_same(run(x), expected(x), dtype)


def test_a_half_life_of_10_000_tokens():
    """With nothing written, what the state loses, 7e-5 of it a token, is right to 1 in 1,000."""
    x = given(LONG, heads=1)
    x.b.fill_(-100), x.a.fill_(0)
    x = x._replace(A_log=torch.zeros_like(x.A_log), dt_bias=torch.full_like(x.dt_bias, -9.57))
    got, right = run(x).state, expected(x).state
    lost = (x.state - right).abs().max()
    assert (got - right).abs().max() < 1e-3 * lost and lost > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_keys_that_are_all_equal(dtype):
    """Writes of strength 0.993 to one key without decay: the powers of the system's matrix would reach 10^17."""
    x = given(LONG, heads=1, dtype=dtype)
    x.k[:] = x.k[:, :1]
    x.tail.copy_(torch.cat([x.q, x.k, x.v], dim=-1)[:, :1].expand_as(x.tail))
    x.b.fill_(5), x.a.fill_(0)
    x = x._replace(dt_bias=torch.full_like(x.dt_bias, -9.57))
    assert_same(run(x), expected(x), dtype)


# -- one token --------------------------------------------------------------------------------------------------------

TOKEN_SHAPES = [(2, 2, 32, 64), (1, 1, 128, 256)] + ([(16, 16, 128, 256), (3, 4, 64, 128)] if CUDA else [])


def run_token(x: Given, count: Tensor | None = None) -> Result:
    x = x._replace(tail=x.tail.clone(), state=x.state.clone())
    return Result(delta.delta_token(**x._asdict(), eps=EPS, count=count), x.tail, x.state)


def expected_token(x: Given) -> Result:
    right = expected(x)
    rounded = right.out.to(x.v.dtype).double()
    normed = rounded * torch.rsqrt(rounded.square().mean(-1, keepdim=True) + EPS)
    return right._replace(out=normed * x.norm.double() * F.silu(x.gate.double()))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("rows, heads, key_dim, value_dim", TOKEN_SHAPES)
def test_one_token_equals_the_reference(rows, heads, key_dim, value_dim, dtype):
    x = given(1, rows, heads, key_dim, value_dim, dtype)
    assert_same(run_token(x), expected_token(x), dtype)


def test_token_by_token_equals_a_chunk():
    x = given(5)
    right, held, outputs = run(x), x, []
    for t in range(5):
        got = run_token(held.part(slice(t, t + 1)))
        outputs.append(got.out)
        held = held._replace(tail=got.tail, state=got.state)
    normed = delta.gated_norm(x=right.out, gate=x.gate, weight=x.norm, eps=EPS)
    assert_same(Result(torch.cat(outputs, dim=1), held.tail, held.state), right._replace(out=normed), torch.float32)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_a_row_without_its_token_stays_as_it_is(kind):
    x = given(1)
    x.state[1, 0, 0, :2] = torch.tensor([-0.0, torch.nan])
    got, right = run_token(x, torch.tensor([1, 0], dtype=kind, device=DEVICE)), run_token(x)
    assert torch.equal(got.state[1].view(torch.int32), x.state[1].view(torch.int32))
    assert torch.equal(got.tail[1], x.tail[1]) and torch.isfinite(got.out).all()
    for ours, theirs in zip(got, right, strict=True):  # two kernels: products and sums may be contracted differently
        torch.testing.assert_close(ours[0], theirs[0], atol=1e-6, rtol=1e-6)


# -- the norm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("length, heads, value_dim", [(1, 2, 64), (7, 3, 256), (5, 16, 16)])
def test_gated_norm_equals_the_reference(length, heads, value_dim, dtype):
    x = given(length, 2, heads, 16, value_dim, dtype)
    out = torch.randn(2, length, heads, value_dim, device=DEVICE).to(dtype)
    got = delta.gated_norm(x=out, gate=x.gate, weight=x.norm, eps=EPS)
    right = reference.gated_norm(x=out, gate=x.gate, weight=x.norm, eps=EPS)
    assert got.dtype == dtype and got.is_contiguous() and got.shape == out.shape
    torch.testing.assert_close(got, right, rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-6)
