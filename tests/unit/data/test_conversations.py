# SPDX-License-Identifier: Apache-2.0
"""Conversations of several rounds: LLaVA's JSON, ShareGPT and `messages`, from file to token ids."""

import gzip
import json

import numpy as np
import pytest
from chat_prompts import PICTURE, decoder_prompts
from PIL import Image

from lionjax.core.types import UserError
from lionjax.data import images, mixture
from lionjax.data.chat import PromptFormat
from lionjax.data.config import DataConfig
from lionjax.data.datasets import detect
from lionjax.data.datasets.array_record import ArrayRecordDataset
from lionjax.data.datasets.conversations import Conversations
from lionjax.data.datasets.source import open_split
from lionjax.data.prepare import array_record_writer
from lionjax.data.prompt import PromptBuilder
from lionjax.data.rounds import round_template
from lionjax.data.samples import examples

RNG = np.random.default_rng(0)
VICUNA = {
    "prompt_template": "Sys. USER: {image}\n{question} ASSISTANT:",
    "followup_template": "USER: {question} ASSISTANT:",
}


def talk(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def chat(*texts, roles=("user", "assistant")) -> list[dict]:
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        Image.new("RGB", (20 + number, 10), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


def opened(folder, *rows, name="talks.json", text=None, **fields):
    """The examples of a file with these rows, in its order."""
    path = folder / name
    path.write_text(json.dumps(list(rows)) if text is None else text, encoding="utf-8")
    dataset = detect.detect_source(str(path), str(folder)).open("train", 10**6)
    return [
        dataset.make_example("conversation", i, dataset.image_infos[dataset.record_index("conversation", i)], RNG, 0)
        for i in range(dataset.task_sizes["conversation"])
    ]


def only_problem(folder, row) -> str:
    with pytest.raises(UserError) as error:
        opened(folder, row)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("place", ["<image>\nWhat?", "What?\n<image>", "<image>What?", "  <image> What? "])
def test_the_image_of_one_round_stands_where_the_template_has_it(folder, place):
    (example,) = opened(folder, {"id": 1, "image": "0.png", "conversations": talk(place, "A square.")})
    assert (example.question, example.answer) == ("What?", "A square.")
    assert (example.history, example.image_marks, example.scene, example.kind) == ((), False, "0.png", "image")


def test_rounds_keep_their_order_and_the_round_of_the_image(folder):
    rows = [
        {"image": "0.png", "conversations": talk("<image>\nOne?", "1", "Two?", "2", "Three?", "3")},
        {"image": "1.png", "conversations": talk("Hello", "Hi", "And this <image> one?", "Red")},
    ]
    first, second = opened(folder, *rows)
    assert first.history == (("<image>\nOne?", "1"), ("Two?", "2")) and (first.question, first.answer) == (
        "Three?",
        "3",
    )
    assert second.history == (("Hello", "Hi"),) and second.question == "<image>\nAnd this  one?"
    assert first.image_marks and second.image_marks


def test_several_images_stay_where_the_text_has_them(folder):
    rows = [
        {"image": ["0.png", "1.png"], "conversations": talk("Compare <image> with <image>.", "Same")},
        {"images": ["0.png", "1.png"], "conversations": talk("Which?", "Both")},
        {"image": ["2.png", "0.png"], "conversations": talk("<image>a", "b", "<image>c", "d")},
    ]
    first, second, third = opened(folder, *rows)
    assert first.question == "Compare <image> with <image>." and first.more_records == (1,)
    assert second.question == "<image><image>\nWhich?" and second.more_records == (1,)
    assert third.history == (("<image>a", "b"),) and third.scene == "2.png" and third.more_records == (0,)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": talk("Hi", "Hello", "Bye", "Ciao")},
        {"messages": chat("Hi", "Hello", "Bye", "Ciao")},
        {"conversations": chat("Hi", "Hello", "Bye", "Ciao")},
        {"messages": talk("Hi", "Hello", "Bye", "Ciao"), "image": None, "images": []},
        {"conversations": [{"from": "gpt", "value": "Welcome"}, *talk("Hi", "Hello", "Bye", "Ciao", "no answer")]},
        {"messages": chat([{"type": "text", "text": "Hi"}], "Hello", "Bye", [{"type": "text", "text": "Ciao"}])},
    ],
)
def test_text_only_rows_of_any_spelling_are_one_conversation(folder, row):
    (example,) = opened(folder, row)
    assert (example.history, example.question, example.answer) == ((("Hi", "Hello"),), "Bye", "Ciao")
    assert example.kind == "text" and example.scene == "" and example.image_marks


