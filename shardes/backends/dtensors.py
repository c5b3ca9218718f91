"""DTensors, in which FSDP2 and tensor parallelism keep their shards: their meshes and their layouts."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from shardes.backends.layout import Layout, Split
from shardes.distributed.group import Group


def make_device_mesh(group: Group, *, axis: str) -> DeviceMesh:
    """Make a one-dimensional mesh named ``axis`` of a group's ranks, over the group's own communicator."""
    process_group = group.process_group or dist.group.WORLD
    assert process_group is not None, "a mesh needs a process group, even of one rank"
    return DeviceMesh.from_group(process_group, group.device.type, mesh_dim_names=(axis,))


def layout_of(parameter: torch.Tensor, *, world_size: int) -> Layout:
    """Return the layout of a DTensor over its mesh; a plain tensor is whole on each of ``world_size`` ranks.

    Raises:
        RuntimeError: A placement does not tell which elements a rank owns.
    """
    shape = tuple(parameter.shape)
    if not isinstance(parameter, DTensor):
        return Layout(shape, (world_size,), (None,))
    splits = tuple(_split(placement, parameter.ndim) for placement in parameter.placements)
    return Layout(shape, tuple(parameter.device_mesh.shape), splits)


def layouts_of(parameters: Iterable[tuple[str, torch.Tensor]], *, world_size: int) -> dict[str, Layout]:
    """Return the layouts of named parameters, as ``layout_of`` does."""
    return {name: layout_of(parameter, world_size=world_size) for name, parameter in parameters}


def local_tensors(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return this rank's part of each DTensor, or the whole of each plain tensor, as flat views."""
    return {
        name: (part.to_local() if isinstance(part, DTensor) else part).detach().view(-1)
        for name, part in parameters.items()
    }


def _split(placement: Any, num_dims: int) -> Split | None:
    if placement.is_replicate():
        return None
    if not hasattr(placement, "dim"):
        raise RuntimeError(f"a parameter is placed as {placement}, which does not say who owns what")
    # Only torch's strided shards have a split_factor: the number of pieces that are split alike.
    return Split(placement.dim % max(1, num_dims), getattr(placement, "split_factor", 1))
