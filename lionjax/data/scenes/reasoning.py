# SPDX-License-Identifier: Apache-2.0
"""Questions about scenes whose object must be inferred: no word of the question names it.

As in ReasonSeg (LISA, arXiv 2308.00692): an occluder by what it hides, the odd one of a group, an object by how often
its color or shape occurs, or by what it is farthest from. Only color and shape make an object odd or equal to another.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from lionjax.data.scenes import referring
from lionjax.data.scenes.world import Scene

OTHER = {"color": "shape", "shape": "color"}
MIN_GROUP = 3  # objects of a group with an odd one


class Inference(NamedTuple):
    """An object k by a description without its own name, and the noun in that description."""

    kind: str
    target: int
    description: str
    noun: str


def hiding(scene: Scene) -> list[Inference]:
    """'what hides a part of the red star', for each object that exactly one other covers."""
    found = []
    for j in range(len(scene.things)):
        covering = [k for k, thing in enumerate(scene.things) if j in thing.covers]
        names = referring.attribute_expressions(scene, j)
        if len(covering) == 1 and names:
            found.append(Inference("hides", covering[0], f"what hides a part of {names[0]}", names[0]))
    return found


def odd(scene: Scene) -> list[Inference]:
    """'the star unlike the other stars': one of at least `MIN_GROUP`, the others of which are equal."""
    found = []
    for attribute, members, noun in _groups(scene, MIN_GROUP):
        values = [getattr(scene.things[k], OTHER[attribute]) for k in members]
        counts = Counter(values)
        if len(counts) == 2 and min(counts.values()) == 1:
            target = members[values.index(min(counts, key=counts.get))]
            others = referring.pluralize(noun)
            found.append(Inference("odd", target, f"the {noun} unlike the other {others}", f"the {noun}"))
    return found


def once(scene: Scene) -> list[Inference]:
    """'the star whose color occurs only once': of at least two stars, only one has a color of no other object."""
    return _by_count(scene, "once", 1, "occurs only once")


def twice(scene: Scene) -> list[Inference]:
    """'the star whose color occurs twice': of at least two stars, only one has a color of exactly two objects."""
    return _by_count(scene, "twice", 2, "occurs twice")


def _by_count(scene: Scene, kind: str, count: int, words: str) -> list[Inference]:
    found = []
    for attribute, members, noun in _groups(scene, 2):
        counts = Counter(getattr(thing, OTHER[attribute]) for thing in scene.things)
        fits = [k for k in members if counts[getattr(scene.things[k], OTHER[attribute])] == count]
        if len(fits) == 1:
            description = f"the {noun} whose {OTHER[attribute]} {words}"
            found.append(Inference(kind, fits[0], description, f"the {noun}"))
    return found


def farthest(scene: Scene) -> list[Inference]:
    """'what is farthest from the red star', where no other object is nearly as far."""
    found = []
    centers = [referring.box_center(thing) for thing in scene.things]
    for j, (x, y) in enumerate(centers):
        names = referring.attribute_expressions(scene, j)
        distances = [math.hypot(a - x, b - y) for a, b in centers]
        second, first = sorted(distances)[-2:]
        if names and first - second >= referring.MIN_MARGIN:
            found.append(Inference("farthest", distances.index(first), f"what is farthest from {names[0]}", names[0]))
    return found


def _groups(scene: Scene, min_size: int) -> list[tuple[str, list[int], str]]:
    """(attribute, indices, noun) of the objects that share a shape ('star') or a color ('red object')."""
    groups = []
    for attribute in ("shape", "color"):
        for value in dict.fromkeys(getattr(thing, attribute) for thing in scene.things):
            members = [k for k, thing in enumerate(scene.things) if getattr(thing, attribute) == value]
            if len(members) >= min_size:
                groups.append((attribute, members, value if attribute == "shape" else f"{value} object"))
    return groups


KINDS = {"hides": hiding, "odd": odd, "once": once, "twice": twice, "farthest": farthest}
# Higher for kinds that few scenes have, so that each is about a fifth of the questions.
KIND_WEIGHTS = {"hides": 6.0, "odd": 6.0, "once": 1.5, "twice": 2.0, "farthest": 0.4}


def sample_inference(scene: Scene, rng, kind: str | None = None) -> Inference | None:
    """A drawn inference of a drawn kind, or of the given one; None if the scene has none."""
    weights = list(KIND_WEIGHTS.values())
    odds = [weight / sum(weights) for weight in weights]
    for name in [kind] if kind else rng.choice(list(KIND_WEIGHTS), len(weights), replace=False, p=odds).tolist():
        if found := KINDS[name](scene):
            return found[rng.integers(len(found))]
    return None
