# SPDX-License-Identifier: Apache-2.0
"""Features of a frozen tower on disk: the same training, nothing computed twice, nothing stale or damaged read."""

import dataclasses
import errno
import logging
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from lionjax.core.sharding import init_sharded
from lionjax.core.types import UserError
from lionjax.training import feature_cache as features
from lionjax.training import feature_store, loop
from lionjax.training.feature_store import FeatureSpec, FeatureStore, make_feature_spec


@pytest.fixture(scope="module")
def towers():
    """(never, learned) of the toy, in which the tower alone is frozen."""
    params = init_sharded(toy.Toy().init, jax.random.key(0), toy.batch_of(range(8)))
    return {"tower": params.pop("tower")}, params


@pytest.fixture
def looks(monkeypatch):
    """The records of each batch that a tower looked at."""
    seen, seer = [], features.make_feature_fn

    def counting(*args):
        see = seer(*args)
        return lambda batch: seen.append(batch.record_B.tolist()) or see(batch)

    monkeypatch.setattr(features, "make_feature_fn", counting)
    return seen


def train(workdir, **run):
    return loop.train(toy.experiment(toy.stage("one", 7), run=run), workdir, toy.Batches)[0]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """A run that keeps features in memory alone: its folder and what it learned."""
    folder = tmp_path_factory.mktemp("memory")
    return folder, train(folder, cache_features=True)


def same(one, other):
    return jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), one, other))


@pytest.mark.slow
def test_training_from_feature_files_is_bit_exact_and_runs_no_tower(tmp_path, looks, expected):
    store = str(tmp_path / "features")
    assert same(train(tmp_path / "first", feature_cache_dir=store), expected[1])
    assert sorted(sum(looks, [])) == list(range(24)), "each record once"
    looks.clear()
    assert same(train(tmp_path / "second", feature_cache_dir=store, feature_cache_gib=0.0), expected[1])
    assert looks == []
    assert toy.lines(tmp_path / "second") == toy.lines(expected[0])


def test_unfinished_and_truncated_feature_files_are_ignored(tmp_path):
    made, rows = some()
    written(tmp_path, made, rows)
    (whole,) = tmp_path.glob("*/*.array_record")
    (whole.parent / "host-1-2-3.part").write_bytes(whole.read_bytes()[:100])
    assert len(FeatureStore(tmp_path, made).index) == len(rows)
    whole.write_bytes(whole.read_bytes()[:-100])  # and with it its index
    assert written(tmp_path, made, rows).disabled is False
    assert len(FeatureStore(tmp_path, made).index) == len(rows), "made again"


def some(dtype="bfloat16", rows=6):
    shapes = {
        "map": jax.ShapeDtypeStruct((3, 2), jnp.dtype(dtype)),
        "taps": jax.ShapeDtypeStruct((5,), jnp.dtype("float32")),
    }
    made = np.random.default_rng(0)
    parts = [[made.normal(size=x.shape).astype(x.dtype) for x in jax.tree.leaves(shapes)] for _ in range(rows)]
    return FeatureSpec("way", shapes, (0,)), {bytes([n]) * 16: part for n, part in enumerate(parts)}


def written(folder, made, rows):
    files = FeatureStore(folder, made)
    for key, parts in rows.items():
        files.add(key, parts)
    files.close()
    return files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_feature_files_keep_dtypes(tmp_path, dtype):
    made, rows = some(dtype)
    written(tmp_path, made, rows)
    files = FeatureStore(tmp_path, made)
    for key, parts in rows.items():
        for was, now in zip(parts, files.get(key), strict=True):
            assert was.dtype == now.dtype
            np.testing.assert_array_equal(was, now)
    assert files.get(b"another record.") is None


def test_a_flipped_byte_in_a_feature_file_is_detected(tmp_path):
    made, rows = some()
    written(tmp_path / "whole", made, rows)
    (path,) = (tmp_path / "whole").glob("*/*.array_record")
    content, drawn, lost = path.read_bytes(), random.Random(0), 0
    for place in drawn.sample(range(len(content)), 60):
        shutil.rmtree(tmp_path / "hurt", ignore_errors=True)
        (tmp_path / "hurt" / "way").mkdir(parents=True)
        hurt = bytearray(content)
        hurt[place] ^= 1 << drawn.randrange(8)
        (tmp_path / "hurt" / "way" / path.name).write_bytes(hurt)
        files = FeatureStore(tmp_path / "hurt", made)
        for key, parts in rows.items():
            found = files.get(key)
            lost += found is None
            assert found is None or all(map(np.array_equal, found, parts)), place
    assert lost


