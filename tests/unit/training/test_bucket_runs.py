# SPDX-License-Identifier: Apache-2.0
"""Runs whose folder lies in a bucket, against a small Cloud Storage on the loopback address."""

import json
import re
import time

import pytest
import toy
from bucket_server import running_bucket

from lionjax.core.errors import RetryError, UserError
from lionjax.training import bucket_folder, bucket_lock, bucket_paths, checkpoint, loop

RUN = "gs://bucket/runs/mine"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The server's handler, whose `objects` are those of the bucket."""
    with running_bucket() as (url, handler):
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # else Google's servers are asked for one
        monkeypatch.setenv("LIONJAX_BUCKET_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv(bucket_paths.SECONDS, "1")
        monkeypatch.setenv(bucket_lock.SECONDS, "0.6")
        bucket_paths.install()
        yield handler
        handler.refusal = staticmethod(lambda method, name: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, checksums) of a run on the disk that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(workdir)


def train(workdir, batches=toy.Batches):
    return checkpoint.leaf_checksums(loop.train(toy.experiment(), workdir, batches)[0])


def lines(objects, folder):
    folder.mkdir()
    (folder / "metrics.jsonl").write_bytes(objects["runs/mine/metrics.jsonl"][0])
    return toy.lines(folder)


def states_before_writes(server, monkeypatch):
    """[(name of the object, the bucket before it is written)], to which each write of a run adds one."""
    states = []

    def record(method, name):
        if method == "POST":
            states.append((name.removeprefix("runs/mine/"), dict(server.objects)))
        return None

    monkeypatch.setattr(server, "refusal", staticmethod(record))
    return states


@pytest.mark.slow
def test_a_run_killed_at_a_write_goes_on_elsewhere_with_the_same_bits_and_lines(tmp_path, server, monkeypatch, whole):
    folder, expected = whole
    monkeypatch.setattr(bucket_folder.BucketFolder, "_publish_now_and_then", lambda self: None)
    states = states_before_writes(server, monkeypatch)
    assert train(RUN) == expected and lines(server.objects, tmp_path / "once") == toy.lines(folder)
    assert {name.split("/")[3] for name in server.objects if "/checkpoints/" in name} >= {"10", "11"}
    assert {"config.json", "report.json", "lock"} <= {name.split("/")[2] for name in server.objects}
    complete = next(state for _, state in states if "runs/mine/checkpoints/8/commit_success.txt" in state)
    half = next(state for name, state in states if name == "checkpoints/10/commit_success.txt")
    for number, state in enumerate((complete, half)):
        server.objects.clear()
        server.objects.update(state)
        held = json.loads(state["runs/mine/lock"][0])
        assert not held["released"]  # the lock is there, as after kill -9
        silent = json.dumps(held | {"place": "another machine"}).encode()
        server.objects["runs/mine/lock"] = (silent, next(server.generations))
        monkeypatch.setenv("LIONJAX_BUCKET_CACHE", str(tmp_path / f"machine{number}"))
        assert train(RUN) == expected
        assert lines(server.objects, tmp_path / str(number)) == toy.lines(folder)
    assert json.loads(server.objects["runs/mine/lock"][0])["released"]


def refuse(server, monkeypatch, status, body=b"{}", count=10**9, methods=("POST",), name=""):
    """Refuse the next `count` requests with these methods, of objects whose names match."""
    left = [count]

    def refusal(method, wanted):
        if method in methods and re.search(name, wanted) and left[0] > 0:
            left[0] -= 1
            return status, body
        return None

    monkeypatch.setattr(server, "refusal", staticmethod(refusal))


def wait_for(happened, seconds=60):
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.01)
    assert happened()


