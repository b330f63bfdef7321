# SPDX-License-Identifier: Apache-2.0
"""PaLM-E equals its description in NumPy: logits, loss and gradients of sentences with slots in any order.

No code of the original exists. Sizes, sentences and weights are drawn anew in every run.
"""

import dataclasses
import random

import jax
import numpy as np
import numpy_palm_e as reference
import pytest
import text_batches
from mutations import mutated

from lionjax.core import params as trees
from lionjax.core.types import Batch
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.vision.vit import ViTConfig
from lionjax.models.vlm import palm_e
from lionjax.models.vlm.palm_e import PalmE

LIMITS = {"image": 2, "state": 3, "object": 4}


def draw_model(draw: random.Random, object_masking: str) -> PalmE:
    patch, side, heads = draw.choice([3, 4]), draw.randint(2, 3), draw.choice([1, 2])
    vision = ViTConfig(
        **{"image_size": patch * side, "patch_size": patch, "width": 4 * heads, "depth": draw.randint(1, 2)},
        **{"num_heads": heads, "mlp_dim": draw.randint(6, 10), "attention_biases": draw.choice(["qvo", "qkvo"])},
    )
    kv_heads = draw.choice([1, 2])
    language = DecoderConfig(
        **{"vocab_size": 31, "width": draw.choice([8, 12]), "depth": draw.randint(1, 2), "head_dim": 4},
        **{"num_heads": 2 * kv_heads, "num_kv_heads": kv_heads, "mlp_dim": 11, "tie_embeddings": True},
    )
    return PalmE(
        vision,
        language,
        state_width=draw.randint(2, 5),
        max_states=LIMITS["state"],
        num_state_tokens=draw.randint(1, 3),
        state_mlp_dim=draw.randint(3, 9),
        max_objects=LIMITS["object"],
        object_masking=object_masking,
    )


def draw_segments(draw: random.Random) -> list:
    """Text, images, states and objects in any order; those of a kind are numbered in their order."""
    kinds = [kind for kind, limit in LIMITS.items() for _ in range(draw.randint(1, limit))]
    kinds += ["text"] * draw.randint(2, 4)
    draw.shuffle(kinds)
    counts, segments = dict.fromkeys(LIMITS, 0), []
    for kind in kinds:
        if kind == "text":
            segments.append((kind, [draw.randrange(3, 31) for _ in range(draw.randint(1, 4))]))
        else:
            segments.append((kind, counts[kind]))
            counts[kind] += 1
    return segments


def placeholders(c: PalmE, segments) -> list[int]:
    slots, patches = c.slots, c.vision.num_patches
    ids = {
        "image": [c.image_token_id] * patches,
        "state": [slots.state_token_id] * slots.num_state_tokens,
        "object": [slots.object_token_id] * slots.num_object_tokens,
    }
    return [token for kind, value in segments for token in (value if kind == "text" else ids[kind])]


def draw_case(seed: int, object_masking: str, num_rows: int = 3):
    """(model, parameters in float32, batch, rows and answers of the reference)."""
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    c = draw_model(draw, object_masking)
    side = c.vision.image_size
    images = rng.standard_normal((num_rows, LIMITS["image"], side, side, 3)).astype(np.float32)
    states = rng.standard_normal((num_rows, LIMITS["state"], c.state_width)).astype(np.float32)
    masks = rng.random((num_rows, LIMITS["object"], side, side)) < 0.4
    masks[..., 0, 0] = True
    segments = [draw_segments(draw) for _ in range(num_rows)]
    answers = [[draw.randrange(3, 31) for _ in range(draw.randint(1, 4))] for _ in range(num_rows)]
    prompt_BL, prompt_mask_BL = text_batches.padded([placeholders(c, row) for row in segments])
    target_BM, target_mask_BM = text_batches.padded(answers)
    zeros_B = np.zeros(num_rows, np.int32)
    batch = Batch(
        *(images, prompt_BL, prompt_mask_BL, zeros_B[:, None], zeros_B[:, None]),
        *(target_BM, target_mask_BM, target_mask_BM, zeros_B, zeros_B),
        state_BKS=states,
        object_mask_BKHW=masks,
    )
    shapes = jax.eval_shape(c.init, jax.random.key(0), batch)
    leaves = {path: leaf.value for path, leaf in trees.flatten(shapes).items()}
    params = {
        path: ((path.endswith("scale")) + 0.4 * rng.standard_normal(leaf.shape)).astype(np.float32)
        for path, leaf in leaves.items()
    }
    return c, trees.unflatten(params), batch, list(zip(segments, images, states, masks)), answers


