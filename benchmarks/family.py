# SPDX-License-Identifier: Apache-2.0
"""Train every VLM of the family on synthetic scenes by its own recipe, and compare it with its image-blind baseline.

python -m benchmarks.family [--systems llava flamingo ...] [--limit 200] [--workdir runs/family] [--out FILE]

The configs are configs/tiny_*.py. BLIP-2 and InstructBLIP start from the Q-Former of BLIP-2's first stage, MiniGPT-4
from that of BLIP-2. Each row has the number of trained parameters, scores on held-out scenes (in parentheses those of
the same model with a blank image), and seconds of training and evaluation in wall time and CPU time (all cores). Then
Frozen and Flamingo are evaluated with 0, 1, 2, 4 and 8 in-context examples from the training scenes, chosen at random
or by image similarity (RICES); --no-shots skips that.

Exits with code 1 if a score does not exceed the image-blind one by `MARGINS` (fixed before any training), or if a
frozen parameter changed. Finished rows are reused; delete --workdir to start over. Interrupted rows are restarted.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import safetensors.numpy
import tyro

import lionjax
from lionjax.core import config, sharding
from lionjax.core import params as trees
from lionjax.core.experiment import Experiment
from lionjax.core.types import Params
from lionjax.data import pipeline
from lionjax.data.processor import Processor
from lionjax.evaluation import few_shot, runner
from lionjax.inference.loading import dummy_batch, from_params
from lionjax.training import loop
from lionjax.training.init import make_param_specs, resolve_weights_file

ROOT = Path(__file__).resolve().parent.parent
SYSTEMS = (
    "llava",
    "shikra",
    "blip2_first",
    "blip2",
    "instructblip",
    "minigpt4",
    "mplug_owl",
    "frozen",
    "kosmos2",
    "flamingo",
)
FEW_SHOT = ("frozen", "flamingo")
SHOTS = (0, 1, 2, 4, 8)
SHOT_LIMIT = 100  # questions per number of in-context examples
SHOT_PROMPT = 256  # tokens; eight examples and a question fit
BRIDGE = ("qformer", "vision_norm")
GOES_ON = {"blip2": "blip2_first", "instructblip": "blip2_first", "minigpt4": "blip2"}
SCORES = {"vqa": "vqa_accuracy", "caption": "caption_cider", "rec": "rec_accuracy_50"}
# Required margins over the image-blind score. Frozen conditions on two prefix tokens from mean-pooled patches, and
# MiniGPT-4 trains a single linear layer: their margins are smaller.
MARGINS = {"vqa": 0.15, "caption": 0.5, "rec": 0.15}
LESS = {"frozen": {"vqa": 0.03, "caption": 0.2}, "minigpt4": {"vqa": 0.1, "caption": 0.3}}


@dataclasses.dataclass(frozen=True)
class Run:
    """Which systems to train, and the questions per benchmark. `shots`: also evaluate in-context learning."""

    systems: tuple[str, ...] = ()
    limit: int = 200
    shots: bool = True
    workdir: Path = Path("runs/family")
    out: Path | None = None


def experiment_of(name: str, workdir: Path) -> Experiment:
    """The config of a system, initialized from its predecessor's Q-Former if its recipe says so."""
    experiment = config.load(ROOT / "configs" / f"tiny_{name}.py")
    if name not in GOES_ON:
        return experiment
    other_weights = tuple((part, file) for part, file in experiment.weights if part.split("/")[0] not in BRIDGE)
    file = str(workdir / GOES_ON[name] / f"bridge_for_{name}.safetensors")
    return dataclasses.replace(experiment, weights=(*other_weights, *((part, file) for part in BRIDGE)))


