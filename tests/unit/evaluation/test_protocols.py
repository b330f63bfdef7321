# SPDX-License-Identifier: Apache-2.0
"""Protocols: the same answers have other figures under another name, by the rules of each harness."""

import json
import string
from pathlib import Path

import numpy as np
import pytest

from lionjax.core.types import UserError
from lionjax.evaluation.metrics import box_reading, choices, judged, ranking, vqa, yes_no
from lionjax.evaluation.metrics.captions import tokenize
from lionjax.evaluation.protocols import PROTOCOLS, Protocol, get_protocol
from lionjax.evaluation.published.scoring import BENCHMARKS, score_predictions
from lionjax.evaluation.published_figures import PUBLISHED

FILES = Path(__file__).resolve().parents[2] / "data" / "benchmarks"
FIELDS = {"question", "hint", "statement", "expr", "text", "history", "options_lines", "options_round", "options"}


def score(key, source, answers, protocol, **options):
    return score_predictions(key, str(FILES / source), str(FILES / answers), protocol, **options)


def test_every_benchmark_has_protocols_of_different_names_and_known_parts():
    assert PROTOCOLS.keys() == BENCHMARKS.keys()
    readers = {*yes_no.YES_NO_READERS, *box_reading.BOX_READERS, "text", "choice_letter", "option", "exact_letter"}
    for name, protocols in PROTOCOLS.items():
        fields = {"before", "phrase"} if name == "flickr30k_entities" else FIELDS
        assert len({protocol.name for protocol in protocols}) == len(protocols)
        for protocol in protocols:
            named = {name for _, name, _, _ in string.Formatter().parse(protocol.prompt) if name}
            assert named <= fields and protocol.reader in {*readers, "lower_case_without_dot"}
    with pytest.raises(ValueError, match="answer_form is 'guess'"):
        Protocol("x", answer_form="guess")


def test_every_published_figure_names_a_protocol_of_its_benchmark():
    for figure in PUBLISHED:
        assert get_protocol(figure.benchmark, figure.protocol).name == figure.protocol, figure


def test_official_is_the_first_protocol_where_none_is_called_so():
    assert get_protocol("mmbench", "official") == get_protocol("mmbench") == get_protocol("mmbench", "lmms")
    with pytest.raises(UserError, match="choose one of lmms, vlmevalkit, official"):
        get_protocol("mmbench", "lavis")


def test_the_main_figure_follows_the_protocol():
    gqa = ("vqa/gqa_testdev_balanced_questions.json", "vqa/gqa_testdev_balanced_predictions.json")
    values = [score("gqa", *gqa, name)["main_figure"]["value"] for name in ("official", "lavis", "lmms", "llava")]
    assert values == [50.0, 75.0, 50.0, 50.0]
    aokvqa = ("vqa/aokvqa_v1p0_val.json", "vqa/aokvqa_predictions_val.json")
    values = [score("aokvqa", *aokvqa, name)["main_figure"]["value"] for name in ("official", "lavis")]
    assert values == pytest.approx([800 / 9, 200 / 3])
    vizwiz = ("vqa/vizwiz_val.json", "vqa/vizwiz_results.json")
    values = [score("vizwiz", *vizwiz, name)["figures"]["accuracy"] for name in ("official", "minigpt4")]
    assert values == [75.0, 50.0]  # "Unanswerable" is no reference unless it is normalized


def test_an_entry_says_its_whole_protocol_and_which_peers_saw_the_train_split():
    files = ("vqa/OpenEnded_mscoco_val2014_questions.json", "vqa/okvqa_results.json")
    entry = score("okvqa", *files, "lavis", answers_file=str(FILES / "vqa/mscoco_val2014_annotations.json"))
    settings = entry["protocol_settings"]
    assert settings["prompt"] == "Question: {question} Short Answer:" and settings["num_beams"] == 5
    assert (settings["max_new_tokens"], settings["length_penalty"], settings["normalizer"]) == (10, -1.0, "vqa")
    peers = {peer["model"]: peer["trained"] for peer in entry["published"] if peer["protocol"] == "lavis"}
    assert peers == {"InstructBLIP Vicuna-7B, finetuned": True}
    assert json.loads(json.dumps(entry)) == entry


BOXES = {
    "[0.1,0.2,0.3,0.4]": dict.fromkeys(("strict", "first_box", "normalized_box", "lenient"), (0.1, 0.2, 0.3, 0.4)),
    "[0.1, 0.2, 0.3, 0.4]": {"strict": None, "first_box": (0.1, 0.2, 0.3, 0.4)},
    "[0.1,0.2,0.3,0.4] [0,0,1,1]": {"strict": None, "first_box": (0.1, 0.2, 0.3, 0.4)},
    "[0.1,0.2,0.3,0.4;0,0,1,1]": {"strict": None, "first_box": None},
    "(0.1, 0.2, 0.3, 0.4)": {"strict": None, "first_box": None, "lenient": (0.1, 0.2, 0.3, 0.4)},
    "[0.3,0.4,0.1,0.2]": {
        "strict": (0.3, 0.4, 0.1, 0.2),
        "first_box": (0.3, 0.4, 0.1, 0.2),
        "lenient": (0.1, 0.2, 0.3, 0.4),
    },
    "[100, 200, 300, 400]": {"normalized_box": (0.1, 0.2, 0.3, 0.4), "lenient": None},
    "{<10><20><30><40>}": {"hundredths": (0.1, 0.2, 0.3, 0.4), "strict": None},
    "<patch_index_0000><patch_index_1023>": {"location_tokens": (0.5 / 32, 0.5 / 32, 31.5 / 32, 31.5 / 32)},
}


