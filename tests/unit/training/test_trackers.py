# SPDX-License-Identifier: Apache-2.0
"""What a run writes for its trackers."""

import dataclasses
import importlib
import json
import sys
import time

import numpy as np
import pytest
import toy
from PIL import Image

from lionjax.core.experiment import RunConfig
from lionjax.core.types import UserError
from lionjax.training import loop, run_log, trackers
from lionjax.training.trackers import Picture, Trackers


@pytest.mark.slow
def test_tensorboard_logs_are_written_without_importing_torch(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torch", "tensorboardX")]:
        monkeypatch.delitem(sys.modules, name)
    writer = trackers._summary_writer_class()(str(tmp_path))
    writer.add_scalar("loss", np.float32(1.5), 3)
    writer.close()
    assert "torch" not in sys.modules
    (events,) = tmp_path.iterdir()
    assert b"loss" in events.read_bytes() and np.float32(1.5).tobytes() in events.read_bytes()


def test_torch_can_be_imported_after_the_tensorboard_writer(monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    trackers._summary_writer_class()
    assert "torch" not in sys.modules  # neither there nor blocked
    monkeypatch.setitem(sys.modules, "torch", sys)
    assert importlib.import_module("torch") is sys
    trackers._summary_writer_class()
    assert sys.modules["torch"] is sys  # left as it is where it was there


PICTURE = Picture("rec_0", Image.new("RGB", (8, 6), "#e69f00"), "where is it? → there (truth: here)")
KEY = "0123456789abcdef0123456789abcdef01234567"


class Recorder:
    """A tracker that keeps what it is told."""

    said: list = []

    def __init__(self, workdir, experiment, run_id):
        self.run_id = run_id or "run7"
        self.said.append(("start", run_id))

    def write_scalars(self, scalars, update):
        self.said.append((update, sorted(scalars)))

    def write_pictures(self, pictures, update):
        self.said.append((update, [picture.name for picture in pictures]))

    def close(self, failed):
        self.said.append(("end", failed))


class Broken(Recorder):
    def write_scalars(self, scalars, update):
        raise ConnectionError("the server\nis away")


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(Recorder, "said", [])
    monkeypatch.setattr(trackers, "TRACKER_CLASSES", {"wandb": Recorder, "mlflow": Broken})
    monkeypatch.setattr(trackers, "PACKAGES", dict.fromkeys(trackers.PACKAGES, "json"))
    return Recorder


def run_config(*names, **more) -> dict:
    return dict(trackers=names, **more)


def test_only_tensorboard_is_written_by_default():
    assert RunConfig().trackers == ("tensorboard",) and RunConfig().evaluate_pictures == 0


def test_an_unknown_tracker_and_a_missing_package_are_named(monkeypatch):
    with pytest.raises(UserError, match="run.trackers has 'comet'; choose from tensorboard, wandb, mlflow"):
        RunConfig(trackers=("comet",))
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    trackers.require_packages(("tensorboard",))
    with pytest.raises(UserError, match=r"needs wandb, which is not installed; run `pip install 'lionjax\[wandb\]'`"):
        trackers.require_packages(("tensorboard", "wandb"))


def test_a_tracker_that_fails_warns_once_and_leaves_the_others(tmp_path, recorder, caplog):
    writer = Trackers(tmp_path, toy.experiment(run=run_config("mlflow", "wandb")), 0)
    for update in (1, 2):
        writer.write_scalars({"one/loss": 1.0}, update)
    writer.close()
    assert [record.getMessage() for record in caplog.records if record.name == trackers.log.name] == [
        "tracker mlflow cannot be written to (the server is away); training goes on without it"
    ]
    assert recorder.said[2:] == [(1, ["one/loss"]), (2, ["one/loss"]), ("end", False)]


def test_a_tracker_that_cannot_start_does_not_stop_the_run(tmp_path, recorder, monkeypatch, caplog):
    monkeypatch.setattr(Recorder, "__init__", lambda *_: 1 / 0)
    assert not Trackers(tmp_path, toy.experiment(run=run_config("wandb")), 0).active
    assert "tracker wandb cannot be started (division by zero)" in caplog.text


def test_only_the_first_process_writes(tmp_path, recorder, monkeypatch):
    monkeypatch.setattr(run_log.jax, "process_index", lambda: 1)
    with run_log.RunLogger(tmp_path, toy.experiment(run=run_config("wandb")), 0) as logger:
        logger.write_metrics({"stage": "one", "step": 1, "update": 1, "loss": 2.0}, 6)
        logger.write_pictures([PICTURE], 1)
    assert not recorder.said and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_pictures_of_answers_reach_the_trackers_and_a_resumed_run_keeps_its_id(tmp_path, recorder):
    what = toy.experiment(toy.stage("one", 5), run=run_config("wandb", evaluate_every=2))
    asked = []

    def evaluator(experiment, params, stage, is_end):
        asked.append((stage, is_end))
        time.sleep(0.05)
        return [(PICTURE.name, PICTURE.image, PICTURE.caption)]

    _, report = loop.train(what, tmp_path, toy.Batches, evaluator=evaluator)
    assert asked == [("one", False), ("one", False), ("one", True)]
    pictures = [one for one in recorder.said if one[1] == ["rec_0"]]
    assert pictures == [(update, ["rec_0"]) for update in (2, 4, 5)]
    assert recorder.said[0] == ("start", None) and recorder.said[-1] == ("end", False)
    evaluate = report["stages"][0]["seconds_by_part"]["evaluate"]
    assert report["seconds"]["evaluate"] == pytest.approx(evaluate, abs=2e-3) and evaluate >= 0.15  # once, not twice
    run_log.add_evaluation_seconds(tmp_path, 2.0)
    again = dataclasses.replace(what, stages=(*what.stages, toy.stage("two", 1)))
    _, report = loop.train(again, tmp_path, toy.Batches)
    assert [one for one in recorder.said if one[0] == "start"] == [("start", None), ("start", "run7")]
    assert report["seconds"]["evaluate"] == pytest.approx(evaluate + 2.0, abs=2e-3)


def test_tensorboard_gets_pictures(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = Trackers(tmp_path, toy.experiment(), 0)
    writer.write_pictures([PICTURE], 3)
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"answers/rec_0" in events.read_bytes() and PICTURE.caption.encode() in events.read_bytes()


def write_two_sessions(workdir, name):
    """What a run and its resumption give to a tracker."""
    for update in (1, 2):
        writer = Trackers(workdir, toy.experiment(run=run_config(name)), update - 1)
        assert list(writer.active) == [name]
        writer.write_scalars({"one/loss": 1.0 / update}, update)
        writer.write_pictures([PICTURE], update)
        writer.close()
    return json.loads((workdir / trackers.IDS_FILE).read_text())[name]


@pytest.mark.slow
def test_wandb_offline_runs_resume_under_one_id_and_keep_no_key(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run_id = write_two_sessions(tmp_path, "wandb")
    logs = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    deadline = time.time() + 30  # its own process writes the files
    while not all(b"one/loss" in path.read_bytes() for path in logs) and time.time() < deadline:
        time.sleep(0.2)
    assert logs and all(b"one/loss" in path.read_bytes() for path in logs)
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/images/answers/rec_0_*.png"))
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]


def test_wandb_is_offline_without_a_key(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not trackers._has_wandb_key()
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert trackers._has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org/")
    assert not trackers._has_wandb_key()


@pytest.mark.slow
def test_mlflow_runs_in_a_folder_resume_under_one_id(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    run_id = write_two_sessions(tmp_path, "mlflow")
    client = mlflow.MlflowClient((tmp_path / "mlflow").as_uri())
    history = client.get_metric_history(run_id, "one/loss")
    assert [(one.step, one.value) for one in history] == [(1, 1.0), (2, 0.5)]
    assert client.get_run(run_id).info.status == "FINISHED"
    names = {file.path for file in client.list_artifacts(run_id, "answers/rec_0")}
    assert names == {f"answers/rec_0/0000000{update}.{kind}" for update in (1, 2) for kind in ("png", "txt")}
