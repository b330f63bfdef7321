# SPDX-License-Identifier: Apache-2.0
"""`lionjax synthesize`: instruction data of one kind, from a file of contexts or questions to a folder that trains."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lionjax.core.errors import UserError, check_choices, check_ranges
from lionjax.core.files import make_folder, write_jsonl
from lionjax.data.images import open_image, safe_path
from lionjax.pipelines import pica, promptcap
from lionjax.pipelines.captions_as_text import CaptionedQuestion, read_questions
from lionjax.pipelines.coco_contexts import read_coco_contexts
from lionjax.pipelines.completion import ChatRequest, LanguageModel
from lionjax.pipelines.image_contexts import ImageContext, read_contexts
from lionjax.pipelines.instructions import curation, grounded_captions, grounded_chains, llava_kinds
from lionjax.pipelines.instructions.few_shot import FewShot
from lionjax.pipelines.instructions.grounded_captions import DetectsPhrases, Tags
from lionjax.pipelines.instructions.records import Outcome, to_record, write_outcomes
from lionjax.pipelines.review_page import read_choices

if TYPE_CHECKING:
    from lionjax.inference.model import Model

CONTEXT_KINDS = (*llava_kinds.KINDS, "chain", "curation")  # a language model reads contexts
KINDS = (*CONTEXT_KINDS, "promptcap", "grounded")


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """Settings of a run. Raises UserError for values out of range.

    `version`: of chains, "a", "c" or "bc". `num_samples`: captions that are sampled for a question of PromptCap;
    `num_shots`: solved questions in the prompt of its filter. `min_words`: of a curated description. `seed`: of what
    is drawn.
    """

    kind: str
    version: str = "bc"
    num_samples: int = promptcap.NUM_SAMPLES
    num_shots: int = 0
    min_words: int = curation.MIN_WORDS
    seed: int = 0

    def __post_init__(self):
        check_choices(self, UserError, kind=KINDS, version=grounded_chains.VERSIONS)
        check_ranges(self, num_samples=">= 1", num_shots=">= 0", min_words=">= 1")


@dataclasses.dataclass(frozen=True)
class Images:
    """The image folder of a run, or None. Names of a file stay inside it."""

    folder: Path | None

    def open(self, name: str) -> Image.Image:
        """The RGB image of a name. Raises UserError without a folder, and for a name outside of it."""
        if self.folder is None:
            raise UserError("this kind of data needs the images; give --images DIR")
        return open_image(safe_path(self.folder, name), name)


def build_requests(
    settings: GenerationSettings, contexts: Sequence[ImageContext], few_shot: FewShot | None, drafts: Sequence[str] = ()
) -> list[ChatRequest]:
    """What the language model is asked first, for a kind that reads contexts."""
    if settings.kind == "chain":
        return grounded_chains.build_requests(contexts, few_shot)
    if settings.kind == "curation":
        return curation.build_requests(drafts or [context.captions[0] for context in contexts])
    return llava_kinds.build_requests(settings.kind, contexts, few_shot)


def synthesize(
    settings: GenerationSettings,
    contexts: Sequence[ImageContext],
    model: LanguageModel,
    folder: Path,
    images: Images,
    few_shot: FewShot | None = None,
    captioner: Model | None = None,
    review: Path | None = None,
) -> dict[str, Any]:
    """Make data of a kind that reads contexts; returns the report.

    `captioner` writes the descriptions that "curation" rewrites, else the first captions are they. `review`: the
    choices of a person, as review.html saves them.
    """
    sizes = [images.open(one.image).size for one in contexts] if settings.kind == "chain" else []  # before it costs
    (name, count), *_ = Counter(context.id for context in contexts).most_common(1) or [("", 0)]
    if settings.kind == "curation" and count > 1:
        raise UserError(f"{count} rows have the id {name!r:.80}; give each its own, as a person's choices are by id")
    drafts = [curation.describe_image(captioner, images.open(one.image)) for one in contexts] if captioner else []
    replies = model.complete(build_requests(settings, contexts, few_shot, drafts))
    pairs = list(zip(contexts, replies, strict=True))
    if settings.kind == "chain":
        found = [
            grounded_chains.to_outcome(one, reply, size, settings.version)
            for (one, reply), size in zip(pairs, sizes, strict=True)
        ]
        make_folder(folder)
        write_jsonl(folder / grounded_chains.SHIKRA_FILE, [row for _, row in found if row is not None])
        outcomes = [outcome for outcome, _ in found]
    elif settings.kind == "curation":
        outcomes = _curated(settings, pairs, folder, images, review)
    else:
        outcomes = [llava_kinds.to_outcome(settings.kind, one, reply, settings.seed) for one, reply in pairs]
    return write_outcomes(folder, settings.kind, outcomes, model, dataclasses.asdict(settings))


def _curated(settings: GenerationSettings, pairs, folder: Path, images: Images, review: Path | None) -> list[Outcome]:
    """The outcomes of descriptions: a page to choose on, or with a person's choices those that are kept."""
    outcomes = [curation.to_outcome(one, reply, settings.min_words, settings.seed) for one, reply in pairs]
    make_folder(folder)
    opener = images.open if images.folder is not None else None
    if review is None:
        curation.write_review(folder, outcomes, opener)
        return outcomes
    outcomes = curation.apply_review(outcomes, read_choices(review, "id", "choice", tuple(curation.CHOICES)))
    curation.write_captions(folder, outcomes, opener)
    return outcomes


