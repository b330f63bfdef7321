# SPDX-License-Identifier: Apache-2.0
"""Instruction data: LLaVA's kinds, Shikra's chains, MiniGPT-4's curation, PromptCap's and grounded captions."""

import gzip
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT
from PIL import Image
from scripted_tools import ScriptedLanguageModel, ScriptedTagger

from lionjax.cli import entry
from lionjax.cli import synthesize as synthesize_command
from lionjax.core.errors import UserError
from lionjax.data.datasets.conversations import Conversations
from lionjax.data.datasets.shikra import ShikraJsonl
from lionjax.pipelines.completion import Completion
from lionjax.pipelines.image_contexts import ImageContext, format_context, read_contexts
from lionjax.pipelines.instructions import (
    curation,
    few_shot,
    generation,
    grounded_captions,
    grounded_chains,
    llava_kinds,
)
from lionjax.pipelines.instructions.records import Outcome, RefusedError

FILES = ROOT / "tests/data/benchmarks/judged"
CONVERSATION = (FILES / "generated_conversation.txt").read_text()
CHAIN = (
    "Question:\nIs [the square](0) left of the disc?\n===\nThought:\n[The square](0) ends before [the disc](1), and "
    "[both](0, 1) are shapes.\n===\nAnswer:\nyes"
)


@pytest.fixture
def contexts():
    return read_contexts(FILES / "caps_boxes.jsonl")


@pytest.fixture
def images(tmp_path, contexts):
    for context in contexts:
        Image.new("RGB", (96, 72), "red").save(tmp_path / context.image)
    return generation.Images(tmp_path)


def read_back(path, folder, source=Conversations):
    """The annotations of the task `conversation` that training reads, without problems."""
    rows = source(str(path), image_dir=str(folder)).open("train", 10**6).annotations["conversation"]
    assert [row.problem for row in rows if row.problem] == []
    return rows


def run(kind, contexts, model, folder, images=generation.Images(None), review=None, **options):  # noqa: B008
    return generation.synthesize(
        generation.GenerationSettings(kind, **options), contexts, model, folder / "out", images, review=review
    )


def test_the_messages_of_llavas_kinds(contexts):
    (request,) = llava_kinds.build_requests("reasoning", contexts[:1])
    roles = [message["role"] for message in request.messages]
    assert roles == ["system", "user", "assistant", "user"]
    assert request.messages[-1]["content"] == (
        "a red square and a blue disc\na square to the left of a disc\ntwo shapes on a pale ground\n"
        "red square, blue disc\nA red block beside a blue ball.\n\n"
        "square: [0.083, 0.139, 0.333, 0.472]\ndisc: [0.625, 0.5, 0.917, 0.889]"
    )
    (request,) = llava_kinds.build_requests("conversation", contexts[:1])
    assert "[0." not in request.messages[-1]["content"]


def test_numbers_of_boxes_have_no_trailing_zeros():
    context = ImageContext("1", "1.jpg", ("a",), (("dog", (0.53, 0.1004, 1.0, 0.12345)),))
    assert format_context(context) == "a\n\ndog: [0.53, 0.1, 1.0, 0.123]"


def test_our_examples_pass_our_own_checks():
    for kind, shots in ((kind, one.few_shot) for kind, one in llava_kinds.KINDS.items()):
        for _, reply in shots.examples:
            outcome = llava_kinds.to_outcome(kind, ImageContext("1", "1.jpg", ("a",)), Completion(reply))
            assert outcome.record is not None, outcome.reason
    objects = tuple(("thing", (0.1, 0.1, 0.2, 0.2)) for _ in range(4))
    for _, reply in few_shot.CHAIN.examples:
        grounded_chains.to_shikra_row(ImageContext("1", "1.jpg", ("a",), objects), reply, (10, 10))


