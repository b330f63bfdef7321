# SPDX-License-Identifier: Apache-2.0
"""Load a model from a run folder, a converted folder, or released weights."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from lionjax import convert
from lionjax.convert.companions import find_companion_files, find_origin_files, tokenizer_folders
from lionjax.convert.formats import detect, token_ids
from lionjax.convert.formats.checkpoint_format import read_hf_config
from lionjax.convert.formats.image_settings import read_image_settings
from lionjax.convert.io.reader import check_folder_formats
from lionjax.core import params as trees
from lionjax.core import sharding
from lionjax.core.experiment import Experiment
from lionjax.core.prompt_formats import SYSTEM_FORMATS
from lionjax.core.sharding import MeshConfig
from lionjax.core.types import CATEGORIES, Batch, Params, UserError
from lionjax.data import tokenizer
from lionjax.data.image_fit import ImageFit
from lionjax.data.processor import ImageTextInput, Processor
from lionjax.data.tokenizer_files import LAVIS_DECODE_TOKEN
from lionjax.inference import answer_mesh
from lionjax.inference.engine import InferenceEngine
from lionjax.inference.int8 import quantize_language
from lionjax.inference.model import Model
from lionjax.inference.released import released_experiment, with_end_of_answer
from lionjax.training import checkpoint
from lionjax.training.checkpoint import CorruptCheckpointError
from lionjax.training.init import ParamSpecs, load_shipped, make_param_specs, resolve_weights_file
from lionjax.training.run_folder import read_frozen, read_position, saved_config, saved_positions, updates_before
from lionjax.training.step import model_for_stage

log = logging.getLogger(__name__)

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# The generation settings of the LION paper (arXiv 2311.11860).
LION_GENERATION = SYSTEM_FORMATS["lion"].generation


def load(
    folder: str | Path, mesh: MeshConfig | None = None, prompt_length: int | None = None, int8: bool = False
) -> Model:
    """The model of a run folder or a folder of weights, sharded over a mesh of all devices.

    Without a mesh, a CPU's model is on one device; on accelerators, parameters are cast to bfloat16 and placed by
    `answer_mesh.answering_mesh`.

    `prompt_length` is the maximum prompt length in tokens (default: as in training); raise it for chat history and
    few-shot examples. `int8`: round the language model's matrices to int8, for answering only. For an unfinished run,
    the newest checkpoint is loaded; corrupt checkpoints are skipped with a warning. `shipped:NAME` is a folder of the
    package. Raises UserError if the folder holds no model.
    """
    folder = resolve_weights_file(str(folder))
    device_mesh = None if mesh is None else sharding.make_mesh(mesh)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a run folder, a folder of weights, or shipped:tiny_lyrics")
    if is_run(folder):
        return _for_use(load_run(folder, device_mesh), prompt_length, int8)
    if (folder / "config.json").is_file() and (folder / "lock").exists():
        raise UserError(f"the run in {folder} has no checkpoint yet; resume it with `lionjax train`")
    if not convert.holds_params(folder) and not any(f.suffix in WEIGHT_SUFFIXES for f in folder.iterdir()):
        check_folder_formats(folder)
        raise UserError(f"{folder} holds no model; give a run folder or a folder of weights")
    return _for_use(load_weights(folder, device_mesh), prompt_length, int8)


def _for_use(model: Model, prompt_length: int | None, int8: bool) -> Model:
    """The model with another prompt length, and with int8 weights."""
    model = with_prompt_length(model, prompt_length)
    if not int8:
        return model
    params = quantize_language(model.vlm, model.params, dummy_batch(model.processor))
    return dataclasses.replace(model, engine=dataclasses.replace(model.engine, params=params))


def with_prompt_length(model: Model, prompt_length: int | None) -> Model:
    """The model with a maximum prompt length of `prompt_length` tokens; None leaves it as trained."""
    if prompt_length is None:
        return model
    data = model.experiment.data
    data = dataclasses.replace(data, processor=dataclasses.replace(data.processor, max_prompt_tokens=prompt_length))
    engine = dataclasses.replace(model.engine, processor=Processor(data.processor))
    experiment = dataclasses.replace(model.experiment, data=data)
    return dataclasses.replace(model, experiment=experiment, engine=engine)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run folder with saved parameters."""
    return (folder / "config.json").is_file() and bool(checkpoint.all_bases(folder / "base"))


