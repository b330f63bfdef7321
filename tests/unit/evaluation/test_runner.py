# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of a real, untrained model: figures that follow from the answers kept, baselines that see nothing."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import shared_data
from leafwise import runs_have_one_device  # noqa: F401
from PIL import Image

import lionjax
from lionjax import cli
from lionjax.core.types import UserError
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.scenes.tasks import Example
from lionjax.evaluation import asking, runner
from lionjax.evaluation import tasks as scoring
from lionjax.evaluation.metrics import captions, regions, vqa
from lionjax.evaluation.report.html import write_report
from lionjax.inference import engine, slots

LIMIT = 6
TASKS = ("vqa", "existence", "relation", "caption", "rec", "reg", "tags")
SHARED = shared_data.ROOT


def example(answer: str, kind: str = "", task: str = "vqa", **more) -> Example:
    return Example(task, kind, "?", answer, more.pop("answers", (answer,)), "image_level", **more)


@pytest.fixture(scope="module")
def folder(finished_run):
    """The folder of a run that has ended, with a report."""
    report = {"stages": [{"name": "kept"}], "speed": {"images_per_second": 7.0}}
    (finished_run / "report.json").write_text(json.dumps(report))
    return finished_run


@pytest.fixture(scope="module")
def model(folder, finished_model):
    return finished_model


@pytest.fixture(scope="module")
def entries(model, folder):
    return {task: runner.evaluate_model(model, task, folder, LIMIT, with_blind=True) for task in TASKS}


def lines(folder, name: str) -> list[dict]:
    return [json.loads(text) for text in (folder / "evaluation" / f"{name}.jsonl").read_text().splitlines()]


# Figures


def tag_words(text: str) -> set[str]:
    return {word.strip().strip(".").strip().lower() for word in text.split(",")} - {""}


def scores_of(rows: list[dict], said: str) -> dict[str, dict[str, float]]:
    """The main figure of each task, made again from the lines of its file."""
    texts, truth = [row.get(said, "") for row in rows], [row["truth"] for row in rows]
    words = [[tag_words(text) for text in group] for group in (texts, [one for one, *_ in truth])]
    boxes = [regions.parse_box(text) for text in texts]
    return {
        "vqa": lambda: {"vqa_accuracy": np.mean([vqa.vqa_accuracy(*pair) for pair in zip(texts, truth)])},
        "existence": lambda: {
            "pope_f1": vqa.pope_scores(
                [vqa.parse_pope_answer(text) for text in texts], [group[0] == "yes" for group in truth]
            )["f1"]
        },
        "relation": lambda: {
            "vsr_accuracy": np.mean([vqa.parse_yes_no(t) is (g[0] == "yes") for t, g in zip(texts, truth)])
        },
        "caption": lambda: {
            "caption_cider": captions.cider_d(texts, truth).mean(),
            "caption_bleu4": captions.bleu(texts, truth)[3],
            "caption_rouge_l": captions.rouge_l(texts, truth).mean(),
        },
        "rec": lambda: {
            "rec_accuracy_50": regions.rec_scores(boxes, [row["truth_boxes"][0] for row in rows])["accuracy_50"]
        },
        "reg": lambda: {"reg_cider": captions.cider_d(texts, truth).mean()},
        "tags": lambda: {"tag_f1": regions.tag_scores(*words)["f1"]},
    }


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_metric_can_be_recomputed_from_the_stored_answers(entries, folder, task):
    rows, entry = lines(folder, task), entries[task]
    assert len(rows) == entry["samples"] == LIMIT
    for variant in ("metrics", "blind", "majority", "untagged", "tags_alone"):
        if variant in entry:
            said = "prediction" if variant == "metrics" else variant
            for key, value in scores_of(rows, said)[task]().items():
                assert entry[variant][key] == pytest.approx(float(value), abs=1e-9), (variant, key)
    assert ("untagged" in entry) == ("tags_alone" in entry) == (task in runner.TAG_ABLATION_TASKS)


@pytest.mark.slow
def test_scores_by_kind_average_to_the_total_score(entries, folder):
    kinds = entries["vqa"]["kinds"]
    assert sum(kind["samples"] for kind in kinds.values()) == LIMIT
    for variant, key in (("answers", "metrics"), ("majority", "majority")):
        mean = sum(kind["samples"] * kind[variant]["vqa_accuracy"] for kind in kinds.values()) / LIMIT
        assert mean == pytest.approx(entries["vqa"][key]["vqa_accuracy"])
    assert set(entries["existence"]["kinds"]) <= {"random", "popular", "adversarial"}


