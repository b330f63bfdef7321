# SPDX-License-Identifier: Apache-2.0
"""lmms-eval and VLMEvalKit ask a model through stand-ins for both; the model is a scripted one, or a tiny LION."""

import importlib.metadata
import tomllib
import types

import harness_stubs
import pytest
from harness_stubs import Scripted
from paths import ROOT
from PIL import Image

import lionjax
from lionjax.core.types import UserError
from lionjax.inference.sampling import GenerationConfig
from lionjax.pipelines.serving import vlmevalkit
from lionjax.pipelines.serving.harness import (
    HarnessModel,
    Request,
    cut_at,
    join_images,
    parse_batch_size,
    with_settings,
)

SETTINGS = {"max_new_tokens": 8, "temperature": 0, "until": ["\n\n"], "image_aspect_ratio": "original"}
# Three questions: a wide picture, none, and two pictures of different sizes.
DOCS = [
    {"text": "what", "images": [Image.new("RGB", (40, 20))]},
    {"text": "why", "images": []},
    {"text": "how many", "images": [Image.new("RGB", (10, 20)), Image.new("RGB", (30, 10))]},
]
EXPECTED = ["what 40.", "why 1.", "how many 78."]  # 10 + a gap of 8 + 60


def load_classes(monkeypatch, model):
    """(chat class, simple class) that the entry point of pyproject.toml leads to."""
    harness_stubs.install_lmms_eval(monkeypatch)
    monkeypatch.setattr(lionjax, "load", lambda folder, **options: model, raising=False)
    group = "lmms_eval.models"
    value = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group]["lionjax"]
    manifest = importlib.metadata.EntryPoint("lionjax", value, group).load()()
    assert manifest.model_id == "lionjax"

    def load(path):
        module, _, name = path.rpartition(".")
        return vars(importlib.import_module(module))[name]

    return load(manifest.chat_class_path), load(manifest.simple_class_path)


def request(*arguments):
    return types.SimpleNamespace(args=arguments)


def messages_of(doc):
    parts = [{"type": "image", "url": image} for image in doc["images"]]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": doc["text"]}]}]


def chat_requests(settings):
    return [request(doc["text"], messages_of, settings[k], k, "toy", "test") for k, doc in enumerate(DOCS)]


def simple_requests(settings):
    return [
        request(doc["text"], settings[k], lambda doc: doc["images"], k, "toy", "test") for k, doc in enumerate(DOCS)
    ]


@pytest.mark.parametrize("is_chat", [True, False])
def test_both_classes_answer_in_order_with_a_text_as_batch_size(monkeypatch, is_chat):
    model = Scripted()
    chat, simple = load_classes(monkeypatch, model)
    assert (chat.is_simple, simple.is_simple) == (False, True)
    made = (chat if is_chat else simple)(pretrained="runs/mine", batch_size="2", max_batch_size=None, device=None)
    made.task_dict = {"toy": {"test": DOCS}}
    settings = [dict(SETTINGS), {**SETTINGS, "max_new_tokens": 3}, dict(SETTINGS)]
    requests = (chat_requests if is_chat else simple_requests)(settings)
    assert made.generate_until(requests) == EXPECTED
    assert [(call[0], call[1].max_new_tokens) for call in model.calls] == [(["what", "how many"], 8), (["why"], 3)]
    assert settings[0] == SETTINGS, "the dict that requests share was changed"
    made.generate_until(requests[:1] * 5)
    assert [len(call[0]) for call in model.calls[2:]] == [2, 2, 1]


def test_unknown_arguments_and_a_missing_folder_are_one_sentence(monkeypatch):
    _, simple = load_classes(monkeypatch, Scripted())
    with pytest.raises(UserError, match="pretrained=DIR"):
        simple()
    with pytest.raises(UserError, match="unexpected keyword argument 'tag'"):
        simple(pretrained="runs/mine", tag=True)
    with pytest.raises(UserError, match="batch_size is 'auto'; give an integer"):
        simple(pretrained="runs/mine", batch_size="auto")


def test_earlier_messages_are_history_and_the_systems_stands_first(monkeypatch):
    model = Scripted()
    chat, _ = load_classes(monkeypatch, model)
    made = chat(pretrained="x")
    talk = [("system", "be short"), ("user", "who"), ("assistant", "ann"), ("user", "where")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in talk]
    made.task_dict = {"toy": {"test": [messages, messages[:3], messages]}}
    assert made.generate_until([request("", lambda doc: doc, {}, 0, "toy", "test")]) == ["where 1."]
    assert model.calls[0][3]["history"] == [[("be short\nwho", "ann")]]
    with pytest.raises(UserError, match="does not end with a question"):
        made.generate_until([request("", lambda doc: doc, {}, 1, "toy", "test")])
    video = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]
    with pytest.raises(UserError, match="a request has videos"):
        made.generate_until([request("", lambda doc: video, {}, 0, "toy", "test")])


def test_continuations_have_their_mean_loss_and_whether_they_are_the_greedy_answer(monkeypatch):
    _, simple = load_classes(monkeypatch, Scripted(reply=lambda prompt, image: "yes"))
    made = simple(pretrained="x", batch_size="1")
    made.task_dict = {"toy": {"test": DOCS}}
    asked = [request("what", text, lambda doc: doc["images"], 0, "toy", "test") for text in (" yes", " never")]
    assert made.loglikelihood(asked) == [(3.0, True), (5.0, False)]


