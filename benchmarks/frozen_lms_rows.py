# SPDX-License-Identifier: Apache-2.0
"""Rows of the table of frozen language models: measured once, kept in the work folder, compared in pairs."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import lionjax
from lionjax.core import config
from lionjax.core import params as trees
from lionjax.core.experiment import Experiment, Weights
from lionjax.data import pipeline
from lionjax.evaluation import tasks
from lionjax.evaluation.metrics.regions import bootstrap_interval
from lionjax.inference.dual_encoder import DualEncoder
from lionjax.inference.model import Model
from lionjax.pipelines.captions_as_text import CaptionedQuestion
from lionjax.pipelines.loaded_model import LoadedModel
from lionjax.pipelines.pica import ExampleFeatures
from lionjax.training import loop

ROOT = Path(__file__).resolve().parent.parent
KEYS = {"caption": "caption_cider", "vqa": "vqa_accuracy"}
PROMPT_TOKENS = 352  # the longest prompt with four examples has fewer; a longer limit is computed as padding


@dataclasses.dataclass(frozen=True)
class Run:
    """`limit`: held-out scenes; `zerocap_limit`: scenes of ZeroCap, which is slow; `question_limit`: questions.

    `coco`: a folder with captions.json and instances.json; without it, and without easy-VQA, these rows are left out.
    """

    workdir: Path = Path("runs/frozen_lms")
    smollm2: Path | None = None
    coco: Path | None = None
    limit: int = 100
    zerocap_limit: int = 20
    question_limit: int = 100
    out: Path | None = None


def measured(run: Run, part: str, name: str, task: str, examples: Sequence, make: Callable[[], Sequence[str]]) -> dict:
    """One row: score, interval and each example's score of the texts that `make` returns; kept in the work folder.

    `part`: the data, such as "scenes"; `examples` have the references as `answers`.
    """
    file = run.workdir / "rows" / f"{part}, {task}, {name}, {len(examples)}.json"
    if file.is_file():
        return json.loads(file.read_text())
    start = time.perf_counter()
    texts = list(make())
    seconds = (time.perf_counter() - start) / len(examples)
    scores, key = tasks.SCORERS[task](examples, texts), KEYS[task]
    row = {"part": part, "row": name, "task": task, "count": len(texts), "score": scores.metrics[key]}
    row |= {"interval": scores.bootstrap_intervals()[key], "seconds": seconds, "first": texts[0]}
    print(json.dumps(row), file=sys.stderr, flush=True)
    row |= {"scores": np.asarray(scores.per_sample[key][0], float).tolist(), "texts": texts}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(row) + "\n")
    return row


def difference(better: dict, worse: dict) -> tuple[float, float, float]:
    """The difference of two rows about the same examples, and its 95 % bootstrap interval over them."""
    by_example = np.array(better["scores"]) - np.array(worse["scores"])
    return float(by_example.mean()), *bootstrap_interval(by_example, 0)


def load_config(run: Run, name: str) -> Experiment:
    """A config of configs/; PromptCap's captioner starts from a model that sees, as the paper's does."""
    experiment = config.load(ROOT / "configs" / f"{name}.py")
    if name != "tiny_promptcap":
        return experiment
    weights = (experiment.weights[0], *handed_on(run.workdir / "tiny_llava", ("projector", "language")))
    return dataclasses.replace(experiment, weights=weights)


def trained(run: Run, name: str, experiment: Experiment | None = None) -> Model:
    """The model of a config, trained in the work folder where it is not finished there."""
    loop.train(experiment or load_config(run, name), run.workdir / name, pipeline.batches)
    return lionjax.load(run.workdir / name)


def handed_on(folder: Path, parts: Sequence[str]) -> list[Weights]:
    """Parts of a trained run as initial weights of another one."""
    file = folder / "handed_on.safetensors"
    if not file.is_file():
        flat = trees.flatten(lionjax.load(folder).params)
        save_file({path: np.array(leaf) for path, leaf in flat.items() if path.split("/")[0] in parts}, file)
    return [Weights(part, str(file)) for part in parts]


def clip_features(clip: DualEncoder, samples: Sequence) -> ExampleFeatures:
    """CLIP's embeddings of the questions and images."""
    questions = clip.embed_texts([sample.example.question for sample in samples])
    return ExampleFeatures(questions, clip.embed_images([sample.image for sample in samples]))


def captioned(samples: Sequence, captions: Sequence[Sequence[str]], with_tags: bool = False) -> list[CaptionedQuestion]:
    """The questions of samples with their answers and the given captions, and their tags if asked for."""
    return [
        CaptionedQuestion(s.example.question, tuple(texts), s.example.tags if with_tags else (), s.example.answers)
        for s, texts in zip(samples, captions, strict=True)
    ]


@functools.cache
def language_model(folder: Path) -> LoadedModel:
    """SmolLM2-135M of a converted folder, or of a Hugging Face one."""
    return LoadedModel(lionjax.load(folder, prompt_length=PROMPT_TOKENS), "SmolLM2-135M")


def table(results: Sequence[dict], part: str) -> str:
    """The rows of one part in Markdown."""
    lines = ["| method | examples | caption CIDEr | VQA accuracy | s each |", "|---|---|---|---|---|"]
    for result in (row for row in results if row["part"] == part):
        low, high = result["interval"]
        figure = f"{result['score']:.2f} ({low:.2f} to {high:.2f})"
        cells = (figure, "") if result["task"] == "caption" else ("", figure)
        lines.append(f"| {result['row']} | {result['count']} | {' | '.join(cells)} | {result['seconds']:.2f} |")
    return "\n".join(lines)
