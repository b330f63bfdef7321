# SPDX-License-Identifier: Apache-2.0
"""Model card (README.md) of an exported Hugging Face folder: what it is, and calls that open it in PyTorch and JAX."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from lionjax.convert.companions import VOCABULARY_FILES
from lionjax.convert.formats.checkpoint_format import OWN_PREFIX
from lionjax.convert.formats.peft import ADAPTER_FOLDER as ADAPTER
from lionjax.convert.formats.peft import is_lora_key
from lionjax.convert.mapping.plan import ConversionPlan, TensorSpec
from lionjax.models import parts

# Values of model_type in exported folders that transformers has a class for.
TRANSFORMERS_TYPES = frozenset(
    ("llava", "blip-2", "instructblip", "kosmos-2", "t5", "llama", "opt", "gpt2", "bert", "clip_vision_model", "swin")
) | {"sam", "grounding-dino", "clip", "siglip"}
BLIP_TYPES = ("blip-2", "instructblip")
NO_IMAGE_TOKEN = (
    "This model was trained without an image token, by which the processor and `generate` of transformers place the "
    "image. To use them, add a token `<image>` to the tokenizer and the embedding, and set `image_token_index` in "
    "config.json to its id; lionjax needs none."
)
LAVIS = "https://github.com/salesforce/LAVIS"
ORIGINAL_CODE = {  # by model_type: the repository whose modules have these tensor names
    "llava_llama": "https://github.com/haotian-liu/LLaVA",
    "mplug-owl": "https://github.com/X-PLUG/mPLUG-Owl",
    "nextchat": "https://github.com/NExT-ChatV/NExT-Chat",
    "lisa": "https://github.com/dvlab-research/LISA",
    OWN_PREFIX + "lion": "https://github.com/JiuTian-VL/JiuTian-LION",
    OWN_PREFIX + "flamingo": "https://github.com/mlfoundations/open_flamingo",
    OWN_PREFIX + "ram": "https://github.com/xinyu1205/recognize-anything",
    OWN_PREFIX + "groundingdino": "https://github.com/IDEA-Research/GroundingDINO",
    OWN_PREFIX + "blip2": LAVIS,
    OWN_PREFIX + "instructblip": LAVIS,
    OWN_PREFIX + "blip2_first": LAVIS,
    OWN_PREFIX + "eva": LAVIS,
}
PIPELINE_TAGS = {  # by format; image-text-to-text for all others
    "text-generation": ("llama", "opt", "gpt2"),
    "text2text-generation": ("t5",),
    "feature-extraction": ("bert",),
    "image-feature-extraction": ("clip", "eva", "swin"),
    "zero-shot-image-classification": ("clip_model", "openai_clip_model", "siglip"),
    "mask-generation": ("sam", "segment_anything"),
    "image-classification": ("ram",),
    "zero-shot-object-detection": ("grounding-dino", "groundingdino"),
}
PADDING_NOTES = {
    "white_square_first": "Pad images with white to a square before the image processor, which does not.",
    "mean_square_first": "Pad images with the mean color to a square before the image processor, which does not.",
}


def render_model_card(
    format_name: str,
    config: Any,
    hf_config: Mapping,
    plan: ConversionPlan,
    files: Collection[str],
    image_settings: Mapping,
) -> str:
    """README.md of an exported folder, with the YAML metadata of the Hugging Face Hub.

    `files`: names of the companion files in the folder. `image_settings`: its preprocessor_config.json.
    """
    specs, is_transformers = plan.output_specs, hf_config.get("model_type") in TRANSFORMERS_TYPES
    tied = {name for mapped in plan.mapped_tensors for name in mapped.tied_keys}
    head = ["---", f"library_name: {'transformers' if is_transformers else 'lionjax'}"]
    head += [f"tags: [lionjax, {format_name}]", f"pipeline_tag: {_pipeline_tag(format_name)}", "---"]
    model_config = config.model if type(config).__name__ == "Experiment" else config
    title = getattr(config, "name", None) or format_name
    dtypes = sorted({str(spec.dtype) for spec in specs.values()})
    counts = _parameter_counts({name: spec for name, spec in specs.items() if name not in tied})
    copies = f" (copies of tied tensors: {len(tied)}, counted once)" if tied else ""
    lines = [
        *head,
        "",
        f"# {title}",
        "",
        f"A {type(model_config).__name__.removesuffix('Config')} ({format_name}): {sum(counts.values()):,} parameters "
        f"({', '.join(dtypes)}) in {len(specs)} tensors{copies}, with the original PyTorch names, written by lionjax.",
        "",
        "| part | parameters |",
        "|---|---|",
        *(f"| `{part}` | {count:,} |" for part, count in counts.items()),
        "",
        "## Use",
        "",
        *(
            _transformers_section(hf_config, files, image_settings)
            if is_transformers
            else _original_section(hf_config, specs)
        ),
    ]
    lines += [line for key, note in PADDING_NOTES.items() if image_settings.get(key) for line in (note, "")]
    if any(map(is_lora_key, specs)):
        lines += ["The LoRA is separate; load it with PEFT:", "", "```python", "from peft import PeftModel", ""]
        lines += [f'model = PeftModel.from_pretrained(model, "this folder/{ADAPTER}")', "```", ""]
    if parts.can_generate(parts.as_answering(model_config)) and any(name in files for name in VOCABULARY_FILES):
        lines += [
            "In JAX:",
            "",
            "```python",
            "import lionjax",
            "",
            'jax_model = lionjax.load("this folder")',
            "```",
            "",
        ]
    lines += ["Into lionjax's parameters, bit for bit:", "", "```", "lionjax convert THIS_FOLDER NEW_FOLDER --to jax"]
    lines += ["```", "", *_training_section(config), "## License", ""]
    lines += ["The license of the original weights and of the training data applies; lionjax adds none.", ""]
    return "\n".join(lines)


def _transformers_section(hf_config: Mapping, files: Collection[str], image_settings: Mapping) -> list[str]:
    """How transformers opens the model, and its processor or tokenizer where the folder has one."""
    architecture = hf_config["architectures"][0]
    has_tokenizer = any(name in files for name in VOCABULARY_FILES)
    lacks_image_token = hf_config["model_type"] in BLIP_TYPES and hf_config.get("image_token_index") is None
    by_type = hf_config["model_type"] != "kosmos-2" or "processor_class" in image_settings  # else the tokenizer alone
    has_parts = has_tokenizer and "preprocessor_config.json" in files and by_type
    has_processor = "processor_config.json" in files or has_parts
    if has_processor and not lacks_image_token:
        opener = ("processor", "AutoProcessor")
    elif has_tokenizer:
        opener = ("tokenizer", "AutoTokenizer")
    elif "preprocessor_config.json" in files:
        opener = ("image_processor", "AutoImageProcessor")
    else:
        opener = ()
    names = sorted((architecture, *opener[1:]))
    lines = ["In PyTorch:", "", "```python", f"from transformers import {', '.join(names)}", ""]
    lines += [f'model = {architecture}.from_pretrained("this folder")']
    lines += [f'{opener[0]} = {opener[1]}.from_pretrained("this folder")'] if opener else []
    return [*lines, "```", "", *([NO_IMAGE_TOKEN, ""] if lacks_image_token else [])]


def _original_section(hf_config: Mapping, specs: Mapping[str, TensorSpec]) -> list[str]:
    """How the original code takes the weights, or that no PyTorch code has this model."""
    repository = ORIGINAL_CODE.get(hf_config.get("model_type"))
    if repository is None:
        return [
            "There is no PyTorch code for this model: the original code and transformers build it with another vision "
            "tower or language model. The tensors have the names of the original modules.",
            "",
        ]
    return [
        f"transformers has no class for this model. Its tensors have the names of the original code, {repository}: "
        "build the model there with the sizes in `lionjax.json`, then give these tensors to its `load_state_dict`.",
        "",
        "```python",
        "from pathlib import Path",
        "",
        "from safetensors.torch import load_file",
        "",
        'files = sorted(Path("this folder").glob("model*.safetensors"))',
        "state_dict = {name: tensor for file in files for name, tensor in load_file(file).items()}",
        "```",
        "",
    ]


def _pipeline_tag(format_name: str) -> str:
    return next((task for task, names in PIPELINE_TAGS.items() if format_name in names), "image-text-to-text")


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
