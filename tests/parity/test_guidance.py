# SPDX-License-Identifier: Apache-2.0
"""Contrastive search and MAGIC against the released code, step by step, with tiny weights.

Every folder under $LIONJAX_GOLDEN (default tests/golden) is checked, with the sizes of its own config.json.
"""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from golden import assert_same_norms, folders
from golden_guidance import GuidedGolden, prompts

from benchmarks.text_t5 import text_batch
from lionjax import convert
from lionjax.core.types import UserError
from lionjax.inference import guidance
from lionjax.inference.generate import generate
from lionjax.inference.guidance import GuidanceConfig, guided_search
from lionjax.inference.sampling import GenerationConfig
from lionjax.models.language import decoder_weights
from lionjax.models.language.t5 import TINY_T5
from lionjax.models.vlm.text_lm import TextLM

SHIPPED = Path(__file__).resolve().parents[1] / "golden" / "magic"


class Golden(GuidedGolden):
    """A folder of MAGIC's, and its CLIP as a scorer of texts."""

    def __init__(self, folder):
        super().__init__(folder, eos_token_id="eos", pad_token_id="pad")
        self.texts = json.loads((folder / "cases_texts.json").read_text())
        self.grad_norms = json.loads((folder / "grad_norms.json").read_text())

    def clip_ids(self, text: str) -> list[int]:
        t = self.config["clip_tokens"]
        parts = text.strip().split("<|endoftext|>")
        ids = [
            id for k, part in enumerate(parts) for id in [t["eos"]] * (k > 0) + [t["characters"].index(c) for c in part]
        ]
        return [t["bos"], *ids[: self.config["clip"]["text"]["max_positions"] - 2], t["eos"]]

    def scorer(self, image: int):
        """CLIP's logit scale times the cosines of candidate texts and an image, by transformers."""
        embed, image_D = self.text_tower(), self.arrays["image_embeds"][image]

        def score(rows):
            (texts,) = rows
            ids = [self.clip_ids(text) for text in texts]
            length = max(map(len, ids))
            pad = self.config["clip_tokens"]["pad"]
            mask = [[1] * len(one) + [0] * (length - len(one)) for one in ids]
            text_KD = embed([one + [pad] * (length - len(one)) for one in ids], mask)
            text_KD = text_KD / np.linalg.norm(text_KD, axis=1, keepdims=True)
            scale = float(np.exp(self.clip["logit_scale"]).ravel()[0])
            return scale * (text_KD @ (image_D / np.linalg.norm(image_D)))[None]

        return score

    def search(self, case, **changes):
        """The steps of a case. Prompts are padded and all searches have room for as many steps, to share programs."""
        s = self.config["cases"][case]
        prefix = self.config["prefixes"][s["prefix"]]
        count = changes.pop("max_new_tokens", s["decoding_len"] - len(prefix))
        config = GuidanceConfig(
            max(other["decoding_len"] for other in self.config["cases"].values()),
            s["k"],
            s["alpha"],
            s.get("beta", 0.0),
            s.get("clip_text_max_len", 60),
        )
        config = dataclasses.replace(config, **changes)
        scorer = self.scorer(s["image"]) if config.image_weight else None
        length = max(map(len, self.config["prefixes"].values()))
        steps = guided_search(self.model, self.params, prompts([prefix], length), config, scorer, self.decode)
        return list(itertools.islice(steps, count))


def assert_steps(golden: Golden, case: str) -> None:
    """The steps of a case are the released code's: ids equal, scores within 1e-4 of their largest magnitude."""
    theirs = {k.removeprefix(f"{case}."): v for k, v in golden.arrays.items() if k.startswith(f"{case}.")}
    steps = golden.search(case)
    prefix = theirs["prefix_ids"].shape[1]
    assert [int(step.chosen_ids_B[0]) for step in steps] == theirs["output_ids"][0, prefix:].tolist()
    np.testing.assert_array_equal([step.token_ids[0] for step in steps], theirs["candidates"])
    for name in ("confidence", "penalty", "image_score", "score"):
        if name in theirs and getattr(steps[0], name) is not None:
            mine = np.array([getattr(step, name)[0] for step in steps])
            np.testing.assert_allclose(mine, theirs[name], atol=1e-4 * max(1, np.abs(theirs[name]).max()), err_msg=name)
    np.testing.assert_array_equal([step.chosen_B[0] for step in steps], theirs["chosen"])


@pytest.fixture(scope="module", params=folders("magic"))
def golden(request):
    return Golden(request.param)


@pytest.mark.slow
def test_each_step_of_a_search_is_the_released_codes(golden):
    assert golden.config["cases"]
    for case in golden.config["cases"]:
        assert_steps(golden, case)


