# SPDX-License-Identifier: Apache-2.0
"""A model is asked as the protocol says, and its answers are scored as given ones; the model is a scripted one."""

import dataclasses
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
from scripted_benchmarks import FILES, Scripted, Settings, ask

from lionjax.core.errors import LongPromptError, UserError
from lionjax.data.datasets import detect
from lionjax.data.datasets.annotated_images import Annotation
from lionjax.evaluation.protocols import get_protocol
from lionjax.evaluation.published import model_answers, scoring

OKVQA = ("okvqa", "vqa/OpenEnded_mscoco_val2014_questions.json")
TRUTH = "vqa/mscoco_val2014_annotations.json"


def test_a_protocol_decides_question_length_beams_and_penalty(tmp_path):
    model = Scripted()
    entry = ask(tmp_path, *OKVQA, model, "lavis", TRUTH)
    assert model.prompts[0] == "Question: What color is the square? Short Answer:" and len(model.prompts) == 4
    category, config, _, _ = model.calls[0]
    assert category == "image_level" and config == Settings(10, 2, 5, -1.0, False)  # the start token counts
    assert entry["figures"]["overall"] == pytest.approx(25.0) and entry["protocol"] == "lavis"
    ask(tmp_path, *OKVQA, model, "llava", TRUTH)
    assert model.prompts[4].endswith("?\nAnswer the question using a single word or phrase.")
    assert model.calls[1][1] == Settings(128, 0, 1, 1.0, False)


