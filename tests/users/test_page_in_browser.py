# SPDX-License-Identifier: Apache-2.0
"""The page in headless Chromium, as its users have it (`make test-users`). Screenshots lie in $LIONJAX_SCREENSHOTS.

A scripted model answers, so that what is tested is the page and the server.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from live_server import picture, png_of_size, serving
from scripted_live import TEXT, ScriptedLive

if not os.environ.get("LIONJAX_USERS"):
    pytest.skip("run by `make test-users`", allow_module_level=True)
from playwright.sync_api import expect, sync_playwright

SCREENSHOTS = Path(os.environ.get("LIONJAX_SCREENSHOTS", "")) if os.environ.get("LIONJAX_SCREENSHOTS") else None
WAIT = 20_000  # milliseconds


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert path, "there is no Chromium; install Debian's chromium"
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def files(tmp_path):
    picture(0, (400, 300)).save(tmp_path / "a.png")
    (tmp_path / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "huge.png").write_bytes(png_of_size(20000, 20000))
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:30])
    folder = tmp_path / "run" / "evaluation"
    folder.mkdir(parents=True)
    picture(1, (80, 80)).save(folder / "e.png")
    (folder / "vqa.jsonl").write_text('{"image": "e.png", "question": "What shape is it?"}\n')
    return tmp_path


@pytest.fixture
def live():
    return ScriptedLive()


@pytest.fixture
def url(live, files):
    with serving(live, files / "run") as address:
        yield address


@pytest.fixture
def page(browser, url):
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    made = context.new_page()
    made.set_default_timeout(WAIT)
    problems = []
    made.on("pageerror", lambda error: problems.append(str(error)))
    made.on("console", lambda line: problems.append(line.text) if "Content Security" in line.text else None)
    made.goto(url)
    yield made
    context.close()
    assert problems == []


def shoot(page, name):
    if SCREENSHOTS is not None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"{name}.png")


def upload(page, file):
    page.set_input_files("#file", file)


def ask(page, text):
    page.fill("#question", text)
    page.click("#send")


def place(page, x, y):
    """A point of the image, in pixels of the window."""
    box = page.locator("#overlay").bounding_box()
    return box["x"] + x * box["width"], box["y"] + y * box["height"]


def drag(page, start, end):
    page.mouse.move(*place(page, *start))
    page.mouse.down()
    page.mouse.move(*place(page, *end), steps=4)
    page.mouse.up()


def answered(page, count=1):
    expect(page.locator(".turn .answer").nth(count - 1)).to_have_text(TEXT, timeout=WAIT)


def test_an_image_is_asked_about_and_places_have_the_colors_of_their_words(page, files, live):
    shoot(page, "1_begin")
    ask(page, "What is here?")
    expect(page.locator("#warning")).to_have_text("Choose an image first.")
    upload(page, files / "a.png")
    expect(page.locator("#image")).to_be_visible()
    ask(page, "What is here?")
    answered(page)
    words, boxes = page.locator(".word"), page.locator(".place rect")
    assert words.all_inner_texts()[::2] == ["a red star", "a blue ring"]
    colors = [word.evaluate("one => getComputedStyle(one).borderBottomColor") for word in words.all()]
    strokes = [box.evaluate("one => getComputedStyle(one).stroke") for box in boxes.all()]
    assert colors[::2] == strokes and len(set(strokes)) == 2
    assert page.locator(".place image").count() == 1  # the mask that is not empty
    frame = boxes.nth(1).bounding_box()
    assert (frame["x"], frame["y"]) == pytest.approx(place(page, 0.5, 0.5), abs=4)
    words.nth(2).hover()
    expect(page.locator(".place-0.place")).to_have_class("place place-0 dim")
    expect(page.locator(".place-1.place")).to_have_class("place place-1 lit")
    shoot(page, "2_answer")
    page.mouse.move(*place(page, 0.52, 0.52))
    expect(words.nth(2)).to_have_class("word place-1 lit")
    ask(page, "And now?")
    answered(page, 2)
    assert live.asked[1].sample.turns == (("What is here?", TEXT),)  # the talk is part of the prompt
    page.click("#settings summary")
    page.uncheck("#remembers")
    page.fill("#temperature", "0.7")
    page.fill("#length", "20")
    ask(page, "Alone?")
    answered(page, 3)
    last = live.asked[2]
    assert (last.sample.turns, last.temperature, last.max_new_tokens) == ((), 0.7, 20)


def test_regions_are_dragged_clicked_and_pointed_at(page, files, live):
    upload(page, files / "a.png")
    expect(page.locator("#overlay")).to_be_visible()
    drag(page, (0.1, 0.2), (0.5, 0.6))
    expect(page.locator("#regions button")).to_have_count(1)
    for corner in ((0.9, 0.9), (0.6, 0.7)):
        page.mouse.click(*place(page, *corner))
    expect(page.locator("#regions button")).to_have_count(2)
    page.check("[name=mode][value=point]")
    page.mouse.click(*place(page, 0.3, 0.3))
    expect(page.locator("#regions button")).to_have_count(3)
    shoot(page, "3_regions")
    page.locator("#regions button").nth(1).click()
    ask(page, "What is in {box} and at {box}?")
    answered(page)
    boxes = live.asked[0].sample.boxes
    assert boxes[0] == pytest.approx((0.1, 0.2, 0.5, 0.6), abs=0.01)
    assert boxes[1] == pytest.approx((0.28, 0.28, 0.32, 0.32), abs=0.01)
    expect(page.locator("#regions button")).to_have_count(0)


def test_words_stream_and_stop_retry_edit_vote_and_save_work(page, files, live, tmp_path):
    live.seconds = 0.3
    upload(page, files / "a.png")
    expect(page.locator("#overlay")).to_be_visible()
    ask(page, "Slowly?")
    expect(page.locator(".turn .answer")).to_contain_text("There is a")
    assert page.locator(".turn .answer").inner_text() != TEXT
    shoot(page, "4_streaming")
    page.click("#stop")
    expect(page.locator(".turn .more")).to_have_text("(stopped)")
    assert page.locator(".turn .answer").inner_text().startswith("There is a")
    live.seconds = 0.005
    page.click("#retry")
    answered(page)
    assert len(live.stopped) == 1 and page.locator(".turn").count() == 1
    ask(page, "Second?")
    answered(page, 2)
    page.locator(".turn").nth(0).get_by_text("Edit").click()
    expect(page.locator("#question")).to_have_value("Slowly?")
    ask(page, "Edited?")
    expect(page.locator(".turn")).to_have_count(1)
    answered(page)
    assert live.asked[-1].sample.turns == () and live.asked[-1].sample.question == "Edited?"
    page.get_by_text("Good", exact=True).click()
    page.click("#new")
    ask(page, "New?")
    answered(page, 2)
    assert live.asked[-1].sample.turns == ()
    with page.expect_download() as download:
        page.click("#save")
    rows = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert [row["question"] for row in rows] == ["Slowly?", "Slowly?", "Second?", "Edited?", "New?"]
    assert [row["vote"] for row in rows] == [None, None, None, "good", None]
    assert [row["talk"] for row in rows] == [0, 0, 0, 0, 1] and [row["replaced"] for row in rows][3:] == [False, False]
    assert all(row["image"] == "a.png" and len(row["regions"]) == 2 for row in rows[1:])


@pytest.mark.parametrize(
    "name, sentence",
    [("drawing.svg", "not JPEG, PNG or WebP"), ("huge.png", "400 million pixels"), ("broken.png", "may be damaged")],
)
def test_a_bad_image_is_a_warning_and_nothing_is_lost(page, files, name, sentence):
    upload(page, files / "a.png")
    expect(page.locator("#overlay")).to_be_visible()
    ask(page, "What is here?")
    answered(page)
    before = page.get_attribute("#image", "src")
    page.fill("#question", "half a question")
    upload(page, files / name)
    expect(page.locator("#warning")).to_contain_text(sentence)
    shoot(page, f"5_{name.partition('.')[0]}")
    assert page.get_attribute("#image", "src") == before and page.locator(".place rect").count() == 2
    assert page.input_value("#question") == "half a question" and page.locator(".turn").count() == 1


def test_a_server_error_is_one_sentence_and_the_question_comes_back(page, files, live):
    upload(page, files / "a.png")
    expect(page.locator("#overlay")).to_be_visible()
    drag(page, (0.1, 0.2), (0.5, 0.6))
    ask(page, "{box} {box} {box}?")
    expect(page.locator("#warning")).to_contain_text("give one for each")
    assert page.input_value("#question") == "{box} {box} {box}?" and page.locator(".turn").count() == 0
    expect(page.locator("#regions button")).to_have_count(1)
    ask(page, "What is in {box}?")
    answered(page)
    expect(page.locator("#warning")).to_be_hidden()


def test_an_example_opens_by_a_click_and_nothing_scrolls_off_the_screen(page, live):
    page.locator("#examples button").click()
    expect(page.locator("#question")).to_have_value("What shape is it?")
    page.click("#send")
    answered(page)
    assert live.asked[0].sample.image.size == (80, 80)
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")


@pytest.mark.parametrize("width, scheme", [(390, "light"), (1200, "dark")])
def test_the_page_fits_a_phone_and_a_dark_screen(browser, url, files, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto(url)
    upload(page, files / "a.png")
    expect(page.locator("#overlay")).to_be_visible()
    ask(page, "What is here?")
    answered(page)
    shoot(page, f"6_{width}_{scheme}")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 25, 29)"
    assert dark == (scheme == "dark")
    context.close()


def test_three_users_at_once_have_their_own_talks(browser, url, files, live):
    contexts = [browser.new_context() for _ in range(3)]
    pages = [context.new_page() for context in contexts]
    for page in pages:
        page.goto(url)
        upload(page, files / "a.png")
        expect(page.locator("#overlay")).to_be_visible()
    for number, page in enumerate(pages):
        ask(page, f"User {number}?")
    for number, page in enumerate(pages):
        answered(page)
        assert f"User {number}?" in page.locator(".turn .question").inner_text()
    assert sorted(one.sample.question for one in live.asked) == ["User 0?", "User 1?", "User 2?"]
    assert all(one.sample.turns == () for one in live.asked)
    for context in contexts:
        context.close()
