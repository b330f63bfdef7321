# SPDX-License-Identifier: Apache-2.0
"""BLIP-2 with OPT-2.7B: EVA ViT-g and OPT frozen, a Q-Former of 32 queries between them (arXiv 2301.12597).

The second of its two stages: captions, with the Q-Former and the projector trained. Needs the public weights, converted
once with `lionjax convert`, with the Q-Former of the first stage. Learning rates, batch size and steps are the paper's.
Captions of at most 32 tokens without a question, of COCO and Visual Genome, are LAVIS's; the paper adds 116 million of
the web (CC3M, CC12M, SBU, LAION), which are published as addresses.
"""

import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, Stage
from lionjax.core.prompt_formats import SYSTEM_FORMATS
from lionjax.data.datasets.karpathy import KarpathyCaptions
from lionjax.data.processor import ProcessorConfig
from lionjax.models.vlm.visual_prefix import BLIP2_OPT_2_7B, VisualPrefixLM

BETWEEN = ("qformer", "vision_norm", "projector")
CAPTIONS = Stage(
    "captions",
    80_000,
    BETWEEN,
    (Mix("caption", 1.0, template="plain"),),
    1920,
    learning_rate=1e-4,
    warmup_steps=2000,
    warmup_learning_rate=1e-6,
    end_learning_rate=5e-5,
    weight_decay=0.05,
    betas=(0.9, 0.98),
)

CAPTION = GenerationDefaults(num_beams=5, max_new_tokens=30)
CAPTION_LENGTHS = {"max_prompt_tokens": 32, "max_target_tokens": 32}
COCO_CAPTIONS = KarpathyCaptions("data/coco/annotations/coco_karpathy_train.json", "data/coco", name="coco_captions")
SOURCES = (
    COCO_CAPTIONS,
    KarpathyCaptions("data/genome/annotations/vg_caption.json", "data/genome", name="vg_captions"),
)

llava = runpy.run_path(str(Path(__file__).with_name("llava15_7b.py")))


def get_config(
    system: VisualPrefixLM = BLIP2_OPT_2_7B,
    name: str = "blip2_opt27b",
    language: str = "opt_2_7b",
    stages: tuple[Stage, ...] = (CAPTIONS,),
    answer: GenerationDefaults = CAPTION,
    sources: tuple = SOURCES,
    lengths: dict[str, int] = CAPTION_LENGTHS,
) -> Experiment:
    """The experiment; the arguments select another language model or InstructBLIP's schedule, files and lengths."""
    if system.qformer.use_text_input:
        text = {"question_tokenizer": "weights/bert_base_uncased"}
    else:
        text = {"max_question_tokens": 1}
    prompt = SYSTEM_FORMATS[system.info.prompt_format].processor
    processor = ProcessorConfig(tokenizer=f"weights/{language}", **prompt, **text, **lengths)
    weights = {"vision": "eva_vit_g", "language": language}
    return llava["experiment"](name, llava["full_size"](system), processor, stages, weights, sources, generation=answer)
