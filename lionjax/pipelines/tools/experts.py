# SPDX-License-Identifier: Apache-2.0
"""The models behind the tools: one that answers, and Grounding DINO, RAM and SAM where folders are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from lionjax.core.errors import UserError
from lionjax.data import templates

WARM_UP_SIDE = 64  # pixels

if TYPE_CHECKING:
    from lionjax.inference.detector import Detector
    from lionjax.inference.model import Model
    from lionjax.inference.segmenter import Segmenter
    from lionjax.inference.tagger import Tagger


@dataclasses.dataclass(frozen=True, eq=False)
class Experts:
    """Models of which any may be missing. `names`: {kind: name for descriptions}."""

    model: Model | None = None
    detector: Detector | None = None
    tagger: Tagger | None = None
    segmenter: Segmenter | None = None
    names: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def has_masks(self) -> bool:
        """Whether the model itself answers with masks."""
        return self.model is not None and bool(self.model.processor.config.sam_image_size)


def warm_up(experts: Experts) -> None:
    """Ask each model once about a gray image, so that the first call of a client does not wait for compilation."""
    image = Image.new("RGB", (WARM_UP_SIDE, WARM_UP_SIDE), "gray")
    if experts.model is not None:
        experts.model.answer([image], [templates.CAPTION[0]])
        experts.model.answer([image], [templates.REC[0].format(expr="it")])
    if experts.detector is not None:
        experts.detector.detect([image], "thing.")
    if experts.tagger is not None:
        experts.tagger.tag([image])
    if experts.segmenter is not None:
        experts.segmenter.segment(image, (0.0, 0.0, 1.0, 1.0))


def load_experts(folders: Sequence[Path]) -> Experts:
    """The models of folders, each of the kind that its files say. Raises UserError for two of one kind."""
    if not folders:
        return Experts()
    from lionjax.inference import detector, segmenter, tagger
    from lionjax.inference.folder_kind import folder_kind
    from lionjax.pipelines import loading

    kinds: dict[str, Path] = {}
    for folder in folders:
        kind = folder_kind(folder)
        if kind in kinds:
            raise UserError(f"{kinds[kind]} and {folder} are both a {kind}; give one of each kind")
        kinds[kind] = folder
    loaders = {"detector": detector.load, "tagger": tagger.load, "segmenter": segmenter.load}
    found = {kind: loaders[kind](folder) for kind, folder in kinds.items() if kind in loaders}
    if "detector" in found:
        found["detector"] = found["detector"].padded_to(32)  # images of many sizes share programs
    if "model" in kinds:
        model = loading.load(kinds["model"])
        if model.vlm.info.detects_phrases:
            if "detector" in found:
                raise UserError(f"{kinds['detector']} and {kinds['model']} are both a detector; give one of each kind")
            found["detector"] = detector.from_engine(model.engine, str(kinds["model"]))
        elif not (model.vlm.info.reads_images and model.vlm.info.generates):
            raise UserError(f"{kinds['model']} does not answer questions about images; leave it out")
        else:
            found["model"] = model
    titles = {"detector": "Grounding DINO", "tagger": "RAM", "segmenter": "SAM", "model": "the model"}
    places = {kind: kinds.get(kind, kinds.get("model")) for kind in found}
    return Experts(**found, names={kind: f"{titles[kind]} of {places[kind].resolve().name}" for kind in found})
