# SPDX-License-Identifier: Apache-2.0
"""The page of a run."""

import html.parser
import inspect
import json
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from lionjax.core.types import UserError
from lionjax.evaluation import detection, tasks
from lionjax.evaluation.report import html as report_of
from lionjax.evaluation.report import plots
from lionjax.evaluation.report.html import write_report
from lionjax.evaluation.report.metric_labels import METRIC_LABELS, describe_metric

FIGURES = {
    "config": {"name": "toy <run>"},
    "stages": [
        {
            "name": "one",
            "steps": 1200,
            "seconds": 75.0,
            "loss_first": 4.0,
            "loss_last": 0.5,
            "trainable_parameters": 412032,
            "frozen_unchanged": True,
        },
        {
            "name": "two",
            "steps": 5,
            "seconds": 4000,
            "loss_first": 1.0,
            "loss_last": 0.9,
            "trainable_parameters": 7,
            "frozen_unchanged": False,
        },
    ],
    "metrics": {"vqa_accuracy": 0.843, "caption_cider": 1.5, "brand_new": 0.25},
    "baselines": {"vqa_accuracy": {"blind": 0.51, "majority": 0.4}, "caption_cider": 0.3},
    "speed": {"images_per_second": 61.23, "peak_bytes": 2**31},
    "round_trip_exact": True,
    "environment": {"jax": "0.10.2"},
}


class Reader(html.parser.HTMLParser):
    """What a browser would see: the text, the addresses, and tags left open."""

    def __init__(self, text: str):
        super().__init__()
        self.words, self.addresses, self.open, self.ids, self.data = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "srcset", "href")]
        self.ids += [value for name, value in attributes if name == "id"]
        self.data += [dict(attributes)] if dict(attributes).get("class") == "answer" else []
        if tag not in ("input", "meta", "img", "source", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data.split()


@pytest.fixture
def run(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(FIGURES))
    lines = [{"step": i, "stage": s, "loss": 1 / i} for s in ("one", "two") for i in range(1, 9)]
    lines.append({"step": 9, "stage": "two", "vqa_accuracy": 0.8})
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1'  # killed while writing
    (tmp_path / "metrics.jsonl").write_text(text)
    ratio = np.eye(2)[None].repeat(3, 0).tolist()
    (tmp_path / "routers.json").write_text(json.dumps({"encoder": ratio, "decoder": ratio}))
    (tmp_path / "evaluation/images").mkdir(parents=True)
    Image.new("RGB", (64, 64), "#808080").save(tmp_path / "evaluation/images/a.png")
    mask = coco.encode(np.asfortranarray(np.eye(64, dtype=np.uint8)))
    mask["counts"] = mask["counts"].decode()
    answer = {
        "id": 1,
        "image": "images/a.png",
        "question": "where <is> it?",
        "prediction": "there",
        "truth": ["there", "here", "there"],
        "score": 1.0,
        "boxes": [[0.1, 0.1, 0.6, 0.6]],
        "truth_boxes": [[0.2, 0.2, 0.7, 0.7]],
        "masks": [mask],
    }
    rows = [answer, answer | {"score": 0.0, "prediction": "nowhere"}] * 10
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "evaluation/rec.jsonl").write_text(text)
    (tmp_path / "evaluation/blind.jsonl").write_text('{"question": "q", "prediction": "p"}\n')
    return tmp_path


@pytest.mark.slow
def test_report_page_shows_every_figure_of_the_run(run):
    page = Reader(write_report(run).read_text())
    said = " ".join(page.words)
    for words in (
        "toy <run>",
        "VQA, accuracy 84.3% 51.0% 40.0%",
        "Captioning, CIDEr-D 1.500",
        "brand new 0.250",
        "one 1,200 1 min 15 s 1.000 0.125 412,032 bit for bit",  # as the curve begins and ends
        "two 5 1 h 6 min 1.000 0.125 7 no",
        "61.2 images/s, 2.00 GiB peak memory",
        "PyTorch round trip exact",
        "jax 0.10.2",
        "where <is> it?",
        "✓ there",
        "✗ nowhere",
        "there · here",
        "The first 12 of 20",
        "All 1",
    ):
        assert words in said, words


@pytest.mark.slow
def test_the_report_is_valid_html_without_external_files(run):
    text = write_report(run).read_text()
    page = Reader(text)
    assert page.open == []
    images = [address for address in page.addresses if not address.startswith("#")]
    assert images and all(address.startswith("data:image/") for address in images)
    assert not re.search(r"https?://|url\(|@import", text)


def test_contents_list_every_heading_and_their_links_lead_there(run):
    text = write_report(run).read_text()
    page = Reader(text)
    links = [address[1:] for address in page.addresses if address.startswith("#")]
    assert links == [name for name in page.ids if name.startswith("section")]
    contents = text[text.index("<nav") : text.index("</nav>")]
    headings = re.findall(r"<h[23] id=[^>]*>(.*?)</h", text)
    assert len(links) == len(headings) and all(f">{title}</a>" in contents for title in headings)


def test_answers_with_boxes_come_first_and_wrong_ones_can_be_chosen(run):
    text = write_report(run).read_text()
    page = Reader(text)
    assert text.index(">rec</h3>") < text.index(">blind</h3>")  # not in the order of their names
    assert [card["data-benchmark"] for card in page.data] == ["rec"] * 12 + ["blind"]
    assert [card["data-mark"] for card in page.data] == ["right", "wrong"] * 6 + [""]
    assert {"benchmark", "mark", "words", "count"} <= set(page.ids) and "card.dataset.mark === mark" in text


