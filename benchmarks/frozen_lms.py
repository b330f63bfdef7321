# SPDX-License-Identifier: Apache-2.0
"""Language models that stay as they are: MAGIC, ZeroCap, CLIP retrieval, PICa and PromptCap in one table, on scenes.

python -m benchmarks.frozen_lms [--workdir runs/frozen_lms] [--smollm2 FOLDER] [--limit 100] [--out FILE]

Trains, unless --workdir has them: the scorer (configs/tiny_clip.py), a decoder on captions (tiny_text_lm.py), a small
model that sees (tiny_llava.py) and PromptCap's captioner (tiny_promptcap.py). Captions of held-out scenes are then
scored by CIDEr-D against their five references, and answers to questions by VQA accuracy; 95 % bootstrap intervals.

Captions: the best constant one; the decoder alone (contrastive search without an image); the same decoder under MAGIC
and ZeroCap; the caption of the training scene that CLIP finds most like the image; the small model that was trained.
Answers: SmolLM2-135M (see smollm2_weights.py; without --smollm2 these rows are left out) with four examples that CLIP
chooses, from a constant context, the small model's captions (PICa), those with tags (PICa), and captions for the
question (PromptCap); beside them the most frequent answer, and the small model, also without its image.

Finished rows are reused; delete `rows` in --workdir to make them again. Exits with code 1 where a figure misses its
margin, all fixed before any run.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tyro
from safetensors.numpy import save_file

import lionjax
from lionjax.core import config
from lionjax.core import params as trees
from lionjax.core.experiment import Weights
from lionjax.data import pipeline
from lionjax.data.scenes.question_captions import statement
from lionjax.data.templates import CAPTION
from lionjax.evaluation import tasks
from lionjax.inference import dual_encoder, guided_captions
from lionjax.inference.dual_encoder import DualEncoder
from lionjax.inference.guidance import GuidanceConfig
from lionjax.inference.model import Model
from lionjax.inference.zerocap import ZeroCapConfig
from lionjax.pipelines import pica, promptcap
from lionjax.pipelines.captions_as_text import CaptionedQuestion
from lionjax.pipelines.loaded_model import LoadedModel
from lionjax.pipelines.pica import ExampleFeatures, PicaConfig
from lionjax.training import loop

ROOT = Path(__file__).resolve().parent.parent
SYSTEMS = ("tiny_clip", "tiny_text_lm", "tiny_llava", "tiny_promptcap")
QUESTION = CAPTION[0]  # the prompt of all captions
NUM_SHOTS, NUM_EXAMPLES, NUM_GALLERY = 4, 300, 1000
MAX_TOKENS = 48
MAGIC = GuidanceConfig(MAX_TOKENS, 16, 0.1, 2.0)
UNGUIDED = dataclasses.replace(MAGIC, image_weight=0.0)
ZEROCAP, ZEROCAP_PROMPT = ZeroCapConfig(32, num_beams=3, num_candidates=64), "A picture of"
ROWS_AT_ONCE = 20
TAG_NOISE = 0.1  # of the simulated tagger, as in the configs
NO_CONTEXT = "A picture of objects."
# Fixed before any run: {what: (row, row that it must exceed, by at least)}, and the least recall of the scorer.
MARGINS = {
    "caption": (("MAGIC", "language model alone", 0.3),),
    "vqa": (("PromptCap", "PICa, captions", 0.1), ("PICa, captions", "PICa, captions, random examples", 0.0)),
}
LEAST_RECALL = 0.5


@dataclasses.dataclass(frozen=True)
class Run:
    """`limit`: held-out scenes; `zerocap_limit`: scenes of ZeroCap, which is slow; `question_limit`: questions."""

    workdir: Path = Path("runs/frozen_lms")
    smollm2: Path | None = None
    limit: int = 100
    zerocap_limit: int = 10
    question_limit: int = 100
    out: Path | None = None


def trained(run: Run, name: str) -> Model:
    """The model of a config, trained in `workdir` where it is not finished there."""
    experiment = config.load(ROOT / "configs" / f"{name}.py")
    if name == "tiny_promptcap":  # as PromptCap starts from a captioner that sees
        weights = (experiment.weights[0], *handed_on(run.workdir / "tiny_llava", ("projector", "language")))
        experiment = dataclasses.replace(experiment, weights=weights)
    loop.train(experiment, run.workdir / name, pipeline.batches)
    return lionjax.load(run.workdir / name)


def handed_on(folder: Path, parts: Sequence[str]) -> list[Weights]:
    """Parts of a trained run as initial weights of another one."""
    file = folder / "handed_on.safetensors"
    if not file.is_file():
        flat = trees.flatten(lionjax.load(folder).params)
        save_file({path: np.array(leaf) for path, leaf in flat.items() if path.split("/")[0] in parts}, file)
    return [Weights(part, str(file)) for part in parts]


def scene_samples(model: Model, task: str, split: str, limit: int) -> list:
    """Samples of scenes from the model's data."""
    return list(pipeline.examples(model.experiment.data, task, split, limit))


