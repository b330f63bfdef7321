# SPDX-License-Identifier: Apache-2.0
"""`lionjax reproduce` on stand-in weights and the fixtures' files: what it says of files, computation and figures."""

import dataclasses
import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
import scripted_benchmarks
import stand_ins
from PIL import Image
from small_ram import TINY as TINY_RAM
from small_ram import WORDS
from small_sam import SAM

from lionjax import cli, convert
from lionjax.convert import released_files
from lionjax.convert.formats.ram import RAM
from lionjax.convert.verify import compare, generated_ids
from lionjax.core.types import UserError
from lionjax.evaluation import experts
from lionjax.evaluation.published.discovery import find_benchmarks
from lionjax.evaluation.published.reproduction import REPRODUCTIONS, paper_figures
from lionjax.inference import tagger

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FILES = scripted_benchmarks.FILES


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The files of POPE, GQA, MME and RefCOCO with pictures."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("yes_no/coco_pope_random.json", "vqa/gqa_testdev_balanced_questions.json"):
        shutil.copy(FILES / name, folder)
    for setting in ("popular", "adversarial"):
        shutil.copy(FILES / f"yes_no/coco_pope_{setting}.json", folder)
    shutil.copytree(FILES / "regions/refcoco", folder / "refcoco")
    shutil.copytree(FILES / "yes_no/mme", folder / "mme")
    for entry in find_benchmarks(folder)[0]:
        scripted_benchmarks.put_pictures(entry.source, folder / "images")
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "llava-v1.5-tiny"
    return stand_ins.save("llava", folder)


def run(capsys, *arguments):
    """(exit code, JSON or text of stdout, stderr) of `lionjax reproduce`."""
    code = cli.main(["reproduce", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, json.loads(out) if "--json" in arguments and code == 0 else out, err


@pytest.mark.slow
def test_one_command_checks_compares_and_prints_our_figures_beside_the_papers(capsys, llava, root, tmp_path):
    arguments = ("--weights", llava, "--data", root, "--limit", "2", "--benchmark", "pope")
    code, text, err = run(capsys, "llava-1.5", *arguments, "--out", tmp_path / "out")
    assert code == 0, err
    assert "of no released model; the nearest, LLaVA-1.5-7B (transformers), differs in" in text
    assert "these are not the released files" in text
    assert "ids: 3 of 3 answers equal to transformers'" in text and "compared with transformers" in text
    assert "LLaVA-1.5-7B, mean F1: 85.9" in text and "pope, mean of three settings, protocol llava: f1_score" in text
    report = json.loads((tmp_path / "out/reproduction.json").read_text())
    assert report["comparison"]["ids"]["worst_logprob"] < 1e-4 and report["comparison"]["modules"]["equal"]
    assert len(report["figures"]) == 4 and report["figures"][0]["answered"] == 2
    assert (tmp_path / "out/evaluation/pope_coco_pope_random_llava.jsonl").is_file()


@pytest.mark.slow
def test_weights_that_compute_something_else_than_transformers_end_with_an_error(capsys, llava, root, monkeypatch):
    real = generated_ids.transformers_answers

    def other(*arguments):
        return [answer._replace(logprobs=answer.logprobs + 0.1) for answer in real(*arguments)]

    def refuse(*arguments):
        raise UserError("not compared here")

    monkeypatch.setattr(generated_ids, "transformers_answers", other)
    monkeypatch.setattr(compare, "verify", refuse)
    code, _, err = run(capsys, "llava-1.5", "--weights", llava, "--data", root, "--limit", "1", "--benchmark", "gqa")
    assert code == 2 and "compute something else than in transformers" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "benchmark", "paper"),
    [
        ("blip2", "mme", "BLIP-2, perception + cognition: 1293.8 + 290.0"),
        ("instructblip", "pope", "InstructBLIP-7B, accuracy random / popular / adversarial: 88.57 / 82.77 / 72.10"),
        ("kosmos2", "rec", "Kosmos-2, RefCOCO val/A/B: 52.32 / 57.42 / 47.26"),
        ("shikra", "rec", "Shikra-7B, RefCOCO val/A/B: 87.01 / 90.61 / 80.24 (trained on its train split)"),
        ("nextchat", "rec", "NExT-Chat-7B, RefCOCO val/A/B: 85.5 / 90.0 / 77.9 (trained on its train split)"),
        ("lion", "rec", "LION-4B, RefCOCO val/A/B: 89.73 / 92.29 / 84.82 (trained on its train split)"),
    ],
)
def test_each_systems_figures_stand_beside_its_papers(capsys, tmp_path, root, name, benchmark, paper):
    folder = stand_ins.save(name, tmp_path / f"{name}-7b-tiny")
    arguments = (name, "--weights", folder, "--data", root, "--limit", "1", "--benchmark", benchmark, "--json")
    compared = name in ("instructblip", "kosmos2", "nextchat")  # the others' comparisons have tests of their own
    code, report, err = run(capsys, *arguments, *["--no-comparison"] * (not compared))
    assert code == 0, err
    assert paper in report["figures"][0]["papers"] and report["figures"][0]["value"] is not None
    assert report["files"]["released"] is False and report["left_out"] == {}
    if name in ("instructblip", "kosmos2"):
        assert report["comparison"]["ids"]["equal"] is True
    if name in ("instructblip", "nextchat"):
        assert report["comparison"]["modules"]["equal"] is True
    if name == "nextchat":
        assert "no class for these files" in report["comparison"]["ids"]["reason"]


