"""The teacher preset at small size is transformers' own Qwen2.5-VL: same weights, logits within 5e-4 in float32.

One test of our `Model` against another's code covers vision tower, merger, embedding, mRoPE, MLP, norms, head and the
softmax mixer. Positions are ours (`position_ids`): transformers changed its rule after the checkpoints were trained.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from infinitevl import rope, weights
from infinitevl.config import SOFTMAX, ModelConfig, config_from_json, teacher_3b
from infinitevl.model import Model
from infinitevl.rope import Grid

transformers = pytest.importorskip("transformers")

TOLERANCE = 5e-4
CONFIG = ModelConfig(
    replace(
        teacher_3b().vision,
        depth=4,
        hidden_size=64,
        intermediate_size=96,
        num_heads=4,
        out_hidden_size=96,
        full_attention_blocks=(1, 3),
    ),
    replace(
        teacher_3b().text,
        layers=(SOFTMAX,) * 4,
        vocab_size=256,
        hidden_size=96,
        intermediate_size=160,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        mrope_sections=(2, 3, 3),
    ),
    image_token=250,
    video_token=251,
    vision_start_token=252,
    vision_end_token=253,
    stop_tokens=(254, 255),
)


def theirs(config: ModelConfig) -> torch.nn.Module:
    """transformers' model of the same shape, with weights that make every part of it matter."""
    text, vision = config.text, config.vision
    shape = transformers.Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=len(text.layers),
            num_attention_heads=text.num_heads,
            num_key_value_heads=text.num_kv_heads,
            rms_norm_eps=text.norm_eps,
            use_sliding_window=False,
            rope_parameters=dict(
                rope_theta=text.rope_theta, rope_type="default", mrope_section=list(text.mrope_sections)
            ),
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=254,
        ),
        vision_config=dict(
            depth=vision.depth,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_heads=vision.num_heads,
            out_hidden_size=vision.out_hidden_size,
            fullatt_block_indexes=list(vision.full_attention_blocks),
            tokens_per_second=vision.tokens_per_second,
        ),
        image_token_id=config.image_token,
        video_token_id=config.video_token,
        vision_start_token_id=config.vision_start_token,
        vision_end_token_id=config.vision_end_token,
        tie_word_embeddings=text.tied_head,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(shape).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3 if "embed_tokens" in name else parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def pair(request) -> tuple[Model, torch.nn.Module]:
    config = replace(CONFIG, text=replace(CONFIG.text, tied_head=request.param))
    reference = theirs(config)
    ours = Model(config).eval()
    weights.assign(ours, reference.state_dict(), "transformers")
    return ours, reference


def ids_of(*parts: int | tuple[int, int]) -> Tensor:
    """One prompt: a number is that many random words, (token, count) a picture between its marks."""
    row: list[int] = []
    for part in parts:
        if isinstance(part, int):
            row += torch.randint(2, 240, (part,)).tolist()
        else:
            row += [252, *[part[0]] * part[1], 253]
    return torch.tensor([row])


def patches_of(grids: list[Grid]) -> Tensor:
    return torch.randn(sum(grid.time * grid.rows * grid.columns for grid in grids), 1176)


def visual(model: Model, grids: list[Grid], patches: Tensor) -> Tensor:
    parts = patches.split([grid.time * grid.rows * grid.columns for grid in grids])
    tokens = [
        model.vision(part.view(grid.time, -1, part.shape[1]), grid.rows, grid.columns)
        for grid, part in zip(grids, parts, strict=True)
    ]
    return torch.cat([frames.flatten(0, 1) for frames in tokens])


def thw(grids: list[Grid]) -> Tensor:
    return torch.tensor([[grid.time, grid.rows, grid.columns] for grid in grids])


