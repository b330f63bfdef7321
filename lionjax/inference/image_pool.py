# SPDX-License-Identifier: Apache-2.0
"""The image features of a session: each image that its requests show is encoded once and kept on the device."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from lionjax.core import sharding
from lionjax.core.types import Batch
from lionjax.inference import slots as programs

if TYPE_CHECKING:
    from lionjax.inference.session import AnswerRequest, AnswerSession, EncodedExample

POOL_ADMISSIONS = 4  # the pool holds the images of so many admissions


class ImagePool:
    """Features of images on the device, found by a hash of their pixels; place 0 is the blank image."""

    def __init__(self, session: AnswerSession, row: EncodedExample):
        self._session, self._rows = session, session.sizes.admission_rows
        self._size = 1 + POOL_ADMISSIONS * self._rows
        self._place_of: collections.OrderedDict[bytes, int] = collections.OrderedDict()
        blank = dict(row) | {"pixels": np.zeros_like(row["pixels"])}
        batch = self._images([blank])
        batch = dataclasses.replace(batch, image_BHWC=np.zeros_like(batch.image_BHWC))
        shapes = jax.eval_shape(session.model.extract_features, session.params, batch)
        self.features = jax.tree.map(
            lambda leaf: self._on_mesh(np.zeros((self._size, *leaf.shape[1:]), leaf.dtype)), shapes
        )
        self._encode(batch, [0])

    def _on_mesh(self, array: np.ndarray):
        replicated = jax.sharding.NamedSharding(self._session.mesh, jax.sharding.PartitionSpec())
        return jax.make_array_from_callback(array.shape, replicated, array.__getitem__)

    def _images(self, rows: Sequence[EncodedExample]) -> Batch:
        """A batch of one admission's size with the images of some rows."""
        padded = [*rows, *[rows[-1]] * (self._rows - len(rows))]
        return self._session.collate(padded, (1, 1), True)

    def _encode(self, batch: Batch, places: Sequence[int]) -> None:
        place_B = np.full(self._rows, self._size, np.int32)
        place_B[: len(places)] = places
        session = self._session
        with sharding.use_mesh(session.mesh):
            placed = sharding.shard_global_batch(batch, session.mesh)
            self.features = programs.encode_images(session.model, session.params, placed, self.features, place_B)

    def places(self, requests: Sequence[AnswerRequest], soon: Iterable[AnswerRequest]) -> np.ndarray:
        """int32 (B,): the place of each request's image; missing ones are encoded, with those of `soon` that fit."""
        digests = [one.image_digest for one in requests]
        for digest in filter(self._place_of.__contains__, digests):
            self._place_of.move_to_end(digest)
        missing = {one.image_digest: one.row for one in requests if self._is_missing(one)}
        if missing:
            for one in soon:
                if len(missing) >= self._rows:
                    break
                if self._is_missing(one):
                    missing.setdefault(one.image_digest, one.row)
            places = []
            for digest in missing:
                is_full = len(self._place_of) == self._size - 1
                place = self._place_of.popitem(last=False)[1] if is_full else len(self._place_of) + 1
                self._place_of[digest] = place
                places.append(place)
            self._encode(self._images(list(missing.values())), places)
        return np.array([self._place_of[digest] if digest else 0 for digest in digests], np.int32)

    def _is_missing(self, request: AnswerRequest) -> bool:
        return bool(request.image_digest) and request.image_digest not in self._place_of
