# SPDX-License-Identifier: Apache-2.0
"""CLIP ViT-B/32, trained from scratch on pairs of image and caption (arXiv 2103.00020).

All parameters train. Batch size, learning rate, betas, weight decay, warm-up, the limit of the logit scale and the
number of pairs (32 times 400 million) are the paper's; its epsilon, 1e-6, is 1e-8 here, and its random square crops
are center crops. The paper's pairs are not published: any are read that `lionjax data build captions.json --images DIR
--out data/web_pairs` wrote, from a list of image and caption. The tokenizer is that of Hugging Face's CLIP, copied to
weights/clip_vit_b32.

The loss compares all images of a batch with all of its texts, so that gradient accumulation would change it: a batch
that does not fit needs more chips (see docs/plans.md).
"""

import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, Mix, Stage
from lionjax.data.datasets.array_record import ArrayRecordDataset
from lionjax.data.image_fit import ImageFit
from lionjax.models.vlm.clip import CLIP_B32, Clip

PAIRS = (ArrayRecordDataset("data/web_pairs", "web_pairs"),)
MIXTURE = (Mix("caption", 1.0, template="plain"),)
BATCH_SIZE = 32_768
SCHEDULE = {"learning_rate": 5e-4, "warmup_steps": 2000, "warmup_learning_rate": 0.0}
MAX_LOGIT_SCALE = {"softmax": 100.0}  # by objective; SigLIP has no limit
OPTIMIZER = {"weight_decay": 0.2, "betas": (0.9, 0.98)}

llava = runpy.run_path(str(Path(__file__).with_name("llava15_7b.py")))


def get_config(
    model: Clip = CLIP_B32,
    name: str = "clip_vit_b32",
    num_pairs: float = 32 * 400e6,
    image_settings: dict | None = None,
    **stage_fields,
) -> Experiment:
    """The experiment; the arguments select another size, its images and its optimizer."""
    model = llava["full_size"](model, max_logit_scale=MAX_LOGIT_SCALE.get(model.objective))
    length = model.text.max_positions - (model.text.bos_token_id is not None)
    images = {"image_fit": ImageFit("shortest_edge")} if image_settings is None else image_settings
    processor = llava["chat_processor"](
        name, "{question}", image_size=model.vision.image_size, max_prompt_tokens=32, max_target_tokens=length, **images
    )
    stage = Stage(
        "contrast", round(num_pairs / BATCH_SIZE), (".*",), MIXTURE, BATCH_SIZE, **SCHEDULE | OPTIMIZER | stage_fields
    )
    return llava["experiment"](name, model, processor, (stage,), {}, PAIRS)