def test_examples_of_a_folder_replace_ours(tmp_path, contexts):
    for name, text in {
        "system_message": "S",
        "000_caps": "c0",
        "000_conv": "r0",
        "001_caps": "c1",
        "001_conv": "r1",
    }.items():
        (tmp_path / f"{name}.txt").write_text(text + "\n")
    (request,) = llava_kinds.build_requests("detail", contexts[:1], few_shot.read_few_shot(tmp_path))
    assert [message["content"] for message in request.messages[:-1]] == ["S", "c0", "r0", "c1", "r1"]
    (tmp_path / "001_conv.txt").unlink()
    with pytest.raises(UserError, match="001_conv.txt"):
        few_shot.read_few_shot(tmp_path)


def test_a_conversation_is_read_in_pairs_that_may_have_empty_lines():
    pairs = llava_kinds.parse_conversation(CONVERSATION)
    assert [question for question, _ in pairs] == ["What color is the square?", "Where is the disc?"]
    assert pairs[1][1] == "To the right of the square.\n\nA little lower, too."


@pytest.mark.parametrize(
    "text, reason",
    [
        ("What?\n===\nAnswer:\nRed.", "wrong header"),
        ("Question:\nA?\n===\nQuestion:\nB?", "wrong header"),
        (CONVERSATION + "\n===\n", "wrong number of blocks"),
        ("Question:\nA?\n===\nAnswer:\n ", "empty text"),
        ("Question:\nA?\n===\nAnswer:\nIt lies at [0.1, 0.2, 0.3, 0.4].", "names its source"),
        ("Question:\nA?\n===\nAnswer:\nThe caption says so.", "names its source"),
        ("Question:\nA?\n===\nAnswer:\nI'm sorry, I cannot see it.", "the answer refuses"),
        ("Question:\n<image> A?\n===\nAnswer:\nRed.", "<image> in a text"),
        ("", "wrong number of blocks"),
        ("x" * 30_000, "a reply of more than"),
    ],
)
def test_replies_out_of_form_are_refused_by_name(text, reason):
    outcome = llava_kinds.to_outcome("conversation", ImageContext("1", "1.jpg", ("a",)), Completion(text))
    assert outcome.record is None and outcome.reason.startswith(reason)


@pytest.mark.parametrize("kind, count", [("conversation", 2), ("detail", 2), ("reasoning", 1)])
def test_llavas_kinds_train(tmp_path, contexts, images, kind, count):
    good = {
        "conversation": CONVERSATION,
        "detail": "A red square lies left.",
        "reasoning": CONVERSATION.split("\n===\nQ")[0],
    }
    bad = CONVERSATION if kind == "reasoning" else good[kind]
    model = ScriptedLanguageModel(good[kind], *[bad] * (len(contexts) - 1))
    report = run(kind, contexts[:2], model, tmp_path)
    assert report["num_records"] == count and report["language_model"] == {"model": "scripted"}
    rows = read_back(tmp_path / "out/instructions.json", tmp_path)
    assert len(rows) == count and all("<image>" not in row.answers[0] for row in rows)
    refused = [json.loads(line) for line in (tmp_path / "out/refused.jsonl").read_text().splitlines()]
    assert len(refused) == len(contexts[:2]) - count and all(row["reason"] and row["reply"] for row in refused)


def test_missing_cut_and_refused_replies_are_reasons(tmp_path, contexts):
    model = ScriptedLanguageModel(None, Completion("half", problem="length"))
    report = run("detail", contexts[:2], model, tmp_path)
    assert report["refused"] == {"not asked": 1, "unreadable reply": 1} and report["num_records"] == 0


def test_places_of_the_image_and_questions_are_drawn_by_seed(contexts):
    found = [
        llava_kinds.to_outcome("detail", ImageContext(str(k), "1.jpg", ("a",)), Completion("Red."), seed).record
        for seed in (0, 0, 1)
        for k in range(30)
    ]
    assert found[:30] == found[30:60] != found[60:]
    firsts = [record["conversations"][0]["value"] for record in found[:30]]
    assert {text.startswith("<image>\n") for text in firsts} == {True, False}
    assert len({text.replace("<image>", "").strip() for text in firsts}) > 3


