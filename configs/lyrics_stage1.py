# SPDX-License-Identifier: Apache-2.0
"""Stage 1 of Lyrics: MQ-Former trained with ITC, ITM, ICG and MSP beside a frozen EVA ViT-g (arXiv 2312.05278).

Needs BLIP-2's first stage, converted once with `lionjax convert`, from which all but the grounding branch starts, and
captions whose images a refiner has seen: `lionjax data build FILE --images DIR --refiner DIR --regions 900 --out DIR`.
Learning rate, betas, weight decay and warm-up are the defaults of the released code's framework; the values of the
paper, its batch size and its 100-million-scale corpus are not published: batch, steps and files are our choice.
"""

import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, Mix, Stage
from lionjax.data.datasets.array_record import ArrayRecordDataset
from lionjax.data.processor import ProcessorConfig
from lionjax.models.vlm.lyrics_stage1 import LyricsStage1

STEPS, REGIONS = 60_000, 900  # all queries of the detector
CAPTIONS = tuple(ArrayRecordDataset(f"data/lyrics/{name}", name) for name in ("coco_captions", "vg_captions"))
MIXTURE = tuple(Mix("caption", 1.0, source=source.name, template="plain") for source in CAPTIONS)
RELEASED_OPTIMIZER = {"learning_rate": 5e-5, "weight_decay": 0.1, "betas": (0.9, 0.999), "end_learning_rate": 1e-7}

llava = runpy.run_path(str(Path(__file__).with_name("llava15_7b.py")))


def stage(name: str, steps: int, trainable: tuple[str, ...], mixture, batch_size: int, **fields) -> Stage:
    """A stage with the released code's optimizer and a tenth of warm-up."""
    schedule = {"warmup_steps": steps // 10, "warmup_learning_rate": 0.0}
    return Stage(name, steps, trainable, mixture, batch_size, **RELEASED_OPTIMIZER | schedule | fields)


def get_config() -> Experiment:
    """The experiment."""
    bert = "weights/bert_base_uncased"
    lengths = {"max_prompt_tokens": 32, "max_question_tokens": 32, "max_target_tokens": 88, "max_regions": REGIONS}
    processor = ProcessorConfig(tokenizer=bert, question_tokenizer=bert, use_tags=False, **lengths)
    stages = (stage("represent", STEPS, ("(?!vision/|vision_norm/).*",), MIXTURE, 512),)
    model = llava["full_size"](LyricsStage1())
    return llava["experiment"]("lyrics_stage1", model, processor, stages, {"": "blip2_first"}, CAPTIONS)
