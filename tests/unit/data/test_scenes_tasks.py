# SPDX-License-Identifier: Apache-2.0
"""Every question about a scene is true, fits one thing, can be answered from the scene, and not without it."""

import re
from collections import Counter

import numpy as np
import pytest
import scene_reader as reader

from lionjax.core.prompt_formats import PROMPTCAP_CAPTIONER
from lionjax.core.types import CATEGORIES, UserError
from lionjax.data import templates as wordings
from lionjax.data.scenes import referring as says
from lionjax.data.scenes import tasks, world
from lionjax.data.scenes.question_captions import QuestionCaptions, statement

SCENES = {split: [world.sample_scene(split, i) for i in range(250)] for split in ("train", "heldout")}
BOTH = SCENES["train"] + SCENES["heldout"]


def examples(task, pool=BOTH, seed=0, **more):
    rng = np.random.default_rng(seed)
    return [(scene, tasks.TASKS[task](scene, rng, **more)) for scene in pool]


def boxes_in(text):
    return tuple(tuple(float(edge) for edge in found.split(",")) for found in re.findall(r"\[([\d.,]+)\]", text))


def rounded(boxes):
    return tuple(tuple(round(edge, 3) for edge in box) for box in boxes)


def assert_even(yes, count):
    """Within four standard deviations of one half."""
    assert abs(yes - count / 2) < 2 * count**0.5, f"{yes} of {count} are yes"


@pytest.mark.slow
def test_every_expression_matches_exactly_one_object_for_an_independent_reader():
    checked = Counter()
    for scene in BOTH:
        things, _ = reader.read(tasks.scene_to_text(scene))
        order = says.left_to_right(scene)
        for seen, k in zip(things, order):
            for kind in (says.attribute_expressions, says.superlative_expressions, says.relational_expressions):
                for expression in kind(scene, k):
                    assert reader.resolve(things, expression) == [seen], expression
                    checked[kind.__name__] += 1
    assert min(checked.values()) > 500 and len(checked) == 3


def test_excluded_attributes_are_not_mentioned():
    for scene in BOTH[:60]:
        for k, thing in enumerate(scene.things):
            for expression in says.attribute_expressions(scene, k, excluded=("color",)):
                assert thing.color not in expression
            for expression in says.superlative_expressions(scene, k, excluded=("shape",)):
                assert thing.shape not in expression


def test_rec_answer_is_the_box_of_the_referred_object():
    for scene, example in examples("rec"):
        things, _ = reader.read(tasks.scene_to_text(scene))
        thing = reader.only(things, reader.heard(example.question, wordings.REC)["expr"])
        assert example.answer.startswith("Answer: [")
        assert boxes_in(example.answer) == (tuple(thing["box"]),) == rounded(example.boxes)
        assert scene.things[example.targets[0]].box == example.boxes[0]


def test_res_target_is_the_mask_of_the_referred_object():
    for scene, example in examples("res", BOTH[::4]):
        things, _ = reader.read(tasks.scene_to_text(scene))
        thing = reader.only(things, reader.heard(example.question, wordings.RES)["expr"])
        (k,) = example.targets
        y, x = np.nonzero(scene.masks(256)[k])
        assert thing["box"] == [round(edge / 256, 3) for edge in (x.min(), y.min(), x.max() + 1, y.max() + 1)]


def test_reg_references_all_fit_the_box_in_the_question():
    for scene, example in examples("reg"):
        things, _ = reader.read(tasks.scene_to_text(scene))
        (asked,) = boxes_in(example.question)
        assert (asked,) == rounded(example.question_boxes) and example.answer in example.answers
        for answer in example.answers:
            assert tuple(reader.only(things, answer)["box"]) == asked


