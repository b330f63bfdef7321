# SPDX-License-Identifier: Apache-2.0
"""Language models that stay as they are: MAGIC, ZeroCap, CLIP retrieval, PICa and PromptCap, on scenes and real data.

python -m benchmarks.frozen_lms [--workdir runs/frozen_lms] [--smollm2 FOLDER] [--coco FOLDER] [--out FILE]

Trains, unless --workdir has them: the scorer (configs/tiny_clip.py), a decoder on captions (tiny_text_lm.py), a small
model that sees (tiny_llava.py), PromptCap's captioner (tiny_promptcap.py), and two more of them on captions that
SmolLM2 wrote, with and without PromptCap's filter (frozen_lms_filter.py). Captions of held-out scenes are then scored
by CIDEr-D against their five references, and answers to questions by VQA accuracy; 95 % bootstrap intervals, of
differences over the same examples.

Captions: the best constant one; the decoder alone (contrastive search without an image); the same decoder under MAGIC
and ZeroCap; the caption of the training scene that CLIP finds most like the image; the small model that was trained.
Answers: SmolLM2-135M (see smollm2_weights.py; without --smollm2 these rows are left out) with four examples that CLIP
chooses, from a constant context, the small model's captions (PICa), those with tags (PICa), and captions for the
question (PromptCap); beside them the most frequent answer, and the small model, also without its image.
Real data (frozen_lms_real.py): questions of easy-VQA (pip install easy-vqa), captions of photographs in --coco.

Finished rows are reused; delete `rows` in --workdir to make them again. Exits with code 1 where a figure misses its
margin, all fixed before any run.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence

import numpy as np
import tyro

from benchmarks import frozen_lms_filter, frozen_lms_real
from benchmarks.frozen_lms_rows import Run, captioned, difference, language_model, measured, table, trained
from lionjax.data import pipeline
from lionjax.data.scenes.question_captions import statement
from lionjax.data.scenes.tasks import scene_captions
from lionjax.data.templates import CAPTION
from lionjax.evaluation import tasks
from lionjax.inference import dual_encoder, guided_captions
from lionjax.inference.dual_encoder import DualEncoder
from lionjax.inference.guidance import GuidanceConfig
from lionjax.inference.model import Model
from lionjax.inference.zerocap import ZeroCapConfig
from lionjax.pipelines import pica, promptcap
from lionjax.pipelines.pica import PicaConfig

SYSTEMS = ("tiny_clip", "tiny_text_lm", "tiny_llava", "tiny_promptcap")
QUESTION = CAPTION[0]  # the prompt of all captions
NUM_SHOTS, NUM_EXAMPLES, NUM_GALLERY = 4, 2000, 1000
MAX_TOKENS = 48
MAGIC = GuidanceConfig(MAX_TOKENS, 16, 0.1, 2.0)
UNGUIDED = dataclasses.replace(MAGIC, image_weight=0.0)
ZEROCAP, ZEROCAP_PROMPT = ZeroCapConfig(32, num_beams=3, num_candidates=64), "A picture of"
ROWS_AT_ONCE = 20
TAG_NOISE = 0.1  # of the simulated tagger, as in the configs
NO_CONTEXT = "A picture of objects."
PICA, RANDOM = "PICa, captions", "PICa, captions, random examples"
FILTERED, UNFILTERED = (f"PromptCap, {name} captions" for name in ("filtered", "unfiltered"))
SCENES = "scenes"
# Fixed before any run: (task, row, row that it must exceed, by at least), and the least recall of the scorer.
MARGINS = (
    ("caption", "MAGIC", "language model alone", 0.3),
    ("vqa", "PromptCap", PICA, 0.1),
    ("vqa", PICA, RANDOM, 0.0),
    ("vqa", FILTERED, UNFILTERED, 0.0),
)
LEAST_RECALL = 0.5
# On real data similar examples are compared with random ones too, whatever comes out: (part, task, row, other row).
SHOWN = (
    (frozen_lms_real.EASY_VQA, "vqa", frozen_lms_real.GIVEN, f"{frozen_lms_real.GIVEN}, random examples"),
    (frozen_lms_real.COCO, "caption", *(f"given categories, {kind} examples" for kind in ("similar", "random"))),
)


def scene_samples(model: Model, task: str, split: str, limit: int) -> list:
    """Samples of scenes from the model's data."""
    return list(pipeline.examples(model.experiment.data, task, split, limit))


def recall_at_1(clip: DualEncoder, samples: Sequence) -> tuple[float, float]:
    """How often the first caption is an image's own among all, and the image a caption's own."""
    logits_NN = clip.logits([s.image for s in samples], [s.example.answers[0] for s in samples])
    own_N = np.arange(len(samples))
    return float((logits_NN.argmax(1) == own_N).mean()), float((logits_NN.argmax(0) == own_N).mean())


