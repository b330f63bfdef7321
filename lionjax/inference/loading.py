# SPDX-License-Identifier: Apache-2.0
"""Load a model from a run's folder, a converted folder or released weights."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from lionjax import convert
from lionjax.convert.formats import detect
from lionjax.core import config, sharding
from lionjax.core import params as trees
from lionjax.core.experiment import Experiment, GenerationDefaults
from lionjax.core.sharding import MeshConfig
from lionjax.core.types import VLM, Batch, Params, UserError
from lionjax.data import tokenizer
from lionjax.data.config import DataConfig
from lionjax.data.processor import ImageTextInput, Processor, ProcessorConfig
from lionjax.inference.engine import InferenceEngine
from lionjax.inference.model import Model, tokenizer_folders
from lionjax.models import parts
from lionjax.training import checkpoint
from lionjax.training import step as stages
from lionjax.training.checkpoint import CorruptCheckpointError
from lionjax.training.init import ParamSpecs
from lionjax.training.init import make_param_specs as init_layout
from lionjax.training.run_folder import base_folder, saved_positions, updates_before

log = logging.getLogger(__name__)


WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


LION_GENERATION = GenerationDefaults(num_beams=5, repetition_penalty=1.5, max_new_tokens=256)  # LION's own settings


def load(folder: str | Path, mesh: MeshConfig | None = None, prompt_length: int | None = None) -> Model:
    """The model of a run's folder, or of a folder of weights, laid out on a mesh of all devices (by default on one).

    `prompt_length`: tokens that a prompt may have, where talks or examples want more than in training.
    Of a run that has not ended, what it has learned so far. A checkpoint that is not what was written is passed over
    with a warning that names it. Raises UserError when there is no model in the folder.
    """
    folder = Path(folder)
    devices = jax.devices() if mesh is not None else jax.local_devices()[:1]
    grid = sharding.make_mesh(mesh or MeshConfig(), devices)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give that of a run, or of converted weights")
    if is_run(folder):
        return with_prompt_length(load_run(folder, grid), prompt_length)
    if (folder / "config.json").is_file() and (folder / "lock").exists():
        raise UserError(f"the run of {folder} has saved nothing yet; `lionjax train` goes on with it")
    if not convert.holds_params(folder) and not any(f.suffix in WEIGHT_SUFFIXES for f in folder.iterdir()):
        raise UserError(f"{folder} holds no model; give the folder of a run, or one of weights")
    return with_prompt_length(load_weights(folder, grid), prompt_length)


def with_prompt_length(model: Model, prompt_length: int | None) -> Model:
    """The model with room for so many tokens of a prompt; None: as it was trained."""
    if prompt_length is None:
        return model
    data = model.experiment.data
    data = dataclasses.replace(data, processor=dataclasses.replace(data.processor, max_prompt_tokens=prompt_length))
    answerer = dataclasses.replace(model.engine, processor=Processor(data.processor))
    experiment = dataclasses.replace(model.experiment, data=data)
    return dataclasses.replace(model, experiment=experiment, engine=answerer)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run which has saved parameters."""
    return (folder / "config.json").is_file() and bool(checkpoint.all_bases(folder / "base"))


def from_params(experiment: Experiment, params: Params, updates: int | None = None, mesh: Mesh | None = None) -> Model:
    """A model of parameters in memory, answering as after the experiment's last stage."""
    last = experiment.stages[-1:]
    system = stages.model_for_stage(experiment, last[0]) if last else experiment.model
    mesh = mesh or sharding.make_mesh(experiment.mesh)
    return Model(experiment, InferenceEngine(system, params, Processor(experiment.data.processor), mesh), updates)


def load_run(folder: Path, mesh: Mesh) -> Model:
    """The newest parameters of a run that can be trusted."""
    experiment = config.from_json((folder / "config.json").read_text())
    processor = Processor(experiment.data.processor)
    layout = init_layout(experiment, dummy_batch(processor), mesh)
    for stage, step in saved_positions(folder, experiment):
        try:
            params = _load_params(folder, experiment, layout, stage, step)
        except CorruptCheckpointError as damage:
            log.warning("%s; what was saved before it is used", damage)
            continue
        updates = updates_before(experiment, stage) + step
        if stage < len(experiment.stages):
            part = experiment.stages[stage]
            where = f"stands at stage {part.name!r}, step {step} of {part.steps}"
            log.warning("%s is not finished: it %s, and answers with what it has learned so far", folder, where)
        # What counts as the last stage is the one that made these parameters.
        made = experiment.stages[: stage + (step > 0)] or experiment.stages[:1]
        return from_params(dataclasses.replace(experiment, stages=made), params, updates, mesh)
    raise UserError(f"{folder} holds no parameters that can be trusted; `lionjax train` begins it anew")


