# SPDX-License-Identifier: Apache-2.0
"""What is read is what was written, or it is refused by name."""

import errno
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.types import UserError
from lionjax.training import checkpoint, checksum
from lionjax.training.checkpoint import CorruptCheckpointError

MESHES = ((8, 1, 1), (2, 2, 2))


def tree(seed=0):
    random = np.random.default_rng(seed)
    return {
        "up": {"kernel": jnp.asarray(random.normal(size=(64, 48)), jnp.float32), "bias": jnp.ones(8, jnp.bfloat16)},
        "count": jnp.int32(7),
        "flags": jnp.asarray([True, False, True]),
    }


def laid_out(items, shape=(1, 1, 1)):
    mesh = sharding.make_mesh(sharding.MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])

    def one(leaf):
        split = PartitionSpec(("data", "fsdp")) if leaf.ndim and leaf.shape[0] % 8 == 0 else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, split))

    return jax.tree.map(one, items)


def same(a, b):
    return all((x == y).all() and x.dtype == y.dtype for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def on_device(items):
    sums = checksum._checksums_jax(trees.flatten(items))
    return {path: f"{int(a):08x}{int(b):08x}" for path, (a, b) in sums.items()}


def test_a_fingerprint_is_the_same_on_the_host_on_devices_and_on_every_mesh():
    found = checkpoint.leaf_checksums(tree())
    assert on_device(tree()) == found
    for shape in MESHES:
        placed = sharding.reshard_like(tree(), laid_out(tree(), shape))
        assert checkpoint.leaf_checksums(placed) == found == on_device(placed)


def test_a_fingerprint_spans_chunks_and_does_not_depend_on_their_size():
    big = np.random.default_rng(0).normal(size=(700, 1000)).astype(np.float32)
    assert checkpoint.leaf_checksums({"x": jnp.asarray(big)}) == on_device({"x": jnp.asarray(big)})
    swapped = big.copy()
    swapped[0, 0], swapped[500, 0] = big[500, 0], big[0, 0]
    assert checkpoint.leaf_checksums({"x": swapped}) != checkpoint.leaf_checksums({"x": big})


def test_every_single_flipped_bit_changes_the_fingerprint():
    x = np.random.default_rng(0).normal(size=64).astype(np.float32)
    found = {checkpoint.leaf_checksums({"x": x})["x"]}
    for bit in range(64 * 32):
        flipped = x.view(np.uint32).copy()
        flipped[bit // 32] ^= np.uint32(1 << bit % 32)
        found.add(checkpoint.leaf_checksums({"x": flipped.view(np.float32)})["x"])
    assert len(found) == 64 * 32 + 1


def test_a_checkpoint_restores_bits_and_metadata_on_any_mesh(tmp_path):
    checkpoint.save_tree(tmp_path / "a", {"items": tree(), "more": tree(1)}, {"position": [1, 2]})
    for shape in MESHES:
        items, meta = checkpoint.restore_tree(tmp_path / "a", {"items": laid_out(tree(), shape)})
        assert same(items["items"], tree()) and meta == {"position": [1, 2]}
        assert items["items"]["up"]["kernel"].sharding.mesh.shape["data"] == shape[0]


@pytest.mark.slow
def test_a_flipped_byte_in_a_checkpoint_is_refused_or_changes_no_value(tmp_path):
    checkpoint.save_tree(tmp_path / "a", {"items": tree()}, {"position": 1234})
    target, refused = {"items": laid_out(tree())}, []
    files = sorted(path for path in (tmp_path / "a").rglob("*") if path.is_file())
    for file in files:
        whole = file.read_bytes()
        for at in {int(share * (len(whole) - 1)) for share in (0.0, 0.3, 0.55, 0.8, 1.0)} if whole else ():
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
            try:
                items, meta = checkpoint.restore_tree(tmp_path / "a", target)
                assert same(items["items"], tree()) and meta == {"position": 1234}
            except CorruptCheckpointError as damage:
                assert damage.path == tmp_path / "a"
                refused.append(str(damage))
        file.write_bytes(whole)
    assert len(refused) >= 10
    assert any("'items/up/kernel' differs from what was written" in text for text in refused)  # seen by nobody but us
    assert same(checkpoint.restore_tree(tmp_path / "a", target)[0]["items"], tree())


def test_a_changed_leaf_is_named(tmp_path):
    other = tree() | {"up": tree()["up"] | {"kernel": tree()["up"]["kernel"].at[3, 3].add(1e-6)}}
    checkpoint.save_tree(tmp_path / "a", {"items": tree()}, {})
    checkpoint.save_tree(tmp_path / "b", {"items": other}, {})
    shutil.rmtree(tmp_path / "a" / "items")
    shutil.copytree(tmp_path / "b" / "items", tmp_path / "a" / "items")
    with pytest.raises(CorruptCheckpointError, match="'items/up/kernel' differs from what was written"):
        checkpoint.restore_tree(tmp_path / "a", {"items": laid_out(tree())})


def test_changed_metadata_of_a_checkpoint_is_refused(tmp_path):
    checkpoint.save_tree(tmp_path / "a", {"items": tree()}, {"next": 40})
    file = tmp_path / "a" / "record" / "metadata"
    file.write_text(file.read_text().replace('"next": 40', '"next": 41'))
    with pytest.raises(CorruptCheckpointError, match="the record differs from what was written"):
        checkpoint.restore_tree(tmp_path / "a", {"items": laid_out(tree())})


def test_a_dtype_a_shape_or_a_name_that_differs_is_refused_and_never_cast(tmp_path):
    checkpoint.save_tree(tmp_path / "a", {"items": tree()}, {})
    kernel = tree()["up"]["kernel"]
    cases = {
        "'items/up/kernel' was saved as float32 .* needs bfloat16": {"kernel": kernel.astype(jnp.bfloat16)},
        r"'items/up/kernel' was saved as float32 \(64, 48\), .* needs float32 \(48, 64\)": {"kernel": kernel.T},
        "has no leaf 'items/up/gate'": {"kernel": kernel, "gate": kernel},
        "has an additional leaf 'items/up/kernel'": {},
    }
    for sentence, up in cases.items():
        wanted = tree() | {"up": {"bias": tree()["up"]["bias"]} | up}
        with pytest.raises(UserError, match=sentence):
            checkpoint.restore_tree(tmp_path / "a", {"items": laid_out(wanted)})


def test_a_checkpoint_is_replaced_atomically(tmp_path):
    for seed in (0, 1):
        checkpoint.save_tree(tmp_path / "a", {"items": tree(seed)}, {"seed": seed})
    items, meta = checkpoint.restore_tree(tmp_path / "a", {"items": laid_out(tree())})
    assert meta == {"seed": 1} and same(items["items"], tree(1))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_last_steps_and_the_best_of_the_running_stage_are_kept(tmp_path):
    losses = {1: (0, 0.1), 2: (0, 5.0), 3: (1, 4.0), 4: (1, 2.0), 5: (1, 3.0), 6: (1, 3.5), 7: (1, 3.6)}
    with checkpoint.AsyncCheckpointManager(tmp_path, max_to_keep=2) as steps:
        for step, score in losses.items():
            steps.save(step, {"items": tree(step)}, {"score": score})
    assert checkpoint.all_steps(tmp_path) == [7, 6, 4]
    with checkpoint.AsyncCheckpointManager(tmp_path, max_to_keep=2) as steps:  # the scores are known after a restart
        steps.save(8, {"items": tree(8)}, {"score": (1, 3.0)})
    assert checkpoint.all_steps(tmp_path) == [8, 7, 4]


def test_a_background_save_writes_the_values_of_its_step(tmp_path):
    bump = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
    state = {"x": jnp.zeros((512, 512)), "y": jnp.ones(3)}
    with checkpoint.AsyncCheckpointManager(tmp_path, max_to_keep=5) as steps:
        for step in range(1, 6):
            state = bump(state)
            steps.save(step, {"items": state}, {"score": (0, 1.0)})
    for step in range(1, 6):
        items, _ = checkpoint.restore_tree(tmp_path / str(step), {"items": laid_out(state)})
        assert float(items["items"]["x"].min()) == float(items["items"]["x"].max()) == step


def test_an_error_of_a_background_save_is_raised(tmp_path):
    (tmp_path / "steps").mkdir()
    with pytest.raises(OSError):
        with checkpoint.AsyncCheckpointManager(tmp_path / "steps", max_to_keep=2) as steps:
            shutil.rmtree(tmp_path / "steps")
            (tmp_path / "steps").write_text("a file where the folder was")
            steps.save(1, {"items": tree()}, {"score": (0, 1.0)})


def test_a_full_disk_is_recognized_through_the_errors_that_it_comes_wrapped_in():
    assert checkpoint.is_disk_full(OSError(28, "No space left on device"))
    outer = ValueError("save failed")
    outer.__cause__ = RuntimeError("RESOURCE_EXHAUSTED: write: No space left on device [errno 28]")
    assert checkpoint.is_disk_full(outer)
    assert not checkpoint.is_disk_full(ValueError("no such file"))


def test_of_asyncio_errors_only_full_disks_are_not_logged(tmp_path, caplog):
    def failed(error):
        try:
            raise error
        except Exception:
            logging.getLogger("asyncio").error("Task exception was never retrieved", exc_info=True)

    with pytest.raises(UserError, match="the disk is full"), checkpoint.explain_disk_full(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    caplog.clear()
    failed(OSError(errno.ENOSPC, "No space left on device"))
    assert not caplog.records
    failed(ValueError("quite another thing"))
    logging.getLogger("asyncio").warning("a slow callback")
    assert [record.getMessage() for record in caplog.records] == [
        "Task exception was never retrieved",
        "a slow callback",
    ]


def test_half_written_directories_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / "base" / "0_one.orbax-checkpoint-tmp" / "learned").mkdir(parents=True)
    (tmp_path / "base" / "0_one").mkdir()
    checkpoint.remove_tmp_directories(tmp_path)
    assert checkpoint.all_bases(tmp_path / "base") == {0: tmp_path / "base" / "0_one"}
    assert len(list((tmp_path / "base").iterdir())) == 1


def test_a_group_without_parameters_is_written_and_read(tmp_path):
    """As the frozen parameters of a run whose stages train all of them."""
    checkpoint.save_tree(tmp_path / "a", {"never": {}}, {"next": 1})
    assert checkpoint.restore_tree(tmp_path / "a", {"never": {}}) == ({"never": {}}, {"next": 1})


def test_incomplete_files_that_appear_while_a_full_disk_is_cleaned_are_removed_too(tmp_path, monkeypatch):
    incomplete = tmp_path / "checkpoints" / f"8{checkpoint.ORBAX_TMP_SUFFIX}"
    incomplete.mkdir(parents=True)
    remove, tries = checkpoint.remove_tmp_directories, []

    def remove_at_the_second_try(folder):
        tries.append(folder)
        if len(tries) == 1:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        remove(folder)

    monkeypatch.setattr(checkpoint, "remove_tmp_directories", remove_at_the_second_try)
    with pytest.raises(UserError, match="the disk is full"), checkpoint.explain_disk_full(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert len(tries) == 2 and not incomplete.exists()
