# SPDX-License-Identifier: Apache-2.0
"""Experiments as values: built, changed from the command line, written and read back."""

import dataclasses
import json
import logging

import pytest

from lionjax.core import config
from lionjax.core.experiment import Experiment, Mix, RunConfig, Stage
from lionjax.core.types import UserError
from lionjax.models.vlm.lion import AggregatorConfig, Lion, QFormerConfig, T5Config, ViTConfig

FILE = """
from lionjax.core.experiment import Experiment, Stage
from lionjax.nn.lora import LoraConfig
from lionjax.core.sharding import MeshConfig


def get_config():
    one = Stage("one", steps=10, trainable=["qformer"], mixture=(("vqa", 1),), batch_size=4)
    change = (("visual_input", "QFORMER"),)
    two = Stage("two", 5, (".*/adapter_1",), (("rec", 0.5),), 8, accumulate=2, system=change)
    weights = (("vision", "vit.safetensors"),)
    return Experiment("toy", LoraConfig(rank=2), MeshConfig(), (one, two), weights=weights)
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


def test_a_python_file_becomes_a_hashable_experiment_held_to_its_types(path):
    toy = config.load(path)
    assert toy.name == "toy" and toy.stages[1].grad_accum_steps == 2
    assert toy.stages[0].trainable == ("qformer",)
    assert toy.stages[0].mixture == (Mix("vqa", 1.0),)
    assert isinstance(toy.stages[0].mixture[0].weight, float)
    assert hash(toy) == hash(config.load(path)) and toy == config.load(path)


SET = [
    ("--stages.0.steps 20", "stages.0.steps", 20),
    ("--stages.1.steps=7", "stages.1.steps", 7),
    ("--model.rank 64", "model.rank", 64),
    ("--mesh.fsdp -1", "mesh.fsdp", -1),
    ("--stages.0.learning-rate 3e-4", "stages.0.learning_rate", 3e-4),
    ("--stages.0.learning_rate 1", "stages.0.learning_rate", 1.0),
    ("--stages.0.trainable a/.* b", "stages.0.trainable", ("a/.*", "b")),
    ("--stages.0.mixture vqa 1 rec 2", "stages.0.mixture", (Mix("vqa", 1.0), Mix("rec", 2.0))),
    ("--stages.1.model_overrides visual_input ALL", "stages.1.model_overrides", (("visual_input", "ALL"),)),
    ("--stages.0.model_overrides layers 3", "stages.0.model_overrides", (("layers", 3),)),
    ("--stages.0.init_from scratch", "stages.0.init_from", "scratch"),
    ("--stages.0.betas 0.9 0.95", "stages.0.betas", (0.9, 0.95)),
]


@pytest.mark.parametrize(("words", "field", "wanted"), SET)
def test_the_command_line_sets_one_typed_field_and_no_other(path, words, field, wanted):
    changed = config.load(path, words.split())
    values = {name: value for name, _, value in config.leaf_fields(changed)}
    assert repr(values[field]) == repr(wanted)
    assert set(config.diff_configs(config.load(path), changed)) == {field}


def test_a_config_that_refuses_a_value_says_why():
    lion = Lion(ViTConfig(), QFormerConfig(), AggregatorConfig(), T5Config())
    assert config.apply_overrides(lion, ["--vision.depth", "2", "--qformer.layers", "4"]).vision.depth == 2
    with pytest.raises(UserError) as error:
        config.apply_overrides(lion, ["--vision.depth", "2", "--visual_input", "NONE"])
    assert sentence(error).startswith("Lion: visual_input is 'NONE'; it can be one of ALL")


def test_fields_that_are_valid_only_together_are_set_together(path):
    words = "--stages.1.batch_size 9 --stages.1.grad_accum_steps 3 --mesh.fsdp 8".split()
    toy = config.load(path, words)
    assert (toy.stages[1].batch_size, toy.stages[1].grad_accum_steps, toy.mesh.fsdp) == (9, 3, 8)


WRONG = {
    "--stages.0.stepz 20": "Experiment has no field 'stages.0.stepz'; did you mean 'stages.0.steps'?",
    "--rank 20": "Experiment has no field 'rank'; did you mean 'model.rank'?",
    "--zzz 20": "Experiment has no field 'zzz'; `lionjax show CONFIG` prints all fields",
    "--model 20": "model has several fields; set one of them, such as --model.rank",
    "--stages.0.steps many": "stages.0.steps must be int, got 'many'",
    "--mesh.fsdp 2 --stages.0.steps 1.5": "stages.0.steps must be int, got '1.5'",
    "--stages.0.steps": "stages.0.steps must be int, got ''",
    "--stages.0.steps 1 2": "stages.0.steps must be int, got '1 2'",
    "--stages.0.betas 1": "stages.0.betas must be tuple[float, float], got '1'",
    "--stages.0.init_from up": "stages.0.init_from must be Literal['previous', 'scratch'], got 'up'",
    "--stages.0.batch_size 0": "stage 'one': batch_size is 0; it must be at least 1",
    "--stages.1.batch_size 7": "stage 'two': batch_size is 7; it must be a multiple of grad_accum_steps=2",
    "steps 3": "'steps' is not a field; set fields as in --stages.0.steps 20",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_override_is_one_sentence_and_prints_nothing(path, words, capfd):
    with pytest.raises(UserError) as error:
        config.load(path, words.split())
    assert sentence(error).startswith(WRONG[words])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("x = 1", "must define a function get_config()"),
        ("def get_config(): return 3", "must define a function get_config()"),
        ("import nothing_of_this_name", "fails with ModuleNotFoundError"),
        ("def get_config(:", "fails with SyntaxError"),
        (FILE.replace("steps=10", "steps='10'"), "Experiment.stages.0.steps must be int, got '10'"),
        (FILE.replace("LoraConfig(rank=2)", "{1: 2}"), "Experiment.model is a dict"),
        (FILE.replace("LoraConfig(rank=2)", "print"), "Experiment.model is a builtin_function"),
    ],
)
def test_a_wrong_config_file_raises_a_one_sentence_error(path, text, wanted):
    path.write_text(text)
    with pytest.raises(UserError) as error:
        config.load(path)
    assert wanted in sentence(error)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no config file .*nothing.py"):
        config.load(tmp_path / "nothing.py")


def test_a_config_that_ships_is_found_by_its_name_but_a_file_goes_first(path, monkeypatch):
    assert config.load("tiny_lion", ["--stages.0.steps", "3"]).name == "tiny_lion"
    monkeypatch.chdir(path.parent)
    path.rename("tiny_lion")
    assert config.load("tiny_lion").name == "toy"
    with pytest.raises(UserError, match="no config file 'tiny_lon'; .* that ships, such as tiny_lion"):
        config.load("tiny_lon")


WITH_ARGUMENTS = FILE.replace(
    "def get_config():", 'def get_config(rows: str, rate: float = 0.5, language: tuple = ()):\n    "Give --rows FILE."'
).replace('"toy"', 'f"{rows} {rate}"')


def test_arguments_of_get_config_are_set_on_the_command_line_beside_fields(path):
    path.write_text(WITH_ARGUMENTS)
    toy = config.load(path, "--rows a.json --stages.0.steps 20 --rate=2".split())
    assert (toy.name, toy.stages[0].steps) == ("a.json 2.0", 20)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--rate 1", "the config toy needs --rows. Give --rows FILE."),
        ("--rows a --rows b", "--rows is given twice; give it once"),
        ("--rows a --rate many", "rate must be float, got 'many'"),
        ("--rows a --rats 1", "Experiment has no field 'rats'"),
        ("--rows a --language x", "Experiment has no field 'language'"),
    ],
)
def test_wrong_arguments_of_a_config_are_one_sentence(path, words, wanted):
    path.write_text(WITH_ARGUMENTS)
    with pytest.raises(UserError) as error:
        config.load(path, words.split())
    assert sentence(error).startswith(wanted)


def test_json_and_back_is_the_same_value_and_the_same_types(path):
    toy = config.load(path)
    again = config.from_json(config.to_json(toy))
    assert again == toy and repr(again) == repr(toy)


def changed(toy: Experiment, change) -> str:
    tree = json.loads(config.to_json(toy))
    change(tree)
    return json.dumps(tree)


STRANGE = [
    (lambda t: t.update(modle=1), "Experiment has no field 'modle'; did you mean 'model'?"),
    (lambda t: t["stages"][1].pop("steps"), "Experiment.stages.1: field 'steps' of Stage is missing"),
    (lambda t: t["stages"][0].update(steps="x"), "Experiment.stages.0.steps must be int, got 'x'"),
    (lambda t: t["stages"][0].update(steps=True), "Experiment.stages.0.steps must be int, got True"),
    (lambda t: t.update(run=t["mesh"]), "Experiment.run must be RunConfig, got MeshConfig("),
    (lambda t: t["model"].update({"class": "subprocess.Popen"}), "'subprocess.Popen' is not a config"),
    (lambda t: t["model"].update({"class": "pstats.StatsProfile"}), "StatsProfile' is not a config"),
    (lambda t: t["model"].update({"class": "lionjax.core.config.load"}), "load' is not a config class"),
    (lambda t: t["model"].update({"class": "lionjax.nothing.A"}), "nothing.A' is not a config class"),
    (lambda t: t["model"].pop("class"), "None is not a config class"),
    (lambda t: t.pop("class"), "must be a JSON object with the key 'class'"),
]


@pytest.mark.parametrize(("change", "wanted"), STRANGE)
def test_json_that_is_no_config_is_refused_in_one_sentence(path, change, wanted):
    with pytest.raises(UserError) as error:
        config.from_json(changed(config.load(path), change))
    assert wanted in sentence(error)


def test_invalid_json_is_refused():
    with pytest.raises(UserError, match="not valid JSON"):
        config.from_json("{")


def test_a_field_missing_in_an_older_file_takes_its_default_with_a_log_line(path, caplog):
    toy = config.load(path)
    with caplog.at_level(logging.WARNING):
        old = config.from_json(changed(toy, lambda t: t["stages"][0].pop("clip_norm")))
    assert old == toy and "stages.0.clip_norm" in caplog.text


def test_show_prints_every_field_with_its_type(path):
    toy = config.load(path)
    text = config.format_config(toy)
    assert "  stages.1: Stage" in text.splitlines()
    assert "    grad_accum_steps: int = 2" in text.splitlines()
    assert text.count(" = ") == len(list(config.leaf_fields(toy)))


def test_difference_names_the_fields_that_differ(path):
    toy = config.load(path)
    assert config.diff_configs(toy, toy) == {}
    other = config.load(path, ["--stages.1.steps", "6", "--model.rank", "3"])
    assert config.diff_configs(toy, other) == {"model.rank": (2, 3), "stages.1.steps": (5, 6)}
    shorter = dataclasses.replace(toy, stages=toy.stages[:1])
    assert "stages.1.steps" in config.diff_configs(toy, shorter)
    swapped = dataclasses.replace(toy, system=RunConfig())
    assert config.diff_configs(toy, swapped)["model.class"] == ("LoraConfig", "RunConfig")


def test_batch_size_must_be_a_multiple_of_grad_accum_steps():
    with pytest.raises(UserError, match="must be a multiple of grad_accum_steps"):
        Stage("s", 1, ("a",), (("vqa", 1.0),), batch_size=5, grad_accum_steps=2)
