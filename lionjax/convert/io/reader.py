# SPDX-License-Identifier: Apache-2.0
"""Open safetensors and PyTorch weight files as memory-mapped arrays.

`open_weights` takes a .safetensors, .bin, .pth or .pt file, an index of shards, or a folder with any of these. The
files are untrusted: sizes are checked before memory is allocated, an index may only name files of its own folder, and
pickles with code are rejected.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import logging
import mmap
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from lionjax.core.types import UserError

log = logging.getLogger(__name__)

SAFETENSORS_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
MAX_HEADER_BYTES = 32 * 2**20  # of a header, index or config; published models have less than 1 MiB
MAX_PICKLE_BYTES = 64 * 2**20  # of the pickle inside a .bin or .pth, which holds names and shapes
TORCH_SUFFIXES = (".bin", ".pth", ".pt")
STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict", "module")  # keys of the weights in training checkpoints
MIN_TORCH_VERSION = (2, 10)


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
        return self._map_keys(lambda name: prefix + name)

    def without_prefix(self, prefix: str) -> CheckpointTensors:
        """The same tensors, with `prefix` removed from the names that start with it."""
        return self._map_keys(lambda name: name.removeprefix(prefix))

    def rename_keys(self, *replacements: tuple[str, str]) -> CheckpointTensors:
        """The same tensors, with each (regular expression, replacement) applied in turn, once per name.

        Raises UserError where two tensors get the same name.
        """

        def rename(name: str) -> str:
            for pattern, new in replacements:
                name = re.sub(pattern, new, name, count=1)
            return name

        return self._map_keys(rename)

    def _map_keys(self, rename_key: Callable[[str], str]) -> CheckpointTensors:
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


def open_weights(path: str | Path, key: str | None = None) -> CheckpointTensors:
    """The tensors of a weight file, an index or a folder, memory mapped.

    `key` is the key of the state dict inside a .pth file, where it is none of STATE_DICT_KEYS. Raises UserError, in one
    sentence, for missing, damaged, oversized or unsafe files.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _open_folder(path, key)
        if path.name.endswith(".index.json"):
            return _open_index(path, key)
        if path.suffix == ".safetensors":
            return open_safetensors(path)
        if path.suffix in TORCH_SUFFIXES:
            return open_torch(path, key)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    raise UserError(f"{path} is no weight file; give a .safetensors, .bin, .pth, .pt or .index.json file, or a folder")