def test_chains_become_shikras_rows_and_llavas_records(tmp_path, contexts, images):
    report = run("chain", contexts[:1], ScriptedLanguageModel(CHAIN), tmp_path, images)
    assert report["num_records"] == 1
    (row,) = [json.loads(line) for line in (tmp_path / "out/shikra.jsonl").read_text().splitlines()]
    assert row["boxes"][0] == [7.97, 10.01, 31.97, 33.98] and row["question_boxes_seq"] == [[0]]
    assert row["answer_boxes_seq"] == [[0], [1], [0, 1]] and row["answer"] == "yes"
    assert row["cot_with_ans"].endswith("are shapes. So the answer is yes.")
    for text, groups in (("question", "question_boxes_seq"), ("cot_with_ans", "answer_boxes_seq")):
        assert row[text].count("<ph_ed>") == len(row[groups])
    (shikra,) = read_back(tmp_path / "out/shikra.jsonl", tmp_path, ShikraJsonl)
    assert len(shikra.question_boxes) == 1 and len(shikra.boxes) == 4
    (record,) = read_back(tmp_path / "out/instructions.json", tmp_path)
    assert record.answers[0].count("[0.") == 4 and "the square[0.083," in record.question
    # boxes of a 96 x 72 image in the padded square: y of 0.139 is (0.139 * 72 + 12) / 96
    assert "[0.083,0.229,0.333,0.479]" in record.question


@pytest.mark.parametrize(
    "version, has, lacks", [("a", "The answer is yes.", "square"), ("c", "both are", "[0."), ("bc", "[0.", "](")]
)
def test_versions_of_chains(contexts, version, has, lacks):
    outcome, _ = grounded_chains.to_outcome(contexts[0], Completion(CHAIN), (96, 72), version)
    answer = outcome.record["conversations"][1]["value"]
    assert has in answer and lacks not in answer


@pytest.mark.parametrize(
    "text, reason",
    [
        (CHAIN.replace("(1)", "(2)"), "no such object: 2 of 2"),
        (CHAIN.replace("[The square](0) ends", "<ph_st>a<ph_ed> ends"), "Shikra's marks"),
        (CHAIN.replace("Thought", "Thinking"), "wrong header"),
        (CHAIN + "\n===\n" + CHAIN, "wrong number of blocks"),
        ("Question:\nA?\n===\nThought:\nSo.\n===\nAnswer:\nyes", "no phrase"),
    ],
)
def test_chains_out_of_form_are_refused_by_name(contexts, text, reason):
    outcome, row = grounded_chains.to_outcome(contexts[0], Completion(text), (96, 72))
    assert row is None and outcome.reason.startswith(reason)


def long_text(count):
    return " ".join(f"word{k}" + "." * (k % 9 == 8) for k in range(count))


class Describer:
    """Gives a few words at a time, as a model that breaks off."""

    def __init__(self, words):
        self.words, self.asked = words, []

    def answer(self, images, prompts, history):
        self.asked.append((prompts[0], len(history[0])))
        return [SimpleNamespace(text=" ".join(["word"] * self.words))]


def test_a_description_is_continued_until_it_is_long_enough():
    model = Describer(30)
    text = curation.describe_image(model, None)
    assert len(text.split()) == 90 and [turns for _, turns in model.asked] == [0, 1, 2]
    assert [prompt for prompt, _ in model.asked[1:]] == ["Continue"] * 2
    assert len(curation.describe_image(Describer(1), None).split()) == curation.MAX_CONTINUATIONS + 1