@pytest.mark.parametrize("kind, templates", [("color", wordings.COLOR), ("shape", wordings.SHAPE)])
def test_color_and_shape_answers_match_the_scene(kind, templates):
    for scene, example in examples("vqa", kind=kind):
        if example.kind == kind:
            things, _ = reader.read(tasks.scene_to_text(scene))
            expression = reader.heard(example.question, templates)["expr"]
            assert reader.only(things, expression)[kind] == example.answer
            own_words = re.split(" (?:left of|right of|above|below) ", expression)[0]
            assert example.answer not in own_words


def test_count_answers_match_the_scene():
    for scene, example in examples("vqa", kind="count"):
        things, _ = reader.read(tasks.scene_to_text(scene))
        nouns = reader.heard(example.question, wordings.COUNT)["nouns"]
        assert str(reader.how_many(things, nouns)) == example.answer
        assert len(example.targets) == int(example.answer)


def test_yes_no_answers_match_the_scene():
    forms = Counter()
    for scene, example in examples("vqa", kind="yesno"):
        things, _ = reader.read(tasks.scene_to_text(scene))
        said = reader.heard(example.question, wordings.COUNT_COMPARISON)
        if said:
            counts = [reader.how_many(things, said[which]) for which in ("first", "second")]
            truth = counts[0] > counts[1]
            assert counts[0] != counts[1] and min(counts) > 0
        else:
            said = reader.heard(example.question, wordings.ATTRIBUTE_YESNO)
            if not said:  # a scene too uniform for either form is asked for a thing's existence
                assert example.question.startswith(("Is there", "Does", "Can you", "Do you"))
                forms["existence"] += 1
                continue
            truth = said["word"] in reader.only(things, said["expr"])["words"].split()
        forms[tuple(said)] += 1
        assert example.answer == ("yes" if truth else "no"), example.question
    existence = forms.pop("existence", 0)
    assert existence < 10 and len(forms) == 2 and min(forms.values()) > 100


def test_relation_answers_match_the_scene_and_use_every_relation():
    words = Counter()
    for scene, example in examples("relation"):
        things, hides = reader.read(tasks.scene_to_text(scene))
        ends = {"first": "[Tt]he .+", "second": "the .+"}
        said = reader.heard(example.question, wordings.RELATION, **ends)
        relation = said["relation"]
        truth = reader.is_so(things, hides, said["first"], relation, said["second"])
        assert example.answer == ("yes" if truth else "no"), example.question
        words[relation] += 1
    assert set(words) == set(says.OPPOSITE_RELATION)


@pytest.mark.parametrize("setting", tasks.POPE_SETTINGS)
def test_existence_answers_match_the_scene_and_absent_objects_follow_the_pope_setting(setting):
    for scene, example in examples("existence", setting=setting):
        color, shape = reader.heard(example.question, wordings.EXISTENCE)["noun"].split()[-2:]
        present = {(t.color, t.shape) for t in scene.things}
        assert example.kind == setting and (example.answer == "yes") == ((color, shape) in present)
        if example.answer == "no" and setting == "adversarial":
            apart = [color in {c for c, _ in present}, shape in {s for _, s in present}]
            alternatives = {(c, s) for c, _ in present for _, s in present} - present
            assert all(apart) or not alternatives & set(world.allowed_pairs(scene.split))
        if example.answer == "no" and setting == "popular":
            assert (color, shape) in tasks.POPULAR_PAIRS or not tasks.POPULAR_PAIRS - present


def test_yes_and_no_are_equally_likely():
    for seed, (task, more) in enumerate(
        [("vqa", {"kind": "yesno"}), ("relation", {})] + [("existence", {"setting": s}) for s in tasks.POPE_SETTINGS]
    ):
        answers = Counter(e.answer for repeat in (0, 1) for _, e in examples(task, seed=seed + 50 * repeat, **more))
        assert set(answers) == {"yes", "no"}
        assert_even(answers["yes"], answers.total())


