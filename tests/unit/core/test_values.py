# SPDX-License-Identifier: Apache-2.0
"""Values are checked where they are set: ranges, NaN, dtypes, and true and false in any spelling."""

import math

import pytest
from paths import ROOT

from lionjax.cli.errors import UsageError
from lionjax.core import config
from lionjax.core.errors import UserError
from lionjax.core.experiment import GenerationDefaults, Mix, RunConfig, Stage
from lionjax.data.config import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.data.scenes.dataset import Scenes
from lionjax.nn.lora import LoraConfig

NAN, INF = math.nan, math.inf


def stage(**fields):
    return Stage(
        **{"name": "one", "steps": 2, "trainable": ("x",), "mixture": (("vqa", 1.0),), "batch_size": 2} | fields
    )


def a_config():
    return config.load(ROOT / "configs" / "tiny_lion.py")


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (stage, {"steps": -1}),
        *((stage, {"learning_rate": value}) for value in (-1e-4, NAN, INF)),
        (stage, {"warmup_steps": -1}),
        (stage, {"warmup_learning_rate": -1.0}),
        (stage, {"end_learning_rate": NAN}),
        (stage, {"weight_decay": -0.1}),
        (stage, {"clip_norm": NAN}),
        *((stage, {"betas": value}) for value in ((0.9, 1.0), (-0.1, 0.9), (NAN, 0.9), (0.9, 1.5))),
        (stage, {"lr_multipliers": (("a", 1.0), ("b", -1.0))}),
        (stage, {"mixture": (("vqa", NAN),)}),
        (stage, {"mixture": (("vqa", "inf"),)}),
        (lambda shots: Mix("vqa", shots=shots), {"shots": -1}),
        *((RunConfig, {name: -1}) for name in ("log_every", "save_every", "evaluate_limit", "max_to_keep")),
        (RunConfig, {"loss_spike_sigmas": NAN}),
        (RunConfig, {"watchdog_seconds": -1.0}),
        (RunConfig, {"feature_cache_gib": INF}),
        (RunConfig, {"frozen_dtype": "int8"}),
        (RunConfig, {"frozen_dtype": "bf16"}),
        (GenerationDefaults, {"num_beams": 0}),
        (GenerationDefaults, {"top_p": 1.5}),
        (GenerationDefaults, {"temperature": NAN}),
        (GenerationDefaults, {"max_new_tokens": -1}),
        (DataConfig, {"tag_noise": NAN}),
        (DataConfig, {"crop_scale": (NAN, 1.0)}),
        (DataConfig, {"length_buckets": (8, 0)}),
        (ProcessorConfig, {"image_std": (0.0, 1.0, 1.0)}),
        (ProcessorConfig, {"image_mean": (NAN, 0.0, 0.0)}),
        (Scenes, {"seed": -1}),
        (Scenes, {"sizes": (1, -1, 1)}),
        (LoraConfig, {"rank": -1}),
        (LoraConfig, {"alpha": NAN}),
        (LoraConfig, {"dropout": 1.0}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_value_out_of_its_range_is_refused_with_field_and_value(make, wrong):
    with pytest.raises(UserError) as error:
        make(**wrong)
    (name,) = wrong
    text = str(error.value)
    assert "\n" not in text and len(text) < 300
    assert name in text or "mixture entry 'vqa': weight" in text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", "-1"),
        ("seed", str(2**32)),
        ("stages.0.learning_rate", "-0.1"),
        ("stages.1.betas", "0.9 nan"),
        ("run.frozen_dtype", "float8"),
        ("model.dtype", "float64"),
        ("model.language.dropout", "-0.5"),
        ("model.language.norm_eps", "nan"),
    ],
)
def test_the_command_line_is_held_to_the_same_ranges(field, value):
    with pytest.raises(UserError) as error:
        config.apply_overrides(a_config(), [f"--{field}", *value.split()])
    assert field.rpartition(".")[2] in str(error.value)


@pytest.mark.parametrize("word", ["true", "True", "TRUE", "yes", "on", "1", "false", "FALSE", "No", "off", "0"])
def test_true_and_false_may_be_spelled_in_any_way(word):
    wanted = word.lower() in ("true", "yes", "on", "1")
    changed = config.apply_overrides(a_config(), ["--run.cache_features", word, "--data.hflip", word])
    assert changed.run.cache_features is wanted and changed.data.hflip is wanted


@pytest.mark.parametrize("word", ["maybe", "2", "", "tru"])
def test_another_word_than_true_and_false_is_refused(word):
    with pytest.raises(UserError, match="run.cache_features must be bool"):
        config.apply_overrides(a_config(), ["--run.cache_features", word])


def test_true_and_false_in_untyped_fields_are_booleans():
    changed = config.apply_overrides(a_config(), ["--stages.0.model_overrides", "a", "true", "b", "FALSE", "c", "x"])
    assert changed.stages[0].model_overrides == (("a", True), ("b", False), ("c", "x"))


@pytest.mark.parametrize("limit", ["0", "-3", "x", "1.5"])
def test_limits_of_the_command_line_are_above_zero(limit):
    from lionjax.cli import entry

    for words in (["evaluate", "d", "--benchmark", "vqa"], ["data", "inspect", "scenes"]):
        with pytest.raises(UsageError, match="limit"):
            entry.run([*words, f"--limit={limit}"])
