# SPDX-License-Identifier: Apache-2.0
"""Greedy and sampled generation: Hugging Face's ids, one compiled loop, honest draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_system
from small_t5 import TINY, words
from toy_system import PROMPTS, VOCAB, Toy, batch_of, logits_in_numpy, random_params

from benchmarks.text_t5 import random_prompts, text_batch, twins
from lionjax.core.types import UserError
from lionjax.inference import sampling
from lionjax.inference.generate import GenerationConfig, generate, stream


def words_of_hugging_face(model, ids_BL, mask_BL, config: GenerationConfig) -> list[list[int]]:
    import torch

    ids, mask = torch.tensor(ids_BL), torch.tensor(mask_BL)
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        eos_token_id=list(sampling.end_token_ids(config)),
        max_new_tokens=config.max_new_tokens,
        min_length=config.min_length,
        repetition_penalty=config.repetition_penalty,
    )
    return [cut_at_end(row, config) for row in made[:, 1:].tolist()]


def cut_at_end(row: list[int], config: GenerationConfig) -> list[int]:
    """The ids up to the first end token and with it."""
    return row[: next((k + 1 for k, i in enumerate(row) if i in sampling.end_token_ids(config)), len(row))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"repetition_penalty": 1.5, "min_length": 5, "eos_token_id": 17},
        {"repetition_penalty": 0.8, "eos_token_id": 9},
        {"eos_token_id": (9, 17, 40)},
    ],
)
def test_greedy_ids_are_those_of_hugging_face(setting):
    config = GenerationConfig(max_new_tokens=12, **setting)
    lengths = set()
    for seed in range(3):
        theirs, system, params = twins(seed, TINY)
        ids_BL, mask_BL = random_prompts(seed, TINY.vocab_size, (5, 9, 2, 7))
        made = words(generate(system, params, text_batch(ids_BL, mask_BL), config))
        assert made == words_of_hugging_face(theirs, ids_BL, mask_BL, config)
        lengths |= {len(row) for row in made}
    assert len(lengths) > 2, "the answers should end at different places"


@pytest.mark.slow
def test_a_batch_of_unequal_prompts_gives_what_each_prompt_gives_alone():
    _, system, params = twins(3, TINY)
    ids_BL, mask_BL = random_prompts(3, TINY.vocab_size, (9, 4))
    config = GenerationConfig(max_new_tokens=8)
    together = words(generate(system, params, text_batch(ids_BL, mask_BL), config))
    alone = [
        words(generate(system, params, text_batch(ids[None, :n], mask[None, :n]), config))[0]
        for ids, mask, n in zip(ids_BL, mask_BL, (9, 4))
    ]
    assert together == alone and together[0] != together[1]


@pytest.mark.parametrize("setting", [{}, {"do_sample": True, "top_k": 5}])
def test_streaming_yields_the_tokens_of_generate_one_by_one(setting):
    params, batch = random_params(1), batch_of(*PROMPTS)
    config = GenerationConfig(max_new_tokens=9, repetition_penalty=1.2, **setting)
    key = jax.random.key(2)
    whole = np.asarray(generate(Toy(), params, batch, config, key).ids_BM)
    pieces = stream(Toy(), params, batch, config, key)
    np.testing.assert_array_equal(next(pieces), whole[:, 0])
    rest = np.stack(list(pieces), axis=1)
    np.testing.assert_array_equal(rest, whole[:, 1 : 1 + rest.shape[1]])
    assert (whole[:, 1 + rest.shape[1] :] == config.pad_token_id).all()


def test_decoding_stops_when_every_row_has_ended():
    params, batch = random_params(7), batch_of(*PROMPTS)
    made = generate(Toy(), params, batch, GenerationConfig(max_new_tokens=50))
    longest = int(made.length_B.max())
    assert 1 < longest < 50 and (np.asarray(made.ids_BM)[:, longest:] == 0).all()
    toy_system.steps.clear()
    jax.block_until_ready(generate(Toy(True), params, batch, GenerationConfig(max_new_tokens=50)))
    jax.effects_barrier()
    assert len(toy_system.steps) == longest - 1  # the first token needs none, the last is not read


def test_one_compilation_serves_every_batch_of_a_shape():
    config = GenerationConfig(max_new_tokens=3)
    toy_system.read.clear()
    for seed, prompts in enumerate([PROMPTS, PROMPTS[::-1], PROMPTS]):
        generate(Toy(), random_params(seed), batch_of(*prompts), config)
    assert len(toy_system.read) == 1
    generate(Toy(), random_params(0), batch_of(*PROMPTS[:2]), config)
    assert len(toy_system.read) == 2


def test_model_without_end_token_generates_max_new_tokens():
    config = GenerationConfig(max_new_tokens=7, eos_token_id=-1)
    made = generate(Toy(), random_params(0), batch_of(*PROMPTS), config)
    assert made.length_B.tolist() == [7] * len(PROMPTS)


def test_log_probabilities_are_the_models_own_and_zero_after_the_end():
    params = random_params(4)
    config = GenerationConfig(max_new_tokens=10, repetition_penalty=1.5, output_logprobs=True)
    made = generate(Toy(), params, batch_of(*PROMPTS), config)
    assert len(set(made.length_B.tolist())) > 1
    for row, (prompt, answer) in enumerate(zip(PROMPTS, words(made))):
        logits = [logits_in_numpy(params, prompt, answer[:n]) for n in range(len(answer))]
        expected = [row[t] - np.log(np.exp(row).sum()) for row, t in zip(logits, answer)]
        np.testing.assert_allclose(made.logprob_BM[row, : len(answer)], expected, atol=1e-5)
        assert (np.asarray(made.logprob_BM[row, len(answer) :]) == 0).all()
        assert made.score_B[row] == pytest.approx(sum(expected), abs=1e-4)


# Scores: penalty, ban on an early end, cuts, draws.


def some_scores(rows=6, vocab=300, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, vocab)).astype(np.float32) * 3


def test_repetition_penalty_and_min_length_change_scores_as_in_hugging_face():
    import torch
    from transformers import MinLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

    given_BV, said = some_scores(), np.array([[0, 4, 4], [0, 1, 7]] * 3)
    config = GenerationConfig(repetition_penalty=1.7, min_length=4, eos_token_id=9)
    seen_RV = sampling.init_seen(6, 300, config)
    for token_R in said.T[1:]:
        seen_RV = sampling.mark_seen(seen_RV, token_R)
    ids = torch.tensor(said)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, torch.tensor(given_BV))
    expected = MinLengthLogitsProcessor(4, 9)(ids, expected).numpy()
    np.testing.assert_allclose(sampling.process_logits(given_BV, seen_RV, 2, config), expected, rtol=1e-6)
    later = sampling.process_logits(given_BV, seen_RV, 3, config)
    assert np.isfinite(later).all()


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [(1.0, 7, 1.0), (0.7, 0, 0.9), (1.3, 40, 0.5), (2.0, 0, 0.05), (1.0, 0, 1.0), (0.5, 1000, 0.99)],
)
def test_sampling_uses_the_tokens_and_probabilities_of_hugging_face(temperature, top_k, top_p):
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    given_BV = some_scores()
    expected = TemperatureLogitsWarper(temperature)(None, torch.tensor(given_BV))
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    expected = torch.softmax(expected, -1).numpy()
    config = GenerationConfig(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
    left_Bk, ids_Bk = sampling.top_k_top_p_filtering(jnp.asarray(given_BV), config)
    ids_Bk = np.tile(np.arange(300), (6, 1)) if ids_Bk is None else np.asarray(ids_Bk)
    made = np.zeros_like(expected)
    np.put_along_axis(made, ids_Bk, np.asarray(jax.nn.softmax(left_Bk, -1)), axis=1)
    np.testing.assert_array_equal(made > 0, expected > 0)
    np.testing.assert_allclose(made, expected, atol=1e-6)


@pytest.mark.slow
def test_sampled_tokens_follow_their_probabilities():
    draws, config = 20_000, GenerationConfig(do_sample=True, temperature=1.5, top_k=20, top_p=0.9)
    given_1V = some_scores(1, 50, seed=5)
    token_B = sampling.sample_token(jnp.tile(given_1V, (draws, 1)), config, jax.random.key(0))
    left_1k, ids_1k = sampling.top_k_top_p_filtering(jnp.asarray(given_1V), config)
    chance_V = np.zeros(50)
    chance_V[np.asarray(ids_1k)] = np.asarray(jax.nn.softmax(left_1k, -1))
    count_V = np.bincount(np.asarray(token_B), minlength=50)
    possible = chance_V > 0
    assert 5 < possible.sum() < 20 and count_V[~possible].sum() == 0
    expected = draws * chance_V[possible]
    chi_square = ((count_V[possible] - expected) ** 2 / expected).sum()
    freedom = possible.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_the_key_decides_what_is_drawn_and_steps_differ():
    params, batch = random_params(0), batch_of(*[(3, 4)] * 64)
    config = GenerationConfig(max_new_tokens=6, do_sample=True, temperature=5.0, eos_token_id=-1)
    one, again, other = (
        np.asarray(generate(Toy(), params, batch, config, jax.random.key(key)).ids_BM) for key in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() > 0.5
    # At this heat words are nearly even: two steps of one row agree about as often as chance has it.
    assert (one[:, 0] == one[:, 1]).mean() < 0.4 and len(set(one[:, 0].tolist())) > VOCAB // 2


@pytest.mark.parametrize("length", [5, 128 * 40, 128 * 40 + 77])
def test_argmax_and_top_k_equal_those_of_numpy_and_jax(length):
    given = some_scores(4, length, seed=length)
    given[1] = np.round(given[1])  # many ties
    given[2, 3:] = -np.inf
    given[3] = 0.0
    np.testing.assert_array_equal(sampling.argmax(jnp.asarray(given)), given.argmax(-1))
    for k in (1, 4, 5):
        top, place = sampling.top_k(jnp.asarray(given), k)
        expected, expected_place = jax.lax.top_k(given, k)
        np.testing.assert_array_equal(top, expected)
        np.testing.assert_array_equal(place, expected_place)


@pytest.mark.parametrize(
    "mistake",
    [
        {"max_new_tokens": 0},
        {"num_beams": 0},
        {"temperature": 0.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"length_penalty": float("nan")},
        {"repetition_penalty": 0.0},
        {"do_sample": True, "num_beams": 2},
    ],
)
def test_an_invalid_generation_setting_is_refused_in_one_sentence(mistake):
    with pytest.raises(UserError, match=str(next(iter(mistake)))):
        GenerationConfig(**mistake)


@pytest.mark.slow
def test_missing_generation_inputs_raise_user_error():
    params, batch = random_params(0), batch_of(*PROMPTS)
    with pytest.raises(UserError, match="needs a random key"):
        generate(Toy(), params, batch, GenerationConfig(do_sample=True))
    with pytest.raises(UserError, match="3 beams cannot stream"):
        next(stream(Toy(), params, batch, GenerationConfig(num_beams=3)))
