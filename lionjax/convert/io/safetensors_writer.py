# SPDX-License-Identifier: Apache-2.0
"""Safetensors written a piece at a time, complete or not at all.

Shapes are known before the first number is, so the headers go first and each piece is put where it belongs;
memory holds one piece. A folder appears by rename when all of it is on the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
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
from lionjax.core.types import UserError
from lionjax.core.weight_map import copy_bits

SHARD_BYTES = 5 * 10**9  # of one file, unless a single tensor is larger
DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in SAFETENSORS_DTYPES.items()}
MAX_WRITE_BYTES = 2**30  # bytes of one write; Linux takes no more than two GiB
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """One file to be written: its name, its header, and the byte at which each tensor begins."""

    name: str
    header: bytes
    tensor_offsets: dict[str, int]
    size: int


def plan_shards(
    specs: Mapping[str, TensorSpec], stem: str, shard_bytes: int, metadata: Mapping[str, str]
) -> list[ShardFile]:
    """Files of at most `shard_bytes` of tensors, in the given order: STEM.safetensors, or STEM-00001-of-00003.…"""
    groups: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, form in specs.items():
        if groups[-1] and filled + form.nbytes > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = form
        filled += form.nbytes
    total = len(groups)
    endings = [f"-{k:05}-of-{total:05}" for k in range(1, total + 1)] if total > 1 else [""]
    return [_plan_shard(f"{stem}{end}.safetensors", group, metadata) for end, group in zip(endings, groups)]


def _plan_shard(name: str, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> ShardFile:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begins, at = {}, 0
    # Wide numbers first, so that every tensor begins at a multiple of its number's size.
    for tensor, form in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
        if form.dtype not in DTYPE_NAMES:
            raise UserError(f"tensor {tensor!r} is {form.dtype}, which safetensors files cannot hold")
        offsets = [at, at + form.nbytes]
        entries[tensor] = {"dtype": DTYPE_NAMES[form.dtype], "shape": list(form.shape), "data_offsets": offsets}
        begins[tensor], at = offsets
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return ShardFile(name, header, {tensor: len(header) + begin for tensor, begin in begins.items()}, len(header) + at)


def write_safetensors(
    folder: Path,
    stem: str,
    specs: Mapping[str, TensorSpec],
    parts: Iterable[tuple[str, tuple[int, ...], np.ndarray]],
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> list[str]:
    """Write tensors of known forms into `folder`; the names of the files, an index last if there are several.

    `parts` gives (name, index, array): the array is `tensor[index]`, index counting leading axes. Every number must
    come once. Raises UserError when the disk cannot hold them.
    """
    files = plan_shards(specs, stem, shard_bytes, {"format": "pt"} if metadata is None else metadata)
    needed, free = sum(file.size for file in files), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder.parent} has {free / 1e9:.1f} GB left and {needed / 1e9:.1f} GB are to be written")
    place = {
        tensor: (number, begin) for number, file in enumerate(files) for tensor, begin in file.tensor_offsets.items()
    }
    written = 0
    scratch = np.empty(0, np.uint8)
    with contextlib.ExitStack() as stack:
        open_files = [stack.enter_context(open(folder / file.name, "wb", buffering=0)) for file in files]
        for file, shard in zip(open_files, files):
            _pwrite_all(file.fileno(), 0, shard.header)
        for name, index, array in parts:
            form = specs[name]
            if form.shape[len(index) :] != array.shape or form.dtype != array.dtype:
                raise ValueError(f"a part of {name!r} is {TensorSpec.from_array(array)} where {form} was planned")
            if not array.flags.c_contiguous:
                if scratch.nbytes < array.nbytes:
                    scratch = np.empty(array.nbytes, np.uint8)
                flat = scratch[: array.nbytes].view(array.dtype).reshape(array.shape)
                copy_bits(flat, array)
                array = flat
            number, begin = place[name]
            before = sum(i * math.prod(form.shape[axis + 1 :]) for axis, i in enumerate(index))
            _pwrite_all(open_files[number].fileno(), begin + before * form.dtype.itemsize, array)
            written += array.nbytes
            del array  # it may be made anew for each part, and the next one is made now
        if written != sum(form.nbytes for form in specs.values()):
            raise ValueError(f"{written} bytes came of {sum(form.nbytes for form in specs.values())}")
        for file in open_files:
            os.fsync(file.fileno())
    names = [file.name for file in files]
    if len(files) > 1:
        where = {tensor: file.name for file in files for tensor in file.tensor_offsets}
        index = {"metadata": {"total_size": written}, "weight_map": dict(sorted(where.items()))}
        names.append(f"{stem}.safetensors.index.json")
        (folder / names[-1]).write_text(json.dumps(index, indent=1))
    return names


def _pwrite_all(descriptor: int, offset: int, data) -> None:
    flat = memoryview(data if isinstance(data, bytes) else np.ascontiguousarray(data).reshape(-1).view(np.uint8))
    done = 0
    while done < len(flat):
        done += os.pwrite(descriptor, flat[done : done + MAX_WRITE_BYTES], offset + done)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the block ends well, and vanishes when it does not.

    Raises UserError when something stands at `path` already, and when the disk is full.
    """
    path = Path(path).absolute()
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path} is there already and holds files; choose a new folder")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is there already and is a file; choose a new folder")
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        os.rename(partial, path)
    except OSError as error:
        reason = "the disk is full" if error.errno in DISK_FULL_ERRNOS else error.strerror or str(error)
        raise UserError(f"{path} could not be written: {reason}; nothing was left behind") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
