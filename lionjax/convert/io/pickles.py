# SPDX-License-Identifier: Apache-2.0
"""Open PyTorch's .bin, .pth and .pt files as memory-mapped arrays, without running code that they hold.

TorchScript archives are read too (`torchscript.py`).
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from lionjax.convert.io.tensors import CheckpointTensors, first_line
from lionjax.convert.io.torchscript import is_torchscript, open_torchscript
from lionjax.core.types import UserError

log = logging.getLogger(__name__)

MAX_PICKLE_BYTES = 64 * 2**20  # of the pickle inside a .bin or .pth, which holds names and shapes
TORCH_SUFFIXES = (".bin", ".pth", ".pt")
STATE_DICT_KEYS = ("model", "state_dict", "model_state_dict", "module")  # keys of the weights in training checkpoints
MAX_NESTING = 4  # dictionaries around the weights, such as {"model": {"state_dict": ...}}
MIN_TORCH_VERSION = (2, 10)
QUANTIZATION_LIBRARIES = ("bitsandbytes", "auto_gptq", "gptqmodel", "awq", "torchao", "hqq", "optimum", "quanto")


def open_torch(path: Path, key: str | None = None) -> CheckpointTensors:
    """The tensors of a .bin, .pth or .pt file, memory mapped, so that an optimizer state in it is not read.

    Loads with weights_only=True. Raises UserError for damaged files and for pickles with code.
    """
    try:
        is_zip = zipfile.is_zipfile(path)
    except zipfile.BadZipFile as error:  # raised for a damaged record at the end
        raise UserError(f"{path} is damaged: {error}; download it again") from error
    if is_zip and is_torchscript(path):
        return open_torchscript(path)
    torch = _import_torch(path)
    with path.open("rb") as file:
        starts_as_zip = file.read(4) == b"PK\x03\x04"
    if is_zip:
        _check_zip(path)
    elif starts_as_zip:
        raise UserError(f"{path} is cut short: its zip has no directory at the end; download it again")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_plain_data_globals()):
            warnings.simplefilter("ignore")  # for unusual pickles torch asks users to file an issue
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch raises many kinds on damaged files
        raise UserError(f"{path} cannot be loaded: {_load_failure(error)}") from error
    if not is_zip:
        log.warning("%s has torch's old format (no zip), which cannot be memory mapped: all of it was read", path)
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
    return CheckpointTensors(arrays, (path,), skipped, is_zip)


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


def _plain_data_globals() -> list:
    """Classes and functions beside torch's own that a pickle may name: NumPy's scalars and arrays, and Namespace.

    They make data only and run no code of the file.
    """
    reconstruct, scalar = np.ndarray.__reduce__(np.zeros(1))[0], np.float64().__reduce__()[0]
    functions = [
        (f, f"numpy.{core}.multiarray.{f.__name__}") for f in (reconstruct, scalar) for core in ("core", "_core")
    ]
    dtypes = {type(np.dtype(code)) for code in "?bhilqBHILQefdFDSU"}
    return [*functions, np.ndarray, np.dtype, *sorted(dtypes, key=str), argparse.Namespace]


def _load_failure(error: Exception) -> str:
    """Why torch could not load a file, as the end of a sentence."""
    if match := re.search(r"GLOBAL ([\w.]+)", str(error)):
        library = match[1].partition(".")[0]
        if library in QUANTIZATION_LIBRARIES:
            return f"it holds weights quantized by {library} ({match[1]}); use the unquantized weights"
        return f"it holds code ({match[1]}); ask its authors for a .safetensors file"
    if match := re.search(r"Can only (?:build|reduce).*<class '([\w.]+)'>", str(error)):
        return f"it holds objects ({match[1]}) beside tensors and plain data; ask its authors for a .safetensors file"
    if match := re.search(r"WeightsUnpickler error:\s*(.+)", str(error)):
        return f"its pickle is damaged or holds more than plain data ({match[1][:200]})"
    return f"it is damaged or no PyTorch file ({type(error).__name__}: {first_line(error)})"


def _check_zip(path: Path) -> None:
    """Raise UserError for a torch zip file with compressed or oversized members (a zip bomb)."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, UnicodeError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from error
    size = path.stat().st_size
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
        raise UserError(f"{path} cannot be loaded: its zip members are compressed, or larger than the file")
    if any(m.filename.endswith(".pkl") and m.file_size > MAX_PICKLE_BYTES for m in members):
        raise UserError(f"{path} cannot be loaded: its pickle is larger than {MAX_PICKLE_BYTES:,} bytes")


def _find_state_dict(loaded, key: str | None, path: Path, tensor_type: type) -> tuple[Mapping, dict[str, str]]:
    """(state dict, {skipped key: reason}) of an object loaded by torch; dictionaries around the weights are opened."""
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a dictionary of tensors")
    if key is not None:
        if not isinstance(loaded.get(key), Mapping):
            raise UserError(f"{path} holds no dictionary {key!r}; its keys are {_list_keys(loaded)}")
        skipped, loaded = {str(name): f"outside of {key!r}" for name in loaded if name != key}, loaded[key]
    else:
        skipped = {}
    if (keys := _keys_to_tensors(loaded, tensor_type)) is None:
        raise UserError(f"{path} holds no tensors; its keys are {_list_keys(loaded)}")
    for inner in keys:
        skipped |= {str(name): f"outside of {inner!r}" for name in loaded if name != inner}
        loaded = loaded[inner]
    return loaded, skipped


def _keys_to_tensors(loaded: Mapping, tensor_type: type, depth: int = 0) -> tuple[str, ...] | None:
    """The STATE_DICT_KEYS that lead to a dictionary of tensors, outermost first; None where none do."""
    if depth < MAX_NESTING:
        for key in STATE_DICT_KEYS:
            inner = loaded.get(key)
            found = _keys_to_tensors(inner, tensor_type, depth + 1) if isinstance(inner, Mapping) else None
            if found is not None:
                return (key, *found)
    return () if any(isinstance(value, tensor_type) for value in loaded.values()) else None


def _list_keys(loaded: Mapping) -> str:
    return ", ".join(map(str, list(loaded)[:8])) or "none"


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
