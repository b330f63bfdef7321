# SPDX-License-Identifier: Apache-2.0
"""Files that the benchmarks' servers take, byte for byte, and MMBench's sheet cell by cell."""

import json
import sys
from pathlib import Path

import pytest

from lionjax.core.types import UserError
from lionjax.evaluation.published.scoring import score_predictions

FILES = Path(__file__).resolve().parents[2] / "data" / "benchmarks"
EXPECTED = json.loads((FILES / "expected.json").read_text())
VQA = ("vqa/v2_OpenEnded_mscoco_val2014_questions.json", "vqa/vqa_results.json")


def submit(tmp_path, benchmark, source, answers, protocol="", **options):
    path = tmp_path / "submission"
    given = answers if isinstance(answers, Path) else FILES / answers
    entry = score_predictions(benchmark, str(FILES / source), str(given), protocol, submission=str(path), **options)
    return entry, path


VIZWIZ = json.dumps(EXPECTED["vqa/vizwiz"]["submission"])
AOKVQA = json.dumps(json.loads((FILES / "vqa/aokvqa_predictions_val.json").read_text()))
NOCAPS = json.dumps(json.loads((FILES / "captions/nocaps_val_results.json").read_text()))
DOCVQA = json.dumps(json.loads((FILES / "vqa/docvqa_results.json").read_text()))
GQA = json.dumps(json.loads((FILES / "vqa/gqa_testdev_balanced_predictions.json").read_text()))
POPE = '{"question": "Is there a square in the image?", "answer": "Yes, there is."}\n'


@pytest.mark.parametrize(
    ("benchmark", "source", "answers", "protocol", "text"),
    [
        (
            *("vqav2", *VQA, ""),
            '[{"question_id": 1000, "answer": "Red."}, {"question_id": 2000, "answer": "one"}, '
            '{"question_id": 3000, "answer": "two squares"}, {"question_id": 4000, "answer": "yes it is"}]',
        ),
        (
            *("vqav2", *VQA, "llava"),
            '[{"question_id": 1000, "answer": "red"}, {"question_id": 2000, "answer": "1"}, '
            '{"question_id": 3000, "answer": "2 squares"}, {"question_id": 4000, "answer": "yes it is"}]',
        ),
        ("vizwiz", "vqa/vizwiz_val.json", "vqa/vizwiz_results.json", "", VIZWIZ),
        ("aokvqa", "vqa/aokvqa_v1p0_val.json", "vqa/aokvqa_predictions_val.json", "", AOKVQA),
        ("nocaps", "captions/nocaps_val_4500_captions.json", "captions/nocaps_val_results.json", "", NOCAPS),
        ("docvqa", "vqa/docvqa_val_v1.0.json", "vqa/docvqa_results.json", "", DOCVQA),
        ("gqa", "vqa/gqa_testdev_balanced_questions.json", "vqa/gqa_testdev_balanced_predictions.json", "", GQA),
        (
            "hateful_memes",
            "vqa/hateful_memes_dev.jsonl",
            "vqa/hateful_memes_scores.json",
            "",
            "id,proba,label\n1,0.9,1\n",
        ),
        ("pope", "yes_no/coco_pope_random.json", "yes_no/pope_answers_random.jsonl", "", POPE),
    ],
)
def test_a_submission_has_the_bytes_that_the_server_takes(tmp_path, benchmark, source, answers, protocol, text):
    _, path = submit(tmp_path, benchmark, source, answers, protocol)
    written = path.read_bytes().decode()
    assert written.startswith(text) if text.endswith("\n") else written == text


def test_lines_of_mme_have_no_tabs_or_line_ends_in_their_answers(tmp_path):
    _, path = submit(tmp_path, "mme", "yes_no/mme", "yes_no/mme")
    for file in (FILES / "yes_no/mme").iterdir():
        assert (path / file.name).read_bytes() == file.read_bytes()
    rows = [
        {"question_id": f"count/{n}.jpg/Is it so? Please answer yes or no.", "text": "Yes,\tit\nis"} for n in (1, 2)
    ]
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps(rows))
    other = tmp_path / "other"
    score_predictions("mme", str(FILES / "yes_no/mme"), str(answers), submission=str(other))
    lines = (other / "count.txt").read_text().splitlines()
    assert lines == [f"{n}.jpg\tIs it so? Please answer yes or no.\tYes\tYes, it is" for n in (1, 2)]


def test_a_test_split_of_vqav2_has_every_question_in_order_and_no_figures(tmp_path):
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps([{"question_id": 3000, "answer": "a\tb"}, {"question_id": 1000, "answer": "c"}]))
    entry, path = submit(tmp_path, "vqav2", VQA[0], answers)
    assert path.read_text() == (
        '[{"question_id": 1000, "answer": "c"}, {"question_id": 2000, "answer": ""}, '
        '{"question_id": 3000, "answer": "a b"}, {"question_id": 4000, "answer": ""}]'
    )
    assert entry["figures"] == {} and entry["main_figure"] is None and entry["answered"] == 2
    with pytest.raises(UserError, match="questions file; give the file of its answers"):
        score_predictions("vqav2", str(FILES / VQA[0]), str(answers))


def test_a_split_without_public_answers_is_submitted_and_not_scored(tmp_path):
    rows = json.loads((FILES / "vqa/vizwiz_val.json").read_text())
    for row in rows:
        del row["answers"]
    source = tmp_path / "test.json"
    source.write_text(json.dumps(rows))
    with pytest.raises(UserError, match="test.json has no public answers"):
        score_predictions("vizwiz", str(source), str(FILES / "vqa/vizwiz_results.json"))
    entry, path = submit(tmp_path, "vizwiz", source, "vqa/vizwiz_results.json")
    assert entry["figures"] == {} and path.read_text() == VIZWIZ


def test_mmbenchs_sheet_has_the_cells_of_llavas_converter(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    rows = json.loads((FILES / "choice/mmbench_predictions.json").read_text())
    rows[0]["prediction"] = "=1+1\x07"
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps(rows[:-1]))
    path = tmp_path / "mmbench.xlsx"
    source = str(FILES / "choice/mmbench_circular.tsv")
    score_predictions("mmbench", source, str(answers), submission=str(path))
    sheet = openpyxl.load_workbook(path)["Sheet1"]
    cells = [list(row) for row in sheet.iter_rows(values_only=True)]
    assert cells[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert cells[1] == [1, "What is left?", "a square", "a disc", "a line", None, "=1+1", "A", "dev"]
    assert cells[2][:6] == [1000001, "What is left?", "a disc", "a line", "a square", None] and len(cells) == 10
    assert sheet.cell(2, 7).data_type == "s"  # no formula
    by_index = {row["index"]: row["prediction"] for row in rows[1:-1]}
    assert {row[0]: row[6] for row in cells[2:] if row[6]} == by_index


def test_a_sheet_without_openpyxl_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(UserError, match=r'pip install "lionjax\[xlsx\]"'):
        submit(tmp_path, "mmbench", "choice/mmbench_circular.tsv", "choice/mmbench_predictions.json")


def test_a_benchmark_without_a_server_is_refused(tmp_path):
    with pytest.raises(UserError, match="seed has no server that takes a file"):
        submit(tmp_path, "seed", "choice/SEED-Bench.json", "choice/seed_answers.jsonl")
