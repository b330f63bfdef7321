# SPDX-License-Identifier: Apache-2.0
"""All benchmarks under a folder, asked by one command: what is found, intervals and baselines, table and gallery."""

import json
import re
import shutil

import numpy as np
import pytest
import scripted_benchmarks
from scripted_benchmarks import FILES, Scripted, ask

import lionjax
from lionjax import cli
from lionjax.core.types import UserError
from lionjax.data.datasets import detect
from lionjax.evaluation.protocols import get_protocol
from lionjax.evaluation.published import question_scores, results, scoring
from lionjax.evaluation.published.discovery import find_benchmarks, is_root
from lionjax.evaluation.published.model_answers import reads_same_files
from lionjax.evaluation.published.predictions import join_answers
from lionjax.evaluation.report.results_page import format_number, write_results_page

FOUND = {
    *("aokvqa vqav2 okvqa textvqa vizwiz gqa vsr visdial hateful_memes docvqa ocrvqa iconqa scienceqa seed".split()),
    *("mmbench pope mme llava_bench owleval rec res reason_seg flickr30k_entities".split()),
    *("coco_karpathy flickr30k textcaps nocaps".split()),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with all files of the fixtures, and pictures."""
    folder = tmp_path_factory.mktemp("benchmarks") / "all"
    shutil.copytree(FILES, folder)
    shutil.copy(folder / "vqa" / "iconqa_problems.json", folder / "vqa" / "problems.json")
    shutil.copy(folder / "vqa" / "iconqa_pid_splits.json", folder / "vqa" / "pid_splits.json")
    for name in ("iconqa_problems.json", "iconqa_pid_splits.json", "problems.json", "pid_splits.json"):
        (folder / "vqa" / name).unlink()
    iconqa = folder / "iconqa"
    iconqa.mkdir()
    for name in ("problems", "pid_splits"):
        shutil.copy(FILES / "vqa" / f"iconqa_{name}.json", iconqa / f"{name}.json")
    ids = {row["image_id"] for row in json.loads((folder / "vqa/TextVQA_0.5.1_val.json").read_text())["data"]}
    words = {"data": [{"image_id": image, "ocr_tokens": ["stop"]} for image in sorted(ids)]}
    (folder / "vqa/TextVQA_Rosetta_OCR_v0.2_val.json").write_text(json.dumps(words))
    for entry in find_benchmarks(folder)[0]:
        scripted_benchmarks.put_pictures(entry.source, folder / "images")
    return folder


def test_every_benchmark_of_a_folder_is_found_once_with_its_answers_and_pictures(root):
    found, left_out = find_benchmarks(root)
    names = [entry.name for entry in found]
    assert set(names) == FOUND and names.count("pope") == 3
    assert all(names.count(name) == 1 for name in ("coco_karpathy", "scienceqa", "iconqa"))
    by_name = {entry.name: entry for entry in found}
    assert by_name["okvqa"].source.answers.endswith("vqa/mscoco_val2014_annotations.json")
    assert by_name["visdial"].source.dense.endswith("dense_annotations.json")
    assert by_name["textvqa"].source.ocr_file.endswith("vqa/TextVQA_Rosetta_OCR_v0.2_val.json")
    assert by_name["okvqa"].source.image_dir == str((root / "images").resolve())
    assert "it has the captions of dataset_coco.json" in left_out[str(root / "captions/coco_karpathy_test.json")]
    assert not any("results" in path or "answers" in path or "predictions" in path for path in left_out)


def test_a_folder_without_benchmarks_is_one_sentence(tmp_path):
    (tmp_path / "notes.json").write_text('[{"a": 1}]')
    with pytest.raises(UserError, match="no published benchmark was found under"):
        find_benchmarks(tmp_path)
    assert is_root(str(tmp_path)) and not is_root(None) and not is_root(str(FILES / "choice"))


def test_questions_without_their_answers_are_left_out_with_the_reason(tmp_path):
    shutil.copy(FILES / "vqa/OpenEnded_mscoco_val2014_questions.json", tmp_path)
    shutil.copy(FILES / "yes_no/coco_pope_random.json", tmp_path)
    found, left_out = find_benchmarks(tmp_path)
    assert [entry.name for entry in found] == ["pope"]
    (reason,) = left_out.values()
    assert "give the file of its answers" in reason


def rows_of(name, file, predictions, answers=""):
    path = FILES / file
    source = scoring.whole_source(
        name, detect.detect_source(str(path), "", str(FILES / answers) if answers else ""), ""
    )
    dataset = scoring.open_benchmark(name, source, "heldout")
    benchmark = scoring.BENCHMARKS[name]
    return join_answers(dataset, benchmark.tasks, str(path), FILES / predictions, benchmark.wanted).rows


OKVQA = (
    *("okvqa", "vqa/OpenEnded_mscoco_val2014_questions.json", "vqa/okvqa_results.json"),
    "vqa/mscoco_val2014_annotations.json",
)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (OKVQA, [1.0, 1.0, 0.6, 0.0]),
        (("pope", "yes_no/coco_pope_adversarial.json", "yes_no/pope_answers_adversarial.jsonl"), None),
        (("docvqa", "vqa/docvqa_val_v1.0.json", "vqa/docvqa_results.json"), None),
        (("scienceqa", "choice", "choice/scienceqa_answers.jsonl"), [1.0, 1.0, 1.0, 0.0]),
    ],
)
def test_scores_of_questions_have_the_figure_as_their_mean(arguments, expected):
    name, rows, protocol = arguments[0], rows_of(*arguments), get_protocol(arguments[0])
    scores = question_scores.question_scores(name, protocol, rows)
    assert all(0 <= score <= 1 for score in scores) and (expected is None or scores == pytest.approx(expected))
    key = "accuracy" if name == "pope" else scoring.BENCHMARKS[name].figure[""]
    figure = scoring.BENCHMARKS[name].score(rows, protocol)[key]
    assert np.mean(scores) == pytest.approx(figure / question_scores.QUESTION_MAXIMUM.get(name, 100.0))


def test_intervals_hold_the_figure_and_shrink_with_more_questions():
    protocol = get_protocol("okvqa")
    rows = rows_of(*OKVQA)
    widths = []
    for copies in (1, 25):
        many = [question_scores._renamed(row, k) for k in range(copies) for row in rows]
        low, high = question_scores.interval(
            "okvqa", protocol, many, question_scores.question_scores("okvqa", protocol, many)
        )
        assert low <= 65.0 <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3


def test_the_rotations_of_a_question_and_the_questions_of_an_image_are_resampled_together():
    rows = rows_of("mmbench", "choice/mmbench_circular.tsv", "choice/mmbench_predictions.json")
    protocol = get_protocol("mmbench")
    low, high = question_scores.interval("mmbench", protocol, rows, None)
    thirds = {round(100 * k / 3, 4) for k in range(4)}  # of three questions; apart, rotations would give other values
    values = {round(edge, 4) for edge in (low, high)}
    assert values <= thirds and low <= 66.6667 <= high
    mme = rows_of("mme", "yes_no/mme", "yes_no/mme")
    low, high = question_scores.interval("mme", get_protocol("mme"), mme, None)
    assert low <= 1175.0 <= high


def test_the_best_constant_answer_is_chosen_among_those_of_the_benchmark():
    pope = rows_of("pope", "yes_no/coco_pope_random.json", "yes_no/pope_answers_random.jsonl")
    found = question_scores.majority("pope", get_protocol("pope"), pope)
    assert found == {"answer": "yes", "value": pytest.approx(2 / 3)}
    assert question_scores.majority("okvqa", get_protocol("okvqa"), rows_of(*OKVQA))["value"] == pytest.approx(25.0)
    rec = rows_of("rec", "regions/REC_refcoco_unc_val.jsonl", "regions/rec_answers.jsonl")
    rec = [row._replace(image=scoring.dataclasses.replace(row.image, width=96.0, height=72.0)) for row in rec]
    assert question_scores.majority("rec", get_protocol("rec", "lmms"), rec)["value"] >= 12.5
    assert question_scores.majority("rec", get_protocol("rec", "minigpt_v2"), rec) is None  # no digits are read
    visdial = rows_of("visdial", "vqa/visdial_1.0_val.json", "vqa/visdial_scores.json")
    assert question_scores.majority("visdial", get_protocol("visdial"), visdial) is None


def test_blind_answers_are_to_pictures_in_the_mean_color(tmp_path):
    class Sighted(Scripted):
        def answer(self, images, prompts, **options):
            self.colors = [image.getpixel((0, 0)) for image in images]
            replies = ["yes" if color == (128, 64, 0) else "no" for color in self.colors]
            return [scripted_benchmarks.types.SimpleNamespace(text=text) for text in replies]

    model = Sighted()
    entry = ask(tmp_path, "pope", "yes_no/coco_pope_random.json", model, blind=True)
    assert set(model.colors) == {(128, 64, 0)}
    assert entry["blind"]["value"] == pytest.approx(2 / 3) and entry["figures"]["yes_ratio"] == 0.0
    assert entry["seconds"] > 0 and len(entry["interval"]) == 2


def test_json_lines_of_another_file_are_no_sign_of_training():
    pope = detect.detect_source(str(FILES / "yes_no/coco_pope_random.json"))
    other = detect.detect_source(str(FILES / "yes_no/coco_pope_popular.json"))
    assert reads_same_files(pope, [pope]) and not reads_same_files(pope, [other])


def answers_of(prompt):
    return "yes" if "yes or no" in prompt or prompt.startswith("Is ") else "[0.083,0.139,0.333,0.472]"


@pytest.fixture(scope="module")
def page(root, tmp_path_factory):
    """(folder, entries, model) of one command over all fixtures."""
    folder, model = tmp_path_factory.mktemp("run"), Scripted(answers_of)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lionjax, "load", lambda folder, **options: model, raising=False)
        code = cli.main(
            ["evaluate", str(folder), "--benchmark", "all", "--source", str(root), "--limit", "6", "--json"]
        )
    assert code == 0
    return folder, json.loads((folder / "report.json").read_text()), model


def test_one_command_asks_all_of_them_and_says_what_is_left_out(page):
    _, report, _ = page
    names = {entry["benchmark"] for entry in report["published"].values()}
    assert names == FOUND
    copies = {path for path, reason in report["published_left_out"].items() if "it has the captions of" in reason}
    assert copies == set(report["published_left_out"])
    pope = report["published"]["pope/coco_pope_random@official"]
    assert pope["figures"]["recall"] == 1.0 and {"interval", "blind", "majority", "seconds"} <= pope.keys()


def test_the_markdown_table_has_a_row_a_result_with_peers_of_the_same_protocol(page):
    folder, report, _ = page
    lines = (folder / "results.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == len(report["published"]) + 2
    (pope,) = [line for line in rows if "coco_pope_random " in line]
    assert "LION-12B" in pope and "LLaVA-1.5-7B" not in pope and "| official | f1_score | 0.6667 |" in pope
    (owleval,) = [line for line in rows if "owleval" in line]
    assert "to be judged" in owleval
    assert any(line.startswith("- ") and "it has the captions of" in line for line in lines)


def test_the_gallery_has_right_and_wrong_answers_with_pictures_and_controls(page):
    folder, _, _ = page
    text = (folder / "results.html").read_text()
    cards = re.findall(r'<div class="answer" data-benchmark="([^"]*)" data-mark="(\w*)"><img', text)
    assert {mark for name, mark in cards if name.startswith("pope")} == {"right", "wrong"}
    assert {mark for name, mark in cards if name.startswith("coco_karpathy")} == {""}
    assert '<select id="benchmark">' in text and "http" not in re.sub(r"data:image[^\"]*", "", text)


def test_a_second_command_asks_nothing_again(page, root):
    folder, report, model = page
    asked = len(model.prompts)
    entries, _ = results.evaluate_root(model, root, folder, limit=6)
    assert len(model.prompts) == asked and len(entries) == len(report["published"])
    results.evaluate_root(model, root / "yes_no", folder, image_dir=str(root / "images"), limit=2)
    assert len(model.prompts) > asked


def test_a_killed_run_goes_on_with_the_benchmarks_that_have_no_result(tmp_path, root):
    class Killed(Scripted):
        def answer(self, images, prompts, **options):
            if len(self.prompts) >= 8:
                raise KeyboardInterrupt
            return super().answer(images, prompts, **options)

    with pytest.raises(KeyboardInterrupt):
        results.evaluate_root(
            Killed(answers_of), root / "yes_no", tmp_path, image_dir=str(root / "images"), blind=False
        )
    before = json.loads((tmp_path / "report.json").read_text())["published"]
    assert len(before) == 2
    model, arguments = Scripted(answers_of), {"image_dir": str(root / "images"), "blind": False}
    entries, _ = results.evaluate_root(model, root / "yes_no", tmp_path, **arguments)
    assert (
        len(entries) == 4 and len(model.prompts) == 4 + 56 and entries[0] == before[f"{entries[0]['label']}@official"]
    )
    whole, _ = results.evaluate_root(Scripted(answers_of), root / "yes_no", tmp_path / "whole", **arguments)
    assert [entry["figures"] for entry in whole] == [entry["figures"] for entry in entries]


def test_answer_files_of_the_gallery_can_still_be_scored(page):
    folder, report, _ = page
    source = FILES / "regions/REC_refcoco_unc_val.jsonl"
    entry = report["published"]["rec/REC_refcoco_unc_val@shikra"]
    lines = (folder / "evaluation/rec_REC_refcoco_unc_val_shikra.jsonl").read_text().splitlines()
    assert len(lines) == 6 and json.loads(lines[0])["boxes"] == [[0.083, 0.139, 0.333, 0.472]]
    answers = folder / "six.jsonl"
    answers.write_text("\n".join([*lines, *lines[:2]]))
    again = scoring.score_predictions("rec", str(source), str(answers), image_dir=str(FILES / "images"))
    assert next(iter(again["figures"].values()))["ious"][:6] == next(iter(entry["figures"].values()))["ious"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--source", "choice", "--protocol", "lmms"), "--protocol with --benchmark all needs --source, a folder with"),
        (("--source", "vqa", "--answers", "x.json"), "--answers is for one file"),
        (("--source", "vqa", "--heldout_fraction", "0"), "fields of one source cannot be set"),
    ],
)
def test_options_that_would_change_nothing_are_refused(capsys, tmp_path, options, words):
    name, file, *more = options
    assert cli.main(["evaluate", str(tmp_path), "--benchmark", "all", name, str(FILES / file), *more]) == 2
    assert words in capsys.readouterr().err


def test_the_accuracy_of_mmbenchs_first_rotations_stands_beside_the_circular_one():
    rows = rows_of("mmbench", "choice/mmbench_circular.tsv", "choice/mmbench_predictions.json")
    figures = scoring.BENCHMARKS["mmbench"].score(rows, get_protocol("mmbench"))
    overall = figures["circular_lmms_static"]["overall"], figures["vanilla"]["overall"]
    assert overall == (pytest.approx(200 / 3), 100.0)


def test_a_page_without_results_is_one_sentence_and_numbers_are_short(tmp_path):
    with pytest.raises(UserError, match="has no results of published benchmarks"):
        write_results_page(tmp_path)
    assert [format_number(value) for value in (None, 0.66666, 1175.0)] == ["", "0.6667", "1175.00"]
