# SPDX-License-Identifier: Apache-2.0
"""Answering in slots: the ids of one-by-one answering for every kind of system; streaming, canceling."""

import dataclasses

import jax
import numpy as np
import pytest
import small_lion
import small_places
import toy_system
from mesh_systems import FLAMINGO, LLAVA, scenes
from toy_system import Toy, batch_of, random_params

from lionjax.core import sharding
from lionjax.data.processor import ImageTextInput, Processor
from lionjax.inference import answer_mesh, engine, slots
from lionjax.inference.answer_request import AnswerRequest, SessionSizes
from lionjax.inference.engine import InferenceEngine, Question
from lionjax.inference.generate import generate
from lionjax.inference.sampling import GenerationConfig, row_keys
from lionjax.inference.session import AnswerSession

MESH = sharding.make_mesh(devices=jax.devices()[:1])
SIZES = SessionSizes(4, 2, 6, 1, (3,))
QUESTIONS = ["What is it?", "Where is the small red circle in the picture?", "How many?", "Is there a dog in it? " * 2]


# The scheduler, with a system that compiles in a moment


def toy_rows(count: int, seed: int = 0, longest: int = 6) -> list[dict]:
    rng, rows = np.random.default_rng(seed), []
    for length in rng.integers(1, longest + 1, count):
        ids = np.zeros(8, np.int32)
        ids[:length] = rng.integers(2, toy_system.VOCAB, length)
        mask = (np.arange(8) < length).astype(np.int32)
        rows.append({"prompt": ids, "prompt_mask": mask, "question_mask": mask[:1], "pixels": np.zeros(1, np.uint8)})
    return rows


def toy_collate(rows, lengths, with_images):
    prompts = [tuple(row["prompt"][: row["prompt_mask"].sum()]) for row in rows]
    padded = batch_of(*prompts, (2,) * lengths[0])  # one more row, as long as the padding
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:-1], padded)


def toy_session(params, config, sizes=SIZES):
    return AnswerSession(Toy(), params, MESH, toy_collate, config, sizes)


def ids_of(finished) -> list[int]:
    return finished.output.ids_BM[0, : finished.output.length_B[0]].tolist()


def alone(params, row, config, seed=0) -> list[int]:
    batch = batch_of(tuple(row["prompt"][: row["prompt_mask"].sum()]))
    made = generate(Toy(), params, batch, config, jax.random.key(seed))
    return np.asarray(made.ids_BM)[0, : int(made.length_B[0])].tolist()


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 1.3, "penalize_prompt": True, "min_length": 4},
        {"do_sample": True, "temperature": 2.0, "top_k": 5, "top_p": 0.9},
    ],
)
def test_answers_in_slots_are_those_of_each_request_alone(setting):
    params, config = random_params(3), GenerationConfig(max_new_tokens=9, **setting)
    rows = toy_rows(30)
    session = toy_session(params, config)
    found = {one.request_id: one for one in session.run(AnswerRequest(row, seed) for seed, row in enumerate(rows))}
    assert sorted(found) == list(range(30)) and session.is_idle
    expected = [alone(params, row, config, seed) for seed, row in enumerate(rows)]
    assert [ids_of(found[number]) for number in range(30)] == expected
    assert len({len(ids) for ids in expected}) > 2, "answers of like length would show nothing"


def test_each_request_has_its_own_temperature_and_top_p_and_answers_as_a_session_with_these_alone():
    params, rows = random_params(3), toy_rows(12, seed=3)
    config = GenerationConfig(max_new_tokens=9, top_k=12, row_sampling=True)
    settings = [(0.0, 1.0), (2.0, 1.0), (0.7, 0.6), (0.0, 0.5)]
    requests = [AnswerRequest(row, k, temperature=t, top_p=p) for k, row in enumerate(rows) for t, p in settings]
    found = {one.request_id: ids_of(one) for one in toy_session(params, config).run(requests)}
    for place, (temperature, top_p) in enumerate(settings):
        fields = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 12} if temperature else {}
        alike = GenerationConfig(max_new_tokens=9, **fields)
        expected = [alone(params, row, alike, seed) for seed, row in enumerate(rows)]
        assert [found[len(settings) * k + place] for k in range(len(rows))] == expected
    assert found[0] != found[1] or found[4] != found[5], "sampling would show nothing"