def blind_accuracy(train, test):
    """Of a linear model on the words and word pairs of the question: what closed eyes can say."""

    def features(example):
        words = re.findall(r"\w+", example.question.lower())
        return {*words, *zip(words, words[1:])}

    frequent = Counter(f for example in train for f in features(example))
    columns = {f: i for i, f in enumerate(f for f, count in frequent.items() if count > 5)}
    answers = sorted({example.answer for example in train})

    def arrays(pool):
        x = np.zeros((len(pool), len(columns)), np.float32)
        for row, example in enumerate(pool):
            x[row, [columns[f] for f in features(example) if f in columns]] = 1
        return x, np.array([answers.index(example.answer) for example in pool])

    (x, y), (x_test, y_test) = arrays(train), arrays(test)
    weights = np.zeros((len(columns), len(answers)), np.float32)
    for _ in range(100):
        scores = np.exp(x @ weights - (x @ weights).max(1, keepdims=True))
        error = scores / scores.sum(1, keepdims=True) - np.eye(len(answers), dtype=np.float32)[y]
        weights -= 0.5 * (x.T @ error / len(x)) + 1e-4 * weights
    return (np.argmax(x_test @ weights, 1) == y_test).mean()


@pytest.mark.slow
@pytest.mark.parametrize("task, most", [("vqa", 0.35), ("relation", 0.56), ("existence", 0.58)])
def test_answers_cannot_be_predicted_without_the_image(task, most):
    train = [e for seed in range(8) for _, e in examples(task, SCENES["train"], seed)]
    test = [e for seed in range(4) for _, e in examples(task, SCENES["heldout"], 99 + seed)]
    assert blind_accuracy(train, test) < most


def test_training_texts_never_mention_held_out_pairs():
    rng = np.random.default_rng(0)
    for scene in SCENES["train"]:
        for task in tasks.TASKS:
            example = tasks.make_example(task, scene, rng)
            said = " ".join([example.question, *example.answers]).lower()
            said = re.sub(r" (plain|striped|dotted)(?= \w)", "", said)
            for color, shape in world.HELD_OUT_PAIRS:
                assert f"{color} {shape}" not in said, said


def test_training_never_asks_whether_a_thing_has_its_held_out_color():
    asked = 0
    for scene, example in examples("vqa", SCENES["train"] * 4, kind="yesno"):
        said = reader.heard(example.question, wordings.ATTRIBUTE_YESNO)
        if said and not reader.heard(example.question, wordings.COUNT_COMPARISON):
            shape = scene.things[example.targets[0]].shape
            assert (said["word"], shape) not in world.HELD_OUT_PAIRS
            asked += said["word"] in world.COLORS
    assert asked > 300


def test_captions_name_every_object_of_the_scene():
    for scene in BOTH:
        expected = Counter((t.color, t.shape) for t in scene.things)
        for text in tasks.scene_captions(scene):
            listed = text.rstrip(".").split(": ")[-1].split(" on a ")[0].lower()
            found = Counter()
            for count, color, shape in re.findall(r"(\w+) (\w+) (\w+?s?)(?=,| and|$)", listed):
                number = 1 if count in ("a", "an") else says.NUMBER_WORDS.index(count)
                found[color, reader.singular(shape) if number > 1 else shape] += number
            assert found == expected, text
    assert len(set(tasks.scene_captions(BOTH[0]))) == 5


def test_grounded_captions_put_each_box_after_its_object():
    for scene, example in examples("grounded"):
        parts = re.findall(r"(?:an?|An?) (\w+ \w+) \[([\d.,]+)\]", example.answer)
        assert len(parts) == len(example.targets) == min(4, len(scene.things))
        for (noun, box), k in zip(parts, example.targets):
            assert noun == says.noun_phrase(scene.things[k])
            assert f"[{box}]" == tasks.box_to_text(scene.things[k].box)


