# SPDX-License-Identifier: Apache-2.0
"""On-disk cache of the image features of frozen encoders, as ArrayRecord files, for later starts and other runs.

The cache has a folder for each `FeatureSpec`; the folder's name is a hash of the traced computation and of the weights
it reads, so features of another encoder, layer or dtype are never used. A record's key is a hash of the model's image
inputs (pixels), so other data or preprocessing never match. Each process writes its own files. Unfinished files of a
killed run are ignored, and corrupt records are computed again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import socket
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lionjax.core import params as trees
from lionjax.core.types import VLM, Batch, Params, UserError
from lionjax.training import checksum

log = logging.getLogger(__name__)

FILE_SUFFIX, PARTIAL_SUFFIX = ".array_record", ".part"
MAX_FILE_BYTES, MAX_FILE_SECONDS = 128 * 2**20, 30.0  # limits after which a file is finished and a new one opened
STALE_SECONDS = 24 * 3600.0  # an unfinished file not written for so long belongs to a dead process
CHECKSUM_BYTES, KEY_BYTES = 4, 16  # each record starts with its CRC-32 and its key
WRITER_OPTIONS = "uncompressed,group_size:1"


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """Identity of a feature computation: its hash (`name`), output shapes and the batch leaves it reads.

    `shapes`: pytree of ShapeDtypeStructs without the batch axis. `input_leaves`: indices into jax.tree.leaves(batch).
    """

    name: str
    shapes: Any
    input_leaves: tuple[int, ...]

    def keys(self, batch: Batch, rows: Iterable[int]) -> list[bytes]:
        """A BLAKE2b digest of the input leaves for each of the batch's `rows`."""
        leaves = jax.tree.leaves(batch)
        inputs = [np.ascontiguousarray(leaves[index]) for index in self.input_leaves]
        digests = []
        for row in rows:
            digest = hashlib.blake2b(digest_size=KEY_BYTES)
            for leaf in inputs:
                digest.update(f"{leaf.dtype}{leaf.shape[1:]}".encode())
                digest.update(memoryview(leaf[row]).cast("B") if leaf[row].size else b"")
            digests.append(digest.digest())
        return digests


def make_feature_spec(model: VLM, frozen: Params, trainable: Params, batch: Batch) -> FeatureSpec:
    """The FeatureSpec of `model.extract_features` on batches like `batch`.

    Raises UserError if the features depend on a parameter that some stage trains.
    """
    weights = trees.flatten(trees.merge(frozen, trainable))  # in jax.tree's order
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *np.shape(x)[1:]), x.dtype), batch)
    rows, structure = jax.tree.flatten(example)
    # Unused inputs become constants of no effect, so that not even their shapes enter the hash.
    zeros = [np.broadcast_to(np.zeros((), x.dtype), x.shape) for x in (*weights.values(), *rows)]

    def features(inputs: dict[int, jax.Array]):
        leaves = [inputs.get(index, x) for index, x in enumerate(zeros)]
        params = trees.unflatten(dict(zip(weights, leaves)))
        return model.extract_features(params, jax.tree.unflatten(structure, leaves[len(weights) :]))

    shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in enumerate(zeros)}
    used = used_inputs(jax.make_jaxpr(features)(shapes).jaxpr)
    shapes = {index: shape for index, shape in shapes.items() if used[index]}
    traced, feature_shapes = jax.make_jaxpr(features, return_shape=True)(shapes)
    used_weights = {path: leaf for (path, leaf), flag in zip(weights.items(), used) if flag}
    if trained := sorted(used_weights.keys() & trees.flatten(trainable).keys()):
        raise UserError(
            f"the image features depend on a parameter that some stage trains ({trained[0]}); set run.cache_features "
            "to false and run.feature_cache_dir to ''"
        )
    identity = {
        "computation": re.sub(r"0x[0-9a-f]+", "", str(traced.jaxpr)),
        "constants": [hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for x in traced.consts],
        "weights": checksum.manifest({"tower": trees.unflatten(used_weights)}),
    }
    input_leaves = tuple(index for index in range(len(rows)) if used[len(weights) + index])
    row_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), feature_shapes)
    return FeatureSpec(checksum.sha256_of_json(identity)[:16], row_shapes, input_leaves)


def used_inputs(jaxpr) -> list[bool]:
    """For each input of a jaxpr, whether an output can depend on it."""
    needed = {var for var in jaxpr.outvars if not hasattr(var, "val")}
    for equation in reversed(jaxpr.eqns):
        if any(var in needed for var in equation.outvars):
            needed |= {var for var in equation.invars if not hasattr(var, "val")}
    return [var in needed for var in jaxpr.invars]


