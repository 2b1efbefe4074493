"""Sharded parameters: the part of a tensor on this process, and the whole tensor.

FSDP2 turns parameters into DTensors. Stages choose (masks, clusters) from whole tensors, the same
on every process, and project local parts. All functions return a tensor that is not sharded as it
is.
"""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = [
    "gather",
    "local",
    "of_first",
    "processes",
    "reduce_",
    "shard",
    "shared_seed",
    "stack",
    "unstack",
    "whole",
]

T = TypeVar("T")


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor; a collective operation."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of a whole tensor that belongs to this process's part of a parameter."""
    if not isinstance(parameter, DTensor):
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    # Every process has the whole tensor, so nothing needs to be sent.
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()


def gather(part: Tensor, parameter: Tensor) -> Tensor:
    """Return the whole tensor of which :func:`shard` made parts; a collective operation."""
    if not isinstance(parameter, DTensor):
        return part
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(part, mesh, placements, shape=shape, stride=stride).full_tensor()


def reduce_(sums: Tensor, parameter: Tensor) -> Tensor:
    """Sum in place, over all processes, what each computed from its part of a parameter."""
    if isinstance(parameter, DTensor):
        for dimension, placement in enumerate(parameter.placements):
            if placement.is_shard():
                dist.all_reduce(sums, group=parameter.device_mesh.get_group(dimension))
    return sums


def processes() -> tuple[int, int]:
    """Return this process's rank, and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def stack(tensor: Tensor) -> Tensor:
    """Return the tensors of all processes along a new first dimension."""
    _, world = processes()
    if world == 1:
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(world)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


def unstack(parts: Tensor) -> Tensor | None:
    """Return this process's entry of a stack, or None if it is of another number of processes."""
    rank, world = processes()
    return parts[rank] if len(parts) == world else None


def of_first(value: T) -> T:
    """Return the first process's value; a collective operation."""
    values = [value]
    if processes()[1] > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def shared_seed() -> int:
    """Return the seed of the first process's random numbers; a collective operation."""
    return of_first(torch.initial_seed())
