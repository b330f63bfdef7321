# SPDX-License-Identifier: Apache-2.0
"""Requests of the chat API as questions, and answers with their boxes and masks as JSON."""

import numpy as np
import pytest
from live_server import data_url, messages, picture, png_of_size

from lionjax.core.types import UserError
from lionjax.data.rle import decode_rle
from lionjax.inference.engine import Answer
from lionjax.inference.text_stream import cut_at_stops, settled_text
from lionjax.pipelines.serving import chat_requests
from lionjax.pipelines.serving.answer_regions import answer_regions

URL = data_url(picture())
TALK = [
    *messages("What is {box}?", URL, regions=[{"box": [0.1, 0.2, 0.5, 0.6]}]),
    {"role": "assistant", "content": "a star", "regions": [{"box": [0, 0, 1, 1], "start": 0, "end": 3}]},
    *messages("And here?", regions=[{"point": [0.5, 0.01]}, {"box": [0, 0, 1, 1]}]),
]


def parsed(**fields):
    return chat_requests.parse_request({"model": "m", "messages": messages("?", URL)} | fields)


def test_a_talk_becomes_turns_a_question_and_its_boxes():
    chat = parsed(messages=TALK, temperature=0.5, max_tokens=7, max_completion_tokens=9, stop="\n", seed=3, user="x")
    assert chat.turns == (("What is [0.100,0.200,0.500,0.600]?", "a star"),)
    assert chat.image_url == URL and chat.question == "And here?"
    assert chat.boxes == ((0.48, 0.0, 0.52, 0.04), (0.0, 0.0, 1.0, 1.0))  # a point is a small box inside the image
    question = chat.to_question(picture(), ("ring",))
    assert question.sample.question == "And here? [0.480,0.000,0.520,0.040][0.000,0.000,1.000,1.000]"
    assert question.sample.tags == ("ring",) and question.sample.category == "region_level"
    assert (question.temperature, question.max_new_tokens, question.stops, question.seed) == (0.5, 9, ("\n",), 3)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"messages": None}, "messages is missing or empty"),
        ({"messages": [{"role": "system", "content": "Be kind."}]}, "put its text into the first question"),
        ({"messages": TALK[:2]}, "end with the user's question"),
        ({"messages": [TALK[0], TALK[0]]}, "'assistant' is next"),
        ({"messages": messages(" ", URL)}, "has no text"),
        ({"messages": [*TALK[:2], *messages("?", data_url(picture(1)))]}, "2 different images"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "of type 'video'"),
        ({"messages": messages("?", URL, regions=[{"box": [0, 0, 2, 1]}])}, r"regions\[0\].box .* leaves the image"),
        ({"messages": messages("?", URL, regions=[{"point": [0.5]}])}, "give two numbers x, y in 0..1"),
        ({"n": 2}, "n is not supported here"),
        ({"tools": [{}]}, "tools is not supported here"),
        ({"temperature": "warm"}, "temperature is 'warm'"),
        ({"stream": "yes"}, "give a value of type bool"),
        ({"stop": ["a"] * 5}, "at most 4"),
        ({"tags": [1]}, "no list of texts"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_a_sentence_that_mends_it(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        parsed(**fields)


@pytest.mark.parametrize(
    "url, sentence",
    [
        ("http://127.0.0.1/a.png", "is not fetched"),
        ("file:///etc/passwd", "is not fetched"),
        ("picture.png", "no base64 data URL"),
        ("data:image/png;base64,?", "no valid base64"),
        ("data:image/png;base64,", "is empty"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "not JPEG, PNG or WebP"),
        (data_url(png_of_size(20000, 20000)), "400 million|too many|20000 x 20000"),
        (URL[:-2000], "truncated|cannot be read"),
    ],
)
def test_a_bad_image_is_refused_with_its_reason(url, sentence):
    with pytest.raises(UserError, match=sentence):
        chat_requests.open_data_url(url, 10**8)
    assert chat_requests.open_data_url(URL, 10**8).size == (50, 40)


def test_places_of_an_answer_have_box_mask_and_the_words_that_name_them():
    masks = np.zeros((3, 10, 20), bool)
    masks[0, 2:4, 5:9] = masks[2, 1:3, 1:3] = True
    text = "There is a red star [0.100,0.200,0.300,0.400] left of it [0.500,0.500,0.600,0.700] and [SEG]."
    boxes = np.array([[0.1004, 0.2, 0.3, 0.4], [0.5, 0.5, 0.6, 0.7]])
    first, second, third = answer_regions(Answer(text, boxes, masks))
    assert text[slice(*first["phrase"])] == "a red star" and text[first["start"] : first["end"]].startswith("[0.100")
    assert first["box"] == [0.1004, 0.2, 0.3, 0.4] and (decode_rle(first["mask"]) == masks[0]).all()
    assert text[slice(*second["phrase"])] == "left of it" and "mask" not in second  # an empty mask is none
    assert third["phrase"] == second["phrase"] and "box" not in third
    assert answer_regions(Answer("yes", np.zeros((0, 4)))) == []
    (only,) = answer_regions(Answer("[0.1,0.2,0.3,0.4]", boxes[:1]))
    assert "phrase" not in only and (only["start"], only["end"]) == (0, 17)


def test_only_text_that_stays_is_streamed():
    assert settled_text("a red star [0.1,0.2") == "a red star"
    assert settled_text("at [0.1,0.2,0.3,0.4] and ") == "at [0.1,0.2,0.3,0.4] and"
    assert settled_text("gr\ufffd") == "gr" and settled_text("It is [SEG] there") == "It is"
    assert settled_text("yes ##", ("###",)) == "yes" and settled_text("yes #", ("\n",)) == "yes #"
    assert cut_at_stops("one\ntwo.", (".", "\n")) == ("one", True) and cut_at_stops("one", ("x",)) == ("one", False)