class FeatureStore:
    """The stored features of one FeatureSpec in `folder`: `get` and `add` rows by key, `close` at the end."""

    def __init__(self, folder: Path, spec: FeatureSpec):
        try:
            from array_record.python import array_record_module
        except ImportError as error:
            raise UserError("run.feature_cache_dir needs array_record; run `pip install 'lionjax[data]'`") from error
        self.module, self.spec, self.folder = array_record_module, spec, Path(folder) / spec.name
        self.leaves = jax.tree.leaves(spec.shapes)
        self.sizes = [int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in self.leaves]
        self.index: dict[bytes, tuple[str, int]] = {}
        self.readers: dict[str, Any] = {}
        self.writer = self.partial_path = None
        self.disabled, self.file_count = False, 0
        self.written_keys: list[bytes] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("*" + PARTIAL_SUFFIX):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write in {self.folder}: {error.strerror}; set another run.feature_cache_dir"
            ) from error
        self.refresh()

    def refresh(self) -> None:
        """Index the files that were finished since the last call, also by other processes."""
        for path in sorted(self.folder.glob("*" + FILE_SUFFIX)):
            if path.name in self.readers:
                continue
            try:
                reader = self.module.ArrayRecordReader(str(path), "readahead_buffer_size:0")
                keys = json.loads(reader.read([reader.num_records() - 1])[0])
                entries = {bytes.fromhex(key): (path.name, n) for n, key in enumerate(keys)}
            except Exception as error:  # ArrayRecord raises several types for corrupt files
                log.warning("%s cannot be read (%s); its features are computed again", path, error)
                reader, entries = None, {}
            self.readers[path.name] = reader
            self.index |= entries

    def get(self, key: bytes) -> list[np.ndarray] | None:
        """The feature leaves stored under `key`, or None if they are missing or corrupt."""
        if key not in self.index:
            return None
        name, number = self.index[key]
        try:
            stored = self.readers[name].read([number])[0]
        except Exception:  # any unreadable record is computed again
            stored = b""
        content = stored[CHECKSUM_BYTES:]
        complete = len(content) == KEY_BYTES + sum(self.sizes) and content[:KEY_BYTES] == key
        if not complete or zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "big") != stored[:CHECKSUM_BYTES]:
            log.warning("a record of %s is corrupt; its features are computed again", name)
            del self.index[key]
            return None
        parts, start = [], KEY_BYTES
        for leaf, size in zip(self.leaves, self.sizes):
            values = np.frombuffer(content, leaf.dtype, size // leaf.dtype.itemsize, start)
            parts.append(values.reshape(leaf.shape))
            start += size
        return parts

    def add(self, key: bytes, parts: list[np.ndarray]) -> None:
        """Write a row unless it is stored already. After a write error, logs one warning and stops writing."""
        if self.disabled or key in self.index or key in self.written_keys:
            return
        content = key + b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
        try:
            if self.writer is None:
                self._open_file()
            self.writer.write(zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "big") + content)
            self.written_keys.append(key)
            self.file_bytes += len(content)
            if self.file_bytes > MAX_FILE_BYTES or time.monotonic() - self.file_opened_at > MAX_FILE_SECONDS:
                self.finish_file()
        except Exception as error:
            self._disable(error)

    def _open_file(self) -> None:
        self.file_count += 1
        name = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns():x}-{self.file_count}"
        self.partial_path = self.folder / (name + PARTIAL_SUFFIX)
        self.writer = self.module.ArrayRecordWriter(str(self.partial_path), WRITER_OPTIONS)
        self.file_bytes, self.file_opened_at = 0, time.monotonic()

    def finish_file(self) -> None:
        """Append the index to the current file and rename it to its final name."""
        writer, partial_path = self.writer, self.partial_path
        if writer is None:
            return
        writer.write(json.dumps([key.hex() for key in self.written_keys]).encode())
        writer.close()
        self.writer, self.written_keys = None, []
        partial_path.replace(partial_path.with_suffix(FILE_SUFFIX))
        self.refresh()

    def _disable(self, error: Exception) -> None:
        log.warning(
            "cannot write features to %s (%s); the run continues and computes the features that are not stored",
            *(self.folder, (str(error).strip().splitlines() or [type(error).__name__])[0]),
        )
        self.disabled, self.writer, self.written_keys = True, None, []
        if self.partial_path is not None:
            self.partial_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Finish the current file."""
        try:
            self.finish_file()
        except Exception as error:
            self._disable(error)