def measured(run: Run, name: str, task: str, samples: Sequence, make: Callable[[], Sequence[str]]) -> dict:
    """One row: score and interval of the texts that `make` returns, and seconds a picture; kept in `workdir`."""
    file = run.workdir / "rows" / f"{task}, {name}, {len(samples)}.json"
    if file.is_file():
        return json.loads(file.read_text())
    start = time.perf_counter()
    texts = list(make())
    seconds = (time.perf_counter() - start) / len(samples)
    key = {"caption": "caption_cider", "vqa": "vqa_accuracy"}[task]
    scores = tasks.SCORERS[task]([sample.example for sample in samples], texts)
    row = {"row": name, "task": task, "count": len(texts), "score": scores.metrics[key], "seconds": seconds}
    row |= {"interval": scores.bootstrap_intervals()[key], "first": texts[0]}
    print(json.dumps(row), file=sys.stderr, flush=True)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(row) + "\n")
    return row


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
    images = [sample.image for sample in samples]
    constant = tasks.constant_answers("caption", [s.example for s in gallery[:300]], [s.example for s in samples])
    few = samples[: run.zerocap_limit]
    return [
        measured(run, "best constant", "caption", samples, lambda: constant),
        measured(run, "language model alone", "caption", samples, lambda: magic(lm, clip, images, UNGUIDED)),
        measured(run, "ZeroCap", "caption", few, lambda: zerocap(lm, clip, [s.image for s in few])),
        measured(run, "MAGIC", "caption", samples, lambda: magic(lm, clip, images, MAGIC)),
        measured(run, "CLIP retrieval", "caption", samples, lambda: retrieved_captions(clip, gallery, images)),
        measured(
            run,
            "trained small model",
            "caption",
            samples,
            lambda: [answer.text for answer in llava.answer(images, [QUESTION] * len(images))],
        ),
    ]


def question_rows(samples: Sequence, captions: Sequence[Sequence[str]]) -> list[CaptionedQuestion]:
    """Questions of scenes with their answers, a simulated tagger's tags, and the given captions."""
    return [
        CaptionedQuestion(s.example.question, tuple(texts), s.example.tags, s.example.answers)
        for s, texts in zip(samples, captions, strict=True)
    ]


def features(clip: DualEncoder, samples: Sequence) -> ExampleFeatures:
    """CLIP's embeddings of the questions and images."""
    questions = clip.embed_texts([sample.example.question for sample in samples])
    return ExampleFeatures(questions, clip.embed_images([sample.image for sample in samples]))


