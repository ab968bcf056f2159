"""Follow a batch: packed rows -> visual tokens and words as hidden -> through all blocks, recomputed in backward."""

from __future__ import annotations

import contextvars
import functools

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from infinitevl.attention import Where
from infinitevl.model import Model
from infinitevl.processor import patchify, resize
from infinitevl.train.data import Batch, Pictures

PATCHES = 65536  # that the vision encoder sees at once: 64 frames of 448x448, 1,024 of 112x112


def embedded(model: Model, batch: Batch) -> Tensor:
    """Hidden [B, T, D] of a batch before the first block."""
    return model.embed(batch.ids, visual_tokens(model, batch) if batch.pictures else None)


def visual_tokens(model: Model, batch: Batch) -> Tensor:
    """Visual tokens [N, D] of all pictures of a batch, in the order of their places in the rows."""
    seen = [_looked(model, group) for group in batch.pictures]
    return torch.cat(seen)[batch.order]


def _looked(model: Model, group: Pictures) -> Tensor:
    """Pictures of one size -> visual tokens [N, D], as many grids at a time as fit, at least one."""
    patches, grid = patchify(_pixels(group, model.device), model.processor.config, pair=group.pair)
    at_once = max(1, PATCHES // patches.shape[1])
    return torch.cat([model.vision(part, *grid) for part in patches.split(at_once)]).flatten(0, 1)


def _pixels(group: Pictures, device: torch.device) -> Tensor:
    """uint8 [F, *size, 3]; frames of the synthetic world are painted here."""
    if group.pixels is not None:
        return group.pixels
    assert group.painted is not None
    return resize(_composer(device)(group.painted), group.size)


@functools.cache
def _composer(device: torch.device):  # type: ignore[no-untyped-def]  # its module needs the extra [synth]
    from infinitevl.synth.compose import Composer

    return Composer(device)


def place(model: Model, batch: Batch) -> Where:
    """Where the tokens of a batch stand, for its blocks."""
    where = model._where(batch.positions, None, None, batch.segment)[0]
    if where.bounds is not None:  # segments are another number in every batch: a compiled block is one for all
        torch._dynamo.maybe_mark_dynamic(where.bounds, 0)
    return where


def through(model: Model, hidden: Tensor, where: Where, checkpointing: bool) -> Tensor:
    """Hidden [B, T, D] through all blocks and the last norm."""
    again = checkpointing and torch.is_grad_enabled()
    for block in model.blocks:
        if again:
            here = contextvars.copy_context().run  # on CUDA autograd recomputes in threads of its own: pins go with it
            hidden, _ = checkpoint(here, block, hidden, where, None, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden, _ = block(hidden, where, None)
    return model.norm(hidden)


def head_weight(model: Model) -> Tensor:
    """The weight [V, D] that turns hidden into logits."""
    return model.embedding.weight if model.head is None else model.head.weight
