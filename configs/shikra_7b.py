# SPDX-License-Identifier: Apache-2.0
"""Shikra 7B: the parts of the first LLaVA, boxes written as digits (arXiv 2306.15195).

Trains projector and language model together from the first step on. Needs the public weights, converted once with
`lionjax convert`; Vicuna's with three added image tokens. Learning rate, batch size, steps, lengths and annotation
files are those of the released code. Mixture weights: in the first stage the files' sizes in units of 100,000 rows, as
the released code concatenates them; in the second, half instructions and half seven equal streams. Left out: points as
coordinates, and two of the three forms of VCR.
"""

import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix, Stage
from lionjax.data.datasets.conversations import Conversations
from lionjax.data.datasets.shikra import ShikraJsonl
from lionjax.models.vlm.visual_prefix import SHIKRA_7B

# Shikra's annotation files by name, with the folder of their images.
FILES = {
    "refcoco": ("REC_ref3_train", "coco/train2014"),
    "genome": ("GC_genome196_train", "genome/VG_100K"),
    "flickr": ("CWB_flickr30k_train", "flickr30k/images"),
    "captions": ("CAP_coco2014_train", "coco/train2014"),
    "vqav2": ("v2_OpenEnded_mscoco_train2014_questions", "coco"),
    "vqa_e": ("vqa_E_train", "coco"),
    "vqa_x": ("vqa_X_train", "coco"),
    "vcr": ("vcr_train", "vcr/vcr1images"),
    "point_local": ("pointQA_local_train", "genome/VG_100K"),
    "visual7w": ("v7w_pointing_train", "visual7w/images"),
    "shikra_rd": ("GPT4GEN_BoxCoT_train", "flickr30k/images"),
    "shikra_rd_more": ("GPT4GEN_RD_BoxCoT_train", "flickr30k/images"),
}
SHIKRA_FILES = tuple(
    ShikraJsonl(f"data/shikra/{file}.jsonl", f"data/{images}", name=name) for name, (file, images) in FILES.items()
)
LLAVA = Conversations("data/llava/llava_instruct_150k.json", "data/coco", name="llava")
LLAVA_CAPTIONS = (
    Conversations("data/llava/LLaVA-CC3M-Pretrain-595K/chat.json", "data/llava/LLaVA-CC3M-Pretrain-595K", name="cc3m"),
    Conversations("data/llava/blip_laion_cc_sbu_558k.json", "data/llava/LLaVA-Pretrain", name="lcs"),
)
PRETRAIN = (
    Mix("reg", 1.8, source="genome"),
    Mix("rec", 1.8, source="genome"),
    Mix("conversation", 6.0, source="cc3m"),
    Mix("conversation", 5.6, source="lcs"),
    Mix("vqa", 4.4, source="vqav2"),
    Mix("vqa", 1.8, source="vqa_e"),
    Mix("vqa", 0.3, source="vqa_x"),
    Mix("caption", 4.1, source="captions"),
    Mix("rec", 3.2, source="refcoco"),
    Mix("reg", 3.2, source="refcoco"),
    Mix("grounded", 1.5, source="flickr"),
    Mix("conversation", 2.1, source="vcr"),
    Mix("box_vqa", 0.3, source="point_local"),
    Mix("box_vqa", 0.9, source="visual7w"),
)
QUESTIONS = (  # of the second stage, NExT-Chat's too
    Mix("grounded", 1.0, source="flickr"),
    Mix("rec", 1.0, source="refcoco"),
    Mix("vqa", 0.65, source="vqav2"),
    Mix("vqa", 0.25, source="vqa_e"),
    Mix("vqa", 0.1, source="vqa_x"),
    Mix("conversation", 1.0, source="vcr"),
)
INSTRUCTIONS = (
    Mix("conversation", 6.7, source="llava"),
    Mix("conversation", 0.15, source="shikra_rd"),
    Mix("conversation", 0.15, source="shikra_rd_more"),
    *QUESTIONS,
    Mix("box_vqa", 1.0, source="point_local"),
    Mix("box_vqa", 1.0, source="visual7w"),
    Mix("reg", 0.2, source="refcoco"),
    Mix("caption", 0.2, source="captions"),
    Mix("conversation", 0.25, source="cc3m"),
    Mix("conversation", 0.2, source="lcs"),
    Mix("reg", 0.15, source="genome"),
)

llava = runpy.run_path(str(Path(__file__).with_name("llava15_7b.py")))


def stage(name: str, steps: int, mixture: tuple) -> Stage:
    """A stage at 2e-5 that trains projector and language model."""
    return llava["stage"](name, steps, 64, 2e-5, ("projector", "language"), mixture)


def get_config() -> Experiment:
    """The experiment."""
    lengths = llava["row_lengths"](SHIKRA_7B.vision.num_patches)
    processor = llava["chat_processor"]("vicuna_7b_shikra", "shikra", pad_to_square=True, **lengths)
    return llava["experiment"](
        "shikra_7b",
        llava["full_size"](SHIKRA_7B),
        processor,
        (stage("places", 100_000, PRETRAIN), stage("instruct", 20_000, INSTRUCTIONS)),
        {"vision": "clip_vit_l_224", "language": "vicuna_7b_shikra"},
        (*SHIKRA_FILES, LLAVA, *LLAVA_CAPTIONS),
        generation=GenerationDefaults(max_new_tokens=256),
    )
