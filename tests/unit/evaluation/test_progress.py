# SPDX-License-Identifier: Apache-2.0
"""Evaluation during training: which answers are drawn, and what each stage's benchmarks leave in the report."""

import dataclasses
import json

import numpy as np
import pytest

from lionjax.core.types import UserError
from lionjax.evaluation import progress, runner
from lionjax.evaluation.report import plots
from lionjax.inference import loading


def with_run(experiment, **fields):
    return dataclasses.replace(experiment, run=dataclasses.replace(experiment.run, **fields))


def test_nothing_is_evaluated_during_training_by_default(finished_model, tmp_path):
    experiment = finished_model.experiment
    assert progress.make_evaluator(experiment, tmp_path) is None
    assert progress.make_evaluator(with_run(experiment, evaluate_stages=True, evaluate_limit=0), tmp_path) is None


@pytest.mark.slow
def test_boxes_are_drawn_first_and_as_many_answers_as_asked_for(finished_model):
    drawn = progress.draw_answers(finished_model.engine, finished_model.experiment, 3)
    names = [name for name, _, _ in drawn]
    trained = runner.trained_benchmarks(finished_model.experiment)
    assert len(names) == len(set(names)) == 3
    assert names[0].rpartition("_")[0] in progress.LOCALIZING_TASKS and names[0].rpartition("_")[0] in trained
    pixels = np.asarray(drawn[0][1]).reshape(-1, 3).astype(int)
    assert np.abs(pixels - plots.hex_to_rgb(plots.TRUTH_COLOR)).sum(-1).min() < 30
    assert all(" → " in caption and "(truth: " in caption for _, _, caption in drawn)


def test_benchmarks_run_after_every_stage_but_the_last(finished_model, tmp_path, monkeypatch):
    first = dataclasses.replace(finished_model.experiment.stages[0], name="first")
    experiment = dataclasses.replace(finished_model.experiment, stages=(first, *finished_model.experiment.stages))
    experiment = with_run(experiment, evaluate_stages=True, evaluate_limit=2)
    monkeypatch.setattr(loading, "for_answering", lambda *_: finished_model)
    asked = []

    def evaluate(engine, data, generation, name, folder, limit, with_blind):
        asked.append((name, folder, limit, with_blind))
        if name != "vqa":
            raise UserError("none here")
        return {"metrics": {"vqa_accuracy": 0.5}}

    monkeypatch.setattr(runner, "evaluate", evaluate)
    (tmp_path / "report.json").write_text('{"metrics": {"kept": 1.0}}')
    evaluator = progress.make_evaluator(experiment, tmp_path)
    assert evaluator(experiment, {}, "first", False) == [] and not asked
    assert evaluator(experiment, {}, experiment.stages[-1].name, True) == [] and not asked
    assert evaluator(experiment, {}, "first", True) == []
    assert ("vqa", None, 2, False) in asked and len(asked) == len(runner.trained_benchmarks(experiment))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == {"metrics": {"kept": 1.0}, "stage_metrics": {"first": {"vqa_accuracy": 0.5}}}


def test_data_without_held_out_questions_do_not_stop_training(finished_model, tmp_path, monkeypatch, caplog):
    experiment = with_run(finished_model.experiment, evaluate_pictures=2)
    monkeypatch.setattr(loading, "for_answering", lambda *_: finished_model)

    def draw(*_):
        raise UserError("no split 'heldout'")

    monkeypatch.setattr(progress, "draw_answers", draw)
    assert progress.make_evaluator(experiment, tmp_path)(experiment, {}, "one", False) == []
    assert "no answers are drawn: no split 'heldout'" in caplog.text
