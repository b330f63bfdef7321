# SPDX-License-Identifier: Apache-2.0
"""Weight files from elsewhere, opened so that nothing is read before it is used.

`open_weights` takes a .safetensors, .bin, .pth or .pt file, an index of shards, or a folder with any of
these, and hands back names with arrays that lie on the disk (memory maps). Files come from strangers: sizes
are checked before memory is taken, names in an index may not leave its folder, and a pickle that holds code
is refused.
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
MAX_HEADER_BYTES = 32 * 2**20  # bytes; the largest published models stay under one MiB
MAX_PICKLE_BYTES = 64 * 2**20  # bytes of the pickle inside a .bin or .pth, which holds names and shapes
TORCH_SUFFIXES = (".bin", ".pth", ".pt")
STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict", "module")  # where runners keep the weights
MIN_TORCH_VERSION = (2, 10)


class CheckpointTensors(Mapping):
    """Tensors by name, as read-only numpy arrays that come from the disk when they are used.

    `left` says what the files hold besides and is not read: name -> reason. `sources` are the files.
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
        """The same tensors with a prefix before their names."""
        return self._map_keys(lambda name: prefix + name)

    def without_prefix(self, prefix: str) -> CheckpointTensors:
        """The same tensors, a prefix taken away where it stands before a name."""
        return self._map_keys(lambda name: name.removeprefix(prefix))

    def rename_keys(self, *replacements: tuple[str, str]) -> CheckpointTensors:
        """The same tensors under names in which regular expressions, each in turn, are replaced once."""

        def rename(name: str) -> str:
            for pattern, new in replacements:
                name = re.sub(pattern, new, name, count=1)
            return name

        return self._map_keys(rename)

    def _map_keys(self, rename_key: Callable[[str], str]) -> CheckpointTensors:
        arrays = {rename_key(name): array for name, array in self.arrays.items()}
        if len(arrays) < len(self.arrays):
            raise UserError(f"two tensors of {self.files[0]} mean the same one")
        made = CheckpointTensors(arrays, self.files, {rename_key(n): why for n, why in self.skipped.items()})
        made.memory_mapped = {rename_key(name) for name in self.memory_mapped}
        return made

    def __or__(self, other: CheckpointTensors) -> CheckpointTensors:
        """Both together. Raises UserError when a name stands in both."""
        if both := sorted(self.arrays.keys() & other.arrays.keys()):
            files = " and ".join(str(part.files[0]) for part in (self, other))
            raise UserError(f"{len(both)} tensors stand in both {files}, for example {both[0]!r}")
        arrays = self.arrays | other.arrays
        made = CheckpointTensors(arrays, self.files + other.files, self.skipped | other.skipped)
        made.memory_mapped = self.memory_mapped | other.memory_mapped
        return made

    def release(self, name: str, array: np.ndarray | None = None) -> None:
        """Let the system drop the pages of a tensor, or of a part of it, that has been read; they stay in its cache.

        Without this a conversion seems to hold every byte it has read.
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
    """The tensors of a file, an index or a folder. `key` names the inner dictionary of a .pth, where it is unusual.

    Raises UserError, in one sentence, for anything that is missing, damaged, too large to be true or unsafe.
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
    raise UserError(f"{path} is no weight file; wanted .safetensors, .bin, .pth, .pt, an .index.json or a folder")


