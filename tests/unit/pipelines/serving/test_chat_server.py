# SPDX-License-Identifier: Apache-2.0
"""The server under its clients: the openai package, several at once, those that leave, floods, bad requests."""

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import jax
import openai
import pytest
import small_lion
from live_server import data_url, messages, picture, png_of_size, served

import lionjax
from lionjax import cli
from lionjax.inference.live import LiveModel
from lionjax.inference.live_question import LiveConfig
from lionjax.inference.session import AnswerSession

pytestmark = pytest.mark.slow
URL = data_url(picture())
QUESTIONS = ["What is here?", "Where is the red star?", "How many rings?", "Is there a cat?", "Describe it.", "Why?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "run"
    small_lion.finished(folder, small_lion.experiment())
    (folder / "evaluation" / "pictures").mkdir(parents=True)
    picture().save(folder / "evaluation" / "pictures" / "a.png")
    row = '{"image": "pictures/a.png", "question": "What?", "question_boxes": []}\n'
    (folder / "evaluation" / "vqa.jsonl").write_text(row + row.replace("pictures/a.png", "../config.json"))
    return lionjax.load(folder, prompt_length=60), folder


@pytest.fixture(scope="module")
def server(model):
    with served(*model, LiveConfig(num_slots=2, max_waiting=3)) as (url, live):
        yield url, live


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=120)


def ask(client, text, url=URL, **fields):
    return client.chat.completions.create(model="small", messages=messages(text, url), **fields)


