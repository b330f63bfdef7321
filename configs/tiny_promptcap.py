# SPDX-License-Identifier: Apache-2.0
"""PromptCap's captioner (arXiv 2211.09699) at a tiny size: captions of synthetic scenes for a question.

A LLaVA as configs/tiny_llava.py with the question in its prompt; its captions state what the question asks about.
"""

import dataclasses
import runpy
from pathlib import Path

from lionjax.core.experiment import Experiment, Mix
from lionjax.data.scenes.question_captions import QuestionCaptions

llava = runpy.run_path(str(Path(__file__).with_name("tiny_llava.py")))


def get_config() -> Experiment:
    """The experiment."""
    stages = (
        llava["stage"]("align", 100, ("projector",), (Mix("caption", source="question_captions"),), 3e-3),
        llava["stage"]("captions", 500, ("projector", "language"), (Mix("caption", source="question_captions"),), 7e-4),
    )
    experiment = llava["experiment"]("tiny_promptcap", llava["SYSTEM"], stages, max_prompt_tokens=48)
    scenes = experiment.data.sources[0]
    source = QuestionCaptions(scenes.sizes, scenes.image_size)
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, sources=(source,)))