def from_params(experiment: Experiment, params: Params, updates: int | None = None, mesh: Mesh | None = None) -> Model:
    """A Model from parameters in memory, configured as in the experiment's last stage."""
    last_stage = experiment.stages[-1:]
    model = model_for_stage(experiment, last_stage[0]) if last_stage else experiment.model
    mesh = mesh or sharding.make_mesh(experiment.mesh)
    return Model(experiment, InferenceEngine(model, params, Processor(experiment.data.processor), mesh), updates)


def for_answering(experiment: Experiment, params: Params) -> Model:
    """As `from_params`, for the parameters of a run: on accelerators cast and moved to a mesh for answering."""
    if not answer_mesh.is_accelerated():
        return from_params(experiment, params)
    mesh, like = _answering_specs(experiment, Processor(experiment.data.processor), None)
    return from_params(experiment, answer_mesh.move_params(params, like), None, mesh)


def _run_config(folder: Path) -> Experiment:
    """The config of a run. Raises UserError if config.json is damaged and report.json holds no copy."""
    if (experiment := saved_config(folder)) is None:
        raise UserError(f"{folder / 'config.json'} is damaged; start `lionjax train` with the run's config to mend it")
    return experiment


def _answering_specs(experiment: Experiment, processor: Processor, mesh: Mesh | None) -> tuple[Mesh, Params]:
    """(mesh, ShapeDtypeStructs of the parameters on it); without a mesh that of `answer_mesh`, and its dtypes."""
    init, key, batch = sharding.traced_init(experiment.model), jax.random.key(0), dummy_batch(processor)
    if mesh is not None:
        return mesh, sharding.abstract_params(init, key, batch, mesh=mesh)
    shapes = sharding.abstract_params(init, key, batch)
    sizes = [leaf.size * answer_mesh.answer_dtype(leaf).itemsize for leaf in jax.tree.leaves(shapes)]
    mesh = answer_mesh.answering_mesh(sum(sizes))
    like = sharding.abstract_params(init, key, batch, mesh=mesh)
    return mesh, jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, answer_mesh.answer_dtype(leaf), sharding=leaf.sharding), like
    )


def load_run(folder: Path, mesh: Mesh | None = None) -> Model:
    """The model with the newest parameters of a run whose checksums are correct."""
    experiment = _with_existing_tokenizers(_run_config(folder), folder)
    processor = Processor(experiment.data.processor)
    is_moved, (mesh, like) = mesh is None, _answering_specs(experiment, processor, mesh)
    specs = make_param_specs(experiment, dummy_batch(processor), mesh)
    for stage, step in saved_positions(folder, experiment):
        try:
            params = _load_params(folder, experiment, specs, stage, step)
        except CorruptCheckpointError as damage:
            log.warning("%s; the previous checkpoint is used", damage)
            continue
        params = answer_mesh.move_params(params, like) if is_moved and answer_mesh.is_accelerated() else params
        updates = updates_before(experiment, stage) + step
        if stage < len(experiment.stages):
            part = experiment.stages[stage]
            position = f"stage {part.name!r}, step {step} of {part.steps}"
            log.warning("%s is not finished: the parameters are those of %s", folder, position)
        # The last stage is the one that trained these parameters.
        stages_so_far = experiment.stages[: stage + (step > 0)] or experiment.stages[:1]
        model = from_params(dataclasses.replace(experiment, stages=stages_so_far), params, updates, mesh)
        return dataclasses.replace(model, origin_files=find_origin_files(folder) or None)
    raise UserError(f"{folder} holds no undamaged parameters; `lionjax train` restarts the run")


