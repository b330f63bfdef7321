# SPDX-License-Identifier: Apache-2.0
"""PromptCap's captioner (arXiv 2211.09699) at a tiny size: captions of synthetic scenes for a question.

A LLaVA as configs/tiny_llava.py with the question in its prompt; its captions state what the question asks about. It
starts best from the parameters of tiny_llava, as in `python -m benchmarks.frozen_lms`: a caption repeats the question,
and few of its words say what is in the image.
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, Mix
from lionjax.data.scenes.question_captions import QuestionCaptions

llava = runpy.run_path(str(Path(__file__).with_name("tiny_llava.py")))


def get_config() -> Experiment:
    """The experiment."""
    mixture = (Mix("caption", 3.0, source="question_captions"), Mix("vqa", 2.0, source="scenes"))
    stages = (llava["stage"]("captions", 300, ("projector", "language"), mixture, 7e-4),)
    experiment = llava["experiment"]("tiny_promptcap", llava["SYSTEM"], stages, max_prompt_tokens=48)
    scenes = experiment.data.sources[0]
    sources = (QuestionCaptions(scenes.sizes, scenes.image_size), scenes)
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, sources=sources))
