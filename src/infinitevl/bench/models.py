"""Models without a checkpoint: random weights of any shape on any device in seconds, and words to ask them with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from infinitevl.config import ModelConfig, ProcessorConfig
from infinitevl.memory import Memory, Window, slot
from infinitevl.model import Model
from infinitevl.processor import Chat, Ids, Part, Processor


class Words:
    """Stands in for a tokenizer: every word is an id below `size`, every id a word."""

    def __init__(self, size: int) -> None:
        self.size = size

    def encode(self, text: str, add_special_tokens: bool, split_special_tokens: bool) -> list[int]:
        return [sum(map(ord, word)) % self.size for word in text.split()]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool) -> str:
        return " ".join(f"w{number}" for number in ids)


def words(config: ModelConfig, processor: ProcessorConfig) -> Processor:
    """A processor whose chat format is as long as Qwen2.5-VL's: 14 tokens before the video, 6 after the question."""
    opening, closing = (config.vision_start_token,), (config.vision_end_token,)
    tokenizer = Words(min(config.stop_tokens) // 2)
    chat = Chat(
        tokenizer=tokenizer,
        before=_some(14),
        after=_some(6),
        again=_some(4),
        image=Part(opening, config.image_token, closing),
        video=Part(opening, config.video_token, closing),
    )
    return Processor(processor, tokenizer, chat)


def _some(count: int) -> Ids:
    return tuple(range(1, count + 1))


def random_model(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, processor: ProcessorConfig | None = None
) -> Model:
    """A model with the same random weights every time, made on its device in its dtype: 4 billion take seconds.

    Its initialisation keeps activations finite and of order one at every depth.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.device(device), _default_dtype(dtype):
        torch.manual_seed(0)
        model = Model(config, words(config, processor or ProcessorConfig()))
    return model.eval().requires_grad_(False)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def prepared(model: Model, fp8: bool = False) -> Model:
    """The model as `weights.load` leaves it on its device."""
    if model.device.type == "cuda":
        model.fuse()
    return model.to_fp8() if fp8 else model


def filled(model: Model, length: int, rows: int = 1, capacity: int | None = None) -> Memory:
    """A memory in which every row has seen `length` tokens: random keys, values and states, true indices."""
    memory = model.empty_memory(rows, capacity)
    for block in memory.blocks:
        for leaf in block:
            leaf.normal_(std=1.0 if isinstance(block, Window) else 0.1)
    return aged(memory, length, model)


def aged(memory: Memory, length: int, model: Model) -> Memory:
    """The memory with its counters as after `length` tokens; keys, values and states stay the tensors they are."""
    slots, sinks = memory.index.shape[1], model.config.text.sinks
    tokens = torch.arange(max(0, length - slots), length, device=model.device)
    index = torch.full_like(memory.index, -1)
    index[:, slot(tokens, slots, sinks)] = tokens
    return memory._replace(
        index=index,
        seen=torch.full_like(memory.seen, length),
        clock=torch.full_like(memory.clock, length),
        start=torch.full_like(memory.start, torch.nan),
    )


def cache_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of a memory that keeps `tokens` tokens in every softmax block, its delta states left out."""
    text = config.text
    blocks = sum(mixer == "softmax" for mixer in text.layers)
    return tokens * blocks * 2 * text.num_kv_heads * text.head_dim * dtype.itemsize + 8 * tokens