def _with_existing_tokenizers(experiment: Experiment, folder: Path) -> Experiment:
    """The experiment with the run's own copies of those tokenizers that are no longer where the config names them."""
    processor, copies = experiment.data.processor, {}
    for field, subfolder in tokenizer_folders(experiment.model).items():
        try:
            tokenizer.tokenizer_file(getattr(processor, field))
        except UserError:
            copies |= {field: str(folder / convert.ORIGIN / subfolder)}
    data = dataclasses.replace(experiment.data, processor=dataclasses.replace(processor, **copies))
    return dataclasses.replace(experiment, data=data) if copies else experiment


def _load_params(folder: Path, experiment: Experiment, specs: ParamSpecs, stage: int, step: int) -> Params:
    """The parameters at one position of a run.

    Raises CorruptCheckpointError if the checkpoint is damaged, UserError if the frozen parameters are.
    """
    learned, _, meta = read_position(folder, experiment, specs, stage, step)
    try:
        frozen_params = read_frozen(folder, specs, meta["frozen"])
    except CorruptCheckpointError as damage:
        raise UserError(f"the frozen parameters are damaged ({damage}); `lionjax train` rebuilds them") from damage
    return trees.merge(frozen_params, learned)


def read_experiment(folder: str | Path) -> Experiment:
    """The experiment of a folder of weights, without reading the weights: what a config for fine-tuning starts from.

    It has the model and the prompt format, image settings, tokenizers and generation settings of the folder's files; no
    stages, unless the folder is that of a trained model.
    """
    return _open_weights(Path(folder)).experiment


@dataclasses.dataclass(frozen=True)
class _WeightsFolder:
    """A folder of weights before these are read. `recorded`: its config; `source`: an opened checkpoint in torch names.

    `folders`: where its tokenizers are looked for.
    """

    experiment: Experiment
    recorded: object
    source: detect.CheckpointSource | None
    folders: tuple[Path, ...]

    @property
    def is_released(self) -> bool:
        return not isinstance(self.recorded, Experiment)


def _open_weights(folder: Path) -> _WeightsFolder:
    is_lionjax = convert.holds_params(folder)
    source = None if is_lionjax else detect.open_checkpoint(folder)
    recorded = convert.open_params(folder)[0] if is_lionjax else source.config
    folders = (folder, folder / convert.ORIGIN, *([source.folder] if source and source.folder else []))
    settings_folder = folder / convert.ORIGIN if is_lionjax else source.folder or folder
    is_recorded = isinstance(recorded, Experiment)
    experiment = recorded if is_recorded else released_experiment(recorded, folder, settings_folder)
    experiment = with_tokenizers(experiment, folders, is_recorded)
    if not is_recorded:
        experiment = with_end_of_answer(with_image_settings(experiment, settings_folder), settings_folder)
    return _WeightsFolder(experiment, recorded, source, folders)


def load_weights(folder: Path, mesh: Mesh | None = None) -> Model:
    """The model of a folder of weights, in lionjax names or torch names; each process reads its devices' shards."""
    weights = _open_weights(folder)
    experiment, source = weights.experiment, weights.source
    mesh, abstract_params = _answering_specs(experiment, Processor(experiment.data.processor), mesh)
    model = from_params(experiment, {}, None, mesh)
    check_word_tables(model, weights.folders, weights.is_released)
    if source is None:
        params = _load_params_folder(folder, experiment, abstract_params)
    else:
        weight_map, _ = detect.weight_map_and_abstract_params(source.checkpoint_format, weights.recorded)
        params = convert.sharded_params_from_state_dict(
            weight_map, source.tensors, abstract_params, source.checkpoint_format.ignore_patterns
        )
    origin_files = find_origin_files(folder) if source is None else find_companion_files(source.folder)
    engine = dataclasses.replace(model.engine, params=params)
    return dataclasses.replace(model, engine=engine, origin_files=origin_files)


