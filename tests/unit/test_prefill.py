"""Long input in chunks: the same as in one pass, and in working space that does not grow with its length."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infinitevl import oneshot, prefill, rope, weights
from infinitevl.config import ModelConfig, TextConfig, VisionConfig, hybrid, tiny
from infinitevl.generate import feed
from infinitevl.memory import Memory
from infinitevl.model import Model
from infinitevl.processor import load_processor

TOLERANCE = 1e-5
CONFIG = ModelConfig(
    VisionConfig(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, full_attention_blocks=(1,)
    ),
    TextConfig(
        layers=hybrid(1),
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        window=24,
        mrope_sections=(2, 3, 3),
        delta_heads=2,
        delta_key_dim=16,
        delta_value_dim=32,
    ),
    image_token=tiny().image_token,
    video_token=tiny().video_token,
    stop_tokens=tiny().stop_tokens,
)


@pytest.fixture(scope="module")
def model() -> Model:
    return made(window=24)


def made(**changes: object) -> Model:
    torch.manual_seed(0)
    config = replace(CONFIG, text=replace(CONFIG.text, **changes))
    model = Model(config, load_processor(weights.locate("tiny")))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not name.endswith("_conv"):
                parameter.normal_(0, 0.3 if name == "embedding.weight" else parameter.shape[1] ** -0.5)
    return model.eval()


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation inside makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [each.nbytes for each in tree_leaves(out) if isinstance(each, Tensor)]
        self.bytes = max(self.bytes, *made, 0)
        return out


def difference(one: Memory, other: Memory) -> float:
    """The greatest; infinite where integers differ."""
    pairs = [(a, b) for (_, a), (_, b) in zip(one.named(), other.named(), strict=True)]
    if not all(torch.equal(a, b) for a, b in pairs if not a.is_floating_point()):
        return float("inf")
    floats = [(a.double().nan_to_num(-7.0), b.double().nan_to_num(-7.0)) for a, b in pairs if a.is_floating_point()]
    return max(float((a - b).abs().max()) for a, b in floats)


# -- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 64, 8192])
@torch.no_grad()
def test_chunks_equal_one_pass(model: Model, chunk: int) -> None:
    """Rows of their own ids, on memories that have seen a frame and text."""
    ids = torch.randint(0, 500, (2, 150))
    begun = feed(model, model.empty_memory(2), (5, 6, 7))[1]
    positions, begun = rope.next_frame(begun, torch.tensor([1.0, 3.0]).double(), 2, 2, model.config)
    begun = model(torch.randn(2, 4, 64), positions, begun)[1]
    positions, right = rope.next_text(begun.clone(), 150)
    hidden, right = model(model.embed(ids), positions, right)
    told: list[tuple[int, int]] = []
    last, memory = prefill(model, begun, ids, chunk, lambda *step: told.append(step))
    assert last.shape == (2, 64) and (last - hidden[:, -1]).abs().max() <= TOLERANCE
    assert difference(memory, right) <= TOLERANCE
    assert memory.start.isnan().all(), "text ends a run of frames"
    assert told == [(min(at + chunk, 150), 150) for at in range(0, 150, chunk)]


@torch.no_grad()
def test_text_goes_on_where_the_last_one_ended(model: Model) -> None:
    ids = torch.randint(0, 500, (1, 90))
    whole = prefill(model, model.empty_memory(), ids)
    half = prefill(model, model.empty_memory(), ids[:, :40], 16)[1]
    parts = prefill(model, half, ids[:, 40:], 16)
    fed = feed(model, model.empty_memory(), ids[0].tolist())
    for hidden, memory in (parts, fed):
        assert (hidden - whole[0]).abs().max() <= TOLERANCE and difference(memory, whole[1]) <= TOLERANCE


@torch.no_grad()
def test_only_the_rows_that_are_there_are_fed(model: Model) -> None:
    begun = feed(model, model.empty_memory(3), (5, 6, 7))[1]
    positions, begun = rope.next_frame(begun, torch.tensor([1.0, 3.0, 4.0]).double(), 2, 2, model.config)
    begun = model(torch.randn(3, 4, 64), positions, begun)[1]
    ids, there = torch.randint(0, 500, (3, 50)), torch.tensor([True, False, True])
    hidden, memory = prefill(model, begun.clone(), ids, 16, there=there)
    right, whole = prefill(model, begun.clone(), ids, 16)
    fed, one = torch.tensor([0, 2]), torch.tensor([1])
    assert (hidden[fed] - right[fed]).abs().max() <= TOLERANCE
    assert difference(memory.rows(fed), whole.rows(fed)) <= TOLERANCE
    assert difference(memory.rows(one), begun.rows(one)) == 0


@pytest.mark.parametrize(
    ("ids", "chunk"), [((0,), 4), ((5,), 4), ((1, 0), 4), ((2, 5), 4), ((1, 5, 1), 4), ((1, 5), 0), ((1, 5), -1)]
)
def test_what_is_no_text_is_refused(model: Model, ids: tuple[int, ...], chunk: int) -> None:
    memory = model.empty_memory()
    with pytest.raises(ValueError, match=r"a text is ids \[1, 1 or more\], chunks of 1 or more; got"):
        prefill(model, memory, torch.zeros(ids, dtype=torch.int64), chunk)


def resident() -> int:
    """Bytes of this process that are in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_twenty_thousand_tokens_at_constant_memory(model: Model) -> None:
    """The largest tensor that is made is that of two chunks of text; a pass over all of it makes larger ones."""
    ids = torch.randint(0, 500, (1, 20_000))
    with Largest() as short:
        _, few = prefill(model, model.empty_memory(), ids[:, :2048], 1024)
    before, told = resident(), []
    with Largest() as long:
        hidden, memory = prefill(model, model.empty_memory(), ids, 1024, lambda *step: told.append(step))
    assert resident() - before < 64e6
    assert memory.nbytes == few.nbytes == model.empty_memory().nbytes
    assert long.bytes == short.bytes
    assert told[-1] == (20_000, 20_000) and len(told) == 20 and hidden.isfinite().all()
    assert memory.seen.tolist() == memory.clock.tolist() == [20_000]
    with Largest() as whole:
        prefill(model, model.empty_memory(), ids[:, :4096], 4096)
    assert whole.bytes > 2 * long.bytes, "the measure sees a chunk that is too large"