def test_curation_writes_a_page_and_then_what_the_person_kept(tmp_path, contexts, images):
    drafts = [ImageContext(str(k), contexts[0].image, (f"draft {k}",)) for k in range(5)]
    replies = [long_text(90), long_text(95), long_text(10), "Same words. " * 50, long_text(99)]
    model = ScriptedLanguageModel(*replies)
    report = run("curation", drafts, model, tmp_path, images)
    assert report["num_records"] == 3 and report["refused"] == {"too short": 1, "a sentence stands twice": 1}
    assert model.requests[0].messages[0]["content"].endswith("draft 0")
    page = (tmp_path / "out/review.html").read_text()
    assert page.count("<fieldset") == 3 and page.count('value="keep"') == 3 and "data:image/jpeg" in page
    review = tmp_path / "review.jsonl"
    review.write_text('{"id": 0, "choice": "keep"}\n{"id": 1, "choice": "drop"}\n')
    report = run("curation", drafts, ScriptedLanguageModel(*replies), tmp_path, images, review)
    assert report["num_records"] == 1 and report["refused"]["dropped by the reviewer"] == 1
    kept = json.loads((tmp_path / "out/filter_cap.json").read_text())["annotations"]
    assert kept == [{"image_id": "0", "caption": long_text(90)}] and (tmp_path / "out/image/0.jpg").is_file()
    review.write_text('{"id": 0, "choice": "maybe"}\n')
    with pytest.raises(UserError, match="maybe"):
        run("curation", drafts, ScriptedLanguageModel(*replies), tmp_path, images, review)


def test_promptcaps_best_caption_trains(tmp_path, contexts, images):
    questions = tmp_path / "questions.jsonl"
    row = {"question": "What color is the square?", "captions": ["two shapes"], "answers": ["red"] * 3}
    rows = [row | {"question_id": k, "image": contexts[0].image} for k in (1, 2)]
    questions.write_text("".join(json.dumps(one) + "\n" for one in rows))
    made = [" A red square.", " A square.", " A red square.", " A blue thing."]  # two samples for each question
    answers = ["gray", "red", "square", "gray", "blue", "green"]  # of the caption and the two samples
    model = ScriptedLanguageModel(*made, *answers)
    setting = generation.GenerationSettings("promptcap", num_samples=2)
    items = generation.read_input(setting, questions, None)
    report = generation.synthesize_promptcap(setting, items, [], model, tmp_path / "out")
    assert report["num_records"] == 1 and report["refused"] == {"no caption answers it": 1}
    (found,) = read_back(tmp_path / "out/instructions.json", tmp_path)
    assert found.answers == ("A red square.",) and "What color is the square?" in found.question


class PhraseDetector:
    def __init__(self, *found):
        self.found = found

    def detect(self, images, caption):
        self.caption = caption
        phrases, scores, boxes = zip(*self.found)
        return [SimpleNamespace(phrases=phrases, scores=scores, boxes_K4=np.array(boxes, np.float32))]


def test_grounded_captions_have_boxes_behind_their_phrases(tmp_path, contexts, images):
    square, disc = (0.083, 0.139, 0.333, 0.472), (0.625, 0.5, 0.917, 0.889)
    detector = PhraseDetector(
        ("a red square", 0.9, square), ("red square", 0.8, square), ("a blue disc", 0.7, disc),
        ("ground", 0.9, (0, 0, 1, 1)),
        ("a blue disc", 0.2, (0, 0, 0.1, 0.1)),
    )  # fmt: skip
    setting = generation.GenerationSettings("grounded")
    report = generation.synthesize_grounded(setting, contexts[:1], detector, None, tmp_path / "out", images)
    assert report["num_records"] == 1 and report["language_model"] is None
    (record,) = json.loads((tmp_path / "out/instructions.json").read_text())
    assert record["conversations"][1]["value"] == (
        "a red square[0.083,0.229,0.333,0.479] and a blue disc[0.625,0.500,0.917,0.792]"
    )
    assert len(read_back(tmp_path / "out/instructions.json", tmp_path)) == 1


