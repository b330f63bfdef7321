# SPDX-License-Identifier: Apache-2.0
"""Weight files: opened without being read, strangers' tricks refused in a sentence, written complete or not at all."""

import argparse
import importlib.util
import json
import logging
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from weight_files import BF16, as_torch, assert_same, damaged, damages

from lionjax.convert.io.reader import has_nan, open_weights
from lionjax.convert.io.safetensors_writer import atomic_folder, write_safetensors
from lionjax.convert.mapping.apply import iter_param_slices
from lionjax.convert.mapping.plan import TensorSpec, plan_params
from lionjax.core.types import UserError
from lionjax.core.weight_map import WeightMapping, linear


def some_tensors(dtype=BF16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "h.0.w": rng.standard_normal((5, 3)).astype(dtype),
        "h.1.w": rng.standard_normal((5, 3)).astype(dtype),
        "ids": np.arange(7),
        "scalar": np.asarray(2.5, np.float32),
        "none": np.zeros((0, 4), np.float16),
    }


def header_and_data(header, data: bytes = bytes(32)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def refused(path) -> str:
    """The one sentence with which a file is refused; any other error fails the test."""
    with pytest.raises(UserError) as error:
        dict(open_weights(path))
    assert str(path.parent if path.is_file() else path) in str(error.value)
    return str(error.value)


# Reading


def test_a_safetensors_file_is_read_only_when_used(tmp_path):
    tensors = some_tensors() | {"large": np.ones(20_000_000, BF16)}
    save_file(tensors, tmp_path / "m.safetensors")
    tracemalloc.start()
    opened = open_weights(tmp_path / "m.safetensors")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert not opened["large"].flags.writeable
    assert_same(opened, tensors)


def test_released_tensor_frees_its_memory_and_can_be_read_again(tmp_path):
    save_file({"w": np.ones(30_000_000, np.float32)}, tmp_path / "m.safetensors")
    opened = open_weights(tmp_path)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    assert opened["w"].sum() == 30_000_000
    before = resident()
    opened.release("w")
    assert before - resident() > 100_000_000
    assert opened["w"][-1] == 1


def test_a_folder_is_opened_by_its_index_and_safetensors_come_first(tmp_path):
    tensors = some_tensors()
    names = list(tensors)
    save_file({n: tensors[n] for n in names[:2]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({n: tensors[n] for n in names[2:]}, tmp_path / "model-00002-of-00002.safetensors")
    where = {n: f"model-0000{1 + (k > 1)}-of-00002.safetensors" for k, n in enumerate(names)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert_same(open_weights(tmp_path), tensors)
    assert_same(open_weights(index), tensors)
    index.unlink()
    (tmp_path / "pytorch_model.bin").unlink()
    assert_same(open_weights(tmp_path), tensors)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    assert "download the missing ones of 2" in refused(tmp_path)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "..", "", "a\\b.bin"]
)
def test_an_index_may_not_name_files_elsewhere(tmp_path, name):
    (tmp_path / "in").mkdir()
    save_file({"w": np.ones(1)}, tmp_path / "secret.safetensors")
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    assert "may only name files in its own folder" in refused(tmp_path / "in")


@pytest.mark.parametrize(
    "text, problem",
    [
        ('{"weight_map": {"w": "gone.safetensors"}}', "is missing"),
        (
            '{"weight_map": {"w": "m.safetensors", "x": "m.safetensors"}}',
            "holds 1 tensors that it lacks, for example 'x'",
        ),
        ('{"weight_map": {"w": "gone.safetensors", "x": "lost.safetensors"}}', "with 1 others, is missing"),
        ('{"weight_map": {}}', "no tensors"),
        ('{"weight_map": {"w": "m.safetensors", "w": "m.safetensors"}}', "'w' occurs twice"),
        ('{"weight_map": ["w"]}', "no valid index"),
        ('{"weight_map": {"w": 3}}', "no weight file"),
        ("[" * 100_000, "no valid index"),
        ("\xff", "no valid index"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, text, problem):
    save_file({"w": np.ones(1)}, tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors.index.json").write_text(text, encoding="latin-1")
    assert problem in refused(tmp_path)


def test_a_tensor_of_a_shard_that_the_index_lacks_is_read_and_named(tmp_path, caplog):
    save_file({"w": np.ones(1), "x": np.zeros(1)}, tmp_path / "m.safetensors")
    index = {"weight_map": {"w": "m.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    caplog.set_level(logging.INFO, "lionjax")
    assert_same(open_weights(tmp_path), {"w": np.ones(1), "x": np.zeros(1)})
    assert "holds 1 tensors that m.safetensors.index.json lacks, such as x" in caplog.text


STALE_INDEX = {"model.safetensors.index.json": json.dumps({"weight_map": {"w": "model-00001-of-00001.safetensors"}})}


@pytest.mark.parametrize(
    "names, read",
    [
        (["model.safetensors", "pytorch_model.bin", "consolidated.safetensors"], "model.safetensors"),
        (
            ["pytorch_model.bin", "optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth"],
            "pytorch_model.bin",
        ),
        (["weights.safetensors", "weights.fp16.safetensors", "other.bin"], "weights.safetensors"),
        (["adapter_model.safetensors", "adapter_model.bin", "training_args.bin"], "adapter_model.safetensors"),
        (["net.pth", "training_args.bin", "optimizer.bin"], "net.pth"),
        (["model.safetensors", *STALE_INDEX], "model.safetensors"),
    ],
)
def test_of_several_weight_files_the_log_says_in_one_line_which_is_read(tmp_path, caplog, names, read):
    torch = pytest.importorskip("torch")
    for name in names:
        if name in STALE_INDEX:
            (tmp_path / name).write_text(STALE_INDEX[name])
        elif name.endswith(".safetensors"):
            save_file({"w": np.full(1, name == read)}, tmp_path / name)
        else:
            torch.save({"w": torch.full((1,), name == read)}, tmp_path / name)
    caplog.set_level(logging.INFO, "lionjax")
    assert_same(open_weights(tmp_path), {"w": np.ones(1, bool)})
    (line,) = [r.getMessage() for r in caplog.records if "reads" in r.getMessage()]
    assert f"reads {read} (" in line and "\n" not in line
    assert all(name in line.partition(", not ")[2] for name in names if name != read)


def test_several_weight_files_of_one_rank_are_refused(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"w": np.ones(1)}, tmp_path / name)
    assert "holds 2 weight files (a.safetensors, b.safetensors); give the path of one" in refused(tmp_path)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
HTML = b"\n<!-- moved -->\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"


@pytest.mark.parametrize("name", ["m.safetensors", "m.bin", "m.pth", "m.pt", "m.safetensors.index.json"])
@pytest.mark.parametrize(
    "content, kind",
    [
        (LFS_POINTER, "is a Git LFS pointer"),
        (HTML, "is an HTML page"),
        (b"<html>", "is an HTML page"),
        (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "is an XML error message"),
        (b"", "is empty (0 bytes)"),
    ],
)
def test_what_a_failed_download_leaves_is_named(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    assert kind in refused(tmp_path / name) and kind in refused(tmp_path)


@pytest.mark.parametrize("name", ["m.gguf", "m.safetensors", "m.bin"])
def test_a_gguf_file_is_named_whatever_its_suffix(tmp_path, name):
    (tmp_path / name).write_bytes(b"GGUF" + bytes(64))
    assert "GGUF file (llama.cpp's format of quantized weights)" in refused(tmp_path / name)
    assert "GGUF" in refused(tmp_path)


def test_a_torch_file_named_safetensors_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(1)}, tmp_path / "m.safetensors")
    assert "is a PyTorch file" in refused(tmp_path / "m.safetensors")


def entry(dtype="F32", shape=(8,), begin=0, end=32) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"1234", "cut short"),
        (struct.pack("<Q", 2**60) + b"{}", "cut short"),
        (header_and_data({"w": entry()}, bytes(31)), "damaged"),
        (header_and_data({"w": entry()}, bytes(33)), "damaged"),
        (header_and_data({"w": entry(shape=(9,))}), "damaged"),
        (header_and_data({"w": entry(shape=(-8,))}), "damaged"),
        (header_and_data({"w": entry(shape=(2**62, 2**62))}), "damaged"),
        (header_and_data({"w": entry(), "x": entry(shape=(4,), begin=16)}), "damaged"),
        (header_and_data(b'{"w":' + b"[" * 50_000), "damaged"),
        (header_and_data(b'{"w": %s, "w": %s}' % ((json.dumps(entry()).encode(),) * 2)), "'w' occurs twice"),
        (header_and_data({"w": entry(dtype="F4", shape=(64,))}), "has dtype F4; the supported dtypes are BOOL, "),
    ],
)
def test_a_safetensors_file_that_does_not_fit_its_header_is_refused(tmp_path, content, problem):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    assert problem in refused(path)


def test_an_absurd_header_is_refused_before_memory_is_taken(tmp_path):
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:  # a sparse file: it claims, and has, a header of 4 GB
        file.write(struct.pack("<Q", 4 * 10**9))
        file.truncate(5 * 10**9)
    tracemalloc.start()
    assert "header of 4,000,000,000 bytes" in refused(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_paths_without_weights_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    assert "no weight file" in refused(tmp_path / "notes.txt")
    assert "holds no weights" in refused(tmp_path)
    with pytest.raises(UserError, match="No such file"):
        open_weights(tmp_path / "gone.safetensors")


# torch's own files


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
def test_a_pth_is_read_and_the_optimizer_beside_the_weights_is_left(tmp_path, wrap, modern):
    torch = pytest.importorskip("torch")
    tensors = some_tensors()
    state = as_torch(torch, tensors)
    if wrap:
        state = {wrap: state, "optimizer": {"state": {0: torch.ones(3)}}, "epoch": 3}
    torch.save(state, tmp_path / "m.pth", _use_new_zipfile_serialization=modern)
    opened = open_weights(tmp_path / "m.pth")
    assert_same(opened, tensors)
    assert set(opened.skipped) == ({"optimizer", "epoch"} if wrap else set())
    assert bool(opened.memory_mapped) == modern
    for name in opened:
        opened.release(name)
    assert_same(opened, tensors)


@pytest.mark.parametrize("modern", [True, False])
def test_numpy_values_beside_the_tensors_are_allowed(tmp_path, modern):
    torch = pytest.importorskip("torch")
    types = (np.float16, np.float32, np.float64, np.int32, np.int64, np.uint8, np.bool_)
    others = {t.__name__: t(1) for t in types} | {"losses": np.arange(3.0), "args": argparse.Namespace(lr=0.1)}
    torch.save({"w": torch.ones(2), **others}, tmp_path / "m.pth", _use_new_zipfile_serialization=modern)
    opened = open_weights(tmp_path / "m.pth")
    assert set(opened) == {"w"} and set(opened.skipped) == set(others)


@pytest.mark.parametrize("value", [np.array([print], object), np.dtype("V8"), np.random.default_rng(0), Path("a")])
def test_other_objects_beside_the_tensors_are_refused(tmp_path, value):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(2), "x": value}, tmp_path / "m.pth")
    text = refused(tmp_path / "m.pth")
    assert "\n" not in text and "weights_only" not in text


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": {"state_dict": state}, "epoch": 1},
        lambda state: {"state_dict": {"module": state}},
        lambda state: {"model": {"hidden_size": 3}, "state_dict": state},
    ],
)
def test_dictionaries_around_the_weights_may_be_nested(tmp_path, wrap):
    torch = pytest.importorskip("torch")
    torch.save(wrap(as_torch(torch, some_tensors())), tmp_path / "m.pt")
    assert_same(open_weights(tmp_path), some_tensors())