def test_parts_of_messages_name_their_images(folder):
    picture = {"type": "image_url", "image_url": {"url": "file://1.png"}}
    content = [{"type": "text", "text": "Look:"}, {"type": "image", "image": "0.png"}, picture]
    system = {"role": "system", "content": "Be short."}
    (example,) = opened(folder, {"messages": [system, *chat(content, "Two.")]})
    assert example.question == "Be short.\nLook:\n<image>\n<image>" and example.scene == "0.png"
    (example,) = opened(folder, {"images": ["2.png"], "messages": chat([{"type": "image"}, "What?"], "It.")})
    assert example.question == "What?" and example.scene == "2.png"


LINE = json.dumps({"conversations": talk("a\u2028b\u0085c", "d\u2029e")}, ensure_ascii=False)


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_only_a_line_feed_ends_a_row_and_a_byte_order_mark_is_none(folder, start, end, name):
    examples = opened(folder, name=name, text=start + "\n".join([LINE, "", LINE]).replace("\n", end or "\n") + end)
    assert [e.question for e in examples] == ["a\u2028b\u0085c"] * 2 and examples[0].answer == "d\u2029e"


def test_gzipped_rows_are_read_under_any_name(folder):
    for name in ("t.jsonl.gz", "t.json.gz", "t.jsonl"):
        (folder / name).write_bytes(gzip.compress(f"\ufeff{LINE}\n{LINE}".encode()))
        source = detect.detect_source(str(folder / name))
        assert isinstance(source, Conversations) and source.name == "t"
        assert source.open("train", 10**6).task_sizes == {"conversation": 2}
    (folder / "u.jsonl.gz").write_bytes(gzip.compress(LINE.encode())[:-9])
    with pytest.raises(UserError, match="cannot be read as text"):
        detect.detect_source(str(folder / "u.jsonl.gz"))


@pytest.mark.parametrize("place", ["coco/train2017", "train2017", "images", ""])
@pytest.mark.parametrize("named", ["coco/train2017/7.png", "7.png"])
def test_images_are_found_in_the_folders_of_the_mixture(tmp_path, place, named):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(tmp_path / place / "7.png")
    (example,) = opened(tmp_path, {"image": named, "conversations": talk("<image>\nWhat?", "It.")})
    assert (tmp_path / example.scene).is_file()


def test_images_of_one_file_name_in_several_folders_stay_apart(tmp_path):
    for number, place in enumerate(
        ("gqa/images", "vg/VG_100K", "vg/VG_100K_2", "textvqa/train_images", "ocr_vqa/images")
    ):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (4 + number, 4)).save(tmp_path / place / "7.png")
    names = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*.png"))]
    examples = opened(tmp_path, *({"image": n, "conversations": talk("<image>\nWhat?", "It.")} for n in names))
    assert [e.scene for e in examples] == names and len(names) == 5


