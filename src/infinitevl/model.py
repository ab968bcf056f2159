"""Follow a frame: visual tokens [B, T, D] and their positions go through the blocks -> hidden and a new memory.

One class for the published model, its Transformer teacher and the tiny one: the layer pattern is data.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from infinitevl import memory as memories
from infinitevl import ops
from infinitevl.attention import SoftmaxMixer
from infinitevl.config import SOFTMAX, ModelConfig, TextConfig
from infinitevl.delta import DeltaMixer
from infinitevl.layers import GatedMLP, RMSNorm
from infinitevl.memory import Delta, Memory, Window
from infinitevl.ops import flash, fp8
from infinitevl.ops.where import Placed, Where
from infinitevl.processor import Processor
from infinitevl.rope import Angles, angles
from infinitevl.vision import Vision, VisionAttention

INIT_STD = 0.02


class CapacityError(ValueError):
    """A model without a window was fed more tokens than its memory was made for."""


class Block(nn.Module):
    """Pre-norm residual block: a mixer looks back, an MLP thinks."""

    def __init__(self, config: TextConfig, mixer: str) -> None:
        super().__init__()
        self.norm_mixer = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = SoftmaxMixer(config) if mixer == SOFTMAX else DeltaMixer(config)
        self.norm_mlp = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False)

    def forward(
        self, hidden: Tensor, where: Where, state: Window | Delta | None
    ) -> tuple[Tensor, Window | Delta | None]:
        """hidden [B, T, D] and the block's part of the memory -> the same, one block later; both are consumed."""
        hidden, state = self.mixer(hidden, self.norm_mixer, where, state)
        return self.mlp(hidden, self.norm_mlp), state


