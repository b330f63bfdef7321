# SPDX-License-Identifier: Apache-2.0
"""The two walks of docs/architecture.md, image to loss and image to answer, are what the code calls, in that order."""

import re
import sys

import jax
import leafwise
import numpy as np
import pytest
from chat_prompts import lengths
from paths import TESTS

from lionjax.core.experiment import Experiment
from lionjax.data.config import DataConfig
from lionjax.data.processor import ImageTextInput, Processor, ProcessorConfig
from lionjax.inference.loading import from_params
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.vision.vit import ViTConfig
from lionjax.models.vlm.visual_prefix import VisualPrefixLM

ROOT = TESTS
ROOT = next(path for path in ROOT.parents if (path / "pyproject.toml").is_file())
PAGE = ROOT / "docs" / "architecture.md"
STEP = re.compile(r"^\| *\d+ *\| *`([\w.]+)` *\| *`([\w/.]+)` *\|", re.MULTILINE)
LLAVA = VisualPrefixLM(
    ViTConfig(14, 7, 16, 1, 2, 24),
    DecoderConfig(1024, 32, 1, 2, 2, 16, 48, eos_token_id=1),
    image_token_id=21,
    torch_names="original",
    feature_layer=-1,
)
PROMPTS = ProcessorConfig(image_size=14, **lengths(16, 12, 3), use_tags=False, prompt_template="{image} {question}")
IMAGE = np.full((14, 14, 3), 10, np.uint8)


def steps(walk: str) -> list[tuple[str, str]]:
    """(qualified name, file) of each step that the page lists under a heading."""
    text = PAGE.read_text().split(f"### {walk}")[1].split("\n#")[0]
    return STEP.findall(text)


def traced(call) -> tuple[list[tuple[str, str]], dict[tuple[str, str], set]]:
    """(functions of the package in order of first call, {function: functions that called it directly}).

    Frames of other packages, lambdas, comprehensions and decorators of this package are passed over.
    """
    package, order, callers = str(ROOT / "lionjax") + "/", [], {}

    def name_of(frame):
        code = frame.f_code
        if not code.co_filename.startswith(package):
            return None
        name = code.co_qualname.split(".<locals>")[0]
        hidden = name.endswith("<module>") or "/core/renamed.py" in code.co_filename
        return None if hidden else (name, code.co_filename.removeprefix(str(ROOT) + "/"))

    def profile(frame, event, _):
        if event != "call" or not (name := name_of(frame)):
            return
        if name not in callers:
            order.append(name)
        caller = frame.f_back
        while caller is not None and name_of(caller) in (None, name):
            caller = caller.f_back
        callers.setdefault(name, set()).add(caller and name_of(caller))

    jax.clear_caches()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return order, callers


def assert_walk(walk: str, call, most: int) -> None:
    wanted = steps(walk)
    order, callers = traced(call)
    assert 0 < len(wanted) <= most, f"{walk} has {len(wanted)} steps"
    assert [step for step in wanted if step not in callers] == []
    assert [step for step in order if step in wanted] == wanted, "the page lists the steps in another order"
    for number, step in enumerate(wanted[1:], 1):
        assert callers[step] & set(wanted[:number]), f"{step} is called by {callers[step]}, not by a step before it"


@pytest.fixture(scope="module")
def model():
    experiment = Experiment("llava", LLAVA, DataConfig(processor=PROMPTS), stages=())
    batch = Processor(experiment.data.processor).batch([ImageTextInput(IMAGE, "What is it?")], ["red"])
    params = leafwise.init_leafwise(LLAVA.init, jax.random.key(0), batch)
    return from_params(experiment, params), batch


def test_image_to_loss_is_the_walk_of_the_architecture_page(model):
    model, batch = model
    assert_walk("Image to loss", lambda: LLAVA.loss(model.params, batch), most=10)


def test_image_to_answer_is_the_walk_of_the_architecture_page(model):
    model, _ = model
    assert_walk("Image to answer", lambda: model.answer([IMAGE], ["What is it?"]), most=15)


def test_image_to_answer_passes_four_data_shapes():
    text = PAGE.read_text().split("### Image to answer")[1].split("\n#")[0]
    shapes = re.search(r"^Data shapes: (.*)\.$", text, re.MULTILINE)[1]
    assert len(re.findall(r"`\w+`", shapes)) <= 4