def in_double(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


@pytest.mark.slow
@pytest.mark.parametrize("object_masking", ["features", "pixels"])
def test_logits_loss_and_all_gradients_equal_those_of_the_description_in_numpy(object_masking):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    c, params, batch, rows, answers = draw_case(seed, object_masking)
    exact, rng = in_double(params), np.random.default_rng(seed)
    logits_BMV = np.asarray(jax.jit(c.logits)(params, batch))
    for number, (row, answer) in enumerate(zip(rows, answers)):
        expected = reference.answer_logits(c, exact, row, answer)
        np.testing.assert_allclose(logits_BMV[number, : len(answer)], expected, rtol=1e-4, atol=1e-4)
    (loss, _), gradient = jax.jit(jax.value_and_grad(c.loss, has_aux=True))(params, batch)
    np.testing.assert_allclose(loss, reference.loss(c, exact, rows, answers), rtol=1e-5)
    flat, leaves = trees.flatten(exact), trees.flatten(gradient)
    for path, leaf in leaves.items():
        direction, step = rng.standard_normal(leaf.shape), 1e-5
        ends = [
            reference.loss(c, trees.unflatten(flat | {path: flat[path] + sign * step * direction}), rows, answers)
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / (2 * step)
        scale = np.linalg.norm(leaf) * np.linalg.norm(direction)
        assert abs(np.vdot(leaf, direction) - slope) < 1e-4 * scale + 1e-6, path
        assert "attention/k/bias" in path or np.abs(leaf).max() > 0, path


@pytest.mark.slow
def test_answers_do_not_depend_on_slots_that_no_placeholder_names():
    c, params, batch, rows, answers = draw_case(7, "features")
    rng, used = np.random.default_rng(8), [dict.fromkeys(LIMITS, 0) for _ in rows]
    for counts, (segments, *_) in zip(used, rows):
        for kind, _ in segments:
            if kind != "text":
                counts[kind] += 1
    states, masks = batch.state_BKS.copy(), batch.object_mask_BKHW.copy()
    for number, counts in enumerate(used):
        states[number, counts["state"] :] = rng.standard_normal(states[number, counts["state"] :].shape)
        masks[number, counts["object"] :] = ~masks[number, counts["object"] :]
    other = dataclasses.replace(batch, state_BKS=states, object_mask_BKHW=masks)
    assert not np.array_equal(states, batch.state_BKS) or not np.array_equal(masks, batch.object_mask_BKHW)
    logits = jax.jit(c.logits)
    np.testing.assert_array_equal(logits(params, batch), logits(params, other))


@pytest.mark.slow
def test_permuting_objects_with_their_tags_permutes_the_answer_exactly():
    """Frozen random weights: "tag 0 <object 0> tag 1 <object 1> ..." against the same objects with permuted tags.

    Object k bears the tag `order[k]`. The words of the tags change places in the embedding table, which is the head
    too: then all logits are the same, except that each tag has those of the tag that its object bore before.
    """
    c, params, batch, *_ = draw_case(3, "features", num_rows=2)
    tags, order = np.array([11, 12, 13, 14]), np.array([2, 0, 3, 1])
    batch = dataclasses.replace(batch, target_BM=np.where(np.isin(batch.target_BM, tags), 20, batch.target_BM))
    logits = jax.jit(c.logits)

    def ask(params, tag_of_object):
        objects = [token for tag in tag_of_object for token in (int(tag), 6, c.slots.object_token_id, 7)]
        prompt_BL = np.tile(np.array([5, *objects, 9, 10], np.int32), (2, 1))
        asked = dataclasses.replace(batch, prompt_BL=prompt_BL, prompt_mask_BL=np.ones_like(prompt_BL))
        return np.asarray(logits(params, asked))

    before_BMV, table = ask(params, tags), np.array(params["language"]["embedding"]["table"])
    table[tags[order]] = table[tags]
    exchanged = params | {"language": params["language"] | {"embedding": {"table": table}}}
    after_BMV, expected_BMV = ask(exchanged, tags[order]), before_BMV.copy()
    expected_BMV[..., tags[order]] = before_BMV[..., tags]
    assert not np.array_equal(after_BMV, before_BMV)
    np.testing.assert_array_equal(after_BMV, expected_BMV)
    assert not np.array_equal(ask(exchanged, tags), expected_BMV), "tags that stay behind give another answer"


MUTATIONS = {
    "objects not divided by their area": ("total_BKD / (share_BKP.sum(axis=2, keepdims=True) + MIN_AREA)", "total_BKD"),
    "objects through the map of images": ("return self.object_projector(total_BKD", "return self.projector(total_BKD"),
    "states in the places of objects": (
        "x_BLD = scatter_embeddings(x_BLD, ids_BL == slots.object_token_id, objects_BKD)",
        "x_BLD = scatter_embeddings(x_BLD, ids_BL == slots.object_token_id, self.encode_states(batch.state_BKS))",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_in_a_slot_is_seen(name, monkeypatch):
    c, params, batch, rows, answers = draw_case(5, "features")
    wrong = mutated(monkeypatch, palm_e, *MUTATIONS[name])
    logits_BMV = np.asarray(jax.jit(wrong.PalmE(**vars(c)).logits)(params, batch))
    expected = reference.answer_logits(c, in_double(params), rows[0], answers[0])
    assert np.abs(logits_BMV[0, : len(answers[0])] - expected).max() > 1e-2