def test_name_prefixes_of_data_parallel_training_are_removed(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"module.a": torch.ones(2), "module.b": torch.ones(2)}, tmp_path / "m.bin")
    assert set(open_weights(tmp_path)) == {"a", "b"}


def test_an_inner_dictionary_with_an_unusual_name_is_found_by_key(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"ema": {"a": torch.ones(2)}, "args": {"x": 1}}, tmp_path / "m.pth")
    assert set(open_weights(tmp_path / "m.pth", key="ema")) == {"a"}
    assert "holds no tensors; its keys are ema, args" in refused(tmp_path / "m.pth")
    with pytest.raises(UserError, match="no dictionary 'net'; its keys are ema, args"):
        open_weights(tmp_path / "m.pth", key="net")


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("modern", [True, False])
def test_a_pickle_with_code_is_refused_in_one_sentence_and_not_run(tmp_path, modern):
    torch = pytest.importorskip("torch")
    target = tmp_path / "was-here"
    torch.save({"w": torch.ones(2), "evil": Payload(target)}, tmp_path / "m.pth", _use_new_zipfile_serialization=modern)
    text = refused(tmp_path / "m.pth")
    assert "it holds code (posix.system)" in text and "\n" not in text
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(target)))
    assert "cannot be loaded" in refused(tmp_path / "plain.pth")
    assert not target.exists()


