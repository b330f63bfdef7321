# SPDX-License-Identifier: Apache-2.0
"""The goldens see mistakes that are easily made: with each of them some value or gradient is another."""

import dataclasses
import json

import golden_grounding_dino
import golden_lyrics
import golden_nextchat
import golden_zerocap
import jax
import numpy as np
import pytest
from golden import assert_close, assert_same_norms, folders, lion_batch, lion_of, lion_states
from mutations import mutated
from safetensors.numpy import load_file

from lionjax import convert
from lionjax.inference import zerocap
from lionjax.models.heads import region
from lionjax.models.language import backend, t5
from lionjax.models.vision import grounding_dino, grounding_dino_encoder
from lionjax.models.vlm import qformer_stage1, region_lm

MISTAKES = {
    "location tokens are learned as words": (
        region,
        "batch.loss_mask_BM * (batch.target_BM != c.box_token_id)",
        "batch.loss_mask_BM",
        {"loss_lm", "loss_total"},
    ),
    "F without its last bias": (
        region,
        "self.decoder(state_BKD.astype(jnp.float32))",
        "self.decoder(state_BKD.astype(jnp.float32)) - self.decoder.variables['params']['down']['bias']",
        {"predicted_boxes", "loss_box"},
    ),
    "a stop-gradient in the cycle loss": (
        region,
        "losses.masked_mean(jnp.square(cycle_state_BKD - state_BKD), valid_BK)",
        "losses.masked_mean(jnp.square(cycle_state_BKD - jax.lax.stop_gradient(state_BKD)), valid_BK)",
        {"stage1"},
    ),
    "the box scale off by one pixel": (
        region_lm,
        "box_BK4 * self.c.box_scale",
        "box_BK4 * (self.c.box_scale - 1)",
        {"sam_mask_logits"},
    ),
}


def complaints(golden) -> set[str]:
    """Names of the values and of the gradient files that differ from the original's."""
    found = set()
    for name in golden.theirs.keys() & golden.ours.keys():
        try:
            assert_close(golden.ours[name], golden.theirs[name], name)
        except AssertionError:
            found.add(name)
    for stage, gradients in golden.gradients.items():
        norms = json.loads((golden.folder / f"grad_norms_{stage}.json").read_text())
        try:
            assert_same_norms(gradients, norms)
        except AssertionError:
            found.add(stage)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("folder", folders("nextchat"))
@pytest.mark.parametrize("mistake", MISTAKES)
def test_golden_comparison_detects_a_mutation_of_nextchat(monkeypatch, mistake, folder):
    module, old, new, seen = MISTAKES[mistake]
    changed = mutated(monkeypatch, module, old, new)
    if module is region:
        monkeypatch.setattr(region_lm, "region", changed)
        monkeypatch.setattr(region_lm, "BoxEncoderDecoder", changed.BoxEncoderDecoder)
    else:
        monkeypatch.setattr(region_lm.RegionModule, "predict_masks", changed.RegionModule.predict_masks)
    found = complaints(golden_nextchat.compute(folder, with_gradients="stage1" in seen))
    assert seen <= found, f"only {sorted(found)} differ"
    assert not found & {"projector_output", "logits", "last_hidden"}, "what lies before the mistake must stay"


def normed_adapters(monkeypatch, system):
    """The adapters read the normed stream, as LoRA-like adapters elsewhere do."""
    fed = 'name="adapters")(h_BLD, task_B)'
    normed = 'name="adapters")(h_BLD / jnp.sqrt((h_BLD**2).mean(-1, keepdims=True)), task_B)'
    monkeypatch.setattr(backend, "T5", mutated(monkeypatch, t5, fed, normed).T5)
    return system


def shifted_taps(monkeypatch, system):
    """The aggregator's layers counted from 1."""
    layers = tuple(layer - 1 for layer in system.aggregator.context_layers)
    return dataclasses.replace(system, aggregator=dataclasses.replace(system.aggregator, context_layers=layers))


def tanh_gelu(monkeypatch, system):
    """FlanT5's own activation, which LION overrides."""
    return dataclasses.replace(system, language=dataclasses.replace(system.language, activation="gelu_tanh"))


@pytest.mark.slow
@pytest.mark.parametrize("folder", folders("lion"))
@pytest.mark.parametrize("mistake", [normed_adapters, shifted_taps, tanh_gelu])
def test_golden_comparison_detects_a_mutation_of_lion(monkeypatch, mistake, folder):
    right = lion_of(json.loads((folder / "config.json").read_text()))
    params = convert.params_from_state_dict(right.weight_map(), load_file(folder / "weights.safetensors"))
    arrays = dict(np.load(folder / "arrays.npz"))
    system = mistake(monkeypatch, right)
    batch = lion_batch(arrays, "image_level")
    found, _ = jax.jit(lambda params: lion_states(system, params, batch))(params)  # traced anew, not from a cache
    with pytest.raises(AssertionError, match="logits: off by"):
        assert_close(found["logits"], arrays["image_level.ALL.logits"], "logits")


