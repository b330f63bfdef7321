# SPDX-License-Identifier: Apache-2.0
"""`lionjax tools` and `lionjax agent` from the command line, against an endpoint on this machine."""

import json
from types import SimpleNamespace

import pytest
from endpoint_server import TOO_MANY, chat_reply, endpoint_server
from paths import ROOT
from scripted_tools import ScriptedModel, picture

pytest.importorskip("openai")

from lionjax.cli import entry
from lionjax.pipelines.tools import experts
from lionjax.pipelines.tools.experts import Experts

SECRET = "sk-never-to-be-written"


@pytest.fixture(autouse=True)
def scene(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.chdir(tmp_path)
    picture().save("scene.png")
    found = Experts(ScriptedModel(), names={"model": "the model of tiny"})
    monkeypatch.setattr(experts, "load_experts", lambda folders: found if folders else Experts())


def tool_reply(*calls):
    reply = chat_reply(None, "tool_calls")
    reply["choices"][0]["message"]["tool_calls"] = [
        {"id": f"call_{k}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for k, (name, arguments) in enumerate(calls)
    ]
    return reply


def controller(body):
    """Plans two tools: detection, then a crop at the box that it found."""
    results = [one for one in body["messages"] if one["role"] == "tool"]
    image = body["messages"][1]["content"].rpartition("Image: ")[2]
    if not results:
        return tool_reply(("detect", {"image": image, "words": "a red square"}))
    if len(results) == 1:
        box = json.loads(results[0]["content"])[0]["box"]
        return tool_reply(("crop", {"image": image, "box": box}))
    return chat_reply(f"It is in {json.loads(results[1]['content'])['file']}.")


def run(*arguments):
    return entry.main(list(arguments))


def test_tools_are_listed_with_what_they_cost(capsys):
    assert run("tools", "tiny", "--image", "scene.png") == 0
    out = capsys.readouterr().out
    assert "detect(image, words): Find things and give their boxes, by the model of tiny" in out
    assert "crop(image, box): Crop an image to a box. Cost: no model." in out and out.startswith("image/")
    assert run("tools", "--json") == 0
    assert [tool["function"]["name"] for tool in json.loads(capsys.readouterr().out)] == (
        ["images", "crop", "mark", "edges"]
    )


def test_a_talk_with_two_tools_goes_over_the_wire_and_is_not_paid_for_twice(tmp_path, capsys):
    with endpoint_server(controller, [TOO_MANY]) as server:
        command = ["agent", "tiny", "--image", "scene.png", "--prompt", "Where is it?", "--model", "m"]
        command += ["--endpoint", server.url]
        assert run(*command) == 0
        first = capsys.readouterr().out
        count = len(server.bodies)
        assert run(*command) == 0 and capsys.readouterr().out == first
        assert count == 4 and len(server.bodies) == count  # one answer of 429, three replies, and a free second run
    assert first.startswith("> Where is it?\n  detect {") and "_crop_" in first.splitlines()[-1]
    report = json.loads((tmp_path / "work/report.json").read_text())
    assert report["language_model"]["model"] == "m" and report["language_model"]["num_from_journal"] == 3
    assert [step["tool"] for step in report["turns"][0]["steps"]] == ["detect", "crop"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 4 and not any(SECRET.encode() in path.read_bytes() for path in files)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["agent", "--prompt", "x"], "there is no language model"),
        (["agent", "--prompt", "x", "--model", "m", "--lm", "d"], "both --lm and an endpoint"),
        (["agent", "--prompt", "x", "--model", "m", "--rounds", "0"], "max_rounds"),
        (["agent", "--prompt", "x", "--model", "m", "--style", "mm-react", "--show"], "--show"),
        (["agent", "--prompt", "x", " ", "--model", "m"], "--prompt is empty"),
        (["tools", "--port", "80"], "add --mcp"),
        (["tools", "--image", "none.png"], "none.png"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, capsys):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_talk_that_ends_early_is_reported_and_exits_with_2(tmp_path, capsys):
    with endpoint_server(lambda body: tool_reply(("images", {}))) as server:
        command = ["agent", "--prompt", "x", "--model", "m", "--endpoint", server.url, "--rounds", "2"]
        assert run(*command) == 2
    assert "no answer after 2 rounds" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "work/report.json").read_text())["turns"][0]["steps"]) == 2


def test_a_judge_and_a_data_engine_are_paid_for_once_and_keep_no_key(tmp_path, capsys):
    folder = ROOT / "tests/data/benchmarks/judged"
    context = ["--context", str(folder / "context.jsonl"), "--references", str(folder / "answers_gpt4.jsonl")]
    judging = ["judge", "llava_bench", str(folder / "questions.jsonl"), *context]
    judging += ["--answers", str(folder / "answers_model.jsonl")]
    making = ["synthesize", "detail", str(folder / "caps_boxes.jsonl")]
    with endpoint_server(lambda body: chat_reply(f"9 7\nThe key is {SECRET}."), [TOO_MANY]) as server:
        for name, command in (("judged", judging), ("made", making)):
            command = [*command, "--workdir", name, "--model", "m", "--endpoint", server.url]
            assert run(*command) == 0
            first, count = capsys.readouterr().out, len(server.bodies)
            assert run(*command) == 0 and capsys.readouterr().out == first and len(server.bodies) == count
    assert first.startswith("2 of 2 items are in made")
    report = json.loads((tmp_path / "judged/report.json").read_text())
    assert report["judge"]["model"] == "m" and report["table"][0]["ratio"] == pytest.approx(100 * 7 / 9)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 6 and not any(SECRET.encode() in path.read_bytes() for path in files)


def test_models_are_asked_once_before_serving():
    asked = []
    record = SimpleNamespace(tag=asked.append, detect=lambda *given: asked.append(given))
    experts.warm_up(Experts(ScriptedModel(), record, record))
    assert len(asked) == 2
