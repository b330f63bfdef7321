# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints written a layer of a shard at a time, and read back: ordinary ones, exact, each shard by itself."""

import functools
import itertools
import json
import operator
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from published_folders import small_folder, tiny_t5
from safetensors.numpy import load_file, save_file
from weight_files import assert_same

from lionjax import cli, convert
from lionjax.convert import orbax_folder as convert_placed
from lionjax.convert.formats import detect
from lionjax.convert.io import orbax
from lionjax.convert.io.reader import open_weights
from lionjax.convert.mapping.apply import LazyTensor
from lionjax.core import config as configs
from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.sharding import MeshConfig
from lionjax.core.types import UserError
from lionjax.models.language.t5 import T5Config

MESH = MeshConfig(fsdp=4, tensor=2, data=1)


def mesh():
    return sharding.make_mesh(MESH)


def like_of(config, where=None):
    return detect.format_of_config(config).abstract_params(config, where or mesh())


def flat_arrays(params) -> dict:
    return {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}


@pytest.mark.parametrize("ours", [True, False])
def test_an_orbax_checkpoint_is_written_from_files_and_orbax_restores_it_exactly(tmp_path, ours):
    source = small_folder(tmp_path)
    config, plain = convert.load_params(source)
    folder = source if ours else tmp_path / "torch"
    coverage = convert_placed.save_orbax(folder, tmp_path / "orbax", mesh())
    assert coverage.bytes == sum(leaf.nbytes for leaf in trees.flatten(plain).values())
    types = jax.tree.map(lambda leaf: leaf.dtype, plain)
    like = jax.tree.map(lambda x, d: jax.ShapeDtypeStruct(x.shape, d, sharding=x.sharding), like_of(config), types)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler("params", "config")) as reader:
        asked = {"params": ocp.args.StandardRestore(like), "config": ocp.args.JsonRestore()}
        found = reader.restore(tmp_path / "orbax", args=ocp.args.Composite(**asked))
        assert configs.from_json(json.dumps(found["config"])) == config
        assert_same(flat_arrays(found["params"]), trees.flatten(plain))
        # Without being told, Orbax knows how the arrays were laid out.
        asked = {"params": ocp.args.StandardRestore(), "config": ocp.args.JsonRestore()}
        found = reader.restore(tmp_path / "orbax", args=ocp.args.Composite(**asked))["params"]
    kernel = found["encoder"]["blocks"]["attention"]["q"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    with pytest.raises(UserError, match="already exists"):
        convert_placed.save_orbax(folder, tmp_path / "orbax", mesh())
    with pytest.raises(UserError, match="is an Orbax checkpoint already"):
        convert_placed.save_orbax(tmp_path / "orbax", tmp_path / "again", mesh())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jax", "orbax", "torch"]


def test_an_orbax_checkpoint_is_loaded_onto_another_mesh_and_goes_out_to_torch_and_to_our_folder(tmp_path):
    source = small_folder(tmp_path)
    config, plain = convert.load_params(source)
    (source / "origin").mkdir(exist_ok=True)
    (source / "origin" / "vocab.txt").write_text("a")
    convert_placed.save_orbax(source, tmp_path / "orbax", mesh())
    again, arrays = convert.load_params(tmp_path / "orbax")
    assert again == config
    assert_same(trees.flatten(arrays), trees.flatten(plain))
    like = like_of(config, sharding.make_mesh(MeshConfig(tensor=4, data=2)))
    placed = convert.load_params(tmp_path / "orbax", like)[1]
    assert_same(flat_arrays(placed), trees.flatten(plain))
    for path, leaf in trees.flatten(placed).items():
        assert leaf.sharding == trees.flatten(like)[path].sharding
    convert.convert(tmp_path / "orbax", tmp_path / "back", "torch")
    assert_same(open_weights(tmp_path / "back"), open_weights(tmp_path / "torch"))
    convert.convert(tmp_path / "orbax", tmp_path / "ours", "jax")
    assert_same(open_weights(tmp_path / "ours"), open_weights(source))
    for folder in ("back", "ours/origin", "orbax/origin"):
        assert (tmp_path / folder / "vocab.txt").read_text() == "a"
    assert convert.weight_map_of(tmp_path / "orbax") == convert.weight_map_of(source)


def test_each_device_copies_only_its_shard_from_the_mapped_file(tmp_path, monkeypatch):
    source = small_folder(tmp_path)
    tensors, kept = open_weights(tmp_path / "torch"), {}
    promises = promised(monkeypatch, tmp_path / "torch")
    read = []

    def counted(target, array):
        mapped = any(np.may_share_memory(array, tensor) for tensor in opened.values())
        read.append(array.nbytes if mapped else -(10**9))
        np.copyto(target, array)

    monkeypatch.setattr(orbax, "copy_bits", counted)
    opened = dict(promises["tensors"])
    assert tensors.keys() == opened.keys()
    whole = flat_arrays(convert.load_params(source)[1])
    total = 0
    for device in jax.devices():
        mine = functools.partial(operator.eq, device)
        for path, promise in trees.flatten(promises["params"]).items():
            read.clear()
            for where, array in itertools.chain.from_iterable(promise.iter_layers(mine)):
                assert array.tobytes() == whole[path][where].tobytes()
                kept.setdefault(path, np.zeros(whole[path].shape, bool))[where] = True
            owned = orbax.owned_shards(promise.sharding, promise.shape, mine)
            shard = int(np.prod(promise.sharding.shard_shape(promise.shape)))
            # Nothing is read for what another device writes.
            assert sum(read) == shard * promise.dtype.itemsize * len(owned), path
            total += sum(read)
    assert total == sum(leaf.nbytes for leaf in whole.values())  # no copy is read twice
    assert all(part.all() for part in kept.values()) and kept.keys() == whole.keys()


def promised(monkeypatch, folder):
    """What `save_orbax` would write of a folder, kept from being written."""
    held = {}
    opening = detect.open_checkpoint

    def remember(*args):
        source = opening(*args)
        held["tensors"] = source.tensors
        return source

    with monkeypatch.context() as patch:
        patch.setattr(detect, "open_checkpoint", remember)
        patch.setattr(convert_placed, "_write_atomically", lambda dst, params, *rest: held.update(params=params))
        convert_placed.save_orbax(folder, folder.parent / "nowhere", mesh())
    return held


def bytes_read() -> int:
    found = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in found for value in metric["values"])