def test_images_without_captions_are_described_by_their_tags(contexts):
    image, empty = Image.new("RGB", (72, 72)), ImageContext("1", "1.jpg", ("",))
    detector = PhraseDetector(("square", 0.9, (0.1, 0.1, 0.2, 0.2)))
    outcome = grounded_captions.ground_caption(empty, image, detector, ScriptedTagger())
    assert outcome.record["conversations"][1]["value"] == "square[0.100,0.100,0.200,0.200], red"
    assert grounded_captions.ground_caption(empty, image, detector, None) == Outcome(
        "1", reason="no caption and no tag"
    )
    assert grounded_captions.place_phrases("squares", [("square", (0, 0, 1, 1))], (9, 9)) == "squares"  # no whole word


PIECES = st.sampled_from(
    ["Question:\n", "Answer:\n", "Thought:\n", "\n===\n", "[a](0)", "[b](9)", "<image>", "<ph_st>", "[0.1,"]
)
REPLIES = st.lists(PIECES | st.text(max_size=10), max_size=14).map("".join)


@settings(max_examples=100, deadline=None)
@given(text=REPLIES)
def test_hostile_replies_are_records_or_reasons(text):
    context = ImageContext("1", "1.jpg", ("a",), (("a", (0.1, 0.1, 0.2, 0.2)),))
    outcomes = [llava_kinds.to_outcome(kind, context, Completion(text)) for kind in llava_kinds.KINDS]
    outcomes += [
        grounded_chains.to_outcome(context, Completion(text), (9, 9))[0],
        curation.to_outcome(context, Completion(text), 1),
    ]
    for outcome in outcomes:
        assert (outcome.record is None) == bool(outcome.reason)
        assert outcome.record is None or json.dumps(outcome.record).count("<image>") == 1


@pytest.mark.parametrize(
    "row, message",
    [
        ({"id": 1}, "has no image"),
        ({"image": "a.jpg", "captions": "x", "instances": [{"category": "a", "bbox": [0, 0, 2, 1]}]}, "in 0..1"),
        ({"image": "a.jpg", "captions": [1]}, "captions that are no texts"),
        ({"image": "a.jpg", "captions": [" "]}, "no captions"),
        ({"image": "a.jpg", "captions": []}, "no captions"),
        ({"image": "a.jpg", "captions": ["x"], "id": [1]}, "has the id"),
        ({"image": "a.jpg", "captions": "x", "instances": [{"category": "a", "bbox": [1, 0, 0, 1]}]}, "end is before"),
        ({"image": "a.jpg", "captions": "x", "instances": [{"category": "a", "bbox": [True, 0, 1, 1]}]}, "in 0..1"),
        ({"image": "a.jpg", "captions": ["x"], "instances": [{"bbox": [0, 0, 1, 1]}]}, "category"),
    ],
)
def test_contexts_out_of_form_are_one_sentence(tmp_path, row, message):
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        read_contexts(tmp_path / "c.jsonl")


def test_cocos_files_are_contexts(tmp_path):
    captions, instances = tmp_path / "captions.json", tmp_path / "instances.json"
    images = [{"id": k, "file_name": f"{k:012d}.jpg", "width": 96, "height": 72} for k in (1, 2)]
    texts = [{"id": k, "image_id": 1, "caption": f" text {k}\n"} for k in range(2)]
    captions.write_text(json.dumps({"images": images, "annotations": texts}))
    boxes = [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [8, 10, 24, 24], "iscrowd": 0}]
    boxes += [boxes[0] | {"id": 2, "iscrowd": 1}, boxes[0] | {"id": 3, "image_id": 2}]
    boxes += [boxes[0] | {"id": 4, "bbox": [90, 60, 10, 20]}]
    instances.write_text(json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 7, "name": "dog"}]}))
    setting = generation.GenerationSettings("detail")
    (context,) = generation.read_input(setting, captions, None, instances)
    assert format_context(context) == (
        "text 0\ntext 1\n\ndog: [0.083, 0.139, 0.333, 0.472]\ndog: [0.938, 0.833, 1.0, 1.0]"
    )
    assert (context.id, context.image) == ("000000000001", "000000000001.jpg")
    (alone,) = generation.read_input(setting, captions)
    assert alone.instances == ()
    instances.write_text("[]")
    with pytest.raises(UserError, match="instances.json"):
        generation.read_input(setting, captions, None, instances)
    with pytest.raises(UserError, match="--instances"):
        generation.read_input(setting, FILES / "caps_boxes.jsonl", None, captions)