def test_no_program_is_compiled_after_the_first_admissions():
    params, config = random_params(0), GenerationConfig(max_new_tokens=7)
    session = toy_session(params, config, SessionSizes(2, 1, 6, 1))
    before = [program._cache_size() for program in (slots.prefill, slots.insert)]
    list(session.run(map(AnswerRequest, toy_rows(4))))
    # The first admission, into new slots, needs no program of its own.
    assert [program._cache_size() for program in (slots.prefill, slots.insert)] == [count + 1 for count in before]
    list(toy_session(params, config).run(map(AnswerRequest, toy_rows(12))))
    programs = (slots.prefill, slots.insert, slots.decode, slots.init_slots)
    counts = [program._cache_size() for program in programs]
    list(toy_session(params, config).run(map(AnswerRequest, toy_rows(40, seed=1))))
    assert [program._cache_size() for program in programs] == counts


def test_log_probabilities_and_limits_are_those_of_each_request():
    params = random_params(4)
    config = GenerationConfig(max_new_tokens=9, output_logprobs=True)
    rows = toy_rows(7, seed=5)
    requests = [AnswerRequest(row, max_new_tokens=2 + k % 3) for k, row in enumerate(rows)]
    for one in toy_session(params, config).run(requests):
        limit = requests[one.request_id].max_new_tokens
        whole = generate(Toy(), params, toy_collate([rows[one.request_id]], (6, 1), True), config)
        ids = np.asarray(whole.ids_BM)[0, : min(limit, int(whole.length_B[0]))].tolist()
        assert ids_of(one) == ids and len(ids) <= limit
        made = one.output.logprob_BM[0]
        np.testing.assert_allclose(made[: len(ids)], whole.logprob_BM[0, : len(ids)], atol=1e-5)
        assert one.output.score_B[0] == pytest.approx(made[: len(ids)].sum(), abs=1e-5)


def test_requests_are_added_streamed_and_canceled_while_others_run():
    params, config = random_params(3), GenerationConfig(max_new_tokens=9)
    rows = [row for row in toy_rows(40, seed=2) if len(alone(params, row, config)) > 3][:6]
    session = toy_session(params, config)
    numbers = [session.add(AnswerRequest(row)) for row in rows[:5]]
    seen, finished = {number: [] for number in range(6)}, {}
    session.advance(1)  # one waits for a slot
    session.cancel(numbers[1])
    session.cancel(numbers[4])
    numbers.append(session.add(AnswerRequest(rows[5])))
    while not session.is_idle:
        for number, ids in session.partial_ids().items():
            assert ids[: len(seen[number])] == seen[number]  # grows, and never changes
            seen[number] = ids
        finished |= {one.request_id: ids_of(one) for one in session.advance(1)}
    assert finished == {k: alone(params, rows[k], config) for k in (0, 2, 3, 5)}
    assert all(len(seen[k]) > 1 and finished[k][: len(seen[k])] == seen[k] for k in finished)


def test_identical_requests_are_generated_once_and_canceled_one_by_one():
    params, config = random_params(3), GenerationConfig(max_new_tokens=9)
    row, other = toy_rows(2, seed=9)
    session = toy_session(params, config)
    first, twin, third = (session.add(AnswerRequest(dict(row))) for _ in range(3))
    session.add(AnswerRequest(other))
    assert session.num_waiting == 2
    session.cancel(first)  # the others still want its answer
    session.cancel(third)
    found = {}
    while not session.is_idle:
        found |= {one.request_id: ids_of(one) for one in session.advance()}
    assert found == {twin: alone(params, row, config), 3: alone(params, other, config)}
    twins = [session.add(AnswerRequest(dict(other) | {"task": np.int32(1)})) for _ in range(2)]
    session.advance(1)
    for number in twins:
        session.cancel(number)
    assert session.is_idle  # nobody wants it any longer, so its slot is free
    again = session.add(AnswerRequest(row))
    assert [(one.request_id, ids_of(one)) for one in session.advance()] == [(again, found[twin])]