def magic(lm: Model, clip: DualEncoder, images: Sequence, settings: GuidanceConfig) -> list[str]:
    """Captions by MAGIC, or without the image if `settings.image_weight` is 0."""
    texts: list[str] = []
    for start in range(0, len(images), ROWS_AT_ONCE):
        image_BE = clip.embed_images(images[start : start + ROWS_AT_ONCE])
        found = guided_captions.magic_captions(lm, clip, image_BE, QUESTION, settings)
        texts += [caption.text for caption in found]
    return texts


def zerocap(lm: Model, clip: DualEncoder, images: Sequence) -> list[str]:
    """Captions by ZeroCap, one image at a time; of the beams the one that matches the image best."""
    texts, end = [], lm.processor.tokenizer.eos_id
    settings = dataclasses.replace(ZEROCAP, end_token_ids=(end,), finished_token_id=end)
    for image in images:
        image_BE = clip.embed_images([image])
        (found,) = guided_captions.zerocap_captions(lm, clip, image_BE, ZEROCAP_PROMPT, settings)
        texts.append(f"{ZEROCAP_PROMPT} {found[0].text}")
    return texts


def retrieved_captions(clip: DualEncoder, gallery: Sequence, images: Sequence) -> list[str]:
    """For each image the caption of the training scene that fits it best."""
    captions = [sample.example.answer for sample in gallery]
    best_N = (clip.embed_images(images) @ clip.embed_texts(captions).T).argmax(axis=1)
    return [captions[place] for place in best_N]


def answers_of(model: Model, samples: Sequence, blind: bool = False) -> list[str]:
    """The answers of a model that sees; `blind`: a black image in the place of each."""
    images = [np.zeros_like(np.asarray(s.image)) if blind else s.image for s in samples]
    return [answer.text for answer in model.answer(images, [s.example.question for s in samples])]


def caption_rows(run: Run, models: dict[str, Model], clip: DualEncoder) -> list[dict]:
    """The rows of captions."""
    lm, llava = models["tiny_text_lm"], models["tiny_llava"]
    samples = scene_samples(models["tiny_clip"], "caption", "heldout", run.limit)
    gallery = scene_samples(models["tiny_clip"], "caption", "train", NUM_GALLERY)
    images, examples = [sample.image for sample in samples], [sample.example for sample in samples]
    constant = tasks.constant_answers("caption", [s.example for s in gallery[:300]], examples)
    made = {
        "best constant": lambda images: constant,
        "language model alone": lambda images: magic(lm, clip, images, UNGUIDED),
        "ZeroCap": lambda images: zerocap(lm, clip, images),
        "MAGIC": lambda images: magic(lm, clip, images, MAGIC),
        "CLIP retrieval": lambda images: retrieved_captions(clip, gallery, images),
        "trained small model": lambda images: [a.text for a in llava.answer(images, [QUESTION] * len(images))],
    }
    counts = {"ZeroCap": run.zerocap_limit}
    return [
        measured(run, SCENES, name, "caption", examples[:count], lambda make=make, count=count: make(images[:count]))
        for name, make in made.items()
        for count in (counts.get(name, len(images)),)
    ]


def answer_rows(run: Run, models: dict[str, Model], clip: DualEncoder) -> tuple[list[dict], list[str]]:
    """The rows of answers, those of SmolLM2 only with its weights; and sentences about its examples and captioners."""
    llava = models["tiny_llava"]
    data = dataclasses.replace(models["tiny_clip"].experiment.data, tag_noise=TAG_NOISE)
    samples = list(pipeline.examples(data, "vqa", "heldout", run.question_limit))
    shown = list(pipeline.examples(data, "vqa", "train", NUM_EXAMPLES))
    examples = [sample.example for sample in samples]
    constant = tasks.constant_answers("vqa", [s.example for s in shown], examples)
    made = {
        "most frequent answer of the kind": lambda: constant,
        "trained small model, blind": lambda: answers_of(llava, samples, blind=True),
        "trained small model": lambda: answers_of(llava, samples),
    }
    notes = []
    if run.smollm2 is not None:
        rows, notes = frozen_answers(run, models, clip, samples, shown)
        made |= rows
    return [measured(run, SCENES, name, "vqa", examples, make) for name, make in made.items()], notes