@pytest.mark.slow
def test_simctgs_loss_and_every_gradient_norm_are_the_released_codes(golden):
    ids_BL, labels_BL = golden.arrays["simctg.input_ids"], golden.arrays["simctg.labels"]
    pad = golden.config["tokens"]["pad"]
    learned_BL = ((labels_BL >= 0) & (labels_BL != pad)).astype(np.int32)
    target_BM = np.concatenate([ids_BL[:, 1:], np.maximum(labels_BL[:, -1:], 0)], axis=1)
    mask_BM = np.concatenate([ids_BL[:, 1:] != pad, learned_BL[:, -1:]], axis=1).astype(np.int32)
    batch = dataclasses.replace(
        text_batch(ids_BL[:, :1], np.ones_like(ids_BL[:, :1])),
        target_BM=target_BM.astype(np.int32),
        target_mask_BM=mask_BM,
        loss_mask_BM=learned_BL,
    )
    language = dataclasses.replace(golden.model.language, dropout=0.0)
    model = TextLM(language, contrastive_margin=golden.config["simctg"]["margin"])
    (loss, metrics), grads = jax.jit(jax.value_and_grad(lambda p: model.loss(p, batch), has_aux=True))(golden.params)
    assert metrics["loss_tokens"] == pytest.approx(float(golden.arrays["simctg.mle_loss"]), rel=1e-4)
    assert metrics["loss_contrastive"] == pytest.approx(float(golden.arrays["simctg.cl_loss"]), rel=1e-4)
    assert loss == pytest.approx(metrics["loss_tokens"] + metrics["loss_contrastive"])
    mine = convert.state_dict_from_params(decoder_weights.gpt2_weight_map(language), jax.tree.map(np.asarray, grads))
    assert_same_norms(mine, golden.grad_norms["total"])


@pytest.mark.slow
def test_a_search_without_penalty_and_image_or_with_one_candidate_is_greedy(golden):
    case = next(name for name, s in golden.config["cases"].items() if s["kind"] == "contrastive")
    prefix = golden.config["prefixes"][golden.config["cases"][case]["prefix"]]
    config = GenerationConfig(6, eos_token_id=-1, pad_token_id=0, decoder_start_token_id=None)
    greedy = generate(golden.model, golden.params, prompts([prefix], len(prefix)), config).ids_BM[0].tolist()
    for changes in ({"degeneration_penalty": 0.0}, {"num_candidates": 1}):
        steps = golden.search(case, image_weight=0.0, max_new_tokens=6, **changes)
        assert [int(step.chosen_ids_B[0]) for step in steps] == greedy


@pytest.mark.slow
def test_rows_of_unequal_prompts_are_searched_as_each_alone():
    golden = Golden(SHIPPED)
    config = GuidanceConfig(5, 4, 0.6, 0.0)
    rows = [[41, 3, 11, 7], [41], [41, 5]]
    together = list(guided_search(golden.model, golden.params, prompts(rows, 4), config))
    for place, row in enumerate(rows):
        alone = list(guided_search(golden.model, golden.params, prompts([row], 6), config))
        assert [int(s.chosen_ids_B[place]) for s in together] == [int(s.chosen_ids_B[0]) for s in alone]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", ["penalty over the new tokens only", "softmax over the vocabulary", "prefix in text"]
)
def test_a_search_that_departs_from_the_released_code_fails(monkeypatch, change):
    golden = Golden(SHIPPED)
    if change == "penalty over the new tokens only":
        case, original = "contrastive.k6_a1_words", guidance._candidates

        def mutated(model, params, logits_BV, cache, context, num_candidates):
            states, valid_BS, slot = context
            context = (states, valid_BS.at[:, :3].set(False), slot)  # without all but the last of the prompt's tokens
            return original(model, params, logits_BV, cache, context, num_candidates)

        monkeypatch.setattr(guidance, "_candidates", mutated)
        guidance._first_candidates.clear_cache(), guidance._next_candidates.clear_cache()
    elif change == "softmax over the vocabulary":
        case, original = "magic.coco", guidance._score

        def mutated(found, texts, config, scorer, decode):
            step = original(found, texts, config, scorer, decode)
            vocabulary = range(len(golden.config["tokens"]["pieces"]))
            exp_BV = np.exp(scorer([[decode([*text, token]) for token in vocabulary] for text in texts]))
            image_BK = np.take_along_axis(exp_BV / exp_BV.sum(axis=1), step.token_ids, axis=1)
            score_BK = step.score + config.image_weight * (image_BK - step.image_score)
            return dataclasses.replace(step, score=score_BK, chosen_B=score_BK.argmax(axis=1))

        monkeypatch.setattr(guidance, "_score", mutated)
    else:
        case, decode = "magic.k9_b05", golden.decode
        prefix = golden.config["prefixes"][golden.config["cases"][case]["prefix"]]
        monkeypatch.setattr(golden, "decode", lambda ids: decode([*prefix[1:], *ids]))
    with pytest.raises(AssertionError):
        assert_steps(golden, case)
    guidance._first_candidates.clear_cache(), guidance._next_candidates.clear_cache()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: GuidanceConfig(num_candidates=0), "num_candidates is 0"),
        (lambda: GuidanceConfig(degeneration_penalty=1.5), "degeneration_penalty is 1.5"),
        (lambda: next(guided_search(TextLM(), {}, None, GuidanceConfig())), "no image to compare"),
        (
            lambda: next(guided_search(TextLM(), {}, None, GuidanceConfig(num_candidates=50_000, image_weight=0.0))),
            "only 49152 words",
        ),
        (lambda: TextLM(TINY_T5).prefill_states({}, None, 1), "encoder-decoder"),
    ],
)
def test_what_cannot_be_searched_is_refused(call, words):
    with pytest.raises(UserError, match=words):
        call()
