# SPDX-License-Identifier: Apache-2.0
"""Tensors of a TorchScript archive, such as OpenAI's CLIP files: memory mapped, without running code that it holds.

`data.pkl` describes the modules as objects whose attributes are tensors and modules; a tensor's name is the path of its
attributes, as in torch's `state_dict`.
"""

from __future__ import annotations

import collections
import io
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lionjax.convert.io.tensors import CheckpointTensors, first_line
from lionjax.core.types import UserError

MAX_PICKLE_BYTES = 64 * 2**20
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: mark, length of its name, length of its extra field
STORAGE_DTYPES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "DoubleStorage": np.float64,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Module:
    """A module of the archive; its class, and so its code, is not used."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def is_torchscript(path: Path) -> bool:
    """Whether a zip file is a TorchScript archive: it has constants.pkl."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):  # a damaged directory; `torch.load` names it
        return False


def open_torchscript(path: Path) -> CheckpointTensors:
    """The tensors of a TorchScript archive. Raises UserError for a damaged one and for other contents."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(names) != 1 or archive.getinfo(names[0]).file_size > MAX_PICKLE_BYTES:
                raise UserError(f"{path} is damaged: it has no readable data.pkl; download it again")
            reader = _Reader(archive.read(names[0]), path, archive, names[0].removesuffix(".pkl"))
            root = reader.load()
    except UserError:
        raise
    except Exception as error:  # zipfile and pickle raise many kinds on damaged files
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {first_line(error)}); download it again"
        ) from error
    if not isinstance(root, _Module):
        raise UserError(f"{path} holds a {type(root).__name__}, no module; give a file of weights")
    return CheckpointTensors(dict(_named_tensors(root, "", 0)), (path,), {}, True)


class _Reader(pickle.Unpickler):
    """Unpickles modules and tensors only."""

    def __init__(self, data: bytes, path: Path, archive: zipfile.ZipFile, folder: str):
        super().__init__(io.BytesIO(data))
        self.path, self.archive, self.folder = path, archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name in STORAGE_DTYPES:
            return np.dtype(STORAGE_DTYPES[name])
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("collections", "OrderedDict"): collections.OrderedDict,
        }
        if module == "torch.jit._pickle":  # lists and dictionaries with the type of their items
            return lambda data, *_: data
        if (module, name) not in known:
            raise UserError(f"{self.path} cannot be loaded: it holds {module}.{name}, no tensor")
        return known[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        """The memory-mapped numbers of a storage: ("storage", dtype, key, device, count)."""
        _, dtype, key, _, count = pid
        info = self.archive.getinfo(f"{self.folder}/{key}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size < count * dtype.itemsize:
            raise UserError(f"{self.path} is damaged: its tensor {key} is compressed or cut short; download it again")
        if not count:
            return np.zeros(0, dtype)
        with self.path.open("rb") as file:
            file.seek(info.header_offset)
            _, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        start = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
        return np.memmap(self.path, dtype, "r", start, (count,))

    def _tensor(self, storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
        last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
        if min((offset, *size, *stride)) < 0 or (0 not in size and last >= len(storage)):
            raise UserError(f"{self.path} is damaged: a tensor of shape {size} leaves its storage; download it again")
        strides = [step * storage.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _named_tensors(module: _Module, prefix: str, depth: int) -> Iterator[tuple[str, np.ndarray]]:
    for name, value in vars(module).get("attributes", {}).items():
        if isinstance(value, np.ndarray):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Module) and depth < 32:
            yield from _named_tensors(value, f"{prefix}{name}.", depth + 1)
