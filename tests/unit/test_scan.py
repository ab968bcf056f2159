"""The delta rule that trains on CUDA, on the CPU: its ops keep torch's rules, halves stay at their rounding, and blocks
compile. That it is the delta rule, tests/unit/test_ops.py says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from infinitevl import ops
from infinitevl.config import DELTA, SOFTMAX, tiny
from infinitevl.memory import Delta
from infinitevl.model import Model
from infinitevl.ops import reference, scan
from infinitevl.ops.where import DeltaWeights, Projected, Where
from infinitevl.train import grad_check
from infinitevl.train.begin import compile_blocks
from infinitevl.train.forward import through

B, H, N, C, K, V = 2, 2, 3, 8, 4, 6
CPU = torch.device("cpu")
CONV = ("x", "weight", "tail", "segment")


def walked(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """W, U, k_end, kept and a first state."""
    shapes = [(B, H, N, C, K), (B, H, N, C, V), (B, H, N, C, K), (B, H, N), (B, H, K, V)]
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def system(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, H, N, C, C, dtype=dtype).tril(-1).requires_grad_()


def test_the_ops_keep_what_autograd_and_the_compiler_rely_on():
    torch.library.opcheck(scan.scan, tuple(walked(torch.float32)))
    torch.library.opcheck(scan.inverse, (system(torch.float32), torch.float32))
    W, _, k_end, kept, state = (x.detach() for x in walked(torch.float32))
    before = torch.randn(B, H, N, K, V)
    torch.library.opcheck(scan.scan_backward, (W, k_end, kept, torch.randn(B, H, N, C, V), before, state))
    x, weight, tail = (torch.randn(*shape) for shape in ((B, 5, 7), (7, 4), (B, 3, 7)))
    for segment in (None, torch.zeros(B, 5, dtype=torch.int64)):
        leaves = [each.clone().requires_grad_() for each in (x, weight, tail)]
        torch.library.opcheck(scan.conv, (*leaves, segment))
        torch.library.opcheck(scan.conv_backward, (x, x, weight, tail, segment))


def test_gradients_of_the_walk_are_those_of_differences():
    assert torch.autograd.gradcheck(scan.scan, walked())


def test_the_gradient_of_the_inverse_is_that_of_differences():
    assert torch.autograd.gradcheck(lambda A: scan.inverse(A.tril(-1), A.dtype), system())


def segments(*lengths: int) -> Tensor:
    """The same in both rows."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(B, -1)


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("lengths", [None, (11,), (1, 2, 8), (1,) * 11])
@pytest.mark.parametrize("tokens", [1, 2, 3, 11])
def test_the_convolution_and_its_gradients_are_the_references(tokens, lengths, taps):
    segment = None if lengths is None else segments(*lengths)[:, :tokens]
    inputs = [torch.randn(*shape) for shape in ((B, tokens, 7), (7, taps), (B, taps - 1, 7))]
    found = []
    for run in (
        scan.conv,
        lambda *given: reference.causal_conv(**dict(zip(CONV, given, strict=True)), present=None)[0],
    ):
        leaves = [each.clone().requires_grad_() for each in inputs]
        y = run(*leaves, segment)
        slope = torch.linspace(-1, 1, y.numel()).view_as(y)
        found.append([y, *torch.autograd.grad((y * slope).sum(), leaves, materialize_grads=True)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def mixer(tokens: int) -> tuple[Projected, DeltaWeights, Delta]:
    """What a delta mixer hands to its op: a state and a tail that were lived in."""
    projected = Projected(*(torch.randn(B, tokens, H * size, requires_grad=True) for size in (32, 32, 64, 64, 1, 1)))
    shapes = [(H * 32, 4), (H * 32, 4), (H * 64, 4), (H,), (H,), (64,)]
    weights = DeltaWeights(*(torch.randn(*shape, requires_grad=True) for shape in shapes), 1e-6)
    return projected, weights, Delta(torch.randn(B, 3, H * 128, requires_grad=True), torch.randn(B, H, 32, 64))


@pytest.mark.parametrize("kind", ["whole", "segments", "missing"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 70])
def test_a_mixer_is_the_references(tokens, kind):
    projected, weights, state = mixer(tokens)
    index = torch.arange(tokens).expand(B, -1)
    where = Where(index, index, index)
    if kind == "segments":
        where = where._replace(segment=index * 3 // tokens)
    if kind == "missing":
        where = where._replace(present=index % 3 != 1)
    leaves, found = [*projected, *weights[:-1], state.tail], []
    for name in ("scan", "reference"):
        with ops.pinned(gated_delta=name):
            out, after = ops.gated_delta(projected=projected, weights=weights, where=where, state=state)
        slope = torch.linspace(-1, 1, out.numel()).view_as(out)
        loss = (out * slope).sum() + after.state.sum() + after.tail.square().sum()
        found.append([out, *after, *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*found, strict=True):
        scale = float(theirs.detach().abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * max(scale, 1e-3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_stay_at_their_rounding(dtype):
    """Operands of some five products in a row are rounded, each by half of `eps`: a lost term is far more."""
    inputs, weight = grad_check._case(CPU, 130, 2, 32, 64, dtype)
    segment = (torch.arange(130) >= 50)[None].long()
    given = dict(zip(grad_check.INPUTS, inputs, strict=True))
    o, state = scan.delta_rule(**given, segment=segment)
    assert o.dtype == dtype and state.dtype == torch.float32
    wide = {name: x.double() for name, x in given.items()}
    right = reference.delta_rule_recurrent(**wide, segment=segment)
    for ours, theirs in zip((o, state), right, strict=True):
        assert (ours - theirs).abs().max() < 2 * torch.finfo(dtype).eps * theirs.abs().max()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 63, 65, 130])
def test_gradients_are_those_of_the_recurrence(tokens, dtype, packed):
    with ops.pinned(gated_delta="scan"):
        found = grad_check.errors(CPU, tokens, 2, 64, 128, dtype, packed)
    assert max(found.values()) < grad_check.LIMITS[dtype] / 2, found


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks compile by all of torch.compile but its last step, a C++ compiler that takes a minute. None is left over:
    a compiled block keeps its pins."""
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compiled(self, backend="aot_eager", **how))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model: Model, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Of all parameters of the blocks, recomputed in the backward, for a row of packed segments."""
    random, total = torch.Generator().manual_seed(1), sum(lengths)
    hidden, weight = torch.randn(2, 1, total, model.config.text.hidden_size, generator=random)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    where = model._where(torch.arange(total).expand(3, 1, -1), None, None, segment)[0]
    model.zero_grad()
    (through(model, hidden, where, checkpointing=True) * weight).sum().backward()
    return {name: p.grad.clone() for name, p in model.blocks.named_parameters() if p.grad is not None}


def test_compiled_blocks_have_the_same_gradients(traced):
    """With checkpointing, and what follows in a run: another packing of the same length, without compiling again."""
    torch.manual_seed(0)
    model = Model(tiny())
    model.blocks = nn.ModuleList(list(model.blocks)[:3])
    assert model.config.text.layers[:3] == (SOFTMAX, DELTA, DELTA)
    packings = ((30, 70), (1, 40, 59))
    with ops.pinned(gated_delta="reference"):
        right = [gradients(model, lengths) for lengths in packings]
    compile_blocks(model)
    counters.clear()
    with ops.pinned(gated_delta="scan"):
        got = [gradients(model, lengths) for lengths in packings]
    # a softmax block that meets what asks no gradient, and a delta block that meets what does
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    for ours, theirs in zip(got, right, strict=True):
        assert ours.keys() == theirs.keys() and len(ours) > 40
        for name, grad in ours.items():
            error, scale = float((grad - theirs[name]).abs().max()), float(theirs[name].abs().max())
            assert error < 1e-3 * scale, name