class Model(nn.Module):
    """Embedding, vision encoder, blocks, head. `config` says its shape; `processor` how a checkpoint is fed."""

    def __init__(self, config: ModelConfig, processor: Processor | None = None) -> None:
        super().__init__()
        self.config = config
        self._processor = processor
        text = config.text
        self.vision = Vision(config.vision)
        self.embedding = nn.Embedding(text.vocab_size, text.hidden_size)
        self.blocks = nn.ModuleList(Block(text, mixer) for mixer in text.layers)
        self.norm = RMSNorm(text.hidden_size, text.norm_eps)
        self.head = None if text.tied_head else nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.apply(_initialise)

    @property
    def processor(self) -> Processor:
        """The checkpoint's processor. Raises ValueError for a model made from a bare config."""
        if self._processor is None:
            raise ValueError("this model has no processor: load it from a checkpoint, or make Model(config, processor)")
        return self._processor

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def fuse(self) -> Model:
        """Lay weights that read one input side by side, and pad what the hardware wants padded; returns the model.

        Parameters become views: names, shapes and saved files stay. Call it after the last move to a device or dtype,
        which undoes it, and before a step is recorded, which reads the weights where they lie.
        """
        for module in self._laid_out():
            module.fuse()
        return self

    def to_fp8(self) -> Model:
        """Lay e4m3 copies of the weights of all blocks, of vision and text, beside them; returns the model.

        Products then round their factors to 3 bits of mantissa: faster, and about 3.5 % away each (`ops.fp8`). Names
        and saved files stay, since the parameters do: it takes half their bytes more. Call it last, after `fuse` and
        the last move: what undoes a layout undoes this, and where gradients are enabled or a parameter was changed the
        parameters themselves are used. Raises Fp8Error where the hardware, the dtype or a width does not allow it.
        """
        fp8.check(self.device, self.dtype)
        for module in self._laid_out():
            module.to_fp8()
        return self

    def _laid_out(self) -> list[GatedMLP | SoftmaxMixer | DeltaMixer | VisionAttention]:
        """The modules whose weights have a layout."""
        kinds = GatedMLP | SoftmaxMixer | DeltaMixer | VisionAttention
        return [module for module in self.modules() if isinstance(module, kinds)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Model:
        super()._apply(fn, recurse)
        here = (self.device, self.dtype)
        for module in self.modules():
            for name in ("joint", "wide"):
                joint = getattr(module, name, None)
                if joint is not None and (joint.parts[0][0].device, joint.parts[0][0].dtype) != here:
                    setattr(module, name, None)  # a layout left behind would keep its memory
        return self

    def empty_memory(self, batch: int = 1, capacity: int | None = None) -> Memory:
        """A memory of this model that has seen nothing, on its device; `capacity` as in `Memory.empty`."""
        return Memory.empty(self.config, batch, capacity=capacity, device=self.device, dtype=self.dtype)

    def embed(self, ids: Tensor, visual: Tensor | None = None) -> Tensor:
        """ids [B, T] -> [B, T, D]; image and video tokens are replaced, in order, by the rows of `visual` [N, D].

        Raises ValueError where their numbers differ.
        """
        hidden = self.embedding(ids)
        if visual is None:
            return hidden
        place = (ids == self.config.image_token) | (ids == self.config.video_token)
        if int(place.sum()) != len(visual):
            raise ValueError(f"the prompt has {int(place.sum())} visual tokens, the pictures {len(visual)}")
        return hidden.masked_scatter(place[..., None], visual.to(hidden.dtype))

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        memory: Memory | None = None,
        present: Tensor | None = None,
        segment: Tensor | None = None,
        count: Tensor | None = None,
    ) -> tuple[Tensor, Memory | None]:
        """One chunk through all blocks.

        hidden [B, T, D] (from `embed` or `vision`); positions [3, B, T]; which tokens are there: present, bool [B, T],
        or count, int64 [B], the first so many of each row (the shorter path), or neither: all; segment [B, T], only
        without a memory: packed training -> hidden [B, T, D] after the last norm, and the memory with the chunk in it
        (None stays None; the one given is consumed).
        """
        where, memory = self._where(positions, memory, present, segment, count)
        states = []
        # blocks add to it in place; the caller's stays as it is
        hidden = hidden.clone(memory_format=torch.contiguous_format)
        for number, block in enumerate(self.blocks):
            hidden, state = block(hidden, where, None if memory is None else memory.blocks[number])
            states.append(state)
        if memory is not None:
            memory = memory._replace(blocks=tuple(states))
        return self.norm(hidden), memory

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., vocab]. Call it only on the tokens whose successor is wanted."""
        return nn.functional.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)

    def _where(
        self,
        positions: Tensor,
        memory: Memory | None,
        present: Tensor | None,
        segment: Tensor | None,
        count: Tensor | None = None,
    ) -> tuple[Where, Memory | None]:
        """Indices, rotations and ring slots of a chunk, and the memory with all but its blocks brought up to date."""
        if present is not None and count is not None:
            raise ValueError("tokens are there by `present` or by `count`, not by both")
        turns, length = angles(positions, self.config.text), positions.shape[2]
        if memory is None:
            return self._alone(turns, positions, present if count is None else _first(count, length), segment), None
        if segment is not None:
            raise ValueError("segments are for packed training: they go without a memory")
        order, place = _ordered(present), partial(ops.place, count=count)
        if present is not None:
            place, count = partial(_place, present=present), present.sum(1)
        elif count is not None:
            present = _first(count, length)
        self._check_capacity(memory, length if count is None else count)
        placed = place(
            positions=positions,
            seen=memory.seen,
            clock=memory.clock,
            held=memory.index,
            sinks=self.config.text.sinks,
        )
        where = Where(*turns, placed.index, present, order, count, None, memory.seen, memory.index, placed.target)
        return where, memory._replace(index=placed.held, seen=placed.seen, clock=placed.clock)

    def _alone(self, turns: Angles, positions: Tensor, present: Tensor | None, segment: Tensor | None) -> Where:
        """Where the tokens of a chunk without a memory stand."""
        rows, length = positions.shape[1:]
        if present is None:
            step = torch.arange(length, device=positions.device).expand(rows, -1)
        else:
            step = present.long().cumsum(1) - 1
        if segment is not None:
            segment = _filled(segment, present)
            step = _since_segment(step, segment)
        count = None if present is None else present.sum(1)
        index = step if present is None else torch.where(present, step, -1)
        bounds = flash.bounds(segment) if segment is not None and segment.is_cuda and present is None else None
        return Where(*turns, index, present, _ordered(present), count, segment, bounds=bounds)

    def _check_capacity(self, memory: Memory, count: int | Tensor) -> None:
        """Only a model without a window can be full. A step that is being recorded cannot look: who records one counts
        its tokens."""
        recording = memory.seen.is_cuda and torch.cuda.is_current_stream_capturing()
        if self.config.text.window is None and not recording:
            most = int((memory.seen + count).max())
            if most > memory.index.shape[1]:
                room = memory.index.shape[1]
                raise CapacityError(f"{most} tokens do not fit a memory made for {room}: make a larger one (capacity=)")


def _place(*, positions: Tensor, seen: Tensor, clock: Tensor, held: Tensor, sinks: int, present: Tensor) -> Placed:
    """As `ops.place`, for a chunk of which the tokens marked in `present` [B, T] are there."""
    step = present.long().cumsum(1) - 1
    index = torch.where(present, seen[:, None] + step, -1)
    latest = torch.where(present, positions.amax(0), -1).amax(1)
    target = memories.target_slots(index, held, sinks)
    held = memories.write(held, target, index)
    return Placed(index, target, held, seen + present.sum(1), torch.maximum(clock, latest + 1))


def _first(count: Tensor, length: int) -> Tensor:
    """Which of `length` tokens are there, bool [B, length]: the first `count` [B] of each row."""
    return torch.arange(length, device=count.device) < count[:, None]


def _ordered(present: Tensor | None) -> Tensor | None:
    """Place of the j-th token that is there [B, T]; those that are not come last."""
    return None if present is None else torch.argsort((~present).to(torch.int8), dim=1, stable=True)


def _filled(segment: Tensor, present: Tensor | None) -> Tensor:
    """segment [B, T] with tokens that are not there put into the segment before them, so that they separate nothing."""
    if present is None:
        return segment
    place = torch.arange(segment.shape[1], device=segment.device)
    latest = torch.where(present, place, -1).cummax(1).values
    first = present.long().argmax(1, keepdim=True)
    return segment.gather(1, torch.where(latest < 0, first, latest))


def _since_segment(step: Tensor, segment: Tensor) -> Tensor:
    """step [B, T] counted from the first token of each segment: every one has sinks of its own."""
    begins = segment != segment.roll(1, dims=1)
    return step - torch.where(begins, step, 0).clamp(min=0).cummax(1).values


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
