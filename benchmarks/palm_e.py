# SPDX-License-Identifier: Apache-2.0
"""PaLM-E on the tabletop: success in a closed loop by how the table is sensed, and what planning costs VQA.

python -m benchmarks.palm_e [--steps 1600] [--seeds 3] [--episodes 200] [--out FILE] [--animation FILE.gif]

For each seed configs/tiny_palm_e.py is trained ("both"), and the same model on its planning with short sentences alone,
and on its VQA and captions alone, each for as many batches. All that learned to plan do so in held-out episodes (goals
and combinations not seen, kinds of goals in equal numbers, at most 8 sub-goals, some of which fail) from object slots,
from a state vector and from an image, and again with all slots zeroed ("blind"). VQA is asked of held-out scenes.
"permuted": under other tags, the share of equal sub-goals, and of tags that move with their object. The animation shows
three episodes planned from object slots.

Finished runs and evaluations are reused; delete --workdir to start over.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import tyro

from lionjax.core import config
from lionjax.core.experiment import Experiment
from lionjax.core.files import write_atomic
from lionjax.data import pipeline
from lionjax.data.tabletop import episodes as worlds
from lionjax.data.tabletop import goals, tasks, world
from lionjax.evaluation import runner
from lionjax.inference.loading import from_params
from lionjax.inference.model import Model
from lionjax.pipelines import closed_loop
from lionjax.pipelines.closed_loop import LoopConfig, Outcome
from lionjax.training import loop

ROOT = Path(__file__).resolve().parent.parent
WEB_TASKS = ("vqa", "caption")
ANIMATED = 3


@dataclasses.dataclass(frozen=True)
class Run:
    """Lengths, seeds and numbers of episodes and questions; `failure_rate`: of sub-goals in the loop."""

    steps: int = 1600
    seeds: int = 3
    episodes: int = 200
    limit: int = 400
    failure_rate: float = 0.1
    sentences: tuple[str, ...] = tasks.SENTENCES
    models: tuple[str, ...] = ("planning", "both", "VQA")
    workdir: Path = Path("runs/palm_e")
    out: Path | None = None
    animation: Path | None = None


def experiment(run: Run, seed: int, learns: str) -> Experiment:
    """tiny_palm_e ("both"), its planning with short sentences alone ("planning"), or its web data alone ("VQA")."""
    base = config.load(ROOT / "configs" / "tiny_palm_e.py")
    (stage,) = base.stages
    mixture = {
        "both": stage.mixture,
        "planning": tuple(mix for mix in stage.mixture if mix.group == "short"),
        "VQA": tuple(mix for mix in stage.mixture if mix.task in WEB_TASKS),
    }[learns]
    # Batches of the two groups take turns, and planning from images is a part of the second.
    web = [mix.weight for mix in stage.mixture if mix.task in WEB_TASKS]
    images = [mix.weight for mix in stage.mixture if mix.group == "images"]
    share = {"both": 1.0, "planning": 0.5, "VQA": 0.5 * sum(web) / sum(images)}[learns]
    stage = dataclasses.replace(stage, mixture=mixture, steps=round(run.steps * share))
    features = str(run.workdir / "features")
    settings = dataclasses.replace(base.run, save_every=100, evaluate_limit=0, feature_cache_dir=features)
    return dataclasses.replace(base, seed=seed, stages=(stage,), run=settings)


def trained_model(run: Run, seed: int, learns: str) -> Model:
    """The model at the end of a run, which resumes if its folder exists."""
    exp = experiment(run, seed, learns)
    return from_params(exp, loop.train(exp, run.workdir / f"{learns}_{run.steps}_{seed}", pipeline.batches)[0])


def vqa_accuracy(run: Run, model: Model) -> float:
    """Of held-out questions about scenes."""
    exp = model.experiment
    entry = runner.evaluate(model.engine, exp.data, exp.generation, "vqa", limit=run.limit, with_blind=False)
    return entry["metrics"]["vqa_accuracy"]


def run_loop(run: Run, model: Model, sentence: str, blind: bool) -> list[Outcome]:
    """All held-out episodes."""
    chosen = [worlds.sample_episode("heldout", index) for index in range(run.episodes)]
    planner = closed_loop.model_planner(model, sentence, blind)
    return closed_loop.run_episodes(planner, chosen, LoopConfig(failure_rate=run.failure_rate))


def permuted_agreement(run: Run, model: Model) -> dict[str, float]:
    """Shares of answers that follow their objects when tags are drawn anew: the sub-goal, and the tag asked for."""
    size, found = model.processor.config.image_size, {}
    chosen = [worlds.sample_episode("heldout", index) for index in range(run.episodes)]
    for kind in ("plan", "tag"):
        answers, orders = [], []
        for seed in (1, 2):
            rng, inputs, order = np.random.default_rng(seed), [], []
            for episode in chosen:
                table, body = episode.table, episode.table.bodies[episode.goal.target]
                question = (
                    tasks.plan_question(table, episode.goal) if kind == "plan" else f"Which object is {body.name}?"
                )
                sensed = tasks.sense(table, "objects", np.random.default_rng(rng.integers(2**31)))
                inputs.append(closed_loop.table_input(table, question, sensed, size))
                order.append(sensed)
            answers.append(closed_loop.answer_in_batches(model, inputs))
            orders.append(order)
        if kind == "tag":  # each answer as the object that it names
            answers = [[_named(text, one) for text, one in zip(*pair)] for pair in zip(answers, orders)]
        found[kind] = float(np.mean([a == b is not None for a, b in zip(*answers)]))
    return found


def _named(text: str, sensed: tasks.Sensed) -> int | None:
    tags = {sensed.tag(index): index for index in sensed.objects}
    return tags.get(text)


def planning_figures(run: Run, model: Model, sentences: Sequence[str]) -> dict[str, float]:
    """Success by sentence and kind of goal, blind too, and agreement under other tags."""
    found = {}
    for sentence in sentences:
        for blind in (False, True):
            outcomes = run_loop(run, model, sentence, blind)
            name = f"{sentence}, blind" if blind else sentence
            found[name] = float(np.mean([outcome.is_success for outcome in outcomes]))
            for kind in sorted({outcome.episode.goal.kind for outcome in outcomes if not blind}):
                of_kind = [one.is_success for one in outcomes if one.episode.goal.kind == kind]
                found[f"{sentence}, {kind}"] = float(np.mean(of_kind))
    return found | {f"permuted, {kind}": share for kind, share in permuted_agreement(run, model).items()}


def figures(run: Run, seed: int, learns: str) -> dict[str, float]:
    """All figures of one model; kept in a file."""
    file = run.workdir / f"figures_{learns}_{run.steps}_{run.episodes}_{seed}.json"
    if file.is_file():
        return json.loads(file.read_text())
    model, found = trained_model(run, seed, learns), {}
    if learns != "VQA":
        sentences = [name for name in run.sentences if learns == "both" or name != "image"]
        found |= planning_figures(run, model, sentences)
    if learns != "planning":
        found["VQA"] = vqa_accuracy(run, model)
    found = {f"{learns}: {name}": value for name, value in found.items()}
    write_atomic(file, json.dumps(found, indent=1))
    return found


def table(by_seed: Sequence[dict[str, float]]) -> str:
    """Figures as rows in Markdown: mean and each seed, as far as there are any."""
    seeds = " | ".join(f"seed {k}" for k in range(len(by_seed)))
    lines = [f"| | mean | {seeds} |", "|---" * (2 + len(by_seed)) + "|"]
    for name in by_seed[0]:
        values = [found[name] for found in by_seed if name in found]
        cells = [f"{found[name]:.3f}" if name in found else "" for found in by_seed]
        lines.append(f"| {name} | {statistics.mean(values):.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def animate(outcomes: Sequence[Outcome], file: Path, size: int = 160) -> None:
    """A GIF of episodes side by side: the table before each sub-goal, with the planner's words."""
    from PIL import Image, ImageDraw

    frames = []
    for turn in range(max(len(outcome.looks) for outcome in outcomes) + 1):
        frame = Image.new("RGB", (len(outcomes) * size, size + 34), "white")
        draw = ImageDraw.Draw(frame)
        for place, outcome in enumerate(outcomes):
            look = outcome.looks[turn] if turn < len(outcome.looks) else None
            shown = outcome.table if look is None else look.table
            frame.paste(Image.fromarray(world.render(shown, size)), (place * size, 0))
            words = ("reached" if outcome.is_success else "not reached") if look is None else look.words
            slip = " (slips)" if look is not None and look.slipped else ""
            draw.text((place * size + 3, size + 2), outcome.episode.text, fill="gray", font_size=9)
            draw.text((place * size + 3, size + 17), words + slip, fill="black", font_size=9)
        frames.append(frame.quantize(128))
    file.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=1200, loop=0)


def main(run: Run) -> None:
    """Train, evaluate and print the table, and write the animation."""
    by_seed: list[dict[str, float]] = []
    for seed in range(run.seeds):
        by_seed.append({})
        for learns in run.models:
            by_seed[seed] |= figures(run, seed, learns)
            text = f"{run.episodes} held-out episodes, {run.failure_rate:.0%} of sub-goals fail; {run.limit} VQA "
            text += f"questions; {run.steps} steps of the model that learns both.\n\n{table(by_seed)}\n\n"
            text += f"Device: {jax.devices()[0].device_kind}, jax {jax.__version__}.\n"
            print(text, flush=True)
            if run.out is not None:
                write_atomic(run.out, text)
    if run.animation is not None:
        few = dataclasses.replace(run, episodes=len(goals.GOALS))
        outcomes = run_loop(few, trained_model(run, 0, run.models[0]), run.sentences[0], False)
        animate(outcomes[:ANIMATED], run.animation)


if __name__ == "__main__":
    main(tyro.cli(Run, description=__doc__))