def test_what_each_stage_changed_stands_in_a_row_of_each_metric():
    figures = {
        "stages": [{"name": "one"}, {"name": "two"}],
        "stage_metrics": {"one": {"vqa_accuracy": 0.5, "rec_accuracy_50": 0.25, "caption_cider": 2.0}},
        "metrics": {"vqa_accuracy": 0.625, "rec_accuracy_50": 0.2, "caption_cider": 2.00001, "reg_cider": 1.0},
    }
    said = " ".join(Reader(report_of.stage_changes_section(figures)).words)
    assert "after one after two VQA, accuracy 50.0% 62.5% (+12.5%)" in said
    assert "accuracy at IoU > 0.5 25.0% 20.0% (-5.0%)" in said
    assert "CIDEr-D 2.000 2.000 (+0.000)" in said and "REG" not in said
    assert report_of.stage_changes_section({"metrics": figures["metrics"]}) == ""


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("coco_rec_accuracy_50", 0.5, ("REC (expression to box) on coco, accuracy at IoU > 0.5", "50.0%", 1.0)),
        ("vqa_accuracy_teacher_forced", 1.0, ("VQA with teacher forcing, accuracy", "100.0%", 1.0)),
        ("reason_giou", 0.25, ("Reasoning (inferred object to mask), gIoU", "25.0%", 1.0)),
        ("caption_cider", 1.5, ("Captioning, CIDEr-D", "1.500", 10.0)),
        ("new_task_f1", -0.0001, ("New task, F1", "0.0%", 1.0)),
        ("brand_new", -0.25, ("brand new", "-0.250", None)),
    ],
)
def test_metrics_are_named_and_scaled_by_their_own_range(key, value, shown):
    metric = describe_metric(key)
    assert (metric.label, metric.format(value), metric.best) == shown


def test_every_benchmark_has_a_name_for_each_of_its_metrics():
    source = inspect.getsource(tasks) + inspect.getsource(detection)
    keys = set(re.findall(r"\"((?:\w+)_(?:cider|bleu4|f1|ciou|giou|accuracy(?:_50)?|recall_1|silent))\"", source))
    missing = {key for key in keys if key not in METRIC_LABELS and key.count("_") > 0} - {"macro_f1"}
    assert len(keys) > 10 and not missing


def test_a_bar_is_as_long_as_its_share_of_the_metrics_range():
    page = report_of.metrics_section({"metrics": {"vqa_accuracy": 0.5, "caption_cider": 2.5, "odd": 4.0}})
    assert re.findall(r"width:([\d.]+)%", page) == ["25.0", "50.0", "100.0"]


@pytest.mark.slow
def test_images_are_written_beside_the_page_without_partial_files(run):
    write_report(run)
    names = {path.name for path in run.iterdir()}
    assert {"loss.png", "loss-dark.png", "routers.png", "answers_rec.png", "report.html"} <= names
    assert not [name for name in names if name.endswith(".part")]
    assert "answers_blind.png" not in names  # it has no pictures
    pixels = np.asarray(Image.open(run / "answers_rec.png")).reshape(-1, 3).astype(int)
    for color in (plots.PREDICTION_COLOR, plots.TRUTH_COLOR):
        assert np.abs(pixels - plots.hex_to_rgb(color)).sum(-1).min() < 30


def test_report_omits_sections_without_data(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": "one", "loss": 2.0}\n')
    said = " ".join(Reader(write_report(tmp_path).read_text()).words)
    assert "Loss at each logged step" in said
    for words in ("Metrics", "Answers", "Speed and memory", "Adapter router", "None", "nan"):
        assert words not in said


def test_a_missing_picture_leaves_its_answer_on_the_page(run):
    (run / "evaluation/images/a.png").unlink()
    assert "✓ there" in " ".join(Reader(write_report(run).read_text()).words)


def test_an_empty_folder_raises_a_one_sentence_error(tmp_path):
    with pytest.raises(UserError, match="holds no report.json"):
        write_report(tmp_path)


def test_a_broken_file_is_named_with_its_line(run):
    (run / "evaluation/rec.jsonl").write_text("{}\n{oops\n{}\n")
    with pytest.raises(UserError, match="rec.jsonl: line 2 is not valid JSON"):
        write_report(run)
    (run / "report.json").write_text("{oops")
    with pytest.raises(UserError, match="report.json is not valid JSON"):
        write_report(run)


def test_mean_router_ratios_are_kept_under_the_part_of_their_path_that_differs(tmp_path):
    ratio_LTAD = np.arange(24.0).reshape(2, 2, 2, 3)
    blocks = {"blocks": {"adapters": {"ratio": ratio_LTAD, "adapter_0": {"scale": np.ones(2)}}}}
    report_of.write_router_ratios(tmp_path, {"language": {"encoder": blocks, "decoder": blocks}})
    kept = json.loads((tmp_path / "routers.json").read_text())
    assert list(kept) == ["decoder", "encoder"]
    assert kept["encoder"] == ratio_LTAD.mean(-1).tolist()
    (tmp_path / "routers.json").unlink()
    report_of.write_router_ratios(tmp_path, {"language": {"scale": np.ones(2)}})
    assert not (tmp_path / "routers.json").exists()
