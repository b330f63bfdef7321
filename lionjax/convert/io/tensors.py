# SPDX-License-Identifier: Apache-2.0
"""`CheckpointTensors`: the tensors of opened weight files, read from disk on access."""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from lionjax.core.types import UserError


class CheckpointTensors(Mapping):
    """Mapping from names to read-only numpy arrays, which are read from disk on access.

    `files` are the opened files; `skipped` maps names that are not read to the reason.
    """

    def __init__(self, arrays: Mapping, files: tuple[Path, ...], skipped=None, memory_mapped=True):
        self.arrays = dict(arrays)
        self.files = files
        self.skipped = dict(skipped or {})
        self.memory_mapped = set(self.arrays) if memory_mapped else set()

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def with_prefix(self, prefix: str) -> CheckpointTensors:
        """The same tensors, with `prefix` added to all names."""
        return self.with_keys(lambda name: prefix + name)

    def without_prefix(self, prefix: str) -> CheckpointTensors:
        """The same tensors, with `prefix` removed from the names that start with it."""
        return self.with_keys(lambda name: name.removeprefix(prefix))

    def rename_keys(self, *replacements: tuple[str, str]) -> CheckpointTensors:
        """The same tensors, with each (regular expression, replacement) applied in turn, once per name.

        Raises UserError where two tensors get the same name.
        """

        def rename(name: str) -> str:
            for pattern, new in replacements:
                name = re.sub(pattern, new, name, count=1)
            return name

        return self.with_keys(rename)

    def with_keys(self, rename_key: Callable[[str], str]) -> CheckpointTensors:
        """The same tensors under the names that `rename_key` gives. Raises UserError where two get the same name."""
        arrays = {rename_key(name): array for name, array in self.arrays.items()}
        if len(arrays) < len(self.arrays):
            raise UserError(f"two tensors of {self.files[0]} are the same parameter under different names; remove one")
        renamed = CheckpointTensors(arrays, self.files, {rename_key(n): reason for n, reason in self.skipped.items()})
        renamed.memory_mapped = {rename_key(name) for name in self.memory_mapped}
        return renamed

    def __or__(self, other: CheckpointTensors) -> CheckpointTensors:
        """The tensors of both. Raises UserError where a name is in both."""
        if shared_names := sorted(self.arrays.keys() & other.arrays.keys()):
            files = " and ".join(str(part.files[0]) for part in (self, other))
            raise UserError(f"{len(shared_names)} tensors are in both {files}, for example {shared_names[0]!r}")
        arrays = self.arrays | other.arrays
        merged = CheckpointTensors(arrays, self.files + other.files, self.skipped | other.skipped)
        merged.memory_mapped = self.memory_mapped | other.memory_mapped
        return merged

    def replaced(self, arrays: Mapping, other: CheckpointTensors) -> CheckpointTensors:
        """The tensors with `arrays`, which come from the files of `other`, added or put in place."""
        tensors = CheckpointTensors(self.arrays | dict(arrays), self.files + other.files, self.skipped | other.skipped)
        tensors.memory_mapped = self.memory_mapped - arrays.keys()
        return tensors

    def release(self, name: str, array: np.ndarray | None = None) -> None:
        """Unmap the pages of a tensor, or of the part `array`, that has been read; they stay in the page cache.

        Without this, the resident memory of a conversion grows by every byte that it reads.
        """
        array = self.arrays[name] if array is None else array
        if name not in self.memory_mapped or not array.nbytes or not hasattr(mmap, "MADV_DONTNEED"):
            return
        for part in getattr(array, "parts", (array,)):
            address = part.__array_interface__["data"][0]
            begin = address - address % mmap.PAGESIZE
            size = ctypes.c_size_t(address + part.nbytes - begin)
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), size, mmap.MADV_DONTNEED)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
