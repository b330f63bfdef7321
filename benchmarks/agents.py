# SPDX-License-Identifier: Apache-2.0
"""Questions in two steps about held-out scenes: a model asked at once, and its tools in the steps of a script.

python -m benchmarks.agents runs/demo [--questions 200] [--seeds 0 1 2] [--out F]

A scripted controller plans the steps of each kind of question in the place of a language model, by tool calling, so
that the tools are what is measured. It knows the kind and the referring expression of a question, and nothing of the
scene. Three kinds in turn:

- count: "How many things have the color of the star?": `answer` for the color, then `count`.
- farthest: "What color is the thing farthest from the star?": `caption` for the things, then `detect` for their boxes.
- hides: "What shape is the thing that hides a part of the star?": the same.

Each seed has other scenes. Exits with code 1 unless the tools exceed the model alone by `MARGIN` with every seed.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import lionjax
from lionjax.core.types import UserError
from lionjax.data.scenes import reasoning, referring, world
from lionjax.data.scenes.world import Scene
from lionjax.evaluation.metrics import regions
from lionjax.evaluation.metrics.regions import bootstrap_interval
from lionjax.inference.model import Model
from lionjax.pipelines.agents.styles import AgentConfig, open_agent
from lionjax.pipelines.completion import ChatRequest, Completion, ToolCall
from lionjax.pipelines.tools.experts import Experts
from lionjax.pipelines.tools.toolbox import Toolbox, read_number
from lionjax.pipelines.tools.workspace import Workspace

MARGIN = 0.15
SAME_PLACE = 0.7  # IoU above which two boxes are of one thing
NOUN = re.compile(rf"\b({'|'.join(world.COLORS)}) ({'|'.join(world.SHAPES)})(?:e?s)?\b")
Plan = Generator[tuple[str, dict[str, Any]], Any, str]  # yields calls (tool, arguments), is sent results, returns text


@dataclasses.dataclass(frozen=True)
class Run:
    """`folder`: a run or exported model that answers with boxes."""

    folder: tyro.conf.Positional[Path]
    questions: int = 200
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path | None = None


@dataclasses.dataclass(frozen=True)
class TwoStepQuestion:
    """A question about a scene; `expr`: the expression in it, "the star"."""

    kind: str
    text: str
    expr: str
    answer: str
    scene: Scene


# ------------------------------------------------------------------ questions


def count_question(scene: Scene, rng) -> TwoStepQuestion | None:
    """How many things have the color of a thing that is named without it."""
    named = [(k, names[0]) for k in range(len(scene.things)) if (names := unique_names(scene, k, ("color",)))]
    if not named:
        return None
    k, expr = named[rng.integers(len(named))]
    number = sum(thing.color == scene.things[k].color for thing in scene.things)
    return TwoStepQuestion("count", f"How many things have the color of {expr}?", expr, str(number), scene)


def unique_names(scene: Scene, k: int, excluded: tuple[str, ...] = ()) -> list[str]:
    """Expressions that fit object k alone."""
    return referring.attribute_expressions(scene, k, excluded)


def inferred_question(kind: str, attribute: str, text: str) -> Callable[[Scene, Any], TwoStepQuestion | None]:
    """Questions for an attribute of the thing that `reasoning` infers from another one."""

    def make(scene: Scene, rng) -> TwoStepQuestion | None:
        found = reasoning.KINDS[kind](scene)
        if not found:
            return None
        inference = found[rng.integers(len(found))]
        answer = getattr(scene.things[inference.target], attribute)
        return TwoStepQuestion(kind, text.format(expr=inference.noun), inference.noun, answer, scene)

    return make


QUESTIONS = {
    "count": count_question,
    "farthest": inferred_question("farthest", "color", "What color is the thing farthest from {expr}?"),
    "hides": inferred_question("hides", "shape", "What shape is the thing that hides a part of {expr}?"),
}


def sample_questions(count: int, seed: int) -> list[TwoStepQuestion]:
    """Questions of all kinds in turn, each about another held-out scene."""
    rng, found, index = np.random.default_rng(seed), [], 0
    while len(found) < count:
        kind = list(QUESTIONS)[len(found) % len(QUESTIONS)]
        if question := QUESTIONS[kind](world.sample_scene("heldout", index, seed), rng):
            found.append(question)
        index += 1
    return found


# ------------------------------------------------------------------ controller


def count_plan(question: TwoStepQuestion, image: str) -> Plan:
    """Ask for the color, then count."""
    color = yield "answer", {"image": image, "question": f"What color is {question.expr}?"}
    number = yield "count", {"image": image, "words": f"{first_word(color, world.COLORS)} objects"}
    return str(number)


def things_plan(question: TwoStepQuestion, image: str) -> Plan:
    """Name the things, find them all, and compare their boxes with that of the expression."""
    caption = yield "caption", {"image": image}
    nouns = list(dict.fromkeys(" ".join(match) for match in NOUN.findall(caption)))[:7]
    words = ", ".join([question.expr, *(f"the {noun}" for noun in nouns)])
    things = yield "detect", {"image": image, "words": words}
    boxes = {thing["label"]: np.array(thing["box"]) for thing in things}
    start = boxes.pop(question.expr, None)
    if start is None or not boxes:
        return ""
    score = {"farthest": center_distance, "hides": overlap}[question.kind]
    best = max(boxes, key=lambda label: score(start, boxes[label]))
    return first_word(best, world.COLORS if question.kind == "farthest" else world.SHAPES)


def center_distance(first_4: np.ndarray, second_4: np.ndarray) -> float:
    """Distance of the boxes' centers."""
    return float(np.linalg.norm((first_4[:2] + first_4[2:] - second_4[:2] - second_4[2:]) / 2))


