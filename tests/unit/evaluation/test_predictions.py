# SPDX-License-Identifier: Apache-2.0
"""Answer files: how they are joined with the questions, and what is refused in one sentence."""

import json
import pickle
from pathlib import Path

import pytest

from lionjax import cli
from lionjax.core.types import UserError
from lionjax.data.datasets.flickr30k_entities import Flickr30kEntities
from lionjax.evaluation.published.predictions import prediction_id, prediction_text, read_predictions
from lionjax.evaluation.published.scoring import score_predictions

FILES = Path(__file__).resolve().parents[2] / "data" / "benchmarks"
OKVQA = FILES / "vqa/OpenEnded_mscoco_val2014_questions.json"
OKVQA_ANSWERS = str(FILES / "vqa/mscoco_val2014_annotations.json")
ROWS = json.loads((FILES / "vqa/okvqa_results.json").read_text())


def score(tmp_path, answers, benchmark="okvqa", source=OKVQA, **options):
    path = tmp_path / "answers.json"
    path.write_text(answers if isinstance(answers, str) else json.dumps(answers))
    options = {"answers_file": OKVQA_ANSWERS} | options if benchmark == "okvqa" else options
    return score_predictions(benchmark, str(source), str(path), **options)


def test_answers_are_joined_by_id_in_any_order_and_form(tmp_path):
    forms = [
        ROWS[::-1],
        {str(row["question_id"]): row["answer"] for row in ROWS},
        [row["answer"] for row in ROWS],
        "\n".join(json.dumps({"question_id": str(row["question_id"]), "text": row["answer"]}) for row in ROWS),
    ]
    assert [score(tmp_path, form)["figures"]["overall"] for form in forms] == pytest.approx([65.0] * 4)


def test_unanswered_questions_are_counted_and_the_figure_is_over_the_answered(tmp_path, caplog):
    entry = score(tmp_path, ROWS[:3])
    assert entry["figures"]["overall"] == pytest.approx(260 / 3)
    assert (entry["questions"], entry["answered"], entry["unanswered"]) == (4, 3, ["40005"])
    assert any("1 of 4 questions have no answer, such as 40005" in text for text in caplog.messages)


def test_missing_pictures_are_counted_and_listed(tmp_path, caplog):
    entry = score(tmp_path, ROWS, image_dir=str(FILES / "images"))
    assert entry["missing_pictures"] == {"count": 0, "names": []}
    entry = score(tmp_path, ROWS, image_dir=str(tmp_path))
    assert entry["missing_pictures"]["count"] == 4 and len(entry["missing_pictures"]["names"]) == 4
    assert sum("4 of 4 pictures are not in" in text for text in caplog.messages) == 1


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([*ROWS, {"question_id": 7, "answer": "x"}], "answers 1 questions that .* does not have, such as '7'"),
        ([{"question_id": 1000, "answer": "x"}], "such as '1000'; they seem to be of another split"),
        ([*ROWS, ROWS[0]], "answers the question '10005' twice"),
        (["red"] * 3, "3 answers without ids for the 4 questions"),
        ([{"question_id": 10005, "answer": ["red"]}], "has no text; give it as 'answer'"),
        ([{"question_id": 10005, "answer": "a"}, {"answer": "b"}], "entry 2, has no id"),
        ("[1, ", "is not valid JSON"),
        ("", "has no line of JSON"),
    ],
)
def test_answers_that_do_not_fit_are_one_sentence(tmp_path, answers, words):
    with pytest.raises(UserError, match=words) as error:
        score(tmp_path, answers)
    assert "\n" not in str(error.value) and "answers.json" in str(error.value) or "answer" in words


def test_a_source_with_one_id_twice_is_refused(tmp_path):
    tree = json.loads(OKVQA.read_text())
    tree["questions"].append(tree["questions"][0])
    source = tmp_path / "questions.json"
    source.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="two questions with the id '10005'"):
        score(tmp_path, ROWS, source=source)


def test_annotations_of_another_split_are_named_beside_the_questions(tmp_path):
    other = tmp_path / "other.json"
    tree = json.loads(Path(OKVQA_ANSWERS).read_text())
    for annotation in tree["annotations"]:
        annotation["question_id"] += 7
    other.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="other.json answers none of the questions of .*, such as 10012; give the ann"):
        score(tmp_path, ROWS, answers_file=str(other))