def test_two_processes_write_feature_files_concurrently_and_read_each_others(tmp_path):
    made, rows = some()
    one, other = FeatureStore(tmp_path, made), FeatureStore(tmp_path, made)
    first, second = list(rows)[:3], list(rows)[2:]
    for files, keys in ((one, first), (other, second)):
        for key in keys:
            files.add(key, rows[key])
    assert one.get(second[-1]) is None
    other.close()
    one.refresh()
    np.testing.assert_array_equal(one.get(second[-1])[0], rows[second[-1]][0])
    one.close()
    assert len(FeatureStore(tmp_path, made).index) == len(rows)


@pytest.mark.slow
def test_full_disk_is_logged_once_and_training_continues(tmp_path, monkeypatch, caplog, expected):
    def no_room(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FeatureStore, "_open_file", no_room)
    with caplog.at_level(logging.WARNING):
        made = train(tmp_path / "run", feature_cache_dir=str(tmp_path / "features"))
    assert same(made, expected[1])
    (said,) = (text for text in caplog.messages if "cannot write features to" in text)
    assert "No space left on device" in said


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set another run.feature_cache_dir"):
        train(tmp_path / "run", feature_cache_dir=str(tmp_path / "file"))


def test_feature_key_depends_only_on_weights_and_computation(towers):
    never, learned = towers
    batch = toy.batch_of(range(8))
    name = make_feature_spec(toy.Toy(), never, learned, batch).name
    longer = dataclasses.replace(batch, prompt_BL=np.tile(batch.prompt_BL, 2))
    other = jax.tree.map(lambda x: x + 1, learned)
    for same in (
        make_feature_spec(toy.Toy(), never, learned, toy.batch_of(range(4))),
        make_feature_spec(toy.Toy(), never, learned, longer),
        make_feature_spec(toy.Toy(), never, other, batch),
        make_feature_spec(toy.Toy(rate=0.5, attention=0.1), never, learned, batch),
    ):
        assert same.name == name
    moved = jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1e-6), never)

    class Otherwise(toy.Toy):
        def extract_features(self, params, batch):
            return super().extract_features(params, batch) * 1.5

    for another in (
        make_feature_spec(toy.Toy(), moved, learned, batch),
        make_feature_spec(toy.Toy(), jax.tree.map(lambda x: x.astype("bfloat16"), never), learned, batch),
        make_feature_spec(Otherwise(), never, learned, batch),
    ):
        assert another.name != name


def test_feature_keys_depend_on_the_image_only(towers):
    batch = toy.batch_of(range(8))
    made = make_feature_spec(toy.Toy(), *towers, batch)
    keys = made.keys(batch, range(8))
    assert len(set(keys)) == 8
    said = dataclasses.replace(batch, prompt_BL=batch.prompt_BL + 1, record_B=batch.record_B + 5)
    assert made.keys(said, range(8)) == keys
    image_BHWC = batch.image_BHWC.copy()
    image_BHWC[3, 0, 0, 0] += 1e-3
    other = made.keys(dataclasses.replace(batch, image_BHWC=image_BHWC), range(8))
    assert [a == b for a, b in zip(keys, other)] == [row != 3 for row in range(8)]


def test_a_tower_that_some_stage_trains_is_refused(towers):
    with pytest.raises(UserError, match=r"depend on a parameter that some stage trains \(tower/"):
        make_feature_spec(toy.Toy(), {}, towers[0] | towers[1], toy.batch_of(range(8)))


def test_feature_files_are_completed_during_a_run(tmp_path, monkeypatch):
    made, rows = some()
    monkeypatch.setattr(feature_store, "MAX_FILE_BYTES", 80)
    files = FeatureStore(tmp_path, made)
    for key, parts in rows.items():
        files.add(key, parts)
    assert len(FeatureStore(tmp_path, made).index) >= 4, "what a kill leaves"