@pytest.mark.parametrize("text", BOXES)
def test_each_harness_reads_boxes_by_its_own_rules(text):
    for reader, box in BOXES[text].items():
        found = box_reading.BOX_READERS[reader](text)
        assert found == box if box is None else found == pytest.approx(box), reader


def rec(tmp_path, answers, protocol):
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in answers))
    source = str(FILES / "regions/REC_refcoco_unc_val.jsonl")
    (figures,) = score_predictions("rec", source, str(path), protocol, str(FILES / "images"))["figures"].values()
    return figures


def test_reversed_corners_and_round_brackets_are_zero_where_lmms_gives_zero(tmp_path):
    answers = ["[0.333,0.472,0.083,0.139]", "(0.625, 0.5, 0.917, 0.889)"] + ["none"] * 6
    assert rec(tmp_path, answers, "lmms")["ious"][:2] == [0, 0] and rec(tmp_path, answers, "lmms")["unreadable"] == 7
    lenient = rec(tmp_path, answers, "lion")
    assert min(lenient["ious"][:2]) > 0.99 and lenient["accuracy"] == 25.0


def test_a_box_of_half_the_area_counts_at_0_5_but_not_above(tmp_path):
    half = ["[0.08333333,0.13888889,0.20833333,0.47222222]"] + ["none"] * 7  # left half of 8 10 32 34
    source = json.loads((FILES / "regions/REC_refcoco_unc_val.jsonl").read_text().splitlines()[0])
    assert source["bbox"] == [8, 10, 32, 34]
    iou = rec(tmp_path, half, "lmms")["ious"][0]
    assert iou == pytest.approx(0.5, abs=1e-6)
    exact = ["[0.0,0.0,0.5,1.0]"]
    path = tmp_path / "one.json"
    path.write_text(json.dumps([{"img_id": "1_2", "sents": "a", "bbox": [0, 0, 8, 8], "height": 8, "width": 8}]))
    (tmp_path / "p.json").write_text(json.dumps(exact))
    values = {}
    for name in ("shikra", "lion", "lmms", "vlmevalkit"):
        (figures,) = score_predictions("rec", str(path), str(tmp_path / "p.json"), name)["figures"].values()
        values[name] = figures["accuracy"]
    assert values == {"shikra": 0.0, "lion": 0.0, "lmms": 100.0, "vlmevalkit": 100.0}


def test_boxes_of_the_padded_square_are_compared_in_the_square(tmp_path):
    # 96 x 72 is padded by 12 rows above: 8 10 32 34 lies at 8 22 32 46 of 96.
    text = f"[{8 / 96:.6f},{22 / 96:.6f},{32 / 96:.6f},{46 / 96:.6f}]"
    answers = [text] + ["none"] * 7
    assert rec(tmp_path, answers, "shikra_padded")["ious"][0] == pytest.approx(1, abs=1e-4)
    assert rec(tmp_path, answers, "shikra")["ious"][0] < 0.75


@pytest.mark.parametrize(
    ("text", "pope", "whole_answer", "one_word", "answer_sentence", "mme"),
    [
        ("Yes", True, True, True, True, True),
        ("No.", False, None, False, False, False),
        ("NO", True, False, False, False, False),
        ("The answer is yes.", True, None, True, True, None),
        ("So the answer is no .", False, None, False, False, None),
        ("Yes, not no", False, None, None, True, True),
        ("Nothing", True, None, None, False, False),
        ("It is yes", True, None, True, True, None),
        ("I'd say no", False, None, False, False, None),
        ("", True, None, None, False, None),
    ],
)
def test_each_harness_reads_yes_and_no_by_its_own_rules(text, pope, whole_answer, one_word, answer_sentence, mme):
    read = yes_no.YES_NO_READERS
    assert read["pope"](text) is pope and read["whole_answer"](text) is whole_answer
    assert read["one_word"](text) is one_word and read["answer_sentence"](text) is answer_sentence
    assert read["mme"](text) is mme


def test_no_with_a_dot_is_neither_for_lmms_and_gives_f1_1_at_accuracy_one_half():
    predicted = [yes_no.read_whole_answer(text) for text in ("yes", "No.", "yes", "No.")]
    scores = yes_no.yes_no_scores(predicted, [True, False, True, False])
    assert scores["accuracy"] == 0.5 and scores["f1_score"] == 1.0 and scores["yes_ratio"] == 0.5


