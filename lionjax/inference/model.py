# SPDX-License-Identifier: Apache-2.0
"""A trained model to talk to: `load` a folder, `answer` prompts about pictures.

A folder is a run's, one that `lionjax convert` wrote in our names or in the original's, or an original release.
VLM, processor and tokenizers are rebuilt from what is recorded there. Nothing in the folder is changed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lionjax import convert
from lionjax.core import params as trees
from lionjax.core.experiment import Experiment
from lionjax.core.renamed import report
from lionjax.core.types import VLM, Params, UserError
from lionjax.data import images as pictures
from lionjax.data.processor import ImageTextInput, Processor
from lionjax.data.regions import ImageRegions
from lionjax.inference import engine
from lionjax.inference.engine import Answer, InferenceEngine
from lionjax.inference.sampling import GenerationConfig, end_token_ids
from lionjax.training.companions import companion_files

Refine = Callable[[Sequence[object]], list[ImageRegions]]  # from pictures to what is in each
RENAMED = {
    "answerer": "engine",
    "companions": "tokenizer_files",
    "has_the_bits_of": "equals_bitwise",
    "rank": "rank_candidates",
    "system": "vlm",
}
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A system with its parameters, ready to answer. `updates` were made in training, None where nobody counted."""

    experiment: Experiment
    engine: InferenceEngine
    updates: int | None = None
    origin_files: Mapping[str, Path] | None = None  # of the released weights; None: those of the experiment's weights
    refine: Refine | None = None  # finds the regions that the model reads; see `pipelines.refiner.attach`

    @property
    def vlm(self) -> VLM:
        return self.engine.model

    @property
    def params(self) -> Params:
        return self.engine.params

    @property
    def processor(self) -> Processor:
        return self.engine.processor

    def __getattr__(self, name: str):
        """Attributes under the names of version 0.1."""
        if name not in RENAMED:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        report(type(self).__name__, name, RENAMED[name])
        return getattr(self, RENAMED[name])

    def answer(
        self,
        images: Sequence[object],
        prompts: Sequence[str],
        boxes: Sequence | None = None,
        tags: Sequence[Sequence[str]] | None = None,
        category: str | None = None,
        generation_config: GenerationConfig | None = None,
        seed: int | Sequence[int] = 0,
        history: Sequence[Sequence[tuple[str, str]]] | None = None,
        shots: Sequence[Sequence[tuple[object, str, str]]] | None = None,
        regions: Sequence[ImageRegions] | None = None,
    ) -> list[Answer]:
        """Answers to prompts about pictures (paths, PIL pictures or uint8 arrays), one each.

        `boxes`: for each prompt those asked about, x0 y0 x1 y1 in 0..1; they stand where the prompt says `{box}`, or
        at its end. `tags`: for each prompt the words of a tagger. `category` is "region_level" or "image_level", by
        default decided from each prompt. `generation_config` replaces the settings that the model comes with; `seed` is
        used where it samples: one for each prompt, or that of the first, to which the others' places are added.
        `history`: for each prompt the (question, answer) pairs before it, about the same picture. `shots`: for each
        prompt as many (picture, question, answer) examples, shown before it. `regions`: for each prompt what a refiner
        found in its picture, for models that read regions; by default the model's own refiner finds them. They are in
        the answer. Raises UserError for what cannot be asked.
        """
        inputs = build_inputs(images, prompts, boxes, tags, category, history, shots)
        if tags is not None and not self.processor.config.use_tags:
            raise UserError("this model was trained without tags; leave them out")
        max_pixels = self.processor.config.max_pixels
        pil_images = [pictures.to_pil_image(sample.image, max_pixels=max_pixels) for sample in inputs]
        found = self.find_regions(pil_images, regions)
        rows = [
            self.processor.encode_input(dataclasses.replace(sample, image=image, regions=image_regions))
            for image, sample, image_regions in zip(pil_images, inputs, found)
        ]
        seeds = prompt_seeds(seed, len(rows))
        configs = [generation_config or self.generation_config(sample.category) for sample in inputs]
        answers: dict[int, Answer] = {}
        for config in dict.fromkeys(configs):  # prompts of both categories share a batch where their settings agree
            indices = [k for k, other in enumerate(configs) if other == config]
            sizes = [pil_images[k].size for k in indices] if self.processor.config.sam_image_size else None
            group_seeds = [seeds[k] for k in indices]
            group = self.engine.generate([rows[k] for k in indices], config, seeds=group_seeds, image_sizes=sizes)
            answers |= dict(zip(indices, group))
        answers = {k: dataclasses.replace(answer, regions=found[k]) for k, answer in answers.items()}
        return [_with_masks(answers[k], image) for k, image in enumerate(pil_images)]

    def find_regions(self, images: Sequence, regions: Sequence[ImageRegions] | None) -> Sequence[ImageRegions | None]:
        """The regions of each picture, found by the model's refiner where not given; None if the model reads none."""
        if not self.processor.config.region_width:
            if regions is not None:
                raise UserError("this model reads no regions; leave them out")
            return [None] * len(images)
        if regions is not None:
            if len(regions) != len(images):
                raise UserError(f"{len(regions)} regions were given for {len(images)} prompts; give one each")
            return regions
        if self.refine is None:
            raise UserError(
                "this model reads regions, and its folder has no refiner to find them; give one, as in "
                "`lionjax generate --refiner DIR` or `lionjax.load(folder, refiner=DIR)`"
            )
        return self.refine(images)

    def generation_config(self, category: str) -> GenerationConfig:
        """The generation settings of the model for prompts of a category."""
        return engine.make_generation_config(self.experiment.generation, self.processor, category)

    def complete(
        self, prompts: Sequence[str], generation_config: GenerationConfig | None = None, seed: int | Sequence[int] = 0
    ) -> list[Answer]:
        """How the model continues prompts without a picture; a model that reads pictures sees blank ones.

        The text of an answer keeps its spaces and line breaks; tokens have log-probabilities if
        `generation_config.output_logprobs` asks for them. Other arguments and errors as in `answer`.
        """
        if not len(prompts) or isinstance(prompts, str):
            raise UserError("there is nothing to continue; give a list of at least one prompt")
        config = generation_config or self.generation_config("image_level")
        blank = np.zeros((1, 1, 3), np.uint8)
        rows = [self.processor.encode_input(ImageTextInput(blank, prompt)) for prompt in prompts]
        seeds = prompt_seeds(seed, len(rows))
        answers = self.engine.generate(rows, config, image_blind=self.vlm.info.reads_images, seeds=seeds)
        end_ids = end_token_ids(config)
        texts = [
            self.processor.tokenizer.backend.decode([i for i in answer.token_ids if i not in end_ids])
            for answer in answers
        ]
        return [dataclasses.replace(answer, text=text) for answer, text in zip(answers, texts)]

    def rank_candidates(
        self, images: Sequence[object], prompts: Sequence[str], candidates: Sequence[Sequence[str]], mean: bool = False
    ) -> list[list[int]]:
        """For each prompt the places of its candidate answers, the likeliest first, by `candidate_losses`."""
        losses = self.candidate_losses(images, prompts, candidates, mean)
        return [np.argsort(losses_K, kind="stable").tolist() for losses_K in losses]

    def candidate_losses(
        self, images: Sequence[object], prompts: Sequence[str], candidates: Sequence[Sequence[str]], mean: bool = False
    ) -> list[np.ndarray]:
        """For each prompt the losses of its candidate answers in nats, (K,): the lower, the likelier.

        Summed over a candidate's tokens, the end token included, as BLIP-2's code ranks (`predict_class`), or with
        `mean` their mean, as LAVIS ranks for InstructBLIP. A prompt is read once for all of its candidates; these are
        never cut. Raises UserError where the lists are not of one length, and for a candidate that is longer than
        processor.max_target_tokens.
        """
        asked = build_inputs(images, prompts, None, None, None)
        found = self.find_regions([one.image for one in asked], None)
        asked = [dataclasses.replace(one, regions=image_regions) for one, image_regions in zip(asked, found)]
        if len(candidates) != len(asked) or not all(len(some) for some in candidates):
            raise UserError("candidates wants a list of answers for each prompt, none of them empty")
        pairs = [(one, text) for one, some in zip(asked, candidates) for text in some]
        rows = [self.processor.encode_input(one, text) for one, text in pairs]
        for (_, text), row in zip(pairs, rows):
            if num_cut := int(row["num_cut"]):
                room = self.processor.config.max_target_tokens
                raise UserError(
                    f"the candidate {text[:40]!r} takes {room + num_cut} tokens, but at most {room} are allowed; "
                    "shorten it or raise processor.max_target_tokens"
                )
        ends = np.cumsum([len(some) for some in candidates])
        groups = [rows[end - len(some) : end] for some, end in zip(candidates, ends)]
        losses = self.engine.candidate_nll(groups)
        if not mean:
            return losses
        counts = [[max(int(row["target_mask"].sum()), 1) for row in group] for group in groups]
        return [losses_K / np.array(counts_K) for losses_K, counts_K in zip(losses, counts)]

    def export(self, path: str | Path, to: str = "torch", merge_lora: bool = False) -> None:
        """Write a folder with config, tokenizers and the released processor files, which `load` reads back.

        `to`: "torch" for the original's names, "jax" for ours. For torch a LoRA goes into a folder `adapter` as PEFT
        writes it, or into its matrices. Raises UserError where one stands at `path` already.
        """
        if to not in ("torch", "jax") or (merge_lora and to == "jax"):
            raise UserError(f"to is {to!r}; it can be 'torch', where a LoRA may be merged, or 'jax'")
        given = {"companions": companion_files(self.experiment, self.origin_files)}
        if to == "torch":
            convert.to_torch(self.experiment, self.params, path, merge_lora=merge_lora, **given)
        else:
            convert.save(self.experiment, self.params, path, **given)

    def equals_bitwise(self, other: Model) -> bool:
        """Whether another model has the same parameters, bit for bit."""
        mine, theirs = trees.flatten(self.params), trees.flatten(other.params)
        return mine.keys() == theirs.keys() and all(
            mine[path].dtype == theirs[path].dtype
            and np.asarray(mine[path]).tobytes() == np.asarray(theirs[path]).tobytes()
            for path in mine
        )

    def tokenizer_files(self) -> dict[str, Path]:
        """{name in a model's folder: file} of the tokenizers."""
        return companion_files(self.experiment, {})