def test_torch_files_that_would_grow_when_read_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.zeros(100_000)}, tmp_path / "m.pth")
    old, new = zipfile.ZipFile(tmp_path / "m.pth"), zipfile.ZipFile(tmp_path / "p.pth", "w", zipfile.ZIP_DEFLATED)
    with old, new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    assert "compressed, or larger than the file" in refused(tmp_path / "p.pth")


def test_an_old_torch_or_none_is_refused(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(1)}, tmp_path / "m.pth")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert "install torch 2.10 or newer" in refused(tmp_path / "m.pth")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "install lionjax[torch]" in refused(tmp_path / "m.pth")


# Numbers


@settings(deadline=None)
@given(
    st.sampled_from([np.float16, BF16, np.float32, np.float64]),
    st.lists(st.integers(0, 2**16 - 1), min_size=4, max_size=4),
)
def test_nan_is_found_in_the_bits(dtype, words):
    array = np.array(words * 2, np.uint16).view(dtype)
    assert has_nan(array) == bool(np.isnan(array.astype(np.float64)).any())
    assert has_nan(np.concatenate([np.zeros(300_000, dtype), array])) == has_nan(array)


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32, np.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_smallest_nan_is_told_from_infinity(dtype, sign):
    infinity = np.array([sign * np.inf], dtype)
    word = f"u{infinity.itemsize}"
    assert not has_nan(infinity)
    assert has_nan((infinity.view(word) + 1).astype(word).view(dtype))


