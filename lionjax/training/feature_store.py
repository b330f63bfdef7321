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

ENDING, UNFINISHED = ".array_record", ".part"
LARGE, OLD = 128 * 2**20, 30.0  # bytes and seconds after which a file is finished
ABANDONED = 24 * 3600.0  # seconds without a write after which nobody works on an unfinished file
CHECK, KEY = 4, 16  # bytes in front of a record: of its checksum, and of what was seen
WAYS = "uncompressed,group_size:1"


@dataclasses.dataclass(frozen=True)
class Sight:
    """How a system sees. `shapes`: of one row of its features. `inputs`: which leaves of a batch it looks at."""

    name: str
    shapes: Any
    inputs: tuple[int, ...]

    def keys(self, batch: Batch, rows: Iterable[int]) -> list[bytes]:
        """For each of these rows a digest of what is looked at."""
        leaves = jax.tree.leaves(batch)
        seen = [np.ascontiguousarray(leaves[number]) for number in self.inputs]
        digests = []
        for row in rows:
            digest = hashlib.blake2b(digest_size=KEY)
            for leaf in seen:
                digest.update(f"{leaf.dtype}{leaf.shape[1:]}".encode())
                digest.update(memoryview(leaf[row]).cast("B") if leaf[row].size else b"")
            digests.append(digest.digest())
        return digests


def sight(system: VLM, never: Params, learned: Params, batch: Batch) -> Sight:
    """How a system sees such batches by the parameters that no stage trains. Raises UserError where it needs others."""
    weights = trees.flatten(trees.merge(never, learned))  # in the order in which jax has them
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *np.shape(x)[1:]), x.dtype), batch)
    rows, structure = jax.tree.flatten(one)
    # What is not looked at has no part in the name, not even its shape.
    empty = [np.broadcast_to(np.zeros((), x.dtype), x.shape) for x in (*weights.values(), *rows)]

    def features(given: dict[int, jax.Array]):
        leaves = [given.get(number, x) for number, x in enumerate(empty)]
        params = trees.unflatten(dict(zip(weights, leaves)))
        return system.extract_features(params, jax.tree.unflatten(structure, leaves[len(weights) :]))

    shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in enumerate(empty)}
    flags = used(jax.make_jaxpr(features)(shapes).jaxpr)
    shapes = {number: shape for number, shape in shapes.items() if flags[number]}
    traced, made = jax.make_jaxpr(features, return_shape=True)(shapes)
    read = {path: leaf for (path, leaf), flag in zip(weights.items(), flags) if flag}
    if trained := sorted(read.keys() & trees.flatten(learned).keys()):
        raise UserError(
            f"some stage trains a part that makes the features ({trained[0]}); set run.cache_features to false and "
            "run.features_dir to nothing"
        )
    said = {
        "computation": re.sub(r"0x[0-9a-f]+", "", str(traced.jaxpr)),
        "constants": [hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for x in traced.consts],
        "weights": checksum.manifest({"tower": trees.unflatten(read)}),
    }
    inputs = tuple(number for number in range(len(rows)) if flags[len(weights) + number])
    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), made)
    return Sight(checksum.digest(said)[:16], row, inputs)


def used(jaxpr) -> list[bool]:
    """For each input of a traced function whether an output can depend on it."""
    needed = {var for var in jaxpr.outvars if not hasattr(var, "val")}
    for equation in reversed(jaxpr.eqns):
        if any(var in needed for var in equation.outvars):
            needed |= {var for var in equation.invars if not hasattr(var, "val")}
    return [var in needed for var in jaxpr.invars]


class Files:
    """The features of one `Sight` under a folder: `get` what is there, `put` what is not, `close` at the end."""

    def __init__(self, folder: Path, sight: Sight):
        try:
            from array_record.python import array_record_module
        except ImportError as error:
            raise UserError("run.features_dir needs array_record; run `pip install 'lionjax[data]'`") from error
        self.module, self.sight, self.folder = array_record_module, sight, Path(folder) / sight.name
        self.leaves = jax.tree.leaves(sight.shapes)
        self.sizes = [int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in self.leaves]
        self.places: dict[bytes, tuple[str, int]] = {}
        self.readers: dict[str, Any] = {}
        self.writer = self.part = None
        self.full, self.number = False, 0
        self.written: list[bytes] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("*" + UNFINISHED):
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write in {self.folder}: {error.strerror}; name another run.features_dir"
            ) from error
        self.refresh()

    def refresh(self) -> None:
        """Learn of the files that were finished since, also by other processes."""
        for path in sorted(self.folder.glob("*" + ENDING)):
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
            self.places |= places

    def get(self, key: bytes) -> list[np.ndarray] | None:
        """The leaves of a row, or None where they are missing or damaged."""
        if key not in self.places:
            return None
        name, number = self.places[key]
        try:
            stored = self.readers[name].read([number])[0]
        except Exception:  # whatever is wrong with it, it can be made again
            stored = b""
        content = stored[CHECK:]
        whole = len(content) == KEY + sum(self.sizes) and content[:KEY] == key
        if not whole or zlib.crc32(content).to_bytes(CHECK, "big") != stored[:CHECK]:
            log.warning("a record of %s is damaged; its features are made again", name)
            del self.places[key]
            return None
        parts, start = [], KEY
        for leaf, size in zip(self.leaves, self.sizes):
            values = np.frombuffer(content, leaf.dtype, size // leaf.dtype.itemsize, start)
            parts.append(values.reshape(leaf.shape))
            start += size
        return parts

    def put(self, key: bytes, parts: list[np.ndarray]) -> None:
        """Write a row unless it is there. Where the disk is full nothing more is written, which is said once."""
        if self.full or key in self.places or key in self.written:
            return
        content = key + b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
        try:
            if self.writer is None:
                self._begin()
            self.writer.write(zlib.crc32(content).to_bytes(CHECK, "big") + content)
            self.written.append(key)
            self.size += len(content)
            if self.size > LARGE or time.monotonic() - self.since > OLD:
                self.finish()
        except Exception as error:
            self._give_up(error)

    def _begin(self) -> None:
        self.number += 1
        name = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns():x}-{self.number}"
        self.part = self.folder / (name + UNFINISHED)
        self.writer = self.module.ArrayRecordWriter(str(self.part), WAYS)
        self.size, self.since = 0, time.monotonic()

    def finish(self) -> None:
        """Give the file that is being written its index and its name."""
        writer, part = self.writer, self.part
        if writer is None:
            return
        writer.write(json.dumps([key.hex() for key in self.written]).encode())
        writer.close()
        self.writer, self.written = None, []
        part.replace(part.with_suffix(ENDING))
        self.refresh()

    def _give_up(self, error: Exception) -> None:
        log.warning(
            "no more features are kept in %s (%s); the run goes on and makes them as it needs them",
            *(self.folder, (str(error).strip().splitlines() or [type(error).__name__])[0]),
        )
        self.full, self.writer, self.written = True, None, []
        if self.part is not None:
            self.part.unlink(missing_ok=True)

    def close(self) -> None:
        """Finish what is being written."""
        try:
            self.finish()
        except Exception as error:
            self._give_up(error)
