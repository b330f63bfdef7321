# SPDX-License-Identifier: Apache-2.0
"""Sharding: the device mesh, the rules from logical axes to mesh axes, and placement of parameters and batches.

Parameters and activations have logical axis names (as in Flax); `LOGICAL_AXIS_RULES` maps them to mesh axes. An axis
whose size is not divisible is not sharded for that array, which is logged once.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import pickle
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lionjax.core import params as trees
from lionjax.core.types import VLM, Array, Batch, Params, UserError

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
    """Number of devices along each mesh axis; at most one may be -1, which takes all remaining devices."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 1

    def shape(self, num_devices: int) -> tuple[int, int, int, int]:
        """(slice, data, fsdp, tensor). Raises UserError if their product is not `num_devices`."""
        sizes = [self.slices, self.data, self.fsdp, self.tensor]
        fixed = int(np.prod([size for size in sizes if size != -1]))
        if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
            raise UserError(f"mesh is {self}; at most one axis can be -1, and the others must be positive")
        if -1 in sizes and num_devices % fixed == 0:
            sizes[sizes.index(-1)] = num_devices // fixed
        if int(np.prod(sizes)) != num_devices:
            raise UserError(f"mesh {self} does not fit {num_devices} devices; set mesh.data=-1 to use all that remain")
        return tuple(sizes)


def make_mesh(config: MeshConfig = MeshConfig(), devices=None) -> Mesh:
    """A mesh with axes slice, data, fsdp, tensor over `devices` (default: all). Raises UserError if it does not fit."""
    devices = jax.devices() if devices is None else list(devices)
    shape = config.shape(len(devices))
    if config.slices > 1 and getattr(devices[0], "slice_index", None) is not None:
        grid = mesh_utils.create_hybrid_device_mesh(
            (1, *shape[1:]), (shape[0], 1, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # Linen's logical constraints fail inside init under Explicit axes, the default of jax.
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


_logged_axes: set[tuple] = set()


def partition_spec(
    logical_axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, array_name: str = "an array"
) -> PartitionSpec:
    """The PartitionSpec of an array by `LOGICAL_AXIS_RULES`, without mesh axes that do not divide its shape."""
    used: set[str] = set()
    parts = []
    for name, size in zip(logical_axes, shape, strict=True):
        mesh_axes = LOGICAL_AXIS_RULES[name] if name is not None else None
        mesh_axes = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
        mesh_axes = tuple(axis for axis in mesh_axes if mesh.shape[axis] > 1 and axis not in used)
        while mesh_axes and size % int(np.prod([mesh.shape[axis] for axis in mesh_axes])):
            if (name, size, mesh_axes) not in _logged_axes:  # once for all arrays with such an axis
                _logged_axes.add((name, size, mesh_axes))
                log.info(
                    "axis %r of size %d is not divisible by mesh axes %s: not sharded (%s, ...)",
                    name,
                    size,
                    " x ".join(mesh_axes),
                    array_name,
                )
            mesh_axes = mesh_axes[:-1]
        used |= set(mesh_axes)
        parts.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None)
    return PartitionSpec(*parts)


def with_logical_constraint(x, *axes: str | None):
    """x with a sharding constraint by its logical axes; x itself outside of `use_mesh`."""
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition_spec(axes, x.shape, mesh, "activation")))


def aligned_group_size(batch_size: int, max_size: int) -> int:
    """A group size that divides `max_size` and the rows of each device, so that no group is split among devices.

    1 if `batch_size` is not divisible by the mesh.
    """
    mesh = current_mesh()
    num_shards = 1 if mesh is None else math.prod(mesh.shape[name] for name in LOGICAL_AXIS_RULES["batch"])
    return math.gcd(max_size, batch_size // num_shards) if batch_size % num_shards == 0 else 1


# A user context is part of the key of jit's cache, so that a program traced for one mesh is not used for another.
_mesh_context = jax.make_user_context(None)


def use_mesh(mesh: Mesh):
    """Context manager that sets the mesh of `with_logical_constraint` while tracing."""
    return _mesh_context(mesh)


def current_mesh() -> Mesh | None:
    """The mesh of the innermost `use_mesh`, or None."""
    return _mesh_context.value


def named_shardings(boxed: Params, mesh: Mesh) -> Params:
    """NamedSharding of each leaf, from leaves boxed with logical axes (as returned by `VLM.init`)."""

    def leaf_sharding(path, leaf):
        name = "/".join(str(part.key) for part in path)
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, partition_spec(leaf.names, leaf.value.shape, mesh, name))

    return jax.tree_util.tree_map_with_path(leaf_sharding, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def layer_axes(boxed: Params) -> dict[str, int]:
    """{path: number of axes that stack layers}, from leaves boxed with logical axes."""
    flat = trees.flatten(boxed)
    return {path: tuple(getattr(leaf, "names", ())).count("layers") for path, leaf in flat.items()}


@functools.partial(jax.jit, static_argnames="model", inline=True)
def _init(model: VLM, key: Array, batch: Batch) -> Params:
    return model.init(key, batch)


def traced_init(model: VLM) -> Callable[[Array, Batch], Params]:
    """`model.init`, traced once for batches of one shape, whatever functions and shardings it is called for.

    Not for use within `use_mesh`, of which the kept trace knows nothing.
    """
    return functools.partial(_init, model)


def abstract_params(init_fn: Callable, *args, mesh: Mesh | None = None) -> Params:
    """Shapes, dtypes and (with a mesh) shardings of `init_fn(*args)` as ShapeDtypeStructs, without allocation."""
    return unbox_specs(jax.eval_shape(init_fn, *args), mesh)


def unbox_specs(boxed: Params, mesh: Mesh | None = None) -> Params:
    """Shapes, dtypes and (with a mesh) shardings of leaves boxed with logical axes, as ShapeDtypeStructs."""
    shapes = nn.unbox(boxed)
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        named_shardings(boxed, mesh),
    )


