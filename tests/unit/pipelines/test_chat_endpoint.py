# SPDX-License-Identifier: Apache-2.0
"""The client of an OpenAI-compatible endpoint, against a server on this machine: what breaks is the wire."""

import json
import os
import signal
import subprocess
import sys

import pytest
from endpoint_server import (
    BROKEN,
    CLOSED,
    TOO_MANY,
    Failure,
    chat_reply,
    endpoint_server,
    error_body,
    prompt_of,
    text_reply,
)
from paths import ROOT

pytest.importorskip("openai")

from lionjax.core.errors import RetryError, UserError
from lionjax.pipelines.chat_endpoint import ChatEndpoint, EndpointConfig
from lionjax.pipelines.completion import CompletionRequest

SECRET = "sk-never-to-be-written"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def echo(body):
    return chat_reply(f"re {prompt_of(body)}", log_probs=[("re", -0.5)])


def requests(count, **settings):
    return [CompletionRequest(f"question {k}", max_tokens=5, **settings) for k in range(count)]


def endpoint(server, folder, **settings):
    return ChatEndpoint(EndpointConfig("m", server.url, **settings), folder / "llm" / "answers.jsonl")


def texts(replies):
    return [reply and reply.text for reply in replies]


def test_a_reply_comes_after_429_500_a_closed_connection_and_half_a_body(tmp_path):
    half = Failure(200, chat_reply("re"), is_cut=True)
    with endpoint_server(echo, [CLOSED, half, TOO_MANY, BROKEN]) as server:
        model = endpoint(server, tmp_path)
        (reply,) = model.complete(requests(1))
    assert reply.text == "re question 0" and reply.token_log_probs == (-0.5,) and reply.tokens == ("re",)
    assert len(server.bodies) == 5 and model.usage.num_asked == 1
    assert (model.usage.prompt_tokens, model.usage.completion_tokens) == (7, 3)


def test_replies_are_in_the_order_of_the_requests_and_the_key_is_in_no_file(tmp_path, caplog):
    with endpoint_server(echo) as server:
        replies = endpoint(server, tmp_path, at_once=6).complete(requests(20))
    assert texts(replies) == [f"re question {k}" for k in range(20)]
    assert server.headers[0]["authorization"] == f"Bearer {SECRET}"
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert SECRET not in written + caplog.text and written.count("\n") == 20


def test_what_is_in_the_journal_is_not_asked_again_and_what_changed_is(tmp_path):
    with endpoint_server(echo) as server:
        first = endpoint(server, tmp_path).complete(requests(4))
        again = endpoint(server, tmp_path).complete(requests(4)[::-1])
        assert again == first[::-1] and len(server.bodies) == 4
        endpoint(server, tmp_path).complete([*requests(3), CompletionRequest("question 3?", max_tokens=5)])
        assert prompt_of(server.bodies[-1]) == "question 3?" and len(server.bodies) == 5
        endpoint(server, tmp_path).complete(requests(4, temperature=1.0))
        endpoint(server, tmp_path).complete(requests(1, sample=1))
        other = ChatEndpoint(EndpointConfig("n", server.url), tmp_path / "llm" / "answers.jsonl")
        other.complete(requests(1))
    assert len(server.bodies) == 5 + 4 + 1 + 1


def test_equal_requests_of_one_run_are_asked_once(tmp_path):
    with endpoint_server(echo) as server:
        replies = endpoint(server, tmp_path).complete(requests(1) * 3)
    assert len(server.bodies) == 1 and texts(replies) == ["re question 0"] * 3


def test_a_torn_last_line_and_a_damaged_line_are_asked_again(tmp_path, caplog):
    with endpoint_server(echo) as server:
        first = endpoint(server, tmp_path, at_once=1).complete(requests(4))
        journal = tmp_path / "llm" / "answers.jsonl"
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(lines[0] + b'{"key": 3}\n{rubbish\n' + lines[2] + lines[3][:40])
        assert endpoint(server, tmp_path).complete(requests(4)) == first
        assert len(server.bodies) == 6 and "unfinished" in caplog.text and "1 damaged" in caplog.text
        assert endpoint(server, tmp_path).complete(requests(4)) == first
    assert len(server.bodies) == 6


def test_a_killed_run_continues_with_what_is_missing(tmp_path):
    code = f"""
from lionjax.pipelines.chat_endpoint import ChatEndpoint, EndpointConfig
from lionjax.pipelines.completion import CompletionRequest
import pathlib, sys
model = ChatEndpoint(EndpointConfig("m", sys.argv[1], at_once=1), pathlib.Path({str(tmp_path)!r}, "llm/answers.jsonl"))
model.complete([CompletionRequest(f"question {{k}}", max_tokens=5) for k in range(6)])
"""
    process = None

    def reply(body):
        if prompt_of(body) == "question 3" and process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        return echo(body)

    with endpoint_server(reply) as server:
        process = subprocess.Popen([sys.executable, "-c", code, server.url], cwd=ROOT)
        assert process.wait(60) == -signal.SIGKILL
        replies = endpoint(server, tmp_path).complete(requests(6))
        assert sorted(map(prompt_of, server.bodies[4:])) == ["question 3", "question 4", "question 5"]
    with endpoint_server(echo) as server:
        assert endpoint(server, tmp_path / "whole").complete(requests(6)) == replies