def test_integers_hold_no_nan():
    assert not has_nan(np.full(3, -1))


# Writing


def parts_of(tensors):
    return ((name, (), w) for name, w in tensors.items())


def forms_of(tensors):
    return {name: TensorSpec.from_array(w) for name, w in tensors.items()}


@pytest.mark.parametrize("shard_bytes, files", [(10**9, 1), (40, 4), (1, 5)])
def test_what_is_written_is_what_the_safetensors_library_reads(tmp_path, shard_bytes, files):
    tensors = some_tensors()
    names = write_safetensors(tmp_path, "model", forms_of(tensors), parts_of(tensors), shard_bytes)
    shards = [name for name in names if name.endswith(".safetensors")]
    assert len(shards) == files
    loaded = {}
    for name in shards:
        loaded |= load_file(tmp_path / name)
        with safe_open(tmp_path / name, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
    assert_same(loaded, tensors)
    assert_same(open_weights(tmp_path), tensors)


def test_tensors_may_come_layer_by_layer_in_any_order_and_layout(tmp_path):
    whole = np.random.default_rng(0).standard_normal((3, 2, 300, 400)).astype(BF16)
    turned = np.ascontiguousarray(whole.transpose(0, 1, 3, 2))
    parts = [("w", (i, j), turned[i, j].T) for i, j in np.ndindex(3, 2)]
    write_safetensors(tmp_path, "m", forms_of({"w": whole}), reversed(parts))
    assert_same(load_file(tmp_path / "m.safetensors"), {"w": whole})


def test_a_missing_or_unplanned_part_is_an_internal_error(tmp_path):
    tensors = some_tensors()
    with pytest.raises(ValueError, match="bytes were written"):
        write_safetensors(tmp_path, "m", forms_of(tensors), list(parts_of(tensors))[1:])
    with pytest.raises(ValueError, match="was planned"):
        write_safetensors(tmp_path, "m", forms_of(tensors), [("ids", (), np.arange(3))])


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with atomic_folder(tmp_path / "good") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "good").exists()
    assert (tmp_path / "good" / "a").read_text() == "a"
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), atomic_folder(tmp_path / "bad") as folder:
            (folder / "a").write_text("a")
            raise error
    assert [path.name for path in tmp_path.iterdir()] == ["good"]
    with pytest.raises(UserError, match="already exists"), atomic_folder(tmp_path / "good"):
        pass
    assert (tmp_path / "good" / "a").read_text() == "a"


