# SPDX-License-Identifier: Apache-2.0
"""Trackers of experiments behind one writer: TensorBoard, Weights & Biases, MLflow.

`run.trackers` names them. Their runs go on when training resumes: `trackers.json` in the run folder keeps their ids. A
tracker that fails is left out for the rest of the process, with one warning. Only process 0 writes. Servers and keys
come from the trackers' own environment variables and settings; nothing here writes them to a file.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import netrc
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from lionjax.core.config import to_json
from lionjax.core.errors import missing_module
from lionjax.core.experiment import Experiment
from lionjax.core.files import read_record, write_json

log = logging.getLogger(__name__)

IDS_FILE = "trackers.json"
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A drawn answer: `name` such as "rec_0", the same at each evaluation; `caption`: question, answer and truth."""

    name: str
    image: Image.Image
    caption: str = ""


class Tracker(Protocol):
    """What the training loop needs of a tracker. `update` counts from the first stage on."""

    def write_scalars(self, scalars: Mapping[str, float], update: int) -> None: ...

    def write_pictures(self, pictures: Sequence[Picture], update: int) -> None: ...

    def close(self, failed: bool) -> None: ...


def require_packages(names: Sequence[str]) -> None:
    """Raise UserError with the install command of a tracker whose package is missing; TensorBoard is optional."""
    for name in names:
        if name != "tensorboard" and importlib.util.find_spec(PACKAGES[name]) is None:
            error = ModuleNotFoundError(f"no module {PACKAGES[name]}", name=PACKAGES[name])
            raise missing_module(error, f"run.trackers with {name!r}")


class Trackers:
    """All trackers of a run; use it on process 0 only. `update`: the update that the run resumes from."""

    def __init__(self, workdir: Path, experiment: Experiment, update: int):
        self.active: dict[str, Tracker] = {}
        for name in experiment.run.trackers:
            if importlib.util.find_spec(PACKAGES[name]) is not None:
                self._guard(name, "started", lambda name=name: self._open(name, workdir, experiment, update))

    def _open(self, name: str, workdir: Path, experiment: Experiment, update: int) -> None:
        if name == "tensorboard":
            self.active[name] = TensorBoardTracker(workdir, update)
            return
        ids = read_record(workdir / IDS_FILE)
        tracker = TRACKER_CLASSES[name](workdir, experiment, ids.get(name))
        self.active[name] = tracker
        write_json(workdir / IDS_FILE, ids | {name: tracker.run_id})

    def _guard(self, name: str, verb: str, call: Callable[[], None]) -> None:
        """Make a call; a tracker that fails is left out from then on, with one warning, and training goes on."""
        try:
            call()
        except Exception as error:
            self.active.pop(name, None)
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            log.warning("tracker %s cannot be %s (%s); training goes on without it", name, verb, reason)

    def write_scalars(self, scalars: Mapping[str, float], update: int) -> None:
        for name, tracker in list(self.active.items()):
            self._guard(name, "written to", lambda tracker=tracker: tracker.write_scalars(scalars, update))

    def write_pictures(self, pictures: Sequence[Picture], update: int) -> None:
        for name, tracker in list(self.active.items()):
            self._guard(name, "written to", lambda tracker=tracker: tracker.write_pictures(pictures, update))

    def close(self, failed: bool = False) -> None:
        """End the trackers' runs; `failed`: training ended with an error."""
        for name, tracker in list(self.active.items()):
            self._guard(name, "closed", lambda tracker=tracker: tracker.close(failed))
        self.active.clear()


class TensorBoardTracker:
    """Event files in `tensorboard/` of the run folder; events of updates that a resumed run repeats are purged."""

    def __init__(self, workdir: Path, update: int):
        self.writer = _summary_writer_class()(str(workdir / "tensorboard"), purge_step=update + 1)

    def write_scalars(self, scalars: Mapping[str, float], update: int) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, update)

    def write_pictures(self, pictures: Sequence[Picture], update: int) -> None:
        for picture in pictures:
            pixels_HWC = np.asarray(picture.image.convert("RGB"))
            self.writer.add_image(f"answers/{picture.name}", pixels_HWC, update, dataformats="HWC")
            if picture.caption:
                self.writer.add_text(f"answers/{picture.name}", picture.caption, update)

    def close(self, failed: bool) -> None:
        self.writer.close()


class WandbTracker:
    """A Weights & Biases run, with its files in `wandb/` of the run folder.

    The project is $WANDB_PROJECT, by default "lionjax". Without $WANDB_MODE and without a key the run is offline, so
    that nothing asks for a key: `wandb sync` sends it later. Updates are a field of their own, `update`: the steps of
    W&B may not decrease, but a resumed run repeats updates.
    """

    def __init__(self, workdir: Path, experiment: Experiment, run_id: str | None):
        import wandb

        self.wandb, self.run_id = wandb, run_id or uuid.uuid4().hex[:12]
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "lionjax"),
            name=experiment.name,
            id=self.run_id,
            resume="allow",
            dir=str(workdir),
            mode=os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline"),
            config=json.loads(to_json(experiment)),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
        self.run.define_metric("*", step_metric="update")

    def write_scalars(self, scalars: Mapping[str, float], update: int) -> None:
        self.run.log({**scalars, "update": update})

    def write_pictures(self, pictures: Sequence[Picture], update: int) -> None:
        images = {f"answers/{one.name}": self.wandb.Image(one.image, caption=one.caption) for one in pictures}
        self.run.log({**images, "update": update})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class MlflowTracker:
    """An MLflow run on $MLFLOW_TRACKING_URI, by default in the file store `mlflow/` of the run folder.

    The experiment is $MLFLOW_EXPERIMENT_NAME, by default "lionjax". A server that does not answer fails after seconds
    instead of minutes, unless MLflow's variables say otherwise.
    """

    def __init__(self, workdir: Path, experiment: Experiment, run_id: str | None):
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if not address:
            address = (workdir / "mlflow").resolve().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3.7 and later want to be asked for it
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self.client, self.metric_class = MlflowClient(address), Metric
        if run_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "lionjax")
            found = self.client.get_experiment_by_name(name)
            group = found.experiment_id if found else self.client.create_experiment(name)
            run_id = self.client.create_run(group, run_name=experiment.name).info.run_id
        else:
            self.client.update_run(run_id, status="RUNNING")
        self.run_id = run_id
        self.client.log_dict(run_id, json.loads(to_json(experiment)), "config.json")

    def write_scalars(self, scalars: Mapping[str, float], update: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self.metric_class(name, float(value), now, update) for name, value in scalars.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def write_pictures(self, pictures: Sequence[Picture], update: int) -> None:
        for picture in pictures:
            stem = f"answers/{picture.name}/{update:08d}"
            self.client.log_image(self.run_id, picture.image, artifact_file=f"{stem}.png")
            self.client.log_text(self.run_id, picture.caption, f"{stem}.txt")

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


TRACKER_CLASSES: dict[str, Any] = {"wandb": WandbTracker, "mlflow": MlflowTracker}


def _has_wandb_key() -> bool:
    """Whether Weights & Biases finds a key without asking: in $WANDB_API_KEY or the user's netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].partition("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _summary_writer_class():
    """tensorboardX's SummaryWriter, imported without torch: it would import an installed torch, which takes seconds, to
    recognize tensors, and the logs hold numbers only."""
    missing = "torch" not in sys.modules
    if missing:
        sys.modules["torch"] = None  # makes `import torch` raise ImportError, which tensorboardX expects
    try:
        from tensorboardX import SummaryWriter
    finally:
        if missing:
            del sys.modules["torch"]
    return SummaryWriter
