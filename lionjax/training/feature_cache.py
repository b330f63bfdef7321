# SPDX-License-Identifier: Apache-2.0
"""In-memory cache of the image features of frozen encoders: computed once per record, then reused in all stages."""

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
    """A function `batch -> features` that gives this process's rows as numpy arrays, from the frozen parameters.

    Parameters that some stage trains are replaced by NaN: features without NaN do not depend on them, and are the same
    in all stages. Raises UserError if they do, and for a model without `extract_features`.
    """
    if not model.info.has_features:
        raise UserError(f"run.cache_features is set, but {type(model).__name__} has no image features; set it to false")
    shapes = {path: (leaf.shape, leaf.dtype) for path, leaf in trees.flatten(trainable).items()}
    checked = []

    @jax.jit
    def features(frozen: Params, batch: Batch):
        nans = {path: jnp.full(shape, jnp.nan, dtype) for path, (shape, dtype) in shapes.items()}
        with sharding.use_mesh(mesh):
            return model.extract_features(trees.merge(trees.unflatten(nans), frozen), batch)

    def local_features(batch: Batch):
        feature_rows = jax.tree.map(local_rows, features(frozen, sharding.shard_batch(batch, mesh)))
        if not checked and any(np.isnan(leaf).any() for leaf in jax.tree.leaves(feature_rows)):
            raise UserError(
                "the image features depend on a parameter that some stage trains, or an image gives NaN; "
                "set run.cache_features to false"
            )
        checked.append(True)
        return feature_rows

    return local_features


def local_rows(x: jax.Array) -> np.ndarray:
    """The rows of a batch-sharded array that are on this process's devices, in order."""
    rows = {shard.index[0].start or 0: shard for shard in x.addressable_shards}
    return np.concatenate([np.asarray(rows[start].data) for start in sorted(rows)])


class FeatureCache:
    """Features by record, up to `max_bytes` in total; further records are not cached. Shared by all stages of a run."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes, self.rows, self.spec_name = max_bytes, 0, {}, ""

    def reset_for(self, spec_name: str) -> None:
        """Set the name of the feature spec (see feature_store); clears the cache if it was filled under another."""
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
    """The batches of a stage with features instead of images; features are computed when a record first occurs.

    If one record of a batch is missing in one process, all processes compute the features of their whole batch: a
    single shape is compiled. Without a feature store the first batch is always computed, and the cache is cleared if
    its features differ from the cached ones, because the stage may use other model fields than the previous stage. With
    a store, the name of the feature spec tells this, and stored features are not computed again.
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
        """Stop the prefetching of batches, and finish the feature file being written."""
        self.batches.close()
        if self.store:
            self.store.close()

    def __iter__(self):
        return self

    @property
    def num_bad_records(self) -> int:
        return getattr(self.batches, "num_bad_records", 0)

    @property
    def num_cut_answers(self) -> int:
        return getattr(self.batches, "num_cut_answers", 0)

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
        keys, stored = self.lookup_store(batch) if self.store else ({}, {})
        available = ChainMap(stored, rows)  # a merged dict would copy the entries of all cached records
        missing = self.structure is None or any(record not in available for record in records)
        if not any(distributed.sum_across_processes(missing)):
            for record, parts in stored.items():
                self.cache.add(record, parts)
            leaves = [np.stack(parts) for parts in zip(*(available[record] for record in records))]
            features = jax.tree.unflatten(self.structure, leaves)
        else:
            features = self.feature_fn(batch)
            leaves, structure = jax.tree.flatten(features)
            computed = {record: [leaf[row] for leaf in leaves] for row, record in enumerate(records)}
            if self.structure is None and not all(all_close(rows[r], computed[r]) for r in records if r in rows):
                self.cache.clear()
            self.structure = structure
            for record, parts in computed.items():
                self.cache.add(record, parts)
                if record in keys:
                    self.store.add(keys[record], parts)
        return dataclasses.replace(batch, features=features, image_BHWC=None, sam_image_BHWC=None)

    def lookup_store(self, batch: Batch) -> tuple[dict[int, bytes], dict[int, list[np.ndarray]]]:
        """For the batch's records that are not in memory: {record: store key} and {record: stored features}."""
        missing = {record: row for row, record in enumerate(batch.record_B.tolist()) if record not in self.cache.rows}
        if not missing:
            return {}, {}
        keys = dict(zip(missing, self.store.spec.keys(batch, missing.values())))
        features = {record: self.store.get(key) for record, key in keys.items()}
        if None in features.values():
            self.store.refresh()  # another process may have written it since
            features = {r: self.store.get(keys[r]) if x is None else x for r, x in features.items()}
        return keys, {record: parts for record, parts in features.items() if parts is not None}


def all_close(old: list[np.ndarray], new: list[np.ndarray]) -> bool:
    pairs = zip(old, new)
    return len(old) == len(new) and all(a.shape == b.shape and np.allclose(a, b, 1e-4, 1e-4) for a, b in pairs)
