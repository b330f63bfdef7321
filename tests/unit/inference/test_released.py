# SPDX-License-Identifier: Apache-2.0
"""Prompt format and generation settings of released weights, from the files of their folder."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import tiny_released
from published_folders import tiny_lion

from lionjax.core.experiment import GenerationDefaults
from lionjax.core.prompt_formats import SYSTEM_FORMATS
from lionjax.core.types import UserError
from lionjax.data.processor import Processor, ProcessorConfig
from lionjax.inference import chat_template, released
from lionjax.inference.engine import InferenceEngine
from lionjax.inference.sampling import GenerateOutput, GenerationConfig, init_seen
from lionjax.models.vlm import visual_prefix
from lionjax.models.vlm.nextchat import NextChat

HF_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (visual_prefix.LLAVA_15_7B, "vicuna_v1"),
        (visual_prefix.BLIP2_OPT_2_7B, "blip2_opt"),
        (visual_prefix.BLIP2_FLAN_T5_XL, "blip2"),
        (visual_prefix.INSTRUCTBLIP_FLAN_T5_XL, "instructblip"),
        (visual_prefix.INSTRUCTBLIP_VICUNA_7B, "instructblip"),
        (visual_prefix.MINIGPT4_7B, "minigpt4"),
        (visual_prefix.MPLUG_OWL_7B, "mplug_owl"),
        (visual_prefix.KOSMOS2, "kosmos2"),
        (NextChat(), "nextchat"),
        (tiny_lion(), "lion"),
    ],
)
def test_each_released_model_gets_the_prompt_format_of_its_system(model, name, tmp_path):
    assert model.info.prompt_format == name
    experiment = released.released_experiment(model, tmp_path)
    processor, system = experiment.data.processor, SYSTEM_FORMATS[name]
    for field, value in system.processor.items():
        assert getattr(processor, field) == value
    assert dataclasses.replace(experiment.generation, max_new_tokens=system.generation.max_new_tokens) == (
        system.generation
    )


def test_only_lion_and_lavis_instructblip_use_five_beams_with_a_penalty():
    penalized = {n for n, s in SYSTEM_FORMATS.items() if s.generation.repetition_penalty == 1.5}
    assert penalized == {"lion", "instructblip"}
    lion = SYSTEM_FORMATS["lion"].generation
    assert lion == GenerationDefaults(num_beams=5, repetition_penalty=1.5, max_new_tokens=256)
    assert SYSTEM_FORMATS["vicuna_v1"].generation.num_beams == 1


@pytest.mark.parametrize(
    ("folder_name", "hf_config", "name"),
    [
        ("llava-v1.5-7b", {}, "vicuna_v1"),
        ("LLaVA-7b-v0", {}, "llava_v0"),
        ("llava-llama-2-13b-chat-lightning-preview", {}, "llava_llama_2"),
        ("LLaVA-Lightning-MPT-7B-preview", {}, "mpt"),
        ("llava-1.5-7b-hf", {"text_config": {}}, "vicuna_v1"),
        ("prompts", {"mm_vision_tower": "openai/clip-vit-large-patch14"}, "llava_v0"),
        ("ours", {"mm_vision_tower": "x", "mm_projector_type": "mlp2x_gelu"}, "vicuna_v1"),
        ("ours", {"_name_or_path": "liuhaotian/LLaVA-7b-delta-v0"}, "llava_v0"),
        ("shikra-7b", {}, "shikra"),
        ("ours", {"architectures": ["ShikraLlamaForCausalLM"]}, "shikra"),
    ],
)
def test_a_llavas_format_is_chosen_as_its_own_code_chooses_it(folder_name, hf_config, name):
    assert released.llava_format(hf_config, folder_name) == name


def test_one_line_says_how_a_llava_without_a_version_in_its_names_is_asked(caplog):
    named, two_layers = {"mm_vision_tower": "x", "_name_or_path": "a/llava-v1.5"}, {"mm_projector_type": "mlp2x_gelu"}
    for hf_config, name in (
        ({"mm_vision_tower": "x"}, "llava_v0"),
        ({"mm_vision_tower": "x"} | two_layers, "vicuna_v1"),
    ):
        caplog.clear()
        assert released.llava_format(hf_config, "ours") == name
        assert [f"asked as {name}" in record.getMessage() for record in caplog.records] == [True]
    caplog.clear()
    assert released.llava_format(named, "ours") == "vicuna_v1" and not caplog.records


def test_a_checkpoint_of_a_llavas_run_has_the_name_of_the_run(tmp_path):
    assert released._model_name(tmp_path / "llava-v1-7b" / "checkpoint-500") == "llava-v1-7b_checkpoint-500"
    assert released._model_name(tmp_path / "llava-v1-7b") == "llava-v1-7b"


def test_image_start_and_end_tokens_of_the_config_stand_around_the_image():
    system = released.prompt_format("vicuna_v1", {"mm_use_im_start_end": True}, "llava-v1", None)
    assert "USER: <im_start>{image}<im_end>\n{question} ASSISTANT:" in system.processor["prompt_template"]


def defaults(generation_config: dict, hf_config: dict | None = None, name: str = "instructblip", own: bool = True):
    return released.generation_defaults(SYSTEM_FORMATS[name], hf_config or {}, generation_config, own)


def test_generation_config_json_decides_all_settings_where_there_is_one():
    given = {"num_beams": 3, "length_penalty": -1.0, "max_new_tokens": 7, "eos_token_id": [2, 9], "pad_token_id": 1}
    found = defaults(given)
    assert (found.num_beams, found.length_penalty, found.max_new_tokens, found.repetition_penalty) == (3, -1.0, 7, 1.0)
    assert (found.eos_token_id, found.pad_token_id) == ((2, 9), 1) and found.penalize_boxes and found.penalize_prompt
    sampled = defaults({"do_sample": True, "temperature": 0.2, "top_p": 0.6})
    assert (sampled.do_sample, sampled.temperature, sampled.top_p, sampled.top_k) == (True, 0.2, 0.6, 50)
    assert defaults({"_from_model_config": True}).num_beams == 1


def test_without_generation_config_the_defaults_of_the_systems_code_apply():
    assert (defaults({}).num_beams, defaults({}).repetition_penalty) == (5, 1.5)
    hf = {"model_type": "instructblip", "text_config": {"eos_token_id": 2}}
    assert (defaults({}, hf).num_beams, defaults({}, hf).repetition_penalty) == (1, 1.0)
    part = defaults({"num_beams": 1, "eos_token_id": 1}, {"model_type": "t5"}, "lion", own=False)
    assert (part.num_beams, part.repetition_penalty, part.eos_token_id) == (5, 1.5, (1,))


@pytest.mark.parametrize(
    ("generation_config", "hf_config", "wanted"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": 6, "text_config": {"eos_token_id": 7}}, (5,)),
        ({}, {"eos_token_id": [6, 8], "text_config": {"eos_token_id": 7}}, (6, 8)),
        ({"eos_token_id": None}, {"text_config": {"eos_token_id": 50118}}, (50118,)),
        ({}, {}, None),
    ],
)
def test_end_tokens_come_from_the_first_file_that_names_them(generation_config, hf_config, wanted):
    assert defaults(generation_config, hf_config).eos_token_id == wanted


def test_the_repetition_penalty_counts_prompt_tokens_only_with_penalize_prompt():
    prompt, mask = np.array([[3, 4, -200], [5, 9, 6]]), np.array([[1, 1, 1], [1, 0, 1]])
    config = GenerationConfig(repetition_penalty=1.5, decoder_start_token_id=None)
    assert not init_seen(4, 8, config, prompt, mask).any()
    seen = np.asarray(init_seen(4, 8, dataclasses.replace(config, penalize_prompt=True), prompt, mask))
    assert [row.nonzero()[0].tolist() for row in seen] == [[3, 4], [3, 4], [5, 6], [5, 6]]


def test_an_unsupported_generation_setting_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        defaults({"no_repeat_ngram_size": 3, "typical_p": 1.0})
    assert "no_repeat_ngram_size" in caplog.text and "typical_p" not in caplog.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", HF_TEMPLATE),
        ("chat_template.json", json.dumps({"chat_template": HF_TEMPLATE})),
        ("processor_config.json", json.dumps({"chat_template": HF_TEMPLATE})),
        ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "default", "template": HF_TEMPLATE}]})),
    ],
)
def test_a_chat_template_gives_the_prompt_of_one_question_and_of_the_next(name, content, tmp_path):
    pytest.importorskip("jinja2")
    (tmp_path / name).write_text(content)
    assert chat_template.prompt_fields(tmp_path) == {
        "prompt_template": "USER: <image>\n{question} ASSISTANT:".replace("<image>", "{image}"),
        "answer_end": " ",
        "followup_template": "USER: {question} ASSISTANT:",
    }
    system = released.prompt_format("vicuna_v1", {}, "llava-1.5-7b-hf", tmp_path)
    assert system.processor["prompt_template"] == "USER: {image}\n{question} ASSISTANT:"


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[0] ", "no question"])
def test_a_chat_template_that_cannot_be_used_is_one_sentence(template, tmp_path):
    pytest.importorskip("jinja2")
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="chat template of"):
        chat_template.prompt_fields(tmp_path)


def test_a_folder_without_a_chat_template_keeps_the_systems_own(tmp_path):
    assert chat_template.prompt_fields(tmp_path) == {}


@pytest.mark.parametrize("name", ["minigpt4", "llava_v0"])
def test_the_text_of_an_answer_ends_before_the_stop_words_as_in_the_systems_own_code(name, tmp_path):
    """MiniGPT-4 and LLaVA v0 stop at "###", one token behind a space and several behind a newline, and cut it off."""
    pytest.importorskip("transformers")
    theirs = tiny_released.llama_tokenizer()
    theirs.save_pretrained(tmp_path)
    config = ProcessorConfig(
        tokenizer=str(tmp_path), image_token=-200, reader="decoder", **SYSTEM_FORMATS[name].processor
    )
    engine = InferenceEngine(None, None, Processor(config), None)
    row = {"size": np.array([1, 1])}
    texts = ("Two cats. ###Human: And?", "Two\ncats.\n###", "A # and ## here", "no end", "###", " ### Assistant: a")
    assert len({len(theirs(text, add_special_tokens=False).input_ids) for text in ("###", "a\n###")}) == 2
    for text in texts:
        ids = [*theirs(text, add_special_tokens=False).input_ids, 2]
        output = GenerateOutput(np.array([ids]), np.array([len(ids)]))
        mine = engine.decode_output(output, 0, row, None, GenerationConfig(eos_token_id=2))
        assert mine.text == theirs.decode(ids, skip_special_tokens=True).split("###")[0].strip(), text