def test_rounds_are_asked_until_the_task_ends_them(monkeypatch):
    _, simple = load_classes(monkeypatch, Scripted())
    made = simple(pretrained="x")
    made.task_dict = {"toy": {"test": DOCS}}

    def next_round(doc, previous_output, round_idx, previous_round_info):
        return None, f"round {round_idx}", round_idx == 3, previous_output, round_idx

    rounds = request("what", {}, lambda doc: doc["images"], next_round, 0, "toy", "test")
    assert made.generate_until_multi_round([rounds]) == [["what 40.", "round 1 40.", "round 2 40."]]


def test_an_answer_ends_at_the_first_stop_and_plain_ones_lose_their_dot(monkeypatch):
    assert cut_at("a cat\n\nUSER: b", ["\n\n", "USER:"]) == "a cat"
    assert cut_at("a cat ASSISTANT: b", "ASSISTANT:") == "a cat " and cut_at("a\n\nb", None) == "a\n\nb"
    replies = {"one": "Yes.", "two": "It is red.", "three": "cat\n\n."}
    monkeypatch.setattr(lionjax, "load", lambda *_, **__: Scripted(reply=lambda p, _: replies[p]), raising=False)
    requests = [Request(text, settings={"until": ["\n\n"]}) for text in replies]
    assert HarnessModel("x", plain=True).answer(requests) == ["Yes", "It is red.", "cat"]
    assert HarnessModel("x").answer(requests)[0] == "Yes."


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {}),
        ({"temperature": 0, "do_sample": True}, {}),
        ({"temperature": 0.2, "top_p": 0.9}, {"do_sample": True, "temperature": 0.2, "top_p": 0.9}),
        ({"temperature": 0.2, "do_sample": False, "top_p": None}, {}),
        ({"num_beams": 3, "max_new_tokens": 5, "top_p": 0.5}, {"num_beams": 3, "max_new_tokens": 5}),
    ],
)
def test_settings_of_a_request_replace_those_of_the_model(settings, expected):
    config = GenerationConfig(max_new_tokens=30)
    changed = with_settings(config, settings)
    assert {key: value for key, value in vars(changed).items() if value != vars(config)[key]} == expected


def test_several_images_stand_side_by_side_or_are_refused(monkeypatch):
    left, right = Image.new("RGB", (4, 8), "red"), Image.new("RGB", (4, 4), "blue")
    joined = join_images([left, right])
    assert joined.size == (4 + 8 + 8, 8) and joined.getpixel((1, 7)) == (255, 0, 0)
    assert joined.getpixel((6, 2)) == (255, 255, 255) and joined.getpixel((19, 7)) == (0, 0, 255)
    monkeypatch.setattr(lionjax, "load", lambda *_, **__: Scripted(), raising=False)
    with pytest.raises(UserError, match="a request has 2 images, but this model reads one"):
        HarnessModel("x", several_images="refuse").answer([Request("a", [left, right])])
    with pytest.raises(UserError, match="choose one of join, refuse"):
        HarnessModel("x", several_images="stack")
    with pytest.raises(UserError, match="a request has a bytes where an image stands"):
        HarnessModel("x").answer([Request("a", [b"x"])])


def test_a_language_model_alone_answers_texts_and_refuses_images(monkeypatch):
    monkeypatch.setattr(lionjax, "load", lambda *_, **__: Scripted(reads_images=False), raising=False)
    model = HarnessModel("x", parse_batch_size("3"))
    assert model.answer([Request("a"), Request("b")]) == ["a", "b"]
    with pytest.raises(UserError, match="this model reads no images"):
        model.answer([Request("a", [Image.new("RGB", (2, 2))])])


def test_vlmevalkits_own_program_runs_with_our_model(monkeypatch, tmp_path, capsys):
    script = harness_stubs.install_vlmevalkit(monkeypatch, tmp_path)
    model = Scripted()
    monkeypatch.setattr(lionjax, "load", lambda *_, **__: model, raising=False)
    Image.new("RGB", (31, 9)).save(tmp_path / "a.png")
    arguments = [str(tmp_path), "--max-new-tokens", "7", "--data", "MMBench_DEV_EN", str(tmp_path / "a.png")]
    assert vlmevalkit.main(arguments) == 0
    assert capsys.readouterr().out == "one\ntwo 31. ['--model', 'lionjax', '--data', 'MMBench_DEV_EN']\n"
    assert model.calls[0][1].max_new_tokens == 7
    script.unlink()
    assert vlmevalkit.main(arguments) == 2 and "give VLMEvalKit's run.py with --run-script" in capsys.readouterr().err
    with pytest.raises(UserError, match="a message has video"):
        vlmevalkit.message_request([{"type": "video", "value": "a.mp4"}], {})


def test_without_vlmevalkit_or_a_folder_one_sentence_says_what_to_do(capsys, tmp_path):
    assert vlmevalkit.main([str(tmp_path)]) == 2
    assert "VLMEvalKit is not installed" in capsys.readouterr().err
    assert vlmevalkit.main([str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.slow
def test_answers_of_a_run_are_those_of_its_own_answer_method(finished_run):
    model, images = lionjax.load(finished_run), [Image.new("RGB", (56, 56), color) for color in ("red", "blue", "lime")]
    prompts = ["What color is it?", "Where is the star?", "Is there a ring?"]
    config = with_settings(model.generation_config("image_level"), {"max_new_tokens": 6})
    expected = [answer.text for answer in model.answer(images, prompts, generation_config=config)]
    requests = [Request(*pair, settings={"max_new_tokens": 6}) for pair in zip(prompts, [[i] for i in images])]
    assert HarnessModel(finished_run, batch_size="3").answer(requests) == expected
