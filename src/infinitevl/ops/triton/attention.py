"""Window attention on CUDA: a chunk attends over ring ++ chunk, then its keys and values are written into the ring.

One kernel for every length of chunk. Its rows are (query, query head of a group), so that one token fills 8 of 16 rows
and 16 tokens fill 128: every key is loaded once for all heads that read it. Where rows are too few to fill the GPU,
keys are split between programs and a second launch adds the parts up; that launch also writes the ring. Two launches up
to 16 tokens; three for longer chunks, whose queries and keys are rotated by the first.

Which keys are visited follows from indices alone. A row that has seen n tokens holds, after the sinks, the last
slots - sinks of them, the token of index j in slot sinks + (j - sinks) % (slots - sinks); so no mask and no table of
held indices is read, and the bounds of every loop come from device memory: a replayed graph sees `seen` change.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from infinitevl.memory import Window
from infinitevl.ops.triton.launch import early
from infinitevl.ops.where import Where

MULTIPROCESSORS = 132  # of an H200; the key split aims at full waves of one program each
FEW = 16  # tokens up to which queries and keys are rotated where they are read, not by a launch of their own


class Plan(NamedTuple):
    """How a launch is cut: all of it speed, none of it result.

    rows: (query, head) pairs of a program. keys: keys of a step. splits: programs that share the keys of one block of
    rows. turn_first: rotate queries and keys in place, in a launch of their own.
    """

    rows: int
    keys: int
    splits: int
    warps: int
    stages: int
    turn_first: bool


def attend(
    *, q: Tensor, k: Tensor, v: Tensor, where: Where, state: Window | None, window: int | None, sinks: int
) -> tuple[Tensor, Window | None]:
    """The contract of `reference.attend_window`, forward only and without segments: the window is written in place."""
    assert where.segment is None and (state is None or where.seen is not None)
    out = attend_ring(
        q=q,
        k=k,
        v=v,
        cos=where.cos,
        sin=where.sin,
        index=where.index,
        seen=where.seen if state is not None else None,
        ring_k=state.keys if state is not None else None,
        ring_v=state.values if state is not None else None,
        target=where.target if state is not None else None,
        window=window,
        sinks=sinks,
    )
    return out, state


def attend_ring(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    seen: Tensor | None,
    ring_k: Tensor | None,
    ring_v: Tensor | None,
    target: Tensor | None,
    window: int | None,
    sinks: int,
    plan: Plan | None = None,
) -> Tensor:
    """A chunk rotates, attends over ring ++ chunk, and is then written into the ring, in place.

    q [B, T, H, hd]; k, v [B, T, G, hd]: not rotated yet, last dim contiguous; q and k may be overwritten.
    cos, sin float32 [B, T, hd] (rows may be expanded). index int64 [B, T]: seen + 0, 1, 2, ... over the tokens that
    are there, -1 for one that is not (its output is finite and means nothing). seen int64 [B]: tokens before this
    chunk. ring_k, ring_v [B, slots, G, hd] contiguous, as `memory.write` leaves them; slots = window + sinks, or a
    capacity when window is None. target int64 [B, T]: `memory.target_slots`. seen, ring_k, ring_v and target are None
    together: the chunk attends to itself, its indices from 0. plan: for tuning; by default `plan_of` the shapes.
    -> [B, T, H, hd] contiguous, in q's dtype.
    """
    rows, length, heads, size = q.shape
    assert size == triton.next_power_of_2(size) and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert cos.stride(-1) == sin.stride(-1) == 1 and cos.stride() == sin.stride() and index.stride(-1) == 1
    slots = 0 if ring_k is None else ring_k.shape[1]
    assert window is None or ring_k is None or slots == window + sinks
    plan = plan or plan_of(q, k.shape[2], slots)
    if plan.turn_first:
        _turn(q, k, cos, sin)
    out = torch.empty(rows, length, heads, size, dtype=q.dtype, device=q.device)
    parts = _parts(out, plan.splits)
    _attend_parts(q, k, v, cos, sin, index, seen, ring_k, ring_v, parts, window, sinks, plan)
    if plan.splits > 1 or ring_k is not None:
        _finish(out, parts, k, v, cos, sin, target, ring_k, ring_v, plan)
    return out


def plan_of(q: Tensor, groups: int, slots: int) -> Plan:
    """The plan for queries [B, T, H, hd] over `groups` key heads and a ring of `slots`: a function of shapes only."""
    batch, length, heads, size = q.shape
    share = triton.next_power_of_2(heads // groups)
    wide = q.dtype.itemsize > 2  # float32 products run on the plain units: small blocks, no hurry
    rows = min(max(triton.next_power_of_2(length) * share, 16, share), max(32 if wide else 128, share))
    keys = 32 if wide else 64 if length <= 1024 else 128
    programs = batch * groups * triton.cdiv(length * share, rows)
    most = max(1, min(64, triton.cdiv(slots + length, keys)))
    return Plan(
        rows=rows,
        keys=keys,
        splits=_splits(programs, most),
        warps=8 if rows >= 128 else 4,
        stages=1 if wide else 3,
        turn_first=length > FEW,
    )


def _splits(programs: int, most: int) -> int:
    """Splits of the keys that cost least: rounds over all multiprocessors, and 1/48 of a round to add up a round."""

    def cost(splits: int) -> float:
        rounds = programs * splits / MULTIPROCESSORS
        return math.ceil(rounds) / splits + rounds / 48 * (splits > 1)

    return min(range(1, most + 1), key=cost)


class _Parts(NamedTuple):
    """What each split leaves, float32: outputs [S, B, T, H, hd] not yet divided, row maxima and sums [S, B, T, H]."""

    out: Tensor
    top: Tensor
    total: Tensor


def _parts(out: Tensor, splits: int) -> _Parts:
    if splits == 1:
        return _Parts(out, out, out)  # written at once; the other two are not touched
    part = torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)
    top, total = torch.empty(2, splits, *out.shape[:3], dtype=torch.float32, device=out.device)
    return _Parts(part, top, total)


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    batch, length, heads, size = q.shape
    tokens = 16
    _turn_kernel[(triton.cdiv(length, tokens), heads + k.shape[2], batch)](
        q,
        k,
        cos,
        sin,
        length,
        *q.stride()[:3],
        *k.stride()[:3],
        *cos.stride()[:2],
        HEADS=heads,
        HALF=size // 2,
        TOKENS=tokens,
        num_warps=2,
        **early(q),
    )


def _attend_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    seen: Tensor | None,
    ring_k: Tensor | None,
    ring_v: Tensor | None,
    parts: _Parts,
    window: int | None,
    sinks: int,
    plan: Plan,
) -> None:
    batch, length, heads, size = q.shape
    groups = k.shape[2]
    share = triton.next_power_of_2(heads // groups)
    slots = sinks + 1 if ring_k is None else ring_k.shape[1]
    grid = (triton.cdiv(length, plan.rows // share), plan.splits, batch * groups)
    _attend_kernel[grid](
        q,
        k,
        v,
        cos,
        sin,
        index,
        index if seen is None else seen,
        k if ring_k is None else ring_k,
        v if ring_v is None else ring_v,
        *parts,
        batch,
        length,
        slots,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *cos.stride()[:2],
        index.stride(0),
        scale=size**-0.5 * math.log2(math.e),
        HEADS=heads,
        GROUPS=groups,
        SHARE=share,
        SIZE=size,
        WINDOW=window,
        SINKS=sinks,
        RING=ring_k is not None,
        WRAP=window is not None and (slots - sinks) % plan.keys != 0,
        ROWS=plan.rows,
        KEYS=plan.keys,
        CHUNK_KEYS=plan.keys if plan.turn_first else FEW,
        SPLIT=plan.splits > 1,
        TURN=not plan.turn_first,
        STAGES=plan.stages,
        num_warps=plan.warps,
        num_stages=plan.stages,
        **early(q),
    )


def _finish(
    out: Tensor,
    parts: _Parts,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    target: Tensor | None,
    ring_k: Tensor | None,
    ring_v: Tensor | None,
    plan: Plan,
) -> None:
    batch, length, groups, size = k.shape
    sums = out.numel() // size if plan.splits > 1 else 0
    tokens = 1 if length <= 16 else 4 if length <= 512 else 16
    writes = 0 if ring_k is None else batch * groups * triton.cdiv(length, tokens)
    _finish_kernel[(sums + writes,)](
        out,
        *parts,
        k,
        v,
        cos,
        sin,
        k if target is None else target,
        k if ring_k is None else ring_k,
        v if ring_v is None else ring_v,
        plan.splits,
        sums,
        length,
        0 if ring_k is None else ring_k.shape[1],
        *k.stride()[:3],
        *v.stride()[:3],
        *cos.stride()[:2],
        GROUPS=groups,
        SIZE=size,
        PARTS=triton.next_power_of_2(plan.splits),
        TOKENS=tokens,
        RING=ring_k is not None,
        TURN=not plan.turn_first,
        num_warps=4 if plan.splits > 8 or tokens > 4 else 1,
        **early(k),
    )


# -- kernels: offsets within a tile are 32 bits, those of rows and blocks 64 -------------------------------------------


@triton.jit(do_not_specialize=["length"])
def _turn_kernel(
    q,
    k,
    cos,
    sin,
    length,
    q_row,
    q_token,
    q_head,
    k_row,
    k_token,
    k_head,
    c_row,
    c_token,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Queries and keys rotated in place. A thread reads both halves of what it writes: nothing is read once changed."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * TOKENS
    head = tl.program_id(1)
    at = tl.arange(0, TOKENS)[:, None]
    dim = tl.arange(0, HALF)[None, :]
    there = token + at < length
    if head < HEADS:
        x = q + row * q_row + (token + at) * q_token + head * q_head + dim
    else:
        x = k + row * k_row + (token + at) * k_token + (head - HEADS) * k_head + dim
    turn = row * c_row + (token + at) * c_token + dim
    first = tl.load(x, mask=there, other=0.0).to(tl.float32)
    second = tl.load(x + HALF, mask=there, other=0.0).to(tl.float32)
    cos += turn
    sin += turn
    left = first * tl.load(cos, mask=there, other=0.0) - second * tl.load(sin, mask=there, other=0.0)
    right = second * tl.load(cos + HALF, mask=there, other=0.0) + first * tl.load(sin + HALF, mask=there, other=0.0)
    tl.store(x, left.to(k.dtype.element_ty), mask=there)
    tl.store(x + HALF, right.to(k.dtype.element_ty), mask=there)


@triton.jit
def _tile(pointer, there):
    """A tile; 0 where it is not there. None: all is there."""
    if there is None:
        tile = tl.load(pointer)
    else:
        tile = tl.load(pointer, mask=there, other=0.0)
    return tile


@triton.jit
def _turned(base, at, cos, sin, turn, dim, there, SIZE: tl.constexpr):
    """The vectors [N, SIZE] at base + at [N, 1], rotated. Each element reads its partner half a vector away."""
    half: tl.constexpr = SIZE // 2
    own = _tile(base + at + dim, there)
    partner = _tile(base + at + (dim ^ half), there).to(tl.float32)
    partner = tl.where(dim < half, -partner, partner)
    c = _tile(cos + turn + dim, there)
    s = _tile(sin + turn + dim, there)
    return (own.to(tl.float32) * c + partner * s).to(own.dtype)


@triton.jit
def _fold(q, k, v, top, total, acc, scale, mask):
    """One step of the running softmax (base 2) over keys k, values v [N, SIZE]; a row that sees nothing keeps still."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    if mask is not None:
        score = tl.where(mask, score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1) * scale)
    weight = tl.math.exp2(score * scale - higher[:, None])
    fade = tl.math.exp2(top - higher)
    total = total * fade + tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return higher, total, acc


