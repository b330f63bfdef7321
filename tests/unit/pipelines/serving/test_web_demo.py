# SPDX-License-Identifier: Apache-2.0
"""The gradio demo for notebooks: clicks that point, what the model is asked, what is drawn."""

import sys
import types

import numpy as np
import pytest
from PIL import Image

from lionjax.core.types import UserError
from lionjax.data.regions import ImageRegions
from lionjax.evaluation.report import plots
from lionjax.inference.model import Answer
from lionjax.pipelines.serving import web_demo
from lionjax.pipelines.serving.web_demo import Conversation, add_click

SIZE = (200, 100)
PICTURE = Image.new("RGB", SIZE, "white")
BOX = (0.1, -0.05, 0.6, 0.8)
FOUND = ImageRegions(("cat", "dog"), (), (BOX,), (0.7,), ("a cat",), ("cat",), np.zeros((5, 6), np.float32), "abc")


class Listener:
    """A model that keeps what it is asked, and answers with one box and one mask."""

    def __init__(self):
        self.asked = []

    def answer(self, images, prompts, **given):
        self.asked.append((prompts, given))
        mask = np.zeros((1, SIZE[1], SIZE[0]), bool)
        mask[:, 60:80, 120:160] = True
        return [Answer(f"answer {len(self.asked)}", np.array([[0.1, 0.1, 0.3, 0.5]]), mask)]


def test_two_clicks_make_a_box_and_a_third_starts_a_new_one():
    one = add_click(Conversation(), SIZE, (150, 75))
    assert one.box is None and one.corners == ((0.75, 0.75),)
    two = add_click(one, SIZE, (50, 25))
    assert two.box == (0.25, 0.25, 0.75, 0.75)
    three = add_click(two, SIZE, (20, 10))
    assert three.box is None and three.corners == ((0.1, 0.1),)


def test_a_second_click_on_the_same_line_is_no_corner_and_one_outside_is_moved_to_the_edge():
    one = add_click(Conversation(), SIZE, (150, 75))
    assert add_click(one, SIZE, (150, 20)) == one == add_click(one, SIZE, (20, 75.5))
    assert add_click(one, SIZE, (230, 120)).box == (0.75, 0.75, 1.0, 1.0)


def test_a_question_is_sent_with_the_clicked_box_and_the_earlier_turns():
    model, talk = Listener(), Conversation(corners=((0.75, 0.75), (0.25, 0.25)))
    talk, _ = web_demo.respond(model, talk, PICTURE, "What is this?", tags=("star",))
    assert model.asked[-1] == (
        ["What is this?"],
        {"boxes": [[(0.25, 0.25, 0.75, 0.75)]], "tags": [("star",)], "history": None},
    )
    assert talk == Conversation((("What is this?", "answer 1"),))  # the next question is about the whole picture again
    talk, _ = web_demo.respond(model, talk, PICTURE, "And its color?")
    nothing = {"boxes": None, "tags": None}
    assert model.asked[-1] == (["And its color?"], nothing | {"history": [(("What is this?", "answer 1"),)]})
    talk, _ = web_demo.respond(model, talk, PICTURE, "And now?", use_history=False)
    assert model.asked[-1] == (["And now?"], nothing | {"history": None})
    assert [one["content"] for one in talk.messages][::2] == ["What is this?", "And its color?", "And now?"]
    assert [one["role"] for one in talk.messages] == ["user", "assistant"] * 3


def test_clicked_corner_box_and_mask_are_drawn_at_their_coordinates():
    talk, answer = web_demo.respond(Listener(), Conversation(), PICTURE, "?")

    def colored(talk, answer=None):
        drawn = np.asarray(web_demo.render_image(PICTURE, talk, answer), int)
        tall, wide, _ = drawn.shape

        def near(at, color):
            part = drawn[round(at[1] * tall) - 6 :][:12, round(at[0] * wide) - 6 :][:, :12]
            return (np.abs(part - plots.hex_to_rgb(color)).sum(-1) < 40).any()

        return near

    assert not colored(talk)((0.1, 0.3), plots.PREDICTION_COLOR)
    assert colored(talk, answer)((0.1, 0.3), plots.PREDICTION_COLOR)  # its box's left edge
    assert colored(talk, answer)((0.6, 0.7), plots.PREDICTION_COLOR)  # the edge of its mask
    assert colored(Conversation(corners=((0.5, 0.5),)))((0.5, 0.5), plots.QUERY_COLOR)
    assert colored(Conversation(corners=((0.2, 0.2), (0.8, 0.8))))((0.8, 0.5), plots.QUERY_COLOR)


def test_the_web_page_describes_what_the_refiner_found():
    assert web_demo.describe_regions(None) == ""
    lines = web_demo.describe_regions(FOUND).splitlines()
    assert lines == ["Tags: cat, dog", "cat (0.70): 0.1, -0.05, 0.6, 0.8"]
    assert web_demo.describe_regions(ImageRegions()) == "Tags: none\nNo box"


@pytest.mark.slow
def test_the_web_page_refines_a_new_image_once_and_shows_what_was_found(tmp_path):
    gradio = pytest.importorskip("gradio")
    calls, given = [], []

    def answer(images, prompts, regions=None, **more):
        given.append(regions)
        boxes, masks = np.zeros((0, 4)), np.zeros((0, 100, 200), bool)
        return [Answer("red", boxes, masks, regions=(regions or [FOUND])[0])]

    config = types.SimpleNamespace(region_width=6)
    stub = types.SimpleNamespace(
        processor=types.SimpleNamespace(config=config),
        refine=lambda images: [calls.append(images) or FOUND for _ in images],
        answer=answer,
    )
    files = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for file in files:
        PICTURE.save(file)
    on_submit, _, on_image_change = web_demo._callbacks(gradio, stub, None)
    *_, state, seen = on_image_change(files[0])
    assert len(calls) == 1 and seen.startswith("Tags: cat, dog\ncat (0.70)")
    talk, _, _, _, again = on_submit(web_demo.Conversation(), files[0], "What?", "", True, state)
    assert given == [[state[1]]] and again == seen and talk.turns == (("What?", "red"),)
    on_submit(talk, files[1], "What?", "", True, state)  # another image: the model refines it
    on_submit(talk, files[1], "What?", "", True)
    assert given[1:] == [None, None] and len(calls) == 1
    assert on_image_change(None)[-1] == ""


def test_a_lacking_gradio_raises_a_one_sentence_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="needs gradio"):
        web_demo.build_demo(Listener())