def hand_on(params: Params, workdir: Path, name: str) -> None:
    """Write one system's Q-Former and vision norm for each of its successors, restricted to the successor's shapes."""
    flat = trees.flatten(params)
    for after in (after for after, before in GOES_ON.items() if before == name):
        experiment = config.load(ROOT / "configs" / f"tiny_{after}.py")
        example = dummy_batch(Processor(experiment.data.processor))
        layout = make_param_specs(experiment, example, sharding.make_mesh(experiment.mesh))
        wanted = trees.flatten(trees.merge(layout.frozen, layout.trainable))
        part = {path: np.asarray(flat[path]) for path in wanted if path.split("/")[0] in BRIDGE}
        safetensors.numpy.save_file(part, workdir / name / f"bridge_for_{after}.safetensors")


def unchanged(experiment: Experiment, params: Params, report: dict) -> bool:
    """Whether all stages left frozen parameters unchanged, and never-trained ones equal their weights files."""
    patterns = [pattern for stage in experiment.stages for pattern in stage.trainable]
    _, never = trees.split(params, patterns)
    never, same = trees.flatten(never), all(stage["frozen_unchanged"] for stage in report["stages"])
    for prefix, file in experiment.weights:
        file, _, part = file.partition("#")
        held = safetensors.numpy.load_file(resolve_weights_file(file))
        for path, leaf in never.items():
            name = (part or prefix) + path.removeprefix(prefix)
            if f"{path}/".startswith(f"{prefix}/") and name in held:
                same &= np.array_equal(np.asarray(leaf, held[name].dtype), held[name])
    return bool(same)


@dataclasses.dataclass
class Spent:
    """A stopwatch: wall and CPU seconds since its creation."""

    start: tuple[float, float] = dataclasses.field(default_factory=lambda: (time.time(), time.process_time()))

    def seconds(self) -> list[int]:
        return [round(t - b) for t, b in zip((time.time(), time.process_time()), self.start)]


def trained(run: Run, name: str) -> dict:
    """The row of one system, which is trained first if it has no row yet."""
    folder, spent = run.workdir / name, Spent()
    if (folder / "family.json").is_file():
        return json.loads((folder / "family.json").read_text())
    shutil.rmtree(folder, ignore_errors=True)  # restart, so that the seconds are those of a complete run
    experiment = experiment_of(name, run.workdir)
    params, report = loop.train(experiment, folder, pipeline.batches)
    hand_on(params, run.workdir, name)
    training, spent = spent.seconds(), Spent()
    tasks = [task for task in runner.trained_benchmarks(experiment) if task in SCORES]
    engine = from_params(experiment, params).engine
    entries = runner.evaluate_all(engine, experiment, tasks, folder, run.limit)
    patterns = [pattern for stage in experiment.stages for pattern in stage.trainable]
    row = {
        "system": name,
        "trainable": trees.count_params(trees.split(params, patterns)[0]),
        "steps": sum(stage.steps for stage in experiment.stages),
        "unchanged": unchanged(experiment, params, report),
        "seconds": [training, spent.seconds()],  # wall and CPU time each
        "limit": run.limit,
    }
    for task, entry in entries.items():
        key = SCORES[task]
        row[task] = [round(entry[what][key], 3) for what in ("metrics", "blind", "majority")]
    (folder / "family.json").write_text(json.dumps(row) + "\n")
    return row


def missed(row: dict) -> list[str]:
    """A sentence for each margin that a row misses."""
    margins = MARGINS | LESS.get(row["system"], {})
    short = [
        f"{row['system']}: {task} {row[task][0]} is not {margins[task]} above {row[task][1]}"
        for task in SCORES
        if task in row and row[task][0] < row[task][1] + margins[task]
    ]
    return short + ([] if row["unchanged"] else [f"{row['system']}: a frozen part changed"])


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    heads = (
        *("system", "trains", "steps", "VQA", "caption CIDEr", "REC", "frozen parts"),
        *("seconds", "processor seconds"),
    )
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        scores = [f"{row[t][0]:.2f} ({row[t][1]:.2f})" if t in row else "" for t in SCORES]
        same = "same bits" if row["unchanged"] else "CHANGED"
        cells = (row["system"], f"{row['trainable']:,}", str(row["steps"]), *scores, same)
        spent = ["{} + {}".format(*part) for part in zip(*row["seconds"])]
        lines.append("| " + " | ".join((*cells, *spent)) + " |")
    return "\n".join(lines)