CONTEXT = {
    "id": None,
    "image": "a.jpg",
    "captions": ["x\u2028y"],
    "instances": [{"category": "a\nb", "bbox": [0, 0, 1, 1]}],
}


def test_files_of_contexts_may_have_a_byte_order_mark_and_be_gzipped(tmp_path):
    text = json.dumps(CONTEXT, ensure_ascii=False).encode("utf-8-sig")
    for name, content in (("a.jsonl", text), ("a.jsonl.gz", gzip.compress(text))):
        (tmp_path / name).write_bytes(content)
        (context,) = read_contexts(tmp_path / name)
        assert context.id == "a.jpg" and context.captions == ("x\u2028y",)
        assert context.instances[0][0] == "a b"  # a line break would begin another object


@pytest.mark.parametrize("content", [b"\xff\xfe{", b'{"image": "a.jpg", "capt', b"[" * 100_000])
def test_files_of_contexts_that_are_no_json_are_one_sentence(tmp_path, content):
    (tmp_path / "c.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="UTF-8|not valid JSON"):
        read_contexts(tmp_path / "c.jsonl")


def test_captions_are_needed_by_all_kinds_but_grounded(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"image": "a.jpg"}')
    grounded = generation.GenerationSettings("grounded")
    assert generation.read_input(grounded, tmp_path / "c.jsonl")[0].captions == ()
    with pytest.raises(UserError, match="no captions"):
        generation.read_input(generation.GenerationSettings("detail"), tmp_path / "c.jsonl")


def test_what_is_missing_is_said_before_a_language_model_is_asked(tmp_path, contexts):
    model = ScriptedLanguageModel(CHAIN)
    for kind, message in (("chain", "no image"), ("curation", "rows have the id")):
        with pytest.raises(UserError, match=message):
            run(kind, [contexts[0]] * 2, model, tmp_path, generation.Images(tmp_path))
    assert model.requests == []


def test_the_image_folder_is_not_left(tmp_path, contexts):
    outside = [ImageContext("1", "../secret.jpg", ("a",), contexts[0].instances)]
    (tmp_path / "in").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.jpg")
    with pytest.raises(UserError, match="leaves the data folder"):
        run("chain", outside, ScriptedLanguageModel(CHAIN), tmp_path, generation.Images(tmp_path / "in"))


def test_the_command_writes_counts_and_mistakes_are_one_sentence(tmp_path, capsys, monkeypatch):
    model = ScriptedLanguageModel(CONVERSATION, "nothing")
    monkeypatch.setattr(synthesize_command, "open_language_model", lambda *_: model)
    command = ["synthesize", "conversation", str(FILES / "caps_boxes.jsonl"), "--workdir", str(tmp_path / "out")]
    assert entry.main([*command, "--model", "m", "--limit", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1 of 2 items are in") and "refused 1: wrong number of blocks" in out
    assert entry.main([*command, "--dry-run"]) == 0
    assert "requests, 0 of them answered already" in capsys.readouterr().out
    for words, message in (
        (["synthesize", "poems", *command[2:]], "kind is 'poems'"),
        (["synthesize", "grounded", *command[2:]], "--detector"),
        ([*command, "--few-shot", str(tmp_path / "none")], "system_message.txt"),
        (["synthesize", "chain", *command[2:], "--chain-version", "z"], "version is 'z'"),
        ([*command, "--limit", "-1"], "above 0"),
        (["synthesize", "detail", *command[2:], "--model", "m"], "has the records of 'conversation'"),
        ([*command[:-1], str(FILES / "caps_boxes.jsonl")], "cannot be made"),
    ):
        assert entry.main(words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_refused_errors_are_no_user_errors():
    assert not issubclass(RefusedError, UserError)  # an item is left out, the run goes on
