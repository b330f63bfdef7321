# SPDX-License-Identifier: Apache-2.0
"""A dual encoder is evaluated by the captions that it finds for images."""

import dataclasses

import jax
import numpy as np
import pytest
from paths import CONFIGS

from lionjax.core import config
from lionjax.core import params as trees
from lionjax.data import pipeline
from lionjax.data.scenes.dataset import Scenes
from lionjax.evaluation import runner
from lionjax.inference import dual_encoder, loading


@pytest.mark.slow
def test_each_image_gets_the_caption_that_fits_it_best_and_exact_is_the_recall():
    whole = config.load(CONFIGS / "tiny_clip.py")
    model = dataclasses.replace(
        whole.model,
        vision=dataclasses.replace(whole.model.vision, depth=1),
        text=dataclasses.replace(whole.model.text, depth=1),
    )
    data = dataclasses.replace(whole.data, sources=(Scenes(sizes=(9, 2, 12), image_size=112),))
    experiment = dataclasses.replace(whole, model=model, data=data)
    batch = loading.dummy_batch(loading.from_params(experiment, {}).processor)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)
    rng = np.random.default_rng(0)
    flat = {
        path: rng.standard_normal(leaf.value.shape).astype(np.float32) for path, leaf in trees.flatten(shapes).items()
    }
    engine = loading.from_params(experiment, trees.unflatten(flat)).engine
    entry = runner.evaluate(engine, data, experiment.generation, "caption", limit=10)
    clip = dual_encoder.from_engine(engine)
    samples = list(pipeline.examples(data, "caption", "heldout", 10))
    logits_NN = clip.logits([s.image for s in samples], [s.example.answers[0] for s in samples])
    assert len(set(logits_NN.argmax(axis=1).tolist())) > 2
    assert entry["details"]["exact"] == (logits_NN.argmax(axis=1) == np.arange(10)).mean()
    assert {"caption_cider", "caption_rouge_l"} <= entry["metrics"].keys() & entry["blind"].keys()
