# SPDX-License-Identifier: Apache-2.0
"""Captions for a detector: names of objects in a scene and of others that are not there.

Of three kinds: pairs of color and shape (`red circle. blue star.`), single words (`circle. red.`), and all tags in one
phrase (`circle, star, red.`), as the refiner of Lyrics (arXiv 2312.05278) writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lionjax.data.boxes import Box, box_to_text
from lionjax.data.scenes import world
from lionjax.data.scenes.world import Scene, Thing

KINDS, KIND_PROBS = ("pairs", "words", "tags"), (0.6, 0.15, 0.25)
MAX_NAMES = 6  # in a caption of pairs or words
WORDS = (*world.SHAPES, *world.COLORS)


@dataclass(frozen=True)
class NamedBoxes:
    """A caption, the objects that it names by their indices, their boxes, and the names that each box has."""

    caption: str
    targets: tuple[int, ...]
    boxes: tuple[Box, ...]
    names: tuple[tuple[str, ...], ...]

    @property
    def text(self) -> str:
        """The boxes with their names, as an answer in words; "nothing" without boxes."""
        parts = [f"{' '.join(names[::-1])} {box_to_text(box)}" for names, box in zip(self.names, self.boxes)]
        return ", ".join(parts) or "nothing"


def yes_or_no(value: bool) -> str:
    """The answer to a question of whether."""
    return "yes" if value else "no"


def pair_name(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def thing_words(thing: Thing) -> tuple[str, str]:
    """The words of a thing, in the order of `WORDS`."""
    return thing.shape, thing.color


def sample_names(scene: Scene, rng, kind: str) -> NamedBoxes:
    """A caption of one of `KINDS`, with at least one name of an object that is absent where there is room for it.

    Training scenes get no name of a held-out pair.
    """
    if kind == "pairs":
        present = sorted({pair_name(thing) for thing in scene.things})
        absent = sample_absent_pairs(scene, rng)
        return _named(scene, _draw(present, absent, rng), ". ", lambda thing: (pair_name(thing),))
    present = [word for word in WORDS if any(word in thing_words(thing) for thing in scene.things)]
    absent = [word for word in WORDS if word not in present]
    if kind == "words":
        return _named(scene, _draw(present, absent, rng), ". ", thing_words)
    kept = {word for word in present if rng.random() > 0.1} | {word for word in absent if rng.random() < 0.1}
    return _named(scene, [word for word in WORDS if word in kept] or present[:1], ", ", thing_words)


def _draw(present: Sequence[str], absent: Sequence[str], rng) -> list[str]:
    """1 to `MAX_NAMES` names in random order, about half of them absent; sometimes only absent ones."""
    number = int(rng.integers(1, MAX_NAMES + 1))
    num_absent = int(rng.binomial(number, 0.5))
    names = [*rng.permutation(present)[: number - num_absent], *absent[:num_absent]]
    return [str(name) for name in rng.permutation(names)]


def sample_absent_pairs(scene: Scene, rng) -> list[str]:
    """Names of absent pairs in random order: first, half of the time, those whose color and shape are there apart."""
    things = {(thing.color, thing.shape) for thing in scene.things}
    pairs = [pair for pair in world.allowed_pairs(scene.split) if pair not in things]
    colors, shapes = ({thing[i] for thing in things} for i in (0, 1))
    order = rng.permutation(len(pairs)).tolist()
    if rng.random() < 0.5:
        order.sort(key=lambda k: -(pairs[k][0] in colors) - (pairs[k][1] in shapes))
    return [" ".join(pairs[k]) for k in order]


def _named(scene: Scene, names: Iterable[str], separator: str, words: Callable[[Thing], tuple[str, ...]]) -> NamedBoxes:
    names = list(names)
    found = [tuple(word for word in words(thing) if word in names) for thing in scene.things]
    targets = tuple(k for k, own in enumerate(found) if own)
    boxes = tuple(scene.things[k].box for k in targets)
    return NamedBoxes(f"{separator.join(names)}.", targets, boxes, tuple(found[k] for k in targets))
