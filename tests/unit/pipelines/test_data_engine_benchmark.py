# SPDX-License-Identifier: Apache-2.0
"""The scripted data engine: it sees what a request holds, and what it says of a scene is true."""

import re

import pytest

from benchmarks import data_engine, scripted_engine
from lionjax.core.files import read_json
from lionjax.data import templates
from lionjax.data.scenes import referring, world
from lionjax.pipelines.instructions import llava_kinds
from lionjax.pipelines.instructions.few_shot import read_few_shot

SCENES = [world.sample_scene("train", index, 3) for index in range(12)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(run folder, contexts, {(id, question): answer} of all rounds)."""
    folder = tmp_path_factory.mktemp("engine")
    contexts = data_engine.write_scenes(data_engine.Run(scenes=len(SCENES)), 3, folder, 16)
    counts = data_engine.synthesize(contexts, folder, 0)
    assert counts["detail"] == counts["reasoning"] == len(SCENES) and counts["conversation"] > 9 * len(SCENES)
    rounds = {}
    for record in read_json(folder / "engine.json"):
        human, gpt = (message["value"] for message in record["conversations"])
        rounds[record["image"].removesuffix(".png"), human.removeprefix("<image>\n")] = gpt
    return folder, contexts, rounds


def scene_of(name):
    return next(scene for scene in SCENES if scene.id == name)


def words_of(form, question):
    """The words in the placeholders of the form that a question has, or None."""
    for text in form:
        pattern = re.sub(r"\\{\w+\\}", "(.+)", re.escape(text))
        if found := re.fullmatch(pattern, question, re.IGNORECASE):
            return [word.lower() for word in found.groups()]
    return None


def test_answers_are_true_of_the_scene(made):
    checked = 0
    for (name, question), answer in made[2].items():
        scene = scene_of(name)
        if words := words_of(templates.EXISTENCE, question):
            pairs = [f"{thing.color} {thing.shape}" for thing in scene.things]
            assert (words[0].partition(" ")[2] in pairs) == (answer == "yes"), (name, question)
        elif words := words_of(templates.COUNT, question):
            nouns = [
                {
                    referring.pluralize(" ".join([*some, end]))
                    for some in ([t.color], [t.texture], [])
                    for end in ("object", t.shape)
                }
                for t in scene.things
            ]
            assert str(sum(words[0] in its for its in nouns)) == answer, (name, question)
        elif words := words_of(templates.COLOR, question) or words_of(templates.SHAPE, question):
            named = [k for k in range(len(scene.things)) if words[0] in referring.referring_expressions(scene, k)]
            if named:  # else it is named in an order of words that scenes do not use
                assert answer in (scene.things[named[0]].color, scene.things[named[0]].shape), (name, question)
        else:
            continue
        checked += 1
    assert checked > 60


def test_equal_requests_have_equal_replies_and_unnamed_things_are_not_spoken_of(made):
    _, contexts, rounds = made
    (request,) = llava_kinds.build_requests("detail", contexts[:1])
    assert scripted_engine.reply_to(request.messages) == scripted_engine.reply_to(request.messages)
    seen = {name for context in contexts for name, _ in context.instances}
    held_out = [" ".join(pair) for pair in world.HELD_OUT_PAIRS]
    assert seen.isdisjoint(held_out)  # existence of things that no scene has would be a lesson that they never exist
    assert not [question for _, question in rounds if any(f" {pair}" in question for pair in held_out)]


def test_the_request_for_short_answers_holds_all_that_the_engine_uses(made, tmp_path):
    shots = read_few_shot(
        scripted_engine.write_few_shot(tmp_path, "conversation", ["red star", "blue ring", "red ring"])
    )
    messages = shots.messages("A red star and two blue rings.")
    reply = scripted_engine.reply_to(messages)
    assert {word for line in reply.split("\n") for word in re.findall("star|ring|heart|cross", line)} <= {
        "star",
        "ring",
    }
    pairs = llava_kinds.parse_conversation(reply)
    assert all(re.fullmatch(r"\d|[a-z]+", answer) for _, answer in pairs)
