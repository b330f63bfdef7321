# SPDX-License-Identifier: Apache-2.0
"""Images are encoded once for all sessions of an engine, and the oldest leave a full pool."""

import dataclasses

import jax
import numpy as np

from lionjax.core import sharding
from lionjax.core.types import VLM, Batch
from lionjax.inference import image_pool
from lionjax.inference.image_pool import ImagePools

MESH = sharding.make_mesh(devices=jax.devices()[:1])


@dataclasses.dataclass(frozen=True)
class Means(VLM):
    """A model whose features of an image are its mean color."""

    def answer_features(self, params, batch):
        return {"color": batch.image_BHWC.mean(axis=(1, 2)) * params["scale"]}


def collate(rows, lengths, with_images):
    assert with_images
    images = np.stack([row["pixels"] for row in rows]).astype(np.float32)
    return Batch(images, *[None] * (len(dataclasses.fields(Batch)) - 1))


def picture(level: int) -> tuple[bytes, dict]:
    return bytes([level]), {"pixels": np.full((2, 2, 3), level, np.uint8)}


def test_an_image_is_encoded_once_and_the_longest_unused_leaves_a_full_pool(monkeypatch):
    monkeypatch.setattr(image_pool, "POOL_BYTES", 0)
    monkeypatch.setattr(image_pool, "POOL_ADMISSIONS", 2)
    encoded, encode = [], image_pool.programs.encode_images
    monkeypatch.setattr(image_pool.programs, "encode_images", lambda *given: encoded.append(1) or encode(*given))
    pools, params = ImagePools(), {"scale": np.float32(1.0)}
    arguments = (Means(), params, MESH, collate, 2)
    pool = pools.get(*arguments, picture(0)[1])
    assert pools.get(*arguments, picture(7)[1]) is pool and pool.size == 5 and len(encoded) == 1

    def colors(levels, soon=()):
        place_B = pool.places([picture(k) for k in levels], [picture(k) for k in soon])
        return np.asarray(pool.features["color"])[place_B, 0].tolist()

    assert colors([1, 1], soon=[2, 3]) == [1, 1] and len(encoded) == 2, "one that is asked for soon comes along"
    assert colors([2, 1]) == [2, 1] and len(encoded) == 2
    assert colors([3, 4]) == [3, 4] and len(encoded) == 3 and colors([1, 2]) == [1, 2]
    assert colors([5, 1]) == [5, 1] and colors([3, 2]) == [3, 2] and len(encoded) == 5, "3 had left for 5"
    blank = pool.places([(b"", picture(9)[1])], [])
    assert blank.tolist() == [0] and np.asarray(pool.features["color"])[0].tolist() == [0, 0, 0]


def test_rows_find_their_features_in_the_pool_of_a_session_that_holds_so_many(monkeypatch):
    monkeypatch.setattr(image_pool, "POOL_BYTES", 0)
    monkeypatch.setattr(image_pool, "POOL_ADMISSIONS", 2)
    pools, params = ImagePools(), {"scale": np.float32(1.0)}
    rows = [picture(level)[1] for level in (3, 5, 3, 7)]
    assert pools.find(rows) == (None, None), "no session has made a pool"
    pool = pools.get(Means(), params, MESH, collate, 2, rows[0])
    pool.places([(image_pool.image_digest(row), row) for row in rows[:2]], [])
    for asked in (rows, rows[::-1], [picture(level)[1] for level in (9, 8, 7, 6)]):
        features, place_B = pools.find(asked)
        levels = [row["pixels"][0, 0, 0] for row in asked]
        assert place_B.dtype == np.int32 and np.asarray(features["color"])[place_B, 0].tolist() == levels
    assert pools.find(rows, image_blind=True)[1].tolist() == [0] * 4
    assert pools.find([*rows, rows[0]]) == (None, None), "five rows do not fit a pool of five with the blank one"
    assert pools.find([{"pixels": np.zeros((3, 2, 3), np.uint8)}]) == (None, None)


def test_a_pool_holds_some_admissions_or_64_mib_of_features():
    shapes = {"taps": jax.ShapeDtypeStruct((8, 65, 128), np.float32)}
    assert image_pool.pool_images(8, shapes) == 2**26 // (65 * 128 * 4)
    assert image_pool.pool_images(8, {"taps": jax.ShapeDtypeStruct((8, 4096, 4096), np.float32)}) == 32
    assert image_pool.pool_images(8, {"taps": jax.ShapeDtypeStruct((8, 2), np.float32)}) == 2048
