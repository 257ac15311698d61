"""Sharding reads like the mathematics: arrays have logical axes, one table maps them to mesh axes.

A weight's `embed` may be sharded where an activation's `act_embed` is not, so the two have names of
their own. Everything else is `jax.jit` with shardings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from core.errors import UserError
from core.options import MeshConfig

AXES = ("data", "fsdp", "tensor", "context", "expert")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # parameters
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": "expert",
    "norm": None,
    # activations
    "act_batch": ("data", "fsdp", "expert"),
    "act_seq": "context",
    "act_stream": ("context", "tensor"),  # the sequence between products, where no heads or mlp are divided
    "act_embed": None,
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_head_dim": None,
    "act_mlp": "tensor",
    "act_vocab": "tensor",
    "act_experts": "expert",
    "act_slots": ("data", "fsdp", "context"),  # rows of an expert, wherever their tokens came from
    "act_slot_stream": ("data", "fsdp", "context", "tensor"),  # the same between products
}


def make_mesh(options: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The device mesh, every axis of `AXES` present.

    Raises:
        UserError: if the axes' product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = options.sizes(len(devices), devices[0].platform)
    shape = tuple(sizes[axis] for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes of an array whose dimensions have the logical names `axes`.

    Raises:
        ValueError: if two dimensions fall on one mesh axis.
    """
    entries = [RULES[axis] if axis is not None else None for axis in axes]
    used = [name for axis in axes if axis is not None for name in mesh_axes(axis)]
    if len(used) != len(set(used)):
        raise ValueError(f"the logical axes {tuple(axes)} collide on one mesh axis: {entries}")
    return PartitionSpec(*entries)


def mesh_axes(axis: str) -> tuple[str, ...]:
    """The mesh axes that a logical axis is divided over."""
    entry = RULES[axis] or ()
    return (entry,) if isinstance(entry, str) else entry


def shardings(mesh: Mesh | AbstractMesh, axes: Any) -> Any:
    """Turn a pytree of tuples of logical names into a pytree of `NamedSharding`."""
    return jax.tree.map(
        lambda names: NamedSharding(mesh, spec(names)), axes, is_leaf=lambda x: isinstance(x, tuple)
    )


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain an activation's sharding under `jax.set_mesh`; without a mesh, `x` itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def num_shards(axis: str) -> int:
    """How many pieces a logical axis is divided into under `jax.set_mesh`; without a mesh, one."""
    return mesh_parts(jax.sharding.get_abstract_mesh(), axis)


def mesh_parts(mesh: Mesh | AbstractMesh, axis: str) -> int:
    """How many pieces a logical axis is divided into on `mesh`."""
    return math.prod(mesh.shape.get(name, 1) for name in mesh_axes(axis))


def local_rows(mesh: Mesh, size: int) -> slice:
    """The rows of a global batch of `size` rows that this process's devices hold."""
    places = shardings(mesh, ("act_batch",)).addressable_devices_indices_map((size,)).values()
    spans = [rows.indices(size) for (rows,) in places]
    return slice(min(start for start, _, _ in spans), max(stop for _, stop, _ in spans))


def put_rows(batch: Any, mesh: Mesh, axes: tuple[str, ...] = ("act_batch",)) -> Any:
    """This process's rows of a batch (NumPy), as `local_rows` names them, as global arrays on the mesh.

    Args:
        axes: logical axes of the arrays, from the first dimension on. The rows are whole; where another
            dimension is divided too, a device takes its own part of them.
    """
    sharding = shardings(mesh, axes)
    parts = mesh_parts(mesh, axes[0])
    mine = local_rows(mesh, parts)  # in units of a device's rows

    def put(rows):
        size = len(rows) // (mine.stop - mine.start)
        total, before = parts * size, mine.start * size

        def piece(index):
            start, stop, _ = index[0].indices(total)
            return rows[(slice(start - before, stop - before), *index[1:])]

        return jax.make_array_from_callback((total, *rows.shape[1:]), sharding, piece)

    return jax.tree.map(put, batch)


def check_divides(mesh: Mesh | AbstractMesh, sizes: Mapping[str, tuple[str, int]]) -> None:
    """Check that named sizes divide over the mesh, `sizes` being {key: (logical axis, size)}.

    Raises:
        UserError: naming the key, its size and the mesh axes.
    """
    for key, (axis, size) in sizes.items():
        names = mesh_axes(axis)
        parts = mesh_parts(mesh, axis)
        if size % parts:
            where = " x ".join(f"mesh.{name}={mesh.shape[name]}" for name in names)
            raise UserError(f"{key} ({size}) does not divide over {where}: choose one that does")
