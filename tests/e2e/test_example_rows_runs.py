# SPDX-License-Identifier: Apache-2.0
"""Runs with several examples in a row: the losses of one example in a row, stopped and resumed, and less padding."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import small_lion
from leafwise import runs_have_one_device  # noqa: F401

from lionjax.core.experiment import Experiment
from lionjax.core.types import UserError
from lionjax.data import pipeline
from lionjax.data.scenes.dataset import Scenes
from lionjax.training import loop

pytestmark = pytest.mark.slow


@pytest.fixture
def experiment(monkeypatch) -> Experiment:
    """Four updates of a small LLaVA at one learning rate, whatever the number of steps."""
    monkeypatch.setenv("SMALL_SCENES", "")
    import processes_pipeline

    plain = processes_pipeline.get_config()
    (stage,) = plain.stages
    stage = dataclasses.replace(stage, end_learning_rate=stage.learning_rate, mixture=(("vqa", 1.0), ("caption", 1.0)))
    data = dataclasses.replace(plain.data, sources=(Scenes((12, 4, 12), image_size=56),))
    run = dataclasses.replace(plain.run, save_every=1)
    return dataclasses.replace(plain, data=data, stages=(stage,), run=run)


def packed(experiment: Experiment, **changes) -> Experiment:
    (stage,) = experiment.stages
    data = dataclasses.replace(experiment.data, length_buckets=(64, 72, 80, 88))
    return dataclasses.replace(
        experiment, data=data, stages=(dataclasses.replace(stage, examples_per_row=2, **changes),)
    )


def train(experiment: Experiment, folder):
    params, report = loop.train(experiment, folder, pipeline.batches)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [line["loss"] for line in lines], [line["padding"] for line in lines], params, report


def test_packed_runs_learn_as_unpacked_ones_and_resume_bitwise(experiment, tmp_path):
    losses, padding, params, report = train(experiment, tmp_path / "plain")
    found = train(packed(experiment), tmp_path / "packed")
    np.testing.assert_allclose(found[0], losses, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(found[2])):
        np.testing.assert_allclose(other, one, atol=1e-4)
    assert max(found[1]) < min(padding)
    assert found[3]["stages"][0]["padding"] < report["stages"][0]["padding"]
    train(packed(experiment, steps=2), tmp_path / "parts")
    resumed = train(packed(experiment), tmp_path / "parts")
    assert resumed[0] == found[0]
    for one, other in zip(jax.tree.leaves(found[2]), jax.tree.leaves(resumed[2])):
        np.testing.assert_array_equal(one, other)


def test_a_pack_longer_than_the_longest_bucket_stops_the_run(experiment, tmp_path):
    short = packed(experiment)
    short = dataclasses.replace(short, data=dataclasses.replace(short.data, length_buckets=(16,)))
    with pytest.raises(UserError, match=r"a row of this batch takes \d+ tokens, but the longest of data.length_bucke"):
        train(short, tmp_path)


def test_a_stage_of_a_model_without_rows_of_several_examples_is_refused(tmp_path):
    plain = small_lion.experiment()
    stages = tuple(dataclasses.replace(stage, examples_per_row=2) for stage in plain.stages)
    with pytest.raises(UserError, match=r"examples_per_row is 2, but this model learns from one example in a row"):
        train(dataclasses.replace(plain, stages=stages), tmp_path)
