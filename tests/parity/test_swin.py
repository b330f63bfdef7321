# SPDX-License-Identifier: Apache-2.0
"""Swin against transformers' SwinModel: windows that fit and that do not, odd maps, gradients, names both ways."""

import jax
import leafwise
import numpy as np
import pytest
from safetensors.numpy import load_file

from lionjax import convert
from lionjax.models.vision import swin
from lionjax.models.vision.swin import Swin, SwinConfig

# Maps of 10, 5 and 3 places a side: padded to 12 and 6, shifted there, and one whole window in the end.
TINY = SwinConfig(image_size=40, width=8, depths=(2, 3, 2), num_heads=(1, 2, 4), window_size=3, mlp_ratio=2.0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """transformers' model with random weights, and the file that it writes."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    c = TINY
    config = transformers.SwinConfig(
        image_size=c.image_size,
        patch_size=c.patch_size,
        embed_dim=c.width,
        window_size=c.window_size,
        **{name: getattr(c, name) for name in ("depths", "num_heads", "mlp_ratio")},
    )
    model = transformers.SwinModel(config).eval()
    with torch.no_grad():  # as they begin, biases and the numbers of places are zero and norms say nothing
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
    folder = tmp_path_factory.mktemp("swin")
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


def close(mine, theirs, tolerance=1e-4, floor=0.0):
    theirs = np.asarray(theirs)
    most = max(tolerance * np.abs(theirs).max(), floor)
    np.testing.assert_allclose(np.asarray(mine), theirs, rtol=0, atol=most)


def picture(*size) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, 3, *size)).astype(np.float32)


@pytest.mark.slow
def test_swin_matches_transformers_in_the_output_of_every_stage_and_in_all_gradients(saved, tmp_path):
    import copy

    import torch

    theirs, rows = copy.deepcopy(saved[0]), swin.hf_weight_map(TINY)
    params = convert.params_from_state_dict(rows, saved[1])
    image_BCHW = picture(40, 40)
    out = theirs(torch.from_numpy(image_BCHW), output_hidden_states=True)
    close_to_BPD = torch.randn(out.last_hidden_state.shape)
    (out.last_hidden_state * close_to_BPD).sum().backward()

    def loss(params):
        last_BPD, maps = Swin(TINY).apply({"params": params}, image_BCHW.transpose(0, 2, 3, 1))
        return (last_BPD * close_to_BPD.numpy()).sum(), (last_BPD, maps)

    grads, (last_BPD, maps) = jax.jit(jax.grad(loss, has_aux=True))(params)
    close(last_BPD, out.last_hidden_state.detach())
    close(last_BPD.mean(1), out.pooler_output.detach())
    assert [m.shape[1:] for m in maps] == [(10, 10, 8), (5, 5, 16), (3, 3, 32)]
    close(maps[-1].reshape(2, 9, 32), out.hidden_states[-1].detach())

    for weight in theirs.parameters():  # gradients go out under the names that weights have in files
        weight.data = weight.grad
    theirs.save_pretrained(tmp_path)
    mine = convert.state_dict_from_params(rows, jax.tree.map(np.asarray, grads))
    wanted = load_file(tmp_path / "model.safetensors")
    assert mine.keys() == wanted.keys()
    for name, gradient in wanted.items():
        close(mine[name], gradient, 1e-3, 1e-5)  # keys' biases have none but rounding


@pytest.mark.slow
def test_swin_takes_images_of_any_size_and_returns_the_feature_map_of_every_stage(saved):
    import copy

    import torch

    theirs, c = copy.deepcopy(saved[0]), SwinConfig(None, 4, 8, (2, 3, 2), (1, 2, 4), 3, 2.0)
    params = convert.params_from_state_dict(swin.hf_weight_map(c), saved[1])
    image_BCHW = picture(30, 22)  # neither side is a multiple of the patch, nor a map's of the window
    with torch.no_grad():
        out = theirs(
            torch.from_numpy(image_BCHW),
            output_hidden_states=True,
            always_partition=True,
            output_hidden_states_before_downsampling=True,
        )
    _, maps = jax.jit(Swin(c).apply)({"params": params}, image_BCHW.transpose(0, 2, 3, 1))
    for mine, wanted in zip(maps, out.reshaped_hidden_states[1:], strict=True):
        close(mine.transpose(0, 3, 1, 2), wanted)


def test_swin_weights_round_trip_bit_exactly_under_both_naming_schemes(saved):
    ours = convert.params_from_state_dict(swin.hf_weight_map(TINY), saved[1])
    back = convert.state_dict_from_params(swin.hf_weight_map(TINY), ours)
    assert back.keys() == saved[1].keys()
    assert all(back[name].tobytes() == saved[1][name].tobytes() for name in back)
    original = convert.state_dict_from_params(swin.original_weight_map(TINY), ours)
    again = convert.params_from_state_dict(swin.original_weight_map(TINY), original)
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, again))
    assert original["layers.1.blocks.2.attn.qkv.weight"].shape == (48, 16)


def test_a_swin_file_with_another_attention_mask_is_refused_and_a_float16_mask_is_read():
    c = SwinConfig(16, 4, 4, (2,), (1,), 2, 1.0)
    shapes = jax.eval_shape(Swin(c).init, jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
    leaf = dict(is_leaf=lambda x: hasattr(x, "names"))
    params = jax.tree.map(lambda x: np.ones(x.value.shape, np.float16), shapes, **leaf)
    state = convert.state_dict_from_params(swin.original_weight_map(c), params)
    mask = state["layers.0.blocks.1.attn_mask"]
    assert mask.shape == (4, 4, 4) and set(np.unique(mask)) == {-100, 0}
    state["layers.0.blocks.1.attn_mask"] = mask.astype(np.float16)
    convert.params_from_state_dict(swin.original_weight_map(c), state)
    state["layers.0.blocks.1.attn_mask"] = np.zeros_like(mask)
    with pytest.raises(Exception, match="mask of windows of 2 shifted by 1 on 4"):
        convert.params_from_state_dict(swin.original_weight_map(c), state)


def test_stochastic_depth_drops_or_rescales_a_sample_in_training_only():
    change = np.ones((4000, 1, 1, 2), np.float32)
    assert swin.drop_path(change, 0.25, None) is change
    made = np.asarray(swin.drop_path(change, 0.25, jax.random.key(0)))
    assert set(np.unique(made)) == {0, np.float32(4 / 3)}
    assert np.array_equal(made[..., 0], made[..., 1]) and abs(made.mean() - 1) < 0.03


@pytest.mark.slow
def test_stochastic_depth_grows_with_depth_from_none():
    c = SwinConfig(8, 4, 4, (1,), (1,), 2, 1.0, drop_path_rate=0.9)
    image = np.ones((3, 8, 8, 3), np.float32)
    params = leafwise.init_leafwise(Swin(c).init, jax.random.key(0), image)
    still, moved = (Swin(c).apply(params, image, key)[0] for key in (None, jax.random.key(1)))
    np.testing.assert_array_equal(still, moved)  # a first layer alone is never passed over
    deep = SwinConfig(8, 4, 4, (2,), (1,), 2, 1.0, drop_path_rate=0.9)
    params = leafwise.init_leafwise(Swin(deep).init, jax.random.key(0), image)
    still, moved = (Swin(deep).apply(params, image, key)[0] for key in (None, jax.random.key(1)))
    assert not np.allclose(still, moved)


def test_a_picture_of_another_size_is_refused_in_words():
    with pytest.raises(ValueError, match="the image is 8 x 12 px, .* set image_size=None"):
        Swin(TINY).init(jax.random.key(0), np.zeros((1, 8, 12, 3), np.float32))
