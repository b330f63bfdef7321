# SPDX-License-Identifier: Apache-2.0
"""What the originals compute with tiny weights: values, losses, gradient norms, generated ids.

Every folder under $LIONJAX_GOLDEN (default tests/golden) is checked, with the sizes of its own config.json.
"""

import dataclasses
import json

import golden_grounding_dino
import golden_lyrics
import golden_nextchat
import jax
import numpy as np
import pytest
from golden import assert_close, assert_same_norms, folders, lion_batch, lion_of, lion_states, ram_of
from safetensors.numpy import load_file

from lionjax import convert
from lionjax.core import params as trees
from lionjax.core.types import CATEGORIES, Batch
from lionjax.inference.generate import GenerationConfig, generate
from lionjax.models.vision import grounding_dino_weights, ram
from lionjax.models.vision.ram import Ram
from lionjax.models.vlm.lion import Lion


def test_a_golden_root_that_is_missing_fails(monkeypatch, tmp_path):
    monkeypatch.setattr("golden.ROOT", tmp_path / "gone")
    with pytest.raises(AssertionError, match="gone, where no folder holds a config.json"):
        folders("lion")


def only_used(params, lion: Lion, batch: Batch):
    """The part of a full LION that one setting of visual_input reads."""
    wanted = trees.flatten(jax.eval_shape(lion.init, jax.random.key(0), batch))
    have = trees.flatten(params)
    return trees.unflatten({path: have[path] for path in have if any(path == w or w.startswith(path) for w in wanted)})


@pytest.fixture(scope="module", params=folders("lion"))
def lion_golden(request):
    folder = request.param
    config = json.loads((folder / "config.json").read_text())
    lion = lion_of(config)
    params = convert.params_from_state_dict(lion.weight_map(), load_file(folder / "weights.safetensors"))
    return folder, config, lion, params, dict(np.load(folder / "arrays.npz"))


def cases(arrays) -> list[tuple[str, str]]:
    return sorted({tuple(name.split(".")[:2]) for name in arrays if name.endswith(".logits")})


@pytest.mark.slow
def test_lion_computes_what_the_original_computes(lion_golden):
    _, config, _, params, arrays = lion_golden
    checked = 0
    for route, visual_input in cases(arrays):
        lion, batch = lion_of(config, visual_input), lion_batch(arrays, route)

        found, loss = jax.jit(lion_states, static_argnums=0)(lion, params, batch)
        for what, value in found.items():
            name = what if what.startswith("vit_") else f"{route}.{visual_input}.{what}"
            if name in arrays:
                assert_close(value, arrays[name], name)
                checked += 1
        assert loss == pytest.approx(float(arrays[f"{route}.{visual_input}.loss"]), rel=1e-4)
    assert checked >= 4


@pytest.mark.slow
@pytest.mark.parametrize("route", CATEGORIES)
def test_lion_has_the_originals_gradient_norm_for_every_weight(lion_golden, route):
    folder, _, lion, params, arrays = lion_golden
    file = folder / f"grad_norms_{route}.json"
    if not file.exists():
        pytest.skip(f"{folder.name} has no {file.name}")
    batch = lion_batch(arrays, route)
    grads = jax.jit(jax.grad(lambda params: lion.loss(params, batch)[0]))(params)
    mine = convert.state_dict_from_params(lion.weight_map(), jax.tree.map(np.asarray, grads))
    assert_same_norms(mine, json.loads(file.read_text()))


@pytest.mark.slow
def test_lion_generates_the_originals_ids(lion_golden):
    _, config, lion, params, arrays = lion_golden
    for name, setting in config["generate"].items():
        chosen = GenerationConfig(
            max_new_tokens=setting["max_new_tokens"],
            min_length=setting["min_length"],
            num_beams=setting["num_beams"],
            length_penalty=setting["length_penalty"],
            repetition_penalty=setting["repetition_penalty"],
            eos_token_id=lion.language.end_token,
            pad_token_id=lion.language.pad_token,
            decoder_start_token_id=lion.language.start_token,
        )
        made = generate(lion, params, lion_batch(arrays, setting["router"]), chosen)
        theirs = arrays[name][:, 1:]  # without the start token
        width = theirs.shape[1]
        np.testing.assert_array_equal(np.asarray(made.ids_BM)[:, :width], theirs, err_msg=name)


