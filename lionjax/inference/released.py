# SPDX-License-Identifier: Apache-2.0
"""Released weights: their prompt format and generation settings, from the files of their folder.

A folder of Hugging Face says how it is asked by its chat template and generation_config.json; an original release by
the system's own code, which `core.prompt_formats` repeats.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lionjax.convert.formats import detect
from lionjax.convert.formats.checkpoint_format import read_hf_config
from lionjax.core.experiment import Experiment, GenerationDefaults
from lionjax.core.prompt_formats import SYSTEM_FORMATS, SystemFormat
from lionjax.core.types import VLM, UserError
from lionjax.data.config import DataConfig
from lionjax.data.processor import Processor, ProcessorConfig
from lionjax.inference import chat_template
from lionjax.models import parts

log = logging.getLogger(__name__)

# As in Hugging Face's `generate`: the repetition penalty counts the prompt and holds for every prompt.
HUGGING_FACE_GENERATION = GenerationDefaults(penalize_boxes=True, penalize_prompt=True)
GENERATION_FIELDS = (
    *("num_beams", "length_penalty", "repetition_penalty", "max_new_tokens", "min_new_tokens"),
    *("do_sample", "temperature", "top_k", "top_p"),
)
TRANSFORMERS_TYPES = ("llava", "blip-2", "instructblip", "kosmos-2")  # with text_config: classes of transformers
HUGGING_FACE_TOP_K = 50  # where generation_config.json samples without a top_k
# Settings of generation_config.json that lionjax does not have, and their values without effect.
UNSUPPORTED_GENERATION = {
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "typical_p": (None, 1.0),
    "min_p": (None, 0.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0.0),
    "penalty_alpha": (None, 0.0),
    "guidance_scale": (None, 1.0),
    "bad_words_ids": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "sequence_bias": (None, {}),
    "stop_strings": (None, []),
    "exponential_decay_length_penalty": (None,),
}
# The formats of LLaVA by what its code looks for in the name of a model, in this order (llava/eval/run_llava.py).
LLAVA_NAMES = (
    (re.compile(r"llama-2"), "llava_llama_2"),
    (re.compile(r"(?<![a-z0-9])v1(?![0-9])"), "vicuna_v1"),
    (re.compile(r"(?<![a-z])mpt"), "mpt"),
    (re.compile(r"(?<![a-z0-9])v0(?![0-9])"), "llava_v0"),
)


def released_experiment(model: Any, folder: Path, settings_folder: Path | None = None) -> Experiment:
    """The experiment for released weights that come without one; `settings_folder` has their tokenizer and settings.

    `model`: a VLM, or the config of a language model, which answers alone.

    Raises UserError if the model cannot generate text on its own.
    """
    model = parts.as_answering(model)
    if not parts.can_generate(model):
        raise UserError(f"{folder} holds a {type(model).__name__}, which cannot generate text; give a complete model")
    settings_folder = settings_folder or folder
    hf_config = read_hf_config(settings_folder / "config.json")
    is_own = has_own_settings(model, settings_folder)
    generation_config = read_hf_config(settings_folder / "generation_config.json")
    system = prompt_format(
        model.info.prompt_format, hf_config, _model_name(folder), settings_folder if is_own else None
    )
    fields = dict(model.info.default_processor) | dict(system.processor)
    generation = generation_defaults(system, hf_config, generation_config, is_own)
    max_new_tokens = min(generation.max_new_tokens, fields.get("max_target_tokens", generation.max_new_tokens))
    return Experiment(
        folder.name,
        model,
        DataConfig(processor=ProcessorConfig(image_size=model.info.image_size, **fields)),
        stages=(),
        generation=dataclasses.replace(generation, max_new_tokens=max_new_tokens),
    )


def has_own_settings(model: VLM, settings_folder: Path) -> bool:
    """Whether the settings files are the system's; those of LAVIS and LION are their language model's."""
    model_type = read_hf_config(settings_folder / "config.json").get("model_type")
    return model_type in (None, *detect.format_of_config(model).model_types)


def prompt_format(
    name: str, hf_config: Mapping[str, Any], folder_name: str, chat_template_folder: Path | None
) -> SystemFormat:
    """How a released system is asked; `name` is its model's `prompt_format`.

    A chat template in `chat_template_folder` replaces the text of a LLaVA's prompt format.
    """
    if not name:
        return SystemFormat({}, GenerationDefaults())
    chat_fields: dict[str, str] = {}
    if name == "vicuna_v1":  # a LLaVA, or a system of its parts
        name = llava_format(hf_config, folder_name)
        chat_fields = chat_template.prompt_fields(chat_template_folder) if chat_template_folder else {}
    system = SYSTEM_FORMATS[name]
    fields = dict(system.processor) | chat_fields
    if name not in ("shikra", "lisa") and hf_config.get("mm_use_im_start_end"):
        fields["prompt_template"] = fields["prompt_template"].replace("{image}", "<im_start>{image}<im_end>")
    return dataclasses.replace(system, processor=fields)


def llava_format(hf_config: Mapping[str, Any], folder_name: str) -> str:
    """The prompt format of a LLaVA by its name, as LLaVA's own code chooses it; of a Shikra, Shikra's.

    Names: the folder's, and those that config.json records. Without a version in them, LLaVA's code takes `llava_v0`;
    here only for a linear projector, as one of two layers, or a config.json of transformers, is LLaVA-1.5's.
    """
    architectures = hf_config.get("architectures") or ()
    names = " ".join((folder_name, str(hf_config.get("_name_or_path") or ""), *architectures)).lower()
    if "shikra" in names:
        return "shikra"
    for pattern, name in LLAVA_NAMES:
        if pattern.search(names):
            return name
    if "mm_vision_tower" not in hf_config or "text_config" in hf_config:
        return "vicuna_v1"
    is_first = hf_config.get("mm_projector_type", "linear") == "linear"
    name, reason = ("llava_v0", "a linear") if is_first else ("vicuna_v1", "a deeper")
    log.warning(
        "no name says the version of this LLaVA: it is asked as %s, for its projector is %s one; the folder's name can "
        "say llama-2, v1, mpt or v0",
        name,
        reason,
    )
    return name


def _model_name(folder: Path) -> str:
    """The name of a model as LLaVA's code takes it from a path: that of the folder, with its run's for a checkpoint."""
    return f"{folder.parent.name}_{folder.name}" if folder.name.startswith("checkpoint-") else folder.name


def generation_defaults(
    system: SystemFormat, hf_config: Mapping[str, Any], generation_config: Mapping[str, Any], is_own: bool = True
) -> GenerationDefaults:
    """Generation settings: those of the system's generation_config.json where there is one, else those of its code.

    The code of a class of transformers is `generate`, which is greedy.

    `is_own`: the files are the system's; else its language model's, of which only the token ids are taken.

    End, padding and decoder start tokens are those of generation_config.json, else of config.json or its text_config;
    None where no file has them.
    """
    defaults = system.generation
    is_transformers = hf_config.get("model_type") in TRANSFORMERS_TYPES and "text_config" in hf_config
    if is_own and (generation_config or is_transformers):
        given = {k: generation_config[k] for k in GENERATION_FIELDS if generation_config.get(k) is not None}
        given.setdefault("max_new_tokens", defaults.max_new_tokens)
        if given.get("do_sample"):
            given.setdefault("top_k", HUGGING_FACE_TOP_K)
        defaults = dataclasses.replace(HUGGING_FACE_GENERATION, **given)
        for name, inert in UNSUPPORTED_GENERATION.items():
            if generation_config.get(name) not in inert:
                log.warning("generation_config.json sets %s, which is not supported and has no effect", name)
    sources = (generation_config, hf_config, hf_config.get("text_config") or {})

    def ids(name: str) -> tuple[int, ...] | None:
        value = next((source[name] for source in sources if source.get(name) is not None), None)
        return None if value is None else tuple(value) if isinstance(value, list) else (int(value),)

    found = {name: ids(name) for name in ("eos_token_id", "pad_token_id", "decoder_start_token_id")}
    first = {name: value[0] for name, value in found.items() if value and name != "eos_token_id"}
    return dataclasses.replace(defaults, **first, eos_token_id=found["eos_token_id"])


def with_end_of_answer(experiment: Experiment, settings_folder: Path) -> Experiment:
    """The experiment of an original release with the token that ends an answer in its prompt format as an end token.

    Captions of BLIP-2 with OPT end in a newline and nothing else; LLaVA v0 and MiniGPT-4 stop at "###" or the end
    token. A generation_config.json of the system decides alone.
    """
    if (settings_folder / "generation_config.json").is_file() and has_own_settings(experiment.model, settings_folder):
        return experiment
    config, generation = experiment.data.processor, experiment.generation
    tokenizer = Processor(config).tokenizer
    ids = tokenizer.encode(config.answer_end, parse_special=True) if config.answer_end.strip(" ") else []
    if len(ids) != 1:
        return experiment
    others = () if config.answer_end.isspace() else generation.eos_token_id or (tokenizer.eos_id,)
    end_ids = tuple(dict.fromkeys((*ids, *others)))
    return dataclasses.replace(experiment, generation=dataclasses.replace(generation, eos_token_id=end_ids))
