# SPDX-License-Identifier: Apache-2.0
"""Model card (README.md), preprocessor_config.json and tokenizer_config.json of an exported Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lionjax.convert.formats.image_settings import image_fit_config
from lionjax.convert.formats.peft import ADAPTER_FOLDER as ADAPTER
from lionjax.convert.formats.peft import is_lora_key
from lionjax.convert.mapping.plan import TensorSpec
from lionjax.core.types import UserError


def write_processor_configs(config: Any, folder: Path) -> list[str]:
    """Write preprocessor_config.json and tokenizer_config.json where they are missing; returns the written names.

    The former needs an experiment's `data.processor`, the latter a tokenizer.json in `folder`.
    """
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
    """preprocessor_config.json of a `ProcessorConfig`, for transformers' BlipImageProcessor or CLIPImageProcessor.

    LION resizes an image to a square regardless of its aspect ratio. NExT-Chat pads it to a square with white first,
    LLaVA-1.5 with the mean color; BlipImageProcessor does not pad, so the caller must ("white_square_first",
    "mean_square_first").
    """
    settings = {
        "image_processor_type": "BlipImageProcessor",
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
    }
    settings |= image_fit_config(processor)
    return settings | ({f"{processor.pad_color}_square_first": True} if processor.pad_to_square else {})


def tokenizer_config(file: Path) -> dict:
    """tokenizer_config.json for a tokenizer.json, with those special tokens that it contains."""
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
    """The `tokenizers.Tokenizer` of a tokenizer.json. Raises UserError where the file is not valid."""
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(f"{file} is no valid tokenizer.json: {str(error).splitlines()[0]}") from error


def render_model_card(format_name: str, config: Any, hf_config: Mapping, specs: Mapping[str, TensorSpec]) -> str:
    """README.md of an exported folder, with the YAML metadata of the Hugging Face Hub."""
    architecture = (hf_config.get("architectures") or [""])[0]
    is_transformers = architecture and hf_config.get("model_type") not in ("lion", "nextchat", "lavis", "ram", "eva")
    head = ["---", f"library_name: {'transformers' if is_transformers else 'lionjax'}"]
    head += [f"tags: [lionjax, {format_name}]", f"pipeline_tag: {_pipeline_tag(format_name)}", "---"]
    model_config = config.model if type(config).__name__ == "Experiment" else config
    title = getattr(config, "name", None) or format_name
    dtypes = sorted({str(spec.dtype) for spec in specs.values()})
    num_parameters = sum(int(np.prod(spec.shape)) for spec in specs.values())
    lines = [
        *head,
        "",
        f"# {title}",
        "",
        f"A {type(model_config).__name__.removesuffix('Config')} ({format_name}): {num_parameters:,} parameters "
        f"({', '.join(dtypes)}) in {len(specs)} tensors, with the original PyTorch names, written by lionjax.",
        "",
        "| part | parameters |",
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
        lines += ["In PyTorch, with the original code:", "", "```python"]
        lines += ["from safetensors.torch import load_file", 'model.load_state_dict(load_file("model.safetensors"))']
        lines += ["```", ""]
    if any(map(is_lora_key, specs)):
        lines += ["The LoRA is separate; load it with PEFT:", "", "```python", "from peft import PeftModel"]
        lines += [f'model = PeftModel.from_pretrained(model, "this folder/{ADAPTER}")', "```", ""]
    lines += ["In JAX, bit for bit:", "", "```", "lionjax convert THIS_FOLDER NEW_FOLDER --to jax"]
    lines += ["```", "", *_training_section(config), "## License", ""]
    lines += ["The license of the original weights and of the training data applies; lionjax adds none.", ""]
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
    """{first component of the tensor names: number of parameters}."""
    counts: dict[str, int] = {}
    for name, spec in specs.items():
        part = f"{ADAPTER} (LoRA)" if is_lora_key(name) else name.partition(".")[0]
        counts[part] = counts.get(part, 0) + int(np.prod(spec.shape))
    return counts


def _training_section(config: Any) -> list[str]:
    """Table of training stages where `config` is an experiment, else []."""
    stages = getattr(config, "stages", ())
    if not stages:
        return []
    lines = ["## Training", "", "| stage | steps | batch | learning rate | trained |", "|---|---|---|---|---|"]
    for stage in stages:
        trained = ", ".join(f"`{pattern}`" for pattern in stage.trainable)
        lines.append(f"| {stage.name} | {stage.steps} | {stage.batch_size} | {stage.learning_rate:g} | {trained} |")
    sources = [type(source).__name__ for source in config.data.sources]
    return [*lines, "", f"Data: {', '.join(sources)}. Seed {config.seed}.", ""]
