# SPDX-License-Identifier: Apache-2.0
"""Instruction data that a scripted engine writes from captions and boxes, against the hand-made mixture of scenes.

python -m benchmarks.data_engine [--seeds 0 1 2] [--limit 500] [--workdir runs/data_engine] [--out F]

The engine (`benchmarks/scripted_engine.py`) answers the requests of `lionjax synthesize` for LLaVA's three kinds, in
the place of a language model. It sees only what a request holds: captions and boxes of a training scene, and the forms
of questions that `--few-shot` names. A tiny LLaVA (configs/tiny_llava.py) is trained from one aligned projector once on
these records and once on the hand-made tasks that are answered in words, for as many updates, and both are asked about
the same held-out scenes, with things that no training scene has. In parentheses are 95 % bootstrap intervals.

The language model is an encoder-decoder, which learns only the last answer of a conversation: each round of the
records is an example of its own. `--whole-mixture` also trains on the config's whole mixture, with boxes.

Exits with code 1 unless the mean loss over the seeds is at most `MARGIN` in each benchmark.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

import lionjax
from benchmarks.frozen_lms_rows import handed_on
from benchmarks.scripted_engine import ScriptedEngine, write_few_shot
from lionjax.core import config
from lionjax.core.experiment import Experiment, Mix
from lionjax.core.files import read_json, write_json, write_jsonl
from lionjax.data import pipeline
from lionjax.data.datasets.conversations import Conversations
from lionjax.data.scenes import referring, tasks, world
from lionjax.data.scenes.dataset import Scenes
from lionjax.data.scenes.world import Scene
from lionjax.evaluation.metrics.regions import bootstrap_interval
from lionjax.evaluation.tasks import SCORERS, constant_answers
from lionjax.inference.model import Model
from lionjax.pipelines.image_contexts import ImageContext, read_contexts
from lionjax.pipelines.instructions import generation, llava_kinds
from lionjax.pipelines.instructions.few_shot import read_few_shot
from lionjax.pipelines.instructions.records import INSTRUCTIONS_FILE, to_record
from lionjax.training import loop

ROOT = Path(__file__).resolve().parent.parent
MARGIN = 0.05
BENCHMARKS = {"vqa": "VQA accuracy", "existence": "POPE accuracy"}
TARGET_TOKENS = 56  # of descriptions
ENGINE_DATA, HAND_MADE, WHOLE = "data engine", "hand-made, in words", "hand-made, whole mixture"


@dataclasses.dataclass(frozen=True)
class Run:
    """`limit`: held-out questions of each benchmark; `scenes`: training scenes; `steps`: updates after alignment."""

    seeds: tuple[int, ...] = (0, 1, 2)
    limit: int = 500
    scenes: int = 3000
    steps: int = 400
    whole_mixture: bool = False
    workdir: Path = Path("runs/data_engine")
    out: Path | None = None


# ------------------------------------------------------------------ data of the engine


def to_context(scene: Scene) -> ImageContext:
    """What annotators would say of a scene: five captions, two with patterns and sizes, and the things' boxes."""
    short, _, _, background, ends = tasks.scene_captions(scene)
    patterns, whole = (
        referring.join_phrases(referring.group_phrases(scene, attributes))
        for attributes in (("color", "texture", "shape"), tasks.ALL_ATTRIBUTES)
    )
    captions = (short, background, ends, f"A picture of {patterns}.", f"{whole[0].upper()}{whole[1:]}.")
    instances = tuple((referring.noun_phrase(thing), thing.box) for thing in scene.things)
    return ImageContext(scene.id, f"{scene.id}.png", captions, instances)


def write_scenes(run: Run, seed: int, folder: Path, image_size: int) -> list[ImageContext]:
    """Write images/ and caps_boxes.jsonl of the training scenes; returns the contexts as they are read back."""
    path, contexts = folder / "caps_boxes.jsonl", []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index in range(run.scenes):
        scene = world.sample_scene("train", index, seed)
        contexts.append(to_context(scene))
        Image.fromarray(scene.render(image_size)).save(folder / "images" / contexts[-1].image, compress_level=1)
    write_jsonl(path, [context.to_json() for context in contexts])
    return read_contexts(path)