def test_the_openai_package_gets_the_models_answer_whole_and_streamed(client, model):
    (expected,) = model[0].answer([picture()], ["What is here?"])
    reply = ask(client, "What is here?")
    message = reply.choices[0].message
    assert message.content == expected.text and message.regions == []
    assert reply.usage.completion_tokens == len(expected.token_ids) and reply.choices[0].finish_reason == "length"
    chunks = list(ask(client, "What is here?", stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == expected.text and chunks[-1].usage == reply.usage
    assert chunks[-2].choices[0].finish_reason == "length"
    sampled = [ask(client, "Why?", temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    stop = expected.text.split()[1]
    cut = ask(client, "What is here?", stop=stop, max_tokens=20).choices[0]
    assert cut.message.content == expected.text.partition(stop)[0].rstrip() and cut.finish_reason == "stop"
    assert [one.id for one in client.models.list()] == ["small"]


def test_several_clients_at_once_get_their_own_answers(client, model):
    expected = [answer.text for answer in model[0].answer([picture()] * 5, QUESTIONS[:5])]
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        found = list(pool.map(lambda text: ask(client, text).choices[0].message.content, QUESTIONS[:5]))
    assert found == expected


def test_a_client_that_hangs_up_frees_its_place_whether_it_streams_or_not(server, client):
    url, live = server
    body = {"model": "small", "messages": messages("What?", URL), "temperature": 1.0}
    for streams in (True, False):
        with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.05) as browser:
            browser.post(f"{url}/v1/chat/completions", json=body | {"stream": streams}).read()
            raise httpx.ReadTimeout("it was answered before")
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body | {"stream": True}, timeout=60) as reply:
        next(reply.iter_lines())
    end = time.monotonic() + 20
    while live.num_open and time.monotonic() < end:
        time.sleep(0.02)
    assert live.num_open == 0 and ask(client, "What is here?").choices[0].finish_reason


def test_a_flood_is_refused_with_429_and_who_is_admitted_is_answered(server, client):
    url, live = server

    def flood(number):
        body = {"model": "small", "messages": messages(f"What {number}?", URL)}
        return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)

    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        replies = list(pool.map(flood, range(30)))
    codes = [reply.status_code for reply in replies]
    assert set(codes) == {200, 429} and codes.count(200) >= 5
    refused = replies[codes.index(429)]
    assert refused.headers["retry-after"] == "1" and "ask again later" in refused.json()["error"]["message"]
    assert live.num_open == 0 and ask(client, "What is here?").choices[0].finish_reason


@pytest.mark.parametrize(
    "image, sentence",
    [
        (data_url(png_of_size(20000, 20000)), "pixels, more than"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "not JPEG, PNG or WebP"),
        (URL[:-2000], "truncated"),
        ("https://example.com/a.png", "is not fetched"),
    ],
)
def test_a_bad_image_costs_nobody_else_anything(client, server, image, sentence):
    with pytest.raises(openai.BadRequestError, match=sentence):
        ask(client, "?", image)
    assert server[1].num_open == 0


def test_bad_requests_get_their_status_and_a_sentence(server, client):
    url = f"{server[0]}/v1/chat/completions"
    json_type = {"content-type": "application/json"}
    sent = [
        (httpx.post(url, content=b"{", headers=json_type), 400, "no valid JSON"),
        (httpx.post(url, content=b"[" * 10**5, headers=json_type), 400, "no valid JSON"),
        (httpx.post(url, content=b"x" * (3 * 2**20), headers=json_type), 413, "larger than 2 MiB"),
        (httpx.post(url, content=iter([b"x" * 2**20] * 3), headers=json_type), 413, "larger than 2 MiB"),
        (httpx.post(url, content=b"{}", headers={"content-type": "text/plain"}), 415, "application/json"),
        (httpx.post(url, json={"model": "other", "messages": messages("?")}), 404, "this server has 'small'"),
        (httpx.post(url, json={"model": "small", "messages": messages("?" * 999)}), 400, "at most 60"),
        (httpx.post(url, json={"model": "small", "messages": messages("?"), "top_p": 0}), 400, "top_p is 0"),
        (httpx.post(url, json={"model": "small", "messages": messages("?"), "max_tokens": 99}), 400, "give 1 to 24"),
        (httpx.get(url), 405, "not served here"),
    ]
    for reply, status, sentence in sent:
        assert reply.status_code == status and sentence in reply.json()["error"]["message"]
        assert "/" not in reply.json()["error"]["message"].replace(url, "").replace("/v1/chat/completions", "").replace(
            "application/json", ""
        )
    assert httpx.get(f"{server[0]}/health").json() == {"status": "ok", "open": 0}


def test_only_the_page_and_its_images_are_served(server, model):
    url, folder = server[0], model[1]
    assert "<title>" in httpx.get(url).text
    settings = httpx.get(f"{url}/page.json").json()
    assert settings["examples"] == [{"image": "/examples/0", "question": "What?"}]  # no file that is no image
    assert str(folder) not in httpx.get(f"{url}/page.json").text
    assert httpx.get(f"{url}/examples/0").content == (folder / "evaluation" / "pictures" / "a.png").read_bytes()
    files = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    tried = [*files, "examples/1", "examples/../config.json", "page/../chat_server.py", f"file={folder}/config.json"]
    assert {httpx.get(f"{url}/{path}").status_code for path in tried} == {404}


def test_a_key_is_wanted_where_there_is_one_and_late_answers_are_refused(model):
    with served(*model, LiveConfig(num_slots=2, timeout_seconds=1e-4), key="secret-key") as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
            ask(client, "What is here?")
        assert "secret" not in httpx.get(url).text + httpx.get(f"{url}/page.json").text
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret-key", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="longer than the 0.0001 s allowed"):
            ask(client, "What is here?")


def test_a_batch_that_fails_is_refused_and_the_next_is_answered(client, monkeypatch):
    advance = AnswerSession.advance

    def fail(*_):
        monkeypatch.setattr(AnswerSession, "advance", advance)
        raise MemoryError("no memory")

    monkeypatch.setattr(AnswerSession, "advance", fail)
    with pytest.raises(openai.InternalServerError, match="the batch failed .MemoryError.; ask again"):
        ask(client, "What now?")
    monkeypatch.setattr(LiveModel, "_drop_late", lambda live: monkeypatch.undo() or 1 / 0)
    with pytest.raises(openai.InternalServerError, match="the model failed; ask again"):
        ask(client, "What then?")
    assert ask(client, "What now?").choices[0].message.content


def test_the_command_line_names_what_is_wrong(tmp_path, capsys, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        for words, sentence in (
            (["--port", "99999"], "--port is 99999"),
            (["--slots", "0"], "num_slots is 0"),
            (["--max-request", "0"], "max_request_mib is 0"),
            (["--port", str(other.getsockname()[1])], "choose another --port"),
            ([], "there is no folder"),
        ):
            assert cli.main(["serve", str(tmp_path / "none"), "--port", "18765", *words]) == 2
            assert sentence in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "lionjax.pipelines.serving.chat_server", raising=False)
    monkeypatch.delattr(lionjax.pipelines.serving, "chat_server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["demo", str(tmp_path)]) == 2
    assert "run `pip install 'lionjax[serve]'`" in capsys.readouterr().err


@pytest.mark.timeout(900)  # it compiles in a process of its own
def test_lionjax_demo_serves_the_page_and_answers_until_ctrl_c(model):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "lionjax.cli", "demo", str(model[1]), "--port", str(port), "--slots", "2"]
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}  # of `small_lion`
    env = os.environ | cache | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    page = subprocess.Popen([*command, "--prompt-length", "60"], stderr=subprocess.PIPE, text=True, env=env)
    watch = threading.Timer(840, page.kill)
    watch.start()
    try:
        assert any("press Ctrl-C to stop" in line for line in page.stderr)
        url = f"http://127.0.0.1:{port}"
        assert "<title>" in httpx.get(url).text
        talk = [*messages("What is it?", URL), {"role": "assistant", "content": "a star"}]
        talk += messages("And here?", regions=[{"box": (0.2, 0.25, 0.8, 0.75)}])
        body = {"model": "run", "messages": talk, "tags": ["ring"], "max_tokens": 3}
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        assert 1 <= reply["usage"]["completion_tokens"] <= 3 and reply["choices"][0]["message"]["tags"] == ["ring"]
        page.send_signal(signal.SIGINT)
        assert page.wait(60) == 0
    finally:
        watch.cancel()
        page.kill()
        page.stderr.close()


