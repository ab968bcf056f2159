"""forward: the same numbers as the core's Model, whatever the inputs, the padding and the chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import infinitevl
import infinitevl.hf as hf
from infinitevl.generate import feed
from infinitevl.model import Model

from .conftest import by_hand, clip, one_line, picture

SHOWS = {
    "text": ([], [], "what is this?"),
    "image": ([picture(84, 112)], [], "<|vision_start|><|image_pad|><|vision_end|>what is this?"),
    "video": ([], [clip(5, 56, 84)], "<|vision_start|><|video_pad|><|vision_end|>how many?"),
    "mixed": (
        [picture(56, 56, 1), picture(84, 56, 2)],
        [clip(3, 56, 56), clip(2, 28, 56, 1)],
        "a <|video_pad|> b <|image_pad|> c <|image_pad|><|video_pad|> d",
    ),
}
TOLERANCE = 2e-4


def inputs_of(edge: hf.InfiniteVLProcessor, *names: str, fps: float = 0.5) -> dict:
    shown = [SHOWS[name] for name in names]
    images, videos = ([part for row in shown for part in row[kind]] for kind in (0, 1))
    return dict(edge(images=images, text=[row[2] for row in shown], videos=videos, fps=fps))


@pytest.mark.parametrize("name", SHOWS)
@torch.no_grad()
def test_logits_are_those_of_the_core(core: Model, model, edge, name: str) -> None:
    inputs = inputs_of(edge, name)
    hidden, positions = by_hand(core, inputs)
    expected = core.logits(core(hidden, positions)[0])
    assert (model(**inputs).logits - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_seconds_per_grid_reach_the_positions(model, edge) -> None:
    inputs = inputs_of(edge, "video")  # 2 frames in a grid at 0.5 a second: 4 s
    assert inputs["second_per_grid_ts"] == [4.0]
    logits = model(**inputs).logits
    assert (model(**inputs | {"second_per_grid_ts": torch.tensor([4.0])}).logits - logits).abs().max() == 0
    assert (model(**inputs | {"second_per_grid_ts": None}).logits - logits).abs().max() > 1e-3
    one = model(**inputs | {"second_per_grid_ts": [1.0]}).logits
    assert torch.equal(one, model(**inputs | {"second_per_grid_ts": None}).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_padded_rows_equal_rows_alone(model, edge, side: str, use_cache: bool) -> None:
    names = ("image", "text", "mixed", "video")
    batch = inputs_of(edge, *names)
    if side == "right":
        for key in ("input_ids", "attention_mask"):
            rows = zip(batch[key], batch["attention_mask"].sum(1), strict=True)
            batch[key] = torch.stack([row.roll(int(count)) for row, count in rows])
    logits = model(**batch, use_cache=use_cache).logits
    for row, name in enumerate(names):
        alone = model(**inputs_of(edge, name)).logits[0]
        there = batch["attention_mask"][row].bool()
        assert (logits[row, there] - alone).abs().max() <= TOLERANCE, name


@torch.no_grad()
def test_chunks_through_the_memory_equal_one_pass(model, edge, monkeypatch) -> None:
    inputs = inputs_of(edge, "mixed", "text")
    whole = model(**inputs).logits
    monkeypatch.setattr(hf, "PREFILL", 7)  # prompts of several windows, windows of several chunks
    output = model(**inputs, use_cache=True)
    there = inputs["attention_mask"].bool()
    assert (output.logits - whole)[there].abs().max() <= TOLERANCE
    assert output.past_key_values.length == inputs["input_ids"].shape[1]
    assert output.past_key_values.memory.seen.tolist() == inputs["attention_mask"].sum(1).tolist()


@torch.no_grad()
def test_continuing_equals_one_pass(core: Model, model, edge) -> None:
    """Text, then a picture, then text: three calls, the mask of the last as long as everything so far."""
    first, second, third = "one two three", "<|vision_start|><|image_pad|><|vision_end|>", "and then? " * 12
    whole = edge(images=[picture(84, 56)], text=first + second + third)
    rows = [edge(text=first), edge(images=[picture(84, 56)], text=second), edge(text=third)]
    ids = torch.cat([row["input_ids"] for row in rows], dim=1)
    assert torch.equal(ids, whole["input_ids"])
    past, logits = None, []
    for row in rows[:2]:
        output = model(**row, past_key_values=past, use_cache=True)
        past, logits = output.past_key_values, [*logits, output.logits]
    output = model(input_ids=rows[2]["input_ids"], attention_mask=whole["attention_mask"], past_key_values=past)
    assert (torch.cat([*logits, output.logits], dim=1) - model(**whole).logits).abs().max() <= TOLERANCE
    assert output.past_key_values.memory.nbytes == core.empty_memory().nbytes


@torch.no_grad()
def test_padded_continuation(model, edge) -> None:
    """Rows of unequal beginnings and questions: each as alone, with the mask of the question or of everything."""
    begin, questions = edge(text=["a b c", "x y z and so on"]), edge(text=["what was there before?", "when?"])
    everything = torch.cat([begin["attention_mask"], questions["attention_mask"]], dim=1)
    for mask in (questions["attention_mask"], everything):
        past = model(**begin, use_cache=True).past_key_values
        logits = model(questions["input_ids"], attention_mask=mask, past_key_values=past).logits
        for row in range(2):
            before, there = (part["attention_mask"][row].bool() for part in (begin, questions))
            alone = torch.cat([begin["input_ids"][row, before], questions["input_ids"][row, there]])[None]
            assert (logits[row, there] - model(alone).logits[0, -int(there.sum()) :]).abs().max() <= TOLERANCE


@torch.no_grad()
def test_the_memory_of_a_stream_can_be_asked(core: Model, model, edge) -> None:
    stream = infinitevl.Stream(core)
    for second in range(3):
        stream.observe(picture(112, 112, second).numpy(), time=float(second))
    question = core.processor.chat.tail("what is this?")
    expected, after = feed(core, stream.memory, question)
    output = model(torch.tensor([question]), past_key_values=hf.MemoryCache(stream.memory, stream.tokens))
    assert (output.logits[:, -1] - core.logits(expected)).abs().max() <= TOLERANCE
    again = output.past_key_values.memory
    assert torch.equal(again.clock, after.clock) and again.start.isnan().all()  # the next frame begins a new run


@torch.no_grad()
def test_embeddings_positions_and_logits_to_keep(core: Model, model, edge) -> None:
    inputs = inputs_of(edge, "text")
    ids, logits = inputs["input_ids"], model(**inputs).logits
    assert (model(inputs_embeds=core.embedding(ids)).logits - logits).abs().max() <= TOLERANCE
    last = model(ids, logits_to_keep=2).logits
    assert last.shape[1] == 2 and (last - logits[:, -2:]).abs().max() <= TOLERANCE
    there = torch.arange(ids.shape[1]).expand(3, 1, -1)
    assert (model(ids, position_ids=there).logits - logits).abs().max() <= TOLERANCE
    assert (model(ids, position_ids=there * 2).logits - logits).abs().max() > 1e-3
    assert (model(ids, return_dict=False)[0] - logits).abs().max() <= TOLERANCE


def test_loss_is_the_cross_entropy_of_the_next_token(model, edge) -> None:
    inputs = inputs_of(edge, "image", "text")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[0, :9] = -100
    output = model(**inputs, labels=labels)
    total, count = 0.0, 0
    for row in range(2):
        for at in range(1, labels.shape[1]):
            if labels[row, at] != -100:
                total -= float(F.log_softmax(output.logits.detach()[row, at - 1].double(), -1)[labels[row, at]])
                count += 1
    assert output.loss.item() == pytest.approx(total / count, rel=1e-5)
    assert output[0] is output.loss


def test_gradients_reach_every_parameter(model, edge) -> None:
    inputs = inputs_of(edge, "text", "mixed")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model.train()
    model(**inputs, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"inputs_embeds": torch.zeros(1, 3, 48)}, "one of the two"),
        ({"input_ids": None}, "one of the two"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 3, 48)}, "inputs_embeds are for text"),
        ({"image_grid_thw": None}, "0"),
        ({"pixel_values": None}, "0 patches"),
        ({"image_grid_thw": torch.tensor([[1, 4, 4]])}, "16"),
        ({"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": None}, "image tokens"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, "attention_mask"),
        ({"position_ids": torch.zeros(1, 3)}, "position_ids"),
        ({"labels": torch.zeros(1, 3, dtype=torch.long)}, "labels"),
        ({"past_key_values": [()]}, "MemoryCache"),
        ({"video_grid_thw": torch.tensor([[1, 4, 4]]), "second_per_grid_ts": [1.0, 2.0]}, "second_per_grid_ts"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(model, edge, change: dict, words: str) -> None:
    with pytest.raises(ValueError) as error:
        model(**inputs_of(edge, "image") | change)
    assert words in one_line(error.value)


def test_a_memory_of_other_rows_is_refused(model, edge) -> None:
    past = model(**inputs_of(edge, "text"), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="1 rows, this batch 2"):
        model(torch.tensor([[5], [6]]), past_key_values=past)
