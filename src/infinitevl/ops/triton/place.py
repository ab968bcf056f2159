"""Where the tokens of a chunk stand, in two small launches: their angles, and their indices, slots and the new ring."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from infinitevl.ops.triton.launch import early
from infinitevl.ops.where import Placed

SLOTS = 1024  # slots and tokens of a program


def angles(*, positions: Tensor, frequency: Tensor, sections: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """See `reference.angles`."""
    _, rows, length = positions.shape
    half = len(frequency)
    cos = torch.empty(rows, length, 2 * half, dtype=torch.float32, device=positions.device)
    sin = torch.empty_like(cos)
    tokens = 8
    _angles[(triton.cdiv(length, tokens), rows)](
        positions,
        frequency,
        cos,
        sin,
        *positions.stride(),
        length,
        TIME=sections[0],
        HEIGHT=sections[1],
        HALF=half,
        PADDED=triton.next_power_of_2(half),
        TOKENS=tokens,
        num_warps=4,
        **early(positions),
    )
    return cos, sin


@triton.jit
def _angles(
    positions,
    frequency,
    cos,
    sin,
    axis_step,
    row_step,
    token_step,
    length,
    TIME: tl.constexpr,
    HEIGHT: tl.constexpr,
    HALF: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """TOKENS tokens of a row. The phase is float64, and so are its cosine and sine."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    at = tl.arange(0, PADDED)
    axis = tl.where(at < TIME, 0, tl.where(at < TIME + HEIGHT, 1, 2))
    there = (token < length)[:, None] & (at < HALF)[None]
    here = positions + row * row_step + token.to(tl.int64)[:, None] * token_step + axis.to(tl.int64)[None] * axis_step
    position = tl.load(here, mask=there, other=0).to(tl.float64)
    phase = position * tl.load(frequency + at, mask=at < HALF, other=0.0)[None]
    c, s = tl.cos(phase).to(tl.float32), tl.sin(phase).to(tl.float32)
    to = (row * length + token)[:, None] * (2 * HALF) + at[None]
    tl.store(cos + to, c, mask=there)
    tl.store(cos + to + HALF, c, mask=there)
    tl.store(sin + to, s, mask=there)
    tl.store(sin + to + HALF, s, mask=there)


def place(*, positions: Tensor, seen: Tensor, clock: Tensor, held: Tensor, sinks: int, count: Tensor | None) -> Placed:
    """See `reference.place`."""
    _, rows, length = positions.shape
    slots = held.shape[1]
    index, target = (torch.empty(rows, length, dtype=torch.int64, device=held.device) for _ in range(2))
    placed = Placed(index, target, torch.empty_like(held), torch.empty_like(seen), torch.empty_like(clock))
    _place[(triton.cdiv(max(slots, length), SLOTS), rows)](
        positions,
        seen,
        clock,
        held,
        count,
        *placed,
        *positions.stride(),
        length,
        slots,
        sinks,
        BLOCK=SLOTS,
        num_warps=4,
        **early(held),
    )
    return placed


@triton.jit
def _place(
    positions,
    seen,
    clock,
    held,
    count,
    index,
    target,
    held_after,
    seen_after,
    clock_after,
    axis_step,
    row_step,
    token_step,
    length,
    slots,
    sinks,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """BLOCK tokens and BLOCK slots of a row. A slot knows by arithmetic which of the chunk's tokens, if any, it gets:
    nothing is scattered."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    program, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    before = tl.load(seen + row)
    there = length
    if count is not None:
        there = tl.load(count + row).to(tl.int32)
    last = before + there - 1
    ring = slots - sinks
    at = program * BLOCK + tl.arange(0, BLOCK)

    own = before + at
    slot = tl.where(own < sinks, own, sinks + (own - sinks) % ring)
    kept = (own < sinks) | (own > last - ring)
    tl.store(index + row * length + at, tl.where(at < there, own, -1), mask=at < length)
    tl.store(target + row * length + at, tl.where(kept & (at < there), slot, slots), mask=at < length)

    newest = last - (last - at) % ring  # the greatest index up to the last one that belongs to this slot
    newest = tl.where(at < sinks, at.to(tl.int64), newest)
    gets = (newest >= before) & (newest <= last) & ((at < sinks) | (newest >= sinks))
    old = tl.load(held + row * slots + at, mask=at < slots, other=-1)
    tl.store(held_after + row * slots + at, tl.where(gets, newest, old), mask=at < slots)

    if program == 0:
        most = tl.load(clock + row) - 1
        for begin in tl.range(0, there, BLOCK):
            token = begin + tl.arange(0, BLOCK)
            here = positions + row * row_step + token.to(tl.int64) * token_step
            for axis in tl.static_range(3):
                position = tl.load(here + axis * axis_step, mask=token < there, other=-1)
                most = tl.maximum(most, tl.max(position, 0))
        tl.store(clock_after + row, most + 1)
        tl.store(seen_after + row, last + 1)
