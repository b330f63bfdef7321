# SPDX-License-Identifier: Apache-2.0
"""Updates that come out bad change nothing, and the run stops, goes on or goes back as its config says."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import toy

from lionjax.core.experiment import RunConfig
from lionjax.core.types import UserError
from lionjax.training import bad_steps, checkpoint, loop
from lionjax.training.run_log import StageStats


def experiment(steps=6, poison=5, **run):
    what = toy.experiment(toy.stage("one", steps), run=run)
    return dataclasses.replace(what, data=toy.ToyData(poison=poison))


def train(workdir, what, batches=toy.Batches):
    params, report = loop.train(what, workdir, batches)
    return checkpoint.leaf_checksums(params), report["stages"][0]


def stopped_at(number):
    """Batches that end the process when the `number`-th is asked for."""
    asked = []

    class Stopping(toy.Batches):
        def __next__(self):
            asked.append(None)
            if len(asked) == number + 2:  # one was the example
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    return Stopping


def refusals(workdir):
    return [json.loads(line) for line in (workdir / "refused.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_skipped_updates_are_counted_and_listed_and_a_stopped_run_skips_the_same(tmp_path):
    what = experiment(on_bad_step="skip")
    expected, stage = train(tmp_path / "whole", what)
    assert stage["steps"] == 6 and stage["skipped"] == 2 and np.isfinite(stage["loss_last"])  # two epochs of three
    listed = refusals(tmp_path / "whole")
    assert len(listed) == 2 and all("5 (toy/5)" in line["records"] for line in listed)
    lines = toy.lines(tmp_path / "whole")
    assert [line["update"] for line in lines if "loss" not in line] == [line["update"] for line in listed]
    for at in (2, 4):
        workdir = tmp_path / str(at)
        with pytest.raises(SystemExit):
            train(workdir, what, stopped_at(at))
        assert train(workdir, what)[0] == expected
        assert toy.lines(workdir) == lines and refusals(workdir) == listed


@pytest.mark.slow
def test_a_skipped_update_changes_no_parameter(tmp_path):
    # Every batch holds the record: nothing is ever learned.
    class Poisoned(toy.Batches):
        def record(self, row):
            return 5

    what = experiment(3, on_bad_step="skip")
    expected = checkpoint.restore_record
    train(tmp_path, what, Poisoned)
    first, last = (expected(tmp_path / "base" / name)["leaves"] for name in ("0_one", "1_final"))
    assert first == last


@pytest.mark.slow
def test_a_rewound_run_continues_after_the_bad_batch_also_after_a_restart(tmp_path):
    what = experiment(on_bad_step="rewind", save_every=2)
    expected, stage = train(tmp_path / "whole", what)
    assert stage["rewinds"] >= 2 and stage["steps"] == 6 and stage["compilations"] == 1
    lines = toy.lines(tmp_path / "whole")
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5, 6] and all("loss" in line for line in lines)
    # Each is a batch of its own: the stream went on where it was bad.
    assert len({line["loss"] for line in lines}) == 6
    listed = refusals(tmp_path / "whole")
    assert len(listed) == stage["rewinds"] and all("5 (toy/5)" in line["records"] for line in listed)
    workdir = tmp_path / "stopped"
    with pytest.raises(SystemExit):
        train(workdir, what, stopped_at(5))
    assert train(workdir, what)[0] == expected
    assert toy.lines(workdir) == lines and refusals(workdir) == listed


@pytest.mark.slow
def test_too_many_bad_updates_stop_the_run_whatever_the_policy(tmp_path):
    for policy in ("skip", "rewind"):
        with pytest.raises(UserError, match="the loss is nan.*after 1 earlier bad steps"):
            train(tmp_path / policy, experiment(9, on_bad_step=policy, max_bad_steps=1))


@pytest.mark.slow
def test_a_run_that_stopped_at_a_bad_update_continues_with_the_policy_skip(tmp_path):
    with pytest.raises(UserError, match="set run.on_bad_step to skip or rewind"):
        train(tmp_path, experiment())
    assert train(tmp_path, experiment(on_bad_step="skip"))[1]["skipped"] == 2


@pytest.mark.slow
def test_loss_spikes_are_detected_alike_after_a_restart(tmp_path):
    # Half a deviation above the mean is nothing odd: many are refused, which a stop must not change.
    what = experiment(
        26, poison=-1, on_bad_step="skip", loss_spike_sigmas=0.5, max_bad_steps=100, save_every=5, log_every=7
    )
    expected, stage = train(tmp_path / "whole", what)
    assert 0 < stage["skipped"] < 10
    assert all(line["step"] > bad_steps.MIN_LOSSES and line["loss"] > 0 for line in refusals(tmp_path / "whole"))
    with pytest.raises(SystemExit):
        train(tmp_path / "stopped", what, stopped_at(19))
    assert train(tmp_path / "stopped", what)[0] == expected
    assert refusals(tmp_path / "stopped") == refusals(tmp_path / "whole")


def test_loss_spikes_are_judged_by_losses_that_survive_a_restart():
    run, losses = RunConfig(loss_spike_sigmas=2.0), [float(i % 2) for i in range(20)]
    entry = StageStats("one", 0)
    for loss in losses[:18]:
        entry.add_update(loss, 1, 1)
    at = bad_steps.loss_threshold(entry, run, 20)  # the nineteenth is on its way
    assert at == np.float32(0.5 + 2 * 0.5)
    entry.add_update(1000.0, 1, 1)  # it came back, which must make no difference
    assert bad_steps.loss_threshold(entry, run, 20) == at
    assert bad_steps.loss_threshold(entry, run, 21) > at
    assert bad_steps.loss_threshold(entry, RunConfig(), 21) == np.inf
    short = StageStats("one", 0)
    short.add_update(1.0, 1, 1)
    assert bad_steps.loss_threshold(short, run, 3) == np.inf
    entry.add_skipped_update()
    assert entry.recent[-1] is None and bad_steps.loss_threshold(entry, run, 22) == bad_steps.loss_threshold(
        entry, run, 21
    )