def synthesize(contexts: Sequence[ImageContext], folder: Path, seed: int) -> dict[str, int]:
    """Make the records of LLaVA's kinds by the engine, and engine.json of their rounds; returns rounds by kind."""
    vocabulary = sorted({name for context in contexts for name, _ in context.instances})
    rounds, counts = [], {}
    for kind in llava_kinds.KINDS:
        few_shot = None
        if kind != "detail":
            few_shot = read_few_shot(write_few_shot(folder / "few_shot" / kind, kind, vocabulary))
        settings = generation.GenerationSettings(kind, seed=seed)
        images = generation.Images(folder / "images")
        report = generation.synthesize(settings, contexts, ScriptedEngine(), folder / kind, images, few_shot)
        if report["refused"]:
            raise SystemExit(f"{kind}: refused {report['refused']}")
        made = [part for record in read_json(folder / kind / INSTRUCTIONS_FILE) for part in split_rounds(record)]
        counts[kind] = len(made)
        rounds += made
    write_json(folder / "engine.json", rounds)
    return counts


def split_rounds(record: dict) -> list[dict]:
    """A record of each round of a conversation about one image."""
    texts = [message["value"].replace("<image>", "").strip() for message in record["conversations"]]
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return [to_record(f"{record['id']}-{k}", record["image"], [pair]) for k, pair in enumerate(pairs)]


# ------------------------------------------------------------------ training


def experiments(run: Run, seed: int, folder: Path) -> tuple[Experiment, dict[str, Experiment]]:
    """(alignment, {data: instruction tuning}) of a seed; the tuning starts from the aligned projector."""
    whole = config.load(ROOT / "configs" / "tiny_llava.py")
    align, instruct = whole.stages
    image_size = whole.data.processor.image_size
    scenes = Scenes(sizes=(run.scenes, 300, run.limit), image_size=image_size, seed=seed)
    processor = dataclasses.replace(whole.data.processor, max_target_tokens=TARGET_TOKENS)
    data = dataclasses.replace(whole.data, sources=(scenes,), processor=processor)
    base = dataclasses.replace(whole, data=data, stages=(align,), seed=seed)
    instruct = dataclasses.replace(instruct, steps=run.steps)
    engine_data = Conversations(str(folder / "engine.json"), image_dir=str(folder / "images"))
    words = tuple(mix for mix in instruct.mixture if mix.task != "rec")
    parts = {
        HAND_MADE: (scenes, words),
        ENGINE_DATA: (engine_data, (Mix("conversation"),)),
        WHOLE: (scenes, instruct.mixture),
    }
    language = tuple(weights for weights in whole.weights if weights[0] != "projector")
    tuned = {}
    for name, (source, mixture) in parts.items():
        stage = dataclasses.replace(instruct, mixture=mixture)
        part = dataclasses.replace(data, sources=(source,))
        weights = (*language, ("projector", str(folder / "align" / "handed_on.safetensors")))
        tuned[name] = dataclasses.replace(base, data=part, stages=(stage,), weights=weights)
    return base, tuned


def train(experiment: Experiment, folder: Path) -> tuple[Model, float]:
    """(model, CPU seconds of all threads) of an experiment."""
    start = time.process_time()
    loop.train(experiment, folder, pipeline.batches)
    return lionjax.load(folder), time.process_time() - start


def answer_all(model: Model, samples: Sequence, blind: bool = False) -> list[str]:
    """The model's answers to samples, for `blind` about black images."""
    images = [np.zeros_like(np.asarray(s.image)) if blind else s.image for s in samples]
    return [answer.text for answer in model.answer(images, [s.example.question for s in samples])]


def measure_seed(run: Run, seed: int) -> list[dict]:
    """The rows of a seed: for each data and benchmark whether each answer is right."""
    folder = run.workdir / f"seed_{seed}"
    alignment, tuned = experiments(run, seed, folder)
    contexts = write_scenes(run, seed, folder, alignment.data.processor.image_size)
    counts = synthesize(contexts, folder, seed)
    print(f"seed {seed}: {counts}", file=sys.stderr, flush=True)
    train(alignment, folder / "align")
    handed_on(folder / "align", ("projector",))
    questions = {task: list(pipeline.examples(alignment.data, task, "heldout", run.limit)) for task in BENCHMARKS}
    shown = {task: list(pipeline.examples(alignment.data, task, "train", 200)) for task in BENCHMARKS}
    rows = []
    for name, experiment in tuned.items():
        if name == WHOLE and not run.whole_mixture:
            continue
        model, seconds = train(experiment, folder / name.split(",")[-1].strip().replace(" ", "_"))
        for task, samples in questions.items():
            texts = {name: answer_all(model, samples)}
            if name == ENGINE_DATA:
                texts["data engine, blind"] = answer_all(model, samples, blind=True)
                known = [sample.example for sample in shown[task]]
                texts["most frequent answer"] = constant_answers(task, known, [s.example for s in samples])
            for label, found in texts.items():
                rows.append(scored(seed, label, task, samples, found) | {"seconds": seconds})
                print({k: v for k, v in rows[-1].items() if k != "right"}, file=sys.stderr, flush=True)
    return rows


