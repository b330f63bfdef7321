# SPDX-License-Identifier: Apache-2.0
"""MiniGPT-4 7B: BLIP-2's ViT and Q-Former, a linear projector, Vicuna-7B; trains the projector (arXiv 2304.10592).

Captions, then 3,500 long descriptions. Needs the public weights, converted once with `lionjax convert`; ViT, Q-Former
and norm are those of BLIP-2. Learning rates, batch sizes, steps, lengths and the ratio of the captions (115 million of
LAION to 14 million of CC3M, CC12M and SBU) are those of the released code. Its captions are BLIP's, published as
addresses: read as LAVIS's lists of image and caption.
"""

import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, RunConfig, Stage
from lionjax.data.datasets.karpathy import KarpathyCaptions
from lionjax.models.vlm.visual_prefix import MINIGPT4_7B

SOURCES = (
    KarpathyCaptions("data/laion/laion_synthetic_filtered.json", "data/laion/images", name="laion"),
    KarpathyCaptions("data/cc_sbu/ccs_synthetic_filtered.json", "data/cc_sbu/images", name="cc_sbu"),
    KarpathyCaptions("data/cc_sbu_align/filter_cap.json", "data/cc_sbu_align/image", name="descriptions"),
)
PLAIN_CAPTIONS = (
    Mix("caption", 115.0, source="laion", template="plain"),
    Mix("caption", 14.0, source="cc_sbu", template="plain"),
)
DESCRIPTIONS = (Mix("caption", 1.0, source="descriptions"),)
BLIP2 = "blip2_flant5xxl"

llava = runpy.run_path(str(Path(__file__).with_name("llava15_7b.py")))


def get_config() -> Experiment:
    """The experiment."""
    processor = llava["chat_processor"]("vicuna_7b", "minigpt4", max_target_tokens=160)
    shared = {"warmup_learning_rate": 1e-6, "weight_decay": 0.05}
    align = {"learning_rate": 1e-4, "end_learning_rate": 8e-5, "warmup_steps": 5000}
    describe = {"learning_rate": 3e-5, "end_learning_rate": 1e-5, "warmup_steps": 200}
    return llava["experiment"](
        "minigpt4_7b",
        llava["full_size"](MINIGPT4_7B),
        processor,
        (
            Stage("align", 20_000, ("projector",), PLAIN_CAPTIONS, 256, **align, **shared),
            Stage("describe", 1000, ("projector",), DESCRIPTIONS, 12, **describe, **shared),
        ),
        {"vision": BLIP2, "vision_norm": BLIP2, "qformer": BLIP2, "language": "vicuna_7b"},
        SOURCES,
        run=RunConfig(log_every=20, save_every=1000, frozen_dtype="bfloat16", cache_features=True),
        generation=GenerationDefaults(repetition_penalty=1.05, max_new_tokens=300),
    )
