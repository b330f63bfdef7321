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

from lionjax.convert.io.reader import HEADER_LIMIT, Tensors
from lionjax.convert.mapping.apply import Computed, Parts
from lionjax.convert.mapping.plan import Form, plan_params
from lionjax.core import config as configs
from lionjax.core import params as trees
from lionjax.core.types import Params, UserError
from lionjax.core.weight_map import Row, copy_bits, same_numbers

PARAMS, CONFIG = "params", "config"  # its items
MANIFEST = "manifest.ocdbt"  # what a folder of arrays begins with

CHUNK = 2**22  # bytes of what is packed and unpacked as a whole; a layer of a shard is several
AT_ONCE = 2**24  # bytes on their way to the disk, unless a single layer is more
M_MMAP_THRESHOLD = -3  # glibc's name for the size from which blocks go back to the system when they are freed

Where = tuple[slice, ...]


def return_freed_memory() -> None:
    """From now on this process gives blocks of a MiB and more back to the system as soon as they are freed.

    glibc raises that limit to 32 MiB by itself, and would keep as much as the largest tensor for TensorStore's threads.
    """
    if hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, 2**20)


@dataclasses.dataclass(frozen=True)
class Promise:
    """A leaf that is written layer by layer: `depth` leading axes count layers, `sharding` says who owns what."""

    leaf: Computed
    depth: int
    sharding: jax.sharding.Sharding
    twins: Callable[[tuple[int, ...]], tuple] = lambda index: ()  # (name, layer) that must hold the same
    seen: Callable[[np.ndarray], None] = lambda array: None  # told each part before it is written
    done: Callable[[tuple[int, ...]], None] = lambda index: None  # told each layer that has been copied

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape

    @property
    def dtype(self) -> np.dtype:
        return self.leaf.dtype

    @property
    def part(self) -> tuple[int, ...]:
        """The shape of one layer of one shard, which is written at once."""
        return (1,) * self.depth + self.sharding.shard_shape(self.shape)[self.depth :]

    def parts(self, owned: Callable | None = None) -> Iterator[list[tuple[Where, np.ndarray]]]:
        """For each layer what belongs to this process: where it stands in the leaf, and its numbers.

        Of copies on several devices the first device's process writes. `owned` says of a device whether it counts, by
        default whether it is this process's.
        """
        shards = owned_shards(self.sharding, self.shape, owned or _is_mine)
        for index in np.ndindex(*self.shape[: self.depth]):
            here = [where for where in shards if _holds(where, index)]
            layer = self.leaf.layer(index) if here else None
            twins = self.twins(index) if here else ()
            found = []
            for where in here:
                part = layer[where[self.depth :]]
                copy = np.empty((1,) * self.depth + part.shape, part.dtype)
                copy_bits(copy.reshape(part.shape), part)
                for name, twin in twins:
                    if not same_numbers(copy.reshape(part.shape), twin[where[self.depth :]]):
                        raise UserError(f"tied tensor {name!r} holds other numbers than its twin")
                self.seen(copy)
                found.append(((*(slice(i, i + 1) for i in index), *where[self.depth :]), copy))
            self.done(index)
            yield found


def owned_shards(sharding, shape: tuple[int, ...], owned: Callable) -> list[Where]:
    """The distinct shards of an array whose first device is `owned`, as slices with both ends said."""
    first: dict[tuple, Any] = {}
    for device, where in sharding.devices_indices_map(shape).items():
        ends = tuple(part.indices(size)[:2] for part, size in zip(where, shape))
        first[ends] = min(first.get(ends, device), device, key=lambda one: one.id)
    return [tuple(slice(*end) for end in ends) for ends, one in first.items() if owned(one)]


def _is_mine(device) -> bool:
    return device.process_index == jax.process_index()


def _holds(where: Where, index: tuple[int, ...]) -> bool:
    return all(part.start <= i < part.stop for part, i in zip(where, index))


def write(path: Path, promises: Params, config: dict) -> None:
    """Write a tree of promises and our config as an Orbax checkpoint; all processes together. It appears by rename."""
    import orbax.checkpoint as ocp

    handler = _handler()
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler), (Promise, handler))
    # Trained weights hardly become smaller, and packing them takes longer than all the rest.
    items = {
        PARAMS: ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False),
        CONFIG: ocp.JsonCheckpointHandler(),
    }
    given = {PARAMS: ocp.args.PyTreeSave(promises), CONFIG: ocp.args.JsonSave(config)}
    # The writer begins at once, so the folders have to be there by then.
    there = ocp.AsyncOptions(create_directories_asynchronously=False)
    options = ocp.CompositeOptions(async_options=there)
    whole = ocp.CompositeCheckpointHandler(composite_options=options, **items)
    with ocp.Checkpointer(whole) as writer:
        writer.save(path, args=ocp.args.Composite(**given))


