"""What streaming means: any chunking equals one pass, the future never changes the past, rows and streams are apart."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from infinitevl import rope
from infinitevl.config import DELTA, SOFTMAX, ModelConfig, TextConfig, VisionConfig, hybrid
from infinitevl.memory import Memory
from infinitevl.model import Model

WINDOW = 24
TOLERANCE = 5e-4
FRAME_ROWS = FRAME_COLUMNS = 4  # patches: 4 tokens a frame
CONFIG = ModelConfig(
    VisionConfig(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, full_attention_blocks=(1,)
    ),
    TextConfig(
        layers=hybrid(2),
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        window=WINDOW,
        mrope_sections=(2, 3, 3),
        delta_heads=2,
        delta_key_dim=16,
        delta_value_dim=32,
    ),
    image_token=62,
    video_token=63,
)


def made(seed: int = 0, **changes: object) -> Model:
    """A model whose weights are of the size that makes every part of it matter in the logits."""
    torch.manual_seed(seed)
    model = Model(replace(CONFIG, text=replace(CONFIG.text, **changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not name.endswith("_conv"):
                scale = 0.3 if name == "embedding.weight" else parameter.shape[1] ** -0.5
                parameter.normal_(0, scale)
            elif not name.endswith("dt_bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.fixture(scope="module", params=[0, 5], ids=["no sinks", "5 sinks"])
def model(request) -> Model:
    return made(sinks=request.param)


@pytest.fixture(scope="module")
def plain() -> Model:
    return made()


class Tokens(NamedTuple):
    hidden: Tensor  # [1, T, D]
    positions: Tensor  # [3, 1, T]


def mixed(model: Model, seed: int = 0, frames: int = 24) -> Tokens:
    """Text, an image, text, frames with text after each eighth, text: about seven windows."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(0, 60, (count,), generator=generator).tolist()

    runs = [8] * (frames // 8)
    ids = words(5) + [62] * 6 + words(3)
    for run in runs:
        ids += [63] * 4 * run + words(7)
    pictures = [(1, 4, 6)] + [(run, FRAME_ROWS, FRAME_COLUMNS) for run in runs]
    tokens = [
        model.vision(torch.randn(time, rows * columns, 1176, generator=generator), rows, columns).flatten(0, 1)
        for time, rows, columns in pictures
    ]
    grids = [rope.Grid(*picture, 1.0) for picture in pictures]
    row = torch.tensor([ids])
    return Tokens(model.embed(row, torch.cat(tokens)), rope.prompt(row, grids[:1], grids[1:], model.config))


def cut(sequence: Tokens, sizes: Sequence[int]) -> Iterator[Tokens]:
    """The sequence in chunks of the sizes given, over and over."""
    at = turn = 0
    while at < sequence.hidden.shape[1]:
        end = at + sizes[turn % len(sizes)]
        yield Tokens(sequence.hidden[:, at:end], sequence.positions[:, :, at:end])
        at, turn = end, turn + 1


@torch.no_grad()
def in_chunks(model: Model, sequence: Tokens, sizes: Sequence[int], capacity: int | None = None):
    """Logits [1, T, vocab] of a sequence fed through a memory, and the memory after it."""
    memory, outputs = model.empty_memory(1, capacity), []
    for chunk in cut(sequence, sizes):
        out, memory = model(chunk.hidden, chunk.positions, memory)
        outputs.append(model.logits(out))
    return torch.cat(outputs, 1), memory


@torch.no_grad()
def in_one_pass(model: Model, sequence: Tokens) -> Tensor:
    return model.logits(model(sequence.hidden, sequence.positions)[0])


def difference(one: Memory, other: Memory) -> float:
    """The greatest difference between two memories of the same tokens."""
    pairs = zip(one.named(), other.named(), strict=True)
    return max(float((a.nan_to_num(7.0) - b.nan_to_num(7.0)).abs().max()) for (_, a), (_, b) in pairs)


def chunkings() -> dict[str, tuple[int, ...]]:
    draw = random.Random(7)
    fixed = {"ones": (1,), "as the window": (WINDOW,), "longer than the window": (61,), "ends mid frame": (7, 1, 30)}
    fixed |= {"whole frames": (4,), "one": (10**6,), "window and one": (WINDOW + 1, WINDOW - 1, 2)}
    drawn = {f"drawn {n}": tuple(draw.choice([1, 2, 3, 5, 11, 30, 47]) for _ in range(40)) for n in range(4)}
    return fixed | drawn


# -- the master test --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", chunkings().values(), ids=chunkings())
@torch.no_grad()
def test_any_chunking_equals_one_pass(model, sizes):
    sequence = mixed(model)
    right = in_one_pass(model, sequence)
    assert sequence.hidden.shape[1] > 5 * WINDOW and 0.5 < right.std() < 50
    logits, memory = in_chunks(model, sequence, sizes)
    assert (logits - right).abs().max() <= TOLERANCE
    length = sequence.hidden.shape[1]
    assert memory.seen.tolist() == [length] and memory.clock.tolist() == [int(sequence.positions.max()) + 1]
    sinks = model.config.text.sinks
    assert sorted(memory.index[0].tolist()) == [*range(sinks), *range(length - WINDOW, length)]
    assert difference(memory, in_chunks(model, sequence, (50,))[1]) <= TOLERANCE


@torch.no_grad()
def test_window_sinks_and_delta_state_all_matter():
    """Or the master test would compare logits that do not know what it is about."""
    plain, sinks, wider = made(), made(sinks=5), made(window=WINDOW + 1)
    sequence = mixed(plain)
    right = in_one_pass(plain, sequence)
    for other in (sinks, wider):
        assert (in_one_pass(other, sequence) - right).abs()[:, WINDOW + 6 :].mean() > 100 * TOLERANCE
    chunks = list(cut(sequence, (100,)))
    _, memory = plain(*chunks[0], plain.empty_memory())
    for number, empty in enumerate(plain.empty_memory().blocks):
        blocks = tuple(empty if n == number else block for n, block in enumerate(memory.blocks))
        out, _ = plain(*chunks[1], memory._replace(blocks=blocks))
        error = (plain.logits(out) - right[:, 100 : 100 + out.shape[1]]).abs().max()
        assert error > 10 * TOLERANCE, f"block {number} without its past"


@pytest.mark.parametrize("layers", [(SOFTMAX,) * 3, (DELTA,) * 3, (DELTA, SOFTMAX)], ids=["softmax", "delta", "mixed"])
@torch.no_grad()
def test_every_pattern_of_layers_streams(layers):
    model = made(layers=layers)
    sequence = mixed(model, frames=16)
    right = in_one_pass(model, sequence)
    for sizes in ((1, 40, 3), (9,)):
        assert (in_chunks(model, sequence, sizes)[0] - right).abs().max() <= TOLERANCE


@torch.no_grad()
def test_a_window_of_one_token():
    model = made(window=1)
    sequence = mixed(model, frames=8)
    assert (in_chunks(model, sequence, (1, 5))[0] - in_one_pass(model, sequence)).abs().max() <= TOLERANCE


@torch.no_grad()
def test_without_a_window_a_memory_of_enough_room_equals_one_pass():
    model = made(layers=(SOFTMAX,) * 3, window=None)
    sequence = mixed(model)
    right, length = in_one_pass(model, sequence), sequence.hidden.shape[1]
    for sizes in ((1, 9, 30), (64,)):
        logits, _ = in_chunks(model, sequence, sizes, capacity=length)
        assert (logits - right).abs().max() <= TOLERANCE


@torch.no_grad()
def test_a_recurrent_delta_rule_equals_the_chunked_one(plain):
    from infinitevl import ops

    sequence = mixed(plain)
    with ops.pinned(gated_delta="recurrent"):
        assert (in_chunks(plain, sequence, (1, 70))[0] - in_one_pass(plain, sequence)).abs().max() <= TOLERANCE
        recurrent = in_one_pass(plain, sequence)
    assert (recurrent - in_one_pass(plain, sequence)).abs().max() <= TOLERANCE


@torch.no_grad()
def test_the_future_never_changes_the_past(model):
    sequence = mixed(model)
    right = in_one_pass(model, sequence)
    for at in (1, 30, 77, 120):
        hidden = sequence.hidden.clone()
        hidden[:, at:] = torch.randn_like(hidden[:, at:]) * 3
        other = Tokens(hidden, sequence.positions)
        for logits in (in_one_pass(model, other), in_chunks(model, other, (50,))[0]):
            assert (logits[:, :at] - right[:, :at]).abs().max() <= TOLERANCE
            assert (logits[:, at] - right[:, at]).abs().max() > 100 * TOLERANCE


@torch.no_grad()
def test_a_step_leaves_the_memory_it_was_given_as_it_was(model):
    """Memories are values: a clone that is asked, and a fork, rest on it."""
    sequence = mixed(model)
    _, memory = in_chunks(model, sequence, (31,))
    kept = memory.clone()
    for chunk in cut(sequence, (1, 40)):
        model(chunk.hidden, chunk.positions, memory)
    assert difference(memory, kept) == 0


# -- streams and rows -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_two_interleaved_streams_equal_each_alone(model):
    sequences = [mixed(model, seed) for seed in (1, 2)]
    sizes = [(5, 1, 33), (8, 20)]
    memories, outputs = [model.empty_memory(), model.empty_memory()], [[], []]
    turns = [cut(sequence, size) for sequence, size in zip(sequences, sizes, strict=True)]
    while any(turns):
        for stream, chunks in enumerate(turns):
            chunk = next(chunks, None) if chunks else None
            if chunk is None:
                turns[stream] = None
                continue
            out, memories[stream] = model(chunk.hidden, chunk.positions, memories[stream])
            outputs[stream].append(model.logits(out))
    for stream in (0, 1):
        logits, memory = in_chunks(model, sequences[stream], sizes[stream])
        assert torch.equal(torch.cat(outputs[stream], 1), logits)
        assert difference(memories[stream], memory) == 0


def padded(sequences: Sequence[Tokens], place: Callable[[int, int], Tensor]) -> tuple[Tokens, Tensor]:
    """Sequences as rows of one batch; `place(length, longest)` says where a row's tokens stand. Padding is noise."""
    longest = max(sequence.hidden.shape[1] for sequence in sequences)
    hidden = torch.randn(len(sequences), longest, CONFIG.text.hidden_size) * 3
    positions = torch.randint(0, 10**6, (3, len(sequences), longest))
    present = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        at = place(sequence.hidden.shape[1], longest)
        hidden[row, at], positions[:, row, at], present[row, at] = sequence.hidden[0], sequence.positions[:, 0], True
    return Tokens(hidden, positions), present


PLACES = {
    "left": lambda length, longest: torch.arange(longest - length, longest),
    "right": lambda length, longest: torch.arange(length),
    "anywhere": lambda length, longest: torch.randperm(longest)[:length].sort().values,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "sizes", [None, (10**6,), (1, 29, 3), (40,)], ids=["no memory", "one", "small", "chunks of 40"]
)
@torch.no_grad()
def test_padded_rows_have_the_logits_they_have_alone(model, place, sizes):
    sequences = [mixed(model, seed, frames) for seed, frames in ((1, 24), (2, 8), (3, 16))]
    batch, present = padded(sequences, PLACES[place])
    if sizes is None:
        logits, memory = model.logits(model(batch.hidden, batch.positions, present=present)[0]), None
    else:
        memory, outputs, at = model.empty_memory(3), [], 0
        for chunk in cut(batch, sizes):
            there = present[:, at : at + chunk.hidden.shape[1]]
            out, memory = model(chunk.hidden, chunk.positions, memory, there)
            outputs.append(model.logits(out))
            at += chunk.hidden.shape[1]
        logits = torch.cat(outputs, 1)
    assert logits.isfinite().all(), "also where nothing is: NaN would spread in training"
    for row, sequence in enumerate(sequences):
        assert (logits[row, present[row]] - in_one_pass(model, sequence)[0]).abs().max() <= TOLERANCE
        if memory is not None:
            alone = in_chunks(model, sequence, (64,))[1]
            assert difference(memory.rows(torch.tensor([row])), alone) <= TOLERANCE


@torch.no_grad()
def test_a_paused_row_does_not_move(model):
    one, two = mixed(model, 1), mixed(model, 2)
    _, memory = model(
        torch.cat([one.hidden, two.hidden])[:, :60],
        torch.cat([one.positions, two.positions], 1)[..., :60],
        model.empty_memory(2),
    )
    before = memory.clone()
    for _ in range(9):
        present = torch.tensor([[True] * 7, [False] * 7])
        positions = torch.arange(90, 97).expand(3, 2, -1)
        _, memory = model(torch.randn(2, 7, 64), positions, memory, present)
    second = torch.tensor([1])
    assert difference(memory.rows(second), before.rows(second)) == 0
    assert memory.seen.tolist() == [60 + 63, 60]


@torch.no_grad()
def test_a_reset_row_begins_anew_and_the_other_goes_on(model):
    one, two = mixed(model, 1), mixed(model, 2)
    both = Tokens(torch.cat([one.hidden, two.hidden]), torch.cat([one.positions, two.positions], 1))
    chunks = list(cut(both, (70,)))
    _, memory = model(*chunks[0], model.empty_memory(2))
    memory = memory.reset(torch.tensor([False, True]))
    again = Tokens(
        torch.stack([chunks[1].hidden[0], chunks[0].hidden[1, : chunks[1].hidden.shape[1]]]),
        torch.stack([chunks[1].positions[:, 0], chunks[0].positions[:, 1, : chunks[1].hidden.shape[1]]], 1),
    )
    out, _ = model(*again, memory)
    logits, length = model.logits(out), again.hidden.shape[1]
    assert (logits[0] - in_one_pass(model, one)[0, 70 : 70 + length]).abs().max() <= TOLERANCE
    assert (logits[1] - in_one_pass(model, two)[0, :length]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("padding", ["none", "at the ends", "between and inside"])
@torch.no_grad()
def test_packed_segments_equal_each_alone(model, padding):
    """Several conversations in one row, some longer than the window, none on a chunk's edge but one."""
    lengths = {"first": [64, 30, 1, 50], "second": [3, 90, 45]}
    rows, segments, presents, parts = [], [], [], []
    for seed, sizes in enumerate(lengths.values()):
        sequence = mixed(model, seed)
        pieces = [Tokens(sequence.hidden[:, :size], sequence.positions[..., :size]) for size in sizes]
        parts.append(pieces)
        line = Tokens(torch.cat([p.hidden for p in pieces], 1), torch.cat([p.positions for p in pieces], 2))
        numbers = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        total = {"none": len(numbers), "at the ends": 160, "between and inside": 200}[padding]
        gap = total - len(numbers)
        at = torch.arange(gap // 2, gap // 2 + len(numbers))
        if padding == "between and inside":
            at = torch.randperm(total)[: len(numbers)].sort().values
        if padding == "none":
            at, total = torch.arange(len(numbers)), max(map(sum, lengths.values()))
        row, where = torch.randn(1, total, 64), torch.zeros(3, 1, total, dtype=torch.int64)
        segment, present = torch.randint(0, 9, (total,)), torch.zeros(total, dtype=torch.bool)
        row[:, at], where[..., at], segment[at], present[at] = line.hidden, line.positions, numbers, True
        rows.append(Tokens(row, where))
        segments.append(segment)
        presents.append(present)
    present, segment = torch.stack(presents), torch.stack(segments)
    out, _ = model(
        torch.cat([r.hidden for r in rows]), torch.cat([r.positions for r in rows], 1), present=present, segment=segment
    )
    logits = model.logits(out)
    assert logits.isfinite().all()
    for row, pieces in enumerate(parts):
        packed = logits[row, present[row]].split([piece.hidden.shape[1] for piece in pieces])
        for got, piece in zip(packed, pieces, strict=True):
            assert (got - in_one_pass(model, piece)[0]).abs().max() <= TOLERANCE


@torch.no_grad()
def test_segments_without_padding_need_no_mask(plain):
    sequence = mixed(plain)
    pieces = [Tokens(sequence.hidden[:, a:b], sequence.positions[..., a:b]) for a, b in ((0, 65), (65, 66), (66, 120))]
    segment = torch.tensor([[4] * 65 + [2] + [7] * 54])
    out, _ = plain(sequence.hidden[:, :120], sequence.positions[..., :120], segment=segment)
    alone = torch.cat([in_one_pass(plain, piece) for piece in pieces], 1)
    assert (plain.logits(out) - alone).abs().max() <= TOLERANCE


# -- a recorded step --------------------------------------------------------------------------------------------------

Step = Callable[[Tensor, Tensor, Memory], tuple[Tensor, Memory]]


def frame_step(model: Model) -> Step:
    """One frame's patches [1, 16, 1176] at a time into the memory: vision, positions, all blocks."""

    def step(patches: Tensor, time: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        positions, memory = rope.next_frame(memory, time, FRAME_ROWS // 2, FRAME_COLUMNS // 2, model.config)
        return model(model.vision(patches, FRAME_ROWS, FRAME_COLUMNS), positions, memory)

    return step


def frozen_step(model: Model) -> Step:
    """The same, with the fault of the published demo: how far the stream has come is a Python number."""
    step, seen = frame_step(model), 0

    def with_a_python_cursor(patches: Tensor, time: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        nonlocal seen
        out, after = step(patches, time, memory._replace(seen=torch.full_like(memory.seen, seen)))
        seen += out.shape[1]
        return out, after

    return with_a_python_cursor


def replayed_equals_eager(model: Model, make: Callable[[Model], Step]) -> bool:
    """Whether a step recorded on the first frame does what the step itself does, for three windows of frames."""
    frames = torch.randn(3 * WINDOW // 4 + 2, 1, FRAME_ROWS * FRAME_COLUMNS, 1176)
    times = torch.arange(len(frames), dtype=torch.float64)[:, None] * 0.7
    recorded = make_fx(make(model))(frames[0], times[0], model.empty_memory())
    eager, one, other = make(model), model.empty_memory(), model.empty_memory()
    for patches, time in zip(frames, times, strict=True):
        right, one = eager(patches, time, one)
        got, other = recorded(patches, time, other)
        if (got - right).abs().max() > 1e-5 or difference(other, one) > 1e-5:
            return False
    return bool(one.seen == 4 * len(frames))


@torch.no_grad()
def test_a_recorded_step_replays_through_three_windows(model):
    assert replayed_equals_eager(model, frame_step)


@torch.no_grad()
def test_a_step_with_a_python_cursor_is_found_out(plain):
    assert not replayed_equals_eager(plain, frozen_step)


@torch.no_grad()
def test_a_recorded_step_goes_on_from_any_memory(plain):
    """Recorded on an empty memory, replayed on one that has seen text and another run of frames."""
    recorded = make_fx(frame_step(plain))(torch.randn(1, 16, 1176), torch.zeros(1).double(), plain.empty_memory())
    _, memory = in_chunks(plain, mixed(plain), (37,))
    patches, time = torch.randn(1, 16, 1176), torch.tensor([99.5]).double()
    right, one = frame_step(plain)(patches, time, memory.clone())
    got, other = recorded(patches, time, memory)
    assert (got - right).abs().max() <= 1e-5 and difference(one, other) <= 1e-5


# -- low precision ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_chunks_stay_near_one_pass_in_bfloat16():
    model = made().bfloat16()
    sequence = mixed(model)
    right = in_one_pass(model, sequence).float()
    logits, memory = in_chunks(model, sequence, (1, 30, 7))
    assert (logits.float() - right).abs().mean() < 0.05 * right.abs().mean()
    assert all(block.state.dtype == torch.float32 for block in memory.blocks if hasattr(block, "state"))