@pytest.mark.parametrize(
    "failure, words",
    [
        (Failure(401, error_body("no")), "refuses the key"),
        (Failure(403, error_body("no")), "refuses the key"),
        (Failure(404, error_body("no such model")), "is not there"),
        (Failure(400, error_body("temperature must be 1")), "temperature must be 1"),
        (Failure(422, error_body(f"bad field in {SECRET}")), r"bad field in \*\*\*"),
    ],
)
def test_what_asking_again_does_not_mend_stops_at_once_in_one_sentence(tmp_path, failure, words):
    with endpoint_server(lambda body: failure) as server, pytest.raises(UserError, match=words) as caught:
        endpoint(server, tmp_path, at_once=1).complete(requests(5))
    assert caught.value.exit_code == 2 and len(server.bodies) == 1
    assert (
        "with model 'm'" in str(caught.value) and "127.0.0.1" in str(caught.value) and SECRET not in str(caught.value)
    )


@pytest.mark.parametrize("failure", [TOO_MANY, BROKEN])
def test_an_overloaded_server_stops_the_run_with_the_journal_whole_and_exit_code_75(tmp_path, failure):
    with endpoint_server(lambda body: failure if "2" in prompt_of(body) else echo(body)) as server:
        with pytest.raises(RetryError, match="after 1 retries; 2 replies are kept") as caught:
            endpoint(server, tmp_path, at_once=1, max_retries=1).complete(requests(5))
        assert caught.value.exit_code == 75 and len(server.bodies) == 4
        server.reply = echo
        assert len(endpoint(server, tmp_path).complete(requests(5))) == 5
    assert len(server.bodies) == 4 + 3


def test_a_server_that_is_not_there_is_a_reason_to_try_again(tmp_path):
    with endpoint_server(echo) as server:
        pass
    with pytest.raises(RetryError, match="is out of reach"):
        endpoint(server, tmp_path, max_retries=0).complete(requests(1))


@pytest.mark.parametrize(
    "body",
    [
        error_body("This model's maximum context length is 20 tokens."),
        error_body("the request exceeds the available context size"),
        error_body("cut it", "context_length_exceeded"),
        error_body("not nice", "content_filter"),
    ],
)
def test_a_prompt_that_does_not_fit_is_one_refused_item(tmp_path, body):
    with endpoint_server(lambda b: Failure(400, body) if "1" in prompt_of(b) else echo(b)) as server:
        model = endpoint(server, tmp_path)
        replies = model.complete(requests(3))
    assert [reply.is_readable for reply in replies] == [True, False, True]
    assert replies[1].problem.startswith("refused") and model.usage.num_refused == 1


def test_a_cut_or_filtered_reply_is_counted_and_not_read(tmp_path):
    reasons = {"question 0": "length", "question 1": "content_filter", "question 2": "stop"}
    with endpoint_server(lambda body: chat_reply("x", reasons[prompt_of(body)])) as server:
        model = endpoint(server, tmp_path)
        replies = model.complete(requests(3))
        assert [reply.problem for reply in replies] == ["length", "content_filter", ""]
        assert model.usage.num_unreadable == 2
        cut_counts = endpoint(server, tmp_path).complete(requests(3, may_be_cut=True))
    assert [reply.is_readable for reply in cut_counts] == [True, False, True] and len(server.bodies) == 3


WRONG_TYPES = [chat_reply({"a": 1}), chat_reply(["a", 1]), chat_reply("a", finish_reason=7)]


@pytest.mark.parametrize("rubbish", ["<html>It works!</html>", {"hello": 1}, {"choices": []}, *WRONG_TYPES])
def test_rubbish_is_asked_for_again_and_then_ends_the_run(tmp_path, rubbish):
    failure = Failure(200, rubbish)
    with endpoint_server(echo, [failure, failure]) as server:
        assert texts(endpoint(server, tmp_path).complete(requests(1))) == ["re question 0"]
        server.failures = [failure] * 3
        with pytest.raises(UserError, match="answers what is no completion.*ends in /v1"):
            endpoint(server, tmp_path).complete(requests(2)[1:])
    assert len(server.bodies) == 6