def with_running_positions(arrays, mode: str):
    """The packed text whose caption's positions go on where the boxes end, if it is masked as intended."""
    packed = golden_lyrics.packed_of(arrays, mode)
    if mode == "stage1":
        return packed
    return dataclasses.replace(packed, position_BL=np.arange(packed.mask_BL.shape[1]) * packed.mask_BL)


@pytest.mark.slow
@pytest.mark.parametrize("folder", folders("lyrics"))
def test_golden_comparison_detects_mutations_of_lyrics(monkeypatch, folder):
    """In one compilation: a gradient through the gathered side of ITC, and positions that do not restart."""
    changed = mutated(
        monkeypatch, qformer_stage1, "stop_gradient = jax.lax.stop_gradient", "stop_gradient = lambda x: x"
    )
    monkeypatch.setattr(
        qformer_stage1.QFormerStage1Module, "contrastive_loss", changed.QFormerStage1Module.contrastive_loss
    )
    found = complaints(golden_lyrics.compute_stage1(folder, with_running_positions))
    assert "stage1" in found, "the gradient norms must tell"
    assert {"stage1_intended.msp.hidden", "stage1_intended.loss_msp"} <= found
    assert not {name for name in found if name.startswith("stage1.")}, "no value of the first changes"


DETECTOR_MISTAKES = {
    "the text mask in the order head, row": (
        "shared.phrase_BLL[:, None]",
        "jnp.tile(shared.phrase_BLL, (c.num_heads // 2, 1, 1)).reshape("
        "len(x_BLD), c.num_heads // 2, *shared.phrase_BLL.shape[1:])",
    ),
    "the residual of the image from before the fusion's norm": (
        'add("image", normed_image_BPD,',
        'add("image", image_BPD,',
    ),
    "the residual of the text from before the fusion's norm": ('add("text", normed_text_BLD,', 'add("text", text_BLD,'),
}


@pytest.mark.slow
@pytest.mark.parametrize("folder", folders("grounding_dino"))
@pytest.mark.parametrize("mistake", DETECTOR_MISTAKES)
def test_golden_comparison_detects_a_mutation_of_grounding_dino(monkeypatch, mistake, folder):
    changed = mutated(monkeypatch, grounding_dino_encoder, *DETECTOR_MISTAKES[mistake])
    monkeypatch.setattr(grounding_dino, "EnhancerLayer", changed.EnhancerLayer)
    golden = golden_grounding_dino.read(folder)
    found = golden.states()
    differing = set()
    for name in golden.theirs:
        try:
            assert_close(*golden.comparable(name, found), name)
        except AssertionError:
            differing.add(name)
    last = golden.c.encoder_depth - 1
    assert {f"enhancer.{last}.text", "pred_boxes", "hidden_state"} <= differing
    before = ("backbone.", "level.", "text_")
    assert not {name for name in differing if name.startswith(before)}, "what lies before the mistake must stay"


ZEROCAP_MISTAKES = {
    "the update without the norm's power": (
        ' ** rates["norm_power"]',
        "",
        "beam2",
        {"step0.deltas", "step0.losses", "step0.logits_before_edit", "step0.probs"},
    ),
    "the norm of all beams together": (
        "axis=(2, 3, 4), keepdims",
        "axis=(1, 2, 3, 4), keepdims",
        "beam2",
        {"step1.deltas", "step1.losses", "step1.probs"},
    ),
    "a softmax over the vocabulary": (
        "params, state, config.num_candidates)",
        "params, state, model.info.vocab_size)",
        "beam2",
        {"step0.clip_losses", "step0.deltas", "step0.probs"},
    ),
    "the repetition penalty over new tokens only": (
        "context[-config.repetition_window :]",
        "context[len(context) - min(config.repetition_window, number) :]",
        "beam3_end",
        {"step0.logits_after_edit", "step0.probs"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("folder", folders("zerocap"))
@pytest.mark.parametrize("mistake", ZEROCAP_MISTAKES)
def test_golden_comparison_detects_a_mutation_of_zerocap(monkeypatch, mistake, folder):
    old, new, case, seen = ZEROCAP_MISTAKES[mistake]
    golden, changed = golden_zerocap.ZeroCapGolden(folder), mutated(monkeypatch, zerocap, old, new)
    found = golden.complaints(case, golden.compare(case, changed, 2))
    assert seen <= found, f"only {sorted(found)} differ"
    assert not found & {"step0.context_ids", "step0.p0"}, "what lies before the mistake must stay"