def answer_rows(run: Run, models: dict[str, Model], clip: DualEncoder) -> list[dict]:
    """The rows of answers; those of SmolLM2 only with its weights."""
    llava, captioner = models["tiny_llava"], models["tiny_promptcap"]
    data = dataclasses.replace(models["tiny_clip"].experiment.data, tag_noise=TAG_NOISE)
    samples = list(pipeline.examples(data, "vqa", "heldout", run.question_limit))
    shown = list(pipeline.examples(data, "vqa", "train", NUM_EXAMPLES))
    constant = tasks.constant_answers("vqa", [s.example for s in shown], [s.example for s in samples])
    rows = [measured(run, "most frequent answer", "vqa", samples, lambda: constant)]
    rows.append(
        measured(run, "trained small model, blind", "vqa", samples, lambda: answers_of(llava, samples, blind=True))
    )
    rows.append(measured(run, "trained small model", "vqa", samples, lambda: answers_of(llava, samples)))
    if run.smollm2 is None:
        return rows
    lm = LoadedModel(lionjax.load(run.smollm2, prompt_length=640), "SmolLM2-135M")
    images, asked = [s.image for s in samples], [s.example.question for s in samples]
    generic = [[answer.text] for answer in llava.answer(images, [QUESTION] * len(images))]
    aware = [[text] for text in promptcap.captions_for_questions(captioner, images, asked)]
    references = [scene_references(models["tiny_clip"], s) for s in shown]
    stated = [[statement(s.example.question, s.example.answer)] for s in shown]
    plain = PicaConfig(NUM_SHOTS, use_tags=False)
    similar = pica.similar_examples(features(clip, samples), features(clip, shown), plain)
    drawn = pica.random_examples(len(samples), len(shown), NUM_SHOTS, 0)
    blank = [[NO_CONTEXT]]

    def by_pica(contexts, of_shown, orders, use_tags=False) -> list[str]:
        settings = dataclasses.replace(plain, use_tags=use_tags)
        given = (question_rows(samples, contexts), question_rows(shown, of_shown), orders)
        return [answer or "" for answer in pica.answer_questions(lm, *given, settings)]

    def by_promptcap() -> list[str]:
        given = (question_rows(samples, aware), question_rows(shown, stated), similar)
        bare = [[dataclasses.replace(row, tags=()) for row in part] for part in given[:2]]
        return [answer or "" for answer in promptcap.answer_questions(lm, *bare, given[2])]

    no_context = (blank * len(samples), blank * len(shown))
    made = {
        "language model alone": lambda: by_pica(*no_context, similar),
        "PromptCap": by_promptcap,
        "PICa, captions": lambda: by_pica(generic, references, similar),
        "PICa, captions, random examples": lambda: by_pica(generic, references, drawn),
        "PICa, captions and tags": lambda: by_pica(generic, references, similar, True),
    }
    rows += [measured(run, name, "vqa", samples, make) for name, make in made.items()]
    return rows


def scene_references(model: Model, sample) -> list[str]:
    """The captions of the scene of a sample."""
    _, truth = sample.dataset.load_record(sample.record_index)
    rng = np.random.default_rng(0)
    return list(sample.dataset.make_example("caption", sample.record_index, truth, rng, 0.0).answers)


def table(results: Sequence[dict]) -> str:
    """The results in Markdown, captions first."""
    lines = ["| method | pictures | caption CIDEr | VQA accuracy | s a picture |", "|---|---|---|---|---|"]
    for result in results:
        low, high = result["interval"]
        figure = f"{result['score']:.2f} ({low:.2f} to {high:.2f})"
        cells = (figure, "") if result["task"] == "caption" else ("", figure)
        lines.append(f"| {result['row']} | {result['count']} | {' | '.join(cells)} | {result['seconds']:.2f} |")
    return "\n".join(lines)


def missed(results: Sequence[dict], recall: tuple[float, float]) -> list[str]:
    """A sentence for each margin that is missed; rows that were left out miss nothing."""
    sentences = [] if min(recall) >= LEAST_RECALL else [f"the scorer's recall is {recall}, below {LEAST_RECALL}"]
    for task, margins in MARGINS.items():
        scores = {result["row"]: result["score"] for result in results if result["task"] == task}
        for better, worse, least in margins:
            if better in scores and worse in scores and not scores[better] >= scores[worse] + least:
                difference = scores[better] - scores[worse]
                sentences.append(f"{task}: {better} exceeds {worse} by {difference:.2f}, less than {least}")
    return sentences


def main(run: Run) -> int:
    """Train what is missing, fill the table and print it; returns the exit code."""
    logging.basicConfig(level=logging.WARNING)
    models = {name: trained(run, name) for name in SYSTEMS}
    clip = dual_encoder.load(run.workdir / "tiny_clip")
    recall = recall_at_1(clip, scene_samples(models["tiny_clip"], "caption", "heldout", run.limit))
    print(f"recall at 1: {recall[0]:.2f} image to text, {recall[1]:.2f} text to image", file=sys.stderr, flush=True)
    results = [*caption_rows(run, models, clip), *answer_rows(run, models, clip)]
    lines = [
        table(results),
        "",
        f"CLIP's recall at 1 in {run.limit} held-out scenes: {recall[0]:.2f} of images, {recall[1]:.2f} of captions.",
        f"{sum(row['seconds'] * row['count'] for row in results):.0f} s for these rows, without training.",
    ]
    if run.smollm2 is None:
        lines.append("Rows that SmolLM2-135M answers were left out: no --smollm2.")
    if short := missed(results, recall):
        lines += ["Missed: " + "; ".join(short) + "."]
    print("\n".join(lines))
    (run.workdir / "results.json").write_text(json.dumps({"recall": recall, "rows": results}, indent=1) + "\n")
    if run.out is not None:
        run.out.write_text("\n".join(lines) + "\n")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Run, description=__doc__)))