@pytest.mark.parametrize("reply", [SECRET, [SECRET], {"choices": SECRET}, chat_reply([SECRET])])
def test_a_reply_that_is_the_key_is_in_no_error(tmp_path, reply):
    with endpoint_server(lambda body: reply) as server, pytest.raises(UserError, match="no completion") as caught:
        endpoint(server, tmp_path).complete(requests(1))
    assert SECRET[:12] not in str(caught.value)


def test_a_reply_in_parts_of_text_is_read(tmp_path):
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    with endpoint_server(lambda body: chat_reply(parts)) as server:
        assert texts(endpoint(server, tmp_path).complete(requests(1))) == ["a b"]


def test_lone_surrogates_of_replies_and_prompts_are_replaced(tmp_path):
    with endpoint_server(lambda body: chat_reply("a\ud800b\ud83d\ude00")) as server:
        model = endpoint(server, tmp_path)
        (reply,) = model.complete([CompletionRequest("\udc00?", max_tokens=5)])
    assert reply.text == "a\ufffdb\U0001f600" and prompt_of(server.bodies[0]) == "\ufffd?"


def test_the_budget_stops_before_the_request_that_would_pass_it(tmp_path, caplog):
    with endpoint_server(echo) as server:  # 10 tokens a reply, 3 + 5 estimated
        model = endpoint(server, tmp_path, at_once=1, budget=28)
        replies = model.complete(requests(5))
        assert texts(replies) == ["re question 0", "re question 1", "re question 2", None, None]
        assert len(server.bodies) == 3 and model.usage.num_over_budget == 2 and "budget of 28" in caplog.text
        assert texts(endpoint(server, tmp_path, budget=28).complete(requests(5)))[4] == "re question 4"
        with_many_at_once = endpoint(server, tmp_path / "other", at_once=5, budget=17)
        assert texts(with_many_at_once.complete(requests(5))).count(None) in (3, 4)
    assert with_many_at_once.usage.num_asked in (1, 2)


def test_log_probabilities_are_asked_for_and_their_lack_is_said(tmp_path, caplog):
    def reply(body):
        if "logprobs" in body:
            return Failure(400, error_body("logprobs is not supported with this model"))
        return chat_reply("x")

    with endpoint_server(reply) as server:
        model = endpoint(server, tmp_path, at_once=3)
        replies = model.complete(requests(4))
    assert texts(replies) == ["x"] * 4 and replies[0].token_log_probs == ()
    assert model.describe()["num_without_log_probs"] == 4 and "gives no log-probabilities" in caplog.text


def test_a_base_model_continues_the_prompt_itself(tmp_path):
    with endpoint_server(lambda body: text_reply(" two", [(" two", -0.25)])) as server:
        model = endpoint(server, tmp_path, api="completions")
        (reply,) = model.complete(requests(1, stop=("\n",), top_p=0.96))
    assert (reply.text, reply.tokens, reply.token_log_probs) == (" two", (" two",), (-0.25,))
    (body,) = server.bodies
    assert body == {
        **{"model": "m", "prompt": "question 0", "max_tokens": 5, "temperature": 0.0, "top_p": 0.96},
        **{"stop": ["\n"], "logprobs": 1},
    }


@pytest.mark.parametrize("usage", [(), (-(10**9), 3)])
def test_tokens_are_estimated_where_the_server_counts_none(tmp_path, usage):
    with endpoint_server(lambda body: chat_reply("four letters", usage=usage)) as server:
        model = endpoint(server, tmp_path)
        model.complete(requests(1))
    assert model.usage.num_estimated == 1 and (model.usage.prompt_tokens, model.usage.completion_tokens) == (3, 3)


def test_the_report_names_host_and_model_and_no_password(tmp_path):
    with endpoint_server(echo) as server:
        url = server.url.replace("http://", "http://user:pass@")
        model = ChatEndpoint(EndpointConfig("m", url), tmp_path / "a.jsonl")
        model.complete(requests(1))
    said = json.dumps(model.describe())
    assert "127.0.0.1" in said and "1700000000" in said and "pass@" not in said and SECRET not in said


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"model": "", "url": "http://x/v1"}, "has no model"),
        ({"model": "m"}, "endpoint is ''"),
        ({"model": "m", "url": "x:1"}, "endpoint is 'x:1'"),
        ({"model": "m", "url": "http://x", "api": "embeddings"}, "api is 'embeddings'"),
        ({"model": "m", "url": "http://x", "at_once": 0}, "at_once is 0"),
        ({"model": "m", "url": "http://x", "budget": 0}, "budget is 0"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        EndpointConfig(**settings)


def test_the_url_comes_from_the_environment_by_default(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "https://example.org/v1")
    assert EndpointConfig("m").host == "example.org"


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "openai", None)
    model = ChatEndpoint(EndpointConfig("m", "http://127.0.0.1:9/v1"), tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"lionjax\[llm\]"):
        model.complete(requests(1))
