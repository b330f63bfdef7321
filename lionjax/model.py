# SPDX-License-Identifier: Apache-2.0
"""A trained model to talk to: `load` a folder, `answer` prompts about pictures.

A folder is a run's, one that `lionjax convert` wrote in our names or in the original's, or an original release.
System, processor and tokenizers are rebuilt from what is recorded there. Nothing in the folder is changed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from lionjax import answering, config, convert, sharding
from lionjax import params as trees
from lionjax.answering import Answerer, Said
from lionjax.config import AnswerConfig, Experiment
from lionjax.convert import systems
from lionjax.data import pictures, tokenizer
from lionjax.data.examples import DataConfig
from lionjax.data.processors import Input, Processor, ProcessorConfig
from lionjax.interfaces import Batch, Params, System, UserError
from lionjax.scores import GenerateConfig
from lionjax.sharding import MeshConfig
from lionjax.systems.prefix import Prefix
from lionjax.training import checkpoints, stages, start
from lionjax.training.checkpoints import Damaged

log = logging.getLogger(__name__)

QFORMER_TOKENIZER = "qformer_tokenizer"  # the folder of it within a model's; the language model's lies by the weights
TOKENIZER_FILES = {".json": "tokenizer.json", ".model": "spiece.model", ".txt": "vocab.txt"}
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: {image} {question} ASSISTANT:"
)
VICUNA_NEXT = "USER: {question} ASSISTANT:"
RELEASED = AnswerConfig(beams=5, repetition_penalty=1.5, max_new_tokens=256)  # LION's own settings


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model says: text, the boxes in it (K, 4) as x0 y0 x1 y1 in 0..1, masks (K, H, W) bool of the picture."""

    text: str
    boxes: np.ndarray
    masks: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A system with its parameters, ready to answer. `updates` were made in training, None where nobody counted."""

    experiment: Experiment
    answerer: Answerer
    updates: int | None = None

    @property
    def system(self) -> System:
        return self.answerer.system

    @property
    def params(self) -> Params:
        return self.answerer.params

    @property
    def processor(self) -> Processor:
        return self.answerer.processor

    def answer(
        self,
        images: Sequence[object],
        prompts: Sequence[str],
        boxes: Sequence | None = None,
        tags: Sequence[Sequence[str]] | None = None,
        category: str | None = None,
        generate: GenerateConfig | None = None,
        seed: int = 0,
        history: Sequence[Sequence[tuple[str, str]]] | None = None,
        shots: Sequence[Sequence[tuple[object, str, str]]] | None = None,
    ) -> list[Answer]:
        """Answers to prompts about pictures (paths, PIL pictures or uint8 arrays), one each.

        `boxes`: for each prompt those asked about, x0 y0 x1 y1 in 0..1; they stand where the prompt says `{box}`, or
        at its end. `tags`: for each prompt the words of a tagger. `category` is "region_level" or "image_level", by
        default decided from each prompt. `generate` replaces the settings that the model comes with; `seed` decides
        what is drawn where it samples. `history`: for each prompt the (question, answer) pairs before it, of the same
        picture. `shots`: for each prompt as many (picture, question, answer) examples, shown before it.
        Raises UserError for what cannot be asked.
        """
        asked = inputs(images, prompts, boxes, tags, category, history, shots)
        if tags is not None and not self.processor.config.tags:
            raise UserError("this model was trained without tags; leave them out")
        processor, seen = self.processor, [pictures.as_picture(one.image) for one in asked]
        rows = [processor.row_of(dataclasses.replace(one, image=picture)) for picture, one in zip(seen, asked)]
        answer, said = self.experiment.answer, {}
        hows = [generate or answering.settings(answer, processor, one.category) for one in asked]
        for how in dict.fromkeys(hows):  # prompts of both categories go together where they are answered alike
            places = [place for place, other in enumerate(hows) if other == how]
            key = jax.random.key(seed) if how.sample else None
            sizes = [seen[place].size for place in places] if processor.config.sam_size else None
            group = [rows[place] for place in places]
            said |= dict(zip(places, self.answerer.say(group, how, key=key, sizes=sizes)))
        return [_answer(said[place], picture) for place, picture in enumerate(seen)]

    def rank(
        self, images: Sequence[object], prompts: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> list[list[int]]:
        """For each prompt the places of its candidate answers, the likeliest first.

        By the loss of each, summed over its tokens, as BLIP-2's code ranks (`predict_class`). Raises UserError where
        the lists are not of one length.
        """
        asked = inputs(images, prompts, None, None, None)
        if len(candidates) != len(asked) or not all(len(some) for some in candidates):
            raise UserError("candidates wants a list of answers for each prompt, none of them empty")
        order, place = [], 0
        rows = [self.processor.row_of(one, text) for one, some in zip(asked, candidates) for text in some]
        nats = self.answerer.rank(rows)
        for some in candidates:
            order.append(np.argsort(nats[place : place + len(some)], kind="stable").tolist())
            place += len(some)
        return order

    def export(self, path: str | Path, to: str = "torch", merge_lora: bool = False) -> None:
        """Write a folder with config and tokenizers, which `load` reads back.

        `to`: "torch" for the original's names, "jax" for ours. For torch a LoRA goes into a folder `adapter` as PEFT
        writes it, or into its matrices. Raises UserError where one stands at `path` already.
        """
        if to not in ("torch", "jax") or (merge_lora and to == "jax"):
            raise UserError(f"to is {to!r}; it can be 'torch', where a LoRA may be merged, or 'jax'")
        given = {"companions": self.companions()}
        if to == "torch":
            convert.to_torch(self.experiment, self.params, path, merge_lora=merge_lora, **given)
        else:
            convert.save(self.experiment, self.params, path, **given)

    def has_the_bits_of(self, other: Model) -> bool:
        """Whether another model has the same parameters, bit for bit."""
        mine, theirs = trees.flatten(self.params), trees.flatten(other.params)
        return mine.keys() == theirs.keys() and all(
            mine[path].dtype == theirs[path].dtype
            and np.asarray(mine[path]).tobytes() == np.asarray(theirs[path]).tobytes()
            for path in mine
        )

    def companions(self) -> dict[str, Path]:
        """{name in a model's folder: file} of the tokenizers."""
        c = self.processor.config
        folders = tokenizer_folders(self.experiment.system)
        files = {folder: tokenizer.file_of(getattr(c, field)) for field, folder in folders.items()}
        return {str(Path(folder, TOKENIZER_FILES[file.suffix])): file for folder, file in files.items()}


def inputs(images, prompts, boxes, tags, category, history=None, shots=None) -> list[Input]:
    """What is asked, one `Input` each; UserError where the lists are not of one length."""
    given = {"images": images, "prompts": prompts, "boxes": boxes, "tags": tags}
    given |= {"history": history, "shots": shots}
    for name, values in given.items():
        if isinstance(values, str | Path) or (values is not None and not hasattr(values, "__len__")):
            raise UserError(f"{name} is one {type(values).__name__}; give a list, with one entry for each prompt")
    for name, values in given.items():
        if values is not None and len(values) != len(prompts):
            raise UserError(f"{len(values)} {name} were given for {len(prompts)} prompts; give one each")
    for name, parts in (("history", "question, answer"), ("shots", "picture, question, answer")):
        for one in (one for some in given[name] or () for one in some or ()):
            if not isinstance(one, tuple | list) or len(one) != len(parts.split()):
                raise UserError(f"{name} wants for each prompt a list of ({parts})")
    if not len(prompts):
        raise UserError("there is nothing to ask; give at least one picture and one prompt")
    asked = []
    for place, (image, prompt) in enumerate(zip(images, prompts)):
        given = () if boxes is None or boxes[place] is None else boxes[place]
        prompt = answering.with_boxes(prompt, given)
        words = tuple(tags[place] or ()) if tags is not None else ()
        kind = category or answering.category_of(prompt)
        before = {
            name: tuple(map(tuple, lists[place] or ()))
            for name, lists in (("turns", history), ("shots", shots))
            if lists is not None
        }
        asked.append(Input(image, prompt, words, kind, tuple(map(tuple, given)), **before))
    if len(counts := {len(one.shots) for one in asked}) > 1:
        raise UserError(f"the prompts have {sorted(counts)} shots; give each as many")
    return asked


def _answer(said: Said, picture) -> Answer:
    none = np.zeros((0, picture.height, picture.width), bool)
    return Answer(said.text, said.boxes, none if said.masks is None else said.masks)


# Folders


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
    return (folder / "config.json").is_file() and bool(checkpoints.found_bases(folder / "base"))


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
    layout = start.layout(experiment, example(processor), mesh)
    for stage, step in start.places(folder, experiment):
        try:
            params = _read(folder, experiment, layout, stage, step)
        except Damaged as damage:
            log.warning("%s; what was saved before it is used", damage)
            continue
        updates = start.updates_before(experiment, stage) + step
        if stage < len(experiment.stages):
            part = experiment.stages[stage]
            where = f"stands at stage {part.name!r}, step {step} of {part.steps}"
            log.warning("%s is not finished: it %s, and answers with what it has learned so far", folder, where)
        # What counts as the last stage is the one that made these parameters.
        made = experiment.stages[: stage + (step > 0)] or experiment.stages[:1]
        return of_params(dataclasses.replace(experiment, stages=made), params, updates, mesh)
    raise UserError(f"{folder} holds no parameters that can be trusted; `lionjax train` begins it anew")


def _read(folder: Path, experiment: Experiment, layout: start.Layout, stage: int, step: int) -> Params:
    """The parameters at one place of a run. Raises Damaged, or UserError where the frozen ones are."""
    scratch = step and experiment.stages[stage].start == "scratch"
    base = start.base_folder(folder, experiment, 0 if scratch else stage)
    if not base.is_dir():
        raise Damaged(base, "the parameters that its stage began with are not there")
    items, meta = checkpoints.read(base, {"learned": layout.learned})
    learned = items["learned"]
    if step:
        path = folder / "checkpoints" / str(start.updates_before(experiment, stage) + step)
        trainable, _ = trees.split(layout.learned, experiment.stages[stage].trainable)
        items, meta = checkpoints.read(path, {"trainable": trainable})
        _, idle = trees.split(learned, experiment.stages[stage].trainable)
        learned = trees.merge(items["trainable"], idle)
    frozen = folder / "frozen" / meta["frozen"]
    try:
        never = checkpoints.read(frozen, {"never": layout.never})[0]["never"]
    except Damaged as damage:
        raise UserError(f"the frozen parameters are damaged ({damage}); `lionjax train` makes them anew") from damage
    return trees.merge(never, learned)


def of_weights(folder: Path, mesh: Mesh) -> Model:
    """The model of a folder of weights in our names or the original's; each process reads what its devices hold."""
    ours = convert.holds_params(folder)
    source = None if ours else systems.open_source(folder)
    recorded = convert.open_params(folder)[0] if ours else source.config
    roots = [folder, folder / convert.ORIGIN] + ([source.folder] if source and source.folder else [])
    experiment = recorded if isinstance(recorded, Experiment) else released(recorded, folder)
    model = of_params(with_tokenizers(experiment, roots, recorded is experiment), {}, None, mesh)
    key = jax.random.key(0)
    like = sharding.abstract(experiment.system.init, key, example(model.processor), mesh=mesh)
    if ours:
        _, params = convert.load_params(folder, like)
    else:
        rows, _ = systems.table_and_model(source.kind, recorded)
        params = convert.placed_from(rows, source.tensors, like, source.kind.ignore)
    return dataclasses.replace(model, answerer=dataclasses.replace(model.answerer, params=params))


def released(system: System, folder: Path) -> Experiment:
    """What goes with weights that come with a system's sizes alone: its own processor, and LION's settings."""
    if not hasattr(system, "prefill"):
        raise UserError(f"{folder} holds a {type(system).__name__}, a part of a system that cannot answer alone")
    processor = ProcessorConfig(image_size=system.vision.image, **asked_as(system))
    return Experiment(folder.name, system, DataConfig(processor=processor), stages=(), answer=RELEASED)


def asked_as(system: System) -> dict:
    """How a released system is asked, where that is not as LION is: Vicuna's words around LLaVA's questions."""
    if not isinstance(system, Prefix):
        return {}
    asked = {"tags": False} | ({} if system.encodes else {"reader": "decoder"})
    if system.qformer is not None:
        return asked
    return asked | {
        "template": VICUNA,
        "next_turn": VICUNA_NEXT,
        "image_token": system.image_token,
        "prompt_length": 512,
        "padded": system.projector_depth == 2,  # since LLaVA-1.5
        "padding": "mean",
    }


def tokenizer_folders(system: System) -> dict[str, str]:
    """{field of the processor: folder of that tokenizer within a model's}; the second where a Q-Former reads text."""
    bridge = getattr(system, "qformer", None)
    asked_twice = {"question_tokenizer": QFORMER_TOKENIZER} if bridge and bridge.text else {}
    return {"tokenizer": ""} | asked_twice


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
