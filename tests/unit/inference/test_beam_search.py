# SPDX-License-Identifier: Apache-2.0
"""Beam search: Hugging Face's ids and scores, and those of a plain search that remembers nothing."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import toy_system
from small_t5 import TINY, words
from toy_system import PROMPTS, VOCAB, Toy, batch_of, logits_in_numpy, random_params

from benchmarks.text_t5 import random_prompts, text_batch, twins
from lionjax.inference.beam_search import beam_search
from lionjax.inference.generate import GenerationConfig, generate
from lionjax.inference.sampling import end_token_ids

searched = jax.jit(beam_search, static_argnames=("model", "config"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        {"num_beams": 2},
        {"num_beams": 3, "length_penalty": 2.0},
        {"num_beams": 4, "length_penalty": 0.5, "repetition_penalty": 1.5},
        {"num_beams": 5, "repetition_penalty": 1.5},
        {"num_beams": 5, "length_penalty": -1.0, "min_length": 5, "eos_token_id": 18},
        {"num_beams": 3, "eos_token_id": (9, 17, 40)},
    ],
)
def test_beam_search_matches_the_ids_and_scores_of_hugging_face(setting):
    import torch

    config = GenerationConfig(max_new_tokens=10, **setting)
    early = 0
    for seed in range(3):
        theirs, system, params = twins(seed, TINY)
        ids_BL, mask_BL = random_prompts(seed, TINY.vocab_size, (5, 9, 2, 7))
        made = generate(system, params, text_batch(ids_BL, mask_BL), config)
        expected = theirs.generate(
            input_ids=torch.tensor(ids_BL),
            attention_mask=torch.tensor(mask_BL),
            do_sample=False,
            num_beams=config.num_beams,
            eos_token_id=list(end_token_ids(config)),
            max_new_tokens=config.max_new_tokens,
            min_length=config.min_length,
            length_penalty=config.length_penalty,
            repetition_penalty=config.repetition_penalty,
            return_dict_in_generate=True,
            output_scores=True,
        )
        rows = expected.sequences[:, 1:].tolist()
        ends = [next((k + 1 for k, i in enumerate(row) if i in end_token_ids(config)), len(row)) for row in rows]
        ended = [row[:end] for row, end in zip(rows, ends)]
        assert words(made) == ended
        np.testing.assert_allclose(made.score_B, expected.sequences_scores, rtol=1e-4, atol=1e-5)
        early += sum(length < config.max_new_tokens for length in made.length_B.tolist())
    assert early, "some answers should end before the last token"


def plain_search(params, prompt, config: GenerationConfig) -> tuple[list[int], float]:
    """Beam search with lists, reading everything again for every hypothesis."""
    k, limit = config.num_beams, config.max_new_tokens
    running, finished = [(0.0, [])], []
    for length in range(1, limit + 1):
        options = []
        for total, answer in running:
            logits = logits_in_numpy(params, prompt, answer)
            chances = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            for token in {0, *answer}:
                chances[token] *= config.repetition_penalty
            if length < config.min_length:
                chances[config.eos_token_id] = -np.inf
            options += [(total + chances[token], [*answer, token]) for token in range(VOCAB)]
        options = sorted(options, key=lambda option: -option[0])[: 2 * k]
        for rank, (total, answer) in enumerate(options):
            if rank < k and (answer[-1] == config.eos_token_id or length == limit):
                finished.append((total / length**config.length_penalty, answer))
        finished = sorted(finished, key=lambda one: -one[0])[:k]
        running = [option for option in options if option[1][-1] != config.eos_token_id][:k]
        hope = running[0][0] / length**config.length_penalty
        if len(finished) == k and hope <= finished[-1][0]:
            break
    return finished[0][1], finished[0][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        {"num_beams": 4},
        {"num_beams": 3, "repetition_penalty": 1.5, "length_penalty": 2.0},
        {"num_beams": 5, "length_penalty": 0.0, "min_length": 4},
    ],
)
def test_beam_search_with_a_cache_matches_a_plain_search_without_one(setting):
    config = GenerationConfig(max_new_tokens=8, **setting)
    lengths = set()
    for seed in range(12):
        params = random_params(seed)
        made = generate(Toy(), params, batch_of(*PROMPTS), config)
        expected = [plain_search(params, prompt, config) for prompt in PROMPTS]
        assert words(made) == [answer for answer, _ in expected]
        np.testing.assert_allclose(made.score_B, [score for _, score in expected], rtol=1e-4)
        lengths |= set(made.length_B.tolist())
    assert len(lengths) > 3


def test_enough_beams_find_the_most_likely_sequence():
    params, prompt, limit = random_params(7), PROMPTS[1], 3
    config = GenerationConfig(max_new_tokens=limit, num_beams=VOCAB**2, length_penalty=0.0)

    def chance(answer):
        logits = [logits_in_numpy(params, prompt, answer[:n]) for n in range(len(answer))]
        return sum(row[t] - np.log(np.exp(row).sum()) for row, t in zip(logits, answer))

    others = [token for token in range(VOCAB) if token != config.eos_token_id]
    whole = [
        [*body, end]
        for n in range(limit)
        for body in itertools.product(others, repeat=n)
        for end in (range(VOCAB) if n == limit - 1 else [config.eos_token_id])
    ]
    best = max(whole, key=chance)
    made = generate(Toy(), params, batch_of(prompt), config)
    assert words(made)[0] == best and made.score_B[0] == pytest.approx(chance(best), abs=1e-4)


def test_one_beam_is_greedy_decoding():
    config = GenerationConfig(max_new_tokens=9)
    for seed in range(5):
        params, batch = random_params(seed), batch_of(*PROMPTS)
        greedy = generate(Toy(), params, batch, config)
        assert words(searched(Toy(), params, batch, config)) == words(greedy)


@pytest.mark.slow
def test_beam_search_of_a_batch_equals_that_of_each_prompt_alone():
    config, params = (GenerationConfig(max_new_tokens=8, num_beams=3, repetition_penalty=1.5), random_params(3))
    batch = batch_of(*PROMPTS)
    together = words(generate(Toy(), params, batch, config))
    for row, found in enumerate(together):
        alone = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], batch)
        assert words(generate(Toy(), params, alone, config)) == [found]


def test_beam_search_stops_when_every_prompt_is_finished():
    params = random_params(7)
    config = GenerationConfig(max_new_tokens=50, num_beams=2)
    toy_system.steps.clear()
    made = generate(Toy(True), params, batch_of(*PROMPTS), config)
    assert made.length_B.max() < 40
    jax.effects_barrier()
    assert made.length_B.max() - 1 <= len(toy_system.steps) < 49
    assert (np.asarray(made.ids_BM)[np.arange(50) >= np.asarray(made.length_B)[:, None]] == 0).all()


@pytest.mark.slow
def test_log_probabilities_follow_their_beam():
    config = GenerationConfig(max_new_tokens=8, num_beams=4, output_logprobs=True)
    for seed in range(4):
        made = generate(Toy(), random_params(seed), batch_of(*PROMPTS), config)
        total_B = np.asarray(made.logprob_BM).sum(axis=1)
        np.testing.assert_allclose(made.score_B, total_B / np.asarray(made.length_B), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_split_over_devices_generates_the_same_tokens(beams):
    params, batch = random_params(2), batch_of(*PROMPTS, *PROMPTS)
    config = GenerationConfig(max_new_tokens=6, num_beams=beams, repetition_penalty=1.3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("data"))
    spread = dataclasses.replace(
        batch,
        prompt_BL=jax.device_put(batch.prompt_BL, split),
        prompt_mask_BL=jax.device_put(batch.prompt_mask_BL, split),
    )
    made = generate(Toy(), params, spread, config)
    assert words(made) == words(generate(Toy(), params, batch, config))