def overlap(first_4: np.ndarray, second_4: np.ndarray) -> float:
    """IoU of two boxes, negative where they are of one thing."""
    iou = float(regions.iou(first_4[None], second_4[None])[0])
    return -iou if iou > SAME_PLACE else iou


PLANS = {"count": count_plan, "farthest": things_plan, "hides": things_plan}


class ScriptedController:
    """A `completion.LanguageModel` that calls the tools of one plan in turn."""

    def __init__(self, plan: Plan):
        self.plan, self.has_begun = plan, False

    def describe(self) -> dict:
        """What stands in reports."""
        return {"model": "scripted controller"}

    def complete(self, requests: Sequence[ChatRequest]) -> list[Completion]:
        """The next call, or the answer, to one conversation."""
        (request,) = requests
        try:
            if self.has_begun:
                call = self.plan.send(json.loads(request.messages[-1]["content"]))
            else:
                self.has_begun, call = True, next(self.plan)
        except StopIteration as end:
            return [Completion(end.value or "unknown")]
        except (ValueError, TypeError):  # the observation is an error of the tool
            return [Completion("unknown")]
        return [Completion("", tool_calls=(ToolCall("call", call[0], json.dumps(call[1])),))]


# ------------------------------------------------------------------ scores


def first_word(text: str, words: Sequence[str]) -> str:
    """The first of some words in a text, or ""."""
    return next((word for word in re.findall(r"[a-z]+", text.lower()) if word in words), "")


def is_right(question: TwoStepQuestion, text: str) -> bool:
    """Whether the first number, color or shape of an answer is the true one."""
    if question.kind == "count":
        try:
            return str(read_number(text)) == question.answer
        except UserError:
            return False
    return first_word(text, world.COLORS if question.kind == "farthest" else world.SHAPES) == question.answer


def most_frequent(questions: Sequence[TwoStepQuestion], kind: str) -> str:
    """The most frequent true answer of a kind."""
    return Counter(question.answer for question in questions if question.kind == kind).most_common(1)[0][0]


def by_tools(model: Model, questions: Sequence[TwoStepQuestion], image_size: int) -> Iterator[bool]:
    """Whether the controller's answer to each question is right."""
    with tempfile.TemporaryDirectory() as folder:
        for number, question in enumerate(questions):
            toolbox = Toolbox(Workspace(Path(folder) / str(number)), Experts(model=model))
            image = toolbox.workspace.add(question.scene.render(image_size))
            controller = ScriptedController(PLANS[question.kind](question, image))
            turn = open_agent(controller, toolbox, AgentConfig()).respond(question.text, [image])
            yield is_right(question, turn.answer)
            print(f"\r{number + 1} of {len(questions)} questions by tools", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def shares(right: Sequence[bool], kinds: Sequence[str]) -> str:
    """The share of right answers with its interval, and that of each kind."""
    low, high = bootstrap_interval(np.array(right, float), 0)
    parts = [np.mean([one for one, its in zip(right, kinds) if its == kind]) for kind in QUESTIONS]
    return f"{np.mean(right):.2f} ({low:.2f} to {high:.2f}) | " + " | ".join(f"{part:.2f}" for part in parts)


def main(run: Run) -> int:
    """Print and write the table; the exit code."""
    model = lionjax.load(run.folder)
    image_size = model.processor.config.image_size
    rows, gains = [], []
    for seed in run.seeds:
        questions = sample_questions(run.questions, seed)
        kinds = [question.kind for question in questions]
        images = [question.scene.render(image_size) for question in questions]
        alone = [is_right(q, a.text) for q, a in zip(questions, model.answer(images, [q.text for q in questions]))]
        constant = [question.answer == most_frequent(questions, question.kind) for question in questions]
        tools = list(by_tools(model, questions, image_size))
        gains.append(np.mean(tools) - np.mean(alone))
        for name, right in (("most frequent answer", constant), ("model alone", alone), ("its tools", tools)):
            rows.append(f"| {seed} | {name} | {shares(right, kinds)} |")
    head = ["| seed | method | all | " + " | ".join(QUESTIONS) + " |", "|" + "---|" * (3 + len(QUESTIONS))]
    least = f"Least gain of the tools over the model alone: {min(gains):.2f} (asked: {MARGIN})."
    text = "\n".join([*head, *rows, "", least, ""])
    print(text)
    if run.out:
        run.out.write_text(text, encoding="utf-8")
    return int(min(gains) < MARGIN)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Run)))