def _handler():
    """Orbax's writer of arrays, which takes promises: the same files, in the same places, one layer after the other."""
    import orbax.checkpoint as ocp
    import tensorstore

    class Handler(ocp.type_handlers.ArrayHandler):
        async def serialize(self, values, infos, args=None):
            opening, small = [], ocp.SaveArgs(chunk_byte_size=CHUNK)
            for promise, info in zip(values, infos):
                await info.await_path_creation()
                form = (promise.shape, promise.part, promise.dtype)
                spec = ocp.type_handlers.get_json_tspec_write(info, True, *form, jax.process_index(), arg=small)
                opening.append(tensorstore.open(spec, create=True, open=True, context=info.ts_context))
            await _write_parts(zip(await asyncio.gather(*opening), values))
            if jax.process_index() == 0:
                said = {info.name: promise.sharding for promise, info in zip(values, infos)}
                (infos[0].parent_dir / "_sharding").write_text(_layouts(said))
            return []

    return Handler()


async def _write_parts(leaves) -> None:
    """Each layer after the other; small ones together, because what is on its way is synced to the disk each time."""
    waiting, size = [], 0
    try:
        for store, promise in leaves:
            for where, part in itertools.chain.from_iterable(promise.parts()):
                for there, here in _spans(store[where]):
                    waiting.append(there.write(part[here], can_reference_source_data_indefinitely=True))
                    size += part[here].nbytes
                    if size >= AT_ONCE:
                        await asyncio.gather(*waiting)
                        waiting, size = [], 0
        await asyncio.gather(*waiting)
    finally:  # nothing is on its way any more when the folder is cleared away
        await asyncio.gather(*waiting, return_exceptions=True)


def _spans(view) -> Iterator[tuple[Any, Any]]:
    """Runs of rows of an array on the disk, of about `AT_ONCE` bytes each: (the rows there, where they are here)."""
    chunk = view.chunk_layout.read_chunk.shape
    axis = next((k for k, size in enumerate(view.shape) if size > chunk[k]), None)
    if axis is None:
        yield view, ...
        return
    low, high = view.domain[axis].inclusive_min, view.domain[axis].exclusive_max
    rows = chunk[axis]
    size = math.prod(view.shape) // (high - low) * view.dtype.numpy_dtype.itemsize  # of one row
    step, before = rows * max(1, AT_ONCE // max(1, rows * size)), (slice(None),) * axis
    for begin in range(low // rows * rows, high, step):
        span = max(begin, low), min(begin + step, high)
        yield view[(*before, slice(*span))], (*before, slice(span[0] - low, span[1] - low))


def _layouts(shardings: Mapping[str, Any]) -> str:
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
class Stored(Computed):
    """A leaf on the disk, of which only those chunks are read that hold what is asked for."""

    store: Any = None

    def __getitem__(self, where) -> np.ndarray:
        try:
            view = self.store[where]
            made = np.empty(view.shape, self.dtype)
            for there, here in _spans(view):
                made[here] = there.read().result()
            return made
        except ValueError as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"an array of the Orbax checkpoint is damaged: {reason}") from error

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[...], dtype)


def holds_checkpoint(path: Path) -> bool:
    """Whether a folder is an Orbax checkpoint as `write` makes them."""
    return (path / PARAMS / MANIFEST).is_file() and (path / CONFIG / "metadata").is_file()


def read_config(path: Path) -> Any:
    """Our config in such a folder. Raises UserError where it cannot be read."""
    file = path / CONFIG / "metadata"
    try:
        if file.stat().st_size > HEADER_LIMIT:
            raise ValueError("it is too large")
        return configs.from_json(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}") from error


def open_arrays(path: Path) -> Tensors:
    """The parameters of such a folder by path; nothing of them is read yet. Raises UserError."""
    import tensorstore

    where = {"driver": "ocdbt", "base": f"file://{path.absolute()}/{PARAMS}/"}
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
        arrays = {name.replace(".", "/"): _stored(store.result()) for name, store in opened.items()}
    except ValueError as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{path} is a damaged Orbax checkpoint: {reason}") from error
    return Tensors(arrays, (path,), mapped=False)


def _stored(store) -> Stored:
    made = Stored(tuple(store.shape), np.dtype(store.dtype.numpy_dtype), lambda index: None, store)
    return dataclasses.replace(made, layer=lambda index: made[(*index, ...)])


def placed(tensors: Mapping, like: Params) -> Params:
    """The parameters laid out as `like`; each process reads the chunks of its own shards."""
    plan_params([Row(path, path) for path in tensors], tensors, (), like)

    def place(path, target):
        leaf = tensors[path]
        return jax.make_array_from_callback(leaf.shape, target.sharding, leaf.__getitem__)

    return trees.unflatten({path: place(path, t) for path, t in trees.flatten(like).items()})


def layers(tensors: Mapping, rows) -> tuple[dict[str, Form], Parts]:
    """The form of every parameter, and all of them layer by layer."""
    depth = {path: len(row.letters) for row in rows for path in row.paths}
    forms = {path: Form.of(leaf) for path, leaf in tensors.items()}
    return forms, (
        (path, index, tensors[path].layer(index))
        for path, form in forms.items()
        for index in np.ndindex(*form.shape[: depth[path]])
    )