def prompt_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """The seed of each of `count` prompts: those given, or `seed`, `seed` + 1, ...; UserError for another number."""
    if not isinstance(seed, int | np.integer) and len(seed) != count:
        raise UserError(f"{len(seed)} seeds were given for {count} prompts; give one each, or one number")
    return [int(seed) + k for k in range(count)] if isinstance(seed, int | np.integer) else list(map(int, seed))


def build_inputs(images, prompts, boxes, tags, category, history=None, shots=None) -> list[ImageTextInput]:
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
        prompt = engine.insert_boxes(prompt, given)
        words = tuple(tags[place] or ()) if tags is not None else ()
        kind = category or engine.prompt_category(prompt)
        before = {
            name: tuple(map(tuple, lists[place] or ()))
            for name, lists in (("turns", history), ("shots", shots))
            if lists is not None
        }
        asked.append(ImageTextInput(image, prompt, words, kind, tuple(map(tuple, given)), **before))
    if len(counts := {len(one.shots) for one in asked}) > 1:
        raise UserError(f"the prompts have {sorted(counts)} shots; give each as many")
    return asked


def _with_masks(answer: Answer, image) -> Answer:
    """The answer with an empty array (0, height, width) for masks that were not predicted."""
    if answer.masks is not None:
        return answer
    return dataclasses.replace(answer, masks=np.zeros((0, image.height, image.width), bool))