@pytest.mark.slow
def test_the_report_holds_the_figures_beside_their_baselines_and_leaves_the_rest(entries, folder):
    figures = json.loads((folder / "report.json").read_text())
    wanted = {"caption_cider", "vqa_accuracy", "rec_accuracy_50", "reg_cider", "pope_f1", "tag_f1", "vsr_accuracy"}
    assert wanted | {"caption_bleu4", "caption_rouge_l", "vqa_accuracy_untagged"} <= set(figures["metrics"])
    assert set(figures["metrics"]) == set(figures["baselines"]) and wanted <= set(figures["majority"])
    for key in wanted:
        low, high = figures["intervals"][key]
        assert low <= figures["metrics"][key] <= high
    assert figures["baselines"]["vqa_accuracy"] == entries["vqa"]["blind"]["vqa_accuracy"]
    assert figures["stages"] == [{"name": "kept"}] and figures["speed"]["images_per_second"] == 7.0
    page = write_report(folder).read_text()
    for words in ("VQA, accuracy", "blind", "majority", "POPE", entries["vqa"]["benchmark"]):
        assert words in page


@pytest.mark.slow
def test_evaluation_lines_hold_what_the_report_draws(entries, folder):
    row = lines(folder, "rec")[0]
    assert row["record"].startswith("scenes/heldout") and len(row["truth_boxes"]) == 1
    assert Image.open(folder / "evaluation" / row["image"]).size == (56, 56)
    assert lines(folder, "reg")[0]["question_boxes"] and "score" not in lines(folder, "caption")[0]
    assert {row["score"] for row in lines(folder, "existence")} <= {0.0, 1.0}


# What reaches the model


@pytest.mark.slow
def test_the_blind_baseline_gets_a_blank_image_and_no_tags(model, monkeypatch):
    seen = []
    real = engine.generate

    def watched(system, params, batch, config, key):
        seen.append(batch)
        return real(system, params, batch, config, key)

    monkeypatch.setattr(engine, "generate", watched)
    runner.evaluate_model(model, "vqa", limit=LIMIT, with_blind=True)
    sighted, blind, untagged, alone = seen
    hint = model.processor.tokenizer.soft_prompt_id
    assert not blind.image_BHWC.any() and not alone.image_BHWC.any()
    assert np.ptp(sighted.image_BHWC[0]) > 0.5 and np.array_equal(sighted.image_BHWC, untagged.image_BHWC)
    for batch, tagged in ((sighted, True), (blind, False), (untagged, False), (alone, True)):
        assert (batch.prompt_BL == hint).any() == tagged
    assert all(np.array_equal(batch.question_BL, sighted.question_BL) for batch in seen)
    assert len({batch.prompt_BL.shape for batch in seen}) == 1


@pytest.mark.slow
def test_answers_without_the_image_differ_from_answers_with_it(entries, folder):
    for task in TASKS:
        rows = lines(folder, task)
        same = [row["prediction"] for row in rows if row["prediction"] == row["blind"]]
        assert not same, f"{task}: {same} is said without the picture, too"


@pytest.mark.slow
def test_all_benchmarks_of_long_answers_share_the_programs_of_their_slots(model, monkeypatch):
    monkeypatch.setattr(asking, "BATCH_SIZE", 4)
    assert runner.evaluate_model(model, "rec", limit=10)["samples"] == 10
    before = [program._cache_size() for program in (slots.init_slots, slots.decode, slots.encode_images)]
    for task in ("reg", "tags", "caption"):
        assert runner.evaluate_model(model, task, limit=10)["samples"] == 10
    assert [program._cache_size() for program in (slots.init_slots, slots.decode, slots.encode_images)] == before


@pytest.mark.slow
def test_a_smaller_limit_takes_the_first_questions(entries, model, folder, tmp_path):
    runner.evaluate_model(model, "vqa", tmp_path, 3)
    short, long = lines(tmp_path, "vqa"), lines(folder, "vqa")
    assert [row["question"] for row in short] == [row["question"] for row in long][:3]
    assert [row["prediction"] for row in short] == [row["prediction"] for row in long][:3]


