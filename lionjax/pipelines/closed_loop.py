# SPDX-License-Identifier: Apache-2.0
"""The loop of PaLM-E (arXiv 2303.03378): plan, act, look again.

The model reads the goal and what is sensed of the table, and answers with the next sub-goal in words; the low-level
policy executes it, and may fail; then the table is sensed anew. Nothing of earlier steps is in the prompt, so that a
model which does not sense repeats itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from lionjax.core.errors import UserError, check_ranges
from lionjax.data.processor import ImageTextInput
from lionjax.data.sentences import SlotData
from lionjax.data.tabletop import goals, policy, tasks, world
from lionjax.data.tabletop.episodes import Episode
from lionjax.data.tabletop.goals import Goal
from lionjax.data.tabletop.tasks import Sensed
from lionjax.data.tabletop.world import Table
from lionjax.inference.model import Model

BATCH_SIZE = 32
Planner = Callable[[Sequence[tuple[Table, Goal]]], list[str]]  # from tables and goals to sub-goals in words


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """`horizon`: sub-goals of an episode at most; `failure_rate`: of sub-goals; `seed`: of the failures."""

    horizon: int = goals.HORIZON
    failure_rate: float = 0.1
    seed: int = 0

    def __post_init__(self):
        check_ranges(self, horizon=">= 1", failure_rate=">= 0 and <= 1", seed=">= 0")


@dataclasses.dataclass(frozen=True)
class Look:
    """One turn of the loop: the table before it, the planner's words, and what became of them.

    `understood`: they name a sub-goal on this table. `slipped`: the policy failed.
    """

    table: Table
    words: str
    understood: bool = True
    slipped: bool = False


@dataclasses.dataclass
class Outcome:
    """An episode as it went; `table`: at its end."""

    episode: Episode
    table: Table
    looks: list[Look] = dataclasses.field(default_factory=list)

    @property
    def is_success(self) -> bool:
        """Whether the goal is reached at the end."""
        return self.episode.goal.is_reached(self.table)


def run_episodes(planner: Planner, episodes: Sequence[Episode], config: LoopConfig = LoopConfig()) -> list[Outcome]:
    """All episodes, turn by turn, until the planner says that they are done or the horizon ends."""
    outcomes = [Outcome(episode, episode.table) for episode in episodes]
    rngs = [np.random.default_rng([config.seed, 9, number]) for number in range(len(outcomes))]
    running = list(range(len(outcomes)))
    for _ in range(config.horizon):
        if not running:
            break
        words = planner([(outcomes[k].table, outcomes[k].episode.goal) for k in running])
        for k, said in zip(list(running), words, strict=True):
            if not _take_turn(outcomes[k], said, bool(rngs[k].random() < config.failure_rate), rngs[k]):
                running.remove(k)
    return outcomes


def _take_turn(outcome: Outcome, words: str, slips: bool, rng: np.random.Generator) -> bool:
    """Execute what the planner said; returns whether the episode goes on."""
    table = outcome.table
    try:
        subgoal = goals.parse_subgoal(words, table)
    except UserError:
        outcome.looks.append(Look(table, words, understood=False))
        return True
    if subgoal == goals.DONE:
        outcome.looks.append(Look(table, words))
        return False
    outcome.table = policy.execute(table, subgoal, slips, rng)
    outcome.looks.append(Look(table, words, slipped=slips))
    return True


def oracle(asked: Sequence[tuple[Table, Goal]]) -> list[str]:
    """The planner that knows the way."""
    return [goals.next_subgoal(table, goal).text(table) for table, goal in asked]


def table_input(table: Table, question: str, sensed: Sensed, image_size: int) -> ImageTextInput:
    """A question about a table as a model with slots reads it."""
    masks = world.object_masks(table, image_size)[list(sensed.objects)] if sensed.objects else ()
    slots = SlotData(sensed.states, masks)
    return ImageTextInput(world.render(table, image_size), f"{sensed.text} {question}", slots=slots)


def answer_in_batches(model: Model, inputs: Sequence[ImageTextInput], blind: bool = False) -> list[str]:
    """The texts of the answers, in batches of one shape, so that one program is compiled for all turns."""
    rows = [model.processor.encode_input(one) for one in inputs]
    config, answers = model.generation_config("image_level"), []
    shape = (BATCH_SIZE, model.processor.config.max_prompt_tokens, model.processor.config.max_question_tokens)
    for start in range(0, len(rows), BATCH_SIZE):
        answers += model.engine.generate(rows[start : start + BATCH_SIZE], config, blind, shape)
    return [answer.text for answer in answers]


def model_planner(model: Model, sentence: str, blind: bool = False, seed: int = 0) -> Planner:
    """A planner that asks a model with slots; `blind`: all slots hold zeros (and images the mean color)."""
    rng, size = np.random.default_rng([seed, 10]), model.processor.config.image_size
    known: dict[str, str] = {}  # a blind model's answer to a text is always the same

    def plan(asked: Sequence[tuple[Table, Goal]]) -> list[str]:
        inputs = [
            table_input(table, tasks.plan_question(table, goal), tasks.sense(table, sentence, rng), size)
            for table, goal in asked
        ]
        if not blind:
            return answer_in_batches(model, inputs)
        new = {one.question: one for one in inputs if one.question not in known}
        known.update(zip(new, answer_in_batches(model, list(new.values()), blind=True)))
        return [known[one.question] for one in inputs]

    return plan
