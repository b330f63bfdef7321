# SPDX-License-Identifier: Apache-2.0
"""Train the tiny Lyrics on refined scenes, and compare it without regions and with regions of other images.

python -m benchmarks.lyrics [--workdir runs/lyrics] [--seeds 0 1 2] [--variants refined shuffled none] [--limit 200]

Experts are trained first (see `benchmarks.lyrics_experts`), then the scenes are refined with them, as by `lionjax data
build scenes --refiner`. For each seed and variant, configs/tiny_lyrics_first.py and configs/tiny_lyrics.py are trained.
Variants: "refined", "shuffled" (every image has the regions and boxes of another, in training and evaluation), "none"
(no region, no box).

Columns: image-text retrieval (R@1 in batches of 32, both directions); accuracy on masked tags, in parentheses with the
regions of other images, with their pixels too, and that of the most frequent tag; VQA, caption CIDEr and REC, in
parentheses those of the same model without image and regions. REC of the detector's best box for the expression stands
below. The refined variant of each seed must meet `MARGINS`; else the exit code is 1. Finished rows are reused, so that
rows can be made one by one (`--seeds 1 --variants none`) and shown together by a last command that names them all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import safetensors.numpy
import tyro

import lionjax
from benchmarks.family import BRIDGE, ROOT, Spent
from benchmarks.lyrics_experts import train_experts
from lionjax.core import config
from lionjax.core import params as trees
from lionjax.core.experiment import Experiment
from lionjax.core.files import folder_digest
from lionjax.core.types import Params
from lionjax.data import pipeline
from lionjax.data.box_text import pack_text
from lionjax.data.prepare import array_record_writer
from lionjax.data.processor import Processor
from lionjax.data.regions import ImageRegions
from lionjax.data.samples import Sample
from lionjax.data.scenes import referring, world
from lionjax.data.scenes.dataset import OpenScenes
from lionjax.evaluation import runner
from lionjax.evaluation.metrics import regions
from lionjax.inference import detector
from lionjax.inference.loading import from_params
from lionjax.pipelines import refiner
from lionjax.training import loop
from lionjax.training.init import resolve_weights_file

Variant = Literal["refined", "shuffled", "none"]
BATCH = 32
TEXT_LENGTHS = (64, 128, 192, 256, 384)  # tokens of a prompt with the boxes as text
REGION_CUTS = (24, 16, 8, 4, 2)
SCORES = {"vqa": "vqa_accuracy", "caption": "caption_cider", "rec": "rec_accuracy_50"}
# Required of the refined variant; masked tags over the most frequent one, VQA and CIDEr over the blind model.
MARGINS = {"retrieval": 0.60, "masked_tags": 0.0, "vqa": 0.15, "caption": 0.5, "rec": 0.50}


@dataclasses.dataclass(frozen=True)
class Run:
    """What to train, and the questions per benchmark.

    `experts`: a refiner's folder to use, such as `shipped:tiny_lyrics/origin/refiner`; empty: they are trained.
    `spatial_text`: the trained models go on with the boxes as text before half of the questions, and are asked with and
    without it. `cuts`: the refined model of the first seed also answers with fewer regions.
    """

    workdir: Path = Path("runs/lyrics")
    seeds: tuple[int, ...] = (0,)
    variants: tuple[Variant, ...] = ("refined", "shuffled", "none")
    limit: int = 200
    experts: str = ""
    spatial_text: bool = False
    cuts: bool = False
    out: Path | None = None


@contextlib.contextmanager
def regions_by(variant: Variant) -> Iterator[None]:
    """Within it, scenes have their own regions, those of another scene of their split, or none."""
    load = OpenScenes.load_regions

    def changed(self, record: int) -> ImageRegions | None:
        if variant == "none":
            return ImageRegions(digest=load(self, record).digest)
        return load(self, (record + len(self) // 2) % len(self) if variant == "shuffled" else record)

    OpenScenes.load_regions = changed
    try:
        yield
    finally:
        OpenScenes.load_regions = load


def refine_scenes(workdir: Path, experts: str = "") -> Path:
    """The folder of the scenes of tiny_lyrics_first.py with what the refiner found in them; `experts`: see `Run`."""
    home = workdir / "refiner"
    if not experts:
        train_experts(home)
    elif not home.is_dir():
        shutil.copytree(resolve_weights_file(experts), home)
    (scenes,) = config.load(ROOT / "configs" / "tiny_lyrics_first.py").data.sources
    factory = refiner.refiner_factory(home)
    # Of the detector's parameters and not of its run folder, whose logs change.
    settings = (home / refiner.SETTINGS_FILE).read_text()
    digest = f"{detector.load(home / 'detector').digest} {folder_digest(home / 'tagger')} {settings}"
    scenes = dataclasses.replace(scenes, folder="")
    return array_record_writer.build(scenes, workdir / "data", make_refiner=factory, tagger_digest=digest)


def experiment_of(name: str, folder: Path, seed: int) -> Experiment:
    """A config of configs/ on the refined scenes in `folder`; all rows share the features of the frozen tower."""
    experiment = config.load(ROOT / "configs" / f"{name}.py")
    sources = (dataclasses.replace(experiment.data.sources[0], folder=str(folder)),)
    data = dataclasses.replace(experiment.data, sources=sources)
    settings = dataclasses.replace(experiment.run, feature_cache_dir=str(folder.parent / "features"))
    return dataclasses.replace(experiment, data=data, run=settings, seed=seed)


def with_spatial_text(experiment: Experiment, share: float = 1.0) -> Experiment:
    """The last stage alone, with the boxes as text before this share of the questions, cut to a batch's longest."""
    lengths = {"max_prompt_tokens": TEXT_LENGTHS[-1], "spatial_text_in_prompt": share > 0}
    processor = dataclasses.replace(experiment.data.processor, **lengths)
    data = dataclasses.replace(experiment.data, processor=processor, length_buckets=TEXT_LENGTHS, tag_dropout=1 - share)
    return dataclasses.replace(experiment, data=data, stages=experiment.stages[-1:])


