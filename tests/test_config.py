# SPDX-License-Identifier: Apache-2.0
"""Experiments as values: built, changed from the command line, written and read back."""

import dataclasses
import json
import logging

import pytest

from lionjax import config
from lionjax.config import Experiment, RunConfig, Stage
from lionjax.interfaces import UserError
from lionjax.layers import LoraConfig

FILE = """
from lionjax.config import Experiment, Stage
from lionjax.layers import LoraConfig
from lionjax.sharding import MeshConfig


def get_config():
    one = Stage("one", steps=10, trainable=["qformer"], mixture=(("vqa", 1),), batch_size=4)
    two = Stage("two", 5, (".*/adapter_1",), (("rec", 0.5),), 8, accumulate=2, system=(("visual_input", "QFORMER"),))
    return Experiment("toy", LoraConfig(rank=2), MeshConfig(), (one, two), weights=(("vision", "vit.safetensors"),))
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "toy.py"
    file.write_text(FILE)
    return file


def sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_python_file_becomes_a_hashable_experiment_with_lists_as_tuples_and_whole_numbers_as_floats(path):
    toy = config.load(path)
    assert toy.name == "toy" and toy.stages[1].accumulate == 2
    assert toy.stages[0].trainable == ("qformer",)
    assert toy.stages[0].mixture == (("vqa", 1.0),) and isinstance(toy.stages[0].mixture[0][1], float)
    assert hash(toy) == hash(config.load(path)) and toy == config.load(path)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--stages.0.steps", "20"], lambda e: e.stages[0].steps == 20 and e.stages[1].steps == 5),
        (["--stages.1.steps=7"], lambda e: e.stages[1].steps == 7 and e.stages[0].steps == 10),
        (["--system.rank", "64"], lambda e: e.system == LoraConfig(rank=64)),
        (["--mesh.data", "-1", "--mesh.fsdp", "8"], lambda e: (e.mesh.data, e.mesh.fsdp) == (-1, 8)),
        (["--stages.0.learning-rate", "3e-4"], lambda e: e.stages[0].learning_rate == 3e-4),
        (["--stages.0.learning_rate", "1"], lambda e: isinstance(e.stages[0].learning_rate, float)),
        (["--stages.0.trainable", "a/.*", "b"], lambda e: e.stages[0].trainable == ("a/.*", "b")),
        (["--stages.0.mixture", "vqa", "1", "rec", "2"], lambda e: e.stages[0].mixture == (("vqa", 1.0), ("rec", 2.0))),
        (["--stages.1.system", "visual_input", "ALL"], lambda e: e.stages[1].system == (("visual_input", "ALL"),)),
        (["--stages.0.system", "layers", "3"], lambda e: e.stages[0].system == (("layers", 3),)),
        (["--stages.0.start", "scratch"], lambda e: e.stages[0].start == "scratch"),
        (["--stages.0.betas", "0.9", "0.95"], lambda e: e.stages[0].betas == (0.9, 0.95)),
        (
            ["--stages.1.batch_size", "9", "--stages.1.accumulate", "3"],  # right only together
            lambda e: (e.stages[1].batch_size, e.stages[1].accumulate) == (9, 3),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_line_sets_a_typed_field(path, words, wanted):
    assert wanted(config.load(path, words))


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--stages.0.stepz", "20"], "Experiment has no field 'stages.0.stepz'; did you mean 'stages.0.steps'?"),
        (["--rank", "20"], "Experiment has no field 'rank'; did you mean 'system.rank'?"),
        (["--zzz", "20"], "Experiment has no field 'zzz'; `lionjax show CONFIG` prints all fields"),
        (["--system", "20"], "system holds several fields; set one of them, such as --system.rank"),
        (["--stages.0.steps", "many"], "stages.0.steps wants int, got 'many'"),
        (["--stages.0.steps", "1.5"], "stages.0.steps wants int, got '1.5'"),
        (["--stages.0.steps"], "stages.0.steps wants int, got ''"),
        (["--stages.0.steps", "1", "2"], "stages.0.steps wants int, got '1 2'"),
        (["--stages.0.betas", "1"], "stages.0.betas wants tuple[float, float], got '1'"),
        (["--stages.0.start", "nowhere"], "stages.0.start wants Literal['previous', 'scratch'], got 'nowhere'"),
        (["--stages.0.batch_size", "0"], "stage 'one': batch_size is 0 and must be at least 1"),
        (["--stages.1.batch_size", "7"], "stage 'two': batch_size 7 does not divide into accumulate=2 equal parts"),
        (["steps", "3"], "'steps' stands alone; fields are set as in --stages.0.steps 20"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_override_is_one_sentence_and_prints_nothing(path, words, wanted, capfd):
    with pytest.raises(UserError) as error:
        config.load(path, words)
    assert sentence(error) == wanted
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("x = 1", "wants a function get_config()"),
        ("def get_config(): return 3", "wants a function get_config()"),
        ("import nothing_of_this_name", "fails with ModuleNotFoundError"),
        ("def get_config(:", "fails with SyntaxError"),
        (FILE.replace("steps=10", "steps='10'"), "Experiment.stages.0.steps wants int, got '10'"),
        (FILE.replace("LoraConfig(rank=2)", "{1: 2}"), "Experiment.system holds a dict"),
        (FILE.replace("LoraConfig(rank=2)", "print"), "Experiment.system holds a builtin_function_or_method"),
    ],
)
def test_a_wrong_config_file_is_one_sentence(path, text, wanted):
    path.write_text(text)
    with pytest.raises(UserError) as error:
        config.load(path)
    assert wanted in sentence(error)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no config file .*nothing.py"):
        config.load(tmp_path / "nothing.py")


def test_json_and_back_is_the_same_value_and_the_same_types(path):
    toy = config.load(path)
    again = config.from_json(config.to_json(toy))
    assert again == toy and repr(again) == repr(toy)


def changed(toy: Experiment, change) -> str:
    tree = json.loads(config.to_json(toy))
    change(tree)
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda t: t.update(sytem=1), "Experiment: Experiment has no field 'sytem'; did you mean 'system'?"),
        (lambda t: t["stages"][1].pop("steps"), "Experiment.stages.1: field 'steps' of Stage is missing"),
        (lambda t: t["stages"][0].update(steps="x"), "Experiment.stages.0.steps wants int, got 'x'"),
        (lambda t: t["stages"][0].update(steps=True), "Experiment.stages.0.steps wants int, got True"),
        (lambda t: t.update(run=t["mesh"]), "Experiment.run wants RunConfig, got MeshConfig("),
        (lambda t: t["system"].update({"class": "subprocess.Popen"}), "'subprocess.Popen' is no config class"),
        (lambda t: t["system"].update({"class": "lionjax.config.load"}), "'lionjax.config.load' is no config class"),
        (lambda t: t["system"].update({"class": "lionjax.nothing.A"}), "'lionjax.nothing.A' is no config class"),
        (lambda t: t["system"].pop("class"), "None is no config class"),
        (lambda t: t.pop("class"), "wants a JSON object with the key 'class'"),
    ],
)
def test_json_that_is_not_ours_is_refused_in_one_sentence(path, change, wanted):
    with pytest.raises(UserError) as error:
        config.from_json(changed(config.load(path), change))
    assert wanted in sentence(error)
    with pytest.raises(UserError, match="no JSON"):
        config.from_json("{")


def test_a_field_that_an_older_file_lacks_takes_its_default_and_is_said(path, caplog):
    toy = config.load(path)
    with caplog.at_level(logging.WARNING):
        old = config.from_json(changed(toy, lambda t: t["stages"][0].pop("clip_norm")))
    assert old == toy and "'clip_norm'" in caplog.text


def test_show_prints_every_field_with_its_type(path):
    toy = config.load(path)
    text = config.show(toy)
    assert "  stages.1: Stage" in text.splitlines()
    assert "    accumulate: int = 2" in text.splitlines()
    assert text.count(" = ") == len(list(config.leaves(toy)))


def test_difference_names_the_fields_that_differ(path):
    toy = config.load(path)
    assert config.difference(toy, toy) == {}
    other = config.load(path, ["--stages.1.steps", "6", "--system.rank", "3"])
    assert config.difference(toy, other) == {"system.rank": (2, 3), "stages.1.steps": (5, 6)}
    shorter = dataclasses.replace(toy, stages=toy.stages[:1])
    assert "stages.1.steps" in config.difference(toy, shorter)
    swapped = dataclasses.replace(toy, system=RunConfig())
    assert config.difference(toy, swapped)["system.class"] == ("LoraConfig", "RunConfig")


def test_a_stage_wants_a_batch_that_divides():
    with pytest.raises(UserError, match="does not divide"):
        Stage("s", 1, ("a",), (("vqa", 1.0),), batch_size=5, accumulate=2)