def test_a_source_of_another_benchmark_is_refused(tmp_path):
    with pytest.raises(UserError, match="okvqa wants questions of the task vqa, but .* has caption"):
        score(tmp_path, ROWS, source=FILES / "captions/coco_karpathy_test.json")
    with pytest.raises(UserError, match="there is no benchmark 'okvqaa'"):
        score(tmp_path, ROWS, benchmark="okvqaa")
    with pytest.raises(UserError, match="okvqa has no protocol 'shikra'; choose one of official"):
        score(tmp_path, ROWS, protocol_name="shikra")


@pytest.mark.parametrize(
    ("benchmark", "source", "answers", "words"),
    [
        ("owleval", "judged/owleval_questions.jsonl", [{"question_id": 1, "rating": "E"}], "rating 'E'"),
        ("visdial", "vqa/visdial_1.0_val.json", [{"image_id": 1, "round_id": 1, "scores": [1]}], "1 scores for 8"),
        ("visdial", "vqa/visdial_1.0_val.json", [{"image_id": 1, "round_id": 1}], "round 1/1 has no 'scores'"),
        ("hateful_memes", "vqa/hateful_memes_dev.jsonl", [{"id": 1, "proba": "x"}], "has 'x' as 'proba'"),
        (
            *("flickr30k_entities", "regions/flickr30k_entities"),
            *([{"image_id": 1, "sentence_id": 0, "boxes": [[[0, 0, 1, 1]]]}], "1 lists of boxes for 2 phrases"),
        ),
        ("reason_seg", "regions/reason_seg", [{"question_id": "1", "mask": "nothing.png"}], "nothing.png .*cannot be"),
        (
            "reason_seg",
            "regions/reason_seg",
            [{"question_id": "1", "mask": {"size": [2, 2], "counts": [4]}}],
            "the size",
        ),
        ("rec", "regions/REC_refcoco_unc_val.jsonl", ["[0,0,1,1]"] * 8, "cannot be read as an image"),
        ("llava_bench", "judged/questions.jsonl", [{"question_id": k} for k in range(6)], "has no text"),
    ],
)
def test_an_answer_of_another_form_is_one_sentence(tmp_path, benchmark, source, answers, words):
    protocol = "readable" if benchmark == "llava_bench" else ""
    with pytest.raises(UserError, match=words) as error:
        score(tmp_path, answers, benchmark, FILES / source, protocol_name=protocol)
    assert "\n" not in str(error.value)


def test_a_pickle_that_names_a_class_is_refused_before_anything_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([Evil()], protocol=2))
    (tmp_path / "instances.json").write_text("{}")
    with pytest.raises(UserError, match="only numbers, texts, lists and dicts"):
        score(tmp_path, ["[0,0,1,1]"], "rec", tmp_path / "refs(unc).p")
    assert not (tmp_path / "ran").exists()


def test_an_empty_mask_and_no_mask_are_wrong_and_no_error(tmp_path):
    empty = {"size": [72, 96], "counts": [72 * 96]}
    for mask in (empty, None):
        figures = score(tmp_path, [{"question_id": "1", "mask": mask}], "reason_seg", FILES / "regions/reason_seg")[
            "figures"
        ]
        assert figures["intersection"] == 0 and figures["union"] == 500 and figures["iou"] == 0


def test_ids_are_taken_from_the_keys_that_benchmarks_use():
    assert prediction_id({"question_id": 7, "image_id": 1}) == "7"
    assert prediction_id({"image_id": 1, "round_id": 2}) == "1/2" and prediction_id({"text": "a"}) is None
    row = {"question_id": "0" * 16, "prompt": "Reference OCR token: a\nWhat IS it?\nAnswer briefly."}
    assert prediction_id(row) == f"{'0' * 16}|what is it?"
    assert prediction_text({"prediction": 2}) == "2"