def caption_batches(experiment: Experiment, number: int, captions: bool) -> Iterator:
    """Batches of held-out scenes as the first stage reads them; scenes without a box are left out.

    The tag of the strongest box is masked. Without `captions`, the texts have no caption, which would name it.
    """
    processor, rng, rows = Processor(experiment.data.processor), np.random.default_rng(0), []
    tokens = processor.prompt.question_tokenizer
    asked = {"mask_probability": 0.5, "tag_mask_probability": None}
    packing = dataclasses.replace(processor.config.packing, **asked)
    for sample in pipeline.examples(experiment.data, "caption", "heldout"):
        (found,) = sample.load_regions()
        if found.names or captions:
            draws = np.ones(5 * len(found.names))
            draws[:1] = 0  # the strongest box, which is never cut
            text = sample.example.answer if captions else ""
            packed = pack_text(tokens, text, found.names, found.boxes, draws, packing)
            row = processor.encode_example(processor.load_pixels(sample.image), "a scene", answer=text or None)
            row |= processor.encode_regions([found], text, rng)
            rows.append(row | {f"packed_{name}": ids for name, ids in packed.items()})
        if len(rows) == BATCH:
            yield processor.collate({name: np.stack([row[name] for row in rows]) for name in rows[0]})
            rows, number = [], number - 1
        if not number:
            return


