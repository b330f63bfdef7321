# SPDX-License-Identifier: Apache-2.0
"""Open safetensors and PyTorch weight files as memory-mapped arrays.

`open_weights` takes a .safetensors, .bin, .pth or .pt file, an index of shards, or a folder with any of these. The
files are untrusted: sizes are checked before memory is allocated, an index may only name files of its own folder, and
pickles with code are rejected.
"""

from __future__ import annotations

import functools
import json
import logging
import mmap
import operator
import re
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

from lionjax.convert.io import pickles
from lionjax.convert.io.key_names import check_not_quantized, remove_wrappers
from lionjax.convert.io.pickles import MAX_PICKLE_BYTES as MAX_PICKLE_BYTES
from lionjax.convert.io.pickles import MIN_TORCH_VERSION as MIN_TORCH_VERSION
from lionjax.convert.io.pickles import STATE_DICT_KEYS as STATE_DICT_KEYS
from lionjax.convert.io.pickles import TORCH_SUFFIXES as TORCH_SUFFIXES
from lionjax.convert.io.tensors import CheckpointTensors as CheckpointTensors
from lionjax.convert.io.tensors import first_line
from lionjax.core.files import check_downloaded
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
# The files that transformers and PEFT read from a folder, in their order.
STANDARD_FILES = tuple(
    stem + suffix + index
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin"))
    for index in ("", ".index.json")
) + ("adapter_model.safetensors", "adapter_model.bin")
# Files of training and other variants, which lie beside the weights.
AUXILIARY_FILE = re.compile(
    r"(training_args|optimizer|optim|scheduler|scaler|rng_state.*|random_states?.*|trainer_state|adapter_model|"
    r"non_lora_trainables|consolidated.*|.*[._-](fp16|bf16|fp32|non_ema|ema))\.(safetensors|bin|pth|pt)"
)
SHARD_FILE = re.compile(r"(.+)-(\d+)-of-(\d+)\.(safetensors|bin)")  # stem, number, count, suffix
OTHER_FORMATS = {  # suffix or first bytes of weight files that are not read -> their name
    ".gguf": "a GGUF file (llama.cpp's format of quantized weights)",
    ".ggml": "a GGML file (llama.cpp's old format of quantized weights)",
    ".h5": "a TensorFlow file",
    ".msgpack": "a Flax file",
    ".onnx": "an ONNX file",
    b"GGUF": "a GGUF file (llama.cpp's format of quantized weights)",
    b"ggjt": "a GGML file (llama.cpp's old format of quantized weights)",
    b"\x89HDF": "a TensorFlow file",
}


def open_weights(path: str | Path, key: str | None = None) -> CheckpointTensors:
    """The tensors of a weight file, an index or a folder, memory mapped.

    `key` is the key of the state dict inside a .pth file, where it is none of STATE_DICT_KEYS. Raises UserError, in one
    sentence, for missing, damaged, oversized or unsafe files.
    """
    path = Path(path)
    try:
        tensors = _open_path(path, key)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    check_not_quantized(tensors, path)
    return tensors.with_keys(remove_wrappers)


def _open_path(path: Path, key: str | None) -> CheckpointTensors:
    """The tensors of a file, index or folder under the names that it has."""
    if path.is_dir():
        parts = [_open_path(file, key) for file in choose_weight_files(path)]
        return functools.reduce(operator.or_, parts)
    check_readable_format(path)
    if path.name.endswith(".index.json"):
        return _open_index(path, key)
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return pickles.open_torch(path, key)
    raise UserError(f"{path} is no weight file; give a .safetensors, .bin, .pth, .pt or .index.json file, or a folder")


def check_readable_format(path: Path) -> None:
    """Raise UserError for an empty file, a failed download, or weights in a format that is not read."""
    with path.open("rb") as file:
        head = file.read(4)
    if not head:
        raise UserError(f"{path} is empty (0 bytes), so its download was cut short; download it again")
    check_downloaded(path)
    if name := OTHER_FORMATS.get(path.suffix) or OTHER_FORMATS.get(head):
        raise UserError(f"{path} is {name}, which is not read; give the original .safetensors or .bin file")
    if path.suffix == ".safetensors" and head == b"PK\x03\x04":
        raise UserError(f"{path} is a PyTorch file with the suffix .safetensors; rename it to .bin")


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
            raise UserError(f"{path} is damaged or no safetensors file: {first_line(error)}") from error
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


def check_folder_formats(path: Path) -> None:
    """Raise UserError for a folder that has no weights but those of a format that is not read, such as GGUF."""
    files = sorted(path.iterdir())
    other = next((file for file in files if file.suffix in OTHER_FORMATS), None)
    if other and not any(file.suffix in (".safetensors", *TORCH_SUFFIXES) for file in files):
        name = OTHER_FORMATS[other.suffix]
        raise UserError(f"{path} holds only {other.name}, {name}, which is not read; it needs .safetensors or .bin")


