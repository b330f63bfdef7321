# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Bench judged by a language model: what it reads, both readings of its scores, both orders, the tables."""

import json

import pytest
from paths import ROOT
from PIL import Image
from scripted_tools import ScriptedLanguageModel

from lionjax.cli import entry
from lionjax.core.errors import UserError
from lionjax.evaluation.metrics import judged
from lionjax.evaluation.published.scoring import score_predictions
from lionjax.pipelines import judge
from lionjax.pipelines.completion import Completion
from lionjax.pipelines.judge import JudgeConfig

FILES = ROOT / "tests/data/benchmarks/judged"
EXPECTED = json.loads((ROOT / "tests/data/benchmarks/expected.json").read_text())["judged/llava_bench"]
REPLIES = json.loads((FILES / "judge_replies.json").read_text())
PATHS = [FILES / name for name in ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl", "answers_model.jsonl")]


@pytest.fixture
def rows(tmp_path):
    """The questions with captions of their images; the fixture's context names images by id."""
    return judge.read_questions(PATHS[0], PATHS[1], *PATHS[2:])


def judged_by(rows, config, *replies):
    return judge.judge_answers(ScriptedLanguageModel(*replies), rows, config)


def test_the_judge_reads_llavas_blocks(rows):
    request = judge.build_request(rows[0], JudgeConfig())
    system, user = request.messages
    assert system == {"role": "system", "content": judge.SYSTEM} and (request.temperature, request.max_tokens) == (
        0.2,
        1024,
    )
    assert user["content"] == (
        "[Context]\nA red square and a blue disc.\n\n[Question]\nWhat is shown?\n\n"
        "[Assistant 1]\nA red square beside a blue disc.\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\nTwo shapes.\n\n[End of Assistant 2]\n\n[System]\n{judge.RUBRIC}\n\n"
    )
    swapped = judge.build_request(rows[0], JudgeConfig(), swapped=True).messages[1]["content"]
    assert "[Assistant 1]\nTwo shapes." in swapped


def test_llavas_reading_gives_llavas_figures(rows, tmp_path):
    config = JudgeConfig("llava")
    reviews = judged_by(rows, config, *REPLIES)
    assert [list(review.scores) for review in reviews] == EXPECTED["tuples"]
    report = judge.write_reviews(tmp_path, rows, reviews, ScriptedLanguageModel(), config)
    assert report["printed"] == EXPECTED["printed"] and report["num_unreadable"] == 3
    assert report["judge"] == {"model": "scripted"} and report["models"] == ["invented"]


def test_our_reading_asks_once_more_and_leaves_out_what_stays_unreadable(rows, tmp_path):
    model = ScriptedLanguageModel(*REPLIES, "Assistant 1: 8 again")
    reviews = judge.judge_answers(model, rows, JudgeConfig())
    assert [review.scores for review in reviews] == [(8, 7), (9, 5), None, (10, 8), (7, 7), (9, 6)]
    assert model.requests[-1].temperature == 0 and model.requests[-1].sample == 1 and len(model.requests) == 7
    report = judge.write_reviews(tmp_path, rows, reviews, model, JudgeConfig())
    assert report["num_unreadable"] == 1 and report["table"][0]["count"] == 5
    low, high = report["table"][0]["interval"]
    assert report["table"][0]["ratio"] == pytest.approx(100 * 33 / 43) and low < 100 * 33 / 43 < high
    lines = [json.loads(line) for line in (tmp_path / "reviews.jsonl").read_text().splitlines()]
    assert {line["judge"] for line in lines} == {"scripted"} and lines[2]["tuple"] == [-1, -1]


def test_both_orders_are_asked_and_their_mean_is_turned_back(rows):
    config = JudgeConfig(both_orders=True)
    (review,) = judged_by(rows[:1], config, "8 6", "4 10")
    assert review.scores == (9, 5) and len(review.replies) == 2
    (review,) = judged_by(rows[:1], config, "8 6", "none", "none")
    assert review.scores is None  # one order alone would favor a place


def test_cut_refused_and_missing_replies_are_never_read(rows, tmp_path):
    cut = Completion("8 7", problem="length")
    reviews = judged_by(rows[:3], JudgeConfig(), cut, Completion("", problem="refused: too long"), None, cut, cut)
    assert [review.scores for review in reviews] == [None] * 3
    assert [review.was_asked for review in reviews] == [True, True, False]
    with pytest.raises(UserError, match="none of 2 replies"):
        judge.write_reviews(tmp_path, rows[:3], reviews, ScriptedLanguageModel(), JudgeConfig())


@pytest.mark.parametrize("text", ["11 3", "0 5", "8", "8 7 6", "8 and 7", "nan 3", "", "-8 7", "8 7 because", "1e3 2"])
def test_other_replies_have_no_scores(text):
    assert judged.read_scores(text) is None


@pytest.mark.parametrize("text", ["nan 5", "inf 1", "8 x"])
def test_numbers_that_are_not_finite_are_unreadable_in_llavas_reading_too(text):
    assert judged.parse_judge_scores(text) == judged.UNREADABLE


@pytest.mark.parametrize("text", ["8 7", "8, 7\n", "8/7", " 8.5  7.25 \nfine", "10 1\n"])
def test_two_scores_are_read(text):
    assert judged.read_scores(text) is not None


def test_means_are_rounded_to_three_decimals_before_the_ratio_as_llava_prints_it():
    row = {"category": "all", "ratio": 100 * 1.0004 / 1.0006, "reference": 10.006, "answer": 10.004}
    assert judged.judge_lines([row]) == ["all 99.9 10.0 10.0"]  # 1.000 / 1.001


def test_reviews_are_scored_again_from_their_file_under_the_judges_name(rows, tmp_path):
    reviews = judged_by(rows, JudgeConfig(), *REPLIES, "no scores")
    judge.write_reviews(tmp_path, rows, reviews, ScriptedLanguageModel(), JudgeConfig())
    path = tmp_path / "reviews.jsonl"
    figures = score_predictions("llava_bench", str(PATHS[0]), str(path), "readable", "")["figures"]
    assert figures["judge"] == "scripted" and figures["unreadable"] == 1 and figures["table"][0]["count"] == 5
    path.write_text(path.read_text().replace('"scripted"', '"another"', 1))
    with pytest.raises(UserError, match="2 judges"):
        score_predictions("llava_bench", str(PATHS[0]), str(path), "readable", "")


def test_coco_contexts_have_captions_and_boxes_in_llavas_form(tmp_path):
    questions = tmp_path / "questions.jsonl"
    row = {"question_id": 0, "image": "000000000001.jpg", "text": "What?", "category": "conv"}
    questions.write_text(json.dumps(row) + "\n")
    (found,) = judge.read_questions(questions, FILES / "caps_boxes.jsonl", *PATHS[2:])
    lines = found.context.split("\n")
    assert lines[5:] == ["", "square: [0.083, 0.139, 0.333, 0.472]", "disc: [0.625, 0.5, 0.917, 0.889]"]
    assert lines[0] == "a red square and a blue disc"


def test_the_command_prints_the_judge_and_the_dry_run_asks_nothing(tmp_path, capsys, monkeypatch):
    questions, context, references, answers = map(str, PATHS)
    command = ["judge", "llava_bench", questions, "--context", context, "--references", references]
    command += ["--answers", answers, "--workdir", str(tmp_path)]
    assert entry.main([*command, "--both-orders", "--dry-run"]) == 0
    assert "12 requests, 0 of them answered already" in capsys.readouterr().out
    from lionjax.cli import judge as judge_command

    monkeypatch.setattr(judge_command, "open_language_model", lambda *_: ScriptedLanguageModel(*REPLIES, "x"))
    assert entry.main([*command, "--model", "m"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("judge: scripted, reading: readable\nall 76.7 86.0 66.0 [") and "1 of 6 unreadable" in out
    assert entry.main([*command[:3], "--answers", answers, "--workdir", str(tmp_path)]) == 2
    assert "--references" in capsys.readouterr().err


def test_owlevals_sheet_shows_answers_without_the_models_name(tmp_path, capsys):
    for number in range(1, 5):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{number}.jpg")
    answers = tmp_path / "answers.jsonl"
    rows = [{"question_id": k, "answer": f"<b>answer {k}</b>", "model_id": "secret"} for k in range(1, 5)]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["judge", "owleval", str(FILES / "owleval_questions.jsonl"), "--answers", str(answers)]
    assert entry.main([*command, "--images", str(tmp_path), "--workdir", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/sheet.html").read_text()
    assert "4 answers to rate" in capsys.readouterr().out
    assert page.count("<fieldset") == 4 and page.count('type="radio"') == 16 and page.count("data:image/jpeg") == 4
    assert "&lt;b&gt;answer 1" in page and "secret" not in page and "http" not in page
