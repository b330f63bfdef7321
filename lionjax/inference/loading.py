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
from lionjax.core.experiment import AnswerConfig, Experiment
from lionjax.core.sharding import MeshConfig
from lionjax.core.types import VLM, Batch, Params, UserError
from lionjax.data import tokenizer
from lionjax.data.config import DataConfig
from lionjax.data.processor import Input, Processor, ProcessorConfig
from lionjax.inference.engine import Answerer
from lionjax.inference.model import Model, tokenizer_folders
from lionjax.models import parts
from lionjax.training import checkpoint
from lionjax.training import step as stages
from lionjax.training.checkpoint import Damaged
from lionjax.training.init import Layout
from lionjax.training.init import layout as init_layout
from lionjax.training.run_folder import base_folder, places, updates_before

log = logging.getLogger(__name__)


WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")


RELEASED = AnswerConfig(beams=5, repetition_penalty=1.5, max_new_tokens=256)  # LION's own settings


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
        return with_prompts(of_run(folder, grid), prompt_length)
    if (folder / "config.json").is_file() and (folder / "lock").exists():
        raise UserError(f"the run of {folder} has saved nothing yet; `lionjax train` goes on with it")
    if not convert.holds_params(folder) and not any(f.suffix in WEIGHTS for f in folder.iterdir()):
        raise UserError(f"{folder} holds no model; give the folder of a run, or one of weights")
    return with_prompts(of_weights(folder, grid), prompt_length)


def with_prompts(model: Model, length: int | None) -> Model:
    """The model with room for so many tokens of a prompt; None: as it was trained."""
    if length is None:
        return model
    data = model.experiment.data
    data = dataclasses.replace(data, processor=dataclasses.replace(data.processor, prompt_length=length))
    answerer = dataclasses.replace(model.answerer, processor=Processor(data.processor))
    experiment = dataclasses.replace(model.experiment, data=data)
    return dataclasses.replace(model, experiment=experiment, answerer=answerer)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run which has saved parameters."""
    return (folder / "config.json").is_file() and bool(checkpoint.found_bases(folder / "base"))


def of_params(experiment: Experiment, params: Params, updates: int | None = None, mesh: Mesh | None = None) -> Model:
    """A model of parameters in memory, answering as after the experiment's last stage."""
    last = experiment.stages[-1:]
    system = stages.system_of(experiment, last[0]) if last else experiment.system
    mesh = mesh or sharding.make_mesh(experiment.mesh)
    return Model(experiment, Answerer(system, params, Processor(experiment.data.processor), mesh), updates)


def of_run(folder: Path, mesh: Mesh) -> Model:
    """The newest parameters of a run that can be trusted."""
    experiment = config.from_json((folder / "config.json").read_text())
    processor = Processor(experiment.data.processor)
    layout = init_layout(experiment, example(processor), mesh)
    for stage, step in places(folder, experiment):
        try:
            params = _read(folder, experiment, layout, stage, step)
        except Damaged as damage:
            log.warning("%s; what was saved before it is used", damage)
            continue
        updates = updates_before(experiment, stage) + step
        if stage < len(experiment.stages):
            part = experiment.stages[stage]
            where = f"stands at stage {part.name!r}, step {step} of {part.steps}"
            log.warning("%s is not finished: it %s, and answers with what it has learned so far", folder, where)
        # What counts as the last stage is the one that made these parameters.
        made = experiment.stages[: stage + (step > 0)] or experiment.stages[:1]
        return of_params(dataclasses.replace(experiment, stages=made), params, updates, mesh)
    raise UserError(f"{folder} holds no parameters that can be trusted; `lionjax train` begins it anew")


def _read(folder: Path, experiment: Experiment, layout: Layout, stage: int, step: int) -> Params:
    """The parameters at one place of a run. Raises Damaged, or UserError where the frozen ones are."""
    scratch = step and experiment.stages[stage].start == "scratch"
    base = base_folder(folder, experiment, 0 if scratch else stage)
    if not base.is_dir():
        raise Damaged(base, "the parameters that its stage began with are not there")
    items, meta = checkpoint.read(base, {"learned": layout.learned})
    learned = items["learned"]
    if step:
        path = folder / "checkpoints" / str(updates_before(experiment, stage) + step)
        trainable, _ = trees.split(layout.learned, experiment.stages[stage].trainable)
        items, meta = checkpoint.read(path, {"trainable": trainable})
        _, idle = trees.split(learned, experiment.stages[stage].trainable)
        learned = trees.merge(items["trainable"], idle)
    frozen = folder / "frozen" / meta["frozen"]
    try:
        never = checkpoint.read(frozen, {"never": layout.never})[0]["never"]
    except Damaged as damage:
        raise UserError(f"the frozen parameters are damaged ({damage}); `lionjax train` makes them anew") from damage
    return trees.merge(never, learned)


def of_weights(folder: Path, mesh: Mesh) -> Model:
    """The model of a folder of weights in our names or the original's; each process reads what its devices hold."""
    ours = convert.holds_params(folder)
    source = None if ours else detect.open_source(folder)
    recorded = convert.open_params(folder)[0] if ours else source.config
    roots = [folder, folder / convert.ORIGIN] + ([source.folder] if source and source.folder else [])
    experiment = recorded if isinstance(recorded, Experiment) else released(recorded, folder)
    model = of_params(with_tokenizers(experiment, roots, recorded is experiment), {}, None, mesh)
    key = jax.random.key(0)
    like = sharding.abstract(experiment.system.init, key, example(model.processor), mesh=mesh)
    if ours:
        _, params = convert.load_params(folder, like)
    else:
        rows, _ = detect.table_and_model(source.kind, recorded)
        params = convert.placed_from(rows, source.tensors, like, source.kind.ignore)
    return dataclasses.replace(model, answerer=dataclasses.replace(model.answerer, params=params))


def released(system: VLM, folder: Path) -> Experiment:
    """What goes with weights that come with a model's sizes alone: its own processor, and LION's settings."""
    if not parts.can_generate(system):
        raise UserError(f"{folder} holds a {type(system).__name__}, a part of a system that cannot answer alone")
    processor = ProcessorConfig(image_size=system.info.image_size, **system.info.default_processor)
    return Experiment(folder.name, system, DataConfig(processor=processor), stages=(), answer=RELEASED)


def with_tokenizers(experiment: Experiment, roots: Sequence[Path], recorded: bool) -> Experiment:
    """The experiment with the tokenizers that lie in a model's folder, else (where `recorded`) those it names."""
    found = {}
    for field, inside in tokenizer_folders(experiment.system).items():
        names = [root / inside for root in roots if any((root / inside / f).is_file() for f in tokenizer.FILES)]
        if not names and not recorded:
            where = f"{roots[0]}/{inside}".rstrip("/")
            raise UserError(f"{where} has no tokenizer; put one of {', '.join(tokenizer.FILES)} there")
        found |= {field: str(names[0])} if names else {}
    processor = dataclasses.replace(experiment.data.processor, **found)
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, processor=processor))


def example(processor: Processor) -> Batch:
    """A batch of one blank picture, from which shapes are known."""
    side = processor.config.image_size
    return processor.batch([Input(np.zeros((side, side, 3), np.uint8), "?")])
