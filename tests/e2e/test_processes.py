# SPDX-License-Identifier: Apache-2.0
"""Two and four real processes train as one: the same numbers, the same end, and the same going on after it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import compile_flags
import numpy as np
import pytest
import toy
from bucket_server import running_bucket
from paths import HELPERS, ROOT

from lionjax.core import sharding
from lionjax.core.types import UserError
from lionjax.training import checkpoint, distributed

pytestmark = pytest.mark.slow

STEPS = 8  # updates of each of the two stages
LATE = 240  # seconds, on a machine that does other things as well


def begin(workdir, count, *fields, program=("toy.py",), **variables):
    """Processes that train the toy in a folder as one, each with one device."""
    words = (str(HELPERS / program[0]), *program[1:])
    return command(workdir, count, words, f"steps={STEPS}", *fields, **variables)


def command(workdir, count, words, *fields, **variables):
    """So many processes of one Python command, which know of each other; the folder is its last word."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {
        "XLA_FLAGS": compile_flags.XLA_FLAGS,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{ROOT}:{HELPERS}",
        "LIONJAX_HEARTBEAT_SECONDS": "10",
    }
    if count > 1:
        told |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, *words, str(workdir), *fields],
            env=os.environ | told | ({"JAX_PROCESS_ID": str(number)} if count > 1 else {}) | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]


