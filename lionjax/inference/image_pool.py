# SPDX-License-Identifier: Apache-2.0
"""Features of images on the device, found by a hash of their pixels: what sessions of answering share.

The pools of an engine outlive its sessions, so that an image is encoded once, whatever benchmarks ask about it.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lionjax.core import sharding
from lionjax.core.types import VLM, Batch, Params
from lionjax.inference import slots as programs

EncodedExample = Mapping[str, np.ndarray]  # one question as `Processor.encode_example` makes it
# From rows, (prompt length, question length) and whether images are wanted to a batch.
Collate = Callable[[Sequence[EncodedExample], tuple[int, int], bool], Batch]
POOL_ADMISSIONS = 4  # a pool holds the images of at least so many admissions,
POOL_BYTES = 64 * 2**20  # or so many bytes of features,
MAX_POOL_IMAGES = 2048  # but at most so many images


def hash_arrays(*arrays: np.ndarray) -> bytes:
    """A hash of the values of arrays."""
    hashed = hashlib.blake2b(digest_size=16)
    for array in arrays:
        hashed.update(np.ascontiguousarray(array).data)
    return hashed.digest()


def image_digest(row: EncodedExample) -> bytes:
    """A hash of the pixels of a row."""
    return hash_arrays(row["pixels"])


def pool_images(admission_rows: int, features: Any) -> int:
    """Number of images in a pool; `features`: arrays of some images, or their shapes."""
    leaves = jax.tree.leaves(features)
    bytes_of_image = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves) // len(leaves[0])
    return max(POOL_ADMISSIONS * admission_rows, min(MAX_POOL_IMAGES, POOL_BYTES // max(1, bytes_of_image)))


class ImagePool:
    """Features of images; place 0 is the blank image. `rows`: images encoded at once, `row`: an example of one."""

    def __init__(self, model: VLM, params: Params, mesh: Mesh, collate: Collate, rows: int, row: EncodedExample):
        self.model, self.params, self.mesh, self.collate, self.rows = model, params, mesh, collate, rows
        self._place_of: collections.OrderedDict[bytes, int] = collections.OrderedDict()
        blank = dict(row) | {"pixels": np.zeros_like(row["pixels"])}
        batch = self._images([blank])
        batch = dataclasses.replace(batch, image_BHWC=np.zeros_like(batch.image_BHWC))
        shapes = jax.eval_shape(model.answer_features, params, batch)
        self.size = 1 + pool_images(rows, shapes)
        self.features = jax.tree.map(
            lambda leaf: self._on_mesh(np.zeros((self.size, *leaf.shape[1:]), leaf.dtype)), shapes
        )
        self._encode(batch, [0])

    def _on_mesh(self, array: np.ndarray):
        replicated = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
        return jax.make_array_from_callback(array.shape, replicated, array.__getitem__)

    def _images(self, rows: Sequence[EncodedExample]) -> Batch:
        """A batch of one admission's size with the images of some rows."""
        padded = [*rows, *[rows[-1]] * (self.rows - len(rows))]
        return self.collate(padded, (1, 1), True)

    def _encode(self, batch: Batch, places: Sequence[int]) -> None:
        place_B = np.full(self.rows, self.size, np.int32)
        place_B[: len(places)] = places
        with sharding.use_mesh(self.mesh):
            placed = sharding.shard_global_batch(batch, self.mesh)
            self.features = programs.encode_images(self.model, self.params, placed, self.features, place_B)

    def places(
        self, images: Sequence[tuple[bytes, EncodedExample]], soon: Iterable[tuple[bytes, EncodedExample]]
    ) -> np.ndarray:
        """int32 (B,): the place of each image, given as (digest, row); missing ones are encoded with some of `soon`.

        An empty digest stands for the blank image.
        """
        digests = [digest for digest, _ in images]
        for digest in filter(self._place_of.__contains__, digests):
            self._place_of.move_to_end(digest)
        missing = {digest: row for digest, row in images if self._is_missing(digest)}
        if missing:
            for digest, row in soon:
                if len(missing) >= self.rows:
                    break
                if self._is_missing(digest):
                    missing.setdefault(digest, row)
            places = []
            for digest in missing:
                is_full = len(self._place_of) == self.size - 1
                place = self._place_of.popitem(last=False)[1] if is_full else len(self._place_of) + 1
                self._place_of[digest] = place
                places.append(place)
            self._encode(self._images(list(missing.values())), places)
        return np.array([self._place_of[digest] if digest else 0 for digest in digests], np.int32)

    def _is_missing(self, digest: bytes) -> bool:
        return bool(digest) and digest not in self._place_of


class ImagePools:
    """The pools of an engine's sessions, by the shape of an image and the rows of a batch.

    `lock` is held from the choice of places until the program that reads them is called, as others may replace them.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self._pools: dict[tuple, ImagePool] = {}

    def get(
        self, model: VLM, params: Params, mesh: Mesh, collate: Collate, rows: int, row: EncodedExample
    ) -> ImagePool:
        """The pool for rows like `row`; made if there is none."""
        key = (rows, row["pixels"].shape)
        if key not in self._pools:
            self._pools[key] = ImagePool(model, params, mesh, collate, rows, row)
        return self._pools[key]

    def find(
        self, rows: Sequence[EncodedExample], image_blind: bool = False
    ) -> tuple[Any, np.ndarray] | tuple[None, None]:
        """(features, int32 place of each row's image) of a pool that a session has made.

        (None, None) if there is none for such images, or none that holds so many. Images that the pool has no longer
        are encoded. `lock` must be held.
        """
        shape = rows[0]["pixels"].shape
        pool = next((pool for (_, of), pool in self._pools.items() if of == shape and pool.size > len(rows)), None)
        if pool is None:
            return None, None
        images = [(b"" if image_blind else image_digest(row), row) for row in rows]
        parts = [images[start : start + pool.rows] for start in range(0, len(images), pool.rows)]
        place_B = np.concatenate([pool.places(part, ()) for part in parts])
        return pool.features, place_B
