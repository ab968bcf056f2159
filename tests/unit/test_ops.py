"""The four ops: chunked equals recurrent, convolution and attention equal naive loops, the door says what it chose."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infinitevl import ops
from infinitevl.memory import Delta
from infinitevl.ops import fla, reference, scan
from infinitevl.ops.where import DeltaWeights, Projected, Where

CHUNKED = [reference.delta_rule, scan.delta_rule]
LENGTHS = [1, 2, 3, 31, 63, 64, 65, 127, 128, 129, 193, 250, 300]
TOLERANCE = 1e-4
B, H, K, V = 2, 2, 8, 12


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    state: Tensor


def inputs(length: int, decay: float | None = None) -> Inputs:
    """What a mixer hands to the delta rule: unit keys, decays from none to strong, some write strengths of 0 and 1.

    The first row starts from an empty state, the second goes on from one.
    """
    q, k = F.normalize(torch.randn(2, B, length, H, K), dim=-1)
    g = -torch.rand(B, length, H).pow(4) * 6 if decay is None else torch.full((B, length, H), -decay)
    beta = torch.rand(B, length, H)
    beta[:, ::7], beta[:, 3::11] = 0.0, 1.0
    state = torch.randn(B, H, K, V) * torch.tensor([0.0, 1.0]).view(B, 1, 1, 1)
    return Inputs(q * K**-0.5, k, torch.randn(B, length, H, V), g, beta, state)


def run(rule, given: Inputs, segment: Tensor | None = None, wide: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, state and the gradients of all six inputs under one fixed weighting of both."""
    leaves = [x.double() if wide else x for x in given]
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    o, state = rule(**dict(zip(Inputs._fields, leaves, strict=True)), segment=segment)
    loss = (o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum()
    loss = loss + (state * torch.linspace(1, -1, state.numel()).view_as(state)).sum()
    return o.detach(), state.detach(), list(torch.autograd.grad(loss, leaves))


def assert_same(got: tuple[Tensor, Tensor, list[Tensor]], right: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    names = ("output", "state", *(f"gradient of {name}" for name in Inputs._fields))
    for name, ours, theirs in zip(names, (*got[:2], *got[2]), (*right[:2], *right[2]), strict=True):
        error, scale = (ours.double() - theirs).abs().max(), max(1.0, float(theirs.abs().max()))
        assert torch.isfinite(ours).all() and error <= TOLERANCE * scale, f"{name} is off by {error:.2e} of {scale:.1f}"


# -- the delta rule ---------------------------------------------------------------------------------------------------


def test_recurrent_is_the_householder_recurrence():
    """S <- exp(g) (I - beta k k^T) S + beta k v^T, o = S^T q: the paper's form, row by row and head by head."""
    given = Inputs(*(x.double() for x in inputs(9)))
    o, state = reference.delta_rule_recurrent(**given._asdict(), segment=None)
    for row in range(B):
        for head in range(H):
            s = given.state[row, head]
            for t in range(9):
                k, v = given.k[row, t, head], given.v[row, t, head]
                beta = given.beta[row, t, head]
                s = given.g[row, t, head].exp() * (torch.eye(K) - beta * torch.outer(k, k)) @ s + beta * torch.outer(
                    k, v
                )
                torch.testing.assert_close(o[row, t, head], s.mT @ given.q[row, t, head])
            torch.testing.assert_close(state[row, head], s)


@pytest.mark.parametrize("rule", CHUNKED)
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_recurrent(length, rule):
    given = inputs(length)
    assert_same(run(rule, given), run(reference.delta_rule_recurrent, given, wide=True))


def test_recurrent_in_float32_equals_float64():
    given = inputs(100)
    assert_same(run(reference.delta_rule_recurrent, given), run(reference.delta_rule_recurrent, given, wide=True))


@pytest.mark.parametrize("rule", CHUNKED)
@pytest.mark.parametrize("decay", [0.0, 1e-3, 50.0])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_identical_keys_with_extreme_gates(decay, beta, rule):
    """One key for every token: the chunk's system is as ill-conditioned as it gets, and exp(+50 * 63) is infinite."""
    given = inputs(130, decay=decay)
    same = given.k[:, :1].expand_as(given.k)
    given = given._replace(k=same, beta=torch.full_like(given.beta, beta))
    assert_same(run(rule, given), run(reference.delta_rule_recurrent, given, wide=True))


@pytest.mark.parametrize("rule", CHUNKED)
def test_sudden_decay_inside_a_chunk(rule):
    given = inputs(150)
    g = torch.full_like(given.g, -0.01)
    g[:, [5, 63, 64, 100]] = -50.0
    given = given._replace(g=g)
    assert_same(run(rule, given), run(reference.delta_rule_recurrent, given, wide=True))


@pytest.mark.parametrize("rule", [*CHUNKED, reference.delta_rule_recurrent])
@pytest.mark.parametrize("sizes", [(1, 63, 64, 2), (30, 34, 1, 65), (128, 5)])
def test_a_change_of_segment_starts_from_nothing(rule, sizes):
    """The first segment goes on from the state given; every other is what it is alone."""
    given = inputs(sum(sizes))
    segment = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).expand(B, -1)
    got = run(rule, given, segment)
    assert_same(got, run(reference.delta_rule_recurrent, given, segment, wide=True))
    parts = [x.split(sizes, dim=1) for x in given[:5]]
    for number, part in enumerate(zip(*parts, strict=True)):
        state = given.state if number == 0 else torch.zeros_like(given.state)
        o, last = reference.delta_rule_recurrent(**Inputs(*part, state)._asdict(), segment=None)
        torch.testing.assert_close(got[0].split(sizes, dim=1)[number], o, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(got[1], last, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("rule", CHUNKED)
def test_segments_may_differ_between_rows(rule):
    given = inputs(100)
    segment = torch.stack([torch.arange(100) // 30, torch.arange(100) // 64])
    assert_same(run(rule, given, segment), run(reference.delta_rule_recurrent, given, segment, wide=True))


@pytest.mark.parametrize("rule", CHUNKED)
def test_tokens_that_are_not_there_change_nothing(rule):
    """g = 0 and beta = 0 at a token: the same as a sequence without it."""
    given = inputs(140)
    there = torch.rand(140) > 0.4
    gated = given._replace(g=given.g * there[:, None], beta=given.beta * there[:, None])
    o, state = rule(**gated._asdict(), segment=None)
    kept = Inputs(*(x[:, there] for x in given[:5]), given.state)
    right_o, right_state = rule(**kept._asdict(), segment=None)
    torch.testing.assert_close(o[:, there], right_o, atol=1e-5, rtol=0)
    torch.testing.assert_close(state, right_state, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", [reference.delta_rule, reference.delta_rule_recurrent])
def test_bfloat16_in_and_out_but_never_the_state(rule):
    given = inputs(70)
    low = given._replace(v=given.v.bfloat16())
    o, state = rule(**low._asdict(), segment=None)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    right = rule(**low._replace(v=low.v.float())._asdict(), segment=None)
    torch.testing.assert_close(state, right[1])
    torch.testing.assert_close(o, right[0].bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 2, 64, 65, 300])
def test_fla_equals_the_reference(length):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("fla")
    given = Inputs(
        q=F.normalize(torch.randn(B, length, H, 128), dim=-1) * 128**-0.5,
        k=F.normalize(torch.randn(B, length, H, 128), dim=-1),
        v=torch.randn(B, length, H, 256),
        g=-torch.rand(B, length, H),
        beta=torch.rand(B, length, H),
        state=torch.randn(B, H, 128, 256) * 0.1,
    )
    low = Inputs(*(x.cuda() for x in given))._replace(v=given.v.bfloat16().cuda())
    with torch.no_grad():
        o, state = fla.delta_rule(**low._asdict(), segment=None)
    wide = Inputs(*(x.double() for x in given))._replace(v=low.v.double().cpu())
    right_o, right_state = reference.delta_rule_recurrent(**wide._asdict(), segment=None)
    assert (o.cpu().double() - right_o).abs().max() <= 0.02 * right_o.abs().max()
    assert (state.cpu().double() - right_state).abs().max() <= 0.02 * right_state.abs().max()


# -- the convolution --------------------------------------------------------------------------------------------------


def naive_conv(
    x: Tensor, weight: Tensor, tail: Tensor, present: Tensor, segment: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token after the other: a list of what came before, started anew at a change of segment."""
    rows, length, channels = x.shape
    taps = weight.shape[1]
    y, tails = torch.zeros_like(x), []
    for row in range(rows):
        past, last = list(tail[row]), None
        for t in range(length):
            if not present[row, t]:
                continue
            if segment is not None and last is not None and segment[row, t] != last:
                past = [torch.zeros(channels)] * (taps - 1)
            last = None if segment is None else segment[row, t]
            past.append(x[row, t])
            y[row, t] = F.silu(sum(weight[:, tap] * past[tap - taps] for tap in range(taps)))
        tails.append(torch.stack(past[1 - taps :]))
    return y, torch.stack(tails)


def masks(length: int) -> dict[str, Tensor]:
    place = torch.arange(length)
    half = length // 2
    return {
        "all there": torch.ones(2, length, dtype=torch.bool),
        "left": torch.stack([place >= half, place >= 1]),
        "right": torch.stack([place < half, place < length - 1]),
        "middle": torch.stack([(place < 2) | (place > half), place % 3 != 1]),
        "one row absent": torch.stack([place < 0, place >= 0]),
        "all absent": torch.zeros(2, length, dtype=torch.bool),
    }


@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 11])
@pytest.mark.parametrize("mask", list(masks(1)))
def test_conv_skips_what_is_not_there(taps, length, mask):
    x, weight, tail = torch.randn(2, length, 5), torch.randn(5, taps), torch.randn(2, taps - 1, 5)
    present = masks(length)[mask]
    y, after = reference.causal_conv(x=x, weight=weight, tail=tail, present=present, segment=None)
    right, right_after = naive_conv(x, weight, tail, present, None)
    torch.testing.assert_close(after, right_after)
    torch.testing.assert_close(y[present], right[present], atol=1e-6, rtol=1e-5)
    assert torch.isfinite(y).all()


def test_conv_without_a_mask_is_conv_with_all_there():
    x, weight, tail = torch.randn(2, 9, 5), torch.randn(5, 4), torch.randn(2, 3, 5)
    plain = reference.causal_conv(x=x, weight=weight, tail=tail, present=None, segment=None)
    full = torch.ones(2, 9, dtype=torch.bool)
    torch.testing.assert_close(plain, reference.causal_conv(x=x, weight=weight, tail=tail, present=full, segment=None))


@pytest.mark.parametrize("sizes", [(1,) * 12, (2, 3, 1, 6), (12,)])
def test_conv_in_chunks(sizes):
    x, weight, tail = torch.randn(2, 12, 5), torch.randn(5, 4), torch.randn(2, 3, 5)
    present = torch.rand(2, 12) > 0.3
    whole, last = reference.causal_conv(x=x, weight=weight, tail=tail, present=present, segment=None)
    parts = []
    for part, there in zip(x.split(sizes, 1), present.split(sizes, 1), strict=True):
        y, tail = reference.causal_conv(x=part, weight=weight, tail=tail, present=there, segment=None)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1)[present], whole[present])
    assert torch.equal(tail, last)


@pytest.mark.parametrize("masked", [False, True])
def test_conv_starts_anew_with_a_segment(masked):
    x, weight, tail = torch.randn(2, 14, 5), torch.randn(5, 4), torch.zeros(2, 3, 5)
    segment = torch.tensor([[0] * 5 + [1] + [2] * 8, [0] * 2 + [1] * 10 + [2] * 2])
    present = torch.rand(2, 14) > 0.3 if masked else torch.ones(2, 14, dtype=torch.bool)
    y, _ = reference.causal_conv(x=x, weight=weight, tail=tail, present=present if masked else None, segment=segment)
    torch.testing.assert_close(y[present], naive_conv(x, weight, tail, present, segment)[0][present])


def test_the_tail_holds_on_to_nothing_else():
    """A tail that is a view of its chunk would keep the whole chunk alive: bytes that `nbytes` does not see."""
    x, weight, tail = torch.randn(1, 500, 5), torch.randn(5, 4), torch.zeros(1, 3, 5)
    _, after = reference.causal_conv(x=x, weight=weight, tail=tail, present=None, segment=None)
    assert after.untyped_storage().nbytes() == after.nbytes


# -- attention --------------------------------------------------------------------------------------------------------


def naive_attend(q, k, v, q_index, k_index, window, sinks, q_segment, k_segment) -> Tensor:
    """One query and head at a time over the list of keys it may see."""
    out = torch.zeros_like(q)
    rows, length, heads, size = q.shape
    group = heads // k.shape[2]
    for row in range(rows):
        for t in range(length):
            at = int(q_index[row, t])
            seen = [
                s
                for s, index in enumerate(k_index[row].tolist())
                if 0 <= index <= at
                and (window is None or at - index < window or index < sinks)
                and (q_segment is None or q_segment[row, t] == k_segment[row, s])
            ]
            for head in range(heads if at >= 0 else 0):
                scores = k[row, seen, head // group] @ q[row, t, head] / math.sqrt(size)
                out[row, t, head] = scores.softmax(0) @ v[row, seen, head // group]
    return out


@pytest.mark.parametrize("window, sinks", [(None, 0), (6, 0), (1, 0), (6, 2)])
@pytest.mark.parametrize("block", [4, 7, 1024])
@pytest.mark.parametrize("extra", ["plain", "absent", "segments"])
def test_attend_equals_a_loop(monkeypatch, window, sinks, block, extra):
    """Keys of a ring in any order before the chunk's own, empty slots among them, more queries than one block."""
    monkeypatch.setattr(reference, "QUERY_BLOCK", block)
    held, length = 9, 15
    q, k, v = torch.randn(2, length, 6, 8), torch.randn(2, held + length, 2, 8), torch.randn(2, held + length, 2, 8)
    q_index = torch.arange(20, 20 + length).repeat(2, 1)
    ring = torch.stack([torch.randperm(20)[:held], torch.randperm(20)[:held]])
    ring[:, [2, 5]] = -1
    q_segment = k_segment = None
    if extra == "absent":
        q_index[0, :3], q_index[1, 4:6] = -1, -1
    if extra == "segments":
        q_segment = torch.stack([torch.arange(length) // 4, torch.arange(length) // 9])
        k_segment = torch.cat([torch.zeros(2, held, dtype=torch.int64), q_segment], dim=1)
    given = dict(q_index=q_index, k_index=torch.cat([ring, q_index], 1), window=window, sinks=sinks)
    given |= dict(q_segment=q_segment, k_segment=k_segment)
    out = reference.attend(q=q, k=k, v=v, **given)
    there = q_index >= 0
    torch.testing.assert_close(out[there], naive_attend(q, k, v, **given)[there], atol=1e-5, rtol=0)
    assert torch.isfinite(out).all()


def test_a_query_sees_itself_and_the_window_before_it():
    index = torch.arange(6)[None]
    seen = reference.visible(index, index, window=3, sinks=0)[0]
    assert seen.tolist() == [[q >= k > q - 3 for k in range(6)] for q in range(6)]
    seen = reference.visible(index, index, window=3, sinks=1)[0]
    assert seen.tolist() == [[q >= k > q - 3 or k == 0 for k in range(6)] for q in range(6)]


# -- the norm ---------------------------------------------------------------------------------------------------------


def test_gated_norm():
    x, gate, weight = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8), torch.randn(8)
    wide = x.double()
    right = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight * F.silu(gate.double())
    got = reference.gated_norm(x=x, gate=gate, weight=weight, eps=1e-5)
    torch.testing.assert_close(got.double(), right, atol=1e-6, rtol=1e-5)
    low = reference.gated_norm(x=x, gate=gate.bfloat16(), weight=weight, eps=1e-5)
    assert low.dtype == torch.bfloat16
    silent = reference.gated_norm(x=torch.zeros(1, 8), gate=torch.ones(1, 8), weight=weight, eps=1e-5)
    assert torch.equal(silent, torch.zeros(1, 8))


# -- the door ---------------------------------------------------------------------------------------------------------


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("op", ops.OPS)
def test_the_reference_runs_on_the_cpu_and_says_why(op):
    choice = ops.choose(op, CPU, torch.float32)
    assert choice.name == "reference" and choice.reason


@pytest.mark.parametrize("op", ops.OPS)
@pytest.mark.parametrize("installed", [False, True])
def test_the_rule_for_cuda(monkeypatch, installed, op):
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: object() if installed else None)
    assert ops.choose(op, CUDA, torch.bfloat16).name == ("triton" if installed else "reference")
    assert installed or "not installed" in ops.choose(op, CUDA, torch.bfloat16).reason
    assert (ops.choose(op, CUDA, torch.float32).name == "triton") == (installed and op == "place")
    assert ops.choose(op, torch.device("mps"), torch.bfloat16).name == "reference"


@pytest.mark.parametrize(
    ("op", "with_gradient", "with_segments", "with_both"),
    [
        ("gated_delta", "scan", "scan", "scan"),
        ("attend", "reference", "flash", "flash"),
        ("rms_norm", "reference", "triton", "reference"),
        ("linear", "reference", "triton", "reference"),
        ("attend_patches", "reference", "triton", "reference"),
    ],
)
def test_what_trains_on_cuda(monkeypatch, op, with_gradient, with_segments, with_both):
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: object())

    def chosen(**asked: object) -> str:
        return ops.choose(op, CUDA, torch.bfloat16, **asked).name

    assert chosen(gradient=True) == with_gradient
    assert chosen(segments=True) == with_segments
    assert chosen(gradient=True, segments=True) == with_both
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chosen() == "reference"
    assert chosen(gradient=True, segments=True) == with_both


def test_segments_with_sinks_or_missing_tokens_are_left_to_the_reference(monkeypatch):
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: object())
    assert ops.choose("attend", CUDA, torch.bfloat16, segments=True, masked=True).name == "reference"
    assert ops.choose("attend", CUDA, torch.bfloat16, masked=True).name == "triton"


def mixer_inputs(length: int, **where: Tensor) -> dict[str, object]:
    """What a delta mixer hands to its op."""
    projected = Projected(*(torch.randn(B, length, H * n) for n in (K, K, V, V, 1, 1)))
    convs = [torch.randn(H * n, 4) for n in (K, K, V)]
    weights = DeltaWeights(*convs, torch.zeros(H), torch.zeros(H), torch.ones(V), 1e-5)
    index = torch.arange(length).expand(B, -1)
    state = Delta(torch.zeros(B, 3, H * (2 * K + V)), torch.zeros(B, H, K, V))
    return {"projected": projected, "weights": weights, "where": Where(index, index, index, **where), "state": state}


def test_a_pin_is_seen_and_ends_with_its_block(monkeypatch):
    calls = []
    recurrent = reference.delta_rule_recurrent
    monkeypatch.setattr(
        reference, "delta_rule_recurrent", lambda **given: calls.append("recurrent") or recurrent(**given)
    )
    given = mixer_inputs(5)
    with ops.pinned(gated_delta="recurrent"):
        assert ops.choose("gated_delta", CUDA, torch.bfloat16) == ("recurrent", "pinned")
        with ops.pinned(attend="reference"):
            ops.gated_delta(**given)
    assert calls == ["recurrent"]
    ops.gated_delta(**given)
    assert calls == ["recurrent"] and ops.choose("gated_delta", CPU, torch.float32).reason != "pinned"


@pytest.mark.parametrize("pins, named", [({"gated_delta": "fast"}, "'fast'"), ({"attention": "fla"}, "'attention'")])
def test_an_unknown_pin_is_refused_by_name(pins, named):
    with pytest.raises(ValueError, match=named), ops.pinned(**pins):
        pass


def test_nothing_is_tried_in_its_place_when_an_implementation_fails():
    """FLA pinned on the CPU: an error, never the reference in silence."""
    with pytest.raises((ImportError, RuntimeError, AssertionError, ValueError)), ops.pinned(gated_delta="fla"):
        ops.gated_delta(**mixer_inputs(5, segment=torch.zeros(B, 5, dtype=torch.int64)))


# -- products and norms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated, normed, biased, summed", list(itertools.product([False, True], repeat=4)))
def test_a_linear_is_norm_product_gate_and_sum(gated, normed, biased, summed):
    x, weight, bias, scale = torch.randn(2, 3, 8), torch.randn(10, 8), torch.randn(10), torch.rand(8)
    onto = torch.randn(2, 3, 5 if gated else 10)
    got = ops.linear(
        x=x,
        weight=weight,
        bias=bias if biased else None,
        norm=(scale, 1e-6) if normed else None,
        gated=gated,
        onto=onto if summed else None,
    )
    y = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * scale if normed else x
    y = y @ weight.mT + (bias if biased else 0)
    y = y[..., :5] * y[..., :5].sigmoid() * y[..., 5:] if gated else y
    torch.testing.assert_close(got, y + onto if summed else y)


def test_small_delta_heads_are_left_to_the_reference(monkeypatch):
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: object())
    assert ops.choose("gated_delta", CUDA, torch.bfloat16, channels=31).name == "reference"
    assert ops.choose("gated_delta", CUDA, torch.bfloat16, channels=32).name == "triton"
    assert ops.choose("gated_delta", CUDA, torch.bfloat16, gradient=True, channels=31).name == "reference"
