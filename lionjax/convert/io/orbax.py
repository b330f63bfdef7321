# SPDX-License-Identifier: Apache-2.0
"""Read and write Orbax checkpoints one layer of a shard at a time, so that memory holds about one tensor.

Orbax's own writer takes all arrays at once, on devices. Here parameters are lazy arrays, and each process writes the
shards of its own devices. The files on disk are those of an ordinary Orbax checkpoint (OCDBT, zarr).
"""

from __future__ import annotations

import asyncio
import base64
import ctypes
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lionjax.convert.io.reader import MAX_HEADER_BYTES, CheckpointTensors
from lionjax.convert.mapping.apply import LazyTensor, TensorSlices
from lionjax.convert.mapping.plan import TensorSpec, plan_params
from lionjax.core import config as configs
from lionjax.core import params as trees
from lionjax.core.types import Params, UserError
from lionjax.core.weight_map import WeightMapping, bitwise_equal, copy_bits

PARAMS_ITEM, CONFIG_ITEM = "params", "config"  # items of the checkpoint
OCDBT_MANIFEST = "manifest.ocdbt"  # present in every OCDBT folder of arrays

CHUNK_BYTES = 2**22  # of one zarr chunk; a layer of a shard has several
MAX_PENDING_BYTES = 2**24  # of writes in flight, unless a single layer is larger
M_MMAP_THRESHOLD = -3  # glibc mallopt: freed blocks from this size on are returned to the system

ShardIndex = tuple[slice, ...]


def return_freed_memory() -> None:
    """Make this process return freed blocks of 1 MiB and more to the system at once (glibc only).

    By default glibc raises this limit to 32 MiB, so that TensorStore's threads hold on to freed memory.
    """
    if hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, 2**20)


