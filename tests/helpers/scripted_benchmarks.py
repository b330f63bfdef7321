# SPDX-License-Identifier: Apache-2.0
"""A scripted model that is asked published benchmarks, and the files of `tests/data/benchmarks` with pictures."""

import dataclasses
import shutil
import types

import numpy as np
from paths import ROOT

from lionjax.data.datasets import detect
from lionjax.evaluation.protocols import get_protocol
from lionjax.evaluation.published import model_answers, scoring

FILES = ROOT / "tests" / "data" / "benchmarks"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The fields of a GenerationConfig that a protocol sets."""

    max_new_tokens: int = 99
    min_length: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    do_sample: bool = True
    decoder_start_token_id: int | None = 0


class Scripted:
    """Answers prompts by a function, and prefers candidates by another; keeps what it was asked."""

    def __init__(self, answer=lambda prompt: "red", loss=lambda prompt, text: float(len(text)), sources=()):
        self.reply, self.loss, self.prompts, self.calls, self.updates = answer, loss, [], [], 7
        self.experiment = types.SimpleNamespace(data=types.SimpleNamespace(sources=sources), stages=("one",))
        config = types.SimpleNamespace(image_mean=(0.5, 0.25, 0.0), sam_image_size=64, max_prompt_tokens=99)
        self.processor = types.SimpleNamespace(config=config)
        self.engine = types.SimpleNamespace(model="scripted", params={})  # what a journal is of

    def generation_config(self, category):
        return Settings()

    def answer(self, images, prompts, boxes=None, category=None, generation_config=None):
        self.prompts += prompts
        self.calls.append((category, generation_config, boxes, [image.size for image in images]))
        replies = [self.reply(prompt) for prompt in prompts]
        return [types.SimpleNamespace(text=r if isinstance(r, str) else "", masks=r, boxes=[]) for r in replies]

    def candidate_losses(self, images, prompts, candidates, mean=False):
        self.prompts += prompts
        self.calls.append((mean, candidates))
        return [np.array([self.loss(p, text) for text in some]) for p, some in zip(prompts, candidates)]


def ask(tmp_path, benchmark, file, model, protocol="", answers="", **options):
    """The result of a scripted model; every picture of the benchmark is one of the drawn ones."""
    source = detect.detect_source(str(FILES / file), str(tmp_path), str(FILES / answers) if answers else "")
    source = scoring.whole_source(benchmark, source, str(FILES / file))
    put_pictures(source, tmp_path)
    return model_answers.evaluate_model(model, benchmark, source, get_protocol(benchmark, protocol), **options)


def put_pictures(source, folder) -> None:
    """Copy drawn pictures to where the questions of a source have theirs."""
    for info in source.open("heldout", 10**7).image_infos:
        file = folder / info.name
        if info.name and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            drawn = FILES / "images" / file.name
            shutil.copy(drawn if drawn.exists() else FILES / "images/COCO_val2014_000000000001.jpg", file)