BILLING = b'{"error": {"message": "The billing account for the owning project is disabled"}}'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "body", "error", "sentence"),
    [
        (403, b"{}", UserError, "gs://bucket/runs/mine is not yours to use .*check the rights"),
        (403, BILLING, UserError, "takes no more .The billing account .* is disabled.; see the quotas and the billing"),
        (503, b"", RetryError, "the bucket of gs://bucket/runs/mine does not answer .*; try again"),
    ],
)
def test_a_bucket_that_takes_no_checkpoint_ends_a_run_with_one_sentence_and_keeps_the_last(
    server, monkeypatch, status, body, error, sentence, whole
):
    class Failing(toy.Batches):
        def __next__(self):
            if self.next == 3 * 8:  # between the checkpoints of updates 2 and 4
                wait_for(lambda: "runs/mine/checkpoints/2/commit_success.txt" in server.objects)
                refuse(server, monkeypatch, status, body)
            return super().__next__()

    what = toy.experiment(toy.stage("one"))
    with pytest.raises(UserError, match=sentence) as raised:
        loop.train(what, RUN, Failing)
    assert type(raised.value) is error
    assert any(name.endswith("checkpoints/2/commit_success.txt") for name in server.objects)


@pytest.mark.slow
def test_a_bucket_that_is_away_for_a_while_does_not_end_a_run(server, monkeypatch):
    refuse(server, monkeypatch, 503, count=4, methods=("POST", "GET"), name="checkpoints/2/")
    loop.train(toy.experiment(toy.stage("one")), RUN, toy.Batches)
    assert server.refusal("POST", "checkpoints/2/") is None
    assert "runs/mine/checkpoints/2/commit_success.txt" in server.objects


@pytest.mark.slow
def test_a_bucket_that_does_not_answer_does_not_pass_for_a_damaged_checkpoint(server, monkeypatch):
    what = toy.experiment(toy.stage("one"))
    loop.train(what, RUN, toy.Batches)
    refuse(server, monkeypatch, 503, methods=("GET",), name="base/1_final/learned")
    with pytest.raises(RetryError, match="does not answer"):
        loop.train(what, RUN, toy.Batches)
    assert not any("quarantined" in name for name in server.objects)


@pytest.mark.slow
def test_a_damaged_checkpoint_in_a_bucket_is_moved_aside_and_the_one_before_is_used(server):
    what = toy.experiment(toy.stage("one"))
    expected = checkpoint.leaf_checksums(loop.train(what, RUN, toy.Batches)[0])
    for name in list(server.objects):
        if "/base/1_final/" in name or "/checkpoints/6/" in name:
            server.objects[name] = (b"damaged", next(server.generations))
    assert checkpoint.leaf_checksums(loop.train(what, RUN, toy.Batches)[0]) == expected
    assert any("quarantined/checkpoints_6" in name for name in server.objects)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gs://bucket", "is a bucket, not a folder in it; write gs://BUCKET/PATH"),
        ("gs://missing/run", "there is no bucket of the name of gs://missing/run"),
        ("gs://private/run", "gs://private/run is not yours to use"),
    ],
)
def test_a_run_cannot_begin_in_a_bucket_that_is_not_there_or_not_ones_own(server, name, sentence):
    with pytest.raises(UserError, match=sentence), bucket_folder.opened(name):
        pass


def test_a_bucket_whose_objects_are_not_listed_is_refused_and_never_taken_for_an_empty_one(server, monkeypatch):
    refuse(server, monkeypatch, 403, methods=("GET",), name="^$")  # TensorStore then returns an empty list
    with pytest.raises(UserError, match="cannot be listed"), bucket_folder.opened(RUN):
        pass
    refuse(server, monkeypatch, 403, count=0)
    server.objects["runs/mine/base/0_x/commit_success.txt"] = (b"", 1)
    with pytest.raises(UserError, match="not yours to use"), bucket_folder.opened(RUN) as workdir:
        assert list(checkpoint.all_bases(bucket_folder.arrays_folder(workdir) / "base")) == [0]
        refuse(server, monkeypatch, 403, methods=("GET",), name="^$")
        checkpoint.all_bases(bucket_folder.arrays_folder(workdir) / "base")