def test_the_three_settings_of_pope_are_averaged(tmp_path):
    folders = tmp_path / "questions", tmp_path / "answers"
    for folder, kind in zip(folders, ("coco_pope", "pope_answers")):
        folder.mkdir()
        for file in (FILES / "yes_no").glob(f"{kind}_*"):
            (folder / file.name).write_bytes(file.read_bytes())
    entry = score_predictions("pope", *map(str, folders))
    assert entry["main_figure"] == {"name": "mean.f1_score", "value": pytest.approx((1.0 + 0.5 + 0.8) / 3)}
    assert entry["figures"]["popular"]["accuracy"] == 0.5 and entry["questions"] == 12
    next(folders[1].glob("*popular*")).unlink()
    with pytest.raises(UserError, match="0 files of POPE's setting 'popular'"):
        score_predictions("pope", *map(str, folders))


def test_an_option_is_read_from_a_lone_letter_or_from_its_text():
    options = {"A": "red", "B": "light blue", "C": "blue"}
    texts = [
        "B",
        "(B).",
        "The answer is B.",
        "A green one and more",
        "it is red",
        "light blue",
        "A",
        "B or C",
        "B: blue",
    ]
    assert [choices.read_option(text, options) for text in texts] == ["B", "B", "B", "", "A", "", "A", "", "B"]
    assert choices.read_candidate("(b)", ["x", "y"]) == 1 and choices.read_candidate("Y.", ["x", "y"]) == 1
    assert choices.read_candidate("c", ["x", "y"]) is None


def test_anls_divides_by_the_longer_unprocessed_text_and_is_0_below_one_half():
    assert vqa.anls("ACNE", ["ACME"]) == 0.75 and vqa.anls("abcd", ["abxy", "zz"]) == 0.5
    assert vqa.anls("abc", ["abxyz"]) == 0 and vqa.anls("Blue  Ridge", ["blue ridge"]) == 1
    assert vqa.edit_distance("kitten", "sitting") == 3 and vqa.edit_distance("", "ab") == 2


def test_auroc_counts_ties_as_half():
    rng = np.random.default_rng()
    scores, labels = rng.integers(0, 6, 40) / 5, rng.integers(0, 2, 40).astype(bool)
    labels[:2] = True, False
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
    assert yes_no.auroc(scores, labels) == pytest.approx(np.mean(pairs))
    assert np.isnan(yes_no.auroc([0.1, 0.2], [True, True]))


def test_equal_scores_share_their_mean_rank():
    assert ranking.mean_ranks(np.array([0.5, 0.9, 0.5, 0.1])).tolist() == [2.5, 1, 2.5, 4]
    assert ranking.ndcg(np.array([3, 2, 1.0]), np.array([0, 1.0, 0])) == 0
    assert ranking.ndcg(np.array([3, 2, 1.0]), np.array([1.0, 0, 0.5])) == pytest.approx(1 / (1 + 0.5 / np.log2(3)))


def test_replies_that_cannot_be_read_count_as_minus_one_or_are_left_out():
    files = ("judged/questions.jsonl", "judged/judge_replies.json")
    official, readable = (score("llava_bench", *files, name) for name in ("official", "readable"))
    assert official["figures"]["unreadable"] == readable["figures"]["unreadable"] == 3
    assert readable["figures"]["printed"][0] == "all 77.8 90.0 70.0"
    assert [judged.parse_judge_scores(text) for text in ("8 7", "8,7", "8 x", "")] == [
        [8, 7],
        [8, 7],
        [-1, -1],
        [-1, -1],
    ]


def test_numbers_behind_no_stay_one_token_with_its_dot():
    # as by the Java tokenizer of coco-caption
    assert tokenize("a bus numbered no. 21 waits") == ["a", "bus", "numbered", "no.", "21", "waits"]
    assert tokenize("No. 7 is no.7") == ["no.", "7", "is", "no.", "7"]
    assert tokenize("the sign says no. It is red") == ["the", "sign", "says", "no", "it", "is", "red"]


def test_nocaps_counts_document_frequencies_inside_each_domain():
    figures = score("nocaps", "captions/nocaps_val_4500_captions.json", "captions/nocaps_val_results.json", "")[
        "figures"
    ]
    assert figures["out-domain"]["CIDEr"] == 0 and figures["in-domain"]["CIDEr"] == 0
    assert figures["near-domain"]["CIDEr"] != pytest.approx(figures["entire"]["CIDEr"])


def test_reg_counts_all_expressions_or_only_the_first(tmp_path):
    answers, source = tmp_path / "answers.json", str(FILES / "regions/refcoco/refs(unc).p")
    answers.write_text(json.dumps({"1": "the square that is red"}))
    names = ("kosmos2", "nextchat")
    values = [score_predictions("reg", source, str(answers), name)["figures"]["ROUGE_L"] for name in names]
    assert values[0] == 1 and values[1] < 0.6
