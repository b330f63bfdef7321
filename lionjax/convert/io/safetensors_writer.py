# SPDX-License-Identifier: Apache-2.0
"""Streaming, atomic writer of safetensors files (https://github.com/huggingface/safetensors).

Specs are known in advance, so the headers are written first and each array goes to its offset; one array is in memory
at a time. A folder is renamed into place when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from lionjax.convert.io.reader import SAFETENSORS_DTYPES
from lionjax.convert.mapping.plan import TensorSpec
from lionjax.core.files import is_disk_full
from lionjax.core.types import UserError
from lionjax.core.weight_map import copy_bits

SHARD_BYTES = 5 * 10**9  # of one file, unless a single tensor is larger
DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in SAFETENSORS_DTYPES.items()}
MAX_WRITE_BYTES = 2**30  # bytes of one write; Linux writes at most 2 GiB at once


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """One safetensors file to be written."""

    name: str
    header: bytes
    tensor_offsets: dict[str, int]  # in bytes from the start of the file
    size: int  # bytes


def plan_shards(
    specs: Mapping[str, TensorSpec], stem: str, shard_bytes: int, metadata: Mapping[str, str]
) -> list[ShardFile]:
    """The files for these tensors, in order: STEM.safetensors, or shards STEM-00001-of-00003.safetensors.

    A file has at most `shard_bytes` of tensors, or a single larger tensor.
    """
    groups: list[dict[str, TensorSpec]] = [{}]
    group_bytes = 0
    for name, spec in specs.items():
        if groups[-1] and group_bytes + spec.nbytes > shard_bytes:
            groups.append({})
            group_bytes = 0
        groups[-1][name] = spec
        group_bytes += spec.nbytes
    total = len(groups)
    endings = [f"-{k:05}-of-{total:05}" for k in range(1, total + 1)] if total > 1 else [""]
    return [_plan_shard(f"{stem}{end}.safetensors", group, metadata) for end, group in zip(endings, groups)]


def _plan_shard(name: str, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> ShardFile:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    tensor_starts, position = {}, 0
    # Sorted by itemsize, largest first, so that every tensor is aligned to its itemsize.
    for tensor, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
        if spec.dtype not in DTYPE_NAMES:
            raise UserError(
                f"tensor {tensor!r} has dtype {spec.dtype}; safetensors files hold {', '.join(DTYPE_NAMES.values())}"
            )
        offsets = [position, position + spec.nbytes]
        entries[tensor] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        tensor_starts[tensor], position = offsets
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    tensor_offsets = {tensor: len(header) + start for tensor, start in tensor_starts.items()}
    return ShardFile(name, header, tensor_offsets, len(header) + position)


def write_safetensors(
    folder: Path,
    stem: str,
    specs: Mapping[str, TensorSpec],
    parts: Iterable[tuple[str, tuple[int, ...], np.ndarray]],
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> list[str]:
    """Write tensors with these specs into `folder`; returns the file names, with an index file last for several shards.

    `parts` yields (name, index, array), where array is `tensor[index]` on the leading axes; together they must cover
    every tensor once. Raises UserError where the disk has too little space, ValueError where `parts` differ from
    `specs`.
    """
    files = plan_shards(specs, stem, shard_bytes, {"format": "pt"} if metadata is None else metadata)
    needed, free = sum(file.size for file in files), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder.parent} has {free / 1e9:.1f} GB left and {needed / 1e9:.1f} GB are to be written; "
            "free some space or choose another DST"
        )
    tensor_position = {
        tensor: (number, start) for number, file in enumerate(files) for tensor, start in file.tensor_offsets.items()
    }
    bytes_written = 0
    scratch = np.empty(0, np.uint8)
    with contextlib.ExitStack() as stack:
        open_files = [stack.enter_context(open(folder / file.name, "wb", buffering=0)) for file in files]
        for file, shard in zip(open_files, files):
            _pwrite_all(file.fileno(), 0, shard.header)
        for name, index, array in parts:
            spec = specs[name]
            if spec.shape[len(index) :] != array.shape or spec.dtype != array.dtype:
                raise ValueError(f"a part of {name!r} is {TensorSpec.from_array(array)} where {spec} was planned")
            if not array.flags.c_contiguous:
                if scratch.nbytes < array.nbytes:
                    scratch = np.empty(array.nbytes, np.uint8)
                flat = scratch[: array.nbytes].view(array.dtype).reshape(array.shape)
                copy_bits(flat, array)
                array = flat
            number, start = tensor_position[name]
            num_values_before = sum(i * math.prod(spec.shape[axis + 1 :]) for axis, i in enumerate(index))
            _pwrite_all(open_files[number].fileno(), start + num_values_before * spec.dtype.itemsize, array)
            bytes_written += array.nbytes
            del array  # frees it before the next part is computed
        if bytes_written != sum(spec.nbytes for spec in specs.values()):
            raise ValueError(f"{bytes_written} of {sum(spec.nbytes for spec in specs.values())} bytes were written")
        for file in open_files:
            os.fsync(file.fileno())
    names = [file.name for file in files]
    if len(files) > 1:
        file_of_tensor = {tensor: file.name for file in files for tensor in file.tensor_offsets}
        index = {"metadata": {"total_size": bytes_written}, "weight_map": dict(sorted(file_of_tensor.items()))}
        names.append(f"{stem}.safetensors.index.json")
        (folder / names[-1]).write_text(json.dumps(index, indent=1))
    return names


def _pwrite_all(descriptor: int, offset: int, data) -> None:
    flat = memoryview(data if isinstance(data, bytes) else np.ascontiguousarray(data).reshape(-1).view(np.uint8))
    bytes_done = 0
    while bytes_done < len(flat):
        bytes_done += os.pwrite(descriptor, flat[bytes_done : bytes_done + MAX_WRITE_BYTES], offset + bytes_done)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Context manager with a temporary folder that is renamed to `path` on success and removed on an exception.

    Raises UserError where `path` is a file or a folder with files, and where writing fails (disk full).
    """
    path = Path(path).absolute()
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path} already exists and holds files; choose a new folder")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} already exists and is a file; choose a new folder")
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        os.rename(partial, path)
    except OSError as error:
        reason = "the disk is full" if is_disk_full(error) else error.strerror or str(error)
        raise UserError(f"{path} could not be written: {reason}; nothing was left behind") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