@pytest.mark.slow
def test_a_finished_run_is_evaluated_once_on_each_benchmark_of_its_tasks(model, tmp_path, monkeypatch, caplog):
    what = model.experiment
    assert runner.trained_benchmarks(what) == ["vqa", "rec"]
    given = (model.engine, what, ("vqa", "coco/rec"), tmp_path, 3)
    first = runner.evaluate_all(*given, updates=6)
    assert list(first) == ["vqa"] and "benchmark coco/rec is skipped" in caplog.text
    monkeypatch.setattr(runner, "evaluate", lambda *args, **more: pytest.fail("asked again"))
    assert runner.evaluate_all(model.engine, what, ("vqa",), tmp_path, 3, updates=6) == first
    with pytest.raises(pytest.fail.Exception):
        runner.evaluate_all(model.engine, what, ("vqa",), tmp_path, 3, updates=7)


# Constant answers


def test_the_constant_answer_is_the_most_common_one_of_the_questions_kind():
    train = [example(a, "color") for a in ("red", "blue", "red")] + [example("3", "count")]
    asked = [example("blue", "color"), example("2", "count"), example("?", "new")]
    assert scoring.constant_answers("vqa", train, asked) == ["red", "3", "red"]
    assert scoring.constant_answers("existence", [example("no")] * 3, asked) == ["yes"] * 3


def test_the_constant_box_is_the_training_box_that_hits_most():
    boxes = [(0.0, 0.0, 0.1, 0.1), (0.3, 0.3, 0.7, 0.7), (0.3, 0.3, 0.7, 0.8), (0.28, 0.3, 0.7, 0.72)]
    train = [example("", task="rec", boxes=(box,)) for box in boxes]
    (text,) = scoring.constant_answers("rec", train, train[:1])
    assert regions.parse_box(text) == boxes[3]  # as the second it hits three, and it overlaps them more
    assert scoring.random_box_accuracy(train, train[:1]) == 0.25


def test_the_constant_sentence_and_tags_are_the_best_of_the_training_ones():
    said = ["a red star and a ring", "a red star and a moon", "something else entirely"]
    train = [example(text, task="caption", answers=tuple(said[:2])) for text in said]
    assert scoring.constant_answers("caption", train, train[:1])[0] in said[:2]
    train = [example("star, red", task="tags"), example("star, blue", task="tags"), example("star", task="tags")]
    assert scoring.constant_answers("tags", train, train) == ["star"] * 3


def test_intervals_are_those_of_the_statistic_itself():
    asked = [example("yes"), example("yes"), example("no"), example("no")] * 10
    texts = ["yes", "no", "yes", "no"] * 10
    scored = scoring.score_existence(asked, texts)
    assert scored.metrics == {"pope_f1": 0.5, "pope_accuracy": 0.5}
    low, high = scored.bootstrap_intervals()["pope_f1"]
    assert (low, high) == pytest.approx((0.27, 0.68), abs=0.02)
    rows, statistic = scoring.score_tags(asked, ["yes"] * 40).per_sample["tag_f1"]
    assert statistic(rows) == scoring.score_tags(asked, ["yes"] * 40).metrics["tag_f1"] == 0.5


# The command line


@pytest.mark.slow
def test_evaluate_prints_a_table_and_json_and_refuses_unknown_benchmarks(capsys, folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    words = ["evaluate", str(folder), "--benchmark", "vqa", "--limit", "2"]
    assert cli.main([*words, "--blind"]) == 0
    out = capsys.readouterr().out
    assert "vqa: 2 questions of heldout" in out and "vqa_accuracy" in out and "blind" in out and "majority" in out
    assert "vqa_accuracy" in json.loads((folder / "report.json").read_text())["baselines"]
    assert cli.main(words) == 0, "nothing is asked with a blank image unless it is wanted"
    out = capsys.readouterr().out
    assert "vqa_accuracy" in out and "blind" not in out and "majority" in out and "blind" not in lines(folder, "vqa")[0]
    assert "vqa_accuracy" not in json.loads((folder / "report.json").read_text())["baselines"]
    words = ["evaluate", str(folder), "--benchmark", "all", "--limit", "2", "--json"]
    assert cli.main(words) == 0
    assert [entry["benchmark"] for entry in json.loads(capsys.readouterr().out)] == ["vqa", "rec"]
    for words, said in (
        (["--benchmark", "vqaa"], "there is no benchmark 'vqaa'; choose caption, vqa"),
        (["--benchmark", "coco/vqa"], "no data source has the task 'coco/vqa'"),
        (["--benchmark", "vqa", "--split", "middle"], "there is no split 'middle'"),
        (["--benchmark", "vqa", "--share", "0"], "unknown argument '--share'"),
    ):
        assert cli.main(["evaluate", str(folder), *words]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"lionjax: {said}")


@pytest.mark.slow
def test_training_ends_with_figures_and_the_folder_answers_as_the_parameters_in_memory(tmp_path, capsys):
    config = "import small_lion\n\n\ndef get_config():\n    return small_lion.experiment()\n"
    (tmp_path / "config.py").write_text(config)
    words = ["train", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "run"), "--run.evaluate_limit", "4"]
    assert cli.main(words) == 0
    assert "vqa: 4 questions of heldout" in capsys.readouterr().err
    figures = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {"vqa_accuracy", "rec_accuracy_50"} <= set(figures["metrics"]) and len(figures["stages"]) == 3
    asked = runner.evaluate_model(lionjax.load(tmp_path / "run"), "vqa", limit=4, with_blind=True)
    for key in ("metrics", "blind", "untagged"):
        assert asked[key] == figures["evaluation"]["vqa"][key]
    assert "VQA, accuracy" in write_report(tmp_path / "run").read_text()
    assert cli.main(words) == 0  # all is done, and nothing is asked again
    again = json.loads((tmp_path / "run" / "report.json").read_text())
    assert again["evaluation"] == figures["evaluation"] and again["metrics"] == figures["metrics"]


