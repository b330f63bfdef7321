# SPDX-License-Identifier: Apache-2.0
"""Folders of buckets by name, gs://BUCKET/PATH, against a small Cloud Storage on the loopback address."""

import logging
import os
import time
from pathlib import Path

import pytest
from bucket_server import running_bucket

from lionjax.core import bucket, hub
from lionjax.core.errors import RetryError, UserError


@pytest.fixture
def objects(tmp_path, monkeypatch):
    """The objects of the bucket "bucket": {name: (bytes, generation)}."""
    with running_bucket() as (url, handler):
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        monkeypatch.setenv("LIONJAX_BUCKET_CACHE", str(tmp_path / "cache"))
        handler.objects["_"] = (b"", 1)
        yield handler.objects


def test_a_copy_is_brought_up_to_date_and_has_only_the_newest_checkpoint(objects, tmp_path, caplog):
    names = "config.json base/0_tune/a checkpoints/5/a checkpoints/20/a checkpoints/20/b/c compiled/x lock"
    objects |= {f"runs/mine/{name}": (name.encode(), 1) for name in names.split()}
    objects["runs/mine2/config.json"] = (b"another run", 1)
    with caplog.at_level(logging.INFO):
        folder = hub.local_path("gs://bucket/runs/mine")
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert files == {"config.json", "base/0_tune/a", "checkpoints/20/a", "checkpoints/20/b/c"}
    assert (folder / "checkpoints/20/b/c").read_bytes() == b"checkpoints/20/b/c" and str(folder) in caplog.text
    inode = (folder / "config.json").stat().st_ino
    objects["runs/mine/base/0_tune/a"] = (b"new", 2)
    objects["runs/mine/checkpoints/30/a"] = (b"newest", 1)
    assert hub.local_path(Path("gs://bucket/runs/mine/")) == folder
    assert (folder / "base/0_tune/a").read_bytes() == b"new" and (folder / "config.json").stat().st_ino == inode
    assert sorted(path.name for path in (folder / "checkpoints").rglob("*") if path.is_file()) == ["a"]


def test_one_object_is_a_file(objects):
    objects["data/rows.jsonl"] = (b"{}", 1)
    assert hub.local_path("gs://bucket/data/rows.jsonl").read_bytes() == b"{}"


def test_a_pushed_folder_is_read_back_and_its_config_is_written_last(objects, tmp_path):
    for name in ("config.json", "base/0_tune/a", "lock", "compiled/x", "report.json"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(name)
    assert bucket.upload(tmp_path / "run", "gs://bucket/mine/") == "gs://bucket/mine"
    assert [name for name in objects if name != "_"][-1] == "mine/config.json" and len(objects) == 5
    assert (hub.local_path("gs://bucket/mine") / "base/0_tune/a").read_text() == "base/0_tune/a"
    assert "mine/base/0_tune/commit_success.txt" in objects


def test_what_is_written_beside_a_copy_goes_back_and_nothing_else(objects, tmp_path):
    (tmp_path / "report.json").write_text("old")
    written = time.time() + 5
    (tmp_path / "report.html").write_text("new")
    os.utime(tmp_path / "report.html", (written, written))
    bucket.upload(tmp_path, "gs://bucket/mine", newer_than=written - 1)
    assert [name for name in objects if name != "_"] == ["mine/report.html"]


def test_directories_of_a_run_that_is_being_written_are_not_copied(objects):
    names = "checkpoints/5/a checkpoints/5/commit_success.txt checkpoints/9/a base/0_x/commit_success.txt base/1_y/a"
    objects |= {f"run/{name}": (b"", 1) for name in [*names.split(), "config.json"]}
    folder = hub.local_path("gs://bucket/run")
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert files == {
        "config.json",
        "checkpoints/5/a",
        "checkpoints/5/commit_success.txt",
        "base/0_x/commit_success.txt",
    }


@pytest.mark.parametrize("name", ["gs://", "gs://Bucket/a", "gs://bucket/../a"])
def test_other_texts_are_no_names(name):
    with pytest.raises(UserError, match="is no name of a bucket; write gs://BUCKET/PATH"):
        hub.local_path(name)


def test_what_is_not_there_is_one_sentence(objects):
    with pytest.raises(UserError, match="there is nothing under gs://bucket/nothing; check the name"):
        hub.local_path("gs://bucket/nothing")
    with pytest.raises(UserError, match="gs://private/run is not yours to use .*; run `gcloud auth"):
        hub.local_path("gs://private/run")


def test_a_bucket_that_does_not_answer_may_be_tried_again(objects, monkeypatch):
    monkeypatch.setattr(bucket, "RETRIES", {"max_retries": 1, "initial_delay": "1ms", "max_delay": "1ms"})
    with pytest.raises(RetryError, match="the bucket of gs://broken/run does not answer .*; try again"):
        hub.local_path("gs://broken/run")