@triton.jit
def _ring_tile(ring, slot, ring_size, token, at, dim, there, WRAP: tl.constexpr):
    """Keys or values [N, SIZE] of the ring from `slot` on; `ring` points at the slot after the sinks."""
    if WRAP:
        tile = _tile(ring + ((slot + at) % ring_size) * token + dim, there)
    else:
        tile = _tile(ring + slot.to(tl.int64) * token + (at * token + dim), there)
    return tile


@triton.jit
def _chunk_tile(
    k, v, cos, sin, token, k_token, v_token, c_token, at, dim, there, SIZE: tl.constexpr, TURN: tl.constexpr
):
    """Keys, rotated, and values [N, SIZE] of the chunk from `token` on; `there` None where none is past the end."""
    k += token.to(tl.int64) * k_token
    v += token.to(tl.int64) * v_token
    if TURN:
        keys = _turned(k, at * k_token, cos, sin, (token + at) * c_token, dim, there, SIZE)
    else:
        keys = _tile(k + at * k_token + dim, there)
    return keys, _tile(v + at * v_token + dim, there)


@triton.jit
def _chunk_steps(
    index,
    n,
    oldest,
    newest,
    first_query,
    queries: tl.constexpr,
    length,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """First step of the chunk, first that every query sees whole, how many of these, how many others.

    Places in the chunk and indices agree, and steps are whole, only where no token before this block is missing.
    """
    end = tl.cdiv(tl.minimum(length, first_query + queries), KEYS)
    dense = tl.load(index + first_query) - n == first_query
    start = 0
    if WINDOW is not None:
        start = tl.maximum(oldest - WINDOW + 1, 0) // KEYS
        if SINKS > 0:
            start = tl.where(n < SINKS, 0, start)
    whole_end = tl.where(dense, first_query // KEYS, start)
    whole_start = start
    if WINDOW is not None:
        whole_start = tl.cdiv(tl.maximum(newest - WINDOW + 1, 0), KEYS)
        whole_start = tl.minimum(tl.maximum(whole_start, start), whole_end)
    whole = tl.where(newest < 0, 0, whole_end - whole_start)
    edge = tl.where(newest < 0, 0, end - start - (whole_end - whole_start))
    return start, whole_start, whole, edge


@triton.jit
def _ring_steps(n, oldest, newest, WINDOW: tl.constexpr, SINKS: tl.constexpr, KEYS: tl.constexpr):
    """The same of the ring, counted from the first token after the sinks: a step begins at a multiple of KEYS."""
    kept = tl.maximum(n - SINKS, 0)
    end = tl.cdiv(kept, KEYS)
    start = tl.zeros([], tl.int64)
    whole_start = tl.zeros([], tl.int64)
    if WINDOW is not None:
        start = tl.minimum(tl.maximum(n + oldest - WINDOW + 1 - SINKS, 0) // KEYS, end)
        whole_start = tl.cdiv(tl.maximum(n + newest - WINDOW + 1 - SINKS, 0), KEYS)
    whole = tl.maximum(kept // KEYS - whole_start, 0).to(tl.int32)
    whole_start = tl.where(whole == 0, end, whole_start)
    edge = (end - start).to(tl.int32) - whole
    return start, whole_start, tl.where(newest < 0, 0, whole), tl.where(newest < 0, 0, edge)


@triton.jit
def _share(first, last, before, count):
    """The steps of [before, before + count) that fall to this split's [first, last), counted from `before`."""
    return tl.minimum(tl.maximum(first - before, 0), count), tl.minimum(tl.maximum(last - before, 0), count)


@triton.jit(do_not_specialize=["batch", "length"])
def _attend_kernel(
    q,
    k,
    v,
    cos,
    sin,
    index,
    seen,
    ring_k,
    ring_v,
    out,
    tops,
    totals,
    batch,
    length,
    slots,
    q_row,
    q_token,
    q_head,
    k_row,
    k_token,
    k_head,
    v_row,
    v_token,
    v_head,
    c_row,
    c_token,
    index_row,
    scale,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARE: tl.constexpr,
    SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    RING: tl.constexpr,
    WRAP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK_KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    TURN: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """ROWS (query, head) pairs against one split of their keys.

    Steps are of five kinds, numbered one after another and shared evenly between splits: ring and chunk steps that
    every query sees whole (nearly all of them), then those that need a mask, then sinks. Indices are taken relative to
    `seen`: keys of the ring are negative, those of the chunk are not.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first: late queries of a chunk see most
    row = (tl.program_id(2) // GROUPS).to(tl.int64)
    group = tl.program_id(2) % GROUPS
    queries: tl.constexpr = ROWS // SHARE
    first_query = block * queries
    query = first_query + tl.arange(0, ROWS) // SHARE
    head = tl.arange(0, ROWS) % SHARE
    real = (query < length) & (head < HEADS // GROUPS)
    dim = tl.arange(0, SIZE)[None, :]

    n = tl.load(seen + row) if RING else tl.zeros([], tl.int64)
    index += row * index_row
    held = tl.load(index + query, mask=query < length, other=-1)
    place = tl.where(held < 0, -1, held - n).to(tl.int32)
    newest = tl.max(place, 0)
    oldest = tl.min(tl.where(place < 0, 0x7FFFFFFF, place), 0)
    cos += row * c_row
    sin += row * c_row
    q += row * q_row + group * (HEADS // GROUPS) * q_head
    tokens = query.to(tl.int64)[:, None]
    q_at = tokens * q_token + head[:, None] * q_head
    if TURN:
        q_tile = _turned(q, q_at, cos, sin, tokens * c_token, dim, real[:, None], SIZE)
    else:
        q_tile = tl.load(q + q_at + dim, mask=real[:, None], other=0.0)

    chunk_from, chunk_whole, whole_chunk, edge_chunk = _chunk_steps(
        index, n, oldest, newest, first_query, queries, length, WINDOW, SINKS, CHUNK_KEYS
    )
    whole_ring = 0
    edge_ring = 0
    sink_steps = 0
    if RING:
        ring_size = slots - SINKS
        ring_k += row * slots * GROUPS * SIZE + group * SIZE
        ring_v += row * slots * GROUPS * SIZE + group * SIZE
        ring_from, ring_whole, whole_ring, edge_ring = _ring_steps(n, oldest, newest, WINDOW, SINKS, KEYS)
        head_ring = (ring_whole - ring_from).to(tl.int32)
        whole_slot = ((ring_whole * KEYS) % ring_size).to(tl.int32)
        edge_slot = ((ring_from * KEYS) % ring_size).to(tl.int32)
        edge_place = (ring_from * KEYS + SINKS - n).to(tl.int32)
        if SINKS > 0:
            sink_steps = tl.where(newest < 0, 0, tl.cdiv(tl.minimum(n, SINKS), KEYS)).to(tl.int32)

    steps = whole_ring + whole_chunk + edge_ring + edge_chunk + sink_steps
    split = tl.program_id(1)
    first = steps * split // tl.num_programs(1)
    last = steps * (split + 1) // tl.num_programs(1)
    at = tl.arange(0, KEYS)
    chunk_at = tl.arange(0, CHUNK_KEYS)
    k += row * k_row + group * k_head
    v += row * v_row + group * v_head
    top = tl.full([ROWS], -1.0e30, tl.float32)  # finite: a row that sees nothing must not meet inf - inf
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, SIZE], tl.float32)
    stride: tl.constexpr = GROUPS * SIZE
    chunk_stages: tl.constexpr = 1 if TURN else STAGES

    if RING:
        after_k = ring_k + SINKS * stride
        after_v = ring_v + SINKS * stride
        begin, end = _share(first, last, 0, whole_ring)
        for step in tl.range(begin, end, num_stages=STAGES):
            slot = whole_slot + step * KEYS
            slot = tl.where(slot < ring_size, slot, slot - ring_size)
            keys = _ring_tile(after_k, slot, ring_size, stride, at[:, None], dim, None, WRAP)
            values = _ring_tile(after_v, slot, ring_size, stride, at[:, None], dim, None, WRAP)
            top, total, acc = _fold(q_tile, keys, values, top, total, acc, scale, None)
    begin, end = _share(first, last, whole_ring, whole_chunk)
    for step in tl.range(begin, end, num_stages=chunk_stages):
        token = (chunk_whole + step) * CHUNK_KEYS
        keys, values = _chunk_tile(
            k, v, cos, sin, token, k_token, v_token, c_token, chunk_at[:, None], dim, None, SIZE, TURN
        )
        top, total, acc = _fold(q_tile, keys, values, top, total, acc, scale, None)
    if RING:
        begin, end = _share(first, last, whole_ring + whole_chunk, edge_ring)
        for step in tl.range(begin, end, num_stages=STAGES):
            skip = tl.where(step < head_ring, step, step + whole_ring) * KEYS
            slot = (edge_slot + skip) % ring_size
            key_place = edge_place + skip + at
            there = (key_place < 0)[:, None]
            keys = _ring_tile(after_k, slot, ring_size, stride, at[:, None], dim, there, WRAP)
            values = _ring_tile(after_v, slot, ring_size, stride, at[:, None], dim, there, WRAP)
            mask = (key_place < 0)[None, :]
            if WINDOW is not None:
                mask = mask & (place[:, None] - key_place[None, :] < WINDOW)
            top, total, acc = _fold(q_tile, keys, values, top, total, acc, scale, mask)
    begin, end = _share(first, last, whole_ring + whole_chunk + edge_ring, edge_chunk)
    for step in tl.range(begin, end, num_stages=1):  # one or two steps: loads ahead of time cost registers
        block_at = chunk_from + step
        block_at = tl.where(block_at < chunk_whole, block_at, block_at + whole_chunk)
        token = block_at * CHUNK_KEYS
        there = token + chunk_at < length
        keys, values = _chunk_tile(
            k, v, cos, sin, token, k_token, v_token, c_token, chunk_at[:, None], dim, there[:, None], SIZE, TURN
        )
        key_index = tl.load(index + token + chunk_at, mask=there, other=-1)
        far = place[:, None] - (key_index - n).to(tl.int32)[None, :]
        mask = (key_index >= 0)[None, :] & (far >= 0)
        if WINDOW is not None:
            mask = mask & ((far < WINDOW) | (key_index < SINKS)[None, :])
        top, total, acc = _fold(q_tile, keys, values, top, total, acc, scale, mask)
    if RING and SINKS > 0:
        begin, end = _share(first, last, whole_ring + whole_chunk + edge_ring + edge_chunk, sink_steps)
        for step in tl.range(begin, end, num_stages=1):
            mask = step * KEYS + at < tl.minimum(n, SINKS)
            pointer = (step * KEYS + at)[:, None] * stride + dim
            keys = tl.load(ring_k + pointer, mask=mask[:, None], other=0.0)
            values = tl.load(ring_v + pointer, mask=mask[:, None], other=0.0)
            top, total, acc = _fold(q_tile, keys, values, top, total, acc, scale, mask[None, :])

    cell = (row * length + query) * HEADS + group * (HEADS // GROUPS) + head
    if SPLIT:
        cell += split.to(tl.int64) * batch * length * HEADS
        tl.store(tops + cell, top, mask=real)
        tl.store(totals + cell, total, mask=real)
    else:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + cell[:, None] * SIZE + dim, acc.to(out.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=["splits", "sums", "length"])
def _finish_kernel(
    out,
    parts,
    tops,
    totals,
    k,
    v,
    cos,
    sin,
    target,
    ring_k,
    ring_v,
    splits,
    sums,
    length,
    slots,
    k_row,
    k_token,
    k_head,
    v_row,
    v_token,
    v_head,
    c_row,
    c_token,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    RING: tl.constexpr,
    TURN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The first `sums` programs add up the parts of one (token, head) each; the others write tokens into the ring."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    dim = tl.arange(0, SIZE)[None, :]
    if PARTS > 1:
        if program < sums:
            split = tl.arange(0, PARTS).to(tl.int64)
            there = split < splits
            cell = split * sums + program
            top = tl.load(tops + cell, mask=there, other=-1.0e30)
            weight = tl.math.exp2(top - tl.max(top, 0))
            total = tl.sum(weight * tl.load(totals + cell, mask=there, other=0.0), 0)
            part = tl.load(parts + cell[:, None] * SIZE + dim, mask=there[:, None], other=0.0)
            mean = tl.sum(part * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
            tl.store(out + program.to(tl.int64) * SIZE + tl.arange(0, SIZE), mean.to(out.dtype.element_ty))
    if RING:
        if program >= sums:
            blocks = tl.cdiv(length, TOKENS)
            block = (program - sums) % blocks
            group = (program - sums) // blocks % GROUPS
            row = ((program - sums) // blocks // GROUPS).to(tl.int64)
            token = block.to(tl.int64) * TOKENS
            at = tl.arange(0, TOKENS)
            slot = tl.load(target + row * length + token + at, mask=token + at < length, other=slots)
            there = (slot < slots)[:, None]
            keys, values = _chunk_tile(
                k + row * k_row + group * k_head,
                v + row * v_row + group * v_head,
                cos + row * c_row,
                sin + row * c_row,
                token,
                k_token,
                v_token,
                c_token,
                at[:, None],
                dim,
                there,
                SIZE,
                TURN,
            )
            to = ((row * slots + slot) * GROUPS + group)[:, None] * SIZE + dim
            tl.store(ring_k + to, keys, mask=there)
            tl.store(ring_v + to, values, mask=there)
