# SPDX-License-Identifier: Apache-2.0
"""A tiny Grounding DINO trains from a config, and its run folder detects and is evaluated."""

import dataclasses
import runpy

import jax
import numpy as np
import pytest
from paths import ROOT

import lionjax
from lionjax.core.experiment import Mix, Stage
from lionjax.core.types import UserError
from lionjax.data import pipeline
from lionjax.data.scenes.dataset import Scenes
from lionjax.evaluation import runner
from lionjax.inference import detector
from lionjax.models.vision.swin import SwinConfig
from lionjax.models.vlm.visual_prefix import VisualPrefixLM
from lionjax.training import loop


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run folder of two steps at the smallest sizes, and its last parameters."""
    experiment = runpy.run_path(str(ROOT / "configs" / "tiny_grounding_dino.py"))["get_config"]()
    swin = SwinConfig(None, 4, 8, (1, 1), (1, 1), 4, 1.0, drop_path_rate=0.0, output_stages=(0, 1))
    sizes = {"width": 32, "mlp_dim": 32, "encoder_depth": 1, "decoder_depth": 1, "num_queries": 12, "num_levels": 2}
    text = dataclasses.replace(experiment.model.detector.text, width=8, depth=1, num_heads=1, mlp_dim=8)
    small = dataclasses.replace(experiment.model.detector, swin=swin, text=text, num_points=1, num_heads=2, **sizes)
    data = dataclasses.replace(
        experiment.data,
        sources=(Scenes((8, 4, 4), 32),),
        processor=dataclasses.replace(experiment.data.processor, image_size=32),
    )
    experiment = dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, detector=small, image_size=32),
        data=data,
        stages=(Stage("detect", 2, (".*",), (Mix("detect"),), 2, learning_rate=1e-3, warmup_steps=0),),
    )
    folder = tmp_path_factory.mktemp("detector") / "run"
    return folder, loop.train(experiment, folder, pipeline.batches)[0]


@pytest.mark.slow
def test_a_run_folder_is_a_detector_with_the_trained_parameters_and_image_settings(run):
    folder, params = run
    found = detector.load(folder)
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params, jax.device_get(params)))
    assert found.images.fit.size == (32, 32) and found.tokenizer.token_to_id("[CLS]") == 2
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    (result,) = found.detect([image], "red star. ring.", box_threshold=0.0)
    assert len(result.scores) == 12 and result.size == (60, 40) and result.features_KD.shape == (12, 36)


@pytest.mark.slow
def test_a_detector_is_evaluated_by_the_names_it_finds(run):
    model = lionjax.load(run[0])
    assert runner.model_benchmarks(model) == ["detect"]
    entry = runner.evaluate_model(model, "detect", run[0], limit=3, with_blind=True)
    assert entry["metrics"].keys() == {"detect_found", "detect_silent"} == entry["blind"].keys()
    assert entry["samples"] == 3 and (run[0] / "evaluation" / "detect.jsonl").is_file()
    with pytest.raises(UserError, match="is a VisualPrefixLM, no detector"):
        detector.from_engine(dataclasses.replace(model.engine, model=VisualPrefixLM()))