def first_stage_scores(experiment: Experiment, params: Params) -> dict[str, list[float] | float]:
    """Retrieval, and the accuracy on masked tags.

    As they are, with regions of other images, with regions and pixels of other images, and of the most frequent tag.
    """
    model = experiment.model
    similarity, loss = jax.jit(model.similarity), jax.jit(model.loss)
    right = []
    for batch in caption_batches(experiment, 6, captions=True):
        score_BB = np.asarray(similarity(params, batch))
        right += [score_BB.argmax(axis) == np.arange(BATCH) for axis in (0, 1)]
    accuracy, labels = {"own": [], "regions": [], "all": []}, Counter()
    for batch in caption_batches(experiment, 6, captions=False):
        labels.update(batch.packed.msp_label_BL[batch.packed.msp_label_BL >= 0].tolist())
        rolled = {name: np.roll(getattr(batch, name), 1, axis=0) for name in ("region_BKD", "region_mask_BK")}
        others = dataclasses.replace(batch, **rolled)
        every = dataclasses.replace(others, image_BHWC=np.roll(batch.image_BHWC, 1, axis=0))
        for name, one in (("own", batch), ("regions", others), ("all", every)):
            accuracy[name].append(float(loss(params, one)[1]["masked_accuracy"]))
    tags = []  # of images without boxes
    if labels:
        tags = [*(float(np.mean(values)) for values in accuracy.values()), max(labels.values()) / labels.total()]
    return {"retrieval": float(np.mean(right)), "masked_tags": tags}


def hand_on(params: Params, file: Path, parts: tuple[str, ...] = BRIDGE) -> tuple[tuple[str, str], ...]:
    """Write these parts of a model, all for "", for the next training; the entries of `weights` for it."""
    flat = trees.flatten(params)
    chosen = {path: np.asarray(leaf) for path, leaf in flat.items() if parts == ("",) or path.split("/")[0] in parts}
    safetensors.numpy.save_file(chosen, file)
    return tuple((name, str(file)) for name in parts)


def first_stage(run: Run, folder: Path, variant: Variant, seed: int) -> dict:
    """Scores of the first stage, its seconds, and the `weights` that start the second; a finished one is kept."""
    home, spent = run.workdir / f"{variant}-{seed}-first", Spent()
    if not (home / "row.json").is_file():
        shutil.rmtree(home, ignore_errors=True)  # restart, so that the seconds are those of a complete run
        experiment = experiment_of("tiny_lyrics_first", folder, seed)
        with regions_by(variant):
            params, _ = loop.train(experiment, home, pipeline.batches)
            row = first_stage_scores(experiment, params)
        row |= {"weights": hand_on(params, home / "bridge.safetensors"), "seconds": spent.seconds()}
        (home / "row.json").write_text(json.dumps(row) + "\n")
    return json.loads((home / "row.json").read_text())


def trained(run: Run, folder: Path, variant: Variant, seed: int) -> dict:
    """The row of one variant and seed, which is trained first if it has no row yet."""
    home = run.workdir / f"{variant}-{seed}"
    if (home / "row.json").is_file():
        return json.loads((home / "row.json").read_text())
    row, spent = {"variant": variant, "seed": seed} | first_stage(run, folder, variant, seed), Spent()
    experiment = experiment_of("tiny_lyrics", folder, seed)
    weights = (*experiment.weights, *map(tuple, row.pop("weights")))
    return second_stage(run, dataclasses.replace(experiment, weights=weights), row, home, spent)


def trained_with_text(run: Run, folder: Path, variant: Variant, seed: int) -> list[dict]:
    """The rows of one variant and seed that goes on with the boxes as text in half of the prompts: before all, none."""
    before, home = run.workdir / f"{variant}-{seed}", run.workdir / f"{variant}-{seed}-text"
    first, names, spent = trained(run, folder, variant, seed), ("with boxes as text", "asked without them"), Spent()
    if (home / "row.json").is_file():
        return [first, *json.loads((home / "row.json").read_text())]
    weights = hand_on(lionjax.load(before).params, before / "whole.safetensors", ("",))
    experiment = dataclasses.replace(experiment_of("tiny_lyrics", folder, seed), weights=weights)
    params = train_again(with_spatial_text(experiment, 0.5), home, variant)
    rows = []
    for name, share in zip(names, (1.0, 0.0)):
        scores = evaluated(run, with_spatial_text(experiment, share), params, home / name.split()[0], variant)
        rows.append(first | scores | {"variant": f"{variant}, {name}"})
    for row in rows:
        row["seconds"] = [sum(pair) for pair in zip(first["seconds"], spent.seconds())]
    (home / "row.json").write_text(json.dumps(rows) + "\n")
    return [first, *rows]