def curves(run: Run, name: str) -> dict:
    """VQA scores of a trained system by number of in-context examples and selection method."""
    file, spent = run.workdir / name / "shots.json", Spent()
    if file.is_file():
        return json.loads(file.read_text())
    model = lionjax.load(run.workdir / name)
    prompts = dataclasses.replace(model.processor.config, max_prompt_tokens=SHOT_PROMPT, max_images=1)
    engine = dataclasses.replace(model.engine, processor=Processor(prompts))
    data = dataclasses.replace(model.experiment.data, processor=prompts)
    generation, limit = model.experiment.generation, min(run.limit, SHOT_LIMIT)
    rows = []
    for selection in few_shot.SELECTION_METHODS:
        for shots in (
            SHOTS if selection == few_shot.SELECTION_METHODS[0] else SHOTS[1:]
        ):  # selection does not matter for 0 shots
            use_text_examples = name == "flamingo"
            few_shot_examples = few_shot.FewShot(
                engine, data, "vqa", shots, selection, use_text_examples=use_text_examples
            )
            entry = runner.evaluate(engine, data, generation, "vqa", None, limit, few_shot=few_shot_examples)
            scores = [round(entry[what]["vqa_accuracy"], 3) for what in ("metrics", "blind")]
            rows.append({"system": name, "how": selection, "shots": shots, "vqa": scores})
    result = {"rows": rows, "seconds": spent.seconds()}
    file.write_text(json.dumps(result) + "\n")
    return result


def shot_table(rows: list[dict]) -> str:
    """One line for each system and selection method; image-blind scores in parentheses."""
    lines = ["| VQA, in-context examples | " + " | ".join(map(str, SHOTS)) + " |", "|---" * (len(SHOTS) + 1) + "|"]
    for name, selection in dict.fromkeys((row["system"], row["how"]) for row in rows):
        scores = {r["shots"]: r["vqa"] for r in rows if (r["system"], r["how"]) == (name, selection)}
        cells = [f"{scores[k][0]:.2f} ({scores[k][1]:.2f})" if k in scores else "" for k in SHOTS]
        lines.append(f"| {name}, {selection} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(run: Run) -> int:
    """Train and evaluate the systems, print the tables; returns the exit code."""
    logging.basicConfig(level=logging.WARNING)
    names = run.systems or SYSTEMS
    if unknown := set(names) - set(SYSTEMS):
        print(f"there is no system {sorted(unknown)[0]!r}; there are {', '.join(SYSTEMS)}", file=sys.stderr)
        return 2
    rows, shot_results = [], []
    for name in names:
        rows.append(trained(run, name))
        text = show(run, rows, shot_results)
    for name in (name for name in names if run.shots and name in FEW_SHOT):
        shot_results.append(curves(run, name))
        text = show(run, rows, shot_results)
    print(text)
    print(*(short := [sentence for row in rows for sentence in missed(row)]), sep="\n", file=sys.stderr)
    return 1 if short else 0


def show(run: Run, rows: list[dict], shot_results: list[dict]) -> str:
    """The tables so far, also written to `out`."""
    spent = [*(part for row in rows for part in row["seconds"]), *(s["seconds"] for s in shot_results)]
    clock, processor = (sum(part) for part in zip(*spent))
    text = table(rows)
    if shot_results:
        text += "\n\n" + shot_table([row for part in shot_results for row in part["rows"]])
    text += f"\n\n{clock} s wall time, {processor} s CPU time."
    if run.out is not None:
        run.out.write_text(text + "\n")
    return text


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Run, description=__doc__)))
