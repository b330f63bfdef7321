# SPDX-License-Identifier: Apache-2.0
"""The tabletop: an exact simulator, goals in words, a policy that executes sub-goals, and moments with questions."""

import dataclasses
import math
import time

import numpy as np
import pytest

from lionjax.core.errors import UserError
from lionjax.data.scenes import world as scenes
from lionjax.data.tabletop import episodes, goals, policy, tasks, world
from lionjax.data.tabletop.dataset import Tabletop, sample_moment
from lionjax.data.tabletop.episodes import sample_episode
from lionjax.data.tabletop.goals import DONE, Goal, Subgoal, parse_subgoal
from lionjax.data.tabletop.world import Action, Body, Table, step

STAR, RING, HEART = Body("red", "star", 0.2, 0.4), Body("blue", "ring", 0.5, 0.4), Body("green", "heart", 0.8, 0.8)
TABLE = Table((STAR, RING, HEART))


def at(table: Table, index: int) -> Table:
    """The table with the gripper above an object."""
    body = table.bodies[index]
    return dataclasses.replace(table, gripper=(body.x, body.y))


def test_a_push_ends_where_two_discs_touch():
    pushed = step(at(TABLE, 0), Action("push", 0.3, 0.0))
    assert pushed.bodies[0].x == pytest.approx(0.5 - 2 * world.RADIUS, abs=1e-12)
    assert pushed.bodies[0].y == 0.4 and pushed.gripper == (pushed.bodies[0].x, 0.4)
    slanted = step(at(TABLE, 0), Action("push", 0.3, 0.05))
    distance = math.hypot(slanted.bodies[0].x - 0.5, slanted.bodies[0].y - 0.4)
    assert distance == pytest.approx(2 * world.RADIUS, abs=1e-12)
    assert step(at(TABLE, 2), Action("push", 0.3, 0.0)).bodies[2].x == world.RIGHT


def test_an_object_is_picked_stacked_and_pushed_with_its_stack():
    held = step(at(TABLE, 0), Action("pick"))
    assert held.held == 0 and step(held, Action("pick")) == held
    stacked = step(step(held, Action("move", 0.3, 0.0)), Action("stack"))
    assert stacked.bodies[0].support == 1 and stacked.level(0) == 1 and stacked.held == -1
    both = step(at(stacked, 1), Action("push", 0.0, 0.1))
    assert both.bodies[0][2:4] == both.bodies[1][2:4] == (0.5, pytest.approx(0.5))
    assert step(at(stacked, 1), Action("pick")).held == 0, "the highest object is taken"
    beside = step(held, Action("move", 0.2, 0.0))
    assert step(beside, Action("place")) == beside, "there is no room beside the ring"


@pytest.mark.parametrize(
    ("action", "words"),
    [(Action("fly"), "no action 'fly'; choose one of move, push"), (Action("move", 0.9), "give at most 0.35")],
)
def test_an_unknown_action_is_one_clear_sentence(action, words):
    with pytest.raises(UserError, match=words) as error:
        step(TABLE, action)
    assert "\n" not in str(error.value)


def test_thousands_of_steps_a_second_run_on_one_core():
    cycle = (Action("move", 0.1, 0.1), Action("push", 0.1), Action("pick"), Action("place"), Action("move", -0.1, -0.1))
    table, began = at(TABLE, 0), time.process_time()
    for _ in range(200):
        for action in cycle:
            table = step(table, action)
    assert 1000 / (time.process_time() - began) > 2000


