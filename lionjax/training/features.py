# SPDX-License-Identifier: Apache-2.0
"""What a frozen tower makes of a picture, computed once for each record and kept in memory."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lionjax import params as trees
from lionjax import sharding
from lionjax.interfaces import Batch, Params, System, UserError

log = logging.getLogger(__name__)


def seer(system: System, trainable: Params, frozen: Params, mesh: Mesh, stage: str) -> Callable:
    """`see(batch) -> features`, as the rows of this process in numpy, by the frozen parameters alone.

    The trainable ones are replaced by NaN: features that hold none cannot depend on them. Raises UserError
    otherwise, and for a system that has no `features`.
    """
    if not hasattr(system, "features"):
        raise UserError(f"run.cache_features is set, but a {type(system).__name__} has no features to keep")
    shapes = {path: (leaf.shape, leaf.dtype) for path, leaf in trees.flatten(trainable).items()}
    checked = []

    @jax.jit
    def features(frozen: Params, batch: Batch):
        unknown = {path: jnp.full(shape, jnp.nan, dtype) for path, (shape, dtype) in shapes.items()}
        with sharding.use(mesh):
            return system.features(trees.merge(trees.unflatten(unknown), frozen), batch)

    def see(batch: Batch):
        seen = jax.tree.map(local_rows, features(frozen, sharding.put_batch(batch, mesh)))
        if not checked and any(np.isnan(leaf).any() for leaf in jax.tree.leaves(seen)):
            raise UserError(
                f"stage {stage!r} trains a part that makes the features (or a picture makes NaN); "
                "set run.cache_features to false"
            )
        checked.append(True)
        return seen

    return see


def local_rows(x: jax.Array) -> np.ndarray:
    """The rows of a batch-split array that lie on this process's devices, in order."""
    rows = {shard.index[0].start or 0: shard for shard in x.addressable_shards}
    return np.concatenate([np.asarray(rows[start].data) for start in sorted(rows)])


class Remembered:
    """Batches with features instead of pictures. Those of a record are computed when it first comes by.

    They are kept until `limit` bytes are held; after that the records that are not yet held are seen each time.
    A batch is seen whole, so that there is one shape to compile.
    """

    def __init__(self, batches: Iterator[Batch], see: Callable, limit: int):
        self.batches, self.see, self.limit = batches, see, limit
        self.rows: dict[int, list[np.ndarray]] = {}
        self.held, self.position, self.name, self.close = 0, batches.position, batches.name, batches.close

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        batch = next(self.batches)
        records = batch.record_B.tolist()
        if all(record in self.rows for record in records):
            known = [self.rows[record] for record in records]
            leaves = [np.stack(parts) for parts in zip(*known)]
            features = jax.tree.unflatten(self.structure, leaves)
        else:
            features = self.see(batch)
            leaves, self.structure = jax.tree.flatten(features)
            for row, record in enumerate(records):
                self.keep(record, [leaf[row] for leaf in leaves])
        return dataclasses.replace(batch, features=features, image_BHWC=None)

    def keep(self, record: int, parts: list[np.ndarray]) -> None:
        size = sum(part.nbytes for part in parts)
        if record in self.rows or self.held + size > self.limit:
            return
        self.rows[record] = [part.copy() for part in parts]  # a view would hold its whole batch
        self.held += size