def ends(processes, code=0):
    """What each process wrote: (stdout, stderr). All of them must end with this code."""
    try:
        wrote = [process.communicate(timeout=LATE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if code is not None:
        assert [process.returncode for process in processes] == [code] * len(processes), wrote
    return wrote


def whole_run(workdir, count):
    wrote = ends(begin(workdir, count))
    results = [[line for line in out.splitlines() if line.startswith("{")] for out, _ in wrote]  # Gloo speaks as well
    assert [len(lines) for lines in results] == [1] + [0] * (count - 1)  # process 0 speaks for all
    return json.loads(results[0][0])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    return workdir, whole_run(workdir, 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two")
    return workdir, whole_run(workdir, 2)


def updates_in(workdir):
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def wait_for_updates(workdir, number, processes):
    ended = time.monotonic() + LATE
    while updates_in(workdir) < number and time.monotonic() < ended:
        assert all(process.poll() is None for process in processes), ends(processes, None)
        time.sleep(0.01)


def stands_at(workdir):
    """The update at which the newest checkpoint, or beginning of a stage, was saved."""
    begun = [stage * STEPS for stage in checkpoint.all_bases(workdir / "base")]
    return max(begun + checkpoint.all_steps(workdir / "checkpoints"))


def losses(workdir):
    lines = toy.lines(workdir)
    assert [line["update"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def stream(workdir):
    """{(stage, place): record} of all that was delivered, by whichever process; none may differ when made again."""
    found = {}
    for line in (workdir / "seen.jsonl").read_text().splitlines():
        stage, first, records = json.loads(line)
        for place, record in enumerate(records, first):
            assert found.setdefault((stage, place), record) == record
    return found


def test_two_processes_give_the_losses_of_one_process(alone, two):
    expected = losses(alone[0])
    assert len(expected) == 2 * STEPS
    np.testing.assert_allclose(losses(two[0]), expected, rtol=1e-4)
    assert stream(two[0]) == stream(alone[0])
    report = json.loads((two[0] / "report.json").read_text())
    assert [stage["frozen_unchanged"] for stage in report["stages"]] == [True, True]
    assert report["environment"]["processes"] == 2


def test_two_processes_killed_in_a_bucket_go_on_on_other_machines(tmp_path, two):
    with running_bucket() as (url, server):
        told = {"TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none", "LIONJAX_LOCK_SECONDS": "3"}
        told["LIONJAX_HEARTBEAT_SECONDS"] = "60"  # nobody waits for a process that has died
        processes = begin("gs://bucket/run", 2, **told, LIONJAX_BUCKET_CACHE=str(tmp_path / "first"))
        ended = time.monotonic() + LATE
        while "run/checkpoints/10/commit_success.txt" not in server.objects and time.monotonic() < ended:
            assert all(process.poll() is None for process in processes), ends(processes, None)
            time.sleep(0.01)
        for process in processes:
            process.kill()
        ends(processes, -signal.SIGKILL)
        wrote = ends(begin("gs://bucket/run", 2, **told, LIONJAX_BUCKET_CACHE=str(tmp_path / "second")))
        found = json.loads(next(line for line in wrote[0][0].splitlines() if line.startswith("{")))
        (tmp_path / "metrics.jsonl").write_bytes(server.objects["run/metrics.jsonl"][0])
    assert found == two[1] and toy.lines(tmp_path) == toy.lines(two[0])


def test_two_processes_give_the_losses_and_answers_of_one_on_scenes_in_files(tmp_path):
    from lionjax.data.prepare import array_record_writer
    from lionjax.data.scenes.dataset import Scenes

    folder = array_record_writer.build(Scenes((12, 4, 12), image_size=56), tmp_path / "scenes")
    words = ("-m", "lionjax.cli", "train", str(HELPERS / "processes_pipeline.py"), "--workdir")
    found, answers = {}, {}
    for count in (1, 2):
        more = ("--run.feature_cache_dir", str(tmp_path / "features"), "--run.evaluate_limit", "7")
        ends(command(tmp_path / str(count), count, words, *more, SMALL_SCENES=str(folder)))
        lines = [json.loads(line) for line in (tmp_path / str(count) / "metrics.jsonl").open()]
        found[count] = [(line["stage"], line["step"], line["loss"]) for line in lines]
        report = json.loads((tmp_path / str(count) / "report.json").read_text())
        assert report["environment"]["processes"] == count
        assert all(stage["frozen_unchanged"] for stage in report["stages"])
        text = (tmp_path / str(count) / "evaluation" / "vqa.jsonl").read_text()
        answers[count] = text, report["metrics"], report["baselines"]
    assert answers[1] == answers[2] and len(answers[1][0].splitlines()) == 7
    assert [line[:2] for line in found[1]] == [line[:2] for line in found[2]]
    assert len(found[1]) == 4
    np.testing.assert_allclose([line[2] for line in found[2]], [line[2] for line in found[1]], rtol=1e-4)
    assert list((tmp_path / "features").glob("*/*.array_record"))


def test_two_processes_with_two_examples_a_row_give_the_losses_of_one_with_one(tmp_path):
    from lionjax.data.prepare import array_record_writer
    from lionjax.data.scenes.dataset import Scenes

    folder = array_record_writer.build(Scenes((12, 4, 12), image_size=56), tmp_path / "scenes")
    words = ("-m", "lionjax.cli", "train", str(HELPERS / "processes_pipeline.py"), "--workdir")
    found = {}
    for count, examples_per_row in ((1, 1), (1, 2), (2, 2)):
        workdir = tmp_path / f"{count}{examples_per_row}"
        ends(
            command(
                workdir, count, words, "--stages.0.examples_per_row", str(examples_per_row), SMALL_SCENES=str(folder)
            )
        )
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
        found[count, examples_per_row] = [line["loss"] for line in lines]
    np.testing.assert_allclose(found[1, 2], found[1, 1], rtol=1e-4)
    np.testing.assert_allclose(found[2, 2], found[1, 1], rtol=1e-4)


def test_sigterm_to_one_process_stops_all_at_one_step_and_any_number_can_resume(tmp_path, alone):
    for count, whom, update in ((2, 1, 3), (4, 0, STEPS + 2)):
        processes = begin(tmp_path, count, "save_every=1000", "pause=0.3")  # a second passes until all have heard
        wait_for_updates(tmp_path, update, processes)
        processes[whom].send_signal(signal.SIGTERM)
        said = [error for _, error in ends(processes, 0)]
        assert ["stopped and saved at stage" in text for text in said] == [True] + [False] * (count - 1)
        assert update <= stands_at(tmp_path) == updates_in(tmp_path) < 2 * STEPS
    whole_run(tmp_path, 1)
    np.testing.assert_allclose(losses(tmp_path), losses(alone[0]), rtol=1e-4)
    assert stream(tmp_path) == stream(alone[0])


def test_killed_process_ends_the_others_and_the_restart_is_bitwise_equal(tmp_path, two):
    for whom, update in ((1, 4), (0, STEPS + 5)):
        processes = begin(tmp_path, 2, "pause=0.1")
        wait_for_updates(tmp_path, update, processes)
        processes[whom].kill()
        ends(processes, None)
        assert processes[whom].returncode == -signal.SIGKILL and processes[1 - whom].returncode not in (0, None)
        assert updates_in(tmp_path) < 2 * STEPS
    # And what was saved last is damaged: all put it aside and use the one before.
    newest = tmp_path / "checkpoints" / str(checkpoint.all_steps(tmp_path / "checkpoints")[0])
    for file in (newest / "trainable").rglob("d/*"):
        file.write_bytes(bytes(255 - byte for byte in file.read_bytes()))
    assert whole_run(tmp_path, 2) == two[1]
    assert toy.lines(tmp_path) == toy.lines(two[0]) and stream(tmp_path) == stream(two[0])
    (aside,) = [path.name for path in (tmp_path / "quarantined").iterdir() if path.is_dir()]
    assert aside.startswith(f"checkpoints_{newest.name}_")


def test_a_hanging_process_ends_all_and_prints_its_stacks(tmp_path):
    wrote = ends(begin(tmp_path, 2, "hang=4", "watchdog_seconds=10"), 1)
    assert all("Timeout" in said for _, said in wrote) and "in __next__" in wrote[1][1]
    assert updates_in(tmp_path) in (3, 4)


def test_a_nan_loss_is_reported_by_every_process_and_ends_all_with_2(tmp_path):
    wrote = ends(begin(tmp_path, 2, "poison=5"), 2)
    assert all("the loss is nan" in said and f"process {i} of 2" in said for i, (_, said) in enumerate(wrote))
    assert len(list(tmp_path.glob("not_finite_one_*_process*.npz"))) == 2


def test_a_missing_host_is_reported_in_one_sentence(tmp_path):
    began = time.monotonic()
    (first,) = begin(
        tmp_path,
        1,
        JAX_COORDINATOR_ADDRESS="127.0.0.1:1",
        JAX_NUM_PROCESSES="2",
        JAX_PROCESS_ID="1",
        LIONJAX_JOIN_SECONDS="2",
    )
    ((_, said),) = ends([first], 75)
    assert "after 2 s not all processes of this run had connected to JAX_COORDINATOR_ADDRESS=127.0.0.1:1" in said
    assert "every host" in said and time.monotonic() - began < LATE


def test_invalid_environment_variables_raise_a_one_sentence_error(monkeypatch):
    cases = (
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS is not set"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2", "JAX_COORDINATOR_ADDRESS": "a:1"}, "must be in 0..1"),
        ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "a:1"}, "non-negative integer"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "host"}, "HOST:PORT"),
    )
    for variables, sentence in cases:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            with pytest.raises(UserError, match=sentence):
                distributed.cluster_from_env()