def open_safetensors(path: Path) -> CheckpointTensors:
    """The tensors of a safetensors file, memory mapped. The header is checked against the file size first."""
    import safetensors

    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if len(start) < 8 or length > size - 8:
            raise UserError(f"{path} is cut short: its header does not fit into {size} bytes; download it again")
        if length > MAX_HEADER_BYTES:
            raise UserError(f"{path} has a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are allowed")
        header = file.read(length)
        try:  # safe_open checks offsets, shapes and sizes against each other
            with safetensors.safe_open(path, framework="numpy"):
                pass
            entries = json.loads(header, object_pairs_hook=_reject_duplicate_keys)
        except (safetensors.SafetensorError, ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged or no safetensors file: {_first_line(error)}") from error
        space = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    entries.pop("__metadata__", None)
    arrays = {}
    for name, entry in entries.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise UserError(
                f"tensor {name!r} of {path} has dtype {entry['dtype']}; "
                f"the supported dtypes are {', '.join(SAFETENSORS_DTYPES)}"
            )
        dtype, shape = np.dtype(SAFETENSORS_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        flat = np.frombuffer(space, dtype, (end - begin) // dtype.itemsize, 8 + length + begin) if end > begin else []
        arrays[name] = np.asarray(flat, dtype).reshape(shape)
    return CheckpointTensors(arrays, (path,))


def open_torch(path: Path, key: str | None = None) -> CheckpointTensors:
    """The tensors of a .bin, .pth or .pt file, memory mapped, so that an optimizer state in it is not read.

    Loads with weights_only=True. Raises UserError for damaged files and for pickles with code.
    """
    torch = _import_torch(path)
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_zip(path)
    else:
        log.warning("%s has torch's old format (no zip), which cannot be memory mapped: all of it is read", path)
    try:
        with warnings.catch_warnings():  # for unusual pickles torch asks users to file an issue
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch raises many kinds on damaged files
        text = str(error)
        if match := re.search(r"GLOBAL ([\w.]+)", text):
            reason = f"it holds code ({match[1]}); ask its authors for a .safetensors file"
        else:
            reason = f"it is damaged or no PyTorch file ({type(error).__name__}: {_first_line(error)})"
        raise UserError(f"{path} cannot be loaded: {reason}") from error
    state, skipped = _find_state_dict(loaded, key, path, torch.Tensor)
    arrays = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            skipped[str(name)] = f"a {type(tensor).__name__}, not a tensor"
        elif tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise UserError(
                f"tensor {name!r} of {path} is {tensor.layout} {tensor.dtype} on {tensor.device.type}; "
                "only strided, unquantized CPU tensors are supported"
            )
        else:
            arrays[str(name)] = _as_numpy(tensor, torch)
    if arrays and all(name.startswith("module.") for name in arrays):  # prefix of DistributedDataParallel
        arrays = {name.removeprefix("module."): array for name, array in arrays.items()}
    return CheckpointTensors(arrays, (path,), skipped, is_zip)


def has_nan(array: np.ndarray) -> bool:
    """Whether a float array holds a NaN. Compares the bits in blocks that fit into the CPU cache."""
    float_dtype = np.dtype(array.dtype)
    if float_dtype not in _INFINITY_BITS:
        return False
    word = np.dtype(f"u{float_dtype.itemsize}")
    flat, infinity = array.reshape(-1).view(word), _INFINITY_BITS[float_dtype]
    mask = word.type(np.iinfo(word).max >> 1)  # all bits except the sign
    return any((flat[start : start + 2**17] & mask).max() > infinity for start in range(0, flat.size, 2**17))


_INFINITY_BITS = {
    np.dtype(dtype): np.asarray(np.inf, dtype).view(f"u{np.dtype(dtype).itemsize}")[()]
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
}


def _open_folder(path: Path, key: str | None) -> CheckpointTensors:
    """The weights of a folder: safetensors preferred to pickles, an index to a single file.

    Raises UserError where several files or none match.
    """
    for suffixes in ((".safetensors",), TORCH_SUFFIXES):
        files = sorted(file for file in path.iterdir() if file.suffix in suffixes and file.is_file())
        indexes = [f for s in suffixes for f in sorted(path.glob(f"*{s}.index.json"))]
        if len(indexes) == 1:
            return _open_index(indexes[0], key)
        if len(files) == 1 and not indexes:
            return open_weights(files[0], key)
        if files or indexes:
            names = ", ".join(file.name for file in (indexes or files)[:5])
            raise UserError(
                f"{path} holds {len(indexes or files)} weight files ({names}); give the path of one of them"
            )
    raise UserError(f"{path} holds no weights: it needs a .safetensors, .bin, .pth or .pt file or an index of shards")


def _open_index(path: Path, key: str | None) -> CheckpointTensors:
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes; an index may have at most {MAX_HEADER_BYTES:,} bytes"
        )
    try:
        index = json.loads(path.read_bytes(), object_pairs_hook=_reject_duplicate_keys)
        files: dict[str, set[str]] = {}
        for name, file in index["weight_map"].items():
            files.setdefault(str(file), set()).add(name)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no valid index of weight files: {_first_line(error)}") from error
    if not files:
        raise UserError(f"the index {path} lists no tensors")
    tensors = CheckpointTensors({}, ())
    for file, names in files.items():
        if Path(file).name != file or file in ("", ".", "..") or "\\" in file:
            raise UserError(f"{path} names the file {file!r}; an index may only name files in its own folder")
        if not file.endswith((".safetensors", *TORCH_SUFFIXES)):
            raise UserError(f"{path} names the file {file!r}, which is no weight file")
        if not (path.parent / file).is_file():
            raise UserError(f"{path} names the file {file!r}, which is missing; download it into the same folder")
        part = open_weights(path.parent / file, key)
        if names != part.keys():
            differing = sorted(names ^ part.keys())
            raise UserError(f"{path} and {file} disagree on {len(differing)} tensors, for example {differing[0]!r}")
        tensors = tensors | part if tensors.files else part
    return tensors


def _import_torch(path: Path):
    """The torch module. Raises UserError where it is missing or too old to load untrusted pickles safely."""
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"reading {path} needs PyTorch; install lionjax[torch], or use .safetensors files")
    import torch

    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < MIN_TORCH_VERSION:
        min_version = ".".join(map(str, MIN_TORCH_VERSION))
        raise UserError(
            f"torch {torch.__version__} can run code hidden in {path}; install torch {min_version} or newer"
        )
    return torch


def _check_zip(path: Path) -> None:
    """Raise UserError for a torch zip file with compressed or oversized members (a zip bomb)."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, UnicodeError) as error:
        raise UserError(f"{path} is damaged: {_first_line(error)}") from error
    size = path.stat().st_size
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
        raise UserError(f"{path} cannot be loaded: its zip members are compressed, or larger than the file")
    if any(m.filename.endswith(".pkl") and m.file_size > MAX_PICKLE_BYTES for m in members):
        raise UserError(f"{path} cannot be loaded: its pickle is larger than {MAX_PICKLE_BYTES:,} bytes")


def _find_state_dict(loaded, key: str | None, path: Path, tensor_type: type) -> tuple[Mapping, dict[str, str]]:
    """(state dict, {skipped key: reason}) of an object loaded by torch."""
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a dictionary of tensors")
    keys = (key,) if key is not None else STATE_DICT_KEYS
    inner = next((k for k in keys if isinstance(loaded.get(k), Mapping)), None)
    if inner is None:
        if key is not None:
            raise UserError(f"{path} holds no dictionary {key!r}; its keys are {', '.join(map(str, list(loaded)[:8]))}")
        if not any(isinstance(value, tensor_type) for value in loaded.values()):
            raise UserError(f"{path} holds no tensors; its keys are {', '.join(map(str, list(loaded)[:8])) or 'none'}")
        return loaded, {}
    skipped = {str(name): f"outside of {inner!r}" for name in loaded if name != inner}
    return loaded[inner], skipped


def _as_numpy(tensor, torch) -> np.ndarray:
    """A numpy view of a torch tensor; dtypes that numpy lacks are viewed as integers of the same size first."""
    tensor = tensor.detach()
    special = {
        torch.bfloat16: (torch.uint16, ml_dtypes.bfloat16),
        torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
        torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
    }
    word, dtype = special.get(tensor.dtype, (None, None))
    return tensor.numpy() if word is None else tensor.view(word).numpy().view(dtype)


def _reject_duplicate_keys(pairs: list[tuple[str, object]]) -> dict:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {duplicate!r} occurs twice")
    return entries


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