@pytest.mark.slow
def test_sam_is_compared_with_transformers_and_asked_for_masks_in_true_boxes(capsys, tmp_path, root):
    model = transformers.SamModel(transformers.SamConfig(**SAM))
    model.save_pretrained(tmp_path / "sam")
    code, report, err = run(capsys, "sam", "--weights", tmp_path / "sam", "--data", root, "--limit", "2", "--json")
    assert code == 0, err
    assert report["comparison"]["modules"]["equal"] is True
    (figure,) = report["figures"]
    assert figure["objects"] == 2 and 0 <= figure["miou"] <= 100 and "46.5" in report["note"]


def write_ram(folder):
    """A tiny RAM with its list of tags, and a set of tagged pictures as RAM's code has them."""
    rng, shapes = np.random.default_rng(0), RAM.abstract_params(TINY_RAM)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    convert.to_torch(TINY_RAM, params, folder / "ram")
    (folder / "ram" / tagger.TAG_LIST_FILE).write_text("\n".join(WORDS))
    tags = folder / "data" / "openimages_common_214"
    (tags / "imgs" / "test").mkdir(parents=True)
    (tags / "openimages_common_214_ram_taglist.txt").write_text("cat\nzoo\ngrass\n")
    lines = ["test/a,cat,zoo", "test/b,zoo", "test/c,cat", "test/gone,cat"]
    (tags / "openimages_common_214_ram_annots.txt").write_text("\n".join(lines) + "\n")
    for name, color in zip("abc", ("red", "lime", "blue")):
        Image.new("RGB", (20, 16), color).save(tags / "imgs" / "test" / f"{name}.jpg")
    return folder / "ram", folder / "data"


@pytest.mark.slow
def test_rams_mean_average_precision_is_over_the_tags_of_its_own_sets(capsys, tmp_path):
    weights, data = write_ram(tmp_path)
    code, report, err = run(capsys, "ram", "--weights", weights, "--data", data, "--no-comparison", "--json")
    assert code == 0, err
    (figure,) = report["figures"]
    assert (figure["images"], figure["missing"], figure["tags"]) == (3, 1, 2)
    model = tagger.load(weights)
    files = [data / f"openimages_common_214/imgs/test/{name}.jpg" for name in "abc"]
    probabilities = model.probabilities([Image.open(file) for file in files])
    cat, zoo = (probabilities[:, WORDS.index(name)] for name in ("cat", "zoo"))
    expected = [experts.average_precision(cat, [1, 0, 1]), experts.average_precision(zoo, [1, 1, 0])]
    assert figure["map"] == pytest.approx(100 * np.mean(expected))
    (data / "openimages_common_214/openimages_common_214_ram_taglist.txt").write_text("unicorn\n")
    with pytest.raises(UserError, match="has the tag 'unicorn', which the tagger does not know"):
        experts.tagging_scores(model, data / "openimages_common_214")


