# SPDX-License-Identifier: Apache-2.0
"""Where answers are generated: a mesh apart from the run's, parameters in bfloat16, and as many slots as fit.

On accelerators the parameters are cast once to bfloat16. They are split over as few devices of a host as hold them
(`tensor`), and rows over the rest (`data`), so that each host answers its own questions; a model that no host holds is
split over all devices.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.sharding import MeshConfig
from lionjax.core.types import VLM, Batch, Params, UserError
from lionjax.inference.answer_request import SessionSizes
from lionjax.inference.sampling import GenerationConfig

GIB = 2**30
WEIGHT_SHARE = 0.25  # of a device's memory: parameters that take more are split further, within a host
MAX_WEIGHT_SHARE = 0.6  # parameters that take more on each device of a host are split over several hosts
CACHE_SHARE = 0.85  # of what parameters leave free, for the caches of all slots; the rest is for reading prompts
DEFAULT_SLOTS = 64  # per batch shard where the memory is not known, and at most on CPUs
SMALL_MODEL_BYTES = 2**28  # parameters on CPUs whose slots are not counted
HOST_SHARE = 0.5  # of a host's free memory, for answers on CPUs
MAX_SLOTS = 256  # per batch shard: more do not make a step cheaper per row
ADMITTED_ROWS = 8  # per batch shard: prompts read at once, or a multiple of it if they are short
ADMITTED_TOKENS = 1024  # per batch shard: tokens of text read at once, so that weights are not read for a few
SHARES_OF_LENGTH = (0.2, 0.5, 0.75)  # padded prompt lengths besides the longest
SAMPLED_VALUES = 64  # of each parameter, in `model_digest`


def is_accelerated(devices: Sequence | None = None) -> bool:
    """Whether the devices are accelerators, on which answers are computed in bfloat16."""
    return (devices or jax.local_devices())[0].platform != "cpu"


def memory_bytes(device) -> int:
    """Memory of a device in bytes, 0 where it is not known."""
    try:
        return int((device.memory_stats() or {}).get("bytes_limit", 0))
    except (AttributeError, jax.errors.JaxRuntimeError):
        return 0


def choose_mesh(parameter_bytes: int, num_local: int, num_hosts: int, device_bytes: int) -> MeshConfig:
    """The mesh for parameters of a size: `tensor` devices hold them, the others of the host hold other rows.

    A mesh of `num_local` devices if a host holds the parameters, else of the devices of all hosts. Raises UserError for
    parameters that do not fit all devices.
    """
    for tensor in (n for n in range(1, num_local + 1) if num_local % n == 0):
        share = MAX_WEIGHT_SHARE if tensor == num_local else WEIGHT_SHARE
        if not device_bytes or parameter_bytes <= tensor * share * device_bytes:
            return MeshConfig(data=num_local // tensor, tensor=tensor)
    room = MAX_WEIGHT_SHARE * device_bytes
    devices = num_local * num_hosts
    if parameter_bytes > devices * room:
        raise UserError(
            f"the parameters take {parameter_bytes / GIB:.1f} GiB, and {devices} devices of {device_bytes / GIB:.1f} "
            f"GiB leave room for answers only up to {devices * room / GIB:.1f}; use more devices, or int8 weights"
        )
    hosts = math.ceil(parameter_bytes / (num_local * room))
    while num_hosts % hosts:
        hosts += 1
    return MeshConfig(data=num_hosts // hosts, tensor=num_local * hosts)


def answering_mesh(parameter_bytes: int) -> Mesh:
    """The mesh for answering with parameters of this size in the dtype of the computation: see `choose_mesh`."""
    local = jax.local_devices()
    if not is_accelerated(local):
        return sharding.make_mesh(MeshConfig(), local[:1])
    config = choose_mesh(parameter_bytes, len(local), jax.process_count(), memory_bytes(local[0]))
    is_local = config.data * config.tensor == len(local)
    return sharding.make_mesh(config, local if is_local else jax.devices())


def answer_dtype(leaf, devices: Sequence | None = None):
    """The dtype of a parameter for answering: bfloat16 on accelerators, where it is a float."""
    floats = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.dtype(jnp.bfloat16) if floats and is_accelerated(devices) else leaf.dtype


def move_params(params: Params, like: Params) -> Params:
    """The parameters with the dtypes and shardings of `like`, cast one by one so that few are held twice."""
    flat, target, moved = trees.flatten(params), trees.flatten(like), {}
    for path, spec in target.items():
        leaf = flat[path]
        if not getattr(leaf, "is_fully_addressable", True):
            leaf = sharding.gather_to_host(leaf)
        if leaf.dtype != spec.dtype:
            leaf = leaf.astype(spec.dtype)
        moved[path] = jax.device_put(leaf, spec.sharding)
    return trees.unflatten(moved)


def slot_bytes(model: VLM, params: Params, batch: Batch, config: GenerationConfig) -> int:
    """Bytes of the cache of one slot, over all devices, for prompts as long as those of the batch."""
    _, cache = jax.eval_shape(
        lambda params, batch: model.prefill(params, batch, config.max_new_tokens - 1), params, batch
    )
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    return max(1, total // len(batch.task_B))


def num_groups(mesh: Mesh) -> int:
    """Batch shards of a mesh."""
    return int(np.prod([mesh.shape[axis] for axis in sharding.LOGICAL_AXIS_RULES["batch"]]))


def session_sizes(mesh: Mesh, lengths: tuple[int, int], bytes_of_slot: int, free_bytes: int = 0) -> SessionSizes:
    """Slots and padded lengths for a mesh whose devices have `free_bytes` each (0: not known, `DEFAULT_SLOTS`).

    `bytes_of_slot`: over all devices of one batch shard.
    """
    groups, slots = num_groups(mesh), DEFAULT_SLOTS
    if free_bytes:
        slots = int(CACHE_SHARE * free_bytes * mesh.shape["tensor"] / bytes_of_slot)
        most = DEFAULT_SLOTS if mesh.devices.flat[0].platform == "cpu" else MAX_SLOTS
        slots = min(most, max(1, slots if slots < 8 else slots // 8 * 8))
    prompt_length, question_length = lengths
    parts = [-(-int(prompt_length * share) // 8) * 8 for share in SHARES_OF_LENGTH]
    short = tuple(dict.fromkeys(part for part in parts if part < prompt_length))
    rows = ADMITTED_ROWS * -(-ADMITTED_TOKENS // (ADMITTED_ROWS * prompt_length))
    rows = min(max(1, slots // 4), rows)
    return SessionSizes(slots * groups, rows * groups, prompt_length, question_length, short)


def limit_slots(mesh: Mesh, sizes: SessionSizes, num_slots: int, short_lengths: Sequence[int]) -> SessionSizes:
    """The sizes with at most `num_slots` slots over all shards, at least one each, and with those shorter lengths."""
    groups = num_groups(mesh)
    per_group = max(1, min(sizes.num_slots, num_slots) // groups)
    short = tuple(length for length in short_lengths if length < sizes.prompt_length)
    return dataclasses.replace(
        sizes, num_slots=per_group * groups, admission_rows=max(1, per_group // 4) * groups, short_lengths=short
    )


def free_bytes(mesh: Mesh, params: Params) -> int:
    """Free memory of the fullest local device of a mesh in bytes, 0 where it is not known.

    On CPUs a share of the host's, for parameters that are not small.
    """
    if mesh.devices.flat[0].platform == "cpu":
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        return 0 if size < SMALL_MODEL_BYTES else int(HOST_SHARE * _host_bytes())
    stats = [device.memory_stats() or {} for device in mesh.local_devices if device.platform != "cpu"]
    return min((one.get("bytes_limit", 0) - one.get("bytes_in_use", 0) for one in stats), default=0)


def _host_bytes() -> int:
    """Memory in bytes that this host can give, 0 where it is not known (other systems than Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 0


def model_digest(model: VLM, params: Params) -> str:
    """A hash of a model's config and of some values of each parameter, which any further training changes."""
    hashed = hashlib.sha256(repr(model).encode())
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), values in zip(leaves, _sample_values([leaf for _, leaf in leaves]), strict=True):
        name = f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}"
        hashed.update(name.encode() + values.tobytes())
    return hashed.hexdigest()[:16]


def _sample_values(leaves: Sequence[jax.Array | np.ndarray]) -> list[np.ndarray]:
    """Some values of each array, as float32: read in place on a CPU, else by one program for all arrays."""
    places = [np.arange(0, leaf.size, max(1, leaf.size // SAMPLED_VALUES))[:SAMPLED_VALUES] for leaf in leaves]
    indices = [np.unravel_index(place, leaf.shape or (1,)) for place, leaf in zip(places, leaves)]
    if all(isinstance(leaf, np.ndarray) or _is_on_one_cpu(leaf) for leaf in leaves):
        return _pick_values(list(map(np.asarray, leaves)), indices)
    return list(map(np.asarray, jax.device_get(jax.jit(_pick_values)(leaves, indices))))


def _pick_values(arrays: Sequence, indices: Sequence[tuple]) -> list:
    return [array.reshape(array.shape or (1,))[index].astype(np.float32) for array, index in zip(arrays, indices)]


def _is_on_one_cpu(leaf: jax.Array) -> bool:
    return len(devices := leaf.devices()) == 1 and next(iter(devices)).platform == "cpu"