def test_files_are_published_whole_deleted_with_the_local_ones_and_replaced_by_the_buckets(server):
    with bucket_folder.opened(RUN) as workdir:
        (workdir / "evaluation").mkdir()
        (workdir / "evaluation" / "vqa.journal.jsonl").write_text("{}")
        (workdir / "metrics.jsonl").write_text("one\n")
        bucket_folder.publish(workdir)
        assert server.objects["runs/mine/metrics.jsonl"][0] == b"one\n"
        (workdir / "evaluation" / "vqa.journal.jsonl").unlink()
        (workdir / "metrics.jsonl").write_text("one\ntwo\n")
    assert server.objects["runs/mine/metrics.jsonl"][0] == b"one\ntwo\n"
    assert not any("journal" in name for name in server.objects)
    (workdir / "left_over.json").write_text("{}")
    (workdir / "metrics.jsonl").write_text("other")
    with bucket_folder.opened(RUN) as again:
        assert again == workdir and (again / "metrics.jsonl").read_text() == "one\ntwo\n"
        assert not (again / "left_over.json").exists()


def lock(server, **fields):
    made = bucket_lock.BucketLock(bucket_folder.BucketFolder(RUN).store, "runs/mine/lock", RUN)
    made.owner |= fields
    return made


def test_two_runs_in_one_folder_are_refused_and_a_silent_one_is_followed(server):
    first = lock(server)
    assert first.acquire() == 0.0
    with pytest.raises(RetryError, match=f"is training in {RUN}; stop it or set another --workdir"):
        lock(server).acquire()  # this process is alive
    first.release()
    elsewhere = lock(server, place="another machine", pid=7)
    elsewhere.acquire()
    begin = time.monotonic()
    second = lock(server)
    assert abs(second.acquire() - time.time()) < 30 and time.monotonic() - begin >= second.seconds
    elsewhere.written = 0.0
    with pytest.raises(RetryError, match="has taken over"):
        elsewhere.beat()
    second.release()
    assert lock(server).acquire() > 0


def test_a_run_that_gives_signs_of_life_from_elsewhere_keeps_its_folder(server, monkeypatch):
    elsewhere = lock(server, place="another machine")
    elsewhere.acquire()

    def beat(_):
        elsewhere.written = 0.0
        elsewhere.beat()

    monkeypatch.setattr(bucket_lock.time, "sleep", beat)
    with pytest.raises(RetryError, match="is training in"):
        lock(server).acquire()


def test_a_killed_process_of_this_machine_is_followed_at_once(server):
    dead = lock(server, pid=2**22 + 1)  # above the kernel's largest
    dead.acquire()
    begin = time.monotonic()
    lock(server).acquire()
    assert time.monotonic() - begin < dead.seconds


def test_of_two_that_follow_a_silent_run_one_gets_the_folder(server):
    store, stale = lock(server), lock(server)
    store.acquire()
    generation = store.generation
    assert stale._write(generation) and not lock(server)._write(generation)


def test_the_paths_of_a_bucket_behave_as_a_file_system(server):
    path = bucket_paths.BucketPath("gs://bucket/a")
    (path / "b" / "c.txt").write_text("text")
    with (path / "b" / "c.txt").open("a") as file:
        file.write(" more")
    with pytest.raises(ZeroDivisionError), (path / "b" / "d").open("wb") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert (path / "b" / "c.txt").read_text() == "text more" and not (path / "b" / "d").exists()
    (path / "b1").write_text("")
    assert [child.name for child in path.iterdir()] == ["b", "b1"] and [p.name for p in path.glob("*1")] == ["b1"]
    (path / "b").rename(path / "e" / "f")
    assert not (path / "b").exists() and (path / "e" / "f" / "c.txt").is_file() and (path / "e").is_dir()
    with pytest.raises(FileExistsError):
        (path / "b1").rename(path / "e")
    (path / "e").rmtree()
    assert set(server.objects) == {"a/b1"}
    with pytest.raises(FileNotFoundError):
        (path / "e").rmtree()


def test_how_long_a_run_waits_is_set_in_seconds(monkeypatch):
    monkeypatch.setenv(bucket_paths.SECONDS, "600")
    limits = bucket_paths.retries()
    waits = [min(2**number, 32) for number in range(limits["max_retries"])]
    assert sum(waits[:-1]) < 600 <= sum(waits)
    for name, function in (
        (bucket_paths.SECONDS, bucket_paths.retries),
        (bucket_lock.SECONDS, bucket_lock.lock_seconds),
    ):
        monkeypatch.setenv(name, "soon")
        with pytest.raises(UserError, match=f"{name} is 'soon'"):
            function()