def second_stage(run: Run, experiment: Experiment, row: dict, home: Path, spent: Spent) -> dict:
    """Train and evaluate the second stage; `row` with its scores, which is written to `home`."""
    params = train_again(experiment, home, row["variant"])
    row = row | evaluated(run, experiment, params, home, row["variant"])
    row["seconds"] = [sum(pair) for pair in zip(row["seconds"], spent.seconds())]
    (home / "row.json").write_text(json.dumps(row) + "\n")
    return row


def train_again(experiment: Experiment, home: Path, variant: Variant) -> Params:
    """Parameters trained from the beginning, so that the seconds are those of a complete run."""
    shutil.rmtree(home, ignore_errors=True)
    with regions_by(variant):
        return loop.train(experiment, home, pipeline.batches)[0]


def evaluated(run: Run, experiment: Experiment, params: Params, home: Path, variant: Variant) -> dict:
    """The scores of all tasks, whose answers are written to `home`."""
    with regions_by(variant):
        engine = from_params(experiment, params).engine
        return scores_of(runner.evaluate_all(engine, experiment, list(SCORES), home, run.limit))


def scores_of(entries: dict[str, dict]) -> dict[str, list[float]]:
    """{task: its score, and that of the same model without image and regions}."""
    return {
        task: [round(entry[what][SCORES[task]], 3) for what in ("metrics", "blind")] for task, entry in entries.items()
    }


def cut_table(run: Run, seed: int) -> str:
    """Scores of a refined model by the number of regions that it reads of each image, as `data build --regions` cuts.

    Changed: share of the answers that differ from those with all regions.
    """
    home = run.workdir / f"refined-{seed}"
    model, answers, lines = lionjax.load(home), {}, []
    for number in REGION_CUTS:
        processor = dataclasses.replace(model.processor.config, max_regions=number)
        experiment = dataclasses.replace(
            model.experiment, data=dataclasses.replace(model.experiment.data, processor=processor)
        )
        engine, out = from_params(experiment, model.params).engine, home / f"regions-{number}"
        scores = scores_of(runner.evaluate_all(engine, experiment, list(SCORES), out, run.limit))
        texts = [(out / "evaluation" / f"{task}.jsonl").read_text().splitlines() for task in SCORES]
        answers[number] = [[json.loads(line)["prediction"] for line in task] for task in texts]
        changed = [
            np.mean([one != other for one, other in zip(*pair)])
            for pair in zip(answers[number], answers[REGION_CUTS[0]])
        ]
        cells = [f"{scores[task][0]:.2f}" for task in SCORES] + [f"{share:.2f}" for share in changed]
        lines.append(f"| {number} | " + " | ".join(cells) + " |")
    head = ["regions", "VQA", "caption CIDEr", "REC", *(f"changed, {task}" for task in SCORES)]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines])


def expression_of(sample: Sample) -> str:
    """The referring expression in the question of a scene's example."""
    split, _, index = sample.example.scene.split("-")
    scene, (target,) = world.sample_scene(split, int(index)), sample.example.targets
    expressions = referring.referring_expressions(scene, target)
    return max(
        (text for text in expressions if text in sample.example.question), key=len, default=sample.example.question
    )


def detector_rec(run: Run, folder: Path) -> float:
    """Share of referring expressions whose best-scored box of the detector has IoU > 0.5 with the true one; kept."""
    file = run.workdir / f"detector-{run.limit}.json"
    if file.is_file():
        return json.loads(file.read_text())
    data = experiment_of("tiny_lyrics", folder, 0).data
    samples = list(pipeline.examples(data, "rec", "heldout", run.limit))
    expressions = list(map(expression_of, samples))
    found = detector.load(run.workdir / "refiner" / "detector").detect(
        [sample.image for sample in samples], expressions, box_threshold=0.0
    )
    truth = [sample.example.boxes[0] for sample in samples]
    boxes = [tuple(np.clip(result.boxes_K4[0], 0, 1).tolist()) for result in found]
    accuracy = float(np.mean(regions.rec_ious(boxes, truth) > 0.5))
    file.write_text(json.dumps(accuracy) + "\n")
    return accuracy


