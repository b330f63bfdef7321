# SPDX-License-Identifier: Apache-2.0
"""LISA computes what its released code computes: states, prompts, masks, losses, gradient norms, answers, metrics."""

import functools
import json

import golden_lisa
import numpy as np
import pytest
import shared_data
from golden import assert_close, assert_same_norms, folders
from mutations import mutated
from safetensors.numpy import load_file

from lionjax import convert
from lionjax.core import params as trees
from lionjax.evaluation.metrics import regions
from lionjax.models.heads import mask_token
from lionjax.models.vlm import lisa
from lionjax.nn import losses

SHARED = shared_data.ROOT.parent / "golden" / "lisa"
INPUTS = {"images", "images_clip", "input_ids", "labels", "attention_mask", "offset", "resize_list", "original_sizes"}


def all_folders() -> list:
    """Those of the project, and those beside the checkout that have other weights."""
    own = folders("lisa")
    known = {(param.values[0] / "weights.safetensors").read_bytes() for param in own}
    beside = [path.parent for path in sorted(SHARED.glob("**/config.json"))]
    beside = [path for path in beside if (path / "weights.safetensors").read_bytes() not in known]
    return own + [pytest.param(path, id=f"shared_{path.name}", marks=pytest.mark.shared_data) for path in beside]


@pytest.fixture(scope="module", params=all_folders())
def golden(request):
    return golden_lisa.compute(request.param)


@functools.cache
def tolerance(name: str) -> float:
    return 2e-4 if "masks" in name else 1e-4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_lisa_computes_what_the_original_computes(golden):
    """Rows and positions of [SEG] too, pictures with several conversations or without any mask, and `evaluate`."""
    outputs = {n for n in golden.theirs if not n.startswith(("metric.", "target_masks.")) and not n.endswith("margin")}
    assert outputs - INPUTS <= golden.ours.keys()
    for name in sorted(outputs - INPUTS):
        mine, theirs = np.asarray(golden.ours[name]), golden.theirs[name]
        assert mine.shape == theirs.shape, name
        if name.endswith(("ids", "seg_rows", "positions")):
            np.testing.assert_array_equal(mine, theirs, err_msg=name)
        elif theirs.size:
            assert_close(mine, theirs, name, tolerance(name))


@pytest.mark.slow
def test_lisa_has_the_originals_gradient_norm_for_every_weight(golden):
    norms = json.loads((golden.folder / "grad_norms.json").read_text())
    assert any("lora_A" in name for name in norms)
    assert_same_norms(golden.gradients, norms)


@pytest.mark.slow
def test_lisa_weights_and_lora_go_back_to_the_same_bits(golden):
    theirs = load_file(golden.folder / "weights.safetensors") | load_file(golden.folder / "lora.safetensors")
    back = convert.state_dict_from_params(golden.names, golden.params)
    assert back.keys() == theirs.keys()
    assert all(back[name].tobytes() == theirs[name].tobytes() for name in theirs)
    assert sum(path.endswith("lora_a") for path in trees.flatten(golden.params)) == 2


@pytest.mark.parametrize("folder", all_folders())
def test_giou_and_ciou_are_the_originals(folder):
    """Empty masks on both sides count 1, and ignored pixels on neither side."""
    arrays, config = dict(np.load(folder / "arrays.npz")), json.loads((folder / "config.json").read_text())["metric"]
    masks, truth, per_picture = [], [], []
    for picture in range(len(arrays["metric.intersection_union"])):
        logits, target = arrays[f"metric.logits.{picture}"], arrays[f"metric.targets.{picture}"]
        counted = target != config["ignore"]
        own = (logits > config["threshold"]) & counted, (target == 1) & counted
        per_picture.append(regions.mask_overlaps(*own).sum(axis=0))
        masks, truth = [*masks, *own[0]], [*truth, *own[1]]
    scores = regions.res_scores(masks, truth)
    np.testing.assert_array_equal(per_picture, arrays["metric.intersection_union"])
    assert scores["ciou"] == pytest.approx(float(arrays["metric.ciou"]), abs=1e-6)
    assert scores["giou"] == pytest.approx(float(arrays["metric.giou"]), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("folder", folders("lisa"))
def test_golden_comparison_detects_a_mask_state_that_is_one_position_off(monkeypatch, folder):
    """The state of [SEG] itself, as in NExT-Chat, instead of the one that predicts it."""
    config, theirs, system, _, params = golden_lisa.load(folder)
    assert_close(golden_lisa.mask_prompts(system, params, theirs, config), theirs["train.prompts"], "right")
    next_position = "take_positions(before_BLD, jnp.minimum(position_BK + 1, before_BLD.shape[1] - 1)), valid_BK"
    changed = mutated(monkeypatch, mask_token, "take_positions(before_BLD, position_BK), valid_BK", next_position)
    monkeypatch.setattr(lisa, "mask_token", changed)
    with pytest.raises(AssertionError, match="prompts: off by"):
        assert_close(golden_lisa.mask_prompts(system, params, theirs, config), theirs["train.prompts"], "prompts")


MISTAKES_OF_LOSSES = {
    "the cross entropy averaged per picture": (
        "return tuple(masked_mean(x.swapaxes(0, 1), valid_BK) for x in terms)",
        "rows = valid_BK.reshape(PICTURES, -1); mean = lambda x: (x * rows).sum(1) / jnp.maximum(rows.sum(1), 1); "
        "return tuple(mean(x.swapaxes(0, 1).reshape(PICTURES, -1)).sum() / rows.any(1).sum() for x in terms)",
        {"mask_bce_loss"},
    ),
    "Dice without its scale": ("(probs_BHW / dice_scale).sum(pixels)", "probs_BHW.sum(pixels)", {"mask_dice_loss"}),
}


@pytest.mark.parametrize("folder", folders("lisa"))
@pytest.mark.parametrize("mistake", MISTAKES_OF_LOSSES)
def test_golden_comparison_detects_a_mutation_of_the_mask_losses(monkeypatch, mistake, folder):
    config, theirs = json.loads((folder / "config.json").read_text()), dict(np.load(folder / "arrays.npz"))
    old, new, seen = MISTAKES_OF_LOSSES[mistake]
    changed = mutated(monkeypatch, losses, old, new.replace("PICTURES", str(len(theirs["offset"]) - 1)))

    def differing() -> set[str]:
        ours = golden_lisa.mask_losses(theirs, config)
        return {name for name, value in ours.items() if value != pytest.approx(float(theirs[f"train.{name}"]), 1e-4)}

    assert not differing()
    monkeypatch.setattr(mask_token, "losses", changed)
    assert seen <= differing()


def test_the_scale_of_dice_counts_where_a_mask_is_empty():
    """There its epsilon is as large as the sums: the loss of a target without pixels, and almost none predicted."""
    logits, none = np.full((1, 1, 8, 8), -12.0, np.float32), np.zeros((1, 1, 8, 8), bool)
    dice = {
        scale: float(losses.bce_dice_losses(logits, none, np.ones((1, 1), bool), np.ones((1, 8, 8)), scale)["dice"])
        for scale in (1.0, 1000.0)
    }
    total = 64 / (1 + np.exp(12.0))
    for scale, value in dice.items():
        assert value == pytest.approx(1 - 1e-6 / (total / scale + 1e-6), rel=1e-4)