def synthesize_promptcap(
    settings: GenerationSettings,
    rows: Sequence[CaptionedQuestion],
    examples: Sequence[CaptionedQuestion],
    model: LanguageModel,
    folder: Path,
) -> dict[str, Any]:
    """PromptCap's training data: for each question the caption from which its answer is found; returns the report."""
    if missing := [row for row in rows if not row.answers or not row.image]:
        raise UserError(f"the question {missing[0].question!r} has no answers or no image; give both for training data")
    if settings.num_shots > len(examples):
        raise UserError(
            f"{settings.num_shots} shots are shown and {len(examples)} examples were given; give --examples"
        )
    orders = pica.random_examples(len(rows), len(examples), settings.num_shots, settings.seed)
    created = promptcap.create_captions(model, rows, settings.num_samples)
    candidates = [[*row.captions, *made] for row, made in zip(rows, created)]
    scored = promptcap.score_candidates(model, rows, candidates, examples, orders)
    outcomes = []
    for number, (row, found) in enumerate(zip(rows, scored)):
        name, kept = str(row.question_id or number), promptcap.keep_best(found)
        if kept:
            pair = (promptcap.captioner_prompt(row.question, row.ocr), kept[0])
            outcomes.append(Outcome(name, to_record(name, row.image, [pair])))
        else:
            outcomes.append(Outcome(name, reason=f"no caption answers it: {len(found)} were scored"))
    return write_outcomes(folder, settings.kind, outcomes, model, dataclasses.asdict(settings))


def synthesize_grounded(
    settings: GenerationSettings,
    contexts: Sequence[ImageContext],
    detector: DetectsPhrases,
    tagger: Tags | None,
    folder: Path,
    images: Images,
) -> dict[str, Any]:
    """Captions whose phrases have boxes, by detector and tagger; no language model is asked; returns the report."""
    outcomes = [grounded_captions.ground_caption(one, images.open(one.image), detector, tagger) for one in contexts]
    return write_outcomes(folder, settings.kind, outcomes, None, dataclasses.asdict(settings))


def read_input(
    settings: GenerationSettings, path: Path, limit: int | None = None, instances: Path | None = None
) -> list[ImageContext] | list[CaptionedQuestion]:
    """The contexts of a file, or for "promptcap" its questions.

    A .json, gzipped or not, is COCO's captions file, with the boxes of `instances`; other files are JSON Lines. Raises
    UserError for files of another form.
    """
    for file in filter(None, (path, instances)):
        if not file.is_file():
            raise UserError(f"there is no file {file}; give JSON Lines of images, or of questions for promptcap")
    if settings.kind == "promptcap":
        return read_questions(path)[:limit]
    if path.name.removesuffix(".gz").endswith(".json"):
        return read_coco_contexts(path, instances)[:limit]
    if instances is not None:
        raise UserError(f"{path} has instances of its own; --instances goes with COCO's captions_SET.json")
    return read_contexts(path, needs_captions=settings.kind != "grounded")[:limit]
