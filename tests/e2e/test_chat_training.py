# SPDX-License-Identifier: Apache-2.0
"""Talks of several turns, learned and then held through `model.answer`, with each way of hearing of a picture."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from chat_prompts import PICTURE, decoder_prompts

from lionjax.core.experiment import Experiment
from lionjax.data.config import DataConfig
from lionjax.data.processor import ImageTextInput, Processor
from lionjax.data.scenes.dataset import Scenes
from lionjax.inference.loading import from_params
from lionjax.models.connectors.perceiver import AbstractorConfig, ResamplerConfig
from lionjax.models.connectors.qformer import QFormerConfig
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.language.t5 import T5Config
from lionjax.models.vision.vit import ViTConfig
from lionjax.models.vlm.flamingo import Flamingo
from lionjax.models.vlm.visual_prefix import VisualPrefixLM
from lionjax.nn.adapters import GatedCrossAttentionConfig

VIT = ViTConfig(14, 7, 16, 1, 2, 24)
READS = DecoderConfig(1024, 32, 2, 2, 2, 16, 48, eos_token_id=1)
T5 = T5Config(1024, 32, 16, 2, 48, 2, 2, dropout=0.0)
QFORMER = QFormerConfig(16, 2, 2, 24, 4, 2, 16, 1024, 64, dropout=0.0)
LOOKS = dataclasses.replace(READS, cross_attention=GatedCrossAttentionConfig(1, 16, 2, 8, 48))
OWN = {"image_token_id": PICTURE, "torch_names": "original", "feature_layer": -1}
SYSTEMS = {
    "patches are words (LLaVA, Shikra)": VisualPrefixLM(VIT, READS, **OWN),
    "a Q-Former asks (BLIP-2, InstructBLIP, MiniGPT-4)": VisualPrefixLM(VIT, T5, QFORMER, projector_depth=1, **OWN),
    "queries look (mPLUG-Owl)": VisualPrefixLM(
        VIT,
        READS,
        resampler=AbstractorConfig(16, 1, 2, 24, 4, dropout=0.0),
        projector_depth=1,
        add_image_end_token=True,
        **OWN,
    ),
    "layers look (Flamingo)": Flamingo(VIT, ResamplerConfig(16, 1, 2, 8, 24, 4), LOOKS, PICTURE),
}
WORDS = ("red", "blue")
PICTURES = {"yes": np.full((14, 14, 3), 10, np.uint8), "no": np.full((14, 14, 3), 240, np.uint8)}
FIRST, SECOND, THIRD = "Name one.", "Which was it?", "Is it dark?"


def talks():
    """(dark or not, what was said so far, the question, its answer): one needs the talk, the other the picture."""
    for dark in PICTURES:
        for word in WORDS:
            so_far = ((FIRST, word),)
            yield dark, so_far, SECOND, word
            yield dark, (*so_far, (SECOND, word)), THIRD, dark


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_trained_model_answers_from_the_earlier_turns_and_from_the_image(name):
    system = SYSTEMS[name]
    reads = "encoder" if isinstance(system.language, T5Config) else "decoder"
    lengths = {"max_prompt_tokens": 20, "max_question_tokens": 12, "max_target_tokens": 16}
    processor = decoder_prompts(image_size=14, reader=reads, followup_template="{question}", **lengths)
    rows = list(talks())
    batch = Processor(processor).batch(
        [ImageTextInput(PICTURES[dark], question, turns=turns) for dark, turns, question, _ in rows],
        [answer for *_, answer in rows],
    )
    params = nn.unbox(jax.jit(system.init)(jax.random.key(0), batch))
    rule = optax.adam(2e-3)

    @jax.jit
    def learn(params):
        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(lambda p: system.loss(p, batch)[0])(params)
            updates, state = rule.update(grads, state)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, rule.init(params)), None, 400)

    (params, _), _ = learn(params)
    experiment = Experiment("talk", system, DataConfig((Scenes((2, 2, 2), image_size=14),), processor), stages=())
    said = from_params(experiment, params).answer(
        [PICTURES[dark] for dark, *_ in rows],
        [question for *_, question, _ in rows],
        history=[turns for _, turns, *_ in rows],
    )
    assert [answer.text for answer in said] == [answer for *_, answer in rows]