def _load_params(folder: Path, experiment: Experiment, layout: ParamSpecs, stage: int, step: int) -> Params:
    """The parameters at one place of a run. Raises Damaged, or UserError where the frozen ones are."""
    scratch = step and experiment.stages[stage].init_from == "scratch"
    base = base_folder(folder, experiment, 0 if scratch else stage)
    if not base.is_dir():
        raise CorruptCheckpointError(base, "the parameters that its stage began with are not there")
    items, meta = checkpoint.restore_tree(base, {"learned": layout.trainable})
    learned = items["learned"]
    if step:
        path = folder / "checkpoints" / str(updates_before(experiment, stage) + step)
        trainable, _ = trees.split(layout.trainable, experiment.stages[stage].trainable)
        items, meta = checkpoint.restore_tree(path, {"trainable": trainable})
        _, idle = trees.split(learned, experiment.stages[stage].trainable)
        learned = trees.merge(items["trainable"], idle)
    frozen = folder / "frozen" / meta["frozen"]
    try:
        never = checkpoint.restore_tree(frozen, {"never": layout.frozen})[0]["never"]
    except CorruptCheckpointError as damage:
        raise UserError(f"the frozen parameters are damaged ({damage}); `lionjax train` makes them anew") from damage
    return trees.merge(never, learned)


def load_weights(folder: Path, mesh: Mesh) -> Model:
    """The model of a folder of weights in our names or the original's; each process reads what its devices hold."""
    ours = convert.holds_params(folder)
    source = None if ours else detect.open_checkpoint(folder)
    recorded = convert.open_params(folder)[0] if ours else source.config
    roots = [folder, folder / convert.ORIGIN] + ([source.folder] if source and source.folder else [])
    experiment = recorded if isinstance(recorded, Experiment) else released_experiment(recorded, folder)
    model = from_params(with_tokenizers(experiment, roots, recorded is experiment), {}, None, mesh)
    key = jax.random.key(0)
    like = sharding.abstract_params(experiment.model.init, key, dummy_batch(model.processor), mesh=mesh)
    if ours:
        _, params = convert.load_params(folder, like)
    else:
        rows, _ = detect.weight_map_and_abstract_params(source.checkpoint_format, recorded)
        params = convert.sharded_params_from_state_dict(
            rows, source.tensors, like, source.checkpoint_format.ignore_patterns
        )
    return dataclasses.replace(model, engine=dataclasses.replace(model.engine, params=params))


def released_experiment(model: VLM, folder: Path) -> Experiment:
    """What goes with weights that come with a model's sizes alone: its own processor, and LION's settings."""
    if not parts.can_generate(model):
        raise UserError(f"{folder} holds a {type(model).__name__}, a part of a system that cannot answer alone")
    processor = ProcessorConfig(image_size=model.info.image_size, **model.info.default_processor)
    return Experiment(folder.name, model, DataConfig(processor=processor), stages=(), generation=LION_GENERATION)


def with_tokenizers(experiment: Experiment, folders: Sequence[Path], allow_recorded: bool) -> Experiment:
    """The experiment with the tokenizers that lie in a model's folder, else (where `recorded`) those it names."""
    found = {}
    for field, inside in tokenizer_folders(experiment.model).items():
        names = [root / inside for root in folders if any((root / inside / f).is_file() for f in tokenizer.FILE_NAMES)]
        if not names and not allow_recorded:
            where = f"{folders[0]}/{inside}".rstrip("/")
            raise UserError(f"{where} has no tokenizer; put one of {', '.join(tokenizer.FILE_NAMES)} there")
        found |= {field: str(names[0])} if names else {}
    processor = dataclasses.replace(experiment.data.processor, **found)
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, processor=processor))


def dummy_batch(processor: Processor) -> Batch:
    """A batch of one blank picture, from which shapes are known."""
    side = processor.config.image_size
    return processor.batch([ImageTextInput(np.zeros((side, side, 3), np.uint8), "?")])
