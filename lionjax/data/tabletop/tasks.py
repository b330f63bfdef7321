# SPDX-License-Identifier: Apache-2.0
"""Questions about a moment on the tabletop: the next sub-goal, success, recovery after a failure, and the state.

Each is a sentence that begins with the table as the model senses it: in slots of objects with their tags, as a state
vector, or in an image. Task "dialog" has several of these questions about one table, with goals drawn anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lionjax.core.types import UserError
from lionjax.data.scenes.naming import yes_or_no
from lionjax.data.scenes.tasks import Example
from lionjax.data.tabletop import world
from lionjax.data.tabletop.goals import Goal, Subgoal, next_subgoal
from lionjax.data.tabletop.world import AREAS, Table, area_of

SENTENCES = ("objects", "state", "image")
DIALOG_ROUNDS = 4
DIALOG_TASKS = (("plan", 0.55), ("state_vqa", 0.3), ("success", 0.1), ("recovery", 0.05))  # and their shares
OWN_GOAL = 0.4  # share of a dialog's questions about goals that keep the goal of the moment's episode


class Moment(NamedTuple):
    """A table on the way to a goal; `last`: the sub-goal tried last, which `failed` or not."""

    table: Table
    goal: Goal
    last: Subgoal | None = None
    failed: bool = False


class Sensed(NamedTuple):
    """How a table is sensed: words with slots, state vectors, and the objects of <obj_1>, <obj_2>, ..."""

    text: str
    states: tuple[tuple[float, ...], ...] = ()
    objects: tuple[int, ...] = ()

    def tag(self, index: int) -> str:
        """The tag of an object."""
        return f"object {self.objects.index(index) + 1}"


def sense(table: Table, sentence: str, rng: np.random.Generator) -> Sensed:
    """The table in one of the `SENTENCES`; tags of objects are drawn. Raises UserError for another sentence."""
    if sentence == "objects":
        order = rng.permutation(len(table.bodies)).tolist()
        return Sensed(" ".join(f"object {k} <obj_{k}>" for k in range(1, len(order) + 1)), (), tuple(order))
    if sentence == "state":
        return Sensed("The table is <state>.", (tuple(world.state_vector(table)),))
    if sentence == "image":
        return Sensed("The table is <image>.")
    raise UserError(f"there is no sentence {sentence!r}; choose one of {', '.join(SENTENCES)}")


def plan_question(table: Table, goal: Goal) -> str:
    """The question of the next sub-goal."""
    return f"{goal.text(table)}."


def plan(moment: Moment, sensed: Sensed, rng) -> tuple[str, str, str]:
    """(kind, question, answer): the next sub-goal."""
    table, goal = moment.table, moment.goal
    return goal.kind, plan_question(table, goal), next_subgoal(table, goal).text(table)


def success(moment: Moment, sensed: Sensed, rng) -> tuple[str, str, str]:
    """Whether the goal is reached, or the last step done; both answers are as likely where the moment allows it."""
    table, goal, last = moment.table, moment.goal, moment.last
    if last is not None and last.verb != "push" and rng.random() < 0.5:
        return "step", f"Step: {last.text(table)}. Done?", yes_or_no(last.is_achieved(table))
    return "goal", f"{goal.text(table)}. Done?", yes_or_no(goal.is_reached(table))


def recovery(moment: Moment, sensed: Sensed, rng) -> tuple[str, str, str]:
    """The next sub-goal after a step that failed, or that may have."""
    table, goal = moment.table, moment.goal
    last = moment.last or next_subgoal(table, goal)
    question = f"{goal.text(table)}. Step: {last.text(table)}."
    kind = "failed" if moment.failed else "done" if moment.last else "first"
    return kind, question, next_subgoal(table, goal).text(table)


def state_vqa(moment: Moment, sensed: Sensed, rng) -> tuple[str, str, str]:
    """A question about the state: where an object is, what is on it, what the hand holds, or which object bears a tag.

    Tags are asked for where the sentence has them.
    """
    table = moment.table
    index = int(rng.integers(len(table.bodies)))
    body = table.bodies[index]
    kind = str(rng.choice(("where", "on", "held", "tag") if sensed.objects else ("where", "on", "held")))
    if kind == "where":
        in_hand = body.support == world.IN_HAND
        return kind, f"Where is {body.name}?", "in the hand" if in_hand else AREAS[area_of(body.x, body.y)]
    if kind == "tag":
        return kind, f"Which object is {body.name}?", sensed.tag(index)
    if kind == "held":
        return kind, "What is in the hand?", _name_of(table, table.held)
    covered = [k for k in range(len(table.bodies)) if table.on_top(k) >= 0]
    if covered and rng.random() < 0.5:
        index = int(rng.choice(covered))
    return kind, f"What is on {table.bodies[index].name}?", _name_of(table, table.on_top(index))


def _name_of(table: Table, index: int) -> str:
    return "nothing" if index < 0 else table.bodies[index].name


QUESTIONS: dict[str, Callable] = {"plan": plan, "success": success, "recovery": recovery, "state_vqa": state_vqa}
TASKS = (*QUESTIONS, "dialog")


def make_example(
    task: str, moment: Moment, sentence: str, rng: np.random.Generator, new_goal: Callable[[], Goal] | None = None
) -> Example:
    """One example of a task; `new_goal` draws another goal for a dialog.

    Raises UserError for an unknown task or sentence.
    """
    if task not in TASKS:
        raise UserError(f"there is no task {task!r} on the tabletop; choose one of {', '.join(TASKS)}")
    sensed = sense(moment.table, sentence, rng)
    if task == "dialog":
        rounds = [_dialog_round(moment, sensed, rng, new_goal) for _ in range(DIALOG_ROUNDS)]
    else:
        rounds = [QUESTIONS[task](moment, sensed, rng)]
    texts = [f"{sensed.text} {rounds[0][1]}", *(question for _, question, _ in rounds[1:])]
    *history, (question, answer) = zip(texts, (answer for *_, answer in rounds))
    slots = {"states": sensed.states, "slot_objects": sensed.objects}
    return Example(task, rounds[-1][0], question, answer, (answer,), "image_level", history=tuple(history), **slots)


def _dialog_round(moment: Moment, sensed: Sensed, rng, new_goal: Callable[[], Goal] | None) -> tuple[str, str, str]:
    """(kind, question, answer) of one round."""
    names, shares = zip(*DIALOG_TASKS)
    if new_goal is not None and rng.random() >= OWN_GOAL:
        moment = moment._replace(goal=new_goal())
    return QUESTIONS[str(rng.choice(names, p=shares))](moment, sensed, rng)
