# SPDX-License-Identifier: Apache-2.0
"""Text for the objects of a scene: noun phrases, lists, and referring expressions that match exactly one object.

Spatial relations compare the centers of visible boxes and are used only if these differ by at least `MIN_MARGIN` of the
image, so that no statement is ambiguous.
"""

from __future__ import annotations

from lionjax.data.scenes.world import Scene, Thing

MIN_MARGIN = 0.12
NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SPATIAL_RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE_RELATION = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
OPPOSITE_RELATION |= {"in front of": "behind", "behind": "in front of"}
# Combinations of attributes in a noun phrase, the most natural ones first.
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
    """Noun phrase such as 'large red striped star'; 'object' replaces the shape if it is not in `attributes`."""
    order = ("size", "color", "texture")
    values = [getattr(thing, attribute) for attribute in order if attribute in attributes]
    return " ".join([*values, thing.shape if "shape" in attributes else "object"])


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def pluralize(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def count_phrase(noun: str, count: int) -> str:
    """'a star', 'two stars', 'no stars'."""
    return with_article(noun) if count == 1 else f"{NUMBER_WORDS[count]} {pluralize(noun)}"


def join_phrases(phrases) -> str:
    """'a, b and c'."""
    *first, last = phrases
    return f"{', '.join(first)} and {last}" if first else last


def box_center(thing: Thing) -> tuple[float, float]:
    x0, y0, x1, y1 = thing.box
    return (x0 + x1) / 2, (y0 + y1) / 2


def left_to_right(scene: Scene) -> list[int]:
    return sorted(range(len(scene.things)), key=lambda k: box_center(scene.things[k]))


def group_phrases(scene: Scene, attributes=("color", "shape")) -> list[str]:
    """Noun phrases with counts, such as 'a red star' and 'two blue rings', ordered by the leftmost object of each."""
    names = [noun_phrase(scene.things[k], attributes) for k in left_to_right(scene)]
    return [count_phrase(noun, names.count(noun)) for noun in dict.fromkeys(names)]


def relation_holds(first: Thing, relation: str, second: Thing, margin: float = MIN_MARGIN) -> bool:
    """Whether `first` lies on that side of `second` by at least `margin` of the image."""
    (ax, ay), (bx, by) = box_center(first), box_center(second)
    gap = {"left of": bx - ax, "right of": ax - bx, "above": by - ay, "below": ay - by}[relation]
    return gap >= margin


def matching_things(scene: Scene, k: int, attributes) -> list[int]:
    """Indices of the objects that share these attributes with object k, itself included."""
    values = [getattr(scene.things[k], attribute) for attribute in attributes]
    return [
        j for j, other in enumerate(scene.things) if [getattr(other, attribute) for attribute in attributes] == values
    ]


def attribute_expressions(scene: Scene, k: int, excluded: tuple[str, ...] = ()) -> list[str]:
    """Noun phrases that match only object k, most natural first, without the `excluded` attributes."""
    thing = scene.things[k]
    namings = [attributes for attributes in ATTRIBUTE_SETS if not set(attributes) & set(excluded)]
    return [
        "the " + noun_phrase(thing, attributes)
        for attributes in namings
        if matching_things(scene, k, attributes) == [k]
    ]


def superlative_expressions(scene: Scene, k: int, excluded: tuple[str, ...] = ()) -> list[str]:
    """'the leftmost red star': object k is the outermost of several with the same noun phrase."""
    expressions = []
    for attributes in (("color", "shape"), ("shape",), ("color",)):
        rivals = [j for j in matching_things(scene, k, attributes) if j != k]
        if set(attributes) & set(excluded) or not rivals:
            continue
        for relation, *forms in SUPERLATIVE_FORMS:
            if all(relation_holds(scene.things[k], relation, scene.things[j]) for j in rivals):
                expressions += ["the " + form.format(noun_phrase(scene.things[k], attributes)) for form in forms]
    return expressions


def relational_expressions(scene: Scene, k: int, excluded: tuple[str, ...] = ()) -> list[str]:
    """'the red star left of the blue ring': of several objects with one noun phrase, only k is on that side."""
    expressions, thing = [], scene.things[k]
    for attributes in (("color", "shape"), ("shape",)):
        rivals = [j for j in matching_things(scene, k, attributes) if j != k]
        if set(attributes) & set(excluded) or not rivals:
            continue
        for j, other in enumerate(scene.things):
            anchors = [] if j == k else attribute_expressions(scene, j)[:1]
            for relation in SPATIAL_RELATIONS if anchors else ():
                other_rivals = [r for r in rivals if r != j]
                is_unique = all(
                    relation_holds(scene.things[r], OPPOSITE_RELATION[relation], other, 0.02) for r in other_rivals
                )
                if is_unique and relation_holds(thing, relation, other):
                    expressions.append(f"the {noun_phrase(thing, attributes)} {relation} {anchors[0]}")
    return expressions


def referring_expressions(scene: Scene, k: int, excluded: tuple[str, ...] = ()) -> list[str]:
    """All expressions that match only object k, most natural first; may be empty."""
    return (
        attribute_expressions(scene, k, excluded)
        + superlative_expressions(scene, k, excluded)
        + relational_expressions(scene, k, excluded)
    )


def sample_expression(scene: Scene, k: int, rng, excluded: tuple[str, ...] = ()) -> str | None:
    """A random expression that matches only object k, more often a short one; None if there is none."""
    first = rng.choice(3, p=(0.76, 0.16, 0.08))
    for i in range(3):
        expressions = (attribute_expressions, superlative_expressions, relational_expressions)[(first + i) % 3](
            scene, k, excluded
        )
        if expressions:
            # Half the time the first, most natural one; else any, so that longer expressions are learned too.
            return expressions[0] if rng.random() < 0.5 else expressions[rng.integers(len(expressions))]
    return None


def sample_referent(scene: Scene, rng, excluded: tuple[str, ...] = ()) -> tuple[int, str] | None:
    """(index, expression) of a randomly drawn object; None if no object has an expression."""
    candidates = ((int(k), sample_expression(scene, k, rng, excluded)) for k in rng.permutation(len(scene.things)))
    return next(((k, expr) for k, expr in candidates if expr), None)