def test_average_precision_is_the_mean_precision_at_the_positives():
    assert experts.average_precision([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0]) == pytest.approx((1 + 2 / 3) / 2)
    scores_BV = np.array([[0.9, 0.1], [0.2, 0.3], [0.5, 0.2]])
    truth_BV = np.array([[True, False], [False, False], [True, False]])
    assert experts.mean_average_precision(scores_BV, truth_BV) == 1.0  # a class without a positive does not count


def test_files_are_the_released_ones_where_shapes_and_digests_agree(llava, monkeypatch):
    source = convert.from_torch(llava)[0]
    monkeypatch.setattr(released_files, "released_models", lambda system: {"LLaVA-tiny": source})
    check = released_files.check_files("llava-1.5", llava)
    assert check.is_released and check.release == "LLaVA-tiny" and "values were not checked" in str(check)
    digest = hashlib.sha256((llava / "model.safetensors").read_bytes()).hexdigest()
    check = released_files.check_files("llava-1.5", llava, {"model.safetensors": digest})
    assert check.is_released and str(check).endswith("these are the released files")
    check = released_files.check_files("llava-1.5", llava, {"model.safetensors": "0" * 64})
    assert not check.is_released and "digest of model.safetensors: DIFFERS" in str(check)
    wider = dataclasses.replace(source, language=dataclasses.replace(source.language, mlp_dim=25))
    monkeypatch.setattr(released_files, "released_models", lambda system: {"other": wider})
    check = released_files.check_files("llava-1.5", llava)
    assert not check.release and check.differences[0].endswith("released (2, 25, 16)")


@pytest.mark.parametrize("system", released_files.SYSTEMS)
def test_every_system_has_released_sizes_and_benchmarks_with_published_figures(system):
    models = released_files.released_models(system)
    shapes = released_files._shapes(next(iter(models.values())))
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    assert len(shapes) > 30 and count > 8e7
    if system in REPRODUCTIONS:
        pairs = REPRODUCTIONS[system].protocols.items()
        assert any(paper_figures(system, *pair) for pair in pairs)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("gpt-9",), "there is no released system 'gpt-9'; choose one of llava-1.5"),
        (("blip2",), "holds a llava, not weights of blip2"),
        (("llava-1.5", "--benchmark", "vsr"), "the figures of llava-1.5 kept here are of pope"),
        (("llava-1.5", "--benchmark", "seed"), "no file of seed was found under"),
        (("llava-1.5", "--limit", "0"), "give an integer above 0"),
    ],
)
def test_what_cannot_be_reproduced_is_one_sentence(capsys, llava, root, arguments, words):
    code, _, err = run(capsys, *arguments, "--weights", llava, "--data", root)
    assert code == 2 and words in err and err.count("\n") == 1


def test_damaged_weights_and_digests_of_other_files_are_one_sentence(tmp_path, llava):
    folder = tmp_path / "llava-v1.5-damaged"
    shutil.copytree(llava, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"]["intermediate_size"] = 25
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="mlp"):
        released_files.check_files("llava-1.5", folder)
    with pytest.raises(UserError, match="there is no folder"):
        released_files.check_files("llava-1.5", tmp_path / "none")
    with pytest.raises(UserError, match="there is no file .*other.bin, whose digest was given"):
        released_files.check_files("llava-1.5", llava, {"other.bin": "0" * 64})
    (tmp_path / "sums").write_text(f"{'a' * 64}  model.safetensors\n")
    assert released_files.read_digests(tmp_path / "sums") == {"model.safetensors": "a" * 64}
    (tmp_path / "sums").write_text("short  model.safetensors\n")
    with pytest.raises(UserError, match="line 1, is 'short  model.safetensors'; give a SHA-256"):
        released_files.read_digests(tmp_path / "sums")