def test_answers_and_the_whole_protocol_are_written_and_score_the_same_when_read_again(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    entry = ask(tmp_path, *OKVQA, Scripted(), "official", TRUTH, folder=folder)
    report = json.loads((folder / "report.json").read_text())["published"]["okvqa@official"]
    assert report == json.loads(json.dumps(entry)) and report["protocol_settings"]["normalizer"] == "vqa"
    file = folder / "evaluation" / "okvqa_official.jsonl"
    again = scoring.score_predictions(OKVQA[0], str(FILES / OKVQA[1]), str(file), answers_file=str(FILES / TRUTH))
    assert again["figures"] == entry["figures"]


def test_training_data_of_the_benchmarks_format_is_said(tmp_path):
    source = detect.detect_source(str(FILES / OKVQA[1]), "", str(FILES / TRUTH))
    assert ask(tmp_path, *OKVQA, Scripted(sources=(source,)), "", TRUTH)["trained_on_train_split"] is True
    assert ask(tmp_path, *OKVQA, Scripted(), "", TRUTH)["trained_on_train_split"] is False
    released = Scripted()
    released.experiment.stages = ()
    assert ask(tmp_path, *OKVQA, released, "", TRUTH)["trained_on_train_split"] is None  # not recorded


def test_missing_pictures_are_counted_and_the_figure_is_over_the_others(tmp_path, caplog):
    source = detect.detect_source(str(FILES / OKVQA[1]), str(tmp_path), str(FILES / TRUTH))
    with pytest.raises(UserError, match="no question of okvqa has its picture"):
        model_answers.evaluate_model(Scripted(), "okvqa", source, get_protocol("okvqa"))
    shutil.copy(FILES / "images/COCO_val2014_000000000001.jpg", tmp_path / "1.jpg")
    entry = model_answers.evaluate_model(Scripted(), "okvqa", source, get_protocol("okvqa"))
    assert entry["missing_pictures"] == {"count": 3, "names": ["2.jpg", "3.jpg", "4.jpg"]}
    assert (entry["questions"], entry["answered"], entry["figures"]["overall"]) == (4, 1, 100.0)


@pytest.mark.parametrize("limit", [74, 10])
def test_prompts_that_are_too_long_are_listed_and_the_figure_is_over_the_others(tmp_path, caplog, limit):
    def reply(prompt):
        if len(prompt) > limit:
            raise LongPromptError(f"the prompt {prompt!r} takes too many tokens")
        return "red"

    if limit == 10:
        with pytest.raises(UserError, match="all prompts of okvqa are too long for the model, which reads 99 tokens"):
            ask(tmp_path, *OKVQA, Scripted(reply), "official", TRUTH)
        return
    whole = ask(tmp_path, *OKVQA, model := Scripted(), "official", TRUTH)
    long = [prompt for prompt in model.prompts if len(prompt) > limit]
    entry = ask(tmp_path, *OKVQA, Scripted(reply), "official", TRUTH)
    assert 0 < len(long) < 4 and entry["long_prompts"]["count"] == len(long)
    assert (entry["questions"], entry["answered"]) == (4, 4 - len(long))
    assert entry["unanswered"] == entry["long_prompts"]["names"] and whole["long_prompts"] == {"count": 0, "names": []}
    assert f"{len(long)} prompts have more than 99 tokens" in caplog.text


def test_candidates_are_ranked_by_the_mean_or_the_sum_of_their_losses(tmp_path):
    model = Scripted(loss=lambda prompt, text: {"1": 3.0, "2": 1.0, "3": 2.0}[text])
    entry = ask(tmp_path, "iconqa", "vqa/iconqa_problems.json", model, "lavis")
    assert model.prompts[0] == "Question: How many shapes are there? Options: (a) 1 (b) 2 (c) 3. Short answer:"
    assert model.calls[0] == (True, [["1", "2", "3"]] * 2) and entry["figures"]["accuracy"] == 50.0
    ask(tmp_path, "iconqa", "vqa/iconqa_problems.json", model, "blip2")
    assert model.calls[1][0] is False


def test_true_and_yes_are_ranked_against_false_and_no(tmp_path):
    model = Scripted(loss=lambda prompt, text: 0.0 if text == ("false" if "above" in prompt else "true") else 1.0)
    entry = ask(tmp_path, "vsr", "vqa/vsr_zeroshot_test.jsonl", model, "lavis")
    assert entry["figures"]["accuracy"] == 75.0 and model.prompts[0].startswith("Based on the image, is this statement")


def test_visual_dialog_scores_every_candidate_after_the_true_rounds(tmp_path):
    model = Scripted(loss=lambda prompt, text: 0.0 if text == "yes" else 1.0)
    entry = ask(tmp_path, "visdial", "vqa/visdial_1.0_val.json", model, limit=2)
    assert model.prompts[1] == "Dialog history: q: is it round a: yes\nQuestion: what color is it Short answer:"
    assert entry["answered"] == 2 and entry["figures"]["r@1"] == 0.5 and entry["figures"]["ties"] == 1


def test_hateful_memes_are_scored_by_the_probability_of_yes(tmp_path):
    model = Scripted(loss=lambda prompt, text: 2.0 if text == "yes" else 1.0)
    entry = ask(tmp_path, "hateful_memes", "vqa/hateful_memes_dev.jsonl", model)
    assert entry["figures"] == {"auroc": 50.0, "accuracy": 50.0}
    source = detect.detect_source(str(FILES / "vqa/hateful_memes_dev.jsonl"), str(tmp_path))
    answers, _, _ = model_answers.predict(
        model, "hateful_memes", get_protocol("hateful_memes"), source.open("heldout", 10**7)
    )
    assert answers.rows[0].prediction["proba"] == pytest.approx(1 / (1 + np.e))


def test_boxes_and_masks_are_asked_region_level(tmp_path):
    model = Scripted(lambda prompt: "[0.083,0.139,0.333,0.472]")
    entry = ask(tmp_path, "rec", "regions/REC_refcoco_unc_val.jsonl", model, "lmms")
    assert entry["figures"]["lmms_first_box_ge_0.5"]["ious"][0] > 0.99 and "red square" in model.prompts[0]
    assert model.calls[0][0] == "region_level"
    mask = np.zeros((72, 96), bool)
    mask[10:35, 8:28] = True
    shutil.copytree(FILES / "regions/reason_seg/val", tmp_path / "val")
    for masks, iou in (([mask], 1.0), ([mask, mask], 0.0), (None, 0.0)):
        reply = None if masks is None else np.array(masks)
        entry = ask(tmp_path, "reason_seg", "regions/reason_seg", Scripted(lambda prompt, r=reply: r))
        assert entry["figures"]["iou"] == iou, "one mask counts, none and two do not"


def ocr_files(folder) -> dict[str, Path]:
    """TextVQA's questions with the words that were read in each image, in Rosetta's file and in LLaVA's."""
    questions = json.loads((FILES / "vqa/TextVQA_0.5.1_val.json").read_text())["data"]
    images = list(dict.fromkeys(row["image_id"] for row in questions))
    words = {image: [f"w{k}" for k in range(40 * number)] for number, image in enumerate(images)}
    rosetta = [{"image_id": image, "ocr_tokens": found, "ocr_info": []} for image, found in words.items()]
    (folder / "TextVQA_Rosetta_OCR_v0.2_val.json").write_text(json.dumps({"data": rosetta}))
    lines = []
    for row in questions:
        found = ", ".join(words[row["image_id"]])
        text = f"{row['question']}\nReference OCR token: {found}\nAnswer the question using a single word or phrase."
        lines.append(json.dumps({"question_id": row["image_id"], "image": "", "text": text}))
    (folder / "llava_textvqa_val_v051_ocr.jsonl").write_text("\n".join(lines))
    return {
        "rosetta": folder / "TextVQA_Rosetta_OCR_v0.2_val.json",
        "llava": folder / "llava_textvqa_val_v051_ocr.jsonl",
    }


@pytest.mark.parametrize("kind", ["rosetta", "llava"])
def test_textvqa_is_asked_with_ocr_tokens_as_llava_and_instructblip_write_them(tmp_path, kind):
    file, question = "vqa/TextVQA_0.5.1_val.json", "What color is the square?"
    source = detect.detect_source(str(FILES / file), "", str(ocr_files(tmp_path)[kind]))
    annotations = source.open("heldout", 10**7).annotations["vqa"]
    llava, lavis, official = (get_protocol("textvqa", name) for name in ("llava", "lavis", "official"))
    short = "Answer the question using a single word or phrase."
    first, second = annotations[0], annotations[1]
    assert model_answers.format_prompt(llava, first) == f"{question}\nReference OCR token: \n{short}"
    all_words = ", ".join(f"w{k}" for k in range(40))
    assert model_answers.format_prompt(llava, second) == (
        f"{second.question}\nReference OCR token: {all_words}\n{short}"
    )
    thirty = ", ".join(f"w{k}" for k in range(30))
    assert (
        model_answers.format_prompt(lavis, second) == f"OCR tokens: {thirty}. Question: {second.question} Short answer:"
    )
    assert model_answers.format_prompt(official, second) == f"{second.question}\n{short}"
    without = detect.detect_source(str(FILES / file)).open("heldout", 10**7).annotations["vqa"][0]
    assert model_answers.format_prompt(llava, without) == f"{question}\n{short}"
    assert model_answers.format_prompt(lavis, without) == f"Question: {question} Short Answer:"


def test_a_question_whose_image_the_ocr_file_lacks_is_a_bad_record_and_another_file_is_refused(tmp_path):
    path = tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json"
    source = detect.detect_source(str(FILES / "vqa/TextVQA_0.5.1_val.json"), "", str(path))
    path.write_text(json.dumps({"data": [{"image_id": "0000000000000002", "ocr_tokens": []}]}))
    problems = [one.problem for one in source.open("heldout", 10**7).annotations["vqa"] if one.problem]
    assert "has no image '0000000000000001'; give the OCR file of the split" in problems[0] and len(problems) < 4
    path.write_text(json.dumps({"data": [{"image_id": "1"}]}))
    with pytest.raises(UserError, match="has null as 'ocr_tokens'; give a list of words"):
        source.open("heldout", 10**7)
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question_id": "1", "text": "What?"}))
    with pytest.raises(UserError, match="has no line 'Reference OCR token: ...'"):
        dataclasses.replace(source, ocr_file=str(path)).open("heldout", 10**7)


def test_lisa_asks_long_and_short_queries_of_reason_seg_in_its_two_ways():
    short, long = (Annotation(0, words="what rolls", kind=kind) for kind in ("short", "long"))
    lisa, nextchat = (get_protocol("reason_seg", name) for name in ("lisa", "nextchat"))
    assert model_answers.format_prompt(lisa, short) == "Can you segment the what rolls in this image?"
    assert model_answers.format_prompt(lisa, long) == "what rolls Please output segmentation mask."
    assert model_answers.format_prompt(nextchat, long) == "Segment what rolls."


def test_a_region_is_described_by_the_box_in_the_prompt(tmp_path):
    model = Scripted(lambda prompt: "red square")
    ask(tmp_path, "reg", "regions/refcoco_minigpt4.json", model, "nextchat")
    boxes = model.calls[0][2]
    assert model.prompts[0] == "What is in {box}?"
    assert boxes[0][0] == pytest.approx((8 / 96, 10 / 72, 32 / 96, 34 / 72))


def test_mmbench_and_seed_are_asked_with_lettered_options(tmp_path):
    model = Scripted(lambda prompt: "B")
    entry = ask(tmp_path, "mmbench", "choice/mmbench_circular.tsv", model)
    options, ending = (
        "A. a square\nB. a disc\nC. a line",
        "Answer with the option's letter from the given choices directly.",
    )
    assert model.prompts[0] == f"What is left?\n{options}\n{ending}"
    assert entry["figures"]["vanilla"]["overall"] == pytest.approx(100 / 3)
    entry = ask(tmp_path, "seed", "choice/SEED-Bench.json", model)
    assert entry["figures"]["all"] == 100.0


def test_judged_answers_are_written_for_the_judge_and_have_no_figures(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    entry = ask(tmp_path, "owleval", "judged/owleval_questions.jsonl", Scripted(), folder=folder)
    assert entry["figures"] == {} and entry["answered"] == 4
    rows = [json.loads(line) for line in (folder / "evaluation/owleval_official.jsonl").read_text().splitlines()]
    assert rows[0] == {"question_id": "1", "question": "What is odd here?", "picture": "1.jpg"} | {
        "answer": "red",
        "picture_copy": "pictures/owleval_official_0.jpg",
    }


def test_each_phrase_of_a_sentence_is_asked_after_the_words_before_it(tmp_path):
    class Boxes(Scripted):
        def answer(self, images, prompts, **options):
            super().answer(images, prompts, **options)
            box = np.array([[8, 10, 32, 34]]) / [96, 72, 96, 72]
            boxes = {"square": box, "disc": np.zeros((0, 4))}
            words = ["square" if "square</phrase>" in prompt else "disc" for prompt in prompts]
            return [types.SimpleNamespace(boxes=boxes[word]) for word in words]

    model = Boxes()
    entry = ask(tmp_path, "flickr30k_entities", "regions/flickr30k_entities", model)
    start = "<grounding> A red square and "
    assert model.prompts[:2] == ["<grounding> <phrase> A red square</phrase>", f"{start}<phrase> a blue disc</phrase>"]
    assert model.calls[0][0] == "region_level" and entry["answered"] == 2
    assert entry["figures"]["any"]["1"]["all"] == 0.25, "of four phrases the first box is right"
    assert entry["interval"][0] <= 0.25 <= entry["interval"][1]


def test_a_run_that_broke_off_asks_only_the_batches_that_its_journal_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(model_answers, "BATCH_SIZE", 2)
    folder = tmp_path / "run"
    wanted = ask(tmp_path, *OKVQA, Scripted(), "lavis", TRUTH, folder=folder, blind=True)
    results = (folder / "evaluation" / "okvqa_lavis.jsonl").read_text()
    journal = folder / "evaluation" / "okvqa_lavis.journal.jsonl"
    assert not journal.exists(), "what is finished is in the file of results"
    asked = []

    def breaks_off(prompt):
        asked.append(prompt)
        if len(asked) == 7:  # of four questions and four blind ones
            raise KeyboardInterrupt
        return "red"

    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path, *OKVQA, Scripted(breaks_off), "lavis", TRUTH, folder=folder, blind=True)
    assert len(journal.read_text().splitlines()) == 1 + 3, "the settings, two batches and a blind one"
    model = Scripted()
    model.engine.model = "another"
    with pytest.raises(UserError, match="answers of another model"):
        ask(tmp_path, *OKVQA, model, "lavis", TRUTH, folder=folder, blind=True)
    with pytest.raises(UserError, match="another set of questions"):
        ask(tmp_path, *OKVQA, Scripted(), "lavis", TRUTH, folder=folder, blind=True, split="train")
    model = Scripted()
    found = ask(tmp_path, *OKVQA, model, "lavis", TRUTH, folder=folder, blind=True)
    assert len(model.prompts) == 2, "the last blind batch alone is asked again"
    assert found | {"seconds": 0} == wanted | {"seconds": 0} and not journal.exists()
    assert (folder / "evaluation" / "okvqa_lavis.jsonl").read_text() == results