def init_sharded(init_fn: Callable, *args, mesh: Mesh | None = None, shardings: Params | None = None) -> Params:
    """Parameters of `init_fn(*args)`, each leaf created with its sharding. The values do not depend on the mesh.

    `shardings` of the leaves, where they are known, save one trace of `init_fn`; otherwise they follow from `mesh`.
    """
    if shardings is None and mesh is not None:
        shardings = named_shardings(jax.eval_shape(init_fn, *args), mesh)
    return jax.jit(lambda *a: nn.unbox(init_fn(*a)), out_shardings=shardings)(*args)


def reshard_like(tree: Params, like: Params) -> Params:
    """Arrays of `tree` with the shardings of `like`, a tree of arrays or of ShapeDtypeStructs with shardings."""
    flat, target = trees.flatten(tree), trees.flatten(like)
    return trees.unflatten({path: jax.device_put(leaf, target[path].sharding) for path, leaf in flat.items()})


@functools.lru_cache
def process_shard(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process reads part `index` of `count` equal consecutive parts of every batch.

    Processes whose devices hold the same rows (a tensor axis across hosts) have the same index. Raises UserError for a
    mesh that divides a batch unevenly among processes.
    """
    axes = tuple(mesh.axis_names.index(name) for name in LOGICAL_AXIS_RULES["batch"])
    num_shards = np.prod([mesh.devices.shape[axis] for axis in axes])
    process_shards: dict[int, set[int]] = {}
    for position, device in np.ndenumerate(mesh.devices):
        shard = 0
        for axis in axes:
            shard = shard * mesh.devices.shape[axis] + position[axis]
        process_shards.setdefault(device.process_index, set()).add(shard)
    parts = sorted({tuple(sorted(shards)) for shards in process_shards.values()})
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != num_shards:
        raise UserError(
            f"mesh {dict(mesh.shape)} divides a batch unevenly among {len(process_shards)} processes; set data * fsdp "
            "to a multiple of the number of processes, or keep the tensor axis within a host"
        )
    local = process_shards.get(jax.process_index(), set(parts[0]))
    return parts.index(tuple(sorted(local))), len(parts)


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Global arrays of a batch from this process's part of it (see `process_shard`), sharded along axis 0.

    Raises UserError if there are several processes and the batch size is not divisible by the mesh.
    """
    count, num_shards = process_shard(mesh)[1], int(np.prod([mesh.shape[name] for name in LOGICAL_AXIS_RULES["batch"]]))

    def shard_array(x):
        x = np.asarray(x)
        shape = (x.shape[0] * count, *x.shape[1:])
        if jax.process_count() > 1 and shape[0] % num_shards:
            raise UserError(
                f"batch size {shape[0]} is not divisible by the {num_shards} shards of mesh {dict(mesh.shape)}, which "
                "runs with several processes need; change batch_size or the mesh"
            )
        spec = partition_spec(("batch",) + (None,) * (x.ndim - 1), shape, mesh, "batch")
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x, shape)

    return jax.tree.map(shard_array, batch)


def shard_global_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Global arrays of a batch that every process has whole, sharded along axis 0 if its size is divisible."""
    if mesh.size == 1:
        return batch

    def shard_array(x):
        x = np.asarray(x)
        spec = partition_spec(("batch",) + (None,) * (x.ndim - 1), x.shape, mesh, "batch")
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), x.__getitem__)

    return jax.tree.map(shard_array, batch)


def gather_to_host(tree):
    """The tree with whole numpy arrays in every process; all processes of its mesh must call this."""
    if all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def gather_objects(value: object) -> list:
    """The value of each process, which must be picklable, in the order of the processes; all must call this."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    content = np.frombuffer(pickle.dumps(value), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(content)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(content)] = content
    parts = multihost_utils.process_allgather(padded)
    return [pickle.loads(part[:length].tobytes()) for part, length in zip(parts, lengths)]
