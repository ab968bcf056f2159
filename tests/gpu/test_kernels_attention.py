"""The window-attention kernels equal the reference: rotated, attended in float64, then written into the ring.

Without a GPU they run in triton's interpreter, on shapes small enough for it.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before the import below
pytest.importorskip("triton")

from infinitevl import memory  # noqa: E402
from infinitevl.ops import reference  # noqa: E402
from infinitevl.ops.reference import rotate  # noqa: E402
from infinitevl.ops.triton import attention  # noqa: E402
from infinitevl.rope import Angles  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"


class Shape(NamedTuple):
    heads: int = 2
    groups: int = 1
    size: int = 16
    window: int | None = 32
    sinks: int = 0
    capacity: int | None = None
    dtype: torch.dtype = torch.float32

    @property
    def slots(self) -> int:
        return self.capacity or (self.window or 0) + self.sinks


FULL = Shape(heads=16, groups=2, size=128, window=8192, dtype=torch.bfloat16)  # the published model


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Whatever the launchers allocate is NaN until a kernel writes it."""
    empty = torch.empty
    monkeypatch.setattr(attention.torch, "empty", lambda *size, **how: empty(*size, **how).fill_(torch.nan))


@pytest.fixture(autouse=True)
def mended_interpreter(monkeypatch):
    """Products of bfloat16 in triton 3.6's interpreter multiply the bits that stand for them."""
    if CUDA:
        return
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot

    def wide(x):
        if x.dtype != interpreter.tl.bfloat16:
            return x
        bits = x.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), interpreter.tl.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)
    )


class Row(NamedTuple):
    """The state of a stream of chunks, twice: what the kernels see and, in float64, what the reference sees.

    Slots that nothing was written to are NaN for the kernels: they must never be read.
    """

    ring: Tensor
    right: Tensor
    held: Tensor
    seen: Tensor


def begun(shape: Shape, rows: int) -> Row:
    size = (2, rows, shape.slots, shape.groups, shape.size)
    ring = torch.full(size, torch.nan, dtype=shape.dtype, device=DEVICE)
    held = torch.full((rows, shape.slots), -1, dtype=torch.int64, device=DEVICE)
    zeros = torch.zeros(size, dtype=torch.float64, device=DEVICE)
    return Row(ring, zeros, held, torch.zeros(rows, dtype=torch.int64, device=DEVICE))


