# SPDX-License-Identifier: Apache-2.0
"""The tools that loaded models offer, over the images of a work folder."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image as PilImage

from lionjax.core.errors import UserError
from lionjax.data import templates
from lionjax.data.boxes import box_around
from lionjax.data.images import normalize_box
from lionjax.evaluation.report import plots
from lionjax.pipelines.tools.definition import Box, Boxes, Image, Labels, Question, Tool, Words
from lionjax.pipelines.tools.edges import canny
from lionjax.pipelines.tools.experts import Experts
from lionjax.pipelines.tools.workspace import Workspace

MAX_NAMES = 8  # objects of one call
DRAW_SIDE = 64  # pixels of the longer side at least, of images with boxes drawn
NUMBERS = {
    word: value
    for value, word in enumerate("zero one two three four five six seven eight nine ten eleven twelve".split())
}
NUMBERS |= {"no": 0, "none": 0}


@dataclass(frozen=True)
class DetectedObject:
    """An object with its box, x0 y0 x1 y1 in 0..1; `score` is 1 where the model gives none."""

    label: str
    box: list[float]
    score: float


@dataclass(frozen=True)
class ImageFile:
    """The name of an image that a tool made."""

    file: str


@dataclass(frozen=True)
class Segment(ImageFile):
    """The name of an image that shows a mask, its bounding box, and its area as a fraction of the image."""

    box: list[float]
    area: float


@dataclass(frozen=True)
class ImageSize(ImageFile):
    """An image of the work folder with its size in pixels."""

    width: int
    height: int


class Toolbox:
    """Tools over the images of `workspace` by the models of `experts`; a tool without its model is not offered."""

    def __init__(self, workspace: Workspace, experts: Experts | None = None):
        self.workspace, self.experts = workspace, experts or Experts()
        self._lock = threading.RLock()  # one call at a time: models share one device
        self.tools: tuple[Tool, ...] = tuple(self._build_tools())

    def _build_tools(self) -> list[Tool]:
        e, names = self.experts, self.experts.names
        model = names.get("model", "the model")
        finder = (
            names.get("detector", "Grounding DINO") if e.detector is not None else f"{model}, one box for each name"
        )
        sees, finds = e.model is not None, e.detector is not None or e.model is not None
        by_sam = e.segmenter is not None and finds
        segmenter = f"{names.get('segmenter', 'SAM')} in a box by {finder}" if by_sam else model
        marks = e.has_masks or by_sam
        counter = f"by {finder}, which boxes are counted of" if e.detector is not None else f"as {model} answers"
        tagger = names.get("tagger", "RAM") if e.tagger is not None else model
        one = "one call of a model"
        offered: list[tuple[bool, Callable[..., Any], str, str]] = [
            (True, self.images, "List the images of the work folder.", "no model"),
            (sees, self.caption, f"Describe an image in a sentence, by {model}.", one),
            (sees, self.answer, f"Answer a question about an image, by {model}.", one),
            (finds, self.detect, f"Find things and give their boxes, by {finder}.", one),
            (marks, self.segment, f"Find a thing and its pixels, drawn over the image, by {segmenter}.", one),
            (e.tagger is not None or sees, self.tag, f"Name what is in an image, by {tagger}.", one),
            (marks, self.cut_out, f"Cut a thing out on a transparent ground, by {segmenter}.", one),
            (True, self.crop, "Crop an image to a box.", "no model"),
            (True, self.mark, "Draw boxes with labels on an image.", "no model"),
            (True, self.edges, "Draw the edges of an image, by Canny's detector.", "no model"),
            (finds, self.count, f"Count things, {counter}.", one),
            (sees, self.read_regions, f"Say what is in each of some boxes, by {model}.", "one call for each box"),
        ]
        return [Tool(f.__name__, text, cost, f, self._lock) for is_here, f, text, cost in offered if is_here]

    def images(self) -> list[ImageSize]:
        """The images of the work folder."""
        sizes = {name: self.workspace.open(name).size for name in self.workspace.names()}
        return [ImageSize(name, width, height) for name, (width, height) in sizes.items()]

    def caption(self, image: Image) -> str:
        """A sentence about an image."""
        return self._reply(self.workspace.open(image), templates.CAPTION[0])

    def answer(self, image: Image, question: Question) -> str:
        """The answer to a question about an image."""
        if not question.strip():
            raise UserError("the question is empty; give one")
        return self._reply(self.workspace.open(image), question.strip())

    def detect(self, image: Image, words: Words) -> list[DetectedObject]:
        """The things that `words` name, the best first."""
        return self._find(self.workspace.open(image), split_words(words))

    def segment(self, image: Image, words: Words) -> Segment:
        """An image with the mask of a thing drawn over it."""
        opened = self.workspace.open(image)
        mask_HW = self._mask(opened, words)
        drawn = plots.draw_overlays(opened, [plots.Overlay(mask=mask_HW)], min_side=DRAW_SIDE)
        name = self.workspace.write(drawn, "segmentation", image)
        return Segment(name, _rounded(box_around(mask_HW)), round(float(mask_HW.mean()), 4))

    def tag(self, image: Image) -> list[str]:
        """Names of what is in an image."""
        opened = self.workspace.open(image)
        if self.experts.tagger is not None:
            return list(self.experts.tagger.tag([opened])[0].tags)
        words = re.split(r"[,|;\n]| and ", self._reply(opened, templates.TAGS[0]))
        return list(dict.fromkeys(word.strip(" .") for word in words if word.strip(" .")))

    def cut_out(self, image: Image, words: Words) -> ImageFile:
        """A thing without what is around it: an image that is transparent elsewhere."""
        opened = self.workspace.open(image)
        mask_HW = self._mask(opened, words)
        cut = opened.copy()
        cut.putalpha(PilImage.fromarray(mask_HW.astype(np.uint8) * 255))
        return ImageFile(self.workspace.write(cut, "cut-out", image))

    def crop(self, image: Image, box: Box) -> ImageFile:
        """The part of an image in a box."""
        opened = self.workspace.open(image)
        x0, y0, x1, y1 = normalize_box(box)
        left, top = min(int(x0 * opened.width), opened.width - 1), min(int(y0 * opened.height), opened.height - 1)
        right, bottom = (
            max(start + 1, round(end)) for start, end in ((left, x1 * opened.width), (top, y1 * opened.height))
        )
        return ImageFile(self.workspace.write(opened.crop((left, top, right, bottom)), "crop", image))

    def mark(self, image: Image, boxes: Boxes, labels: Labels = "") -> ImageFile:
        """An image with boxes and their labels drawn on it."""
        opened = self.workspace.open(image)
        texts = [text.strip() for text in labels.split(",")] if labels else []
        if len(texts) > len(boxes):
            raise UserError(f"{len(texts)} labels were given for {len(boxes)} boxes; give at most one for each")
        texts += [""] * (len(boxes) - len(texts))
        overlays = [plots.Overlay(normalize_box(box), text) for box, text in zip(boxes, texts)]
        drawn = plots.draw_overlays(opened, overlays, min_side=DRAW_SIDE)
        return ImageFile(self.workspace.write(drawn, "detect-something", image))

    def edges(self, image: Image) -> ImageFile:
        """The edges of an image, white on black."""
        edge_HW = canny(np.asarray(self.workspace.open(image).convert("L")))
        return ImageFile(self.workspace.write(PilImage.fromarray(edge_HW.astype(np.uint8) * 255), "edge", image))

    def count(self, image: Image, words: Words) -> int:
        """How many things `words` name."""
        opened, names = self.workspace.open(image), split_words(words)
        if self.experts.detector is not None:
            return len(self._find(opened, names))
        return sum(read_number(self._reply(opened, templates.COUNT[0].format(nouns=name))) for name in names)

    def read_regions(self, image: Image, boxes: Boxes) -> list[str]:
        """What is in each box."""
        opened, normal = self.workspace.open(image), [normalize_box(box) for box in boxes]
        if not normal:
            raise UserError("there are no boxes; give at least one")
        prompts = [templates.REG[0]] * len(normal)
        answers = self.experts.model.answer([opened] * len(normal), prompts, boxes=[[box] for box in normal])
        return [answer.text for answer in answers]

    def _reply(self, image: PilImage.Image, prompt: str) -> str:
        return self.experts.model.answer([image], [prompt])[0].text

    def _find(self, image: PilImage.Image, names: list[str]) -> list[DetectedObject]:
        if self.experts.detector is not None:
            (found,) = self.experts.detector.detect([image], " ".join(f"{name}." for name in names))
            rows = zip(found.phrases, found.boxes_K4, found.scores)
            return [DetectedObject(label, _rounded(box), round(float(score), 4)) for label, box, score in rows]
        prompts = [templates.REC[0].format(expr=name) for name in names]
        answers = self.experts.model.answer([image] * len(names), prompts)
        return [
            DetectedObject(name, _rounded(box), 1.0) for name, answer in zip(names, answers) for box in answer.boxes
        ]

    def _mask(self, image: PilImage.Image, words: str) -> np.ndarray:
        """bool (height, width): the mask of the first thing that `words` name. Raises UserError if there is none."""
        name = ", ".join(split_words(words))
        if self.experts.segmenter is not None:
            things = self._find(image, split_words(words))
            masks = [self.experts.segmenter.segment(image, tuple(thing.box)) for thing in things[:1]]
        else:
            masks = self.experts.model.answer([image], [templates.RES[0].format(expr=name)])[0].masks
        if not len(masks) or not masks[0].any():
            raise UserError(f"nothing was found for {name[:80]!r}; use other words")
        return np.asarray(masks[0], bool)


def split_words(words: str) -> list[str]:
    """The names of a text, between commas, periods and semicolons. Raises UserError for none or too many."""
    names = [name.strip() for name in re.split(r"[,.;\n]", words) if name.strip()]
    if not 0 < len(names) <= MAX_NAMES:
        raise UserError(f"words has {len(names)} names; give 1 to {MAX_NAMES}, between commas")
    return names


def read_number(text: str) -> int:
    """The first number of an answer, in digits or words up to twelve. Raises UserError for an answer without one."""
    for word in re.findall(r"\d{1,9}|[a-z]+", text.lower()):
        if word.isdigit() or word in NUMBERS:
            return int(word) if word.isdigit() else NUMBERS[word]
    raise UserError(f"the model's answer {text[:60]!r} has no number; ask with `answer` instead")


def _rounded(box: Sequence[float]) -> list[float]:
    return [round(float(edge), 4) for edge in np.clip(np.asarray(box, float), 0, 1)]
