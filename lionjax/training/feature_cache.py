# SPDX-License-Identifier: Apache-2.0
"""What a frozen tower makes of a picture, computed once for each record and kept in memory, and in files if asked."""

from __future__ import annotations

import dataclasses
import logging
from collections import ChainMap
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.types import VLM, Batch, Params, UserError
from lionjax.training import distributed, feature_store

log = logging.getLogger(__name__)


def make_feature_fn(model: VLM, frozen: Params, trainable: Params, mesh: Mesh) -> Callable:
    """`see(batch) -> features`, as the rows of this process in numpy, by the parameters that no stage trains.

    All others are replaced by NaN: features that hold none cannot depend on them, and so stay the same from stage
    to stage. Raises UserError otherwise, and for a system that has no `features`.
    """
    if not model.info.has_features:
        raise UserError(f"run.cache_features is set, but a {type(model).__name__} has no features to keep")
    shapes = {path: (leaf.shape, leaf.dtype) for path, leaf in trees.flatten(trainable).items()}
    checked = []

    @jax.jit
    def features(never: Params, batch: Batch):
        unknown = {path: jnp.full(shape, jnp.nan, dtype) for path, (shape, dtype) in shapes.items()}
        with sharding.use_mesh(mesh):
            return model.extract_features(trees.merge(trees.unflatten(unknown), never), batch)

    def see(batch: Batch):
        seen = jax.tree.map(local_rows, features(frozen, sharding.shard_batch(batch, mesh)))
        if not checked and any(np.isnan(leaf).any() for leaf in jax.tree.leaves(seen)):
            raise UserError(
                "some stage trains a part that makes the features (or a picture makes NaN); "
                "set run.cache_features to false"
            )
        checked.append(True)
        return seen

    return see


def local_rows(x: jax.Array) -> np.ndarray:
    """The rows of a batch-split array that lie on this process's devices, in order."""
    rows = {shard.index[0].start or 0: shard for shard in x.addressable_shards}
    return np.concatenate([np.asarray(rows[start].data) for start in sorted(rows)])


class FeatureCache:
    """Features by record, until `limit` bytes are held; what comes later is not kept. Lasts through all stages."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes, self.rows, self.spec_name = max_bytes, 0, {}, ""

    def reset_for(self, spec_name: str) -> None:
        """What is kept from now on was seen in this way; what was seen in another is forgotten."""
        if spec_name != self.spec_name:
            self.clear()
        self.spec_name = spec_name

    def add(self, record: int, parts: list[np.ndarray]) -> None:
        size = sum(part.nbytes for part in parts)
        if record in self.rows or self.num_bytes + size > self.max_bytes:
            return
        self.rows[record] = [part.copy() for part in parts]  # a view would hold its whole batch
        self.num_bytes += size

    def clear(self) -> None:
        self.num_bytes, self.rows = 0, {}


class CachedBatches:
    """The batches of a stage with features instead of pictures, computed when a record first comes by.

    A batch is seen whole, so that there is one shape to compile, and by all processes where one needs it. The first
    one is seen in any case: a stage whose system sees otherwise than the one before begins with an empty memory. With
    files, which know how the system sees such batches, that takes no look; and what they hold is not computed.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        feature_fn: Callable,
        cache: FeatureCache,
        open_store: Callable[[Batch], feature_store.FeatureStore] | None = None,
    ):
        self.batches, self.feature_fn, self.cache = batches, feature_fn, cache
        self.open_store, self.store, self.structure = open_store, None, None
        self.position, self.name = batches.position, batches.name

    def close(self) -> None:
        """Stop reading ahead, and finish what is being written."""
        self.batches.close()
        if self.store:
            self.store.close()

    def __iter__(self):
        return self

    @property
    def num_bad_records(self) -> int:
        return getattr(self.batches, "num_bad_records", 0)

    @property
    def load_seconds(self) -> float:
        return getattr(self.batches, "load_seconds", 0.0)

    def __next__(self) -> Batch:
        batch = next(self.batches)
        if self.open_store and self.store is None:
            self.store = self.open_store(batch)
            self.structure = jax.tree.structure(self.store.spec.shapes)
            self.cache.reset_for(self.store.spec.name)
        records, rows = batch.record_B.tolist(), self.cache.rows
        keys, read = self.lookup_store(batch) if self.store else ({}, {})
        known = ChainMap(read, rows)  # of all records seen so far none is copied
        unknown = self.structure is None or any(record not in known for record in records)
        if not any(distributed.sum_across_processes(unknown)):
            for record, parts in read.items():
                self.cache.add(record, parts)
            leaves = [np.stack(parts) for parts in zip(*(known[record] for record in records))]
            features = jax.tree.unflatten(self.structure, leaves)
        else:
            features = self.feature_fn(batch)
            leaves, structure = jax.tree.flatten(features)
            seen = {record: [leaf[row] for leaf in leaves] for row, record in enumerate(records)}
            if self.structure is None and not all(all_close(rows[r], seen[r]) for r in records if r in rows):
                self.cache.clear()
            self.structure = structure
            for record, parts in seen.items():
                self.cache.add(record, parts)
                if record in keys:
                    self.store.add(keys[record], parts)
        return dataclasses.replace(batch, features=features, image_BHWC=None, sam_image_BHWC=None)

    def lookup_store(self, batch: Batch) -> tuple[dict[int, bytes], dict[int, list[np.ndarray]]]:
        """Of the records that memory lacks: what each goes by in the files, and those that are there."""
        lacking = {record: row for row, record in enumerate(batch.record_B.tolist()) if record not in self.cache.rows}
        if not lacking:
            return {}, {}
        rows = self.store.spec.keys(batch, lacking.values())
        keys = dict(zip(lacking, rows))
        found = {record: self.store.get(key) for record, key in keys.items()}
        if None in found.values():
            self.store.refresh()  # another process may have it by now
            found = {r: self.store.get(keys[r]) if x is None else x for r, x in found.items()}
        return keys, {record: parts for record, parts in found.items() if parts is not None}


def all_close(old: list[np.ndarray], new: list[np.ndarray]) -> bool:
    pairs = zip(old, new)
    return len(old) == len(new) and all(a.shape == b.shape and np.allclose(a, b, 1e-4, 1e-4) for a, b in pairs)