def test_llavas_rows_of_mme_are_told_apart_by_the_question_in_their_prompt(tmp_path):
    ending = "\nAnswer the question using a single word or phrase."
    questions = ["Is it so?", "Is it otherwise?"]
    rows = [
        {"question_id": f"{task}/{image}.jpg", "prompt": question + ending, "text": text}
        for task in ("existence", "count")
        for image in (1, 2)
        for question, text in zip(questions, ("Yes", "No"))
    ]
    folder = tmp_path / "mme"
    folder.mkdir()
    lines = (FILES / "yes_no/mme/existence.txt").read_text().splitlines()
    cells = [line.split("\t")[:3] for line in lines]
    cells[0][1] = cells[0][1].replace("? ", "?  ")  # two blanks, as some questions have
    for task in ("existence", "count"):
        (folder / f"{task}.txt").write_text("".join("\t".join(row) + "\n" for row in cells))
    entry = score(tmp_path, rows, "mme", folder)
    assert (entry["answered"], entry["figures"]["existence"], entry["figures"]["count"]) == (8, 200.0, 200.0)
    with pytest.raises(UserError, match="answers the question 'existence/1.jpg/Is it so. Please answer yes or no.' tw"):
        score(tmp_path, [*rows, rows[0]], "mme", folder)
    with pytest.raises(UserError, match="answers the question 'existence/1.jpg' twice"):
        score(tmp_path, [{"question_id": "existence/1.jpg", "text": "Yes"}] * 2, "mme", folder)


def test_two_names_of_one_question_are_two_answers(tmp_path):
    rows = [{"question_id": 34601, "answer": "red"}, {"question_id": "0" * 15 + "1", "text": "red"}]
    rows[1]["prompt"] = "What color is the square?\nAnswer the question using a single word or phrase."
    with pytest.raises(UserError, match=r"answers the question '0000000000000001\|what color is the square.' twice"):
        score(tmp_path, rows, "textvqa", FILES / "vqa/TextVQA_0.5.1_val.json")
    assert score(tmp_path, rows[1:], "textvqa", FILES / "vqa/TextVQA_0.5.1_val.json")["answered"] == 1


def test_an_answer_to_a_row_that_cannot_be_read_is_said_so(tmp_path):
    tree = json.loads((FILES / "vqa/TextVQA_0.5.1_val.json").read_text())
    ids = [row["question_id"] for row in tree["data"]]
    del tree["data"][0]["question"]
    file = tmp_path / "TextVQA_0.5.1_val.json"
    file.write_text(json.dumps(tree))
    answers = [{"question_id": number, "answer": "red"} for number in ids]
    with pytest.raises(UserError, match=f"1 rows of .* cannot be read .*such as '{ids[0]}'; correct the rows"):
        score(tmp_path, answers, "textvqa", file)


def test_a_folder_of_masks_is_read_by_name(tmp_path):
    (tmp_path / "7.png").write_bytes(b"x")
    assert read_predictions(tmp_path) == ({"7": {"mask": str(tmp_path / "7.png")}}, [])


def test_entities_take_the_test_list_where_there_is_one(tmp_path):
    for name in ("Sentences", "Annotations"):
        (tmp_path / name).symlink_to(FILES / "regions/flickr30k_entities" / name)
    (tmp_path / "val.txt").write_text("1\n3\n")
    (tmp_path / "test.txt").write_text("3\n")
    opened = Flickr30kEntities(str(tmp_path), "").open("heldout", 10**7)
    assert [row.question_id for row in opened.annotations["grounded"]] == ["3/0"]


def test_the_command_line_prints_figures_protocol_and_published_figures(capsys, tmp_path):
    words = ["evaluate", "--benchmark", "pope", "--source", str(FILES / "yes_no/coco_pope_random.json")]
    words += ["--predictions", str(FILES / "yes_no/pope_answers_random.jsonl"), "--protocol", "shikra"]
    assert cli.main(words) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "pope, protocol shikra: 4 of 4 questions answered" in out and "reader: answer_sentence" in out
    assert "published: 87.28 / 84.14 / 81.91 NExT-Chat-7B" in out and "under other protocols" in out
    assert cli.main(["evaluate", "--benchmark", "pope", "--predictions", "x"]) == 2
    assert cli.main(["evaluate", "--benchmark", "vqa"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
