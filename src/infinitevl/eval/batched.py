"""Follow a frame: many streams at once, a row of one memory each: their frames, their stamps, greedy answers of forks.

The steps are those that `stream` and `generate` take for one row; here every row has words and times of its own, so
texts are padded on the left and a row without any is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from infinitevl import processor as pictures
from infinitevl import rope, stream
from infinitevl.memory import Memory
from infinitevl.model import Model
from infinitevl.processor import Ids


@torch.no_grad()
def feed(model: Model, memory: Memory, texts: Sequence[Ids]) -> tuple[Tensor, Memory]:
    """Ids of its own into every row -> hidden of each row's last one [B, D] and the memory.

    A row with text ends its run of frames; one without does not change, and its hidden means nothing.
    """
    longest = max(map(len, texts))
    gaps = torch.tensor([longest - len(ids) for ids in texts], device=model.device)[:, None]
    tokens = torch.tensor([(0,) * (longest - len(ids)) + tuple(ids) for ids in texts], device=model.device)
    present = torch.arange(longest, device=model.device) >= gaps
    positions, begun = rope.next_text(memory, longest)
    begun = begun._replace(start=torch.where(present[:, -1], begun.start, memory.start))
    full = all(len(ids) == longest for ids in texts)  # the shorter path where nothing is padded
    hidden, after = model(model.embed(tokens), positions - gaps, begun, None if full else present)
    assert after is not None
    return hidden[:, -1], after


def observe(model: Model, memory: Memory, pixels: Tensor, times: Sequence[float]) -> Memory:
    """One frame into every row: uint8 [B, H, W, 3] at `times` (seconds, [B]), each after the stamp that is due.

    The rule of `stream.observe`. ValueError where a row's time is before its last one.
    """
    processor = model.processor
    last = [None if time != time else time for time in memory.last.tolist()]  # NaN before any frame
    if any(before is not None and now < before for before, now in zip(last, times, strict=True)):
        raise ValueError(f"times never decrease: {list(times)} after {last}")
    due = [processor.stamp_due(before, now) for before, now in zip(last, times, strict=True)]
    stamps = [() if time is None else processor.stamp_ids(time) for time in due]
    if any(stamps):
        _, memory = feed(model, memory, stamps)
    pixels = pixels.to(model.device)
    size = pictures.fit_frame(pixels.shape[1], pixels.shape[2], processor.config)
    time = torch.tensor(times, dtype=torch.float64, device=model.device)
    return stream.frame_step(model, memory, pictures.resize(pixels, size), time)


@torch.no_grad()
def answers(model: Model, memory: Memory, questions: Sequence[str], at_most: int) -> list[str]:
    """The greedy answer of each row to its question, as `stream.answer` gives it; the memory given is consumed."""
    chat, stops = model.processor.chat, torch.tensor(model.config.stop_tokens, device=model.device)
    hidden, memory = feed(model, memory, [chat.tail(question) for question in questions])
    row = torch.arange(len(questions), device=model.device)  # the question that each row of the memory answers
    going = torch.ones_like(row, dtype=torch.bool)
    said = torch.full((len(questions), at_most), -1, device=model.device)
    for step in range(at_most):
        token = model.logits(hidden).argmax(-1)
        going = going & ~torch.isin(token, stops)
        said[row[going], step] = token[going]
        left = int(going.sum())
        if not left or step + 1 == at_most:
            break
        if 2 * left <= len(row):  # rows that ended are dropped by halves: a row weighs a megabyte
            kept = going.nonzero()[:, 0]
            memory, row, token, going = memory.rows(kept), row[kept], token[kept], going[kept]
        hidden, memory = feed(model, memory, [(each,) for each in token.tolist()])
    texts = ([each for each in ids if each >= 0] for ids in said.tolist())
    return [model.processor.text(ids).strip() for ids in texts]
