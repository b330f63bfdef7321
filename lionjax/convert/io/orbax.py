# SPDX-License-Identifier: Apache-2.0
"""An Orbax checkpoint written and read a layer of a shard at a time, so that one tensor is all that memory holds.

Orbax would want every array at once, on devices. Here a leaf is a promise of its layers, and each process writes those
parts that its own devices will hold. What stands on the disk is an ordinary Orbax checkpoint all the same.
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

PARAMS_ITEM, CONFIG_ITEM = "params", "config"  # its items
OCDBT_MANIFEST = "manifest.ocdbt"  # what a folder of arrays begins with

CHUNK_BYTES = 2**22  # bytes of what is packed and unpacked as a whole; a layer of a shard is several
MAX_PENDING_BYTES = 2**24  # bytes on their way to the disk, unless a single layer is more
M_MMAP_THRESHOLD = -3  # glibc's name for the size from which blocks go back to the system when they are freed

ShardIndex = tuple[slice, ...]


def return_freed_memory() -> None:
    """From now on this process gives blocks of a MiB and more back to the system as soon as they are freed.

    glibc raises that limit to 32 MiB by itself, and would keep as much as the largest tensor for TensorStore's threads.
    """
    if hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, 2**20)


@dataclasses.dataclass(frozen=True)
class LazyShardedArray:
    """A leaf that is written layer by layer: `depth` leading axes count layers, `sharding` says who owns what."""

    leaf: LazyTensor
    num_layer_axes: int
    sharding: jax.sharding.Sharding
    tied_layers: Callable[[tuple[int, ...]], tuple] = lambda index: ()  # (name, layer) that must hold the same
    on_part: Callable[[np.ndarray], None] = lambda array: None  # told each part before it is written
    on_layer_done: Callable[[tuple[int, ...]], None] = lambda index: None  # told each layer that has been copied

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape

    @property
    def dtype(self) -> np.dtype:
        return self.leaf.dtype

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of one layer of one shard, which is written at once."""
        return (1,) * self.num_layer_axes + self.sharding.shard_shape(self.shape)[self.num_layer_axes :]

    def iter_layers(self, is_owned: Callable | None = None) -> Iterator[list[tuple[ShardIndex, np.ndarray]]]:
        """For each layer what belongs to this process: where it stands in the leaf, and its numbers.

        Of copies on several devices the first device's process writes. `owned` says of a device whether it counts, by
        default whether it is this process's.
        """
        shards = owned_shards(self.sharding, self.shape, is_owned or _is_local)
        for index in np.ndindex(*self.shape[: self.num_layer_axes]):
            here = [where for where in shards if _contains_layer(where, index)]
            layer = self.leaf.get_layer(index) if here else None
            twins = self.tied_layers(index) if here else ()
            found = []
            for where in here:
                part = layer[where[self.num_layer_axes :]]
                copy = np.empty((1,) * self.num_layer_axes + part.shape, part.dtype)
                copy_bits(copy.reshape(part.shape), part)
                for name, twin in twins:
                    if not bitwise_equal(copy.reshape(part.shape), twin[where[self.num_layer_axes :]]):
                        raise UserError(f"tied tensor {name!r} holds other numbers than its twin")
                self.on_part(copy)
                found.append(((*(slice(i, i + 1) for i in index), *where[self.num_layer_axes :]), copy))
            self.on_layer_done(index)
            yield found


def owned_shards(sharding, shape: tuple[int, ...], is_owned: Callable) -> list[ShardIndex]:
    """The distinct shards of an array whose first device is `owned`, as slices with both ends said."""
    first: dict[tuple, Any] = {}
    for device, where in sharding.devices_indices_map(shape).items():
        ends = tuple(part.indices(size)[:2] for part, size in zip(where, shape))
        first[ends] = min(first.get(ends, device), device, key=lambda one: one.id)
    return [tuple(slice(*end) for end in ends) for ends, one in first.items() if is_owned(one)]


def _is_local(device) -> bool:
    return device.process_index == jax.process_index()


def _contains_layer(shard_index: ShardIndex, index: tuple[int, ...]) -> bool:
    return all(part.start <= i < part.stop for part, i in zip(shard_index, index))


def write_checkpoint(path: Path, arrays: Params, config: dict) -> None:
    """Write a tree of promises and our config as an Orbax checkpoint; all processes together. It appears by rename."""
    import orbax.checkpoint as ocp

    handler = _make_array_handler()
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler), (LazyShardedArray, handler))
    # Trained weights hardly become smaller, and packing them takes longer than all the rest.
    items = {
        PARAMS_ITEM: ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False),
        CONFIG_ITEM: ocp.JsonCheckpointHandler(),
    }
    given = {PARAMS_ITEM: ocp.args.PyTreeSave(arrays), CONFIG_ITEM: ocp.args.JsonSave(config)}
    # The writer begins at once, so the folders have to be there by then.
    there = ocp.AsyncOptions(create_directories_asynchronously=False)
    options = ocp.CompositeOptions(async_options=there)
    whole = ocp.CompositeCheckpointHandler(composite_options=options, **items)
    with ocp.Checkpointer(whole) as writer:
        writer.save(path, args=ocp.args.Composite(**given))


def _make_array_handler():
    """Orbax's writer of arrays, which takes promises: the same files, in the same places, one layer after the other."""
    import orbax.checkpoint as ocp
    import tensorstore

    class Handler(ocp.type_handlers.ArrayHandler):
        async def serialize(self, values, infos, args=None):
            opening, small = [], ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
            for promise, info in zip(values, infos):
                await info.await_path_creation()
                form = (promise.shape, promise.part_shape, promise.dtype)
                spec = ocp.type_handlers.get_json_tspec_write(info, True, *form, jax.process_index(), arg=small)
                opening.append(tensorstore.open(spec, create=True, open=True, context=info.ts_context))
            await _write_parts(zip(await asyncio.gather(*opening), values))
            if jax.process_index() == 0:
                said = {info.name: promise.sharding for promise, info in zip(values, infos)}
                (infos[0].parent_dir / "_sharding").write_text(_sharding_json(said))
            return []

    return Handler()


