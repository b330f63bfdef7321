# SPDX-License-Identifier: Apache-2.0
"""What can befall a run from outside, done to a real process: kill -9, SIGTERM, Ctrl-C, a full disk, NaN."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import compile_flags
import numpy as np
import pytest
import toy
from paths import HELPERS, ROOT

from lionjax.training import checkpoint


def begin(workdir, *fields, file_bytes=None):
    """A process that trains the toy in a folder, on one device; `file_bytes`: no file may grow beyond that."""
    environment = os.environ | {"XLA_FLAGS": compile_flags.XLA_FLAGS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    limit = (file_bytes, file_bytes)
    return subprocess.Popen(
        [sys.executable, str(HELPERS / "toy.py"), str(workdir), *fields],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)) if file_bytes else None,
    )


def end(process, code=0):
    out, said = process.communicate()
    assert process.returncode == code, said
    assert "Traceback" not in said or code == 0, said
    return json.loads(out.splitlines()[-1]) if out else said


def wait_for(process, happened):
    """Until something has happened in a folder, or the process has ended."""
    while not happened() and process.poll() is None:
        time.sleep(0.002)


def updates_in(workdir):
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, end(begin(workdir, "steps=40"))


@pytest.mark.slow
def test_kill_9_while_saving_loses_nothing_and_changes_no_bit(tmp_path, whole):
    folder, expected = whole
    for update in (3, 45):  # while a step is written in each of the two stages
        process = begin(tmp_path, "steps=40")
        wait_for(process, lambda at=update: updates_in(tmp_path) >= at)
        wait_for(process, lambda: any((tmp_path / "checkpoints").glob(f"*{checkpoint.ORBAX_TMP_SUFFIX}*")))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert end(begin(tmp_path, "steps=40")) == expected
    assert toy.lines(tmp_path) == toy.lines(folder)
    assert not list(tmp_path.rglob(f"*{checkpoint.ORBAX_TMP_SUFFIX}*"))


@pytest.mark.slow
def test_kill_9_at_random_moments_loses_nothing_and_changes_no_bit():
    words = [sys.executable, "-m", "benchmarks.faults", "--kills", "6", "--steps", "8"]
    environment = os.environ | {"XLA_FLAGS": compile_flags.XLA_FLAGS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = r"faults: 6 kills at random times in \d+ runs of 16 updates: 0 lost, 0 differing, "
    assert re.match(said, done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_sigterm_saves_and_ends_with_0_and_ctrl_c_with_130(tmp_path, whole):
    folder, expected = whole
    for kind, code, update in ((signal.SIGTERM, 0, 3), (signal.SIGINT, 130, 50)):
        process = begin(tmp_path, "steps=40", "save_every=1000")
        wait_for(process, lambda at=update: updates_in(tmp_path) >= at)
        process.send_signal(kind)
        assert "stopped and saved at stage" in end(process, code)
        assert checkpoint.all_steps(tmp_path / "checkpoints")[0] == updates_in(tmp_path)
    assert end(begin(tmp_path, "steps=40", "save_every=1000")) == expected
    assert toy.lines(tmp_path) == toy.lines(folder)


@pytest.mark.slow
def test_a_full_disk_ends_with_2_and_one_sentence_and_what_was_saved_stays_good(tmp_path, whole):
    folder, expected = whole
    process = begin(tmp_path, "steps=40")
    wait_for(process, lambda: updates_in(tmp_path) >= 10)
    process.send_signal(signal.SIGTERM)
    end(process)
    before = checkpoint.all_steps(tmp_path / "checkpoints")[0]
    # From here on no file can grow beyond a few bytes, which a process meets as it meets a full disk.
    said = end(begin(tmp_path, "steps=40", file_bytes=6000), code=2)
    assert "the disk is full while writing in" in said.splitlines()[-1]
    named = int(re.search(r"the checkpoint of update (\d+) is complete", said.splitlines()[-1])[1])
    assert named >= before  # a small save may still have fitted
    assert named == checkpoint.all_steps(tmp_path / "checkpoints")[0]
    assert not list(tmp_path.rglob(f"*{checkpoint.ORBAX_TMP_SUFFIX}*"))
    assert end(begin(tmp_path, "steps=40")) == expected
    assert toy.lines(tmp_path) == toy.lines(folder)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_with_2_names_its_records_and_keeps_the_batch(tmp_path):
    said = end(begin(tmp_path, "steps=40", "poison=5"), code=2).splitlines()[-1]
    (kept,) = tmp_path.glob("not_finite_*.npz")
    arrays = np.load(kept)
    records, step = arrays["record_B"].tolist(), int(kept.stem.split("_")[-1])
    assert 5 in records and all(f"{record} (toy/{record})" in said for record in records)
    assert "stage 'one'" in said and f"step {step}: the loss is nan" in said and str(kept) in said
    assert np.isnan(arrays["image_BHWC"][records.index(5)]).all()
    assert all(found < step for found in checkpoint.all_steps(tmp_path / "checkpoints"))
    assert updates_in(tmp_path) == step - 1