def open_safetensors(path: Path) -> CheckpointTensors:
    """A safetensors file. The header is held against the file's size before anything else is read."""
    import safetensors

    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if len(start) < 8 or length > size - 8:
            raise UserError(f"{path} is cut short: its header does not fit into {size} bytes")
        if length > MAX_HEADER_BYTES:
            raise UserError(f"{path} has a header of {length:,} bytes; more than {MAX_HEADER_BYTES:,} is refused")
        header = file.read(length)
        try:  # the library holds offsets, shapes and sizes against each other
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
            raise UserError(f"tensor {name!r} of {path} has dtype {entry['dtype']}, which is not known here")
        dtype, shape = np.dtype(SAFETENSORS_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        flat = np.frombuffer(space, dtype, (end - begin) // dtype.itemsize, 8 + length + begin) if end > begin else []
        arrays[name] = np.asarray(flat, dtype).reshape(shape)
    return CheckpointTensors(arrays, (path,))


def open_torch(path: Path, key: str | None = None) -> CheckpointTensors:
    """A .bin, .pth or .pt file: tensors only, mapped from the disk, so that an optimiser beside them stays there."""
    torch = _import_torch(path)
    mapped = zipfile.is_zipfile(path)
    if mapped:
        _check_zip(path)
    else:
        log.warning("%s has torch's old format, which cannot be mapped: it is read into memory whole", path)
    try:
        with warnings.catch_warnings():  # of odd pickles torch asks people to file an issue
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds on damaged files
        text = str(error)
        if found := re.search(r"GLOBAL ([\w.]+)", text):
            reason = f"it holds code ({found[1]}), which could do anything; ask its makers for .safetensors"
        else:
            reason = f"it is damaged or no PyTorch file ({type(error).__name__}: {_first_line(error)})"
        raise UserError(f"{path} is refused: {reason}") from error
    state, left = _find_state_dict(loaded, key, path, torch.Tensor)
    arrays = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            left[str(name)] = f"not a tensor but a {type(tensor).__name__}"
        elif tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise UserError(f"tensor {name!r} of {path} is {tensor.layout} {tensor.dtype}; only plain tensors are read")
        else:
            arrays[str(name)] = _as_numpy(tensor, torch)
    if arrays and all(name.startswith("module.") for name in arrays):  # what DistributedDataParallel adds
        arrays = {name.removeprefix("module."): array for name, array in arrays.items()}
    return CheckpointTensors(arrays, (path,), left, mapped)


def has_nan(array: np.ndarray) -> bool:
    """Whether a floating array holds a NaN, from its bits, a cache's worth at a time."""
    kind = np.dtype(array.dtype)
    if kind not in _INFINITY_BITS:
        return False
    word = np.dtype(f"u{kind.itemsize}")
    flat, limit = array.reshape(-1).view(word), _INFINITY_BITS[kind]
    mask = word.type(np.iinfo(word).max >> 1)  # all but the sign
    return any((flat[at : at + 2**17] & mask).max() > limit for at in range(0, flat.size, 2**17))


_INFINITY_BITS = {
    np.dtype(dtype): np.asarray(np.inf, dtype).view(f"u{np.dtype(dtype).itemsize}")[()]
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
}


def _open_folder(path: Path, key: str | None) -> CheckpointTensors:
    """The weights of a folder: safetensors before pickles, an index before single files, never a guess between two."""
    for suffixes in ((".safetensors",), TORCH_SUFFIXES):
        files = sorted(file for file in path.iterdir() if file.suffix in suffixes and file.is_file())
        indexes = [f for s in suffixes for f in sorted(path.glob(f"*{s}.index.json"))]
        if len(indexes) == 1:
            return _open_index(indexes[0], key)
        if len(files) == 1 and not indexes:
            return open_weights(files[0], key)
        if files or indexes:
            names = ", ".join(file.name for file in (indexes or files)[:5])
            raise UserError(f"{path} holds several weight files ({names}); name the one to read")
    raise UserError(f"{path} holds no weights: no .safetensors, .bin, .pth or .pt file and no index of them")


def _open_index(path: Path, key: str | None) -> CheckpointTensors:
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes; an index of more than {MAX_HEADER_BYTES:,} is refused"
        )
    try:
        index = json.loads(path.read_bytes(), object_pairs_hook=_reject_duplicate_keys)
        files: dict[str, set[str]] = {}
        for name, file in index["weight_map"].items():
            files.setdefault(str(file), set()).add(name)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no index of weight files: {_first_line(error)}") from error
    if not files:
        raise UserError(f"{path} names no tensors")
    tensors = CheckpointTensors({}, ())
    for file, names in files.items():
        if Path(file).name != file or file in ("", ".", "..") or "\\" in file:
            raise UserError(f"{path} names the file {file!r}; an index may only name files that lie beside it")
        if not file.endswith((".safetensors", *TORCH_SUFFIXES)):
            raise UserError(f"{path} names the file {file!r}, which is no weight file")
        if not (path.parent / file).is_file():
            raise UserError(f"{path} names the file {file!r}, which is missing")
        part = open_weights(path.parent / file, key)
        if names != part.keys():
            odd = sorted(names ^ part.keys())
            raise UserError(f"{path} and {file} disagree on {len(odd)} tensors, for example {odd[0]!r}")
        tensors = tensors | part if tensors.files else part
    return tensors


def _import_torch(path: Path):
    """The torch module, if it is there and young enough to be safe with strangers' files."""
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"{path} needs PyTorch to be read; install lionjax[torch], or use .safetensors files")
    import torch

    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < MIN_TORCH_VERSION:
        wanted = ".".join(map(str, MIN_TORCH_VERSION))
        raise UserError(f"torch {torch.__version__} can run code hidden in {path}; install torch {wanted} or newer")
    return torch


def _check_zip(path: Path) -> None:
    """A torch file is a zip whose members are stored as they are; anything that would grow when read is refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, UnicodeError) as error:
        raise UserError(f"{path} is damaged: {_first_line(error)}") from error
    size = path.stat().st_size
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
        raise UserError(f"{path} is refused: its parts are packed, or larger than the file")
    if any(m.filename.endswith(".pkl") and m.file_size > MAX_PICKLE_BYTES for m in members):
        raise UserError(f"{path} is refused: its table of contents is larger than {MAX_PICKLE_BYTES:,} bytes")


def _find_state_dict(loaded, key: str | None, path: Path, tensor_type: type) -> tuple[Mapping, dict[str, str]]:
    """The dictionary of tensors inside what torch loaded, and what else lies beside it."""
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a dictionary of tensors")
    keys = (key,) if key is not None else STATE_DICT_KEYS
    inner = next((k for k in keys if isinstance(loaded.get(k), Mapping)), None)
    if inner is None:
        if key is not None:
            raise UserError(f"{path} holds no dictionary {key!r}; it has {', '.join(map(str, list(loaded)[:8]))}")
        if not any(isinstance(value, tensor_type) for value in loaded.values()):
            raise UserError(f"{path} holds no tensors; it has {', '.join(map(str, list(loaded)[:8])) or 'nothing'}")
        return loaded, {}
    left = {str(name): f"lies beside {inner!r}" for name in loaded if name != inner}
    return loaded[inner], left


def _as_numpy(tensor, torch) -> np.ndarray:
    """A view of a torch tensor; dtypes that numpy lacks go through words of the same size."""
    tensor = tensor.detach()
    special = {
        torch.bfloat16: (torch.uint16, ml_dtypes.bfloat16),
        torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
        torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
    }
    word, dtype = special.get(tensor.dtype, (None, None))
    return tensor.numpy() if word is None else tensor.view(word).numpy().view(dtype)


def _reject_duplicate_keys(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} stands twice")
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
