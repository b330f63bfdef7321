# SPDX-License-Identifier: Apache-2.0
"""The benchmark of two-step questions: with tools that see the truth, the script's steps lead to the true answers."""

import re
from types import SimpleNamespace

import numpy as np

from benchmarks import agents
from lionjax.data.scenes import referring
from lionjax.inference.engine import Answer

SIZE = 64


class Oracle:
    """A model that knows the scene behind each image."""

    processor = SimpleNamespace(config=SimpleNamespace(sam_image_size=0))

    def __init__(self, questions):
        self.scenes = {question.scene.render(SIZE).tobytes(): question.scene for question in questions}

    def answer(self, images, prompts, boxes=None):
        return [self.one(self.scenes[np.asarray(image).tobytes()], prompt) for image, prompt in zip(images, prompts)]

    def one(self, scene, prompt):
        names = [
            [*referring.attribute_expressions(scene, k), f"the {thing.color} {thing.shape}"]
            for k, thing in enumerate(scene.things)
        ]
        if prompt.startswith("Describe"):
            return self.text(", ".join(referring.group_phrases(scene)))
        if found := re.fullmatch(r"How many (\w+) objects are there\?", prompt):
            return self.text(str(sum(thing.color == found[1] for thing in scene.things)))
        expr = re.fullmatch(r"(?:Where is|What color is) (.*)\?", prompt)[1]
        thing = next(thing for thing, its in zip(scene.things, names) if expr in its)
        return Answer(thing.color, np.array([thing.box]) if prompt.startswith("Where") else np.zeros((0, 4)))

    def text(self, text):
        return Answer(text, np.zeros((0, 4)))


def test_true_steps_lead_to_the_true_answer():
    questions = agents.sample_questions(60, 0)
    right = list(agents.by_tools(Oracle(questions), questions, SIZE))
    by_kind = {kind: [r for r, q in zip(right, questions) if q.kind == kind] for kind in agents.QUESTIONS}
    assert all(by_kind["count"])
    # Of several things with one name, one is found; and the box that overlaps most need not be in front.
    assert np.mean(by_kind["farthest"]) > 0.7 and np.mean(by_kind["hides"]) > 0.6


def test_an_answer_counts_by_its_first_number_color_or_shape():
    questions = {question.kind: question for question in agents.sample_questions(3, 1)}
    assert agents.is_right(questions["count"], f"There are {questions['count'].answer}, not 9.")
    assert not agents.is_right(questions["count"], "many")
    assert agents.is_right(questions["farthest"], f"It is {questions['farthest'].answer}.")
    assert not agents.is_right(questions["hides"], "unknown")
