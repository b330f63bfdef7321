# SPDX-License-Identifier: Apache-2.0
"""Grounding DINO against transformers: sampling, phrase masks, the whole detector, gradients, folders both ways."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_grounding_dino
import tiny_prefix
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.models.grounding_dino import modeling_grounding_dino as theirs_module

from lionjax import convert
from lionjax.convert.verify import compare
from lionjax.models.language.bert import phrase_masks
from lionjax.models.vision.grounding_dino import GroundingDino
from lionjax.models.vision.grounding_dino_decoder import valid_proposals
from lionjax.models.vision.grounding_dino_weights import hf_weight_map
from lionjax.nn.deformable_attention import sample_levels


def close(mine, theirs, what: str, tolerance=1e-4, floor=0.0):
    theirs = np.asarray(theirs)
    worst = np.abs(np.asarray(mine) - theirs).max()
    assert worst <= max(tolerance * np.abs(theirs).max(), floor), f"{what}: {worst:.2e} of {np.abs(theirs).max():.3g}"


def test_sampling_has_the_values_and_gradients_of_transformers_also_at_points_outside():
    seed = tiny_prefix.seed()
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    shapes = tuple((draw.randint(1, 7), draw.randint(1, 7)) for _ in range(draw.randint(1, 3)))
    heads, points, queries = draw.randint(1, 3), draw.randint(1, 4), draw.randint(1, 9)
    value = rng.standard_normal((2, sum(h * w for h, w in shapes), heads, 5)).astype(np.float32)
    point = rng.uniform(-0.4, 1.4, (2, queries, heads, len(shapes), points, 2)).astype(np.float32)
    weight = rng.standard_normal(point.shape[:-1]).astype(np.float32)
    change = rng.standard_normal((2, queries, heads, 5)).astype(np.float32)

    inputs = [torch.from_numpy(x).requires_grad_() for x in (value, point, weight)]
    sizes = torch.tensor(shapes)
    out = theirs_module.MultiScaleDeformableAttention()(inputs[0], sizes, list(shapes), None, *inputs[1:], 64)
    (out * torch.from_numpy(change).flatten(2)).sum().backward()

    def loss(value, point, weight):
        out_BQNH = sample_levels(value, shapes, point, weight)
        return (out_BQNH * change).sum(), out_BQNH

    gradients, mine = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(value, point, weight)
    close(mine.reshape(2, queries, -1), out.detach(), f"seed {seed}, values", 1e-5)
    for name, gradient, tensor in zip(("value", "point", "weight"), gradients, inputs):
        close(gradient, tensor.grad, f"seed {seed}, gradient of {name}", 1e-4, 1e-5)


@pytest.mark.slow
def test_phrase_masks_and_positions_are_those_of_transformers_and_of_an_example_by_hand():
    mask_BLL, position_BL = phrase_masks(jnp.array([[101, 7, 8, 1012, 9, 1029, 102, 0, 0]]), (101, 102, 1012, 1029))
    blocks = np.eye(9, dtype=bool)
    blocks[1:4, 1:4] = blocks[4:6, 4:6] = True
    np.testing.assert_array_equal(mask_BLL[0], blocks)
    np.testing.assert_array_equal(position_BL[0], [0, 0, 1, 2, 0, 1, 0, 0, 0])
    seed = tiny_prefix.seed()
    ids_BL = np.random.default_rng(seed).choice([101, 102, 1012, 1029, 5, 6, 7, 8, 0], (20, 11))
    special = torch.tensor(theirs_module.SPECIAL_TOKENS)
    wanted = theirs_module.generate_masks_with_special_tokens_and_transfer_map(torch.from_numpy(ids_BL), special)
    for mine, theirs in zip(phrase_masks(ids_BL, (101, 102, 1012, 1029)), wanted):
        np.testing.assert_array_equal(mine, theirs, err_msg=f"seed {seed}")


def test_proposals_on_the_border_are_valid_where_an_exact_division_says_so():
    sizes, length = np.arange(1, 201), 200  # 0.5 / 50 is 0.01, and 49.5 / 50 is 0.99
    size_BT2 = np.stack([sizes, np.ones_like(sizes)], axis=-1)[:, None].astype(np.float32)
    found_BP = jax.jit(lambda x: valid_proposals(((1, length),), x))(size_BT2)
    center_BP = (np.arange(length, dtype=np.float32) + np.float32(0.5)) / sizes[:, None].astype(np.float32)
    np.testing.assert_array_equal(found_BP, (center_BP > np.float32(0.01)) & (center_BP < np.float32(0.99)))


def drawn(seed: int):
    """(model, inputs, its outputs) whose queries are chosen by scores that differ by more than rounding."""
    draw = random.Random(seed)
    while True:
        model, inputs = small_grounding_dino.theirs(draw), small_grounding_dino.inputs(draw)
        pixels = torch.from_numpy(inputs[0].transpose(0, 3, 1, 2).copy())
        masks = {"pixel_mask": torch.from_numpy(inputs[1]).long(), "attention_mask": torch.from_numpy(inputs[3]).long()}
        out = model(pixels, torch.from_numpy(inputs[2]).long(), **masks)
        score_BQ = out.enc_outputs_class.max(-1).values.topk(model.config.num_queries + 1).values
        gap_BQ = -score_BQ.diff(dim=1)
        if ((gap_BQ == 0) | (gap_BQ > 1e-3)).all():  # equal ones are those of cells without a proposal
            return model, inputs, out


@pytest.mark.slow
def test_the_detector_has_the_outputs_and_gradients_of_transformers_for_unequal_pictures_and_captions(tmp_path):
    seed = tiny_prefix.seed()
    model, inputs, out = drawn(seed)
    model.save_pretrained(tmp_path / "theirs")
    c, params = convert.from_torch(tmp_path / "theirs")
    length = inputs[2].shape[1]
    rng = np.random.default_rng(seed)
    by_boxes, by_logits = rng.standard_normal(out.pred_boxes.shape), rng.standard_normal(out.logits[..., :length].shape)
    by_logits = np.where(inputs[3][:, None], by_logits, 0) / 10
    logits = out.logits[..., :length].masked_fill(~torch.from_numpy(inputs[3])[:, None], 0)
    loss = (logits * torch.from_numpy(by_logits)).sum() + (out.pred_boxes * torch.from_numpy(by_boxes)).sum()
    loss.backward()

    def forward(params):
        mine = GroundingDino(c).apply({"params": params}, *inputs)
        logits_BQL = jnp.where(inputs[3][:, None], mine.logits_BQL, 0)
        return (logits_BQL * by_logits).sum() + (mine.boxes_BQ4 * by_boxes).sum(), (mine, logits_BQL)

    gradients, (mine, logits_BQL) = jax.jit(jax.grad(forward, has_aux=True))(params)
    np.testing.assert_array_equal(np.isfinite(mine.logits_BQL), np.isfinite(out.logits[..., :length].detach().numpy()))
    close(logits_BQL, logits.detach(), f"seed {seed}, logits")
    close(mine.boxes_BQ4, out.pred_boxes.detach(), f"seed {seed}, boxes")
    close(mine.proposal_boxes_BQ4, out.encoder_pred_boxes.detach(), f"seed {seed}, proposals")
    parts = (out.intermediate_hidden_states[:, -1], out.intermediate_reference_points[:, -1])
    close(mine.features_BQD, torch.cat(parts, -1).detach(), f"seed {seed}, features")
    assert mine.features_BQD.shape[-1] == c.feature_width

    for weight in model.parameters():  # gradients go out under the names that weights have in files
        weight.data = torch.zeros_like(weight) if weight.grad is None else weight.grad
    model.save_pretrained(tmp_path / "gradients")
    wanted = load_file(tmp_path / "gradients" / "model.safetensors")
    found = convert.state_dict_from_params(hf_weight_map(c), jax.tree.map(np.asarray, gradients))
    unused = "model.backbone.conv_encoder.model.swin.layernorm."
    assert {name for name in wanted if not name.startswith(unused)} <= found.keys()
    largest = max(np.abs(gradient).max() for gradient in wanted.values())
    for name in found.keys() & wanted.keys():
        close(found[name], wanted[name], f"seed {seed}, gradient of {name}", 1e-3, 1e-5 * largest)


@pytest.mark.slow
def test_a_folder_goes_to_jax_and_back_and_verifies_with_its_tokenizer_and_processor(tmp_path):
    model = small_grounding_dino.theirs(random.Random(tiny_prefix.seed()))
    model.save_pretrained(tmp_path / "theirs")
    for name in ("vocab.txt", "preprocessor_config.json", "tokenizer_config.json"):
        (tmp_path / "theirs" / name).write_text(json.dumps({"image_processor_type": "GroundingDinoImageProcessor"}))
    convert.convert(tmp_path / "theirs", tmp_path / "jax", "jax")
    report = convert.convert(tmp_path / "jax", tmp_path / "torch", "torch")
    assert report.format_name == "grounding-dino"
    old, new = (load_file(tmp_path / part / "model.safetensors") for part in ("theirs", "torch"))
    copies = {name for name in new.keys() - old.keys()}
    assert copies and all("bbox_embed." in name for name in copies)
    lost = old.keys() - new.keys()
    assert all(".swin.layernorm." in name for name in lost)  # the backbone's final norm, which nothing reads
    assert all(new[name].tobytes() == old[name].tobytes() for name in old.keys() - lost)
    read, written = (json.loads((tmp_path / part / "config.json").read_text()) for part in ("theirs", "torch"))
    read["backbone_config"]["dtype"] = "float32"
    assert written == read
    for name in ("vocab.txt", "preprocessor_config.json", "tokenizer_config.json"):
        assert (tmp_path / "torch" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    found = compare.verify(*convert.load_params(tmp_path / "jax"), tmp_path / "torch")
    assert found.all_close and len(found.not_compared) < len(found.module_diffs) / 2, str(found)
    assert max(stage.relative_diff for stage in found.module_diffs) < 1e-4, str(found)
