"""The kernels that say where a chunk stands against the reference; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from infinitevl import rope  # noqa: E402
from infinitevl.config import tiny  # noqa: E402
from infinitevl.ops import reference  # noqa: E402
from infinitevl.ops.triton import place as kernels  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")


@pytest.mark.parametrize("length", [1, 7, 20])
@pytest.mark.parametrize("sections", [(8, 12, 12), (2, 3, 3)])
def test_angles(length, sections):
    config = replace(tiny(64).text, mrope_sections=sections, head_dim=2 * sum(sections))
    positions = torch.randint(0, 10_000_000, (3, 2, length), device=DEVICE)
    positions = positions.transpose(1, 2).contiguous().transpose(1, 2)  # strides of their own
    frequency = rope._frequency(config.rope_theta, config.head_dim // 2, DEVICE)
    given = {"positions": positions, "frequency": frequency, "sections": sections}
    for got, right in zip(kernels.angles(**given), reference.angles(**given), strict=True):
        assert got.shape == (2, length, config.head_dim) and (got - right).abs().max() <= 1e-6


@pytest.mark.parametrize("length", [1, 3, 10, 40, 2100])
@pytest.mark.parametrize("slots, sinks", [(10, 0), (13, 3), (1500, 0)])
@pytest.mark.parametrize("short", [False, True])
def test_a_chunk_finds_its_place(length, slots, sinks, short):
    """Rows that have seen nothing, part of a window, one less than a window, and several windows; short: of which some
    tokens are there, or none."""
    seen = torch.tensor([0, slots // 2, slots - 1, 5 * slots + 3], device=DEVICE)
    held = torch.full((4, slots), -1, device=DEVICE)
    for row, count in enumerate(seen.tolist()):
        before = torch.arange(count, device=DEVICE)[None]
        target = reference.memory.target_slots(before, held[row : row + 1], sinks) if count else before
        held[row] = reference.memory.write(held[row : row + 1], target, before)[0]
    positions = torch.randint(0, 50, (3, 4, length), device=DEVICE)
    given = {"positions": positions, "seen": seen, "held": held, "sinks": sinks}
    given["clock"] = torch.tensor([0, 10, 49, 100], device=DEVICE)
    given["count"] = torch.tensor([0, length // 2, length, 0], device=DEVICE) if short else None
    for name, got, right in zip(
        reference.Placed._fields, kernels.place(**given), reference.place(**given), strict=True
    ):
        assert torch.equal(got, right), name