def test_episodes_are_deterministic_take_turns_and_hold_out_goals_and_combinations():
    seen, areas = set(), set()
    for index in range(60):
        train, heldout = (sample_episode(split, index) for split in ("train", "heldout"))
        assert sample_episode("train", index) == train and sample_episode("train", index, seed=1) != train
        assert train.goal.kind == heldout.goal.kind == goals.GOALS[index % 4]
        assert 3 <= len(train.table.bodies) <= 6
        names = {(body.color, body.shape) for body in train.table.bodies}
        assert not names & scenes.HELD_OUT_PAIRS and len(names) == len(train.table.bodies)
        target = heldout.table.bodies[heldout.goal.target]
        assert (target.color, target.shape) in scenes.HELD_OUT_PAIRS
        seen.add(train.text)
        if train.goal.kind in ("push", "place"):
            areas.add((train.table.bodies[train.goal.target].color, train.goal.other))
            assert episodes.held_out_area(target.color, heldout.goal.other)
        for episode in (train, heldout):
            plan = policy.solve(episode.table, episode.goal, episodes.MAX_PLAN)
            assert 2 <= len(set(plan)) and len(plan) <= episodes.MAX_PLAN, "one sub-goal alone solves none"
    assert not any(episodes.held_out_area(*pair) for pair in areas)


def test_what_blocks_the_only_push_is_picked_up_and_a_push_that_works_is_preferred():
    goal, blocked = Goal("push", 0, 4), TABLE.moved({0: {"x": 0.2, "y": 0.6}, 1: {"x": 0.3, "y": 0.69}})
    assert goals.next_subgoal(TABLE.moved({0: {"x": 0.2, "y": 0.6}}), goal) == Subgoal("push", 0, "right")
    assert goals.next_subgoal(blocked, goal) == Subgoal("pick", 1)
    assert goals.next_subgoal(blocked, Goal("push", 0, 1)) == Subgoal("push", 0, "up"), "the other way of two"
    lying = blocked.moved({2: {"support": 1, "x": 0.3, "y": 0.69}})
    assert goals.next_subgoal(lying, goal) == Subgoal("pick", 2), "what lies on it first"


def test_every_subgoal_is_read_back_from_its_words_and_others_are_refused():
    table = sample_episode("train", 3).table
    for subgoal in goals.possible_subgoals(table):
        assert parse_subgoal(f" {subgoal.text(table).upper()}. ", table) == subgoal
    with pytest.raises(UserError, match="'juggle' is no sub-goal on this table"):
        parse_subgoal("juggle", table)


def test_what_slips_is_not_done_and_leaves_a_table_without_overlap():
    for index in range(12):
        episode, rng = sample_episode("train", index), np.random.default_rng(index)
        subgoal = goals.next_subgoal(episode.table, episode.goal)
        table = policy.execute(episode.table, subgoal, True, rng)
        assert subgoal.verb == "push" or not subgoal.is_achieved(table)
        bases = [body for body in table.bodies if body.support == world.ON_TABLE]
        gaps = [math.hypot(a.x - b.x, a.y - b.y) for k, a in enumerate(bases) for b in bases[:k]]
        assert min(gaps, default=1.0) > 2 * world.RADIUS - 1e-6
        assert table.gripper == pytest.approx(world.HOME)


def test_the_state_vector_and_the_masks_follow_the_objects():
    table = step(at(TABLE, 0), Action("pick"))
    state = np.reshape(world.state_vector(table), (world.MAX_OBJECTS, -1))
    assert (
        state.shape[1] == world.STATE_FIELDS + world.MAX_OBJECTS and len(world.state_vector(table)) == world.STATE_WIDTH
    )
    assert state[:, 0].tolist() == [1, 1, 1, 0, 0, 0] and not state[3:].any()
    assert state[0, world.STATE_FIELDS - 2] == 1 and state[1, world.STATE_FIELDS - 2] == 0
    stacked = TABLE.moved({0: {"support": 1, "x": 0.5, "y": 0.4}})
    masks = world.object_masks(stacked, 112)
    rows = [np.argwhere(mask).mean(axis=0) / 112 for mask in masks]
    assert rows[0][0] == pytest.approx(0.4 - world.LEVEL_SHIFT, abs=0.02) and rows[2][1] == pytest.approx(0.8, abs=0.02)
    assert (masks.sum(axis=0) <= 1).all() and world.render(stacked, 112).shape == (112, 112, 3)


