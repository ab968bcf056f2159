"""The vision encoder: windows by a layout equal windows taken one by one, frames do not meet, shapes are static."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infinitevl.config import VisionConfig
from infinitevl.layers import RMSNorm
from infinitevl.vision import Vision, VisionBlock, layout

CONFIG = VisionConfig(
    depth=3, hidden_size=32, intermediate_size=24, num_heads=2, out_hidden_size=20, full_attention_blocks=(1,)
)
GRIDS = [(8, 8), (2, 2), (4, 12), (10, 6), (16, 8), (18, 22), (2, 30)]


@pytest.fixture(scope="module")
def vision() -> Vision:
    torch.manual_seed(0)
    vision = Vision(CONFIG)
    with torch.no_grad():
        for parameter in vision.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return vision.eval()


# -- the same, patch by patch -----------------------------------------------------------------------------------------


def places(rows: int, columns: int) -> list[tuple[int, int]]:
    """Row and column of every patch in merge order: 2x2 groups, row by row."""
    return [
        (2 * top + row, 2 * left + column)
        for top in range(rows // 2)
        for left in range(columns // 2)
        for row in range(2)
        for column in range(2)
    ]


def rms(norm: RMSNorm, x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def turned(x: Tensor, place: tuple[int, int]) -> Tensor:
    """One head's vector [hd] of one patch, as complex numbers turned by row and then by column."""
    half = len(x) // 2
    quarter = half // 2
    frequencies = [10000.0 ** (-i / quarter) for i in range(quarter)]
    phase = torch.tensor([axis * frequency for axis in place for frequency in frequencies])
    pairs = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half), phase)
    return torch.cat([pairs.real, pairs.imag])


def attended(block: VisionBlock, x: Tensor, where: list[tuple[int, int]], group: list[int]) -> Tensor:
    """Attention of the patches of one group among themselves: [len(group), D]."""
    q, k, v = block.attention.qkv(x[group]).view(len(group), 3, CONFIG.num_heads, -1).unbind(1)
    heads = []
    for head in range(CONFIG.num_heads):
        turned_q, turned_k = (
            torch.stack([turned(part[i, head], where[patch]) for i, patch in enumerate(group)]) for part in (q, k)
        )
        scores = turned_q @ turned_k.T / math.sqrt(turned_q.shape[1])
        heads.append(scores.softmax(-1) @ v[:, head])
    return block.attention.proj(torch.cat(heads, dim=-1))


def naive(vision: Vision, patches: Tensor, rows: int, columns: int) -> Tensor:
    """One frame [P, 1176], kept in merge order all the way; windows of 8x8 patches from the top left."""
    where = places(rows, columns)
    x = patches @ vision.embed.weight.T
    for number, block in enumerate(vision.blocks):
        groups: dict[tuple[int, int], list[int]] = {}
        for patch, (row, column) in enumerate(where):
            groups.setdefault((0, 0) if number == 1 else (row // 8, column // 8), []).append(patch)
        mixed = torch.zeros_like(x)
        for group in groups.values():
            mixed[group] = attended(block, rms(block.norm1, x), where, group)
        x = x + mixed
        inner = rms(block.norm2, x)
        x = x + block.mlp.down(F.silu(block.mlp.gate(inner)) * block.mlp.up(inner))
    grouped = rms(vision.merger.norm, x).reshape(len(where) // 4, -1)
    wide = vision.merger.up(grouped)
    return vision.merger.down(wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2))))


