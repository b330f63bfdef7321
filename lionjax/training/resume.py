# SPDX-License-Identifier: Apache-2.0
"""Restore a run from its folder, or initialize it: positions, base parameters and frozen parameters."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from lionjax.core import params as trees
from lionjax.core.experiment import Experiment
from lionjax.core.types import Batch, Params, UserError
from lionjax.training import bucket_folder, checkpoint, run_folder
from lionjax.training.bucket_folder import arrays_folder
from lionjax.training.checkpoint import CorruptCheckpointError
from lionjax.training.init import ParamSpecs, init_params
from lionjax.training.optimizer import abstract_opt_state, make_optimizer

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Position:
    """The state of a run after `step` updates of stage `stage`.

    `frozen_params`: the parameters that no stage trains, saved in the directory frozen/`frozen_id`; `trainable_params`:
    all others. `opt_state` and `data_position` are None at the start of a stage. `history`: the fields of the
    `run_log.StageStats` of each stage that has started.
    """

    stage: int
    step: int
    frozen_params: Params
    trainable_params: Params
    frozen_id: str
    opt_state: Any = None
    data_position: Any = None
    history: tuple[dict, ...] = ()


def restore_or_init(workdir: Path, experiment: Experiment, example: Batch, specs: ParamSpecs) -> Position:
    """The newest position that can be restored, or the initial one. Moves corrupt directories away, with a warning."""
    while newest := run_folder.latest_position(workdir, experiment):
        try:
            return _restore(workdir, experiment, example, specs, *newest)
        except CorruptCheckpointError as error:
            checkpoint.quarantine(workdir, error.path, str(error))
            newest = run_folder.latest_position(workdir, experiment)
            log.warning(
                "going back to %s",
                run_folder.describe_position(experiment, *newest) if newest else "the initial parameters",
            )
    return _init_run(workdir, experiment, example, specs)


def _restore(workdir, experiment, example, specs, stage: int, step: int) -> Position:
    opt_state = None
    if step:
        trainable, _ = trees.split(specs.trainable, experiment.stages[stage].trainable)
        optimizer = make_optimizer(experiment.stages[stage], trainable, specs.layer_axes)
        opt_state = abstract_opt_state(optimizer, trainable, specs.mesh)
    learned, opt_state, meta = run_folder.read_position(workdir, experiment, specs, stage, step, opt_state)
    data_position = meta["data"] if step else None
    frozen, frozen_id = _load_frozen(workdir, experiment, example, specs, meta["frozen"]), meta["frozen"]
    if not _holds_leaves(arrays_folder(workdir) / "frozen" / frozen_id, frozen):  # stages have been added or changed
        frozen_id = _save_frozen(workdir, frozen)
    history = tuple(meta["history"])
    restored = run_folder.describe_position(experiment, stage, step)
    log.info("restored %s: %s", bucket_folder.display_name(workdir), restored)
    return Position(stage, step, frozen, learned, frozen_id, opt_state, data_position, history)


def _holds_leaves(path: Path, frozen_params: Params) -> bool:
    """Whether a directory of `frozen/` holds just these parameters."""
    return checkpoint.restore_record(path)["leaves"].keys() == {
        f"never/{leaf}" for leaf in trees.flatten(frozen_params)
    }


def _load_frozen(workdir, experiment, example, specs, name: str) -> Params:
    """The parameters that no stage trains; corrupt or missing ones are initialized again from the config.

    Raises UserError if the config no longer gives the same parameters.
    """
    try:
        return run_folder.read_frozen(workdir, specs, name)
    except CorruptCheckpointError as error:
        if error.path.is_dir():
            checkpoint.quarantine(workdir, error.path, str(error))
        frozen, _ = init_params(experiment, example, specs)
        if _save_frozen(workdir, frozen) != name:
            raise UserError(
                f"the frozen parameters of this run are corrupt ({error}) and its config no longer gives the same "
                "ones; restore the weight files that the run started with, or use another --workdir"
            ) from error
        log.warning("the frozen parameters were initialized again from the config and are the same")
        return frozen


def _save_frozen(workdir: Path, frozen_params: Params) -> str:
    name = checkpoint.sha256_of_json(checkpoint.manifest({"never": frozen_params}))[:16]
    path = arrays_folder(workdir) / "frozen" / name
    if not path.is_dir():
        checkpoint.save_tree(path, {"never": frozen_params}, {})
    return name


def _init_run(workdir, experiment, example, specs) -> Position:
    frozen, trainable = init_params(experiment, example, specs)
    checkpoint.require_finite(frozen, "the frozen parameters")
    position = Position(0, 0, frozen, trainable, _save_frozen(workdir, frozen))
    save_base(workdir, experiment, position)
    return position


def save_base(workdir: Path, experiment: Experiment, position: Position) -> None:
    """Save the trainable parameters at the start of a stage, or the result after the last stage."""
    checkpoint.require_finite(position.trainable_params, run_folder.describe_position(experiment, position.stage, 0))
    meta = {"frozen": position.frozen_id, "history": list(position.history)}
    bucket_folder.publish(workdir)  # metrics of the updates before
    checkpoint.save_tree(
        run_folder.base_folder(workdir, experiment, position.stage), {"learned": position.trainable_params}, meta
    )


def load_first_base(workdir: Path, experiment: Experiment, specs: ParamSpecs) -> Params:
    """The trainable parameters at the start of the first stage."""
    return run_folder.read_base(workdir, run_folder.base_folder(workdir, experiment, 0), specs)[0]
