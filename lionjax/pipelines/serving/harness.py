# SPDX-License-Identifier: Apache-2.0
"""A model behind an evaluation harness (lmms-eval, VLMEvalKit): requests with their own images and settings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import lionjax
from lionjax.core.types import UserError
from lionjax.data.images import to_pil_image
from lionjax.inference.engine import prompt_category

SEVERAL_IMAGES = ("join", "refuse")
JOIN_GAP = 8  # pixels between images that are joined
Turns = Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Request:
    """One question of a harness: a text, any number of images, and the settings of its generation.

    `settings` are those of the harness (`max_new_tokens`, `temperature`, `until`, ...); unknown ones change nothing.
    `history`: (question, answer) pairs before it.
    """

    text: str
    images: Sequence[Any] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    history: Turns = ()


class HarnessModel:
    """A loaded model that answers the requests of a harness in their order.

    `batch_size` may be a text, as harnesses give it. `tagger`, `refiner`: folders, as of `lionjax generate`. `plain`:
    answers of one word lose their final dot. `several_images`: "join" puts the images of a request side by side,
    "refuse" is a UserError. Raises UserError for values that are not among these.
    """

    def __init__(
        self,
        folder: str | Path,
        batch_size: int | str = 1,
        tagger: str | None = None,
        refiner: str | None = None,
        plain: bool = False,
        several_images: str = "join",
        prompt_length: int | None = None,
    ):
        if several_images not in SEVERAL_IMAGES:
            raise UserError(f"several_images is {several_images!r}; choose one of {', '.join(SEVERAL_IMAGES)}")
        self.batch_size, self.plain, self.several_images = parse_batch_size(batch_size), plain, several_images
        self.model = lionjax.load(folder, prompt_length=prompt_length, refiner=refiner)
        self.tagger = None
        if tagger is not None:
            from lionjax.inference import tagger as taggers

            self.tagger = taggers.load(tagger)

    def answer(self, requests: Sequence[Request]) -> list[str]:
        """The texts of the answers, in the order of the requests; those of one batch share their settings.

        Raises UserError for several images where they are refused, and for images to a model that reads none.
        """
        groups: dict[Any, list[int]] = {}
        for index, request in enumerate(requests):
            config = with_settings(self.model.generation_config(prompt_category(request.text)), request.settings)
            groups.setdefault(config, []).append(index)
        texts = [""] * len(requests)
        for config, indices in groups.items():
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                for index, text in zip(batch, self._answer_batch([requests[k] for k in batch], config)):
                    text = cut_at(text, requests[index].settings.get("until"))
                    texts[index] = re.sub(r"^(\S+)\.$", r"\1", text) if self.plain else text
        return texts

    def _answer_batch(self, requests: Sequence[Request], config: Any) -> list[str]:
        prompts = [request.text for request in requests]
        if not self.model.vlm.info.reads_images:
            if any(request.images for request in requests):
                raise UserError("this model reads no images; give it questions in text only")
            return [answer.text.strip() for answer in self.model.complete(prompts, config)]
        images = [self.joined(request.images) for request in requests]
        options: dict[str, Any] = {}
        if self.tagger is not None:
            options["tags"] = [result.tags for result in self.tagger.tag(images)]
        if any(request.history for request in requests):
            options["history"] = [list(request.history) for request in requests]
        return [answer.text for answer in self.model.answer(images, prompts, generation_config=config, **options)]

    def losses(self, requests: Sequence[Request], continuations: Sequence[str]) -> list[float]:
        """The mean token loss, in nats, of a continuation of each request: the lower, the likelier."""
        found: list[float] = []
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            images = [self.joined(request.images) for request in batch]
            candidates = [[text.strip()] for text in continuations[start : start + self.batch_size]]
            losses = self.model.candidate_losses(images, [request.text for request in batch], candidates, mean=True)
            found += [float(losses_K[0]) for losses_K in losses]
        return found

    def joined(self, images: Sequence[Any]) -> Image.Image:
        """One image of a request: a blank one for none, as in training on text alone, and several side by side."""
        for image in images:
            if not isinstance(image, str | Path | Image.Image | np.ndarray):
                raise UserError(f"a request has a {type(image).__name__} where an image stands; only images are read")
        if len(images) > 1 and self.several_images == "refuse":
            raise UserError(
                f"a request has {len(images)} images, but this model reads one; set several_images=join to put them "
                "side by side"
            )
        return join_images([to_pil_image(image) for image in images])


def parse_batch_size(value: int | str) -> int:
    """A batch size, which harnesses give as text. Raises UserError for anything but an integer above 0."""
    if not str(value).isdecimal() or not int(value):
        raise UserError(f"batch_size is {value!r}; give an integer above 0")
    return int(value)


def join_images(images: Sequence[Image.Image]) -> Image.Image:
    """Images side by side, scaled to the height of the tallest, with a white gap; a blank image for none."""
    if len(images) < 2:
        return images[0] if images else Image.new("RGB", (1, 1))
    height = max(image.height for image in images)
    scaled = [image.resize((max(1, round(image.width * height / image.height)), height)) for image in images]
    canvas = Image.new("RGB", (sum(image.width + JOIN_GAP for image in scaled) - JOIN_GAP, height), "white")
    left = 0
    for image in scaled:
        canvas.paste(image, (left, 0))
        left += image.width + JOIN_GAP
    return canvas


def with_settings(config: Any, settings: Mapping[str, Any]) -> Any:
    """A GenerationConfig with the settings of a request; a temperature of 0 is greedy. None leaves a field as it is.

    Without `do_sample` a temperature above 0 samples, as in the harnesses' own models.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    fields = {key: int(given[key]) for key in ("max_new_tokens", "num_beams", "top_k") if key in given}
    fields |= {"top_p": float(given["top_p"])} if "top_p" in given else {}
    temperature = float(given.get("temperature", config.temperature))
    samples = bool(given.get("do_sample", "temperature" in given and temperature > 0)) and temperature > 0
    if not samples:
        fields = {key: value for key, value in fields.items() if key in ("max_new_tokens", "num_beams")}
        temperature = config.temperature
    return dataclasses.replace(config, do_sample=samples, temperature=temperature, **fields)


def cut_at(text: str, until: str | Sequence[str] | None) -> str:
    """A text up to the first of some stops."""
    for stop in (until,) if isinstance(until, str) else until or ():
        text = text.partition(stop)[0] if stop else text
    return text