def test_memory_holds_a_few_tensors_and_not_the_model(tmp_path):
    rows = (WeightMapping("h.{i}.w", "w", linear),)
    shape, layers = (1000, 1500), 16
    save_file({f"h.{i}.w": np.full(shape, i, BF16) for i in range(layers)}, tmp_path / "m.safetensors")
    tensors = open_weights(tmp_path)
    plan = plan_params(rows, tensors)
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    write_safetensors(tmp_path / "out", "m", plan.output_specs, iter_param_slices(plan, tensors, tensors.release))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * 1000 * 1500 * 2
    assert load_file(tmp_path / "out" / "m.safetensors")["w"][-1, 0, 0] == layers - 1


# Damage


@pytest.fixture(scope="module")
def good_files(tmp_path_factory) -> dict[str, bytes]:
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("good")
    save_file(some_tensors(), folder / "m.safetensors")
    torch.save(as_torch(torch, some_tensors()), folder / "m.bin")
    torch.save({"model": as_torch(torch, some_tensors())}, folder / "m.pth", _use_new_zipfile_serialization=False)
    (folder / "m.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(some_tensors(), "m.safetensors")}))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["m.safetensors", "m.bin", "m.pth", "m.index.json"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=damages)
def test_a_damaged_file_is_read_or_refused_and_nothing_else_happens(good_files, tmp_path, name, damage):
    for other in good_files:
        (tmp_path / other).unlink(missing_ok=True)
    if name == "m.index.json":
        (tmp_path / "m.safetensors").write_bytes(good_files["m.safetensors"])
    (tmp_path / name).write_bytes(damaged(good_files[name], damage))
    try:
        opened = open_weights(tmp_path / name)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert sum(w.nbytes for w in opened.values()) < 10_000
        assert all(w.tobytes() is not None for w in opened.values())


def test_a_zip_with_any_damaged_byte_in_its_end_records_is_read_or_refused(good_files, tmp_path):
    end_records = 56 + 20 + 22  # bytes of the zip64 record, its locator and the end record
    for place in range(len(good_files["m.bin"]) - end_records, len(good_files["m.bin"])):
        data = bytearray(good_files["m.bin"])
        data[place] ^= 2
        (tmp_path / "m.bin").write_bytes(data)
        try:
            open_weights(tmp_path / "m.bin")
        except UserError as error:
            assert str(tmp_path / "m.bin") in str(error) and "\n" not in str(error)
