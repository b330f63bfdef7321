# SPDX-License-Identifier: Apache-2.0
"""A scripted data engine: writes LLaVA's kinds of instruction data about scenes, in the place of a language model.

It is a pure function of one request and knows nothing else of a scene: the captions and boxes of the last message, and
from the system message the forms of questions and the kinds of things that the collection has. Of English it knows the
words for colors, shapes, sizes and patterns. A real language model would be given the same request.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lionjax.data import templates
from lionjax.data.scenes import referring, world
from lionjax.pipelines.completion import ChatRequest, Completion, Message

QUESTION_FORMS = {
    "color": templates.COLOR,
    "shape": templates.SHAPE,
    "count": templates.COUNT,
    "attribute": templates.ATTRIBUTE_YESNO,
    "more": templates.COUNT_COMPARISON,
    "existence": templates.EXISTENCE,
}
NUM_QUESTIONS = 2  # of each form in a conversation
_RULES = (
    "Each question follows a line Question:, each answer a line Answer:, and a line === lies between. Write as if you "
    "looked at the image. Answer with a single word or number, nothing else. Ask only what has a certain answer, and "
    "as often for what is not there as for what is. Name only things of this collection. Never mention captions, "
    "boxes or coordinates."
)
SHORT_ANSWERS = {
    "conversation": "You see an image, which five sentences describe. Write a conversation between you and a person "
    f"who asks about it: {NUM_QUESTIONS} questions of each form below. {_RULES}",
    "reasoning": "You see an image, which five sentences describe, followed by things in it with their places: left, "
    "top, right and bottom edge as fractions of the image. Invent one difficult question, of one of the forms below, "
    f"about a thing that only its place tells apart from others. {_RULES}",
}
EXAMPLE_CONTEXT = """A red plain star and two blue rings.
A picture of a red star and two blue rings.
Three objects.
Shapes on a plain background.
A red star beside two blue rings."""
EXAMPLE_BOXES = """

red star: [0.1, 0.3, 0.4, 0.6]
blue ring: [0.5, 0.1, 0.7, 0.3]
blue ring: [0.5, 0.6, 0.7, 0.8]"""
EXAMPLE_REPLIES = {
    "conversation": "Question:\nWhat color is the star?\n===\nAnswer:\nred\n===\nQuestion:\nHow many rings are there?\n"
    "===\nAnswer:\n2\n===\nQuestion:\nIs there a blue star?\n===\nAnswer:\nno",
    "reasoning": "Question:\nWhat color is the topmost ring?\n===\nAnswer:\nblue",
}


def write_few_shot(folder: Path, kind: str, vocabulary: Sequence[str]) -> Path:
    """Write LLaVA's files for `--few-shot` that name the answer format, the forms of questions and the things."""
    forms = [f"{name}: {form}" for name, texts in QUESTION_FORMS.items() for form in texts]
    system = "\n".join([SHORT_ANSWERS[kind], "", "Forms:", *forms, "", "Things:", ", ".join(vocabulary)])
    context = EXAMPLE_CONTEXT + (EXAMPLE_BOXES if kind == "reasoning" else "")
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"system_message": system, "000_caps": context, "000_conv": EXAMPLE_REPLIES[kind]}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


# ------------------------------------------------------------------ reading a request