def test_lionjax_generate_samples_streams_and_answers_a_file_like_the_model(model, tmp_path, capsys):
    loaded, folder = model
    image = tmp_path / "a.png"
    picture().save(image)
    one = ["generate", str(folder), "--image", str(image), "--prompt-length", "60", "--prompt", "What is here?"]
    (expected,) = loaded.answer([picture()], ["What is here?"])
    assert cli.main([*one, "--stream", "--max-tokens", "24"]) == 0
    assert capsys.readouterr().out == f"{expected.text}\n"
    (tmp_path / "q.jsonl").write_text('{"image": "a.png", "prompt": "What is here?"}\n{"image": "b.png"}\n')
    words = ["generate", str(folder), "--prompt-length", "60", "--questions", str(tmp_path / "q.jsonl")]
    assert cli.main([*words, "--answers", str(tmp_path / "out.jsonl"), "--prompt", "?"]) == 2
    assert "1 questions have no answer" in capsys.readouterr().err
    first, second = (tmp_path / "out.jsonl").read_text().splitlines()
    assert f'"text": "{expected.text}"' in first and "there is no image b.png" in second
    for words, sentence in (
        ([*one[:3], "http://a/b.png", *one[4:]], "addresses are not fetched"),
        ([*one, "--top-p", "2"], "--top_p is 2.0"),
        ([*one, "--answers", "x"], "--answers is of --questions"),
        ([*one[:4], str(image), *one[4:]], "many questions need --answers"),
    ):
        assert cli.main(words) == 2
        assert sentence in capsys.readouterr().err