def frozen_answers(run: Run, models: dict[str, Model], clip: DualEncoder, samples: Sequence, shown: Sequence):
    """({row: function that makes the answers of SmolLM2}, sentences about its examples and captioners)."""
    lm, plain = language_model(run.smollm2), PicaConfig(NUM_SHOTS, use_tags=False)
    images, asked = [s.image for s in samples], [s.example.question for s in samples]
    references, stated = [scene_references(s) for s in shown], [true_statement(s) for s in shown]
    similar = frozen_lms_filter.similar_orders(clip, samples, shown, plain)
    drawn = pica.random_examples(len(samples), len(shown), NUM_SHOTS, 0)

    def generic() -> list[list[str]]:
        return [[answer.text] for answer in models["tiny_llava"].answer(images, [QUESTION] * len(images))]

    def by_pica(contexts, of_shown, orders, use_tags: bool = False) -> list[str]:
        settings = dataclasses.replace(plain, use_tags=use_tags)
        given = captioned(samples, contexts, use_tags), captioned(shown, of_shown), orders
        return [answer or "" for answer in pica.answer_questions(lm, *given, settings)]

    def by_promptcap(captioner: Model) -> list[str]:
        contexts = [[text] for text in promptcap.captions_for_questions(captioner, images, asked)]
        given = captioned(samples, contexts), captioned(shown, stated), similar
        return [answer or "" for answer in promptcap.answer_questions(lm, *given)]

    created = frozen_lms_filter.questions_to_create(models)
    captioners, counts = frozen_lms_filter.captioners(run, clip, created, [scene_references(s) for s in created])
    blank = [[NO_CONTEXT]] * len(samples), [[NO_CONTEXT]] * len(shown)
    made = {
        "language model alone": lambda: by_pica(*blank, similar),
        RANDOM: lambda: by_pica(generic(), references, drawn),
        PICA: lambda: by_pica(generic(), references, similar),
        "PICa, captions and tags": lambda: by_pica(generic(), references, similar, True),
        UNFILTERED: lambda: by_promptcap(captioners[frozen_lms_filter.CREATED]),
        FILTERED: lambda: by_promptcap(captioners[frozen_lms_filter.FILTERED]),
        "PromptCap": lambda: by_promptcap(models["tiny_promptcap"]),
    }
    shares = [frozen_lms_filter.examples_of_one_kind(samples, shown, orders) for orders in (similar, drawn)]
    notes = [
        f"Examples with a question of the asked one's kind: {shares[0]:.2f} chosen by CLIP, {shares[1]:.2f} drawn.",
        *(
            f"Captions that SmolLM2 wrote, {name}: {c['captions']}, {c['right']:.2f} right."
            for name, c in counts.items()
        ),
    ]
    return made, notes


def scene_references(sample) -> list[str]:
    """The captions of the scene of a sample."""
    return scene_captions(sample.dataset.source.scene(sample.record_index))


def true_statement(sample) -> list[str]:
    """The caption for the question of a sample that its answer makes."""
    return [statement(sample.example.question, sample.example.answer)]


def compared(results: Sequence[dict]) -> list[tuple[str, bool]]:
    """For each margin whose rows were made a sentence, and whether it is kept: the difference reaches the margin.

    A margin of 0 is kept where the interval of the difference is above 0.
    """
    sentences = []
    for task, better, worse, least in MARGINS:
        if found := row_difference(results, SCENES, task, better, worse):
            text, value, low = found
            text += f", asked: {least or 'above 0'}"
            sentences.append((text, value >= least if least else low > 0))
    return sentences


def row_difference(
    results: Sequence[dict], part: str, task: str, better: str, worse: str
) -> tuple[str, float, float] | None:
    """(sentence, difference of two rows, lower end of its 95 % interval); None where a row was left out."""
    rows = {row["row"]: row for row in results if (row["part"], row["task"]) == (part, task)}
    if better not in rows or worse not in rows:
        return None
    value, low, high = difference(rows[better], rows[worse])
    return f"{part}: {better} over {worse}: {value:+.2f} ({low:+.2f} to {high:+.2f})", value, low


def main(run: Run) -> int:
    """Train what is missing, fill the tables and print them; returns the exit code."""
    logging.basicConfig(level=logging.WARNING)
    models = {name: trained(run, name) for name in SYSTEMS}
    clip = dual_encoder.load(run.workdir / "tiny_clip")
    recall = recall_at_1(clip, scene_samples(models["tiny_clip"], "caption", "heldout", run.limit))
    print(f"recall at 1: {recall[0]:.2f} image to text, {recall[1]:.2f} text to image", file=sys.stderr, flush=True)
    answers, notes = answer_rows(run, models, clip)
    results = [*caption_rows(run, models, clip), *answers]
    results += [*frozen_lms_real.easy_vqa_rows(run, models, clip, QUESTION), *frozen_lms_real.coco_rows(run)]
    margins = [
        *compared(results),
        (f"recall at 1: {min(recall):.2f}, asked: {LEAST_RECALL}", min(recall) >= LEAST_RECALL),
    ]
    lines = [
        *(
            line
            for part in dict.fromkeys(row["part"] for row in results)
            for line in (f"## {part}", "", table(results, part), "")
        ),
        *(f"- {text}: {'kept' if is_kept else '**missed**'}." for text, is_kept in margins),
        *(f"- {found[0]}." for pair in SHOWN if (found := row_difference(results, *pair))),
        *(f"- {note}" for note in notes),
        f"- CLIP's recall at 1 in {run.limit} held-out scenes: {recall[0]:.2f} of images, {recall[1]:.2f} of captions.",
        f"- {sum(row['seconds'] * row['count'] for row in results):.0f} s for these rows, without training.",
    ]
    if run.smollm2 is None:
        lines.append("- Rows that SmolLM2-135M answers were left out: no --smollm2.")
    print("\n".join(lines))
    (run.workdir / "results.json").write_text(json.dumps({"recall": recall, "rows": results}, indent=1) + "\n")
    if run.out is not None:
        run.out.write_text("\n".join(lines) + "\n")
    return 0 if all(is_kept for _, is_kept in margins) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Run, description=__doc__)))
