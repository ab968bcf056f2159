"""Follow a frame: pixels -> `see` -> visual tokens -> `take` -> a new memory. Tensors in, tensors out.

These are the steps that can be recorded and replayed; `see` needs no memory, so that it can run ahead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infinitevl import processor as pictures
from infinitevl import rope
from infinitevl.memory import Memory
from infinitevl.model import Model
from infinitevl.vision import layout


@torch.no_grad()
def see(model: Model, pixels: Tensor) -> Tensor:
    """uint8 [B, h, w, 3] of the size that the model sees -> visual tokens [B, rows, columns, D]."""
    patches, (rows, columns) = pictures.patchify(pixels, model.processor.config, pair=False)
    merge = model.config.vision.merge_size
    return model.vision(patches, rows, columns).unflatten(1, (rows // merge, columns // merge))


def tables(model: Model, pixels: Tensor) -> tuple[object, ...]:
    """What the steps of frames of this size read from caches. A recorded step knows only where it lies: who records one
    holds it, since the caches may forget it."""
    config = model.processor.config
    rows, columns = (side // config.patch_size for side in pixels.shape[1:3])
    merge = config.merge_size
    return layout(rows, columns, model.config.vision, pixels.device), rope.grid(
        rows // merge, columns // merge, pixels.device
    )


@torch.no_grad()
def take(model: Model, memory: Memory, visual: Tensor, time: Tensor, there: Tensor | None = None) -> Memory:
    """One frame's tokens [B, rows, columns, D] into the memory, at `time` float64 [B] in seconds.

    there: bool [B], the rows that have a frame; None: all. The others stay as they are, bit for bit.
    """
    rows, columns = visual.shape[1:3]
    positions, memory = rope.next_frame(memory, time, rows, columns, model.config, there)
    count = None if there is None else there * positions.shape[2]
    _, after = model(visual.flatten(1, 2), positions, memory, count=count)
    assert after is not None
    return after


def frame_step(model: Model, memory: Memory, pixels: Tensor, time: Tensor, there: Tensor | None = None) -> Memory:
    """`see` and `take`: one frame into the memory."""
    return take(model, memory, see(model, pixels), time, there)
