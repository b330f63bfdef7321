# SPDX-License-Identifier: Apache-2.0
"""Words for the things of a scene: names, lists, and expressions that fit exactly one thing.

"Left of" and its kin compare centres of visible boxes and are only said when they differ clearly, by `MARGIN` of the
picture; so no true or false statement here needs a ruler.
"""

from __future__ import annotations

from lionjax.data.scenes.world import Scene, Thing

MIN_MARGIN = 0.12
NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SPATIAL_RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE_RELATION = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
OPPOSITE_RELATION |= {"in front of": "behind", "behind": "in front of"}
# Attributes named together, the most natural combinations first.
ATTRIBUTE_SETS = (
    ("color", "shape"),
    ("size", "color", "shape"),
    ("color", "texture", "shape"),
    ("shape",),
    ("size", "color", "texture", "shape"),
    ("size", "shape"),
    ("texture", "shape"),
    ("color",),
    ("size", "texture", "shape"),
    ("color", "texture"),
    ("size", "color"),
)
SUPERLATIVE_FORMS = (
    ("left of", "leftmost {}", "{} on the left", "{} furthest to the left"),
    ("right of", "rightmost {}", "{} on the right", "{} furthest to the right"),
    ("above", "topmost {}", "{} at the top", "highest {}"),
    ("below", "bottommost {}", "{} at the bottom", "lowest {}"),
)


def noun_phrase(thing: Thing, attributes=("color", "shape")) -> str:
    """'large red striped star' for all four attributes; 'object' stands for a shape left unsaid."""
    order = ("size", "color", "texture")
    said = [getattr(thing, word) for word in order if word in attributes]
    return " ".join([*said, thing.shape if "shape" in attributes else "object"])


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def pluralize(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def count_phrase(noun: str, count: int) -> str:
    """'a star', 'two stars', 'no stars'."""
    return with_article(noun) if count == 1 else f"{NUMBER_WORDS[count]} {pluralize(noun)}"


def join_phrases(phrases) -> str:
    """'a, b and c'."""
    *most, last = phrases
    return f"{', '.join(most)} and {last}" if most else last


def box_center(thing: Thing) -> tuple[float, float]:
    x0, y0, x1, y1 = thing.box
    return (x0 + x1) / 2, (y0 + y1) / 2


def left_to_right(scene: Scene) -> list[int]:
    return sorted(range(len(scene.things)), key=lambda k: box_center(scene.things[k]))


def group_phrases(scene: Scene, attributes=("color", "shape")) -> list[str]:
    """Counted names, such as 'a red star' and 'two blue rings', by the leftmost of each from left to right."""
    names = [noun_phrase(scene.things[k], attributes) for k in left_to_right(scene)]
    return [count_phrase(noun, names.count(noun)) for noun in dict.fromkeys(names)]


def relation_holds(first: Thing, relation: str, second: Thing, margin: float = MIN_MARGIN) -> bool:
    """Whether first clearly lies on that side of second."""
    (ax, ay), (bx, by) = box_center(first), box_center(second)
    gap = {"left of": bx - ax, "right of": ax - bx, "above": by - ay, "below": ay - by}[relation]
    return gap >= margin


def matching_things(scene: Scene, k: int, attributes) -> list[int]:
    """Indices of the things that share these attributes with thing k, itself included."""
    values = [getattr(scene.things[k], word) for word in attributes]
    return [j for j, other in enumerate(scene.things) if [getattr(other, word) for word in attributes] == values]


def attribute_expressions(scene: Scene, k: int, excluded: tuple[str, ...] = ()) -> list[str]:
    """Names that fit thing k alone, the most natural first; `without` leaves attributes unsaid."""
    thing = scene.things[k]
    namings = [words for words in ATTRIBUTE_SETS if not set(words) & set(excluded)]
    return ["the " + noun_phrase(thing, words) for words in namings if matching_things(scene, k, words) == [k]]


def superlative_expressions(scene: Scene, k: int, excluded: tuple[str, ...] = ()) -> list[str]:
    """'the leftmost red star': thing k among several of one name, clearly ahead of the others in one direction."""
    found = []
    for words in (("color", "shape"), ("shape",), ("color",)):
        rivals = [j for j in matching_things(scene, k, words) if j != k]
        if set(words) & set(excluded) or not rivals:
            continue
        for relation, *forms in SUPERLATIVE_FORMS:
            if all(relation_holds(scene.things[k], relation, scene.things[j]) for j in rivals):
                found += ["the " + form.format(noun_phrase(scene.things[k], words)) for form in forms]
    return found


def relational_expressions(scene: Scene, k: int, excluded: tuple[str, ...] = ()) -> list[str]:
    """'the red star left of the blue ring': of several things of one name, only k lies on that side of the other."""
    found, thing = [], scene.things[k]
    for words in (("color", "shape"), ("shape",)):
        rivals = [j for j in matching_things(scene, k, words) if j != k]
        if set(words) & set(excluded) or not rivals:
            continue
        for j, other in enumerate(scene.things):
            anchors = [] if j == k else attribute_expressions(scene, j)[:1]
            for relation in SPATIAL_RELATIONS if anchors else ():
                apart = [r for r in rivals if r != j]
                alone = all(relation_holds(scene.things[r], OPPOSITE_RELATION[relation], other, 0.02) for r in apart)
                if alone and relation_holds(thing, relation, other):
                    found.append(f"the {noun_phrase(thing, words)} {relation} {anchors[0]}")
    return found


def referring_expressions(scene: Scene, k: int, excluded: tuple[str, ...] = ()) -> list[str]:
    """Every expression here that fits thing k and no other, the most natural first; may be empty."""
    return (
        attribute_expressions(scene, k, excluded)
        + superlative_expressions(scene, k, excluded)
        + relational_expressions(scene, k, excluded)
    )


def sample_expression(scene: Scene, k: int, rng, excluded: tuple[str, ...] = ()) -> str | None:
    """One expression that fits thing k alone, drawn with a liking for plain and short ones; None if there is none."""
    first = rng.choice(3, p=(0.76, 0.16, 0.08))
    for turn in range(3):
        offer = (attribute_expressions, superlative_expressions, relational_expressions)[(first + turn) % 3](
            scene, k, excluded
        )
        if offer:
            # Half the time the first that fits, as people do; else any, so that longer ones are learned too.
            return offer[0] if rng.random() < 0.5 else offer[rng.integers(len(offer))]
    return None


def sample_referent(scene: Scene, rng, excluded: tuple[str, ...] = ()) -> tuple[int, str] | None:
    """A thing drawn at random and an expression for it; None where no thing has one."""
    offers = ((int(k), sample_expression(scene, k, rng, excluded)) for k in rng.permutation(len(scene.things)))
    return next(((k, expr) for k, expr in offers if expr), None)
