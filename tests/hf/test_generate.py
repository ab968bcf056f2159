"""generate: what a loop by hand over the core's Model and its memory says, in a batch as alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import infinitevl.hf as hf
from infinitevl import rope
from infinitevl.model import Model

from .conftest import WINDOW, by_hand, clip, drawn, one_line, picture, tiny_config

NEW = 12
PROMPTS = {
    "text": ([], [], "who, what, where and when? " * 3),
    "image": ([picture(84, 112)], [], "<|vision_start|><|image_pad|><|vision_end|>what?"),
    "video": ([], [clip(4, 56, 84)], "<|vision_start|><|video_pad|><|vision_end|>how many were there?"),
}


def inputs_of(edge: hf.InfiniteVLProcessor, *names: str) -> dict:
    images, videos = ([part for name in names for part in PROMPTS[name][kind]] for kind in (0, 1))
    return dict(edge(images=images, text=[PROMPTS[name][2] for name in names], videos=videos))


@torch.no_grad()
def spoken(core: Model, inputs: dict, pick, new: int = NEW) -> list[int]:
    """The ids that a loop over the core says, prompt through the memory, `pick` from logits [1, vocab]."""
    hidden, positions = by_hand(core, inputs)
    hidden, memory = core(hidden, positions, core.empty_memory(capacity=None))
    ids: list[int] = []
    while len(ids) < new:
        token = pick(core.logits(hidden[:, -1]))
        ids.append(int(token))
        positions, memory = rope.next_text(memory, 1)
        hidden, memory = core(core.embed(token.view(1, 1)), positions, memory)
    return ids


def greedy(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


@pytest.fixture(autouse=True)
def endless(model: hf.InfiniteVLForConditionalGeneration) -> None:
    """No token ends an answer, so that all that is asked for is said."""
    model.generation_config.eos_token_id = None


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_equals_a_loop_by_hand(core: Model, model, edge, name: str) -> None:
    inputs = inputs_of(edge, name)
    length = inputs["input_ids"].shape[1]
    assert length + NEW > WINDOW
    ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(ids[:, :length], inputs["input_ids"])
    assert ids[0, length:].tolist() == spoken(core, inputs, greedy)


def test_rows_of_a_padded_batch_say_what_they_say_alone(model, edge) -> None:
    names = ("image", "text", "video", "image")
    batch = inputs_of(edge, *names)
    assert (batch["attention_mask"] == 0).any()
    answers = model.generate(**batch, max_new_tokens=NEW, do_sample=False)[:, -NEW:]
    for answer, name in zip(answers, names, strict=True):
        alone = model.generate(**inputs_of(edge, name), max_new_tokens=NEW, do_sample=False)[0, -NEW:]
        assert answer.tolist() == alone.tolist()


def test_sampling_draws_from_the_same_chances(core: Model, model, edge) -> None:
    inputs = inputs_of(edge, "image")

    def draw(logits: Tensor) -> Tensor:
        return torch.multinomial((logits / 0.7).softmax(-1), 1)[0]

    torch.manual_seed(3)
    expected = spoken(core, inputs, draw)
    torch.manual_seed(3)
    ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=True, temperature=0.7, top_k=0)
    assert ids[0, -NEW:].tolist() == expected
    assert expected != spoken(core, inputs, greedy)


def test_an_answer_ends_at_a_stop_token(core: Model, model, edge) -> None:
    inputs = inputs_of(edge, "image")
    said = spoken(core, inputs, greedy)
    stop = next(token for at, token in enumerate(said) if at >= 2 and token not in said[:at])
    end = said.index(stop) + 1
    ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=[stop])
    assert ids[0, inputs["input_ids"].shape[1] :].tolist() == said[:end]


def test_the_memory_keeps_its_size(core: Model, model, edge) -> None:
    output = model.generate(
        **inputs_of(edge, "text", "image"), max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True
    )
    assert output.past_key_values.memory.nbytes == core.empty_memory(2).nbytes
    assert output.past_key_values.length == output.sequences.shape[1] - 1  # the last id has not been fed


class Only(LogitsProcessor):
    """Leaves one id to say."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.token]), 0.0)


def test_a_picture_token_that_is_said_is_text(model, edge) -> None:
    only = LogitsProcessorList([Only(model.config.image_token_id)])
    ids = model.generate(**inputs_of(edge, "image"), max_new_tokens=3, logits_processor=only)
    assert ids[0, -3:].tolist() == [model.config.image_token_id] * 3


def test_without_a_window_the_memory_is_made_to_fit(processor, edge) -> None:
    core = drawn(tiny_config(processor, layers=("softmax",) * 2, window=None), processor)
    model = hf.InfiniteVLForConditionalGeneration(hf.InfiniteVLConfig.of(core.config), processor).eval()
    model.model.load_state_dict(core.state_dict())
    inputs = inputs_of(edge, "text")
    ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    for at in range(NEW):
        assert model(ids[:, : -NEW + at]).logits[0, -1].argmax() == ids[0, -NEW + at]


def test_embeddings_as_a_prompt(core: Model, model, edge) -> None:
    inputs = inputs_of(edge, "text")
    embedded = core.embedding(inputs["input_ids"]).detach()
    ids = model.generate(inputs_embeds=embedded, max_new_tokens=NEW, do_sample=False)
    assert ids[0].tolist() == spoken(core, inputs, greedy)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"num_beams": 2, "do_sample": True}, "beam sample"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
        ({"num_return_sequences": 2, "do_sample": True}, "2 sequences for a row"),
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"cache_implementation": "paged"}, "generate_batch"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size=8"),
        ({"past_key_values": DynamicCache()}, "past_key_values"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ],
)
def test_what_does_not_go_with_a_memory_is_refused(model, edge, options: dict, words: str) -> None:
    with pytest.raises(ValueError) as error:
        model.generate(**inputs_of(edge, "text"), max_new_tokens=2, **options)
    assert words in one_line(error.value)


def test_an_assistant_is_refused(model, edge) -> None:
    with pytest.raises(ValueError) as error:
        model.generate(**inputs_of(edge, "text"), max_new_tokens=2, assistant_model=model)
    assert "assisted generation" in one_line(error.value)


@pytest.mark.parametrize("whole", [False, True])
def test_a_past_is_refused_instead_of_dropping_tokens(model, edge, whole: bool) -> None:
    """New ids alone, which transformers would cut, or the whole sequence again: both are told what to do."""
    first = inputs_of(edge, "text")["input_ids"]
    past = model(first, use_cache=True).past_key_values
    more = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="Stream") as error:
        model.generate(torch.cat([first, more], 1) if whole else more, past_key_values=past, max_new_tokens=2)
    one_line(error.value)
