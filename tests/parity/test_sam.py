# SPDX-License-Identifier: Apache-2.0
"""SAM against transformers' SamModel, its sizes drawn anew at each run: every sort of prompt, and masks brought back to
the picture."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lionjax import convert
from lionjax.models.vision import sam_decoder
from lionjax.models.vision.sam_decoder import Sam
from lionjax.models.vision.sam_encoder import SAM_VIT_B, SAM_VIT_H, SamConfig

SEED = random.SystemRandom().randrange(10**6)


def drawn(draw: random.Random) -> SamConfig:
    heads, wide, patch = draw.choice([2, 3]), draw.choice([2, 3]), draw.choice([4, 8])
    grid, period = draw.choice([6, 8, 9]), draw.choice([2, 3])
    return SamConfig(
        image_size=grid * patch,
        patch_size=patch,
        width=heads * draw.choice([6, 8]),
        depth=2 * period,
        num_heads=heads,
        mlp_dim=draw.randint(20, 50),
        window_size=draw.choice([2, 3, 4]),
        global_attn_indexes=(period - 1, 2 * period - 1),
        prompt_embed_dim=8 * wide,
        mask_input_channels=draw.choice([4, 8]),
        decoder_num_heads=2,
        decoder_mlp_dim=draw.randint(20, 40),
        iou_head_depth=draw.choice([2, 3]),
        iou_head_mlp_dim=draw.randint(8, 16),
    )


TINY = drawn(random.Random(SEED))


@pytest.fixture(scope="module")
def twins():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    c = TINY
    image_sizes = {"image_size": c.image_size, "patch_size": c.patch_size, "hidden_size": c.prompt_embed_dim}
    encoder = image_sizes | {"hidden_size": c.width, "num_hidden_layers": c.depth, "num_attention_heads": c.num_heads}
    encoder |= {"mlp_dim": c.mlp_dim, "window_size": c.window_size, "output_channels": c.prompt_embed_dim}
    encoder |= {"global_attn_indexes": list(c.global_attn_indexes), "num_pos_feats": c.prompt_embed_dim // 2}
    decoder = {"mlp_dim": c.decoder_mlp_dim, "num_attention_heads": c.decoder_num_heads}
    decoder |= {"iou_head_hidden_dim": c.iou_head_mlp_dim, "iou_head_depth": c.iou_head_depth}
    config = transformers.SamConfig(
        vision_config=encoder,
        prompt_encoder_config=image_sizes | {"mask_input_channels": c.mask_input_channels},
        mask_decoder_config=decoder | {"layer_norm_eps": c.decoder_norm_eps, "hidden_size": c.prompt_embed_dim},
    )
    theirs = transformers.SamModel(config).eval()
    with torch.no_grad():  # as they begin, most weights are zero
        for name, weight in theirs.named_parameters():
            weight += (0.4 if name.startswith("mask_decoder") else 0.3) * torch.randn_like(weight)
            weight *= 0.1 if "positional_embedding" in name else 1
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    return theirs, convert.params_from_state_dict(sam_decoder.hf_weight_map(c), state), state


def prompts() -> dict[str, dict[str, np.ndarray]]:
    """Prompts for two pictures, two things each, in pixels."""
    numbers = np.random.default_rng(0)
    corner = numbers.uniform(0, TINY.image_size / 2, (2, 2, 2))
    box = np.concatenate([corner, corner + numbers.uniform(4, TINY.image_size / 2, (2, 2, 2))], axis=-1).astype(
        np.float32
    )
    point = numbers.uniform(0, TINY.image_size, (2, 2, 3, 2)).astype(np.float32)
    label = np.array([[[1, 0, 1], [1, -10, -10]], [[0, 1, -1], [1, 1, 0]]], np.int32)
    mask = numbers.standard_normal((2, 4 * TINY.grid_size, 4 * TINY.grid_size)).astype(np.float32)
    return {
        "points": {"point_BKT2": point, "label_BKT": label},
        "box": {"box_BK4": box},
        "box and mask": {"box_BK4": box, "mask_BHW": mask},
        "all": {"point_BKT2": point, "label_BKT": label, "box_BK4": box, "mask_BHW": mask},
    }


@pytest.mark.slow
def test_masks_and_scores_for_every_prompt_are_those_of_transformers(twins):
    import torch

    theirs, params, _ = twins
    image_BCHW = np.random.default_rng(1).standard_normal((2, 3, TINY.image_size, TINY.image_size)).astype(np.float32)

    @jax.jit
    def run(image):
        def everything(model: Sam):
            seen = model.encode(image)
            answers = {}
            for name, given in prompts().items():
                arguments = [given.get(key) for key in ("point_BKT2", "label_BKT", "box_BK4", "mask_BHW")]
                answers[name] = model.decode(seen, *model.prompts(*arguments))
            return seen, answers

        return Sam(TINY).apply({"params": params}, method=everything)

    seen, answers = run(image_BCHW.transpose(0, 2, 3, 1))
    with torch.no_grad():
        wanted_map = theirs.get_image_embeddings(torch.from_numpy(image_BCHW))
        np.testing.assert_allclose(seen, wanted_map.permute(0, 2, 3, 1), atol=1e-4)
        for name, given in prompts().items():
            said = {
                "input_points": given.get("point_BKT2"),
                "input_labels": given.get("label_BKT"),
                "input_boxes": given.get("box_BK4"),
                "input_masks": given.get("mask_BHW"),
            }
            said = {key: torch.from_numpy(value) for key, value in said.items() if value is not None}
            if "input_masks" in said:
                said["input_masks"] = said["input_masks"][:, None]
            for several in (False, True):
                out = theirs(image_embeddings=wanted_map, multimask_output=several, **said)
                part = slice(1, None) if several else slice(0, 1)
                scale = float(out.pred_masks.abs().max())
                assert scale > 0.1 and float(out.pred_masks.std()) > 0.01 * scale
                masks, scores = (answer[:, :, part] for answer in answers[name])
                np.testing.assert_allclose(masks / scale, out.pred_masks / scale, atol=1e-4, err_msg=f"seed {SEED}")
                np.testing.assert_allclose(scores, out.iou_scores, atol=1e-4, err_msg=f"seed {SEED}")


@pytest.mark.slow
def test_only_requested_masks_are_decoded_and_equal_a_full_decode(twins):
    _, params, _ = twins
    sam, rng = Sam(TINY), np.random.default_rng(1)
    asked = rng.random((6, 3)) < 0.3
    asked[4, 2] = True
    seen = rng.standard_normal((6, TINY.grid_size, TINY.grid_size, TINY.prompt_embed_dim)).astype(np.float32)
    box = rng.uniform(0, TINY.image_size, (6, 3, 4)).astype(np.float32)
    own = rng.standard_normal((6, 3, 2, TINY.prompt_embed_dim)).astype(np.float32)

    def heard(params, own, given):
        logits, iou = sam.apply({"params": params}, seen, box, own, given, method="decode_boxes")
        wanted = jnp.asarray(asked, jnp.float32)
        return (jnp.square(logits).mean((2, 3)) * wanted + iou * wanted).sum(), (logits, iou)

    slopes = jax.jit(jax.value_and_grad(heard, (0, 1), has_aux=True))
    (_, (logits, iou)), grads = slopes(params, own, asked)
    (_, (all_logits, all_iou)), all_grads = slopes(params, own, None)
    np.testing.assert_allclose(logits[asked], all_logits[asked], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(iou[asked], all_iou[asked], atol=1e-4, rtol=1e-4)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(all_grads))
    for mine, other in zip(jax.tree.leaves(grads), jax.tree.leaves(all_grads)):
        np.testing.assert_allclose(mine, other, atol=1e-5 * largest, rtol=1e-3)
    nobody, _ = jax.jit(lambda asked: sam.apply({"params": params}, seen, box, own, asked, method="decode_boxes"))(
        np.zeros_like(asked)
    )
    assert not np.asarray(nobody).any()


def test_sam_weights_round_trip_under_meta_and_transformers_names(twins):
    _, params, state = twins
    back = convert.state_dict_from_params(sam_decoder.hf_weight_map(TINY), params)
    assert back.keys() == state.keys() and all(np.array_equal(back[name], state[name]) for name in state)
    original = convert.state_dict_from_params(sam_decoder.original_weight_map(TINY), params)
    again = convert.params_from_state_dict(sam_decoder.original_weight_map(TINY), original)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))
    for layer in range(TINY.depth):
        side = TINY.grid_size if layer in TINY.global_attn_indexes else TINY.window_size
        shape = original[f"image_encoder.blocks.{layer}.attn.rel_pos_h"].shape
        assert shape == (2 * side - 1, TINY.width // TINY.num_heads)


def test_window_sizes_of_sam_are_the_shortest_period_of_its_layers():
    assert SAM_VIT_H.window_sizes == (14,) * 7 + (64,)
    assert SAM_VIT_B.window_sizes == (14, 14, 64)
    irregular = SamConfig(image_size=64, patch_size=8, depth=3, window_size=3, global_attn_indexes=(1, 2))
    assert irregular.window_sizes == (3, 8, 8)


@pytest.mark.slow
def test_full_size_sam_has_the_released_number_of_parameters():
    from lionjax.core import params as trees
    from lionjax.core import sharding

    image, box = np.zeros((1, 1024, 1024, 3), np.float32), np.zeros((1, 1, 4), np.float32)
    mask = np.zeros((1, 256, 256), np.float32)
    made = sharding.abstract_params(
        lambda key: Sam(SAM_VIT_H).init(key, image, None, None, box, mask)["params"], jax.random.key(0)
    )
    waves = 2 * 128  # a buffer in the original, which counts only what learns
    assert trees.count_params(made) - waves == 641_090_608
    assert trees.count_params(made["decoder"]) == 4_058_340


def test_masks_are_resized_to_the_image_as_torch_interpolates():
    torch = pytest.importorskip("torch")
    from torch.nn.functional import interpolate

    logits = np.random.default_rng(2).standard_normal((3, 32, 32)).astype(np.float32)
    top, left, high, wide, size = 14, 0, 36, 64, (45, 80)
    whole = interpolate(torch.from_numpy(logits)[None], (64, 64), mode="bilinear", align_corners=False)
    cut = whole[..., top : top + high, left : left + wide]
    wanted = interpolate(cut, size, mode="bilinear", align_corners=False)[0].numpy()
    made = sam_decoder.postprocess_masks(logits, 64, (top, left, high, wide), size)
    np.testing.assert_allclose(made, wanted, atol=1e-5)
    enlarged = interpolate(torch.from_numpy(logits)[None], (64, 64), mode="bilinear", align_corners=False)[0]
    np.testing.assert_allclose(sam_decoder.resize_mask_logits(logits, 64), enlarged, atol=1e-5)