def test_reading_one_shard_reads_only_its_bytes(tmp_path):
    config = T5Config(512, 512, 32, 16, 2048, 2, 1, 8)
    rng = np.random.default_rng(0)
    shapes = like_of(config)
    params = jax.tree.map(lambda x: rng.integers(0, 2**16, x.shape, np.uint16).view("float16"), shapes)
    convert.save(config, params, tmp_path / "ours")
    convert_placed.save_orbax(tmp_path / "ours", tmp_path / "orbax", mesh())
    stored = orbax.open_arrays(tmp_path / "orbax")
    path = "encoder/blocks/feed_forward/up/kernel"
    path = path if path in stored else max(stored, key=lambda p: np.prod(stored[p].shape))
    target = trees.flatten(shapes)[path]
    where = target.sharding.devices_indices_map(target.shape)[jax.devices()[3]]
    shard = int(np.prod(target.sharding.shard_shape(target.shape))) * 2
    assert shard == stored[path][where].nbytes and shard * 8 == int(np.prod(target.shape)) * 2
    before = bytes_read()
    part = stored[path][where]
    assert shard <= bytes_read() - before < 1.1 * shard
    assert part.tobytes() == trees.flatten(params)[path][where].tobytes()


@pytest.mark.slow
def test_lazy_layers_are_requested_one_at_a_time(tmp_path, monkeypatch):
    """Of a leaf whose layers are made when asked for, none is asked for before the one before it is written."""
    config = T5Config(97, 24, 8, 4, 40, 3, 2, 8)
    asked, written = [], []
    make = LazyTensor.__init__

    def counting(self, shape, dtype, layer, *rest):
        def one(index):
            asked.append((id(self), index))
            assert len(asked) - len(written) <= 1
            return layer(index)

        make(self, shape, dtype, one, *rest)

    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype("float32"), like_of(config))
    convert.to_torch(config, params, tmp_path / "torch")
    monkeypatch.setattr(LazyTensor, "__init__", counting)
    parts = orbax.LazyShardedArray.iter_layers

    def watched(self, owned=None):
        for group in parts(self, owned):
            yield group
            written.append(self)

    monkeypatch.setattr(orbax.LazyShardedArray, "iter_layers", watched)
    monkeypatch.setattr(orbax, "MAX_PENDING_BYTES", 1)
    convert_placed.save_orbax(tmp_path / "torch", tmp_path / "orbax", mesh())
    layers = sum(int(np.prod(leaf.shape[:1])) for p, leaf in trees.flatten(params).items() if "blocks" in p)
    assert len(asked) == len(written) > layers
    monkeypatch.undo()
    assert_same(trees.flatten(convert.load_params(tmp_path / "orbax")[1]), trees.flatten(params))