@pytest.mark.slow
def test_unusable_records_are_skipped_like_bad_records(model, tmp_path, caplog):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "question": "What color is it?", "answer": "red"},
        {"image": "missing.png", "question": "What color is it?", "answer": "red"},
        {"image": "a.png", "question": "what " * 300, "answer": "red"},
    ]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = JsonLines(str(tmp_path / "lines.jsonl"), str(tmp_path), name="mine")
    entry = runner.evaluate_model(model, "vqa", tmp_path, source=source)
    assert entry["samples"] == 1 and entry["benchmark"] == "mine_vqa"
    assert (entry["trained_on"], entry["has_splits"]) == (0, False)
    assert "missing.png" in caplog.text and "takes" in caplog.text
    assert "mine_vqa_accuracy" in json.loads((tmp_path / "report.json").read_text())["metrics"]
    only_bad = dataclasses.replace(source, file=str(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.jsonl").write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(UserError, match="'vqa' has no usable question"):
        runner.evaluate_model(model, "vqa", tmp_path, source=only_bad)


@pytest.mark.slow
def test_evaluate_reads_questions_and_answers_in_the_format_of_vqa(capsys, folder, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "COCO_val2014_000000000007.jpg")
    asked = [{"question_id": k, "image_id": 7, "question": f"How many {k}?"} for k in range(2)]
    said = [{"question_id": k, "answers": [{"answer": str(k)}] * 10} for k in range(2)]
    (tmp_path / "questions.json").write_text(json.dumps({"questions": asked}))
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": said}))
    words = ["--source", str(tmp_path / "questions.json"), "--answers", str(tmp_path / "annotations.json")]
    words += ["--images", str(tmp_path), "--pattern", "COCO_val2014_{:012d}.jpg", "--json"]
    assert cli.main(["evaluate", str(folder), "--benchmark", "vqa", *words]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["benchmark"] == "questions_vqa" and entry["samples"] == 2
    assert [len(row["truth"]) for row in lines(folder, "questions_vqa")] == [10, 10]


@pytest.mark.slow
@shared_data.needs("coco83", "coco258_annotations")
@pytest.mark.parametrize(
    ("words", "tasks", "most"),
    [
        (["coco83", "--share", "0"], ["caption", "existence", "rec", "res", "reg", "tags"], 3),
        (["coco258_annotations/rec_on_coco258.json"], ["rec", "reg"], 85),
        (["coco258_annotations/pope_on_coco258.json"], ["existence"], 54),
    ],
    ids=lambda value: Path(value[0]).stem if isinstance(value, list) else None,
)
def test_evaluate_reads_published_files_about_photographs(capsys, folder, words, tasks, most):
    source, *fields = words
    command = ["evaluate", str(folder), "--benchmark", "all", "--limit", str(most), "--json"]
    command += ["--source", str(SHARED / source), *fields]
    command += ["--images", str(SHARED / "coco83" / "images")] if source.endswith("json") else []
    assert cli.main(command) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["task"] for entry in entries] == [task for task in scoring.SCORERS if task in tasks]
    assert all(0 < entry["samples"] <= most for entry in entries)
    if "pope" in source:
        assert set(entries[0]["kinds"]) == {"random", "popular", "adversarial"}