# -- prompts of pictures, recordings and texts ------------------------------------------------------------------------


def video(frames: int, height: int = 56, width: int = 84) -> oneshot.Part:
    pixels = torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8)
    grids = -(-frames // 2)
    grid = rope.Grid(grids, height // 14, width // 14, 2.0)
    return oneshot.Part("video", list(pixels.split(1)), (height, width), grid, grids * grid.rows * grid.columns // 4)


def image(height: int = 84, width: int = 56) -> oneshot.Part:
    pixels = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8)
    grid = rope.Grid(1, height // 14, width // 14)
    return oneshot.Part("image", [pixels], (height, width), grid, grid.rows * grid.columns // 4)


@torch.no_grad()
def in_one_pass(model: Model, parts: list[oneshot.Part], question: str) -> Tensor:
    """Hidden of the last token of a prompt, without chunks and without a memory."""
    config = model.config
    ids = torch.tensor([model.processor.chat.one_shot([(part.kind, part.tokens) for part in parts], question)])
    images, videos = ([part.grid for part in parts if part.kind == kind] for kind in ("image", "video"))
    visual = []
    for part in parts:
        patches, grid = oneshot.patchify(torch.cat(part.pictures), model.processor.config, pair=part.kind == "video")
        visual.append(model.vision(patches, *grid).flatten(0, 1))
    hidden = model.embed(ids, torch.cat(visual)) if visual else model.embed(ids)
    return model(hidden, rope.prompt(ids, images, videos, config))[0][:, -1]


@pytest.mark.parametrize("window", [24, None])
@pytest.mark.parametrize("chunk", [7, 64, 10**6])
@torch.no_grad()
def test_a_prompt_in_chunks_equals_one_pass(chunk: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(window=window)
    parts = [video(9), image(), video(4, 28, 28), image(28, 28)]
    right = in_one_pass(model, parts, "what is it?")
    monkeypatch.setattr(oneshot, "CHUNK", chunk)
    monkeypatch.setattr(oneshot, "GRIDS", 2)
    told: list[tuple[int, int]] = []
    hidden, memory = oneshot.prompt(model, parts, "what is it?", 5, lambda *step: told.append(step))
    assert (hidden - right).abs().max() <= TOLERANCE
    total = int(memory.seen)
    assert told == [(min(at + chunk, total), total) for at in range(0, total, chunk)]
    assert (hidden - in_one_pass(model, parts[::-1], "what is it?")).abs().max() > 100 * TOLERANCE


@torch.no_grad()
def test_a_prompt_without_pictures_is_text(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oneshot, "CHUNK", 16)
    chat = model.processor.chat
    question = "a long story.\n\nwhat is it about?"
    hidden, memory = oneshot.prompt(model, [], question, 5)
    ids = (*chat.before, *chat.plain(question), *chat.after)
    right = feed(model, model.empty_memory(), ids)
    assert (hidden - right[0]).abs().max() <= TOLERANCE and difference(memory, right[1]) <= TOLERANCE


@torch.no_grad()
def test_frames_are_looked_at_right_before_their_chunk(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few grids at a time, and never many before they are needed; what is held does not grow with the video."""
    monkeypatch.setattr(oneshot, "CHUNK", 24)
    monkeypatch.setattr(oneshot, "GRIDS", 2)
    looked, read = [0], []
    vision = model.vision.forward

    def seeing(patches: Tensor, rows: int, columns: int) -> Tensor:
        assert len(patches) <= 2
        looked[0] += patches.shape[0] * patches.shape[1] // 4
        return vision(patches, rows, columns)

    monkeypatch.setattr(model.vision, "forward", seeing)
    largest = []
    for frames in (40, 400):
        looked[0], shown = 0, video(frames)
        with Largest() as mode:
            oneshot.prompt(model, [shown], "what?", 5, lambda done, _: read.append((looked[0], done)))
        largest.append(mode.bytes)
        assert looked[0] == frames * 3
    assert all(seen <= done + 2 * 6 for seen, done in read)
    assert largest[0] == largest[1]