@pytest.mark.parametrize("setting", [{}, {"row_sampling": True}, {"do_sample": True}])
def test_requests_that_differ_by_seed_alone_are_one_request_in_greedy_decoding(setting):
    params, (row,) = random_params(3), toy_rows(1)
    session = toy_session(params, GenerationConfig(max_new_tokens=9, **setting))
    for seed in range(5):
        session.add(AnswerRequest(row, seed))
    assert session.num_waiting == (5 if "do_sample" in setting else 1)
    if "row_sampling" in setting:
        for seed in range(4):
            session.add(AnswerRequest(row, seed, temperature=0.5))
        assert session.num_waiting == 1 + 4


def test_prompts_longer_than_the_slots_get_longer_slots_when_the_others_have_ended():
    params, config = random_params(3), GenerationConfig(max_new_tokens=9)
    rows = toy_rows(9, seed=4, longest=3) + toy_rows(6, seed=6, longest=8) + toy_rows(5, seed=8, longest=3)
    session = toy_session(params, config, SessionSizes(4, 2, 3, 1))
    found = {one.request_id: ids_of(one) for one in session.run(map(AnswerRequest, rows))}
    assert [found[k] for k in range(20)] == [alone(params, row, config) for row in rows]
    assert session.sizes.prompt_length > 3


# Real systems: images, adapters, boxes


