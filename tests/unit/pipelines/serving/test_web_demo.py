# SPDX-License-Identifier: Apache-2.0
"""The web page: clicks that point, what the model is asked, and the page itself asked over HTTP."""

import json
import signal
import socket
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import small_lion
from PIL import Image

import lionjax
from lionjax import cli
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


def test_examples_are_evaluation_questions_without_boxes(tmp_path):
    assert web_demo.run_examples(tmp_path) == []
    folder = tmp_path / "evaluation"
    (folder / "pictures").mkdir(parents=True)
    PICTURE.save(folder / "pictures" / "a.png")
    seen = {"image": "pictures/a.png", "question_boxes": []}
    lines = [{"question": f"{k}?", "prediction": "no"} | seen for k in range(5)]
    lines[1] |= {"question_boxes": [[0, 0, 1, 1]]}
    lines[2] |= {"image": "pictures/lost.png"}
    del lines[3]["image"]
    (folder / "vqa.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    picture = str(folder / "pictures" / "a.png")
    assert web_demo.run_examples(tmp_path) == [[picture, "0?"], [picture, "4?"]]


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


@pytest.mark.slow
def test_a_taken_port_and_a_lacking_gradio_raise_a_one_sentence_error(tmp_path, monkeypatch, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        words = ["demo", str(tmp_path), "--port", str(other.getsockname()[1])]
        assert cli.main(words) == 2
    assert "choose another --port" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["demo", str(tmp_path)]) == 2
    assert capsys.readouterr().err == 'lionjax: the demo needs gradio; install it with `pip install "lionjax[demo]"`\n'
    with pytest.raises(UserError, match="needs gradio"):
        web_demo.build_demo(Listener())


@pytest.mark.slow
def test_the_served_page_answers_like_the_model_shows_errors_and_stops_on_ctrl_c(tmp_path):
    """Over HTTP and in a process of its own, as its users have it; clicks travel as the page sends them."""
    client = pytest.importorskip("gradio_client")
    import httpx

    run, file = tmp_path / "run", tmp_path / "picture.png"
    small_lion.finished(run, small_lion.experiment())
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    model = lionjax.load(run)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "lionjax.cli", "demo", str(run), "--port", str(port)]
    page = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    watch = threading.Timer(240, page.kill)
    watch.start()
    try:
        assert f"http://127.0.0.1:{port} serves {run}" in "".join(iter_until(page.stderr, "Ctrl-C"))
        asks = client.Client(f"http://127.0.0.1:{port}", verbose=False)
        first, second = "What is here?", "Where is the red star?"
        given = {"file": client.handle_file(file), "words": "red star, ring", "remembers": True, "api_name": "/ask"}
        asks.predict(prompt=first, **given)
        chat, drawn, emptied = asks.predict(prompt=second, **given)
        tags = [["red star", "ring"]]
        (one,) = model.answer([pixels], [first], tags=tags)
        (two,) = model.answer([pixels], [second], tags=tags, history=[[(first, one.text)]])
        assert [turn["content"][0]["text"] for turn in chat] == [first, one.text, second, two.text]
        assert emptied == "" and max(Image.open(drawn).size) == 480
        with pytest.raises(Exception, match="Choose an image and enter a question"):
            asks.predict(prompt=" ", **given)
        foreign, broken = tmp_path / "foreign.bmp", tmp_path / "broken.png"
        Image.fromarray(pixels).save(foreign)
        broken.write_text("no picture")
        for bad, sentence in ((foreign, "not JPEG, PNG or WebP"), (broken, "cannot identify image")):
            with pytest.raises(Exception, match=sentence):
                asks.predict(prompt=first, **given | {"file": client.handle_file(bad)})
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as browser:
            sent = browser.post("/gradio_api/upload", files={"files": file.read_bytes()}).json()[0]
            seen = {"path": sent, "meta": {"_type": "gradio.FileData"}}
            for corner in ((40, 10), (10, 30)):
                assert called(browser, "select", [None, seen], {"index": corner, "value": None})
            chat = called(browser, "submit", [None, seen, first, "red star, ring", False])[1]
        (pointed_at,) = model.answer([pixels], [first], boxes=[[(0.2, 0.25, 0.8, 0.75)]], tags=tags)
        assert chat[1]["content"][0]["text"] == pointed_at.text != one.text
        page.send_signal(signal.SIGINT)
        assert page.wait(60) == 0
    finally:
        watch.cancel()
        page.kill()
        page.stderr.close()


def called(browser, event, data, more=None):
    """What the page gives back for an event of one of its parts, as a browser sends it."""
    parts = browser.get("/config").json()["dependencies"]
    (number,) = (one["id"] for one in parts if event in [name for _, name in one["targets"]])
    asked = {"data": data, "fn_index": number, "session_hash": "test", "event_data": more}
    browser.post("/gradio_api/queue/join", json=asked).raise_for_status()
    with browser.stream("GET", "/gradio_api/queue/data", params={"session_hash": "test"}) as lines:
        done = (json.loads(line[5:]) for line in lines.iter_lines() if "process_completed" in line)
        told = next(done)
    assert told["success"], told
    return told["output"]["data"]


def iter_until(stream, word):
    """The lines of a stream as they come, up to the one that has a word."""
    for line in stream:
        yield line
        if word in line:
            return
