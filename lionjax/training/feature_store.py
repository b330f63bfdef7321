# SPDX-License-Identifier: Apache-2.0
"""What frozen towers make of pictures as ArrayRecord files, for the next start of a run and for other runs.

A folder holds one folder for each way of seeing: the traced computation and the weights that it reads decide its name,
so that another tower, another layer or another dtype never meets old features. In it a record goes by what is seen, the
pixels themselves: other data or another preprocessing finds nothing. Each process writes files of its own; one that a
killed run left unfinished counts for nothing, and what is damaged is computed again.
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
MAX_FILE_BYTES, MAX_FILE_SECONDS = 128 * 2**20, 30.0  # bytes and seconds after which a file is finished
STALE_SECONDS = 24 * 3600.0  # seconds without a write after which nobody works on an unfinished file
CHECKSUM_BYTES, KEY_BYTES = 4, 16  # bytes in front of a record: of its checksum, and of what was seen
WRITER_OPTIONS = "uncompressed,group_size:1"


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """How a system sees. `shapes`: of one row of its features. `inputs`: which leaves of a batch it looks at."""

    name: str
    shapes: Any
    input_leaves: tuple[int, ...]

    def keys(self, batch: Batch, rows: Iterable[int]) -> list[bytes]:
        """For each of these rows a digest of what is looked at."""
        leaves = jax.tree.leaves(batch)
        seen = [np.ascontiguousarray(leaves[number]) for number in self.input_leaves]
        digests = []
        for row in rows:
            digest = hashlib.blake2b(digest_size=KEY_BYTES)
            for leaf in seen:
                digest.update(f"{leaf.dtype}{leaf.shape[1:]}".encode())
                digest.update(memoryview(leaf[row]).cast("B") if leaf[row].size else b"")
            digests.append(digest.digest())
        return digests


def make_feature_spec(model: VLM, frozen: Params, trainable: Params, batch: Batch) -> FeatureSpec:
    """How a system sees such batches by the parameters that no stage trains. Raises UserError where it needs others."""
    weights = trees.flatten(trees.merge(frozen, trainable))  # in the order in which jax has them
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *np.shape(x)[1:]), x.dtype), batch)
    rows, structure = jax.tree.flatten(one)
    # What is not looked at has no part in the name, not even its shape.
    empty = [np.broadcast_to(np.zeros((), x.dtype), x.shape) for x in (*weights.values(), *rows)]

    def features(given: dict[int, jax.Array]):
        leaves = [given.get(number, x) for number, x in enumerate(empty)]
        params = trees.unflatten(dict(zip(weights, leaves)))
        return model.extract_features(params, jax.tree.unflatten(structure, leaves[len(weights) :]))

    shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in enumerate(empty)}
    flags = used_inputs(jax.make_jaxpr(features)(shapes).jaxpr)
    shapes = {number: shape for number, shape in shapes.items() if flags[number]}
    traced, made = jax.make_jaxpr(features, return_shape=True)(shapes)
    read = {path: leaf for (path, leaf), flag in zip(weights.items(), flags) if flag}
    if trained := sorted(read.keys() & trees.flatten(trainable).keys()):
        raise UserError(
            f"some stage trains a part that makes the features ({trained[0]}); set run.cache_features to false and "
            "run.feature_cache_dir to nothing"
        )
    said = {
        "computation": re.sub(r"0x[0-9a-f]+", "", str(traced.jaxpr)),
        "constants": [hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for x in traced.consts],
        "weights": checksum.manifest({"tower": trees.unflatten(read)}),
    }
    inputs = tuple(number for number in range(len(rows)) if flags[len(weights) + number])
    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), made)
    return FeatureSpec(checksum.sha256_of_json(said)[:16], row, inputs)


def used_inputs(jaxpr) -> list[bool]:
    """For each input of a traced function whether an output can depend on it."""
    needed = {var for var in jaxpr.outvars if not hasattr(var, "val")}
    for equation in reversed(jaxpr.eqns):
        if any(var in needed for var in equation.outvars):
            needed |= {var for var in equation.invars if not hasattr(var, "val")}
    return [var in needed for var in jaxpr.invars]


class FeatureStore:
    """The features of one `Sight` under a folder: `get` what is there, `put` what is not, `close` at the end."""

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
                f"cannot write in {self.folder}: {error.strerror}; name another run.feature_cache_dir"
            ) from error
        self.refresh()

    def refresh(self) -> None:
        """Learn of the files that were finished since, also by other processes."""
        for path in sorted(self.folder.glob("*" + FILE_SUFFIX)):
            if path.name in self.readers:
                continue
            try:
                reader = self.module.ArrayRecordReader(str(path), "readahead_buffer_size:0")
                keys = json.loads(reader.read([reader.num_records() - 1])[0])
                places = {bytes.fromhex(key): (path.name, n) for n, key in enumerate(keys)}
            except Exception as error:  # ArrayRecord's own words are RuntimeErrors of many kinds
                log.warning("%s cannot be read (%s); its features are made again", path, error)
                reader, places = None, {}
            self.readers[path.name] = reader
            self.index |= places

    def get(self, key: bytes) -> list[np.ndarray] | None:
        """The leaves of a row, or None where they are missing or damaged."""
        if key not in self.index:
            return None
        name, number = self.index[key]
        try:
            stored = self.readers[name].read([number])[0]
        except Exception:  # whatever is wrong with it, it can be made again
            stored = b""
        content = stored[CHECKSUM_BYTES:]
        whole = len(content) == KEY_BYTES + sum(self.sizes) and content[:KEY_BYTES] == key
        if not whole or zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "big") != stored[:CHECKSUM_BYTES]:
            log.warning("a record of %s is damaged; its features are made again", name)
            del self.index[key]
            return None
        parts, start = [], KEY_BYTES
        for leaf, size in zip(self.leaves, self.sizes):
            values = np.frombuffer(content, leaf.dtype, size // leaf.dtype.itemsize, start)
            parts.append(values.reshape(leaf.shape))
            start += size
        return parts

    def add(self, key: bytes, parts: list[np.ndarray]) -> None:
        """Write a row unless it is there. Where the disk is full nothing more is written, which is said once."""
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
        """Give the file that is being written its index and its name."""
        writer, part = self.writer, self.partial_path
        if writer is None:
            return
        writer.write(json.dumps([key.hex() for key in self.written_keys]).encode())
        writer.close()
        self.writer, self.written_keys = None, []
        part.replace(part.with_suffix(FILE_SUFFIX))
        self.refresh()

    def _disable(self, error: Exception) -> None:
        log.warning(
            "no more features are kept in %s (%s); the run goes on and makes them as it needs them",
            *(self.folder, (str(error).strip().splitlines() or [type(error).__name__])[0]),
        )
        self.disabled, self.writer, self.written_keys = True, None, []
        if self.partial_path is not None:
            self.partial_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Finish what is being written."""
        try:
            self.finish_file()
        except Exception as error:
            self._disable(error)