def scored(seed: int, data: str, task: str, samples: Sequence, texts: Sequence[str]) -> dict:
    """A row: the score of each answer, their mean, and means by kind of question."""
    right = np.array(SCORERS[task]([sample.example for sample in samples], texts).sample_scores, float)
    kinds = np.array([sample.example.kind for sample in samples])
    by_kind = {kind: round(float(right[kinds == kind].mean()), 3) for kind in sorted(set(kinds.tolist()))}
    return {
        "seed": seed,
        "data": data,
        "task": task,
        "mean": float(right.mean()),
        "kinds": by_kind,
        "right": right.tolist(),
    }


# ------------------------------------------------------------------ the table


def figure(values: np.ndarray, sign: str = "") -> str:
    """The mean of per-question values with its bootstrap interval."""
    low, high = bootstrap_interval(values, 0)
    return f"{values.mean():{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def spread(values: np.ndarray) -> str:
    """The standard error of a mean over seeds, in words."""
    if len(values) == 1:
        return "one seed"
    return f"standard error {values.std(ddof=1) / len(values) ** 0.5:.3f} of {len(values)} seeds"


def table(rows: Sequence[dict]) -> tuple[str, float]:
    """(tables in Markdown, greatest mean loss against the hand-made data in words)."""
    found = {(row["seed"], row["data"], row["task"]): np.array(row["right"]) for row in rows}
    seeds, names = (list(dict.fromkeys(key[k] for key in found)) for k in (0, 1))
    lines = ["| seed | data | " + " | ".join(BENCHMARKS.values()) + " |", "|" + "---|" * (2 + len(BENCHMARKS))]
    losses = {}
    for seed in seeds:
        for name in names:
            lines.append(f"| {seed} | {name} | {' | '.join(figure(found[seed, name, task]) for task in BENCHMARKS)} |")
        for task in BENCHMARKS:
            losses[seed, task] = found[seed, HAND_MADE, task] - found[seed, ENGINE_DATA, task]
        lines.append(f"| {seed} | loss | {' | '.join(figure(losses[seed, task], '+') for task in BENCHMARKS)} |")
    by_seed = {task: np.array([losses[seed, task].mean() for seed in seeds]) for task in BENCHMARKS}
    means = {task: float(values.mean()) for task, values in by_seed.items()}
    lines += ["", "| by kind, mean of the seeds | " + " | ".join(names) + " |", "|" + "---|" * (1 + len(names))]
    for task in BENCHMARKS:
        parts = {name: [row["kinds"] for row in rows if (row["data"], row["task"]) == (name, task)] for name in names}
        for kind in parts[HAND_MADE][0]:
            cells = [f"{np.mean([part[kind] for part in parts[name] if kind in part]):.3f}" for name in names]
            lines.append(f"| {task}, {kind} | {' | '.join(cells)} |")
    texts = [f"{label} {means[task]:+.3f} ({spread(by_seed[task])})" for task, label in BENCHMARKS.items()]
    lines += ["", f"Mean loss against the hand-made data: {', '.join(texts)}; asked: at most {MARGIN}."]
    return "\n".join(lines) + "\n", max(means.values())


def main(run: Run) -> int:
    """Measure the seeds, print and write the tables; the exit code."""
    logging.basicConfig(level=logging.WARNING)
    rows = []
    for seed in run.seeds:
        path = run.workdir / f"seed_{seed}" / f"rows_{run.limit}.json"
        if not path.is_file():
            write_json(path, measure_seed(run, seed))
        rows += json.loads(path.read_text())
    text, loss = table(rows)
    print(text)
    if run.out:
        run.out.write_text(text, encoding="utf-8")
    return int(loss > MARGIN)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Run, description=__doc__)))
