# SPDX-License-Identifier: Apache-2.0
"""PromptCap's data creation and its filter: captioners trained on what SmolLM2 wrote, with and without the filter.

SmolLM2 is shown the caption of a training scene, a question and its answer, and samples captions that help to answer.
The filter asks it the question with each caption, and keeps those from which it finds the answer. Two captioners start
from the same parameters and train for as many steps: one on the first sample of each question, as in PromptCap's own
examples without a filter, the other on the best kept one of each question that has any.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.frozen_lms_rows import Run, captioned, clip_features, language_model, load_config, trained
from lionjax.core.experiment import Mix
from lionjax.data import pipeline
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.scenes.question_captions import statement
from lionjax.inference.dual_encoder import DualEncoder
from lionjax.inference.model import Model
from lionjax.pipelines import pica, promptcap
from lionjax.pipelines.pica import PicaConfig

NUM_QUESTIONS, NUM_SAMPLES, NUM_SHOTS, STEPS = 200, 2, 4, 150
CREATED, FILTERED = "created", "created, filtered"
# Examples of our own for scenes; the caption of a scene is its context.
FEW_SHOT = """Summarize the contexts in one sentence that helps to answer the question.

Original contexts: Two red stars, a blue ring and a green square.
Question: How many stars can you see?
Answer: 2
Summary: There are 2 stars.

Original contexts: A picture of a pink cross and two orange diamonds.
Question: What color is the cross?
Answer: pink
Summary: The cross is pink.

Original contexts: A purple heart and a cyan circle on a plain background.
Question: Is the heart cyan?
Answer: no
Summary: No, the heart is not cyan."""


def created_captions(run: Run, clip: DualEncoder, samples: Sequence, references: Sequence) -> list[list[dict]]:
    """For each training question its candidates: caption, answer found from it and scores; kept in the work folder.

    `references`: the captions of the scenes of `samples`. The examples of the filter are other questions of them.
    """
    file = run.workdir / "created" / f"candidates, {len(samples)}, {NUM_SAMPLES}.json"
    if file.is_file():
        return json.loads(file.read_text())
    model = language_model(run.smollm2)
    first = [texts[:1] for texts in references]
    created = promptcap.create_captions(model, captioned(samples, first), NUM_SAMPLES, FEW_SHOT)
    stated = [[statement(s.example.question, s.example.answer)] for s in samples]
    embedded = clip_features(clip, samples)
    features = embedded.joint("imagequestion")
    orders = [promptcap.select_shots(row, features, NUM_SHOTS, skip_self=True) for row in features]
    rows = captioned(samples, stated)
    scored = promptcap.score_candidates(model, rows, created, rows, orders)
    found = [[dataclasses.asdict(candidate) for candidate in candidates] for candidates in scored]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")
    return found


def training_captions(candidates: Sequence[Sequence[dict]]) -> dict[str, list[str]]:
    """For each of the two captioners the caption of each question, "" for none."""
    scored = [[promptcap.ScoredCaption(**one) for one in group] for group in candidates]
    kept = [promptcap.keep_best(group) for group in scored]
    return {
        CREATED: [group[0].caption if group else "" for group in scored],
        FILTERED: [group[0] if group else "" for group in kept],
    }


def captioners(run: Run, clip: DualEncoder, samples: Sequence, references: Sequence) -> tuple[dict[str, Model], dict]:
    """The two captioners, and what was created: the number of captions and how many are right.

    A caption is right if it is the statement that the answer makes, up to case and its last period.
    """
    captions = training_captions(created_captions(run, clip, samples, references))
    models, counts = {}, {}
    for name, texts in captions.items():
        folder = run.workdir / "created" / name.replace(", ", "_")
        rows = [(s, text) for s, text in zip(samples, texts) if text]
        true = [statement(s.example.question, s.example.answer) for s, _ in rows]
        right = [same_text(text, reference) for (_, text), reference in zip(rows, true)]
        counts[name] = {"captions": len(rows), "right": float(np.mean(right))}
        print(name, counts[name], [text for _, text in rows[:3]], file=sys.stderr, flush=True)
        models[name] = trained(run, f"created/{folder.name}_captioner", experiment_on(run, folder, rows))
    return models, counts


def same_text(text: str, reference: str) -> bool:
    """Whether two captions are equal up to case and the last period."""
    return text.lower().rstrip(". ") == reference.lower().rstrip(". ")


def experiment_on(run: Run, folder: Path, rows: Sequence) -> object:
    """The experiment of tiny_promptcap with created captions, written to `folder`, in the place of the true ones."""
    experiment = load_config(run, "tiny_promptcap")
    file = folder / "created.jsonl"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for number, (sample, text) in enumerate(rows):
            Image.fromarray(np.asarray(sample.image)).save(folder / f"{number:05d}.png")
            question = promptcap.captioner_prompt(sample.example.question)
            lines.append(json.dumps({"image": f"{number:05d}.png", "question": question, "answers": [text]}))
        file.write_text("\n".join(lines) + "\n")
    sources = (JsonLines(str(file), str(folder), name="created"), experiment.data.sources[-1])
    (stage,) = experiment.stages
    mixture = (Mix("vqa", 3.0, source="created"), *stage.mixture[1:])
    return dataclasses.replace(
        experiment,
        name="tiny_promptcap_created",
        data=dataclasses.replace(experiment.data, sources=sources),
        stages=(dataclasses.replace(stage, steps=STEPS, mixture=mixture),),
    )


def questions_to_create(models: dict[str, Model]) -> list:
    """Questions of training scenes about which captions are created."""
    return list(pipeline.examples(models["tiny_clip"].experiment.data, "vqa", "train", NUM_QUESTIONS, seed=1))


def examples_of_one_kind(samples: Sequence, shown: Sequence, orders: Sequence[Sequence[int]]) -> float:
    """The share of chosen examples whose question is of the kind of the asked one: count, color, shape, yes or no."""
    hits = [shown[k].example.kind == s.example.kind for s, order in zip(samples, orders) for k in order]
    return float(np.mean(hits))


def similar_orders(clip: DualEncoder, samples: Sequence, shown: Sequence, config: PicaConfig) -> list[list[int]]:
    """For each question the examples that CLIP finds most similar, the most similar first."""
    return pica.similar_examples(clip_features(clip, samples), clip_features(clip, shown), config)
