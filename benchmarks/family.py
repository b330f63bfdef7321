# SPDX-License-Identifier: Apache-2.0
"""Every system of the family trained on scenes by its own recipe, and what it answers beside itself shown no picture.

python -m benchmarks.family [--systems llava flamingo ...] [--limit 200] [--workdir runs/family] [--out FILE]

The configs are configs/tiny_*.py. BLIP-2 and InstructBLIP go on with the Q-Former of BLIP-2's first stage,
MiniGPT-4 with that of BLIP-2. Each row: parameters that some stage trains, scores on held-out scenes, in brackets those
of the same model shown a blank picture, and seconds of training and of answering, by the clock and of processor time
(of all cores together). Then Frozen and Flamingo are asked again with 0, 1, 2, 4 and 8 examples of training scenes
before each question, drawn at random or those whose pictures look most alike (RICES); --no-shots leaves that out.

The program ends with exit code 1 where a score is not better than the blind one by `MARGINS`, which were written down
before anything was trained, or where a part that no stage trains is not bit for bit what it was. A row is written as
soon as it is known, and not made again: delete --workdir for that. One that was broken off is begun anew.
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
from lionjax.inference import model
from lionjax.inference.loading import dummy_batch as loading_example
from lionjax.inference.loading import from_params
from lionjax.training import loop
from lionjax.training.init import make_param_specs as init_layout
from lionjax.training.init import resolve_weights_file

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
SHOT_LIMIT = 100  # questions behind each number of examples
SHOT_PROMPT = 256  # tokens that eight examples and a question fit in
BRIDGE = ("qformer", "vision_norm")
GOES_ON = {"blip2": "blip2_first", "instructblip": "blip2_first", "minigpt4": "blip2"}
SCORES = {"vqa": "vqa_accuracy", "caption": "caption_cider", "rec": "rec_accuracy_50"}
# How much better a system must be than itself blind. Frozen hears of a picture in two words made of the mean of all
# patches, and MiniGPT-4 trains one linear: less is asked of these.
MARGINS = {"vqa": 0.15, "caption": 0.5, "rec": 0.15}
LESS = {"frozen": {"vqa": 0.03, "caption": 0.2}, "minigpt4": {"vqa": 0.1, "caption": 0.3}}


@dataclasses.dataclass(frozen=True)
class Run:
    """Which systems, how many questions of each benchmark. `shots`: also few-shot curves."""

    systems: tuple[str, ...] = ()
    limit: int = 200
    shots: bool = True
    workdir: Path = Path("runs/family")
    out: Path | None = None


def experiment_of(name: str, workdir: Path) -> Experiment:
    """The config of a system, going on with what the one before it learned where that is the recipe."""
    experiment = config.load(ROOT / "configs" / f"tiny_{name}.py")
    if name not in GOES_ON:
        return experiment
    kept = tuple(pair for pair in experiment.weights if pair[0].split("/")[0] not in BRIDGE)
    file = str(workdir / GOES_ON[name] / f"bridge_for_{name}.safetensors")
    return dataclasses.replace(experiment, weights=(*kept, *((part, file) for part in BRIDGE)))


def hand_on(params: Params, workdir: Path, name: str) -> None:
    """Write the bridge that one system learned for those that go on with it, each what it has room for."""
    flat = trees.flatten(params)
    for after in (after for after, before in GOES_ON.items() if before == name):
        experiment = config.load(ROOT / "configs" / f"tiny_{after}.py")
        example = loading_example(model.Processor(experiment.data.processor))
        layout = init_layout(experiment, example, sharding.make_mesh(experiment.mesh))
        wanted = trees.flatten(trees.merge(layout.frozen, layout.trainable))
        part = {path: np.asarray(flat[path]) for path in wanted if path.split("/")[0] in BRIDGE}
        safetensors.numpy.save_file(part, workdir / name / f"bridge_for_{after}.safetensors")


def unchanged(experiment: Experiment, params: Params, report: dict) -> bool:
    """Whether what a stage freezes stayed as it was, and what no stage trains is still what its file holds."""
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
    """Seconds since it was made: by the clock, and of processor time."""

    begun: tuple[float, float] = dataclasses.field(default_factory=lambda: (time.time(), time.process_time()))

    def seconds(self) -> list[int]:
        return [round(t - b) for t, b in zip((time.time(), time.process_time()), self.begun)]


def trained(run: Run, name: str) -> dict:
    """The figures of one system, trained first where it is not yet."""
    folder, spent = run.workdir / name, Spent()
    if (folder / "family.json").is_file():
        return json.loads((folder / "family.json").read_text())
    shutil.rmtree(folder, ignore_errors=True)  # else its seconds would be those of a part
    experiment = experiment_of(name, run.workdir)
    params, report = loop.train(experiment, folder, pipeline.batches)
    hand_on(params, run.workdir, name)
    training, spent = spent.seconds(), Spent()
    asked = [task for task in runner.trained_benchmarks(experiment) if task in SCORES]
    answerer = from_params(experiment, params).engine
    entries = runner.evaluate_all(answerer, experiment, asked, folder, run.limit)
    patterns = [pattern for stage in experiment.stages for pattern in stage.trainable]
    row = {
        "system": name,
        "trainable": trees.count_params(trees.split(params, patterns)[0]),
        "steps": sum(stage.steps for stage in experiment.stages),
        "unchanged": unchanged(experiment, params, report),
        "seconds": [training, spent.seconds()],  # each by the clock, and of processor time
        "limit": run.limit,
    }
    for task, entry in entries.items():
        key = SCORES[task]
        row[task] = [round(entry[what][key], 3) for what in ("metrics", "blind", "majority")]
    (folder / "family.json").write_text(json.dumps(row) + "\n")
    return row


def missed(row: dict) -> list[str]:
    """Sentences about what a row falls short of."""
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
    """Answers of a trained system behind 0, 1, 2, 4 and 8 examples, chosen in both ways."""
    file, spent = run.workdir / name / "shots.json", Spent()
    if file.is_file():
        return json.loads(file.read_text())
    known = lionjax.load(run.workdir / name)
    prompts = dataclasses.replace(known.processor.config, prompt_length=SHOT_PROMPT, pictures=1)
    answerer = dataclasses.replace(known.engine, processor=Processor(prompts))
    data = dataclasses.replace(known.experiment.data, processor=prompts)
    answer, limit = known.experiment.answer, min(run.limit, SHOT_LIMIT)
    rows = []
    for how in few_shot.SELECTION_METHODS:
        for shots in SHOTS if how == few_shot.SELECTION_METHODS[0] else SHOTS[1:]:  # of none, none are chosen
            words = name == "flamingo"
            shown = few_shot.FewShot(answerer, data, "vqa", shots, how, use_text_examples=words)
            entry = runner.evaluate(answerer, data, answer, "vqa", None, limit, few_shot=shown)
            scores = [round(entry[what]["vqa_accuracy"], 3) for what in ("metrics", "blind")]
            rows.append({"system": name, "how": how, "shots": shots, "vqa": scores})
    found = {"rows": rows, "seconds": spent.seconds()}
    file.write_text(json.dumps(found) + "\n")
    return found


def shot_table(rows: list[dict]) -> str:
    """One line for each system and way of choosing; the blind twin's scores in brackets."""
    lines = ["| VQA behind | " + " | ".join(map(str, SHOTS)) + " examples |", "|---" * (len(SHOTS) + 1) + "|"]
    for name, how in dict.fromkeys((row["system"], row["how"]) for row in rows):
        found = {r["shots"]: r["vqa"] for r in rows if (r["system"], r["how"]) == (name, how)}
        cells = [f"{found[k][0]:.2f} ({found[k][1]:.2f})" if k in found else "" for k in SHOTS]
        lines.append(f"| {name}, {how} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(run: Run) -> int:
    logging.basicConfig(level=logging.WARNING)
    names = run.systems or SYSTEMS
    if unknown := set(names) - set(SYSTEMS):
        print(f"there is no system {sorted(unknown)[0]!r}; there are {', '.join(SYSTEMS)}", file=sys.stderr)
        return 2
    rows, shown = [], []
    for name in names:
        rows.append(trained(run, name))
        text = show(run, rows, shown)
    for name in (name for name in names if run.shots and name in FEW_SHOT):
        shown.append(curves(run, name))
        text = show(run, rows, shown)
    print(text)
    print(*(short := [sentence for row in rows for sentence in missed(row)]), sep="\n", file=sys.stderr)
    return 1 if short else 0


def show(run: Run, rows: list[dict], shown: list[dict]) -> str:
    """All that is known so far, also written to `out`."""
    spent = [*(part for row in rows for part in row["seconds"]), *(s["seconds"] for s in shown)]
    clock, processor = (sum(part) for part in zip(*spent))
    text = table(rows)
    if shown:
        text += "\n\n" + shot_table([row for part in shown for row in part["rows"]])
    text += f"\n\n{clock} seconds by the clock, {processor} of processor time."
    if run.out is not None:
        run.out.write_text(text + "\n")
    return text


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Run, description=__doc__)))
