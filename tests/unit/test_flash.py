"""Attention of packed rows: its bookkeeping, with plain attention in place of the CUDA kernel (tests/gpu has that)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infinitevl import ops
from infinitevl.memory import Window
from infinitevl.model import _since_segment
from infinitevl.ops import flash, reference
from infinitevl.ops.where import Where

B, H, G, HD = 2, 4, 2, 8
PACKINGS = [((1, 9, 2), (12,)), ((5, 7), (4, 8)), ((3, 3, 3, 3), (11, 1))]


def segments(packing: tuple[tuple[int, ...], ...]) -> Tensor:
    rows = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in packing]
    return torch.stack(rows)


def where(segment: Tensor) -> Where:
    """As `Model._alone` has it, with random angles."""
    phase = torch.randn(*segment.shape, HD)
    index = _since_segment(torch.arange(segment.shape[1]).expand_as(segment), segment)
    return Where(phase.cos(), phase.sin(), index, segment=segment, bounds=flash.bounds(segment))


@pytest.mark.parametrize("packing", PACKINGS)
def test_bounds_are_where_segments_begin(packing):
    found = flash.bounds(segments(packing))
    lengths = torch.tensor([length for row in packing for length in row])
    assert found.dtype == torch.int32 and found.tolist() == [0, *lengths.cumsum(0).tolist()]


def test_a_row_begins_a_segment_even_where_the_number_stays():
    assert flash.bounds(torch.zeros(3, 4, dtype=torch.int64)).tolist() == [0, 4, 8, 12]


def plainly(q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, window_size_left, window_size_right):
    """What torch says of its kernel: sequences from bound to bound, each token sees `window_size_left` before it."""
    assert causal and window_size_right == 0 and not dropout and not debug and torch.equal(cum_q, cum_k)
    outputs = []
    for begin, end in zip(cum_q.tolist(), cum_k.tolist()[1:], strict=False):
        assert 0 < end - begin <= min(max_q, max_k)
        part = [x[begin:end].transpose(0, 1) for x in (q, k, v)]
        at = torch.arange(end - begin)
        back = at[:, None] - at
        mask = (back >= 0) & (back <= (end if window_size_left is None else window_size_left))
        outputs.append(F.scaled_dot_product_attention(*part, attn_mask=mask, enable_gqa=True).transpose(0, 1))
    return torch.cat(outputs), None, None, None, None


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("packing", PACKINGS)
def test_it_is_the_reference(monkeypatch, packing, window):
    monkeypatch.setattr(flash, "KERNEL", plainly)
    q, k, v = (torch.randn(B, 12, heads, HD, requires_grad=True) for heads in (H, G, G))
    how = {"where": where(segments(packing)), "state": None, "window": window, "sinks": 0}
    (got, none), (right, _) = flash.attend(q=q, k=k, v=v, **how), reference.attend_window(q=q, k=k, v=v, **how)
    assert none is None
    torch.testing.assert_close(got, right)
    weight = torch.randn_like(right)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (got, right))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "changed",
    [
        {"sinks": 1},
        {"state": Window(torch.zeros(B, 4, G, HD), torch.zeros(B, 4, G, HD))},
        {"where": where(segments(PACKINGS[0]))._replace(bounds=None)},
    ],
)
def test_what_it_is_not_for_is_refused(changed):
    q, k, v = (torch.randn(B, 12, heads, HD) for heads in (H, G, G))
    how = {"where": where(segments(PACKINGS[0])), "state": None, "window": 4, "sinks": 0} | changed
    with pytest.raises(ValueError, match="use the reference"), ops.pinned(attend="flash"):
        ops.attend(q=q, k=k, v=v, **how)