def choose_weight_files(path: Path) -> list[Path]:
    """The weight file, index, or complete shards to read from a folder; with several, the log says which and why.

    The names that transformers reads come first, in its order; otherwise safetensors are preferred to pickles and an
    index to single files, and files of training beside them do not count. Raises UserError where several or none match.
    """
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", *TORCH_SUFFIXES))
    indexes = [f for suffix in (".safetensors", *TORCH_SUFFIXES) for f in sorted(path.glob(f"*{suffix}.index.json"))]
    standard = next((path / name for name in STANDARD_FILES if path / name in (*files, *indexes)), None)
    reason = "the first name that transformers looks for"
    chosen = [standard] if standard else []
    if not chosen:
        chosen, reason = _choose_by_kind(path, files, indexes)
    index = path / f"{chosen[0].name}.index.json"
    if index in indexes and chosen[0].name in set(_read_index(index).values()):
        chosen = [index]
    used = {*chosen, *(path / name for f in chosen if f in indexes for name in _read_index(f).values())}
    if others := [f.name for f in (*files, *indexes) if f not in used]:
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        log.info("%s: reads %s (%s), not %s%s", path, chosen[0].name, reason, ", ".join(others[:4]), more)
    return chosen


def _choose_by_kind(path: Path, files: list[Path], indexes: list[Path]) -> tuple[list[Path], str]:
    """(files, reason) among weight files without a standard name. Raises UserError where several or none match."""
    main_files = [f for f in files if not AUXILIARY_FILE.fullmatch(f.name)] or files
    for suffixes in ((".safetensors",), TORCH_SUFFIXES):
        candidates = [f for f in indexes if f.name.removesuffix(".index.json").endswith(suffixes)]
        candidates = candidates or [f for f in main_files if f.suffix in suffixes]
        shards = [match for f in candidates if (match := SHARD_FILE.fullmatch(f.name))]
        is_sharded = len({match.group(1, 3, 4) for match in shards}) == 1 and len(shards) == len(candidates)
        if is_sharded and {int(match[2]) for match in shards} == set(range(1, int(shards[0][3]) + 1)):
            return candidates, "all shards, without an index"
        if len(candidates) == 1 and not is_sharded:
            return candidates, "safetensors come first, and files of training do not count"
        if candidates:
            names = ", ".join(file.name for file in candidates[:5])
            remedy = (
                f"download the missing ones of {int(shards[0][3])}" if is_sharded else "give the path of one of them"
            )
            raise UserError(f"{path} holds {len(candidates)} weight files ({names}); {remedy}")
    check_folder_formats(path)
    raise UserError(f"{path} holds no weights: it needs a .safetensors, .bin, .pth or .pt file or an index of shards")


def _read_index(path: Path) -> dict[str, str]:
    """{tensor name: file name} of an index of shards. Raises UserError where it is damaged, too large or empty."""
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes; an index may have at most {MAX_HEADER_BYTES:,} bytes"
        )
    check_readable_format(path)
    try:
        index = json.loads(path.read_bytes(), object_pairs_hook=_reject_duplicate_keys)
        file_names = {name: str(file) for name, file in index["weight_map"].items()}
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no valid index of weight files: {first_line(error)}") from error
    if not file_names:
        raise UserError(f"the index {path} lists no tensors")
    return file_names


def _open_index(path: Path, key: str | None) -> CheckpointTensors:
    """The tensors of all shards of an index, also those that it does not list, as transformers reads them.

    Raises UserError where a shard, or a tensor that the index lists, is missing.
    """
    files: dict[str, set[str]] = {}
    for name, file in _read_index(path).items():
        files.setdefault(file, set()).add(name)
    for file in files:
        if Path(file).name != file or file in ("", ".", "..") or "\\" in file:
            raise UserError(f"{path} names the file {file!r}; an index may only name files in its own folder")
        if not file.endswith((".safetensors", *TORCH_SUFFIXES)):
            raise UserError(f"{path} names the file {file!r}, which is no weight file")
    if missing := sorted(file for file in files if not (path.parent / file).is_file()):
        verb = "which is" if len(missing) == 1 else f"which, with {len(missing) - 1} others, is"
        raise UserError(f"{path} names the file {missing[0]!r}, {verb} missing; download it into the same folder")
    tensors = CheckpointTensors({}, ())
    for file, names in files.items():
        part = _open_path(path.parent / file, key)
        if absent := sorted(names - part.keys()):
            raise UserError(
                f"{path} says that {file} holds {len(absent)} tensors that it lacks, for example {absent[0]!r}; "
                "download the index and its shards from one release"
            )
        if unlisted := sorted(part.keys() - names):
            log.info("%s holds %d tensors that %s lacks, such as %s", file, len(unlisted), path.name, unlisted[0])
        tensors = tensors | part if tensors.files else part
    return tensors


def _reject_duplicate_keys(pairs: list[tuple[str, object]]) -> dict:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {duplicate!r} occurs twice")
    return entries