@pytest.mark.parametrize("rows, columns", GRIDS)
@torch.no_grad()
def test_windows_equal_windows_taken_one_by_one(vision, rows, columns):
    patches = torch.randn(rows * columns, CONFIG.patch_dim)
    got = vision(patches[None], rows, columns)[0]
    right = naive(vision, patches, rows, columns)
    assert got.shape == (rows * columns // 4, 20)
    torch.testing.assert_close(got, right, atol=5e-6 * float(right.abs().max()), rtol=0)


# -- frames, shapes, modes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, columns", [(8, 8), (10, 6)])
@torch.no_grad()
def test_frames_do_not_meet(vision, rows, columns):
    patches = torch.randn(3, rows * columns, CONFIG.patch_dim)
    together = vision(patches, rows, columns)
    for frame in range(3):
        torch.testing.assert_close(together[frame], vision(patches[frame : frame + 1], rows, columns)[0])
    other = patches.clone()
    other[1] = torch.randn_like(other[1])
    assert torch.equal(vision(other, rows, columns)[[0, 2]], together[[0, 2]])


@torch.no_grad()
def test_a_window_is_blind_to_the_next_one_until_a_full_block():
    torch.manual_seed(1)
    config = VisionConfig(
        depth=2, hidden_size=32, intermediate_size=24, num_heads=2, out_hidden_size=20, full_attention_blocks=()
    )
    vision = Vision(config)
    patches = torch.randn(1, 8 * 12, config.patch_dim)
    before = vision(patches, 8, 12)
    last = [number for number, (_, column) in enumerate(places(8, 12)) if column >= 8]
    patches[:, last] = 0
    after = vision(patches, 8, 12)
    touched = sorted({patch // 4 for patch in last})
    untouched = [token for token in range(24) if token not in touched]
    assert torch.equal(after[:, untouched], before[:, untouched])
    assert not torch.allclose(after[:, touched], before[:, touched])


@pytest.mark.parametrize("rows, columns", GRIDS)
def test_the_layout_is_an_order_and_its_inverse(rows, columns):
    where = layout(rows, columns, CONFIG, torch.device("cpu"))
    assert sorted(where.order.tolist()) == list(range(rows * columns))
    assert torch.equal(where.order.view(-1, 4)[where.back, 0] // 4, torch.arange(rows * columns // 4))
    by_hand = [places(rows, columns)[patch] for patch in where.order.tolist()]
    windows = [(row // 8, column // 8) for row, column in by_hand]
    assert windows == sorted(windows), "windows stand one after the other, in rows from the top left"


@pytest.mark.parametrize("count, rows, columns", [(64, 4, 8), (16, 4, 8), (15, 3, 5), (12, 3, 4), (12, 4, 3)])
def test_a_grid_that_is_not_the_patches_is_refused(vision, count, rows, columns):
    with pytest.raises(ValueError, match=f"{count} patches are no grid of {rows} x {columns}"):
        vision(torch.randn(1, count, CONFIG.patch_dim), rows, columns)


def test_a_layout_first_made_in_inference_can_be_trained_with(vision):
    layout.cache_clear()
    patches = torch.randn(1, 10 * 6, CONFIG.patch_dim)
    with torch.inference_mode():
        vision(patches, 10, 6)
    vision(patches, 10, 6).sum().backward()
    assert all(parameter.grad is not None for parameter in vision.parameters())


@pytest.mark.parametrize("warm", [False, True])
@torch.no_grad()
def test_the_encoder_can_be_recorded(vision, warm):
    """Every size is known from the grid: nothing is read back from a tensor, whether the layout is new or not."""
    from torch.fx.experimental.proxy_tensor import make_fx

    layout.cache_clear()
    patches = torch.randn(2, 10 * 6, CONFIG.patch_dim)
    right = vision(patches, 10, 6)
    if not warm:
        layout.cache_clear()
    recorded = make_fx(lambda given: vision(given, 10, 6))(torch.zeros_like(patches))
    torch.testing.assert_close(recorded(patches), right)
    torch.testing.assert_close(vision(patches, 10, 6), right)


@torch.no_grad()
def test_bfloat16_stays_near(vision):
    patches = torch.randn(1, 10 * 6, CONFIG.patch_dim)
    right = vision(patches, 10, 6)
    low = Vision(CONFIG)
    low.load_state_dict(vision.state_dict())
    low = low.bfloat16()(patches, 10, 6)
    assert low.dtype == torch.bfloat16
    assert (low.float() - right).abs().mean() < 0.05 * right.abs().mean()