def test_conversations_continue_about_the_object_found_first():
    lengths = Counter()
    for scene, example in examples("conversation"):
        things, _ = reader.read(tasks.scene_to_text(scene))
        (question, _), *later = example.turns
        thing = reader.only(things, reader.heard(question, wordings.REC)["expr"])
        for asked, answer in later:
            if asked in wordings.COREFERENCE_COLOR:
                assert answer == thing["color"]
            elif asked in wordings.SAME_COLOR:
                assert answer == str(reader.how_many(things, f"{thing['color']} objects"))
            else:
                word = reader.heard(asked, wordings.COREFERENCE_ATTRIBUTE_YESNO)["word"]
                assert answer == ("yes" if word == thing["texture"] else "no")
        assert example.question.count("Question: ") == len(example.turns)
        assert example.question.endswith(later[-1][0]) and example.answer == later[-1][1]
        lengths[len(example.turns)] += 1
    assert set(lengths) == {2, 3, 4}


def test_tags_are_the_truth_without_noise_and_change_at_the_noise_rate():
    missing = wrong = true_count = false_count = 0
    for scene in BOTH:
        truth = {w for t in scene.things for w in (t.color, t.shape, t.texture)} - {"plain"}
        assert set(tasks.scene_tags(scene)) == truth
        noisy = tasks.scene_tags(scene, 0.2)
        assert noisy == tasks.scene_tags(scene, 0.2) != tasks.scene_tags(scene, 0.9)
        missing += len(truth - set(noisy))
        wrong += len(set(noisy) - truth)
        true_count += len(truth)
        false_count += len(tasks.TAG_VOCABULARY) - len(truth)
    assert abs(missing / true_count - 0.2) < 0.03
    assert abs(wrong / false_count - 0.05) < 0.02


def test_every_task_uses_all_its_question_templates():
    groups = [value for key, value in vars(wordings).items() if key.isupper()]
    assert all(len(set(group)) == len(group) >= 4 for group in groups)
    rng = np.random.default_rng(0)
    words = {key: f"<{key}>" for key in "expr nouns word first second relation noun box".split()}
    for group in groups:
        asked = {wordings.sample_question(group, rng, **words) for _ in range(200)}
        assert len(asked) == len(group) and not any("{" in text for text in asked)


def test_converse_fills_in_scene_tags_and_category_and_is_repeatable():
    for task in tasks.TASKS:
        scene = BOTH[3]
        example = tasks.make_example(task, scene, np.random.default_rng(4), tag_noise=0.1)
        assert example == tasks.make_example(task, scene, np.random.default_rng(4), tag_noise=0.1)
        assert example.task == task and example.scene == scene.id
        assert example.tags == tasks.scene_tags(scene, 0.1)
        assert example.category in CATEGORIES and example.answer in example.answers
        assert bool(example.boxes or example.question_boxes) <= (example.category == "region_level")
    with pytest.raises(UserError, match="'capton'"):
        tasks.make_example("capton", BOTH[0], np.random.default_rng(0))


@pytest.mark.slow
def test_every_scene_has_an_example_of_each_task():
    rng = np.random.default_rng(1)
    for scene in BOTH:
        for task in tasks.TASKS:
            assert tasks.make_example(task, scene, rng).task == task
        for kind in ("count", "yesno"):
            assert tasks.vqa(scene, rng, kind).kind == kind


def test_the_caption_for_a_question_states_its_answer():
    source = QuestionCaptions(sizes=(150, 1, 1)).open("train", 10**6)
    for index in range(len(source)):
        scene = source.source.scene(index)
        asked = tasks.make_example("vqa", scene, np.random.default_rng(index))
        example = source.make_example("caption", index, scene, np.random.default_rng(index), 0.0)
        words = example.answer.lower().rstrip(".").replace(",", "").split()
        assert example.task == "caption" and example.question == PROMPTCAP_CAPTIONER + asked.question
        assert asked.answer in words and (("no" in words) == ("not" in words) or asked.kind not in ("yesno",))
        assert "{" not in example.answer and set(words) - set("is are".split())
    assert statement("Is the number of stars greater than that of hearts?", "yes") == (
        "Yes, there are more stars than hearts."
    )
    assert statement("The star: is it red?", "no") == "No, the star is not red."
    with pytest.raises(UserError, match="is none about a scene"):
        statement("Who is it?", "me")