ATTRIBUTES = ("size", "color", "texture", "shape")
NUMBERS = {word: number for number, word in enumerate(referring.NUMBER_WORDS)} | {"a": 1, "an": 1}
PHRASE = re.compile(
    rf"\b(?P<number>{'|'.join(NUMBERS)}) (?:(?P<size>{'|'.join(world.SIZES)}) )?(?P<color>{'|'.join(world.COLORS)}) "
    rf"(?:(?P<texture>{'|'.join(world.TEXTURES)}) )?(?P<shape>{'|'.join(world.SHAPES)})(?:e?s)?\b",
    re.IGNORECASE,
)
BOX_LINE = re.compile(r"^(.+): \[([\d.]+), ([\d.]+), ([\d.]+), ([\d.]+)\]$", re.MULTILINE)
FORM_LINE = re.compile(r"^(\w+): (.*\{.*)$", re.MULTILINE)
VOCABULARY = re.compile(r"^Things:\n(.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Named:
    """A thing as a request names it; what is not named is ""; `center`: (x, y) of its box where there is one."""

    color: str
    shape: str
    size: str = ""
    texture: str = ""
    center: tuple[float, float] | None = None


def read_captions(text: str) -> list[Named]:
    """The things of the caption that names most of them and most about them."""
    best: list[Named] = []
    for caption in text.split("\n\n")[0].split("\n"):
        found = []
        for match in PHRASE.finditer(caption.rpartition(": ")[2]):
            words = {attribute: (match[attribute] or "").lower() for attribute in ATTRIBUTES}
            found += [Named(**words)] * NUMBERS[match["number"].lower()]
        best = max(best, found, key=lambda things: sum(bool(getattr(t, a)) for t in things for a in ATTRIBUTES))
    return best


def read_boxes(text: str) -> list[Named]:
    """The things of the lines with boxes."""
    things = []
    for name, *edges in BOX_LINE.findall(text):
        left, top, right, bottom = map(float, edges)
        color, shape = name.split()[-2:]
        things.append(Named(color, shape, center=((left + right) / 2, (top + bottom) / 2)))
    return things


# ------------------------------------------------------------------ writing questions

Pair = tuple[str, str]
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis, sign
OUTERMOST = {"leftmost": "left of", "rightmost": "right of", "topmost": "above", "bottommost": "below"}
MARGIN = 0.1  # of the image; smaller differences are no certain places


def lies(first: Named, relation: str, second: Named, margin: float = MARGIN) -> bool:
    """Whether the center of one box lies clearly on a side of another's."""
    axis, sign = RELATIONS[relation]
    return sign * (first.center[axis] - second.center[axis]) >= margin


@dataclass
class QuestionWriter:
    """Writes questions about things, each method of one form; None where the things allow none."""

    things: list[Named]
    forms: dict[str, list[str]]
    vocabulary: list[str]  # "red star"
    rng: np.random.Generator

    def choose(self, options):
        return options[self.rng.integers(len(options))]

    def phrase(self, form: str, **words: str) -> str:
        return templates.sample_question(tuple(self.forms[form]), self.rng, **words)

    def pair_of(self, thing: Named) -> str:
        return f"{thing.color} {thing.shape}"

    def unique_names(self, k: int, excluded: str) -> list[str]:
        """Names of thing k that no other thing has, the shortest first."""
        thing, found = self.things[k], []
        usable = [a for a in ATTRIBUTES if a != excluded and getattr(thing, a)]
        for attributes in (some for size in range(1, 5) for some in itertools.combinations(usable, size)):
            alike = [t for t in self.things if all(getattr(t, a) == getattr(thing, a) for a in attributes)]
            words = [getattr(thing, a) for a in attributes] + ([] if "shape" in attributes else ["object"])
            if len(alike) == 1 and attributes != ("size",):
                found.append("the " + " ".join(words))
        return found

    def placed_names(self, k: int, excluded: str) -> list[str]:
        """Names of thing k by its place among others of one name: "the leftmost star"."""
        thing, found = self.things[k], []
        for attributes in (("shape",), ("color",), ("color", "shape")):
            rivals = [
                t for t in self.things if t is not thing and all(getattr(t, a) == getattr(thing, a) for a in attributes)
            ]
            if excluded in attributes or not rivals:
                continue
            noun = " ".join([getattr(thing, a) for a in attributes] + ([] if "shape" in attributes else ["object"]))
            found += [
                f"the {word} {noun}"
                for word, side in OUTERMOST.items()
                if all(lies(thing, side, rival) for rival in rivals)
            ]
            anchors = [t for t in self.things if [self.pair_of(o) for o in self.things].count(self.pair_of(t)) == 1]
            for anchor, side in itertools.product(anchors, RELATIONS):
                others = [rival for rival in rivals if rival is not anchor]
                if (
                    anchor is not thing
                    and lies(thing, side, anchor)
                    and not any(lies(rival, side, anchor, 0) for rival in others)
                ):
                    found.append(f"the {noun} {side} the {self.pair_of(anchor)}")
        return found

    def name(self, k: int, excluded: str, by_place: bool = False) -> str | None:
        names = self.placed_names(k, excluded) if by_place else self.unique_names(k, excluded)
        if not names:
            return None
        return names[0] if not by_place and self.rng.random() < 0.5 else self.choose(names)

    def value(self, attribute: str, by_place: bool = False) -> Pair | None:
        """What color or shape a thing has."""
        for k in self.rng.permutation(len(self.things)):
            if name := self.name(k, attribute, by_place):
                return self.phrase(attribute, expr=name), getattr(self.things[k], attribute)
        return None

    def attribute(self, by_place: bool = False) -> Pair | None:
        """Whether a thing has a color or pattern that some thing has; yes and no equally often for each word."""
        attributes = [a for a in ("color", "texture") if any(getattr(t, a) for t in self.things)]
        attribute, is_true = self.choose(attributes), bool(self.rng.random() < 0.5)
        words = sorted({getattr(t, attribute) for t in self.things})
        for word in self.rng.permutation(words).tolist():
            names: dict[bool, list[str]] = {True: [], False: []}
            for k in self.rng.permutation(len(self.things)):
                fits = getattr(self.things[k], attribute) == word
                known = attribute != "color" or f"{word} {self.things[k].shape}" in self.vocabulary
                if (name := self.name(k, attribute, by_place)) and (fits or known):
                    names[fits].append(name)
            if names[True] and names[False]:
                return self.phrase("attribute", expr=names[is_true][0], word=word), "yes" if is_true else "no"
        return None

    def count(self) -> Pair:
        """How many things have a name; numbers that occur in the image are equally frequent."""
        sort = self.choose(("color", "shape", "texture", "pair", "pair", "object"))
        words = {"color": world.COLORS, "shape": world.SHAPES, "texture": world.TEXTURES, "pair": self.vocabulary}
        counts = {"object": len(self.things)}
        if sort != "object":
            ending = "" if sort in ("shape", "pair") else " object"
            values = [self.pair_of(t) if sort == "pair" else getattr(t, sort) for t in self.things]
            counts = {word + ending: values.count(word) for word in words[sort]}
        number = self.choose(sorted(set(counts.values())))
        noun = self.choose([noun for noun, count in counts.items() if count == number])
        return self.phrase("count", nouns=referring.pluralize(noun)), str(number)

    def more(self) -> Pair | None:
        """Whether there are more things of one color or shape than of another."""
        attribute, is_true = self.choose(("color", "shape")), self.rng.random() < 0.5
        counts = Counter(getattr(thing, attribute) for thing in self.things)
        unequal = [(a, b) for a in sorted(counts) for b in sorted(counts) if counts[a] > counts[b]]
        if not unequal:
            return None
        nouns = [word if attribute == "shape" else f"{word} object" for word in self.choose(unequal)]
        first, second = (referring.pluralize(noun) for noun in (nouns if is_true else nouns[::-1]))
        return self.phrase("more", first=first, second=second), "yes" if is_true else "no"

    def existence(self) -> Pair:
        """Whether there is a thing; every other absent one has a color and a shape that are in the image."""
        present = sorted({self.pair_of(thing) for thing in self.things})
        absent = [pair for pair in self.vocabulary if pair not in present]
        words = {word for pair in present for word in pair.split()}
        alike = [pair for pair in absent if set(pair.split()) <= words]
        is_true = bool(self.rng.random() < 0.5)
        pair = self.choose(present if is_true else alike if alike and self.rng.random() < 0.5 else absent)
        return self.phrase("existence", noun=referring.with_article(pair)), "yes" if is_true else "no"

    def conversation(self) -> list[Pair]:
        """Different questions of each form in random order."""
        makers = {"color": lambda: self.value("color"), "shape": lambda: self.value("shape")}
        makers |= {form: getattr(self, form) for form in ("attribute", "count", "more", "existence")}
        found = {}
        for form in self.forms:
            found |= dict(filter(None, (makers[form]() for _ in range(NUM_QUESTIONS))))
        pairs = list(found.items())
        return [pairs[k] for k in self.rng.permutation(len(pairs))]

    def reasoning(self) -> Pair:
        """A question about a thing that its place tells apart; else about one that its name does."""
        makers = [lambda p: self.value("color", p), lambda p: self.value("shape", p), self.attribute]
        for by_place in (True, False):
            for k in self.rng.permutation(len(makers)):
                if pair := makers[k](by_place):
                    return pair
        return self.existence()

    def description(self) -> str:
        """The number of things, and what they are from left to right."""
        order = sorted(self.things, key=lambda thing: thing.center)
        phrases = [referring.with_article(self.pair_of(thing)) for thing in order]
        number = referring.NUMBER_WORDS[len(order)]
        return f"There are {number} objects in the image. From left to right: {referring.join_phrases(phrases)}."


def reply_to(messages: Sequence[Message]) -> str:
    """The reply to one conversation; equal conversations have equal replies."""
    system, context = messages[0]["content"], messages[-1]["content"]
    forms: dict[str, list[str]] = {}
    for name, form in FORM_LINE.findall(system):
        forms.setdefault(name, []).append(form)
    listed = VOCABULARY.search(system)
    rng = np.random.default_rng(int(hashlib.sha256((system + context).encode()).hexdigest()[:15], 16))
    boxed = read_boxes(context)
    writer = QuestionWriter(boxed or read_captions(context), forms, listed[1].split(", ") if listed else [], rng)
    if not forms:  # no questions are asked for: a description
        return writer.description()
    pairs = [writer.reasoning()] if boxed else writer.conversation()
    return "\n===\n".join(f"Question:\n{question}\n===\nAnswer:\n{answer}" for question, answer in pairs)


class ScriptedEngine:
    """A `completion.LanguageModel` that replies by `reply_to`."""

    def describe(self) -> dict:
        """What stands in reports."""
        return {"model": "scripted engine"}

    def complete(self, requests: Sequence[ChatRequest]) -> list[Completion]:
        """The reply to each request."""
        return [Completion(reply_to(request.messages)) for request in requests]
