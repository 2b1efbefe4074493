"""Sharded parameters: the part of a tensor that this process holds, and the whole of it.

FSDP2 turns parameters into DTensors. Methods choose (masks, clusters) from whole tensors, the same
on every process, and act on local ones. Of a plain tensor all functions return it as it is.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["gather", "local", "processes", "reduce_", "shard", "stack", "unstack", "whole"]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process has to take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The part of a whole tensor that belongs to this process's part of a parameter."""
    if not isinstance(parameter, DTensor):
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    # Every process has the whole: nothing needs to be sent.
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()


def gather(part: Tensor, parameter: Tensor) -> Tensor:
    """The whole of a tensor that :func:`shard` cut; every process has to take part."""
    if not isinstance(parameter, DTensor):
        return part
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(part, mesh, placements, shape=shape, stride=stride).full_tensor()


def reduce_(sums: Tensor, parameter: Tensor) -> Tensor:
    """Add up, in place, what each process summed over its part of a parameter."""
    if isinstance(parameter, DTensor):
        for dimension, placement in enumerate(parameter.placements):
            if placement.is_shard():
                dist.all_reduce(sums, group=parameter.device_mesh.get_group(dimension))
    return sums


def processes() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def stack(tensor: Tensor) -> Tensor:
    """What every process has of its own, one behind the other."""
    _, world = processes()
    if world == 1:
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(world)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


def unstack(parts: Tensor) -> Tensor | None:
    """This process's part of what :func:`stack` gathered, if there were as many processes."""
    rank, world = processes()
    return parts[rank] if len(parts) == world else None