def test_answers_of_moments_are_those_of_the_table():
    moment = tasks.Moment(
        TABLE.moved({0: {"support": 1, "x": 0.5, "y": 0.4}}), Goal("pick", 1), Subgoal("pick", 0), True
    )
    rng, found = np.random.default_rng(0), {}
    for _ in range(60):
        for task in tasks.QUESTIONS:
            example = tasks.make_example(task, moment, "objects", rng)
            found.setdefault(task, set()).add((example.question.split("<obj_3> ")[-1], example.answer))
            order = [moment.table.bodies[k].name for k in example.slot_objects]
            if example.kind == "tag":
                assert order[int(example.answer.split()[-1]) - 1] in example.question
    assert found["plan"] == {("hold the blue ring.", "pick up the red star")}
    assert found["success"] == {("hold the blue ring. Done?", "no"), ("Step: pick up the red star. Done?", "no")}
    assert found["recovery"] == {("hold the blue ring. Step: pick up the red star.", "pick up the red star")}
    assert ("What is on the blue ring?", "the red star") in found["state_vqa"]
    assert ("Where is the green heart?", "bottom right") in found["state_vqa"]
    assert ("What is in the hand?", "nothing") in found["state_vqa"]


def test_a_dialog_asks_about_one_table_with_goals_that_training_may_have():
    source = Tabletop((40, 40, 40))
    texts, areas = {}, set()
    for split in ("train", "heldout"):
        opened = source.open(split, 10**6)
        for index in range(40):
            moment, rng = opened.moment(index), np.random.default_rng(index)
            example = opened.make_example("dialog", index, moment, rng, 0.0)
            rounds = (*example.history, (example.question, example.answer))
            assert len(rounds) == tasks.DIALOG_ROUNDS and [q.count("<obj_1>") for q, _ in rounds] == [1, 0, 0, 0]
            texts.setdefault(split, []).append((moment, [q.split("<obj_")[-1].split("> ")[-1] for q, _ in rounds]))
    for index in range(300):
        moment, rng = texts["train"][index % 40][0], np.random.default_rng(index)
        goal, bodies = episodes.draw_goal(moment.table, rng), moment.table.bodies
        assert goal.kind in goals.GOALS and goal.other != goal.target or goal.kind in ("push", "place")
        assert goals.parse_subgoal(goals.next_subgoal(moment.table, goal).text(moment.table), moment.table)
        if goal.kind in ("push", "place"):
            areas.add((bodies[goal.target].color, goal.other))
    assert not any(episodes.held_out_area(*pair) for pair in areas)

    def num_other_goals(split):
        kinds = ("push", "hold", "put", "stack")
        asked = [(m, q) for m, questions in texts[split] for q in questions if q.startswith(kinds)]
        return sum(not q.startswith(m.goal.text(m.table)) for m, q in asked)

    assert num_other_goals("train") > 20 and num_other_goals("heldout") == 0


def test_masks_are_those_of_the_table_in_the_order_that_is_asked_for():
    opened = Tabletop((5, 1, 1), image_size=56).open("train", 10**6)
    whole = world.object_masks(opened.moment(3).table, 56)
    np.testing.assert_array_equal(opened.masks(3, (2, 0)), whole[[2, 0]])


def test_moments_differ_in_progress_and_some_follow_a_failure():
    source = Tabletop(failure_rate=0.5)
    moments = [sample_moment(source, "train", index) for index in range(40)]
    assert any(m.last is None for m in moments) and any(m.failed for m in moments)
    assert any(goals.next_subgoal(m.table, m.goal) == DONE for m in moments)
    opened = source.open("train", 10**6)
    assert len(opened) == 3000 and opened.moment(5) == sample_moment(source, "train", 5)
    with pytest.raises(ValueError, match="sentence is 'odor'"):
        Tabletop(sentence="odor")
