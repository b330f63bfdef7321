# SPDX-License-Identifier: Apache-2.0
"""Kosmos-2, mPLUG-Owl and OpenFlamingo as they are published: recognized, read, and written again to the same bits."""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest
import small_bridges as bridges
import tiny_prefix as tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lionjax import convert
from lionjax.convert.formats.detect import format_of_config
from lionjax.core import params as trees
from lionjax.core.types import UserError
from lionjax.models.connectors.perceiver import ResamplerConfig
from lionjax.models.language.decoder import MPT_7B
from lionjax.models.vlm.flamingo import OPENFLAMINGO_9B
from lionjax.nn.adapters import GatedCrossAttentionConfig


def random_weights(system, seed: int = 0):
    numbers = np.random.default_rng(seed)
    shapes = format_of_config(system).abstract_params(system)
    return jax.tree.map(lambda leaf: numbers.standard_normal(leaf.shape).astype(np.float32), shapes)


def same(one, other):
    one, other = trees.flatten(one), trees.flatten(other)
    assert set(one) == set(other)
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[path], path)


def test_a_kosmos_2_of_transformers_round_trips(tmp_path):
    seed = tiny.seed()
    torch.manual_seed(seed)
    theirs, system = bridges.kosmos(random.Random(seed))
    theirs.save_pretrained(tmp_path / "theirs")
    config, params = convert.from_torch(tmp_path / "theirs")
    assert config == dataclasses.replace(system, image_token=-1), f"seed {seed}"
    convert.to_torch(config, params, tmp_path / "back")
    (tmp_path / "back" / "lionjax.json").unlink(missing_ok=True)
    again, info = transformers.Kosmos2ForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for name, weight in again.state_dict().items():
        np.testing.assert_array_equal(weight, theirs.state_dict()[name], name)
    same(convert.from_torch(tmp_path / "back")[1], params)


def test_an_mplug_owl_round_trips_with_its_own_config(tmp_path):
    system = dataclasses.replace(bridges.owl(random.Random(0)), image_token=-1)
    params = random_weights(system)
    convert.to_torch(system, params, tmp_path)
    (tmp_path / "lionjax.json").unlink(missing_ok=True)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mplug-owl"
    config, again = convert.from_torch(tmp_path)
    assert config == system
    same(again, params)


def openflamingo(folder, spelled: bool):
    """The parts of a tiny OpenFlamingo in a folder: what was trained, CLIP's file, MPT's folder."""
    text = dataclasses.replace(
        MPT_7B,
        **{
            "vocab_size": 40,
            "width": 64,
            "depth": 4,
            "num_heads": 2,
            "num_kv_heads": 2,
            "head_dim": 32,
            "mlp_dim": 256,
        },
        num_frozen_embeddings=37,
        pad_token_id=39,
        eos_token_id=37,
        cross_attention=GatedCrossAttentionConfig(2, 64, 1, 64, 80),
    )
    system = dataclasses.replace(
        OPENFLAMINGO_9B,
        vision=dataclasses.replace(OPENFLAMINGO_9B.vision, image=28, width=64, depth=2, heads=1, mlp_dim=72),
        resampler=ResamplerConfig(64, 2, 1, 64, 96, 5),
        language=text,
        image_token=38,
    )
    params = random_weights(system)
    state = {n: torch.tensor(w) for n, w in convert.state_dict_from_params(system.weight_map(), params).items()}
    wte = "lang_encoder.transformer.wte.weight"
    clip = {n.replace("vision_encoder.", "visual."): w for n, w in state.items() if n.startswith("vision_encoder.")}
    mpt = transformers.MptForCausalLM(
        transformers.MptConfig(d_model=64, n_heads=2, n_layers=4, vocab_size=44, layer_norm_epsilon=1e-5)
    ).state_dict()
    old = {
        n.removeprefix("lang_encoder.").replace("old_decoder_blocks", "transformer.blocks"): w
        for n, w in state.items()
        if n.startswith("lang_encoder.") and "gated" not in n and n != wte
    }
    old = {name: old.get(name, weight) for name, weight in mpt.items()}  # its own, shorter list of words
    trained = {n: w for n, w in state.items() if n.startswith("perceiver.") or "gated" in n or n == wte}
    if spelled:
        trained = {
            n.replace("gated_cross_attn_layers.1.", "transformer.blocks.1.gated_cross_attn_layer.").replace(
                "gated_cross_attn_layers.3.", "transformer.blocks.3.gated_cross_attn_layer."
            ): w
            for n, w in trained.items()
        }
    (folder / "mpt").mkdir(parents=True)
    torch.save(trained, folder / "checkpoint.pt")
    torch.save(clip | {"visual.proj": torch.zeros(64, 8)}, folder / "clip_vit_L.pth")
    torch.save({n: w for n, w in old.items() if n != "lm_head.weight"}, folder / "mpt" / "pytorch_model.bin")
    settings = {"model_type": "mpt", "d_model": 64, "n_heads": 2, "n_layers": 4, "vocab_size": 44}
    (folder / "mpt" / "config.json").write_text(json.dumps(settings))
    return system, params


@pytest.mark.parametrize("spelled", [False, True])
def test_an_openflamingo_is_combined_from_its_parts(tmp_path, spelled):
    system, params = openflamingo(tmp_path / "parts", spelled)
    config, found = convert.from_torch(tmp_path / "parts", system="flamingo")
    assert config == system
    same(found, params)
    convert.to_torch(config, found, tmp_path / "whole")
    again, back = convert.from_torch(tmp_path / "whole")
    assert again == system
    same(back, params)


def test_an_openflamingo_that_lacks_a_part_raises_a_one_sentence_error(tmp_path):
    openflamingo(tmp_path, False)
    (tmp_path / "clip_vit_L.pth").unlink()
    with pytest.raises(UserError, match="needs the parts of an OpenFlamingo"):
        convert.from_torch(tmp_path, system="flamingo")
