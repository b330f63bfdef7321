# SPDX-License-Identifier: Apache-2.0
"""Tasks on synthetic scenes: one function per task, from a scene and a random generator to an `Example`.

The answers are balanced, so that a model without the image scores low: yes and no are equally likely, and high counts
are oversampled. No question matches two objects. Training questions never name a held-out combination.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from lionjax.core.types import UserError
from lionjax.data import templates as wordings
from lionjax.data.boxes import Box, box_to_text
from lionjax.data.chat import render_history
from lionjax.data.scenes import naming, reasoning, referring, world
from lionjax.data.scenes.world import Scene
from lionjax.data.templates import sample_question

TAG_VOCABULARY = (*world.SHAPES, *world.COLORS, "striped", "dotted")
POPE_SETTINGS = ("random", "popular", "adversarial")
POPULAR_PAIRS = frozenset((c, s) for c in world.COLORS[:3] for s in world.SHAPES[:3])
ALL_ATTRIBUTES = ("size", "color", "texture", "shape")
MASK_TASKS = ("res", "reason")  # answered by a mask
TASK_CATEGORY = {
    "caption": "image_level",
    "vqa": "image_level",
    "relation": "image_level",
    "existence": "image_level",
    "tags": "image_level",
    "rec": "region_level",
    "res": "region_level",
    "reason": "region_level",
    "reg": "region_level",
    "box_vqa": "region_level",
    "grounded": "region_level",
    "conversation": "region_level",
    "detect": "region_level",
    "choice": "image_level",
    "image_level": "image_level",
    "region_level": "region_level",
}


@dataclass(frozen=True)
class Example:
    """One question about one record. `answer` is the training target, `answers` are all that evaluation accepts.

    `question_boxes` and `boxes`: the boxes in the question and in the answer, in order. `targets`: indices of the
    objects asked about, for masks. `kind`: subtype of the task. `turns`: of a conversation, whose `question` has all
    before the last answer. `history`: earlier (question, answer) rounds not in `question`. `image_marks`: images stand
    where the texts have `<image>`; the first is the record's own, the others are those of `more_records` (indices in
    the data set). `padded_boxes`: boxes in the texts are fractions of the image padded to a square; else, and in
    `question_boxes` and `boxes` always, they are fractions of the image. `box_names`: for each of `boxes` the names in
    the question that it has, for detectors. `states`, `slot_objects`: of slots in the question (see `data.sentences`).
    """

    task: str
    kind: str
    question: str
    answer: str
    answers: tuple[str, ...]
    category: str
    question_boxes: tuple[Box, ...] = ()
    boxes: tuple[Box, ...] = ()
    targets: tuple[int, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    tags: tuple[str, ...] = ()
    scene: str = ""
    history: tuple[tuple[str, str], ...] = ()
    image_marks: bool = False
    more_records: tuple[int, ...] = ()
    padded_boxes: bool = False
    box_names: tuple[tuple[str, ...], ...] = ()
    states: tuple[tuple[float, ...], ...] = ()
    slot_objects: tuple[int, ...] = ()


def scene_to_text(scene: Scene, rng=None, with_boxes: bool = True) -> str:
    """A complete text description of a scene, from which a text-only model can answer the questions about it.

    Objects with their boxes, from left to right, or in random order if `rng` is given; then occlusions, then the
    background. Without `with_boxes`, boxes and occlusions are omitted.
    """
    things = scene.things
    order = referring.left_to_right(scene) if rng is None else rng.permutation(len(things))
    noun_phrases = [referring.noun_phrase(thing, ALL_ATTRIBUTES) for thing in things]
    if not with_boxes:
        return "; ".join([*(noun_phrases[k] for k in order), f"{scene.background.kind} background"])
    boxed = [f"{noun_phrases[k]} {box_to_text(things[k].box)}" for k in order]
    depth = [f"{noun_phrases[k]} in front of {noun_phrases[j]}" for k in order for j in things[k].covers]
    return "; ".join([*boxed, *depth, f"{scene.background.kind} background"])


def scene_tags(scene: Scene, noise: float = 0.0, seed: int = 0) -> tuple[str, ...]:
    """Tags of a simulated tagger, in the order of `TAG_VOCABULARY`.

    Each true tag is missing with probability `noise`, each wrong tag is added with `noise` / 4. Deterministic for a
    scene, noise and seed.
    """
    true_tags = {tag for t in scene.things for tag in (t.shape, t.color, t.texture)}
    rng = np.random.default_rng([seed, world.SPLITS.index(scene.split), scene.seed, scene.index])
    draws = rng.random(len(TAG_VOCABULARY))
    return tuple(
        tag for tag, draw in zip(TAG_VOCABULARY, draws) if (draw >= noise if tag in true_tags else draw < noise / 4)
    )


def _build_example(task: str, kind: str, question: str, *answers: str, **more) -> Example:
    return Example(task, kind, question, answers[0], answers, TASK_CATEGORY[task], **more)


def _choose(rng, options):
    return options[rng.integers(len(options))]


def scene_captions(scene: Scene) -> list[str]:
    """Five correct one-sentence captions, with objects, their number, the background, or the outermost objects."""
    groups, total = referring.group_phrases(scene), len(scene.things)
    things = referring.join_phrases(groups)
    first, last = (scene.things[referring.left_to_right(scene)[end]] for end in (0, -1))
    left, right = (referring.with_article(referring.noun_phrase(thing)) for thing in (first, last))
    ends = f"{left} on the left and {right} on the right"
    return [
        f"{things[0].upper()}{things[1:]}.",
        f"A picture of {things}.",
        f"There are {referring.NUMBER_WORDS[total]} objects: {things}.",
        f"{things[0].upper()}{things[1:]} on a {scene.background.kind} background.",
        f"{referring.NUMBER_WORDS[total].capitalize()} objects with {ends}: {things}.",
    ]


def caption(scene: Scene, rng) -> Example:
    """One sentence about the image; all captions of the scene are references."""
    texts = scene_captions(scene)
    answer = _choose(rng, texts)
    return Example("caption", "short", sample_question(wordings.CAPTION, rng), answer, tuple(texts), "image_level")


def vqa(scene: Scene, rng, kind: str | None = None) -> Example:
    """A question with a one-word answer; `kind` is color, shape, count or yesno; default is random."""
    if kind is None:
        kind = _choose(rng, tuple(VQA_KINDS))
    return VQA_KINDS[kind](scene, rng)


def _attribute_question(scene: Scene, rng, attribute: str, templates) -> Example:
    referent = referring.sample_referent(scene, rng, excluded=(attribute,))
    if referent is None:
        return _count_question(scene, rng)
    k, expr = referent
    question = sample_question(templates, rng, expr=expr)
    return _build_example("vqa", attribute, question, getattr(scene.things[k], attribute), targets=(k,))


def _color_question(scene: Scene, rng) -> Example:
    return _attribute_question(scene, rng, "color", wordings.COLOR)


def _shape_question(scene: Scene, rng) -> Example:
    return _attribute_question(scene, rng, "shape", wordings.SHAPE)


def _things_by_noun(scene: Scene, rng) -> dict[str, list[int]]:
    """Nouns of one type ('red object', 'star', ...) and the indices of the objects that each matches, maybe none."""
    sort = rng.choice(("object", "color", "shape", "texture", "pair"), p=(0.1, 0.25, 0.25, 0.1, 0.3))
    if sort == "object":
        words = {"object": ()}
    elif sort == "pair":
        words = {f"{c} {s}": (c, s) for c, s in world.allowed_pairs(scene.split)}
    else:
        words_by_sort = {"color": world.COLORS, "shape": world.SHAPES, "texture": world.TEXTURES}[sort]
        words = {word if sort == "shape" else f"{word} object": (word,) for word in words_by_sort}
    return {
        noun: [k for k, t in enumerate(scene.things) if set(attributes) <= {t.color, t.shape, t.texture}]
        for noun, attributes in words.items()
    }


def _count_question(scene: Scene, rng) -> Example:
    nouns = _things_by_noun(scene, rng)
    counts = sorted({len(fits) for fits in nouns.values()})
    # High counts are rare in scenes, so they are oversampled.
    weights = np.array([(0.5, 0.6, 1.2, 2.4)[min(count, 3)] for count in counts])
    count = int(rng.choice(counts, p=weights / weights.sum()))
    noun = _choose(rng, [noun for noun, fits in nouns.items() if len(fits) == count])
    question = sample_question(wordings.COUNT, rng, nouns=referring.pluralize(noun))
    return _build_example("vqa", "count", question, str(count), targets=tuple(nouns[noun]))


def _yesno_question(scene: Scene, rng) -> Example:
    question_type = rng.choice(("color", "texture", "more"), p=(0.45, 0.3, 0.25))
    is_true = bool(rng.random() < 0.5)
    example = (
        _count_comparison_question(scene, rng, is_true)
        if question_type == "more"
        else _attribute_yesno_question(scene, rng, str(question_type), is_true)
    )
    example = (
        example
        or _attribute_yesno_question(scene, rng, "color", is_true)
        or _attribute_yesno_question(scene, rng, "texture", is_true)
    )
    return example or dataclasses.replace(existence(scene, rng), task="vqa", kind="yesno")


def _attribute_yesno_question(scene: Scene, rng, attribute: str, is_true: bool) -> Example | None:
    """'Is the star red?' The word is drawn before the object, so that each word has both answers equally often."""
    words = sorted({getattr(t, attribute) for t in scene.things})
    allowed = world.allowed_pairs(scene.split)
    things = rng.permutation(len(scene.things)).tolist()
    for word in rng.permutation(words).tolist():
        expressions_by_answer = {True: [], False: []}
        for k in things:
            fits = getattr(scene.things[k], attribute) == word
            if fits or attribute != "color" or (word, scene.things[k].shape) in allowed:
                expressions_by_answer[fits] += [
                    (k, expr) for expr in [referring.sample_expression(scene, k, rng, (attribute,))] if expr
                ]
        if expressions_by_answer[True] and expressions_by_answer[False]:
            k, expr = expressions_by_answer[is_true][0]
            question = sample_question(wordings.ATTRIBUTE_YESNO, rng, expr=expr, word=word)
            return _build_example("vqa", "yesno", question, naming.yes_or_no(is_true), targets=(k,))
    return None


def _count_comparison_question(scene: Scene, rng, is_true: bool) -> Example | None:
    """'Are there more stars than rings?' Both are in the image, in different numbers."""
    attribute = _choose(rng, ("color", "shape"))
    values = [getattr(t, attribute) for t in scene.things]
    counts = {word: values.count(word) for word in sorted(set(values))}
    unequal = [(a, b) for a in counts for b in counts if counts[a] > counts[b]]
    if not unequal:
        return None
    nouns = [word if attribute == "shape" else f"{word} object" for word in _choose(rng, unequal)]
    first, second = (referring.pluralize(noun) for noun in (nouns if is_true else nouns[::-1]))
    return _build_example(
        "vqa",
        "yesno",
        sample_question(wordings.COUNT_COMPARISON, rng, first=first, second=second),
        naming.yes_or_no(is_true),
    )


VQA_KINDS = {"color": _color_question, "shape": _shape_question, "count": _count_question, "yesno": _yesno_question}


def relation(scene: Scene, rng) -> Example:
    """Whether a spatial relation of two objects is true; a false statement has the opposite relation."""
    names = {k: referring.attribute_expressions(scene, k) for k in range(len(scene.things))}
    if sum(map(bool, names.values())) < 2:
        names = {k: referring.referring_expressions(scene, k) for k in names}
    pairs = []
    for a, b in ((a, b) for a in names for b in names if a != b and names[a] and names[b]):
        first, second = scene.things[a], scene.things[b]
        pairs += [(a, b, word) for word in referring.SPATIAL_RELATIONS if referring.relation_holds(first, word, second)]
        # Depth is visible only with occlusion, which is rare, so these pairs get a triple weight.
        pairs += [(a, b, "in front of")] * 3 if b in first.covers else []
        pairs += [(a, b, "behind")] * 3 if a in second.covers else []
    if not pairs:
        return existence(scene, rng)
    a, b, word = _choose(rng, pairs)
    is_true = bool(rng.random() < 0.5)
    first, second = (names[k][rng.integers(min(2, len(names[k])))] for k in (a, b))
    stated_relation = word if is_true else referring.OPPOSITE_RELATION[word]
    question = sample_question(wordings.RELATION, rng, first=first, relation=stated_relation, second=second)
    return _build_example("relation", stated_relation, question, naming.yes_or_no(is_true), targets=(a, b))


def existence(scene: Scene, rng, setting: str | None = None) -> Example:
    """Whether an object is in the image, as in POPE (arXiv 2305.10355); `setting` decides how absent ones are drawn.

    random: by their frequency in scenes; popular: among the most frequent ones; adversarial: color and shape are both
    in the image, but on different objects.
    """
    setting = setting or _choose(rng, POPE_SETTINGS)
    present = [(t.color, t.shape) for t in scene.things]
    is_present = bool(rng.random() < 0.5)
    # With "popular", present objects are frequent ones too, or rare objects would reveal the answer yes.
    present_pairs = sorted(POPULAR_PAIRS.intersection(present)) if setting == "popular" else []
    present_pairs = present_pairs or sorted(set(present))
    pair = _choose(rng, present_pairs) if is_present else _sample_absent_pair(scene, rng, setting)
    noun = referring.with_article(" ".join(pair))
    targets = tuple(k for k, thing_pair in enumerate(present) if thing_pair == pair)
    question = sample_question(wordings.EXISTENCE, rng, noun=noun)
    return _build_example("existence", setting, question, naming.yes_or_no(is_present), targets=targets)


def _sample_absent_pair(scene: Scene, rng, setting: str) -> tuple[str, str]:
    present = {(t.color, t.shape) for t in scene.things}
    colors, shapes = ({pair[i] for pair in present} for i in (0, 1))
    absent = [pair for pair in world.allowed_pairs(scene.split) if pair not in present]
    pool = {
        "random": absent,
        "popular": [pair for pair in absent if pair in POPULAR_PAIRS],
        "adversarial": [pair for pair in absent if pair[0] in colors and pair[1] in shapes],
    }[setting]
    pool = pool or absent
    weights = np.array([world.pair_weight(*pair) if setting == "random" else 1.0 for pair in pool])
    return pool[rng.choice(len(pool), p=weights / weights.sum())]


def tags(scene: Scene, rng) -> Example:
    """The true tags as a comma-separated list, in the order of `TAG_VOCABULARY`."""
    return _build_example("tags", "all", sample_question(wordings.TAGS, rng), ", ".join(scene_tags(scene)))


def _referring_example(scene: Scene, rng, task: str, kind: str, templates) -> Example:
    k, expr = referring.sample_referent(scene, rng)
    box = scene.things[k].box
    question, answer = sample_question(templates, rng, expr=expr), f"Answer: {box_to_text(box)}"
    return _build_example(task, kind, question, answer, boxes=(box,), targets=(k,))


def rec(scene: Scene, rng) -> Example:
    """Referring expression comprehension: an expression, answered by the box of the object that it matches."""
    return _referring_example(scene, rng, "rec", "box", wordings.REC)


def res(scene: Scene, rng) -> Example:
    """Referring expression segmentation: an expression, answered by the mask of `targets`; the text is its box."""
    return _referring_example(scene, rng, "res", "mask", wordings.RES)


def reason(scene: Scene, rng, kind: str | None = None) -> Example:
    """Segmentation of an object that must be inferred; the answer names it: "It is the red star" and its box.

    `kind`: of `reasoning.KINDS`, default random; "named" is a referring expression, of a scene without such an object.
    """
    inference = reasoning.sample_inference(scene, rng, kind)
    if inference is None:
        return _referring_example(scene, rng, "reason", "named", wordings.RES)
    thing = scene.things[inference.target]
    question = sample_question(wordings.RES, rng, expr=inference.description)
    answer = f"It is the {referring.noun_phrase(thing)} {box_to_text(thing.box)}."
    return _build_example("reason", inference.kind, question, answer, boxes=(thing.box,), targets=(inference.target,))


def reg(scene: Scene, rng) -> Example:
    """Referring expression generation: a box, answered by an expression; all matching expressions are references."""
    k, _ = referring.sample_referent(scene, rng)
    box, answers = scene.things[k].box, referring.referring_expressions(scene, k)
    question = sample_question(wordings.REG, rng, box=box_to_text(box))
    return _build_example("reg", "expression", question, *answers, question_boxes=(box,), targets=(k,))


def box_vqa(scene: Scene, rng, kind: str | None = None) -> Example:
    """A question about the object in a box with a one-word answer; `kind` is color, shape, texture or yesno."""
    kind = kind or _choose(rng, ("color", "shape", "texture", "yesno"))
    k = int(rng.integers(len(scene.things)))
    thing, box = scene.things[k], scene.things[k].box
    templates = {
        "color": wordings.BOX_COLOR,
        "shape": wordings.BOX_SHAPE,
        "texture": wordings.BOX_TEXTURE,
        "yesno": wordings.BOX_ATTRIBUTE_YESNO,
    }[kind]
    words = {"box": box_to_text(box)}
    if kind == "yesno":
        allowed = world.allowed_pairs(scene.split)
        wrong_colors = [word for word in world.COLORS if word != thing.color and (word, thing.shape) in allowed]
        is_true = bool(rng.random() < 0.5)
        words["word"] = thing.color if is_true else _choose(rng, wrong_colors)
    answer = naming.yes_or_no(is_true) if kind == "yesno" else getattr(thing, kind)
    question = sample_question(templates, rng, **words)
    return _build_example("box_vqa", kind, question, answer, question_boxes=(box,), targets=(k,))


def grounded(scene: Scene, rng, max_things: int = 4) -> Example:
    """Grounded caption: the `max_things` largest objects from left to right, each followed by its box."""

    def size(k):
        x0, y0, x1, y1 = scene.things[k].box
        return (x0 - x1) * (y1 - y0)

    main = set(sorted(range(len(scene.things)), key=size)[:max_things])
    order = tuple(k for k in referring.left_to_right(scene) if k in main)
    things = [scene.things[k] for k in order]
    text = referring.join_phrases(
        [f"{referring.with_article(referring.noun_phrase(t))} {box_to_text(t.box)}" for t in things]
    )
    boxes = tuple(t.box for t in things)
    question = sample_question(wordings.GROUNDED_CAPTION, rng)
    return _build_example("grounded", "boxes", question, f"{text[0].upper()}{text[1:]}.", boxes=boxes, targets=order)


def conversation(scene: Scene, rng) -> Example:
    """Two to four turns about one object: first its box, then questions that refer to it as 'it'."""
    excluded = ("color", "texture")
    k, expr = referring.sample_referent(scene, rng, excluded) or referring.sample_referent(scene, rng)
    thing = scene.things[k]
    box_turn = (sample_question(wordings.REC, rng, expr=expr), f"Answer: {box_to_text(thing.box)}")
    color_turn = (sample_question(wordings.COREFERENCE_COLOR, rng), thing.color)
    wrong_textures = [texture for texture in world.TEXTURES if texture != thing.texture]
    word = thing.texture if rng.random() < 0.5 else _choose(rng, wrong_textures)
    texture_turn = (
        sample_question(wordings.COREFERENCE_ATTRIBUTE_YESNO, rng, word=word),
        naming.yes_or_no(word == thing.texture),
    )
    num_same_color = sum(t.color == thing.color for t in scene.things)
    count_turn = (sample_question(wordings.SAME_COLOR, rng), str(num_same_color))
    followups = (
        (color_turn,),
        (texture_turn,),
        (color_turn, count_turn),
        (texture_turn, color_turn),
        (color_turn, texture_turn, count_turn),
    )
    turns = (box_turn, *followups[rng.integers(len(followups))])
    (last, answer), boxes = turns[-1], (thing.box,)
    question = render_history(turns[:-1], last)
    return _build_example("conversation", "it", question, answer, boxes=boxes, targets=(k,), turns=turns)


def detect(scene: Scene, rng, kind: str | None = None) -> Example:
    """Names of objects, present and absent, as a detector's caption; `kind`: see `naming.KINDS`, default random."""
    kind = kind or str(rng.choice(naming.KINDS, p=naming.KIND_PROBS))
    named = naming.sample_names(scene, rng, kind)
    places = {"boxes": named.boxes, "targets": named.targets, "box_names": named.names}
    return _build_example("detect", kind, named.caption, named.text, **places)


TASKS = {
    "caption": caption,
    "vqa": vqa,
    "relation": relation,
    "existence": existence,
    "tags": tags,
    "rec": rec,
    "res": res,
    "reason": reason,
    "reg": reg,
    "box_vqa": box_vqa,
    "grounded": grounded,
    "conversation": conversation,
    "detect": detect,
}


def make_example(task: str, scene: Scene, rng, tag_noise: float = 0.0) -> Example:
    """One example of a task by name, with scene id and noisy tags. Raises UserError for an unknown task."""
    if task not in TASKS:
        raise UserError(f"there is no task {task!r}; choose one of {', '.join(TASKS)}")
    example = TASKS[task](scene, rng)
    return dataclasses.replace(example, scene=scene.id, tags=scene_tags(scene, tag_noise))
