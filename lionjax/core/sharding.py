# SPDX-License-Identifier: Apache-2.0
"""Where arrays live: the mesh, one table from logical axes to mesh axes, batches onto devices.

Weights and activations name their axes beside their shape; only this file knows what a name means on a mesh. An axis
that does not divide is dropped for that array and said once in the log.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lionjax.core import params as trees
from lionjax.core.types import Batch, Params, UserError

log = logging.getLogger(__name__)

MESH_AXES = ("slice", "data", "fsdp", "tensor")

LOGICAL_AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("slice", "data", "fsdp"),
    "length": None,
    "act_embed": None,
    "act_mlp": "tensor",
    "act_heads": "tensor",
    # weights
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "head": None,
    "vocab": "tensor",
    "layers": None,
    "narrow": None,  # adapter bottlenecks, LoRA ranks
    "position": None,
    "task": None,
    "conv": None,
}

with_logical_partitioning = nn.with_logical_partitioning


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1 and takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 1

    def shape(self, num_devices: int) -> tuple[int, int, int, int]:
        """(slice, data, fsdp, tensor) for a number of devices. Raises UserError when they do not multiply to it."""
        sizes = [self.slices, self.data, self.fsdp, self.tensor]
        known = int(np.prod([size for size in sizes if size != -1]))
        if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
            raise UserError(f"mesh {self} wants at most one axis of -1 and the others positive")
        if -1 in sizes and num_devices % known == 0:
            sizes[sizes.index(-1)] = num_devices // known
        if int(np.prod(sizes)) != num_devices:
            raise UserError(f"mesh {self} does not fit {num_devices} devices; set mesh.data=-1 to take what is left")
        return tuple(sizes)


def make_mesh(config: MeshConfig = MeshConfig(), devices=None) -> Mesh:
    """A mesh with axes slice, data, fsdp, tensor over all (or the given) devices."""
    devices = jax.devices() if devices is None else list(devices)
    shape = config.shape(len(devices))
    if config.slices > 1 and getattr(devices[0], "slice_index", None) is not None:
        grid = mesh_utils.create_hybrid_device_mesh(
            (1, *shape[1:]), (shape[0], 1, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # jax makes Explicit axes by default, under which linen's logical constraints fail inside init.
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


_logged_axes: set[tuple] = set()


def partition_spec(
    logical_axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, array_name: str = "an array"
) -> PartitionSpec:
    """The mesh axes of an array with these logical axes, without those that do not divide its shape."""
    used: set[str] = set()
    parts = []
    for name, size in zip(logical_axes, shape, strict=True):
        wanted = LOGICAL_AXIS_RULES[name] if name is not None else None
        wanted = (wanted,) if isinstance(wanted, str) else wanted or ()
        wanted = tuple(axis for axis in wanted if mesh.shape[axis] > 1 and axis not in used)
        while wanted and size % int(np.prod([mesh.shape[axis] for axis in wanted])):
            if (name, size, wanted) not in _logged_axes:  # once, however many arrays have such an axis
                _logged_axes.add((name, size, wanted))
                axes_of = " x ".join(wanted)
                log.info("%r of %d does not divide over %s: not split there (%s, ...)", name, size, axes_of, array_name)
            wanted = wanted[:-1]
        used |= set(wanted)
        parts.append(wanted if len(wanted) > 1 else wanted[0] if wanted else None)
    return PartitionSpec(*parts)


def with_logical_constraint(x, *axes: str | None):
    """An activation's logical axes, as a hint to the compiler; without a mesh in sight it does nothing."""
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition_spec(axes, x.shape, mesh, "activation")))


def aligned_group_size(batch_size: int, max_size: int) -> int:
    """How many rows of a batch, `most` or fewer, make groups of which no device has only a part."""
    mesh = current_mesh()
    pieces = 1 if mesh is None else math.prod(mesh.shape[name] for name in LOGICAL_AXIS_RULES["batch"])
    return math.gcd(max_size, batch_size // pieces) if batch_size % pieces == 0 else 1


# Of the context that jit's caches look at: a program traced for one mesh is not taken for another.
_mesh_context = jax.make_user_context(None)


def use_mesh(mesh: Mesh):
    """`with sharding.use(mesh):` makes a mesh the one that `constrain` reads while tracing."""
    return _mesh_context(mesh)


def current_mesh() -> Mesh | None:
    """The mesh of the innermost `use`, if any."""
    return _mesh_context.value


def named_shardings(boxed: Params, mesh: Mesh) -> Params:
    """NamedSharding per leaf, from leaves that carry logical axes (as `VLM.init` makes them)."""

    def one(path, leaf):
        name = "/".join(str(part.key) for part in path)
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, partition_spec(leaf.names, leaf.value.shape, mesh, name))

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def layer_axes(boxed: Params) -> dict[str, int]:
    """{path: how many axes of the leaf stack layers}, from leaves that carry logical axes."""
    flat = trees.flatten(boxed)
    return {path: tuple(getattr(leaf, "names", ())).count("layers") for path, leaf in flat.items()}