def projections(shape: Shape, rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views of one joint projection with other channels beside them."""
    width = (shape.heads + 2 * shape.groups) * shape.size
    joint = torch.randn(rows, length, width + 24, dtype=torch.float32, device=DEVICE).to(shape.dtype)
    parts = [shape.heads * shape.size, shape.groups * shape.size, shape.groups * shape.size, 24]
    return tuple(part.unflatten(-1, (-1, shape.size)) for part in joint.split(parts, dim=-1)[:3])


def turns(shape: Shape, rows: int, length: int) -> Angles:
    """Angles that the rows share, as an expanded view."""
    phase = torch.randn(1, length, shape.size // 2, device=DEVICE) * 3
    phase = torch.cat([phase, phase], dim=-1).expand(rows, -1, -1)
    return Angles(phase.cos()[:1].expand(rows, -1, -1), phase.sin()[:1].expand(rows, -1, -1))


def step(shape: Shape, row: Row, length: int, present: Tensor | None = None, loud: float = 1.0, **how) -> Row:
    """One chunk through kernels and reference; asserts that outputs and rings agree. loud: a factor of the scores."""
    rows = len(row.seen)
    q, k, v = projections(shape, rows, length)
    q *= loud
    angles = turns(shape, rows, length)
    there = torch.ones(rows, length, dtype=torch.bool, device=DEVICE) if present is None else present.to(DEVICE)
    index = torch.where(there, row.seen[:, None] + there.long().cumsum(1) - 1, -1)
    target = memory.target_slots(index, row.held, shape.sinks)
    turned = torch.stack([rotate(x=k, **angles._asdict()), v]).double()
    right = reference.attend(
        q=rotate(x=q, **angles._asdict()).double(),
        k=torch.cat([row.right[0], turned[0]], dim=1),
        v=torch.cat([row.right[1], turned[1]], dim=1),
        q_index=index,
        k_index=torch.cat([row.held, index], dim=1),
        window=shape.window,
        sinks=shape.sinks,
        q_segment=None,
        k_segment=None,
    )
    ring = row.ring.clone()
    out = attention.attend_ring(
        q=q,
        k=k,
        v=v,
        cos=angles.cos,
        sin=angles.sin,
        index=index,
        seen=row.seen,
        ring_k=ring[0],
        ring_v=ring[1],
        target=target,
        window=shape.window,
        sinks=shape.sinks,
        plan=plan(shape, q, how),
    )
    held = memory.write(row.held, target, index)
    new = Row(
        ring, torch.stack([memory.write(*x) for x in zip(row.right, [target] * 2, turned, strict=True)]), held, row.seen
    )
    assert_close(out[there], right[there], shape.dtype, loud)
    assert out.isfinite().all() and out.is_contiguous() and out.dtype == q.dtype
    filled = held >= 0
    assert_close(ring[:, filled], new.right[:, filled], shape.dtype)
    assert ring[:, ~filled].isnan().all()
    return new._replace(seen=row.seen + there.sum(1))


def plan(shape: Shape, q: Tensor, how: dict) -> attention.Plan:
    """The plan for these shapes, changed by `how`; small blocks in the interpreter, so that there are several."""
    chosen = attention.plan_of(q, shape.groups, shape.slots)
    if not CUDA:
        chosen = chosen._replace(rows=min(chosen.rows, 64), keys=16, splits=min(chosen.splits, 3))
    return chosen._replace(**how)


def assert_close(got: Tensor, right: Tensor, dtype: torch.dtype, loud: float = 1.0) -> None:
    """float32: sums of a few hundred terms. Others: weights and results of up to 4 are rounded (interpreter: cut)."""
    bound = {torch.float32: 2e-5, torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11}[dtype]
    if dtype != torch.float32 and not CUDA:
        bound *= 2
    error = (got.double() - right).abs().max() if got.numel() else torch.zeros(())
    assert error <= bound * loud, f"off by {error:.2e}"


def fed(shape: Shape, lengths: list[int], rows: int = 1, **how) -> Row:
    row = begun(shape, rows)
    for length in lengths:
        row = step(shape, row, length, **how)
    return row


# -- every shape of memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits, turn_first", [(1, False), (3, True)])
@pytest.mark.parametrize("window, sinks", [(32, 0), (29, 0), (20, 5)])
def test_chunks_in_sequence(window, sinks, splits, turn_first):
    """An empty ring, one partly filled, full, wrapped; chunks shorter and longer than the window and the sinks."""
    fed(Shape(window=window, sinks=sinks), [3, 1, 20, 33, 1, 75, 2], splits=splits, turn_first=turn_first)


@pytest.mark.parametrize("length", [2, 16, 17, 32, 97] + CUDA * [1, 31, 33, 63, 64, 65, 127, 128, 129, 257])
def test_lengths(length):
    fed(Shape(), [length, 40, length])


def test_steps_without_a_mask_pass_the_end_of_the_ring():
    """A window of five steps, begun in the middle of the ring."""
    fed(Shape(window=80), [70, 45, 20, 1])


@pytest.mark.parametrize("splits", [1, 4])
def test_no_window(splits):
    fed(Shape(window=None, capacity=100), [1, 30, 1, 50, 18], splits=splits)


def test_sinks_still_to_come():
    """Sinks that arrive one chunk after another, and more sinks than window."""
    fed(Shape(window=9, sinks=21), [4, 1, 70, 1, 12])
    fed(Shape(window=9, sinks=21), [9, 30, 1])


def test_a_chunk_alone():
    """Without a memory: the chunk attends to itself."""
    for window, sinks in [(None, 0), (20, 0), (20, 3)]:
        shape = Shape(window=window, sinks=sinks)
        q, k, v = projections(shape, 2, 50)
        angles = turns(shape, 2, 50)
        index = torch.arange(50, device=DEVICE).expand(2, -1).contiguous()
        index[1, 30:] = -1
        right = reference.attend(
            q=rotate(x=q, **angles._asdict()).double(),
            k=rotate(x=k, **angles._asdict()).double(),
            v=v.double(),
            q_index=index,
            k_index=index,
            window=window,
            sinks=sinks,
            q_segment=None,
            k_segment=None,
        )
        none = dict.fromkeys(["seen", "ring_k", "ring_v", "target"])
        out = attention.attend_ring(
            q=q, k=k, v=v, cos=angles.cos, sin=angles.sin, index=index, **none, window=window, sinks=sinks
        )
        assert_close(out[index >= 0], right[index >= 0], shape.dtype)
        assert out.isfinite().all()


# -- rows that differ, tokens that are not there -----------------------------------------------------------------------


@pytest.mark.parametrize("window, sinks, splits", [(32, 0, 1), (19, 4, 3)])
def test_rows_at_different_times(window, sinks, splits):
    """Padding on the right, a paused row, padding on the left, holes: each row is where its own tokens put it."""
    shape = Shape(window=window, sinks=sinks)
    row = begun(shape, 3)
    for length in [40, 1, 45]:
        at = torch.arange(length)
        right = at < torch.tensor([length, length // 2, 0])[:, None]
        left = at >= torch.tensor([length // 3, 0, length])[:, None]
        holes = torch.rand(3, length) > 0.4
        for present in (right, left, holes):
            row = step(shape, row, length, present, splits=splits)
    assert len(set(row.seen.tolist())) == 3


def test_a_paused_row_keeps_its_bits():
    shape = Shape()
    row = fed(shape, [50], rows=2)
    after = step(shape, row, 12, torch.tensor([[True], [False]]).expand(-1, 12))
    assert torch.equal(after.ring[:, 1], row.ring[:, 1]) and not torch.equal(after.ring[:, 0], row.ring[:, 0])


# -- types and plans ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    fed(Shape(dtype=dtype), [20, 1, 45])


@pytest.mark.parametrize("splits", [1, 3])
def test_scores_beyond_what_exp_can_hold(splits):
    """Scores of +-700; their rounding grows with them, and that of the output with it."""
    fed(Shape(), [1, 40, 1], rows=8, loud=200.0, splits=splits)


@pytest.mark.parametrize("heads, groups", [(2, 2), (6, 2), (8, 1)])
def test_heads(heads, groups):
    """Groups of 1, of 3 (no power of two) and of 8 heads."""
    fed(Shape(heads=heads, groups=groups), [20, 1, 30])


@pytest.mark.parametrize("rows, keys", [(16, 32), (32, 16), (64, 64)])
def test_any_plan_gives_the_same(rows, keys):
    row = begun(Shape(), 1)
    for length in [20, 40, 33, 1]:
        row = step(Shape(), row, length, rows=rows, keys=keys, splits=2)


def test_the_key_split_fills_whole_rounds():
    """A frame of one stream: 32 blocks of rows in 4 parts; of four: 128 programs as they are; a token: 2 in many."""
    frame = torch.zeros(1, 256, 16, 128, dtype=torch.bfloat16)
    splits = [attention.plan_of(q, 2, 8192).splits for q in (frame, frame.expand(4, -1, -1, -1), frame[:, :1])]
    assert splits[:2] == [4, 1] and 100 <= 2 * splits[2] <= attention.MULTIPROCESSORS


# -- full size ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("rows, lengths", [(1, [4096, 8192, 256, 256, 1, 17, 300, 1, 1025, 64]), (4, [8000, 256, 1])])
def test_the_published_model(rows, lengths):
    """Prefill into an empty ring and past the window, frames, questions and answers."""
    row = begun(FULL, rows)
    for length in lengths:
        row = step(FULL, row, length)


@pytest.mark.gpu
def test_the_published_model_without_a_window():
    """Only filled slots are read: the others are NaN."""
    fed(FULL._replace(window=None, capacity=1 << 18), [8192, 4096, 1, 100, 1])


@pytest.mark.gpu
def test_offsets_past_two_billion():
    """Rows of the ring that start beyond 2^31 elements."""
    shape = FULL._replace(window=None, capacity=1 << 20)
    ring = torch.zeros(2, 9, shape.slots, shape.groups, shape.size, dtype=shape.dtype, device=DEVICE)
    q, k, v = projections(shape, 9, 1)
    angles = turns(shape, 9, 1)
    ring[:, -1, :5].normal_()
    seen = torch.tensor([0] * 8 + [5], device=DEVICE)
    right = torch.cat([ring[1, -1:, :5], v[-1:]], dim=1).double()
    keys = torch.cat([ring[0, -1:, :5], rotate(x=k, **angles._asdict())[-1:]], dim=1).double()
    how = {"q_segment": None, "k_segment": None, "window": None, "sinks": 0}
    at = torch.arange(6, device=DEVICE)[None]
    turned = rotate(x=q, **angles._asdict())[-1:].double()
    right = reference.attend(q=turned, k=keys, v=right, q_index=at[:, -1:], k_index=at, **how)
    given = {"cos": angles.cos, "sin": angles.sin, "index": seen[:, None], "seen": seen, "target": seen[:, None]}
    out = attention.attend_ring(q=q, k=k, v=v, ring_k=ring[0], ring_v=ring[1], window=None, sinks=0, **given)
    assert_close(out[-1:], right, shape.dtype)
    assert torch.equal(ring[1, -1, 5], v[-1, 0])