def table(rows: list[dict]) -> str:
    """The rows in Markdown, and the mean and spread of each variant with several seeds; nan: there is no masked tag."""
    lines = [
        "| regions | seed | R@1 in 32 | masked tags | VQA | caption CIDEr | REC | seconds, CPU |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        own, *others = row["masked_tags"] or [float("nan")] * 4
        cells = [
            row["variant"],
            str(row["seed"]),
            f"{row['retrieval']:.2f}",
            f"{own:.2f} ({', '.join(f'{share:.2f}' for share in others)})",
        ]
        cells += [f"{row[task][0]:.2f} ({row[task][1]:.2f})" for task in SCORES]
        lines.append("| " + " | ".join((*cells, "{}, {}".format(*row["seconds"]))) + " |")
    for variant in dict.fromkeys(row["variant"] for row in rows):
        group = [row for row in rows if row["variant"] == variant]
        if len(group) > 1:
            values = [[row["retrieval"] for row in group], [(row["masked_tags"] or [float("nan")])[0] for row in group]]
            values += [[row[task][0] for row in group] for task in SCORES]
            cells = [f"{np.mean(column):.2f} ± {np.std(column, ddof=1):.2f}" for column in values]
            lines.append(f"| {variant} | mean | " + " | ".join(cells) + " | |")
    return "\n".join(lines)


def missed(rows: list[dict], detector_accuracy: float) -> list[str]:
    """A sentence for each requirement that the refined rows of a seed miss; REC counts in its best form."""
    row, best_rec = rows[0], max(row["rec"][0] for row in rows)
    needed = {
        "retrieval": (row["retrieval"], MARGINS["retrieval"]),
        "masked_tags": (row["masked_tags"][0], row["masked_tags"][-1] + MARGINS["masked_tags"]),
        "vqa": (row["vqa"][0], row["vqa"][1] + MARGINS["vqa"]),
        "caption": (row["caption"][0], row["caption"][1] + MARGINS["caption"]),
        "rec": (best_rec, max(MARGINS["rec"], detector_accuracy)),
    }
    where = f"{row['variant']}, seed {row['seed']}"
    return [
        f"{where}: {name} {got:.2f} is not above {least:.2f}" for name, (got, least) in needed.items() if got <= least
    ]


def show(run: Run, text: str) -> None:
    """Write what is known so far to `out`, if there is one."""
    if run.out is not None:
        run.out.write_text(text + "\n")


def main(run: Run) -> int:
    """Train and evaluate all rows, print the table; returns the exit code."""
    logging.basicConfig(level=logging.WARNING)
    if not jax.config.jax_compilation_cache_dir:  # all rows run the same programs
        jax.config.update("jax_compilation_cache_dir", str(run.workdir.resolve() / "compiled"))
    folder = refine_scenes(run.workdir, run.experts)
    rows = []
    for seed in run.seeds:
        for variant in run.variants:
            text_too = run.spatial_text and variant == "refined"
            rows += trained_with_text(run, folder, variant, seed) if text_too else [trained(run, folder, variant, seed)]
            show(run, text := table(rows))
    rec = detector_rec(run, folder)
    show(run, text := f"{text}\n\nREC of the detector's best box for the expression: {rec:.2f}.")
    if run.cuts:
        show(run, text := f"{text}\n\n{cut_table(run, run.seeds[0])}")
    print(text)
    refined = [[row for row in rows if row["seed"] == seed and "refined" in row["variant"]] for seed in run.seeds]
    short = [sentence for group in refined if group for sentence in missed(group, rec)]
    print(*short, sep="\n", file=sys.stderr)
    return int(bool(short))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Run, description=__doc__)))