def test_lion_weights_go_back_to_the_same_bits(lion_golden):
    folder, _, lion, params, _ = lion_golden
    theirs = load_file(folder / "weights.safetensors")
    back = convert.state_dict_from_params(lion.weight_map(), params)
    assert back.keys() == theirs.keys()
    assert all(back[name].tobytes() == theirs[name].tobytes() for name in theirs)


@pytest.fixture(scope="module", params=folders("nextchat"))
def nextchat_golden(request):
    return golden_nextchat.compute(request.param)


@pytest.mark.slow
def test_nextchat_computes_what_the_original_computes(nextchat_golden):
    theirs, ours = nextchat_golden.theirs, nextchat_golden.ours
    texts, places = {"input_ids", "labels", "attention_mask"}, {"loc_inputs", "loc_targets", "sam_target_masks"}
    outputs = theirs.keys() - texts - places - {"image", "sam_image"}
    assert outputs <= ours.keys()
    for name in sorted(outputs):
        assert_close(ours[name], theirs[name], name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_nextchat_has_the_originals_gradient_norm_for_every_weight(nextchat_golden, stage):
    norms = json.loads((nextchat_golden.folder / f"grad_norms_{stage}.json").read_text())
    assert_same_norms(nextchat_golden.gradients[stage], norms)


@pytest.mark.slow
def test_nextchat_weights_go_back_to_the_same_bits(nextchat_golden):
    theirs = load_file(nextchat_golden.folder / "weights.safetensors")
    back = convert.state_dict_from_params(nextchat_golden.system.weight_map(), nextchat_golden.params)
    assert back.keys() == theirs.keys()
    assert all(back[name].tobytes() == theirs[name].tobytes() for name in theirs)


def ram_states(module: Ram, image_BHWC) -> dict:
    seen_BPD = module.encode_image(image_BHWC)
    image_BPC = module.image(seen_BPD)
    states_BVD = module.decode_tags(image_BPC)
    found = {"swin_output": seen_BPD, "image_embeds": image_BPC, "tagging_output": states_BVD}
    return found | {"logits": module(image_BHWC)}


@pytest.mark.slow
@pytest.mark.parametrize("folder", folders("ram"))
def test_ram_computes_what_the_original_computes_and_goes_back_to_the_same_bits(folder):
    c = ram_of(json.loads((folder / "config.json").read_text()))
    weights, arrays = load_file(folder / "weights.safetensors"), dict(np.load(folder / "arrays.npz"))
    params = convert.params_from_state_dict(ram.weight_map(c), weights)
    run = jax.jit(lambda image: Ram(c).apply({"params": params}, image, method=ram_states))
    found = run(arrays["image"].transpose(0, 2, 3, 1))
    assert found.keys() == arrays.keys() - {"image"}
    for name, value in found.items():
        assert_close(value, arrays[name], name)
    back = convert.state_dict_from_params(ram.weight_map(c), params)
    assert back.keys() == weights.keys()
    assert all(back[name].tobytes() == weights[name].tobytes() for name in weights)


@pytest.fixture(scope="module", params=folders("grounding_dino"))
def detector_golden(request):
    return golden_grounding_dino.read(request.param)


@pytest.mark.slow
def test_grounding_dino_computes_what_the_original_computes_with_unequal_pictures_and_captions(detector_golden):
    golden = detector_golden
    found = golden.states()
    assert len(golden.theirs) > 30 and golden.theirs.keys() <= found.keys()
    for name in golden.theirs:
        assert_close(*golden.comparable(name, found), name)


def test_grounding_dino_weights_go_back_to_the_same_bits_also_under_the_names_of_lyrics(detector_golden):
    golden = detector_golden
    back = convert.state_dict_from_params(grounding_dino_weights.original_weight_map(golden.c), golden.params)
    assert back.keys() == golden.weights.keys()
    assert all(back[name].tobytes() == golden.weights[name].tobytes() for name in back)
    lyrics = convert.state_dict_from_params(grounding_dino_weights.lyrics_weight_map(golden.c), golden.params)
    assert len(lyrics) == len(back)
    assert "grounding_dino.backbone.swintransformer.patch_embed.proj.weight" in lyrics
    assert "grounding_dino.transformer.encoder.fusion_layers.0.temp_l" in lyrics


@pytest.fixture(scope="module", params=folders("lyrics"))
def lyrics_stage1_golden(request):
    return golden_lyrics.compute_stage1(request.param)


@pytest.fixture(scope="module", params=folders("lyrics"))
def lyrics_stage2_golden(request):
    return golden_lyrics.compute_stage2(request.param)


def assert_every_array(golden, prefixes: tuple[str, ...]):
    """Each of the original's arrays under these prefixes that is an output is what we compute."""
    outputs = {
        name for name in golden.theirs if name.startswith(prefixes) and not name.startswith(golden_lyrics.INPUTS)
    }
    assert outputs and outputs <= golden.ours.keys(), sorted(outputs - golden.ours.keys())
    for name in sorted(outputs):
        assert_close(golden.ours[name], golden.theirs[name], name)


@pytest.mark.slow
def test_lyrics_stage1_computes_what_the_original_computes(lyrics_stage1_golden):
    assert_every_array(lyrics_stage1_golden, ("vision_output", "stage1"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["stage1", "stage1_intended"])
def test_lyrics_stage1_has_the_originals_gradient_norm_for_every_weight(lyrics_stage1_golden, mode):
    norms = json.loads((lyrics_stage1_golden.folder / f"grad_norms_{mode}.json").read_text())
    assert_same_norms(lyrics_stage1_golden.gradients[mode], norms)


@pytest.mark.slow
def test_lyrics_stage2_computes_and_generates_what_the_original_does(lyrics_stage2_golden):
    golden = lyrics_stage2_golden
    assert_every_array(golden, ("stage2",))
    for name in ("instruct", "caption", "lora"):
        np.testing.assert_array_equal(golden.ours[f"stage2.{name}.generate"], golden.theirs[f"stage2.{name}.generate"])
    assert_close(
        golden.ours["queries_alone"], golden.theirs["stage2.caption.language_inputs"], "read_instruction=False"
    )


@pytest.mark.slow
@pytest.mark.parametrize("what", ["instruct", "caption", "lora"])
def test_lyrics_stage2_has_the_originals_gradient_norm_for_every_weight(lyrics_stage2_golden, what):
    norms = json.loads((lyrics_stage2_golden.folder / f"grad_norms_stage2_{what}.json").read_text())
    norms = {name.replace(".default.", "."): norm for name, norm in norms.items()}  # PEFT's name of the adapter
    assert_same_norms(lyrics_stage2_golden.gradients[f"stage2_{what}"], norms)


@pytest.mark.slow
@pytest.mark.parametrize("folder", folders("lyrics"))
def test_the_experts_in_a_lyrics_checkpoint_compute_what_the_original_computes(folder):
    mine, theirs = golden_lyrics.compute_experts(folder)
    for name in ("ram.logits", "detector.pred_boxes", "detector.hidden_state"):
        assert_close(mine[name], theirs[name], name)
    logits = theirs["detector.pred_logits"]
    real = np.isfinite(logits)
    assert (np.isfinite(mine["detector.pred_logits"]) == real).all()
    assert_close(mine["detector.pred_logits"][real], logits[real], "detector.pred_logits")


@pytest.mark.parametrize("folder", folders("lyrics"))
@pytest.mark.parametrize("stage", golden_lyrics.STAGES)
def test_lyrics_weights_go_back_to_the_same_bits(folder, stage):
    config, _, weights = golden_lyrics.load(folder)
    make_system, without = golden_lyrics.STAGES[stage]
    system = dataclasses.replace(make_system(config), **golden_lyrics.experts_of(config))
    theirs = golden_lyrics.tensors_of(weights, without, experts=True)
    back = convert.state_dict_from_params(system.weight_map(), golden_lyrics.params_of(system, weights, without))
    assert back.keys() == theirs.keys()
    assert all(back[name].tobytes() == theirs[name].tobytes() for name in theirs)
