# SPDX-License-Identifier: Apache-2.0
"""Models of tools and language models that answer from a script: no network, no compilation."""

from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw

from lionjax.inference.detector import Detections
from lionjax.inference.engine import Answer
from lionjax.inference.tagger import TagResult
from lionjax.pipelines.completion import Completion, ToolCall
from lionjax.pipelines.tools.experts import Experts
from lionjax.pipelines.tools.toolbox import Toolbox
from lionjax.pipelines.tools.workspace import Workspace

SQUARE = (8, 10, 32, 34)  # pixels of the red square in the picture
SIZE = (96, 72)


def picture():
    image = Image.new("RGB", SIZE, "#f0f0e0")
    ImageDraw.Draw(image).rectangle((SQUARE[0], SQUARE[1], SQUARE[2] - 1, SQUARE[3] - 1), fill="#d02020")
    return image


def square_box():
    return np.array([[SQUARE[0] / SIZE[0], SQUARE[1] / SIZE[1], SQUARE[2] / SIZE[0], SQUARE[3] / SIZE[1]]])


class ScriptedModel:
    """A model that finds red pixels and has one answer to each kind of question."""

    processor = SimpleNamespace(config=SimpleNamespace(sam_image_size=64))

    def __init__(self):
        self.prompts = []

    def answer(self, images, prompts, boxes=None):
        self.prompts += prompts
        return [self.one(image, prompt) for image, prompt in zip(images, prompts)]

    def one(self, image, prompt):
        if prompt.startswith("Segment"):
            pixels = np.asarray(image, int)
            return Answer("mask", square_box(), ((pixels[..., 0] - pixels[..., 1]) > 60)[None])
        if prompt.startswith("Where is"):
            return Answer("at [..]", square_box() if "square" in prompt else np.zeros((0, 4)))
        known = {"How many": "There are two.", "Describe": "A red square.", "List": "red, square"}
        text = next((reply for start, reply in known.items() if prompt.startswith(start)), f"re {prompt}")
        return Answer(text, np.zeros((0, 4)))


class ScriptedDetector:
    def detect(self, images, prompt):
        self.prompt = prompt
        box = square_box().astype(np.float32)
        return [Detections(box, (0.75,), ("square",), np.zeros((1, 4)), image.size) for image in images]


class ScriptedTagger:
    def tag(self, images):
        return [TagResult(("square", "red"), (), (0.9, 0.8)) for _ in images]


def open_toolbox(folder, detector=False, tagger=False, model=True):
    experts = Experts(
        ScriptedModel() if model else None,
        ScriptedDetector() if detector else None,
        ScriptedTagger() if tagger else None,
        names={"model": "the model of tiny", "detector": "Grounding DINO of dino", "tagger": "RAM of ram"},
    )
    return Toolbox(Workspace(folder), experts)


class ScriptedLanguageModel:
    """Gives its replies in order: texts, or (text, [(tool, arguments), ...]); keeps what it was asked."""

    def __init__(self, *replies):
        self.replies, self.requests = list(replies), []

    def complete(self, requests):
        self.requests += requests
        return [self.next() for _ in requests]

    def next(self):
        reply = self.replies.pop(0)
        if reply is None or isinstance(reply, Completion):
            return reply
        text, calls = (reply, ()) if isinstance(reply, str) else reply
        found = (ToolCall(f"c{k}", name, arguments) for k, (name, arguments) in enumerate(calls))
        return Completion(text, tool_calls=tuple(found))

    def describe(self):
        return {"model": "scripted"}