class Device:
    """A stand-in for a device of one of several processes."""

    def __init__(self, process):
        self.process_index = process


@pytest.mark.parametrize(
    ("shape", "of_process", "expected"),
    [
        ((1, 4, 1, 1), lambda i: i // 2, (0, 2)),  # two hosts, each half of the batch
        ((1, 2, 1, 2), lambda i: i % 2, (0, 1)),  # the tensor axis spans hosts: both read all
        ((2, 2, 1, 2), lambda i: i // 2, (0, 4)),
        ((1, 1, 1, 4), lambda i: i // 2, (0, 1)),
    ],
)
def test_processes_whose_devices_hold_the_same_rows_read_the_same(shape, of_process, expected):
    class Mesh:
        axis_names = sharding.MESH_AXES
        devices = np.array([Device(of_process(i)) for i in range(int(np.prod(shape)))]).reshape(shape)

    assert sharding.process_shard(Mesh()) == expected


def test_a_mesh_that_cuts_a_batch_unevenly_is_refused():
    class Mesh:
        axis_names = sharding.MESH_AXES
        shape = dict(zip(sharding.MESH_AXES, (1, 4, 1, 1)))
        devices = np.array([Device(i) for i in (0, 0, 0, 1)]).reshape(1, 4, 1, 1)

    with pytest.raises(UserError, match="unevenly among 2 processes"):
        sharding.process_shard(Mesh())
