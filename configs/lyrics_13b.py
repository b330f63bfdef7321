# SPDX-License-Identifier: Apache-2.0
"""Stage 2 of Lyrics: MQ-Former's 96 queries in front of Vicuna-13B (arXiv 2312.05278, the released code's sizes).

Captions warm up MQ-Former and projector while MQ-Former reads no text; then it reads the instruction too, in one of the
released code's variants: "full" trains MQ-Former and projector, "freeze_qformer" the projector, "lora" only LoRA
matrices of the language model. Needs the first stage (lyrics_stage1.py) and Vicuna with `[PAD]`, and data that a
refiner has seen, as there. Steps, batch and files are our choice: the paper's are not published. Lengths are the longer
ones that stand in the released code; it ran 24 tokens of instruction and 40 of answer.
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, GenerationDefaults, Mix
from lionjax.core.prompt_formats import SYSTEM_FORMATS
from lionjax.data.datasets.array_record import ArrayRecordDataset
from lionjax.data.processor import ProcessorConfig
from lionjax.models.vlm.visual_prefix import LYRICS_CODE
from lionjax.nn.lora import LoraConfig

first = runpy.run_path(str(Path(__file__).with_name("lyrics_stage1.py")))

BETWEEN = ("qformer", "projector")
VARIANTS = {"full": BETWEEN, "freeze_qformer": ("projector",), "lora": ("language/.*/lora_[ab]",)}
LORA = LoraConfig(rank=8, alpha=32.0, dropout=0.05, target_modules=("q", "k", "v"))
INSTRUCTION_SOURCES = tuple(ArrayRecordDataset(f"data/lyrics/{name}", name) for name in ("vqav2", "llava_instruct"))
INSTRUCTIONS = (
    *(Mix("caption", 1.0, source=source.name) for source in first["CAPTIONS"]),
    Mix("vqa", 2.0, source="vqav2"),
    Mix("conversation", 2.0, source="llava_instruct"),
)
STEPS = (20_000, 20_000)


def get_config(variant: str = "full") -> Experiment:
    """The experiment; `variant` is one of VARIANTS."""
    model = first["llava"]["full_size"](LYRICS_CODE)
    if variant == "lora":
        model = dataclasses.replace(model, language=dataclasses.replace(model.language, lora=LORA))
    bert, vicuna = "weights/bert_base_uncased", "weights/vicuna_13b_v1_1"
    lengths = {"max_prompt_tokens": 128, "max_question_tokens": 128, "max_target_tokens": 256}
    text = {**SYSTEM_FORMATS["lyrics"].processor, **lengths, "max_regions": first["REGIONS"]}
    processor = ProcessorConfig(tokenizer=vicuna, question_tokenizer=bert, **text)
    warm_up = {"model_overrides": (("read_instruction", False),)}
    stages = (
        first["stage"]("captions", STEPS[0], BETWEEN, first["MIXTURE"], 256, **warm_up),
        first["stage"]("instruct", STEPS[1], VARIANTS[variant], INSTRUCTIONS, 256),
    )
    weights = {part: "lyrics_stage1" for part in ("vision", "vision_norm", "qformer")}
    return first["llava"]["experiment"](
        "lyrics_13b",
        model,
        processor,
        stages,
        weights | {"language": "vicuna_13b_v1_1"},
        (*first["CAPTIONS"], *INSTRUCTION_SOURCES),
        generation=GenerationDefaults(max_new_tokens=256),
    )