def encoded_rows(what, count: int) -> list[dict]:
    processor, rng = Processor(what.data.processor), np.random.default_rng(0)
    pictures = rng.integers(0, 255, (3, 40, 40, 3), np.uint8)
    inputs = [
        ImageTextInput(
            pictures[k % 3], QUESTIONS[k % 4] + "?" * (k // 4), category=("image_level", "region_level")[k % 2]
        )
        for k in range(count)
    ]
    return [processor.encode_input(one) for one in inputs]


SYSTEMS = {
    "LLaVA": (scenes(LLAVA, ("projector",)), small_lion.params_of),
    "Flamingo": (scenes(FLAMINGO, ("resampler",)), small_lion.params_of),
    "flagship": (small_places.experiment(*small_places.SYSTEMS["flagship"]), small_places.talking),
    "LION": (small_lion.experiment(), small_lion.params_of),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_says_in_slots_what_it_says_one_by_one(name, monkeypatch):
    what, make_params = SYSTEMS[name]
    system = what.model
    talks = InferenceEngine(system, make_params(what), Processor(what.data.processor), MESH)
    rows = encoded_rows(what, 10)
    has_masks = "sam" in rows[0]
    start = 0 if what.data.processor.reader == "encoder" else None
    config = GenerationConfig(
        7, eos_token_id=tuple(range(5, 1024, 6)), decoder_start_token_id=start, output_logprobs=True
    )
    size = (40, 40) if has_masks else None
    longest = engine.bucketed_lengths(rows)
    shape, large = (1, *longest), [size] if has_masks else None
    wanted = [talks.generate([row], config, False, shape, image_sizes=large)[0] for row in rows]
    wanted += [talks.generate([row], config, True, shape)[0] for row in rows[:3]]
    questions = [Question(AnswerRequest(row), size) for row in rows]
    questions += [Question(AnswerRequest(row, image_blind=True)) for row in rows[:3]]
    sizes = SessionSizes(4, 2, *longest, (longest[0] // 2,))
    original = talks.open_session
    talks.open_session = lambda config, row, lengths: original(config, row, lengths, sizes)
    encoded, encode = [], slots.encode_images
    monkeypatch.setattr(slots, "encode_images", lambda *given: encoded.append(1) or encode(*given))
    found = dict(talks.answer_stream(questions, config, longest))
    count = len(encoded)
    again = dict(talks.answer_stream(questions[:2], config, longest))
    assert len(encoded) == count > 1, "an image is encoded once for all sessions of an engine"
    assert [again[number].token_ids for number in (0, 1)] == [found[number].token_ids for number in (0, 1)]
    assert len(found) == len(wanted) and len({len(answer.token_ids) for answer in wanted}) > 1
    assert len({answer.token_ids for answer in wanted}) > 4
    for number, one in enumerate(wanted):
        assert found[number].token_ids == one.token_ids, number
        tolerance = 5e-3 if has_masks else 1e-4  # a box's embedding is the next input, which amplifies rounding
        np.testing.assert_allclose(found[number].token_log_probs, one.token_log_probs, atol=tolerance)
        np.testing.assert_allclose(found[number].boxes, one.boxes, atol=1e-3 if has_masks else 1e-4)
        if one.masks is not None:
            np.testing.assert_allclose(found[number].masks.mean(axis=(1, 2)), one.masks.mean(axis=(1, 2)), atol=1e-2)
    if has_masks:
        assert sum(len(answer.boxes) for answer in wanted) > 2, "no boxes were said"


@pytest.mark.slow
def test_a_long_list_of_rows_is_answered_in_slots_in_its_order(finished_model, monkeypatch):
    monkeypatch.setattr(engine, "BATCH_SIZE_BUCKETS", (1, 2, 4))
    model, rng = finished_model, np.random.default_rng(0)
    images = list(rng.integers(0, 255, (9, 30, 50, 3), np.uint8))
    prompts = [f"{'Where' if k % 2 else 'What'} is it{'?' * (1 + k)}" for k in range(9)]
    opened = []
    session = InferenceEngine.open_session
    monkeypatch.setattr(InferenceEngine, "open_session", lambda *args: opened.append(1) or session(*args))
    together = model.answer(images, prompts)
    assert opened
    one_by_one = [model.answer([image], [prompt])[0] for image, prompt in zip(images, prompts)]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in one_by_one]


def test_slots_and_rows_follow_from_memory_and_lengths(monkeypatch):
    def sizes(lengths, bytes_of_slot=0, free=0):
        found = answer_mesh.session_sizes(MESH, lengths, bytes_of_slot, free)
        return found.num_slots, found.admission_rows, found.short_lengths

    assert sizes((128, 32)) == (64, 8, (32, 64, 96)) and sizes((72, 28)) == (64, 16, (16, 40, 56))
    assert sizes((128, 32), 10**6, 20 * 10**6) == (16, 4, (32, 64, 96)), "85 % of 20 slots, a multiple of 8"
    assert sizes((128, 32), 10**6, 4 * 10**6)[:2] == (3, 1)
    params = {"kernel": np.zeros((4, 4), np.float32)}
    assert answer_mesh.free_bytes(MESH, params) == 0, "slots of small models are not counted on CPUs"
    monkeypatch.setattr(answer_mesh, "SMALL_MODEL_BYTES", 1)
    monkeypatch.setattr(answer_mesh, "_host_bytes", lambda: 1000)
    assert answer_mesh.free_bytes(MESH, params) == 500


def test_the_digest_of_a_model_is_that_of_its_values_wherever_they_lie():
    params = random_params(0)
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    replicated = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    digests = {answer_mesh.model_digest(Toy(), tree) for tree in (params, jax.device_put(params), replicated)}
    assert digests == {"3731112f1eddbad6"}, "journals of earlier versions go on"
    params["bias"][0] += 1e-3
    assert answer_mesh.model_digest(Toy(), params) not in digests


def test_the_digest_of_a_model_reads_parameters_without_axes():
    """Such as the logit scale of CLIP, or the temperature of a first stage."""
    trees = [
        {"logit_scale": np.array(value, np.float32), "empty": np.zeros((0, 3), np.float32)} for value in (2.6, 2.7)
    ]
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    replicated = jax.device_put(trees[0], jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    first, second, third = (answer_mesh.model_digest(Toy(), tree) for tree in (*trees, replicated))
    assert first == third != second


def test_rows_with_their_own_keys_do_not_depend_on_their_neighbors():
    params, config = random_params(1), GenerationConfig(max_new_tokens=8, do_sample=True, temperature=3.0)
    prompts, seeds = ((3, 4), (5, 6, 7), (2,), (3, 4)), [7, 1, 0, 7]
    made = generate(Toy(), params, batch_of(*prompts), config, row_keys(seeds))
    for k, (prompt, seed) in enumerate(zip(prompts, seeds)):
        single = generate(Toy(), params, batch_of(prompt), config, jax.random.key(seed))
        np.testing.assert_array_equal(made.ids_BM[k], single.ids_BM[0])
    assert dataclasses.asdict(config)["do_sample"]
