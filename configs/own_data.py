# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a model on your own data: LoRA on the language model of a converted folder.

lionjax convert llava-1.5-7b-hf weights/llava --to jax
lionjax data inspect talks.json --images photos
lionjax train own_data --data talks.json --images photos --base weights/llava --workdir runs/mine

The data may be of any format that `lionjax data inspect` reads. Prompt template, image settings and tokenizers are
those of the base. The docstring of `get_config` has the arguments; any field of the result can be set as usual.
"""

import dataclasses

from lionjax.core.experiment import Experiment, Mix, RunConfig, Stage, Weights
from lionjax.core.hub import local_path
from lionjax.core.types import UserError
from lionjax.data.config import DataConfig
from lionjax.data.datasets.detect import detect_source
from lionjax.data.datasets.source import open_split
from lionjax.inference.loading import read_experiment
from lionjax.nn.lora import LoraConfig

WEIGHTS = "params.safetensors"


def get_config(
    data: str,
    base: str,
    images: str = "",
    answers: str = "",
    heldout: float = 0.1,
    epochs: float = 1.0,
    batch_size: int = 16,
    learning_rate: float = 2e-4,
    lora_rank: int = 16,
    train: str = "",
) -> Experiment:
    """Give --data FILE (--images DIR for an annotation file) and --base DIR, a folder of `lionjax convert --to jax`.

    `answers`: the answers of a VQA questions file. `heldout`: the share of images that are not trained on. `train`: a
    pattern of further parameters to train beside LoRA, such as "projector".
    """
    weights = local_path(base) / WEIGHTS
    if not weights.is_file():
        raise UserError(f"{base} has no {WEIGHTS}; convert the weights first: lionjax convert {base} DIR --to jax")
    released = read_experiment(weights.parent)
    source = detect_source(data, images, answers)
    if any(field.name == "heldout_fraction" for field in dataclasses.fields(source)):
        source = dataclasses.replace(source, heldout_fraction=heldout)
    sizes = open_split(source, "train", released.data.processor.max_pixels).task_sizes
    try:
        language = dataclasses.replace(released.model.language, lora=LoraConfig(lora_rank, 2.0 * lora_rank))
        model = dataclasses.replace(released.model, language=language)
    except (AttributeError, TypeError) as error:
        raise UserError(f"{base} has no language model for LoRA; write a config of your own (docs/train.md)") from error
    steps = max(1, round(epochs * sum(sizes.values()) / batch_size))
    stage = Stage(
        "tune",
        steps,
        (".*/lora_[ab]", *filter(None, [train])),
        tuple(Mix(task, float(size)) for task, size in sizes.items()),
        batch_size,
        learning_rate=learning_rate,
        warmup_steps=max(1, round(0.03 * steps)),
    )
    return Experiment(
        name="own_data",
        model=model,
        data=DataConfig(sources=(source,), processor=released.data.processor),
        stages=(stage,),
        run=RunConfig(log_every=1, save_every=max(1, steps // 5)),
        weights=(Weights("", str(weights)),),
        generation=released.generation,
    )