@dataclasses.dataclass(frozen=True)
class LazyShardedArray:
    """A sharded parameter that is written one layer of a shard at a time."""

    leaf: LazyTensor
    num_layer_axes: int  # leading axes that count layers
    sharding: jax.sharding.Sharding
    tied_layers: Callable[[tuple[int, ...]], tuple] = lambda index: ()  # layer -> (name, tied array) to compare with
    on_part: Callable[[np.ndarray], None] = lambda array: None  # called with each part before it is written
    on_layer_done: Callable[[tuple[int, ...]], None] = lambda index: None  # called after a layer is copied

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape

    @property
    def dtype(self) -> np.dtype:
        return self.leaf.dtype

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of one layer of one shard, the unit of writing."""
        return (1,) * self.num_layer_axes + self.sharding.shard_shape(self.shape)[self.num_layer_axes :]

    def iter_layers(self, is_owned: Callable | None = None) -> Iterator[list[tuple[ShardIndex, np.ndarray]]]:
        """Yields, for each layer, the list of (index in the parameter, array) of the shards that this process writes.

        A shard that is replicated on several devices belongs to the first of them. `is_owned` decides whether a device
        counts, by default whether it is one of this process. Raises UserError where a tied tensor differs.
        """
        shards = owned_shards(self.sharding, self.shape, is_owned or _is_local)
        for index in np.ndindex(*self.shape[: self.num_layer_axes]):
            local_shards = [shard_index for shard_index in shards if _contains_layer(shard_index, index)]
            layer = self.leaf.get_layer(index) if local_shards else None
            tied = self.tied_layers(index) if local_shards else ()
            parts = []
            for shard_index in local_shards:
                part = layer[shard_index[self.num_layer_axes :]]
                copy = np.empty((1,) * self.num_layer_axes + part.shape, part.dtype)
                copy_bits(copy.reshape(part.shape), part)
                for name, tied_layer in tied:
                    if not bitwise_equal(copy.reshape(part.shape), tied_layer[shard_index[self.num_layer_axes :]]):
                        raise UserError(f"tied tensor {name!r} holds other values than the tensor it is tied to")
                self.on_part(copy)
                parts.append(((*(slice(i, i + 1) for i in index), *shard_index[self.num_layer_axes :]), copy))
            self.on_layer_done(index)
            yield parts


def owned_shards(sharding, shape: tuple[int, ...], is_owned: Callable) -> list[ShardIndex]:
    """The distinct shards of an array whose first device `is_owned`, as slices with explicit start and stop."""
    first_devices: dict[tuple, Any] = {}
    for device, shard_index in sharding.devices_indices_map(shape).items():
        ends = tuple(part.indices(size)[:2] for part, size in zip(shard_index, shape))
        first_devices[ends] = min(first_devices.get(ends, device), device, key=lambda d: d.id)
    return [tuple(slice(*end) for end in ends) for ends, device in first_devices.items() if is_owned(device)]


def _is_local(device) -> bool:
    return device.process_index == jax.process_index()


def _contains_layer(shard_index: ShardIndex, index: tuple[int, ...]) -> bool:
    return all(part.start <= i < part.stop for part, i in zip(shard_index, index))


def write_checkpoint(path: Path, arrays: Params, config: dict) -> None:
    """Write lazy sharded arrays and the config as an Orbax checkpoint; all processes call this together.

    Orbax renames the folder into place when it is complete.
    """
    import orbax.checkpoint as ocp

    handler = _make_array_handler()
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler), (LazyShardedArray, handler))
    # Compression takes longer than everything else, and trained weights hardly shrink.
    items = {
        PARAMS_ITEM: ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False),
        CONFIG_ITEM: ocp.JsonCheckpointHandler(),
    }
    save_args = {PARAMS_ITEM: ocp.args.PyTreeSave(arrays), CONFIG_ITEM: ocp.args.JsonSave(config)}
    # The array handler writes at once, so the folders must be created before it is called.
    async_options = ocp.AsyncOptions(create_directories_asynchronously=False)
    options = ocp.CompositeOptions(async_options=async_options)
    composite_handler = ocp.CompositeCheckpointHandler(composite_options=options, **items)
    with ocp.Checkpointer(composite_handler) as writer:
        writer.save(path, args=ocp.args.Composite(**save_args))


def _make_array_handler():
    """An Orbax ArrayHandler for `LazyShardedArray`: writes the same files as Orbax, one layer at a time."""
    import orbax.checkpoint as ocp
    import tensorstore

    class LazyArrayHandler(ocp.type_handlers.ArrayHandler):
        async def serialize(self, values, infos, args=None):
            open_requests, save_args = [], ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
            for lazy_array, info in zip(values, infos):
                await info.await_path_creation()
                write_shape = (lazy_array.shape, lazy_array.part_shape, lazy_array.dtype)
                spec = ocp.type_handlers.get_json_tspec_write(
                    info, True, *write_shape, jax.process_index(), arg=save_args
                )
                open_requests.append(tensorstore.open(spec, create=True, open=True, context=info.ts_context))
            await _write_parts(zip(await asyncio.gather(*open_requests), values))
            if jax.process_index() == 0:
                shardings = {info.name: lazy_array.sharding for lazy_array, info in zip(values, infos)}
                (infos[0].parent_dir / "_sharding").write_text(_sharding_json(shardings))
            return []

    return LazyArrayHandler()


async def _write_parts(leaves) -> None:
    """Write all layers in order, batching small ones, because every gather syncs to disk."""
    pending, size = [], 0
    try:
        for store, lazy_array in leaves:
            for shard_index, part in itertools.chain.from_iterable(lazy_array.iter_layers()):
                for chunk, part_index in _chunk_spans(store[shard_index]):
                    pending.append(chunk.write(part[part_index], can_reference_source_data_indefinitely=True))
                    size += part[part_index].nbytes
                    if size >= MAX_PENDING_BYTES:
                        await asyncio.gather(*pending)
                        pending, size = [], 0
        await asyncio.gather(*pending)
    finally:  # no write may be in flight when the folder is removed after an error
        await asyncio.gather(*pending, return_exceptions=True)


def _chunk_spans(view) -> Iterator[tuple[Any, Any]]:
    """Yields (view of the stored rows, their index in the array in memory), about MAX_PENDING_BYTES at a time."""
    chunk = view.chunk_layout.read_chunk.shape
    axis = next((k for k, size in enumerate(view.shape) if size > chunk[k]), None)
    if axis is None:
        yield view, ...
        return
    low, high = view.domain[axis].inclusive_min, view.domain[axis].exclusive_max
    rows = chunk[axis]
    size = math.prod(view.shape) // (high - low) * view.dtype.numpy_dtype.itemsize  # bytes of one row
    step, before = rows * max(1, MAX_PENDING_BYTES // max(1, rows * size)), (slice(None),) * axis
    for begin in range(low // rows * rows, high, step):
        span = max(begin, low), min(begin + step, high)
        yield view[(*before, slice(*span))], (*before, slice(span[0] - low, span[1] - low))


def _sharding_json(shardings: Mapping[str, Any]) -> str:
    """Contents of Orbax's `_sharding` file: {base64 of the array's name: its sharding}."""
    import orbax.checkpoint as ocp

    metadata_of = ocp.metadata.NamedShardingMetadata.from_jax_sharding
    return json.dumps(
        {
            base64.urlsafe_b64encode(name.encode()).decode(): metadata_of(sharding).to_serialized_string()
            for name, sharding in shardings.items()
        }
    )


# Reading


@dataclasses.dataclass(frozen=True)
class StoredTensor(LazyTensor):
    """A parameter on disk; indexing reads only the chunks that the index covers."""

    store: Any = None

    def __getitem__(self, where) -> np.ndarray:
        try:
            view = self.store[where]
            array = np.empty(view.shape, self.dtype)
            for chunk, array_index in _chunk_spans(view):
                array[array_index] = chunk.read().result()
            return array
        except ValueError as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"an array of the Orbax checkpoint is damaged: {reason}") from error

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[...], dtype)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is an Orbax checkpoint with the items of `write_checkpoint`."""
    return (path / PARAMS_ITEM / OCDBT_MANIFEST).is_file() and (path / CONFIG_ITEM / "metadata").is_file()