@torch.no_grad()
def assert_equal(
    pair: tuple[Model, torch.nn.Module],
    ids: Tensor,
    images: list[Grid] | None = None,
    videos: list[Grid] | None = None,
    present: Tensor | None = None,
) -> None:
    """Both models on the same prompt: logits within the tolerance wherever there is a token."""
    ours, reference = pair
    positions = rope.prompt(ids, images or [], videos or [], ours.config, present)
    given: dict[str, Tensor] = {}
    tokens = None
    if images:
        given |= {"pixel_values": patches_of(images), "image_grid_thw": thw(images)}
        tokens = visual(ours, images, given["pixel_values"])
    if videos:
        given |= {"pixel_values_videos": patches_of(videos), "video_grid_thw": thw(videos)}
        tokens = visual(ours, videos, given["pixel_values_videos"])
    mask = torch.ones_like(ids) if present is None else present.long()
    right = reference(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **given).logits
    got = ours.logits(ours(ours.embed(ids, tokens), positions, present=present)[0])
    there = mask.bool()
    assert 0.3 < right[there].std() < 30
    assert (got[there] - right[there]).abs().max() <= TOLERANCE


def test_text(pair):
    assert_equal(pair, ids_of(150))


def test_images_of_several_sizes(pair):
    grids = [Grid(1, 8, 12), Grid(1, 10, 6), Grid(1, 2, 2), Grid(1, 18, 10)]
    assert_equal(pair, ids_of(5, (250, 24), 3, (250, 15), (250, 1), (250, 45), 9), images=grids)


def test_videos(pair):
    grids = [Grid(4, 8, 8, 1.0), Grid(3, 6, 10, 0.5)]
    assert_equal(pair, ids_of(5, (251, 64), 3, (251, 45), 9), videos=grids)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(pair, side):
    """Three prompts of different lengths with their images: also what each has alone."""
    prompts = [ids_of(5, (250, 24), 30), ids_of(2, (250, 15), 4), ids_of(7)]
    grids = [Grid(1, 8, 12), Grid(1, 10, 6)]
    longest = max(ids.shape[1] for ids in prompts)
    batch, present = torch.zeros(3, longest, dtype=torch.int64), torch.zeros(3, longest, dtype=torch.bool)
    for row, ids in enumerate(prompts):
        start = longest - ids.shape[1] if side == "left" else 0
        batch[row, start : start + ids.shape[1]], present[row, start : start + ids.shape[1]] = ids[0], True
    assert_equal(pair, batch, images=grids, present=present)


@torch.no_grad()
def test_through_a_memory_of_enough_room(pair):
    ours, reference = pair
    ids = ids_of(90)
    positions = rope.prompt(ids, [], [], ours.config)
    right = reference(input_ids=ids, position_ids=positions, use_cache=False).logits
    memory, outputs = ours.empty_memory(capacity=90), []
    for part, place in zip(ids.split([1, 40, 49], 1), positions.split([1, 40, 49], 2), strict=True):
        out, memory = ours(ours.embed(part), place, memory)
        outputs.append(ours.logits(out))
    assert (torch.cat(outputs, 1) - right).abs().max() <= TOLERANCE


def test_images_need_no_positions_of_ours(pair):
    """For text and images both rules agree: transformers left to itself gives the same positions."""
    ours, reference = pair
    ids, grids = ids_of(5, (250, 24), 3, (250, 15), 4), [Grid(1, 8, 12), Grid(1, 10, 6)]
    kinds = (ids == 250).long()
    theirs_, _ = reference.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=thw(grids))
    assert torch.equal(theirs_, rope.prompt(ids, grids, [], ours.config))


def test_the_config_that_transformers_writes_is_read(pair):
    ours, reference = pair
    written = json.loads(json.dumps(reference.config.to_dict()))
    assert replace(config_from_json(written), stop_tokens=CONFIG.stop_tokens) == ours.config


def test_what_we_save_is_what_transformers_reads(pair, tmp_path):
    """Our on-disk layout, with its own renaming of keys, gives the same weights there."""
    ours, reference = pair
    from safetensors.torch import save_file

    save_file(weights.to_disk(ours), tmp_path / "model.safetensors", metadata={"format": "pt"})
    reference.config.save_pretrained(tmp_path)
    again = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    for (name, one), (_, other) in zip(again.named_parameters(), reference.named_parameters(), strict=True):
        assert torch.equal(one, other), name