def test_a_failed_orbax_export_leaves_no_checkpoint(tmp_path):
    small_folder(tmp_path)
    file = tmp_path / "torch" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"decoder.embed_tokens.weight": tensors["decoder.embed_tokens.weight"] * 2}, file)
    with pytest.raises(UserError, match="tied tensor 'decoder.embed_tokens.weight'"):
        convert_placed.save_orbax(tmp_path / "torch", tmp_path / "orbax", mesh())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jax", "torch"]


def test_a_damaged_orbax_checkpoint_is_refused_in_words(tmp_path):
    config, params = tiny_t5()
    convert.save(config, params, tmp_path / "ours")
    convert_placed.save_orbax(tmp_path / "ours", tmp_path / "orbax", mesh())
    files = sorted((tmp_path / "orbax" / "params").rglob("d/*"), key=lambda file: -file.stat().st_size)
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="damaged"):
        convert.load_params(tmp_path / "orbax")
    (tmp_path / "orbax" / "config" / "metadata").write_text("{")
    with pytest.raises(UserError, match="config is not valid JSON"):
        convert.load_params(tmp_path / "orbax")


@pytest.mark.slow
def test_the_command_writes_orbax_and_refuses_options_that_it_would_ignore(tmp_path, capsys):
    small_folder(tmp_path)
    src, dst = str(tmp_path / "torch"), str(tmp_path / "orbax")
    for odd in (["--verify"], ["--merge-lora"], ["--add-tokens", "a"], ["--image-size", "28"]):
        assert cli.main(["convert", src, dst, "--to", "orbax", *odd]) == 2
        assert f"{odd[0]} does not work with --to orbax" in capsys.readouterr().err
    assert cli.main(["convert", src, dst, "--to", "orbax", "--mesh", "fsdp=4,tensor=2,data=1"]) in (0, None)
    assert "written: params, config" in capsys.readouterr().out


PROCESS = """
import json, sys
import jax
number, port, src, dst = int(sys.argv[1]), *sys.argv[2:]
jax.distributed.initialize(f"localhost:{port}", 2, number)
from lionjax.convert import orbax_folder
from lionjax.convert.io import orbax
from lionjax.core import sharding
copied, copy_bits = [], orbax.copy_bits
def counted(target, array):
    copied.append(array.nbytes)
    copy_bits(target, array)
orbax.copy_bits = counted
mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=4, tensor=2, data=1))
coverage = orbax_folder.save_orbax(src, dst, mesh)
print(json.dumps([sum(copied), coverage.bytes]))
"""


@pytest.mark.slow
def test_two_processes_write_one_checkpoint_each_its_own_shards(tmp_path):
    source = small_folder(tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    given = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(k), str(port), str(tmp_path / "torch"), str(tmp_path / "orbax")],
            env=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(2)
    ]
    try:
        said = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], said
    (one, whole), (other, _) = (json.loads(out.splitlines()[-1]) for out, _ in said)
    assert one + other == whole and min(one, other) > whole / 4, (one, other, whole)
    assert_same(
        trees.flatten(convert.load_params(tmp_path / "orbax")[1]), trees.flatten(convert.load_params(source)[1])
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jax", "orbax", "torch"]
