# SPDX-License-Identifier: Apache-2.0
"""What stands beside exported weights so that others can use them: a model card, and how words and pictures come in.

Settings are read off what the config has, by the names of its fields; files that came along from elsewhere stay.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.convert.formats.peft import ADAPTER_FOLDER as ADAPTER
from lionjax.convert.formats.peft import is_lora_key
from lionjax.convert.mapping.plan import TensorSpec
from lionjax.core.types import UserError

PIL_BICUBIC = 3  # Pillow's number of it


def write_processor_configs(config: Any, folder: Path) -> list[str]:
    """preprocessor_config.json and tokenizer_config.json where a run's own data say what is in them; what was made."""
    contents: dict[str, dict] = {}
    processor = getattr(getattr(config, "data", None), "processor", None)
    if processor is not None:
        contents["preprocessor_config.json"] = preprocessor_config(processor)
    for subfolder in ("", "qformer_tokenizer/"):
        if (folder / subfolder / "tokenizer.json").is_file():
            contents[f"{subfolder}tokenizer_config.json"] = tokenizer_config(folder / subfolder / "tokenizer.json")
    contents = {name: content for name, content in contents.items() if not (folder / name).exists()}
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return list(contents)


def preprocessor_config(processor: Any) -> dict:
    """How pictures come in, as transformers' image processors say it.

    LION stretches a picture to a square. NExT-Chat puts it into a white one first and LLaVA-1.5 into one of the mean
    color, which this image processor does not, so whoever uses it must.
    """
    settings = {
        "image_processor_type": "BlipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": processor.image_size, "width": processor.image_size},
        "resample": PIL_BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(processor.mean),
        "image_std": list(processor.std),
    }
    return settings | ({f"{processor.pad_color}_square_first": True} if processor.padded else {})


def tokenizer_config(file: Path) -> dict:
    """How a tokenizer.json is to be opened, with the names of its special pieces."""
    backend, special_tokens = open_tokenizer(file), {}
    spellings_by_name = {
        "pad_token": ("<pad>", "[PAD]"),
        "unk_token": ("<unk>", "[UNK]"),
        "eos_token": ("</s>",),
        "bos_token": ("<s>",),
        "sep_token": ("[SEP]",),
        "cls_token": ("[CLS]",),
    }
    for name, spellings in spellings_by_name.items():
        if present := [piece for piece in spellings if backend.token_to_id(piece) is not None]:
            special_tokens[name] = present[0]
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | special_tokens


def open_tokenizer(file: Path):
    """The tokenizer of a tokenizer.json. Raises UserError where it is none."""
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # its reader is not in Python and has one kind of exception for all
        raise UserError(f"{file} is no tokenizer: {str(error).splitlines()[0]}") from error


def render_model_card(format_name: str, config: Any, hf_config: Mapping, specs: Mapping[str, TensorSpec]) -> str:
    """README.md of a folder of weights, with the head that model hubs read."""
    architecture = (hf_config.get("architectures") or [""])[0]
    is_transformers = architecture and hf_config.get("model_type") not in ("lion", "nextchat", "lavis", "ram", "eva")
    head = ["---", f"library_name: {'transformers' if is_transformers else 'lionjax'}"]
    head += [f"tags: [lionjax, {format_name}]", f"pipeline_tag: {_pipeline_tag(format_name)}", "---"]
    model_config = getattr(config, "system", config)
    title = getattr(config, "name", None) or format_name
    dtypes = sorted({str(spec.dtype) for spec in specs.values()})
    num_parameters = sum(int(np.prod(spec.shape)) for spec in specs.values())
    lines = [
        *head,
        "",
        f"# {title}",
        "",
        f"A {type(model_config).__name__.removesuffix('Config')} ({format_name}): {num_parameters:,} numbers ({', '.join(dtypes)}) in "
        f"{len(specs)} tensors, under the names of the original PyTorch code, written by lionjax.",
        "",
        "| part | numbers |",
        "|---|---|",
        *(f"| `{part}` | {count:,} |" for part, count in _parameter_counts(specs).items()),
        "",
        "## Use",
        "",
    ]
    if is_transformers:
        lines += ["In PyTorch:", "", "```python", f"from transformers import {architecture}"]
        lines += [f'model = {architecture}.from_pretrained("this folder")', "```", ""]
    else:
        lines += ["In PyTorch, with the original's code:", "", "```python"]
        lines += ["from safetensors.torch import load_file", 'model.load_state_dict(load_file("model.safetensors"))']
        lines += ["```", ""]
    if any(map(is_lora_key, specs)):
        lines += ["A LoRA is kept apart; PEFT puts it on the model:", "", "```python", "from peft import PeftModel"]
        lines += [f'model = PeftModel.from_pretrained(model, "this folder/{ADAPTER}")', "```", ""]
    lines += ["In JAX, without loss, down to the bit:", "", "```", "lionjax convert THIS_FOLDER NEW_FOLDER --to jax"]
    lines += ["```", "", *_training_section(config), "## Licence", ""]
    lines += ["That of the weights and of the data from which they were made; lionjax adds none of its own.", ""]
    return "\n".join(lines)


def _pipeline_tag(format_name: str) -> str:
    tasks = {
        "text-generation": ("llama", "opt", "gpt2"),
        "text2text-generation": ("t5",),
        "feature-extraction": ("bert",),
    }
    tasks |= {"image-feature-extraction": ("clip", "eva", "swin"), "mask-generation": ("sam", "segment_anything")}
    tasks |= {"image-classification": ("ram",)}
    return next((task for task, names in tasks.items() if format_name in names), "image-text-to-text")


def _parameter_counts(specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Numbers by the first word of the tensors' names."""
    counts: dict[str, int] = {}
    for name, spec in specs.items():
        part = f"{ADAPTER} (LoRA)" if is_lora_key(name) else name.partition(".")[0]
        counts[part] = counts.get(part, 0) + int(np.prod(spec.shape))
    return counts


def _training_section(config: Any) -> list[str]:
    """What a run did, where the config is that of one."""
    stages = getattr(config, "stages", ())
    if not stages:
        return []
    lines = ["## Training", "", "| stage | steps | batch | learning rate | trained |", "|---|---|---|---|---|"]
    for stage in stages:
        trained = ", ".join(f"`{pattern}`" for pattern in stage.trainable)
        lines.append(f"| {stage.name} | {stage.steps} | {stage.batch_size} | {stage.learning_rate:g} | {trained} |")
    sources = [type(source).__name__ for source in config.data.sources]
    return [*lines, "", f"Data: {', '.join(sources)}. Seed {config.seed}.", ""]