def _load_params_folder(folder: Path, experiment: Experiment, abstract_params: Params) -> Params:
    """The parameters of a folder in lionjax names; parts that it lacks come from the files that ship, if it says so."""
    stored, flat = convert.open_params(folder)[1], trees.flatten(abstract_params)
    missing = {path: leaf for path, leaf in flat.items() if path not in stored}
    shipped = load_shipped(experiment, trees.unflatten(missing)) if missing else {}
    rest = trees.unflatten({path: leaf for path, leaf in flat.items() if path not in shipped})
    return trees.merge(convert.load_params(folder, rest)[1], trees.unflatten(shipped))


def with_tokenizers(experiment: Experiment, folders: Sequence[Path], allow_recorded: bool) -> Experiment:
    """The experiment with the tokenizers found in `folders`; where missing and `allow_recorded`, those it names.

    Raises UserError if a tokenizer is missing and `allow_recorded` is false.
    """
    tokenizers = {}
    for field, subfolder in tokenizer_folders(experiment.model).items():
        candidates = [
            folder / subfolder
            for folder in folders
            if any((folder / subfolder / f).is_file() for f in tokenizer.FILE_NAMES)
        ]
        if not candidates and not allow_recorded:
            missing = f"{folders[0]}/{subfolder}".rstrip("/")
            raise UserError(f"{missing} has no tokenizer; put one of {', '.join(tokenizer.FILE_NAMES)} there")
        tokenizers |= {field: str(candidates[0])} if candidates else {}
    processor = dataclasses.replace(experiment.data.processor, **tokenizers)
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, processor=processor))


def with_image_settings(experiment: Experiment, folder: Path) -> Experiment:
    """The experiment of released weights with the picture settings of the files in `folder`, or its model's defaults.

    Raises UserError, naming the setting, for settings that are not supported.
    """
    info, processor = experiment.model.info, experiment.data.processor
    code_pads = processor.pad_to_square and processor.pad_color == "white"
    fields, fit = read_image_settings(folder, info.image_size, code_pads)
    fit = ImageFit(**(fit if fields else info.default_image_fit))
    processor = dataclasses.replace(processor, image_fit=fit, **fields)
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, processor=processor))


def check_word_tables(model: Model, folders: Sequence[Path], is_released: bool) -> None:
    """Raise UserError where an id that the processor or the generation settings give has no row in the word tables."""
    prompt, info = model.processor.prompt, model.vlm.info
    if info.vocab_size is None:
        return
    settings = [read_hf_config(folder / "config.json") for folder in folders] if is_released else []
    vocabulary = _vocabulary_of(prompt.tokenizer, model.processor.config.tokenizer, folders)
    token_ids.check_token_ids(model.vlm, vocabulary, next(filter(None, settings), {}))
    if info.reads_question and info.question_vocab_size is not None:
        question = _vocabulary_of(prompt.question_tokenizer, model.processor.config.question_tokenizer, folders)
        token_ids.check_vocabulary(question, info.question_vocab_size, "Q-Former's word table")
    if num_bins := model.processor.config.location_bins_per_side**2:
        last = prompt.box_codec.first_location_token_id + num_bins - 1
        token_ids.check_used_ids({"the last location token": last}, info.vocab_size)
    for category in CATEGORIES:
        how = model.generation_config(category)
        names = ("eos_token_id", "pad_token_id", "decoder_start_token_id")
        token_ids.check_used_ids({name: getattr(how, name) for name in names}, info.vocab_size)


def _vocabulary_of(tokens: tokenizer.Tokenizer, name: str, folders: Sequence[Path]) -> token_ids.Vocabulary:
    ids = tokens.backend.get_vocab(with_added_tokens=True)
    ids.pop(LAVIS_DECODE_TOKEN, None)  # no text has it, and not every Q-Former has a row for it
    special = frozenset(tokens.backend.get_added_tokens_decoder())
    return token_ids.Vocabulary(ids, special, f"the tokenizer {name!r}", token_ids.image_token_name(folders))


def dummy_batch(processor: Processor) -> Batch:
    """A batch of one blank image, for shape inference."""
    side = processor.config.image_size
    return processor.batch([ImageTextInput(np.zeros((side, side, 3), np.uint8), "?")])
