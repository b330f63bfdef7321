# SPDX-License-Identifier: Apache-2.0
"""LLaVA, BLIP-2 and InstructBLIP beside their classes in transformers: tiny random weights, sizes drawn at each run."""

import dataclasses
import random

import jax
import numpy as np
import pytest
import tiny_prefix as tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lionjax import convert  # noqa: E402
from lionjax import params as trees  # noqa: E402
from lionjax.generate import GenerateConfig, generate  # noqa: E402

NEW = 7


@pytest.fixture(scope="module", params=tiny.SYSTEMS)
def pair(request, tmp_path_factory):
    """Their model, and ours of the same weights, which came through a folder."""
    seed = tiny.seed()
    draw, folder = random.Random(seed), tmp_path_factory.mktemp("theirs")
    model = tiny.theirs(request.param, draw)
    model.save_pretrained(folder)
    system, params = convert.from_torch(folder)
    return seed, model, system, jax.tree.map(jax.numpy.asarray, params), tiny.batch_of(system, draw)


def close(mine, theirs, seed, tolerance=1e-4):
    theirs, mine = np.asarray(theirs), np.asarray(mine)
    np.testing.assert_allclose(
        mine, theirs, atol=tolerance * max(1, np.abs(theirs).max()), rtol=0, err_msg=f"seed {seed}"
    )


def test_logits_loss_and_every_gradient_are_those_of_transformers(pair):
    seed, model, system, params, batch = pair
    model.zero_grad()
    out = model(**tiny.inputs(system, batch))
    out.loss.backward()

    def loss(params):
        value, _ = system.loss(params, batch)
        return value, system.logits(params, batch)

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    wanted = tiny.answer_logits(system, batch, out.logits.detach().numpy())
    for mine, theirs in zip(logits, wanted):
        close(mine[: len(theirs)], theirs, seed)
    assert float(value) == pytest.approx(out.loss.item(), abs=1e-4), f"seed {seed}"
    mine = convert.state_from(system.torch_rows(), jax.tree.map(np.asarray, grads))
    theirs = gradients(model)
    if "language_model.shared.weight" in theirs and "language_model.lm_head.weight" not in theirs:
        # This version ties the two, whatever the config says.
        mine["language_model.shared.weight"] = (
            mine["language_model.shared.weight"] + mine["language_model.lm_head.weight"]
        )
    for name, norm in theirs.items():
        assert np.linalg.norm(mine[name]) == pytest.approx(norm, rel=1e-3, abs=1e-5), f"{name}, seed {seed}"


def gradients(model) -> dict[str, float]:
    """Norms of their gradients by the names that weights have in files; the bias of EVA's keys has one of nothing."""
    from lionjax.convert_files import Tensors
    from lionjax.convert_prefix import LLAVA_SPELLINGS

    named = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    if type(model).__name__.startswith("Llava"):
        named = Tensors(named, ("gradients",)).respelled(*LLAVA_SPELLINGS)
    return {name: float(np.linalg.norm(grad)) for name, grad in named.items()}


def test_greedy_words_are_those_of_transformers(pair):
    seed, model, system, params, batch = pair
    language = system.language
    config = GenerateConfig(max_new_tokens=NEW, eos=language.end_token, pad=0, start=0 if system.encodes else None)
    made = generate(system, params, batch, config)
    asked = tiny.inputs(system, batch, answers=False, left=not system.encodes)
    told = model.generate(
        **asked, max_new_tokens=NEW, do_sample=False, num_beams=1, eos_token_id=language.end_token, pad_token_id=0
    ).numpy()
    # Behind the start token of a decoder, or the prompt, where they give it back.
    told = told[:, 1:] if system.encodes else told[:, asked["input_ids"].shape[1] :] if told.shape[1] > NEW else told
    for row, length in enumerate(np.asarray(made.length_B)):
        mine, theirs = np.asarray(made.ids_BM)[row, :length].tolist(), told[row, :length].tolist()
        assert mine == theirs, f"seed {seed}, row {row}"


def test_a_prompt_that_does_not_say_where_has_the_picture_in_front_or_none(pair):
    seed, _, system, params, batch = pair
    plain = tiny.without_token(batch)
    in_front = dataclasses.replace(system, in_front=True)
    first = np.concatenate([np.full((len(batch.prompt_BL), 1), tiny.IMAGE_TOKEN, np.int32), plain.prompt_BL], axis=1)
    mask = np.concatenate([np.ones_like(first[:, :1]), plain.prompt_mask_BL], axis=1)
    said = dataclasses.replace(batch, prompt_BL=first, prompt_mask_BL=mask)
    run = jax.jit(system.logits.__func__, static_argnums=0)
    real = batch.target_mask_BM.astype(bool)
    close(run(in_front, params, plain)[real], run(system, params, said)[real], seed)
    always = dataclasses.replace(system, image_token=None, in_front=True)
    close(run(always, params, plain)[real], run(system, params, said)[real], seed)
    alone = dataclasses.replace(system, in_front=False)
    other = dataclasses.replace(plain, image_BHWC=batch.image_BHWC[::-1] + 1)
    np.testing.assert_array_equal(run(alone, params, plain)[real], run(alone, params, other)[real])
    assert not np.allclose(run(in_front, params, plain)[real], run(in_front, params, other)[real], atol=1e-5)


def test_features_that_were_kept_give_the_same_loss(pair):
    _, _, system, params, batch = pair
    kept = dataclasses.replace(batch, image_BHWC=None, features=system.features(params, batch))
    one, other = (jax.jit(system.loss)(params, b)[0] for b in (batch, kept))
    assert float(one) == pytest.approx(float(other), abs=1e-5)
    assert trees.count(params) > 1000
