# SPDX-License-Identifier: Apache-2.0
"""What `lionjax data check` finds missing."""

import json

import pytest
from PIL import Image

from lionjax import cli
from lionjax.core.experiment import Experiment, Mix, Stage, Weights
from lionjax.data import check
from lionjax.data.config import DataConfig
from lionjax.data.datasets.annotation_files import AnnotationFile
from lionjax.data.datasets.coco import Coco
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.processor import ProcessorConfig
from lionjax.models.language.t5 import TINY_T5
from lionjax.models.vision.vit import TINY_VIT
from lionjax.models.vlm.visual_prefix import VisualPrefixLM

MODEL = VisualPrefixLM(
    TINY_VIT, TINY_T5, feature_layer=-1, projector_depth=1, image_token_id=None, torch_names="original"
)


@pytest.fixture
def lines(tmp_path):
    """A source of two questions with their pictures."""
    rows = [{"image": f"{n}.png", "question": "What?", "answer": "red"} for n in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for n in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{n}.png")
    return JsonLines(str(tmp_path / "rows.jsonl"), str(tmp_path), name="mine")


MIXTURE = (Mix("vqa", 1.0, source="mine"),)


def experiment(*sources, mixture=MIXTURE, **fields):
    data = DataConfig(sources=sources, processor=ProcessorConfig(use_tags=False))
    stages = (Stage("one", 1, ("projector",), mixture, 2),)
    return Experiment("small", MODEL, data, stages, **fields)


def sentence(*arguments, **fields):
    return check.summarize(check.check_experiment(experiment(*arguments, **fields)))


def test_a_complete_config_has_every_file_picture_and_example(lines):
    findings = check.check_experiment(experiment(lines))
    assert check.summarize(findings) == "" and {finding.state for finding in findings} == {"found"}
    said = [finding.what for finding in findings if finding.stage == "one"]
    assert said == [lines.file, lines.image_dir, "2 of 2 pictures looked for", "2 examples"]


def test_a_missing_file_is_named_with_its_source(lines, tmp_path):
    other = JsonLines(str(tmp_path / "none.jsonl"), str(tmp_path), name="mine")
    assert sentence(other).startswith(f"{tmp_path}/none.jsonl of source 'mine' is missing;")


def test_missing_pictures_are_counted_and_the_first_is_named(lines, tmp_path):
    (tmp_path / "1.png").unlink()
    assert sentence(lines).startswith(f"1 of 2 pictures of source 'mine' are missing, such as {tmp_path}/1.png;")


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        (Mix("rec", source="mine"), "stage 'one' asks for 'mine/rec', which no source has (mine: vqa);"),
        (Mix("rec"), "stage 'one' asks for 'rec', which no source has (mine: vqa);"),
        (Mix("vqa", source="coco"), "stage 'one' asks for 'coco/vqa', but there is no source 'coco', only mine;"),
    ],
)
def test_a_task_of_a_mixture_without_a_source_is_named_with_its_stage(lines, mix, expected):
    assert sentence(lines, mixture=(mix,)).startswith(expected)


def test_a_missing_tokenizer_and_missing_weights_are_named(lines):
    data = DataConfig(sources=(lines,), processor=ProcessorConfig(use_tags=False, tokenizer="weights/none"))
    weights = (
        Weights("language", "weights/none/params.safetensors"),
        Weights("vision", "shipped:tiny_vit.safetensors"),
    )
    what = Experiment("small", MODEL, data, experiment(lines).stages, weights=weights)
    problems = [finding.problem for finding in check.check_experiment(what) if finding.problem]
    assert len(problems) == 2 and "no tokenizer at 'weights/none'" in problems[0]
    assert problems[1] == "the weights weights/none/params.safetensors of 'language' are missing"


def test_coco_needs_one_of_its_two_files_and_a_source_of_ones_own_needs_no_paths(tmp_path, lines):
    folder = Coco(str(tmp_path))
    assert folder.paths() == (tmp_path / "captions.json", tmp_path / "instances.json", tmp_path / "images")
    (tmp_path / "instances.json").write_text("{}")
    assert folder.paths() == (tmp_path / "instances.json", tmp_path / "images")
    state = check.check_source(type("Own", (), {"name": "own", "open": lines.open})(), DataConfig())
    assert state.task_sizes == {"vqa": 2} and AnnotationFile.paths(lines) == lines.paths()


CONFIG = """
from lionjax.core.experiment import Experiment, Stage
from lionjax.data.config import DataConfig
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.models.language.t5 import TINY_T5
from lionjax.models.vision.vit import TINY_VIT
from lionjax.models.vlm.visual_prefix import VisualPrefixLM


def get_config():
    model = VisualPrefixLM(TINY_VIT, TINY_T5, None, -1, image_token_id=None, projector_depth=1, torch_names="original")
    data = DataConfig(sources=(JsonLines("rows.jsonl", ".", name="mine"),))
    return Experiment("mine", model, data, (Stage("one", 1, ("projector",), (("mine/vqa", 1.0),), 2),))
"""


def test_the_command_prints_a_table_and_exits_with_0_or_with_2_and_a_sentence(lines, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CONFIG)
    assert cli.main(["data", "check", "mine.py"]) == 0
    assert "2 examples" in capsys.readouterr().out
    assert cli.main(["data", "check", "mine.py", "--data.sources.0.file", "none.jsonl"]) == 2
    said = capsys.readouterr()
    assert "missing" in said.out and said.err.count("\n") == 1
    assert said.err.startswith("lionjax: none.jsonl of source 'mine' is missing;")