async def _write_parts(leaves) -> None:
    """Each layer after the other; small ones together, because what is on its way is synced to the disk each time."""
    waiting, size = [], 0
    try:
        for store, promise in leaves:
            for where, part in itertools.chain.from_iterable(promise.iter_layers()):
                for there, here in _chunk_spans(store[where]):
                    waiting.append(there.write(part[here], can_reference_source_data_indefinitely=True))
                    size += part[here].nbytes
                    if size >= MAX_PENDING_BYTES:
                        await asyncio.gather(*waiting)
                        waiting, size = [], 0
        await asyncio.gather(*waiting)
    finally:  # nothing is on its way any more when the folder is cleared away
        await asyncio.gather(*waiting, return_exceptions=True)


def _chunk_spans(view) -> Iterator[tuple[Any, Any]]:
    """Runs of rows of an array on the disk, of about `AT_ONCE` bytes each: (the rows there, where they are here)."""
    chunk = view.chunk_layout.read_chunk.shape
    axis = next((k for k, size in enumerate(view.shape) if size > chunk[k]), None)
    if axis is None:
        yield view, ...
        return
    low, high = view.domain[axis].inclusive_min, view.domain[axis].exclusive_max
    rows = chunk[axis]
    size = math.prod(view.shape) // (high - low) * view.dtype.numpy_dtype.itemsize  # of one row
    step, before = rows * max(1, MAX_PENDING_BYTES // max(1, rows * size)), (slice(None),) * axis
    for begin in range(low // rows * rows, high, step):
        span = max(begin, low), min(begin + step, high)
        yield view[(*before, slice(*span))], (*before, slice(span[0] - low, span[1] - low))


def _sharding_json(shardings: Mapping[str, Any]) -> str:
    """The file in which Orbax keeps how each array was laid out."""
    import orbax.checkpoint as ocp

    said = ocp.metadata.NamedShardingMetadata.from_jax_sharding
    return json.dumps(
        {
            base64.urlsafe_b64encode(name.encode()).decode(): said(one).to_serialized_string()
            for name, one in shardings.items()
        }
    )


# Reading


@dataclasses.dataclass(frozen=True)
class StoredTensor(LazyTensor):
    """A leaf on the disk, of which only those chunks are read that hold what is asked for."""

    store: Any = None

    def __getitem__(self, where) -> np.ndarray:
        try:
            view = self.store[where]
            made = np.empty(view.shape, self.dtype)
            for there, here in _chunk_spans(view):
                made[here] = there.read().result()
            return made
        except ValueError as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"an array of the Orbax checkpoint is damaged: {reason}") from error

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[...], dtype)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is an Orbax checkpoint as `write` makes them."""
    return (path / PARAMS_ITEM / OCDBT_MANIFEST).is_file() and (path / CONFIG_ITEM / "metadata").is_file()


def read_config(path: Path) -> Any:
    """Our config in such a folder. Raises UserError where it cannot be read."""
    file = path / CONFIG_ITEM / "metadata"
    try:
        if file.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError("it is too large")
        return configs.from_json(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}") from error


def open_arrays(path: Path) -> CheckpointTensors:
    """The parameters of such a folder by path; nothing of them is read yet. Raises UserError."""
    import tensorstore

    where = {"driver": "ocdbt", "base": f"file://{path.absolute()}/{PARAMS_ITEM}/"}
    context = tensorstore.Context()
    try:
        keys = tensorstore.KvStore.open(where, context=context).result().list().result()
        names = [key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")]
        opened = {
            name: tensorstore.open(
                {"driver": "zarr", "kvstore": where | {"path": f"{name}/"}, "fill_missing_data_reads": False},
                open=True,
                read=True,
                context=context,
            )
            for name in sorted(names)
        }
        arrays = {name.replace(".", "/"): _stored_tensor(store.result()) for name, store in opened.items()}
    except ValueError as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{path} is a damaged Orbax checkpoint: {reason}") from error
    return CheckpointTensors(arrays, (path,), memory_mapped=False)


def _stored_tensor(store) -> StoredTensor:
    made = StoredTensor(tuple(store.shape), np.dtype(store.dtype.numpy_dtype), lambda index: None, store)
    return dataclasses.replace(made, get_layer=lambda index: made[(*index, ...)])


def load_sharded(tensors: Mapping, like: Params) -> Params:
    """The parameters laid out as `like`; each process reads the chunks of its own shards."""
    plan_params([WeightMapping(path, path) for path in tensors], tensors, (), like)

    def place(path, target):
        leaf = tensors[path]
        return jax.make_array_from_callback(leaf.shape, target.sharding, leaf.__getitem__)

    return trees.unflatten({path: place(path, t) for path, t in trees.flatten(like).items()})


def specs_and_layers(tensors: Mapping, weight_map) -> tuple[dict[str, TensorSpec], TensorSlices]:
    """The form of every parameter, and all of them layer by layer."""
    depth = {path: len(row.index_letters) for row in weight_map for path in row.flax_paths}
    forms = {path: TensorSpec.from_array(leaf) for path, leaf in tensors.items()}
    return forms, (
        (path, index, tensors[path].get_layer(index))
        for path, form in forms.items()
        for index in np.ndindex(*form.shape[: depth[path]])
    )