def read_config(path: Path) -> Any:
    """The lionjax config of such a checkpoint. Raises UserError where it is damaged or too large."""
    file = path / CONFIG_ITEM / "metadata"
    try:
        if file.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError(f"it is larger than {MAX_HEADER_BYTES:,} bytes")
        return configs.from_json(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}") from error


def open_arrays(path: Path) -> CheckpointTensors:
    """The parameters of such a checkpoint by path, read on access. Raises UserError where it is damaged."""
    import tensorstore

    kvstore = {"driver": "ocdbt", "base": f"file://{path.absolute()}/{PARAMS_ITEM}/"}
    context = tensorstore.Context()
    try:
        keys = tensorstore.KvStore.open(kvstore, context=context).result().list().result()
        names = [key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")]
        stores = {
            name: tensorstore.open(
                {"driver": "zarr", "kvstore": kvstore | {"path": f"{name}/"}, "fill_missing_data_reads": False},
                open=True,
                read=True,
                context=context,
            )
            for name in sorted(names)
        }
        arrays = {name.replace(".", "/"): _stored_tensor(store.result()) for name, store in stores.items()}
    except ValueError as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{path} is a damaged Orbax checkpoint: {reason}") from error
    return CheckpointTensors(arrays, (path,), memory_mapped=False)


def _stored_tensor(store) -> StoredTensor:
    stored = StoredTensor(tuple(store.shape), np.dtype(store.dtype.numpy_dtype), lambda index: None, store)
    return dataclasses.replace(stored, get_layer=lambda index: stored[(*index, ...)])


def load_sharded(tensors: Mapping, like: Params) -> Params:
    """The parameters as jax.Arrays with the shardings of `like`; each process reads the chunks of its own shards.

    Raises UserError where `tensors` and `like` differ.
    """
    plan_params([WeightMapping(path, path) for path in tensors], tensors, (), like)

    def make_leaf(path, target):
        leaf = tensors[path]
        return jax.make_array_from_callback(leaf.shape, target.sharding, leaf.__getitem__)

    return trees.unflatten({path: make_leaf(path, target) for path, target in trees.flatten(like).items()})


def specs_and_layers(tensors: Mapping, weight_map) -> tuple[dict[str, TensorSpec], TensorSlices]:
    """({path: spec}, iterator over (path, layer index, array) of all parameters)."""
    depth = {path: len(mapping.index_letters) for mapping in weight_map for path in mapping.flax_paths}
    specs = {path: TensorSpec.from_array(leaf) for path, leaf in tensors.items()}
    return specs, (
        (path, index, tensors[path].get_layer(index))
        for path, spec in specs.items()
        for index in np.ndindex(*spec.shape[: depth[path]])
    )
