# SPDX-License-Identifier: Apache-2.0
"""ZeroCap against the released code, step by step, with tiny weights.

Every folder under $LIONJAX_GOLDEN (default tests/golden) is checked, with the sizes of its own config.json.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from golden import folders
from golden_guidance import prompts
from golden_zerocap import ZeroCapGolden

from lionjax.core.types import UserError
from lionjax.inference.zerocap import ZeroCapConfig, combine_images, zerocap
from lionjax.models.language.t5 import TINY_T5
from lionjax.models.vlm.text_lm import TextLM

SHIPPED = Path(__file__).resolve().parents[1] / "golden" / "zerocap"
PER_CASE = {"output_ids", "mean_log_prob", "clip_similarity", "step1.probs", "step1.context_ids", "step0.p0"}
PER_ITERATION = {"step1.losses", "step1.shifted_probs", "step0.clip_losses", "step0.logits_after_edit"}


@pytest.fixture(scope="module", params=folders("zerocap"))
def golden(request):
    return ZeroCapGolden(request.param)


@pytest.fixture(scope="module")
def shipped():
    return ZeroCapGolden(SHIPPED)


@pytest.mark.slow
def test_every_loss_shift_logit_and_probability_is_the_released_codes(golden):
    assert golden.config["cases"]
    compared = set()
    for case, s in golden.config["cases"].items():
        found = golden.compare(case)
        names = {name for name in found if f"{case}.{name}" in golden.arrays}
        iterates = golden.settings(case).num_iterations > 0
        assert names >= (PER_CASE | PER_ITERATION if iterates else PER_CASE)
        assert golden.complaints(case, found) == set()
        np.testing.assert_allclose(golden.image_E(case), golden.arrays[f"{case}.image_features"][0], atol=1e-5)
        compared |= {name.split(".")[-1] for name in names} | ({"weights"} if s["weights"] else set())
    assert {"deltas", "top_ids", "clip_target", "weights"} <= compared


@pytest.mark.slow
def test_captions_and_the_beams_of_each_step_read_as_the_released_codes(golden):
    for case, theirs in golden.config["outputs"].items():
        steps, captions = golden.run(case)
        assert [caption.text for caption in captions] == theirs["texts"]
        assert int(np.argmax([caption.similarity for caption in captions])) == theirs["best_clip"]
        assert [[golden.decode(ids) for ids in step.beams.ids_RM.tolist()] for step in steps] == theirs["steps"]


@pytest.mark.slow
def test_each_beam_has_a_distribution_of_its_own_unless_the_released_batch_is_asked_for(shipped):
    sums = {}
    for normalization in ("row", "batch"):
        steps, _ = shipped.run("beam2", count=2, normalization=normalization)
        sums[normalization] = [np.exp(step.log_prob_RV).sum(axis=1) for step in steps]
    np.testing.assert_allclose(np.concatenate(sums["row"]), 1, rtol=1e-5)
    np.testing.assert_allclose(sums["batch"][0], 1, rtol=1e-5)  # one row
    np.testing.assert_allclose(sums["batch"][1].sum(), 1, rtol=1e-5)


@pytest.mark.slow
def test_without_losses_nothing_is_shifted_and_a_small_step_lowers_the_loss(shipped):
    steps, _ = shipped.run("beam1", image_weight=0.0, fluency_weight=0.0)
    for step in steps:
        assert not any(np.any(part) for one in step.iterations for part in one.shift)
        np.testing.assert_allclose(step.iterations[-1].log_prob_RV, step.unshifted_RV, atol=1e-5)
    lower = []
    for seed in range(4):
        image_BE = np.random.default_rng(seed).normal(size=(1, shipped.config["clip"]["projection_dim"]))
        steps = search(shipped, image_BE, step_size=0.003, num_iterations=2, num_candidates=80)
        losses = [[float(one.image_loss_R[0] + one.fluency_loss_R[0]) for one in step.iterations] for step in steps]
        lower += [after < before for before, after in losses]
    assert len(lower) == 20 and np.mean(lower) >= 0.95


def search(golden, image_BE, rows=None, **changes):
    """The steps of case beam1 with other images and prompts."""
    rows = rows or [golden.arrays["beam1.context_ids"][0].tolist()]
    config = dataclasses.replace(golden.settings("beam1"), normalization="row", **changes)
    batch = prompts(rows, max(map(len, rows)))
    given = (golden.embed_texts, golden.candidate_texts)
    return list(zerocap(golden.model, golden.params, batch, image_BE, *given, config))


@pytest.mark.slow
def test_images_with_prompts_of_unequal_lengths_are_described_as_each_alone(shipped):
    image_BE = shipped.arrays["beam1.image_features"], shipped.arrays["arithmetic.image_features"]
    rows = [shipped.arrays["beam1.context_ids"][0].tolist(), [79, 4, 9]]
    together = search(shipped, np.concatenate(image_BE), rows)[2]
    for place, row in enumerate(rows):
        alone = search(shipped, image_BE[place], [row])[2]
        np.testing.assert_array_equal(together.beams.ids_RM[place], alone.beams.ids_RM[0])
        np.testing.assert_allclose(together.log_prob_RV[place], alone.log_prob_RV[0], atol=1e-4)


@pytest.mark.slow
def test_a_text_is_embedded_once(shipped):
    seen = []

    def embed_texts(texts):
        seen.extend(texts)
        return np.random.default_rng(0).normal(size=(len(texts), 12))

    context = shipped.arrays["beam1.context_ids"][0].tolist()
    given = (np.ones((1, 12)), embed_texts, shipped.candidate_texts)
    config = shipped.settings("beam1")
    step = next(zerocap(shipped.model, shipped.params, prompts([context], len(context)), *given, config))
    candidates = {int(i) for one in step.iterations for i in np.asarray(one.token_ids_RK).ravel()}
    assert len(seen) == len(set(seen)) == len(candidates) > config.num_candidates


def asked(**changes):
    """A search with settings that do not fit its model of 80 words."""
    config = ZeroCapConfig(**{"num_candidates": 4, "num_beams": 1} | changes)
    language = dataclasses.replace(TextLM().language, vocab_size=80)
    return next(zerocap(TextLM(language), {}, None, np.ones((1, 2)), None, None, config))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: ZeroCapConfig(num_beams=0), "num_beams is 0"),
        (lambda: ZeroCapConfig(temperature=0.0), "temperature is 0.0"),
        (lambda: ZeroCapConfig(fusion=1.5), "fusion is 1.5"),
        (lambda: asked(num_candidates=512), "num_candidates is 512; the model has only 80 words"),
        (lambda: asked(num_beams=81), "num_beams is 81; the model has only 80 words"),
        (lambda: asked(end_token_ids=(80,)), "end_token_ids holds 80"),
        (lambda: TextLM(TINY_T5).cached_context(None), "encoder-decoder"),
        (lambda: combine_images(np.ones((2, 3)), [1.0]), "1 weights were given for 2 images"),
        (lambda: combine_images(np.ones((2, 3)), [1.0, -1.0]), "the sum of the images is zero"),
    ],
)
def test_what_zerocap_cannot_do_is_refused(call, words):
    with pytest.raises(UserError, match=words):
        call()