# ------------------------------------------------------------------ rows that cannot be used


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"img": "0.png", "conversations": talk("What?", "It.")}, "unknown key 'img'"),
        ({"imagee": "0", "conversations": talk("What?", "It.")}, "unknown key 'imagee'"),
        ({"picture": ["0.png"], "conversations": talk("What?", "It.")}, "unknown key 'picture'"),
        ({"conversations": talk("<image>\nWhat?", "It.")}, "1 <image> in its questions but no image"),
        (
            {"image": "0.png", "conversations": talk("<image>a", "b", "<image>c", "d")},
            "2 <image> in its questions but 1",
        ),
        ({"image": ["0.png", "1.png"], "conversations": talk("<image>a", "b")}, "1 <image> in its questions but 2 im"),
        ({"image": "0.png", "conversations": talk("What?", "See <image>")}, "in an answer"),
        ({"conversations": talk("What?")}, "no question with an answer"),
        ({"conversations": talk("What?", " ")}, "no text in round 1"),
        ({"conversations": [*talk("a", "b"), *talk("c"), *talk("d")]}, "message 4 is a second question"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "from 'robot'"),
        ({"conversations": "a"}, "no list of rounds"),
        ({"conversations": [{"from": "human", "value": 3}]}, "no text"),
        ({"image": 3, "conversations": talk("a", "b")}, "has the image '3'"),
        ({"image": "http://a.b/c.png", "conversations": talk("a", "b")}, "give the path of a file"),
        ({"messages": chat([{"type": "audio"}], "b")}, "part of type 'audio'"),
        ({"messages": chat("a", "b"), "conversations": talk("a", "b")}, "one of"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_its_place(folder, row, words):
    problem = only_problem(folder, row)
    assert words in problem and "talks.json, entry 1," in problem


def test_bad_rows_are_bad_records_and_the_others_are_used(folder, capsys):
    good = json.dumps({"conversations": talk("Hi", "Hello")})
    (folder / "t.jsonl").write_text(f'{good}\n{{"conversations"\n{good}\n')
    source = Conversations(str(folder / "t.jsonl"), str(folder))
    data = DataConfig(sources=(source,), on_bad_record="replace")
    assert len(list(examples(data, "conversation", "train"))) == 2
    with pytest.raises(UserError, match="line 2, is not valid JSON"):
        list(examples(DataConfig(sources=(source,)), "conversation", "train"))
    detect.inspect(source)
    out = " ".join(capsys.readouterr().out.split())
    assert "1 rows cannot be used; the first:" in out and "no picture" in out and "1 x 1" not in out


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"imge": "0.png", "conversations": talk("<image>\nWhat?", "It.")}, "unknown key 'imge'"),
        ({"conversations": talk("Hi", "Hello")[::-1]}, "no question with an answer"),
    ],
)
def test_inspecting_a_file_without_a_usable_row_raises_an_error_with_the_first_reason(folder, row, words):
    (folder / "t.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match=f"t has no row that can be used; the first: .*{words}"):
        detect.inspect(detect.detect_source(str(folder / "t.json")))


def test_a_file_without_rows_is_named_as_such(folder):
    (folder / "t.json").write_text("[]")
    with pytest.raises(UserError, match="has no row with keys; give a list of JSON objects"):
        detect.detect_source(str(folder / "t.json"))


def test_all_rows_of_an_image_are_in_one_split(folder):
    rows = [{"image": f"{i % 40}.png", "conversations": talk(f"<image>\nWhat {i}?", "It.")} for i in range(120)]
    (folder / "t.json").write_text(json.dumps(rows))
    source = Conversations(str(folder / "t.json"), str(folder), heldout_fraction=0.2)
    names = [{info.name for info in source.open(split, 1).image_infos} for split in ("train", "validation", "heldout")]
    assert not names[0] & names[2] and not names[1] & names[2] and sum(map(len, names)) == 40 and all(names)


@pytest.mark.parametrize(
    ("row", "nearest"),
    [
        (
            {"image": "a.jpg", "conversatoins": []},
            "conversations (LLaVA, ShareGPT, messages), which also needs 'conversations'",
        ),
        (
            {"image": "a.jpg", "question": "a", "anwser": "b"},
            "JSON Lines (docs/own_data.md), which also needs 'answer'",
        ),
        ({"img_id": "a_1", "sents": "b", "box": []}, "RefCOCO, which also needs 'bbox'"),
    ],
)
def test_a_file_of_no_format_is_refused_with_its_keys_and_the_nearest_format(tmp_path, row, nearest):
    (tmp_path / "a.json").write_text(json.dumps([row]))
    with pytest.raises(UserError) as error:
        detect.detect_source(str(tmp_path / "a.json"))
    assert nearest in str(error.value) and all(repr(key) in str(error.value) for key in row)


# ------------------------------------------------------------------ token ids


def ids_of(example, processor):
    builder = PromptBuilder(processor)
    prompt_format = PromptFormat("", example.history, image_marks=example.image_marks)
    prompt, target, loss_mask, *_ = builder.build_example(example.question, example.answer, prompt_format=prompt_format)
    learned = [token for token, is_learned in zip(target, loss_mask, strict=True) if is_learned]
    return builder.tokenizer, [*prompt, *target], learned


def text_of(tokenizer, ids) -> str:
    return "".join(tokenizer.decode([i]) if i != PICTURE else "#" for i in ids)


@pytest.mark.parametrize("tokenization", ["parts", "whole"])
@pytest.mark.parametrize(
    ("rows", "rounds"),
    [
        (("<image>\nred one?", "yes", "blue?", "no"), ("#redone?", "blue?")),
        (("red?", "yes", "see <image> one", "no"), ("red?", "#seeone")),
        (("red?", "yes", "blue?", "no"), ("red?", "blue?")),
        (("a <image> b <image>", "yes", "<image> red", "no"), ("a#b#", "#red")),
    ],
)
def test_images_and_answers_reach_the_ids_where_the_rounds_have_them(folder, tokenization, rows, rounds):
    count = sum(text.count("<image>") for text in rows)
    names = [f"{i}.png" for i in range(count)]
    (example,) = opened(folder, {"image": names, "conversations": talk(*rows)})
    processor = decoder_prompts(prompt_tokenization=tokenization, **VICUNA)
    tokenizer, ids, learned = ids_of(example, processor)
    end = tokenizer.decode([tokenizer.eos_id])
    text = text_of(tokenizer, ids).replace(" ", "").replace("\n", "").lower()
    expected = f"sys.user:{rounds[0]}assistant:yes{end}user:{rounds[1]}assistant:no{end}"
    assert text.removeprefix(tokenizer.decode(tokenizer.bos_ids).lower()) == expected.lower().replace(" ", "")
    assert text_of(tokenizer, learned).replace(" ", "") == f"yes{end}no{end}" and ids.count(PICTURE) == count


def test_a_later_round_gets_the_image_in_the_form_of_the_template():
    templates = ("Sys. USER: {image}\n{question} ASSISTANT:", " USER: {question} ASSISTANT:")
    assert round_template(*templates, True, True) == templates[0]
    assert round_template(*templates, True, False) == "Sys. USER: {question} ASSISTANT:"
    assert round_template(*templates, False, True) == " USER: {image}\n{question} ASSISTANT:"
    owl = ("Human: <I>{image}</I>\nHuman: {question}\nAI:", "Human: {question}\nAI:")
    assert round_template(*owl, False, True) == "Human: <I>{image}</I>\nHuman: {question}\nAI:"


def test_rounds_train_through_the_pipeline_with_all_their_images(folder):
    rows = [
        {"image": ["0.png", "2.png"], "conversations": talk("red <image> blue <image>", "yes", "more?", "no")},
        {"conversations": talk("Hi", "Hello", "Bye", "Ciao")},
    ]
    (folder / "t.json").write_text(json.dumps(rows))
    source = Conversations(str(folder / "t.json"), str(folder))
    data = DataConfig(sources=(source,), processor=decoder_prompts(**VICUNA, max_images=2))
    dataset = mixture.open_mixture(data, "train")
    (component,) = dataset.components("conversation")
    first, second = (dataset.encode_example(component, i, np.random.default_rng(0)) for i in range(2))
    assert first["pixels"].shape == second["pixels"].shape == (2, 28, 28, 3)
    assert first["pixels"][0].max() < first["pixels"][1].max() == 160
    assert [(row["prompt"] == PICTURE).sum() for row in (first, second)] == [2, 0]
    with pytest.raises(UserError, match="processor.max_images is 1; set it to 2"):
        narrow = DataConfig(sources=(source,), processor=decoder_prompts(**VICUNA))
        mixture.open_mixture(narrow, "train").encode_example(component, 0, np.random.default_rng(0))


def test_inspect_shows_rounds_with_their_images(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    row = {"image": ["0.png", "1.png"], "conversations": talk("red <image>?", "yes", "and <image>?", "no")}
    (folder / "t.json").write_text(json.dumps([row]))
    detect.inspect(detect.detect_source(str(folder / "t.json")))
    out = capsys.readouterr().out
    assert "[0.png]" in out and "-> yes" in out and "and" in out and "[1.png]" in out
    assert len(open_split(detect.detect_source(str(folder / "t.json")), "train", 1)) == 2


@pytest.mark.parametrize("beam", [None, ["--runner=DirectRunner"]], ids=["alone", "beam"])
def test_rounds_and_rows_of_no_image_and_of_several_are_built(folder, tmp_path_factory, monkeypatch, beam):
    if beam:
        pytest.importorskip("apache_beam", reason="Apache Beam, of the extra prepare, is not installed")
    rows = [
        {"image": "gone.png", "conversations": talk("<image>\nred?", "yes")},  # later records move forward
        {"image": "0.png", "conversations": talk("<image>\nred?", "yes", "more?", "no")},
        {"conversations": talk("Hi", "Hello", "Bye", "Ciao")},
        {"image": ["1.png", "gone.png"], "conversations": talk("<image> or <image>?", "no")},  # only others show 1.png
        {"image": ["2.png", "1.png", "0.png"], "conversations": talk("<image>, <image> or <image>?", "none")},
    ]
    (folder / "t.jsonl").write_text("\n".join([*map(json.dumps, rows), "{"]))
    monkeypatch.setattr(array_record_writer, "GROUP_SIZE", 2)  # a row's images are in several groups
    out = tmp_path_factory.mktemp("built")
    built = array_record_writer.build(Conversations(str(folder / "t.jsonl"), str(folder)), out, beam_flags=beam)
    data = DataConfig((ArrayRecordDataset(str(built)),), decoder_prompts(**VICUNA, max_images=3))
    samples = {sample.example.answer: sample for sample in examples(data, "conversation", "train")}
    assert {answer: sample.example.history for answer, sample in samples.items()} == {
        "no": (("<image>\nred?", "yes"),),
        "Ciao": (("Hi", "Hello"),),
        "none": (),
    }
    shown = [images.to_pil_image(image) for image in (samples["none"].image, *samples["none"].more_images)]
    assert [image.getpixel((0, 0))[0] for image in shown] == [160, 80, 0]
    dataset = mixture.open_mixture(data, "train")
    (component,) = dataset.components("conversation")
    arrays = [dataset.encode_example(component, i, np.random.default_rng(0)) for i in range(3)]
    assert sorted((row["prompt"] == PICTURE).sum() for row in arrays) == [0, 1, 3]
    reasons = next(out.rglob("left_out.txt")).read_text()
    assert "line 6, is not valid JSON" in reasons and reasons.count("gone.png") == 2


def test_a_built_row_whose_other_image_is_missing_is_one_sentence(folder, tmp_path_factory):
    row = {"image": ["0.png", "1.png"], "conversations": talk("<image> or <image>?", "yes")}
    (folder / "t.json").write_text(json.dumps([row]))
    built = array_record_writer.build(
        Conversations(str(folder / "t.json"), str(folder)), tmp_path_factory.mktemp("built")
    )
    dataset = ArrayRecordDataset(str(built)).open("train", 10**6)
    dataset.record_names[1] = "other.png"
    with pytest.raises(UserError, match="has no image '1.png', which a row shows; build the data again"):
        dataset.make_example("conversation", 0, dataset.load_record(0)[1], RNG, 0)
