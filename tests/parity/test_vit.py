# SPDX-License-Identifier: Apache-2.0
"""The plain vision transformer in CLIP's setting against transformers' CLIPVisionModel."""

import dataclasses

import jax
import numpy as np
import pytest
from torch_configs import clip_config

from lionjax import convert
from lionjax.models.vision import vit
from lionjax.models.vision.vit import ViT

CLIP = dataclasses.replace(vit.CLIP_VIT_L, image_size=24, patch_size=8, width=20, depth=4, num_heads=5, mlp_dim=36)


@pytest.fixture(scope="module")
def clip():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = clip_config(CLIP)
    model = transformers.CLIPVisionModel(config).eval()
    with torch.no_grad():  # as they begin, biases are zero and norms say nothing
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model


@pytest.mark.slow
def test_clip_matches_transformers_in_every_layer(clip, tmp_path):
    import torch
    from safetensors.numpy import load_file

    clip.save_pretrained(tmp_path)
    saved = {name.removeprefix("vision_model."): w for name, w in load_file(tmp_path / "model.safetensors").items()}
    params = convert.params_from_state_dict(vit.clip_weight_map(CLIP), saved)
    image_BCHW = np.random.default_rng(0).standard_normal((2, 3, CLIP.image_size, CLIP.image_size)).astype(np.float32)
    with torch.no_grad():
        theirs = clip(torch.from_numpy(image_BCHW), output_hidden_states=True)
    run = jax.jit(lambda image: ViT(CLIP, tuple(range(CLIP.depth))).apply({"params": params}, image))
    last_BPD, seen_TBPD, first_BD = run(image_BCHW.transpose(0, 2, 3, 1))
    # Theirs count the embedded patches too, so the feature of layer -2 is our tap depth - 2.
    for layer, states in enumerate(theirs.hidden_states[1:]):
        np.testing.assert_allclose(seen_TBPD[layer], states, atol=1e-5)
    np.testing.assert_allclose(last_BPD, theirs.last_hidden_state, atol=1e-5)
    np.testing.assert_allclose(first_BD, theirs.pooler_output, atol=1e-5)
    back = convert.state_dict_from_params(vit.clip_weight_map(CLIP), params)
    assert back.keys() == saved.keys()
    assert all(np.array_equal(back[name], saved[name]) for name in saved)