def abstract_params(init_fn: Callable, *args, mesh: Mesh | None = None) -> Params:
    """Shapes, dtypes and (with a mesh) shardings of what `init(*args)` would make; costs nothing at any size."""
    boxed = jax.eval_shape(init_fn, *args)
    shapes = nn.unbox(boxed)
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, named_shardings(boxed, mesh)
    )


def init_sharded(init_fn: Callable, *args, mesh: Mesh | None = None) -> Params:
    """Run `init(*args)`, each leaf created where it belongs. The values do not depend on the mesh."""
    where = None if mesh is None else named_shardings(jax.eval_shape(init_fn, *args), mesh)
    return jax.jit(lambda *a: nn.unbox(init_fn(*a)), out_shardings=where)(*args)


def reshard_like(tree: Params, like: Params) -> Params:
    """Arrays of one tree laid out as another (of ShapeDtypeStructs with shardings, or arrays)."""
    flat, target = trees.flatten(tree), trees.flatten(like)
    return trees.unflatten({path: jax.device_put(leaf, target[path].sharding) for path, leaf in flat.items()})


@functools.lru_cache
def process_shard(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process reads the index-th of `count` equal shares of every batch, in the batch's order.

    Processes whose devices hold the same rows, as where a tensor axis spans hosts, have the same index. Raises
    UserError for a mesh that cuts a batch unevenly among processes.
    """
    axes = tuple(mesh.axis_names.index(name) for name in LOGICAL_AXIS_RULES["batch"])
    pieces = np.prod([mesh.devices.shape[axis] for axis in axes])
    rows: dict[int, set[int]] = {}
    for where, device in np.ndenumerate(mesh.devices):
        piece = 0
        for axis in axes:
            piece = piece * mesh.devices.shape[axis] + where[axis]
        rows.setdefault(device.process_index, set()).add(piece)
    shares = sorted({tuple(sorted(pieces)) for pieces in rows.values()})
    if len({len(held) for held in shares}) > 1 or sum(map(len, shares)) != pieces:
        raise UserError(
            f"mesh {dict(mesh.shape)} cuts a batch unevenly among {len(rows)} processes; let data * fsdp be a "
            "multiple of the processes, or keep the tensor axis within a host"
        )
    mine = rows.get(jax.process_index(), set(shares[0]))
    return shares.index(tuple(sorted(mine))), len(shares)


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """This process's share of a batch onto the mesh: one global array, split along its first axis.

    Raises UserError where several processes share a batch that does not divide over the mesh.
    """
    count, pieces = process_shard(mesh)[1], int(np.prod([mesh.shape[name] for name in LOGICAL_AXIS_RULES["batch"]]))

    def one(x):
        x = np.asarray(x)
        shape = (x.shape[0] * count, *x.shape[1:])
        if jax.process_count() > 1 and shape[0] % pieces:
            raise UserError(
                f"a batch of {shape[0]} does not divide over {pieces} parts of mesh {dict(mesh.shape)}, which "
                "several processes need; change batch_size or the mesh"
            )
        where = NamedSharding(mesh, partition_spec(("batch",) + (None,) * (x.ndim - 1), shape, mesh, "batch"))
        return jax.make_array_from_process_local_data(where, x, shape)

    return jax.tree.map(one, batch)


def shard_global_batch(batch: Batch, mesh: Mesh) -> Batch:
    """A batch of which every process has all rows onto the mesh, split along its first axis where that divides."""
    if mesh.size == 1:
        return batch

    def one(x):
        x = np.asarray(x)
        where = partition_spec(("batch",) + (None,) * (x.ndim - 1), x.shape, mesh, "batch")
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, where), x.__getitem__)

    return jax.tree.map(one, batch)


def gather_to_host(tree):
    """Arrays as numpy holds them, whole in every process; each must ask."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)
