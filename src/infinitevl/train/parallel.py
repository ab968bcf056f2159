"""Processes that train together: torchrun's environment, FSDP2 over the text blocks, sums over all of them.

Only blocks are sharded, each for itself, so that stage 1a may run one without the others. What is outside of them
(mostly frozen) and what must stay float32 beside bfloat16 (A_log and dt_bias; FSDP2 wants one dtype in a group) is held
whole by every process; its gradients are summed here.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from infinitevl.model import Model
from infinitevl.train.recipes import RecipeError


class World(NamedTuple):
    """Who trains: this process's rank, how many there are, its device, and the mesh of all where they are several."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0


@contextmanager
def world(device: str) -> Iterator[World]:
    """The processes that torchrun started, or this one alone; device "cuda", "cpu", or empty for what there is.

    A process group that is there already is used, and left. Raises RecipeError for a device that is not there.
    """
    rank, size, local = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    where = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"), local)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    begun = size > 1 and not dist.is_initialized()
    if begun:
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    mesh = init_device_mesh(where.type, (size,)) if size > 1 else None
    try:
        yield World(rank, size, where, mesh)
    finally:
        if mesh is not None:
            _release(mesh)
        if begun:
            dist.destroy_process_group()


def _release(mesh: DeviceMesh) -> None:
    """Let go of the process group: gloo's threads end with what holds it, and abort a process that ends before them."""
    gc.collect()  # FSDP2's states hold it, in cycles
    # torch 2.13: DTensor's caches hold the mesh for good, and the mesh holds the group, which nothing public undoes
    getattr(mesh, "_pg_registry", {}).clear()


def _device(kind: str, local: int) -> torch.device:
    """The device of the process that is the `local`-th of its machine."""
    try:
        where = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that it does not know or have
        raise RecipeError(f"device={kind}: {' '.join(str(error).split())}") from error
    return where


def shard(model: Model, world: World) -> None:
    """Split every text block over the processes. Gradients are reduced in float32."""
    if world.mesh is None:
        return
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        whole = {parameter for name, parameter in block.named_parameters() if name.endswith(("A_log", "dt_bias"))}
        fully_shard(block, mesh=world.mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=whole)


def is_split(tensor: Tensor) -> bool:
    """Whether this process holds only its part of a tensor."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, split: Tensor) -> Tensor:
    """A local part as a tensor split as `split` is, for torch's distributed checkpoint."""
    if not isinstance(split, DTensor):
        return part
    return DTensor.from_local(
        part, split.device_mesh, split.placements, run_check=False, shape=split.shape, stride=split.stride()
    )


def part(tensor: Tensor, split: Tensor) -> Tensor:
    """This process's part of a whole tensor, where it is split as `split` is."""
    if not isinstance(split, DTensor):
        return tensor
    on_device = tensor.to(split.device)
    return distribute_tensor(on_device, split.device_mesh, split.placements, src_data_rank=None).to_local()


def summed(tensor: Tensor, world: World) -> Tensor:
    """A tensor summed over all processes, in place."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def norm(parts: Iterable[Tensor], wholes: Iterable[Tensor], world: World) -> Tensor:
    """The norm of all gradients: `parts` split over the processes, `wholes` the same on each. float32."""
    squares = summed(_squares(parts, world), world)
    return (squares + _squares(wholes, world)).sqrt()


def _squares(tensors: Iterable[Tensor], world: World) -> Tensor:
    held = [tensor for tensor in tensors if tensor.numel()]  # a process may have no part of a short tensor
    if not held:
        return torch.zeros((), device=world.device)
    return torch.stack(torch._foreach_norm(held)).square().sum()


def gathered(value: Any, world: World) -> list[Any]:
    """A plain value of every process, in their order."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def wait(world: World) -> None:
    """Until every process is here."""
    if world.size > 1:
        dist.barrier()
