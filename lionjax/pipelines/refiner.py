# SPDX-License-Identifier: Apache-2.0
"""The visual refiner of Lyrics (arXiv 2312.05278): an image to tags, boxes with names, spatial text, region features.

RAM's tags become a caption, Grounding DINO finds boxes for it, and each box gets the tag that its phrase names. The
rules are those of the released code (IDEA-CCNL/Fengshenbang-LM 1867d84), in `data.region_phrases`. SAM's segments are
further region features if `use_sam` is set; that part is our design (see `inference.segmenter`).

A refiner's folder has a tagger in `tagger/`, a detector in `detector/` and, for `use_sam`, SAM in `sam/`; its settings
may stand in `refiner.json`. A checkpoint of Lyrics with its own tagger and detector is a refiner too.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from lionjax.core import sharding
from lionjax.core.errors import check_ranges
from lionjax.core.files import read_json
from lionjax.core.types import UserError
from lionjax.data import region_phrases
from lionjax.data.region_phrases import Language
from lionjax.data.regions import ImageRegions
from lionjax.inference import detector, segmenter, tagger
from lionjax.inference.detector import Detector, QueryOutputs
from lionjax.inference.model import Model
from lionjax.inference.segmenter import Segmenter
from lionjax.inference.tagger import Tagger, TagResult

log = logging.getLogger(__name__)

PAD_TO_MULTIPLE = 32  # pixels: a data set has images of many sizes, and each padded size compiles a program
SETTINGS_FILE = "refiner.json"
EXPERTS = {"tagger", "detector"}  # in the checkpoint of a model that is its own refiner
NO_TAG_CAPTION = "."  # what the released code gives the detector for an image without tags


@dataclasses.dataclass(frozen=True)
class RefinerConfig:
    """Settings; the defaults are those of the released code. Raises UserError for values out of range.

    A box is kept if a token's probability exceeds `box_threshold`; the tokens above `text_threshold` are its phrase;
    NMS removes boxes whose IoU with a better one exceeds `nms_iou`. `language`: of the names, English or Chinese.
    `max_regions`: queries whose features are kept, those of kept boxes first, then the strongest others; 0: all.
    `use_sam`: SAM's segments of the kept boxes are further region features.
    """

    box_threshold: float = 0.25
    text_threshold: float = 0.2
    nms_iou: float = 0.6
    language: Language = "en"
    max_regions: int = 0
    use_sam: bool = False

    def __post_init__(self):
        for name in ("box_threshold", "text_threshold", "nms_iou"):
            region_phrases.check_threshold(name, getattr(self, name))
        if self.language not in ("en", "zh"):
            raise UserError(f"language is {self.language!r}; give 'en' or 'zh'")
        check_ranges(self, max_regions=">= 0")


@dataclasses.dataclass(frozen=True, eq=False)
class Refiner:
    """Tagger, detector and, for `use_sam`, segmenter. Raises UserError if they do not fit together."""

    tagger: Tagger
    detector: Detector
    segmenter: Segmenter | None = None
    config: RefinerConfig = RefinerConfig()

    def __post_init__(self):
        if self.config.use_sam and self.segmenter is None:
            raise UserError("use_sam is true but the refiner has no segmenter; add SAM's weights in the folder sam/")
        if self.segmenter is not None and self.segmenter.feature_width != self.detector.config.feature_width:
            raise UserError(
                f"rows of SAM's segments have {self.segmenter.feature_width} numbers and the detector's queries "
                f"{self.detector.config.feature_width}; use a detector and a SAM of the same width"
            )

    @functools.cached_property
    def digest(self) -> str:
        """The digest of the models that compute region features, by which kept features are recognized."""
        return self.detector.digest + (f"+{self.segmenter.digest}" if self.config.use_sam else "")

    def refine(self, images: Sequence[object]) -> list[ImageRegions]:
        """What is in each image (path, PIL image or uint8 array). An image without tags has no boxes.

        Raises UserError for images that cannot be read or are too narrow for the detector (see `Detector.forward`).
        """
        images = detector.check_images(images)
        tags = self.tagger.tag(images)
        if num_untagged := sum(not found.tags for found in tags):
            log.warning("%d of %d images have no tag, so nothing is detected there", num_untagged, len(images))
        captions = [region_phrases.tags_caption(found.tags) if found.tags else NO_TAG_CAPTION for found in tags]
        outputs = self.detector.forward(images, captions)
        return [self._regions(image, found, output) for image, found, output in zip(images, tags, outputs)]

    def refine_each(self, images: Sequence[object]) -> list[ImageRegions | UserError]:
        """As `refine`, but with the error in place of each image that cannot be read or is too narrow."""
        errors: dict[int, UserError] = {}
        for number, image in enumerate(images):
            try:
                self.detector.padded_shape(*detector.check_images([image]))
            except UserError as error:
                errors[number] = error
        found = iter(self.refine([image for number, image in enumerate(images) if number not in errors]))
        return [errors[number] if number in errors else next(found) for number in range(len(images))]

    def replicate(self, mesh) -> Refiner:
        """The same refiner with tagger and detector on all devices of a mesh, which share each batch."""
        return dataclasses.replace(self, tagger=self.tagger.replicate(mesh), detector=self.detector.replicate(mesh))

    def _regions(self, image, found: TagResult, output: QueryOutputs) -> ImageRegions:
        c, score_Q = self.config, output.prob_QL.max(axis=1)
        box_Q4 = region_phrases.to_corners(output.box_Q4)
        order, phrases, names = name_boxes(self.detector.tokenizer, found, output.prob_QL, box_Q4, c)
        boxes = tuple(tuple(map(float, box)) for box in box_Q4[order])
        others = [query for query in np.argsort(-score_Q, kind="stable") if query not in set(order)]
        chosen = np.array([*order, *others], np.int64)[: c.max_regions or None]
        features_KD = output.feature_QD[chosen]
        if c.use_sam:
            features_KD = np.concatenate([features_KD, self.segmenter.segment_features(image, boxes)])
        scores = tuple(float(score_Q[query]) for query in order)
        return ImageRegions(found.tags, found.chinese, boxes, scores, phrases, names, features_KD, self.digest)


def name_boxes(
    tokenizer, found: TagResult, prob_QL: np.ndarray, box_Q4: np.ndarray, config: RefinerConfig
) -> tuple[list[int], tuple[str, ...], tuple[str, ...]]:
    """(queries of the kept boxes by falling score, their phrases, their names).

    `prob_QL`: probabilities of the tags' caption; `box_Q4`: x0 y0 x1 y1 in 0..1. Boxes are dropped that have no name in
    Chinese, or no token of the tag list, where the released code raises; it also raises if that drops all boxes.
    """
    score_Q = prob_QL.max(axis=1)
    above_Q = np.flatnonzero(score_Q > config.box_threshold) if found.tags else np.zeros(0, np.int64)
    order = above_Q[region_phrases.nms(box_Q4[above_Q], score_Q[above_Q], config.nms_iou)]
    kept = []
    for query in order.tolist():
        phrase = region_phrases.tags_phrase(tokenizer, found.tags, prob_QL[query] > config.text_threshold)
        name = region_phrases.phrase_name(phrase, found.tags, found.chinese, config.language)
        if name:
            kept.append((query, phrase, name))
    queries, phrases, names = zip(*kept) if kept else ((), (), ())
    return list(queries), tuple(phrases), tuple(names)


def load(folder: str | Path, config: RefinerConfig | None = None) -> Refiner:
    """The refiner of a folder (see the module). `config`: instead of the settings in `refiner.json`.

    Raises UserError if a part is missing or does not fit.
    """
    folder = check_folder(folder)
    config = config or read_config(folder)
    sam = segmenter.load(folder / "sam") if config.use_sam else None
    found = detector.load(folder / "detector").padded_to(PAD_TO_MULTIPLE)
    return Refiner(tagger.load(folder / "tagger"), found, sam, config)


def check_folder(folder: str | Path) -> Path:
    """The folder. Raises UserError if it lacks one of the refiner's parts."""
    folder = Path(folder)
    missing = [part for part in ("tagger", "detector") if not (folder / part).is_dir()]
    if missing:
        raise UserError(
            f"{folder} has no folder {missing[0]}/; a refiner has its tagger in tagger/ and its detector in detector/"
        )
    return folder


def read_config(folder: Path) -> RefinerConfig:
    """The settings in a folder's `refiner.json`, or the defaults. Raises UserError for unknown or wrong ones."""
    raw = read_json(folder / SETTINGS_FILE)
    if raw is None:
        return RefinerConfig()
    names = [field.name for field in dataclasses.fields(RefinerConfig)]
    unknown = [name for name in raw if name not in names] if isinstance(raw, dict) else ["of another kind"]
    if unknown:
        raise UserError(f"{folder / SETTINGS_FILE} has the setting {unknown[0]!r}; give some of {', '.join(names)}")
    return RefinerConfig(**raw)


def save_config(config: RefinerConfig, folder: Path) -> None:
    """Write `refiner.json`."""
    (folder / SETTINGS_FILE).write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")


def attach(model: Model, folder: str | Path | None = None) -> Model:
    """The model with the refiner of a folder.

    Without a folder: that in `origin/refiner/` of the model's own folder, or the experts in its checkpoint, if there
    are any. A model that reads no regions is returned as it is. Raises UserError for a folder that such a model does
    not need, and for a refiner that does not fit (see `check_fit`). The experts of a checkpoint are checked when they
    are first used.
    """
    if not model.processor.config.region_width:
        if folder is not None:
            raise UserError("this model reads no regions; leave out the refiner")
        return model
    kept = (model.origin_files or {}).get(f"refiner/{SETTINGS_FILE}")
    folder = Path(kept).parent if folder is None and kept is not None else folder
    if folder is not None:
        return dataclasses.replace(model, refine=check_fit(load(folder), model).refine)
    return dataclasses.replace(model, refine=OwnExperts(model)) if EXPERTS <= model.vlm.info.experts.keys() else model


def check_fit(refiner: Refiner, model: Model) -> Refiner:
    """The refiner. Raises UserError if it does not make the regions that a model reads: their width, their digest."""
    config, width = model.processor.config, refiner.detector.config.feature_width
    if width != config.region_width:
        raise UserError(
            f"the refiner's features have {width} numbers, but the model reads {config.region_width}; use the detector "
            "that the model was trained with"
        )
    if config.regions_digest not in ("", refiner.digest):
        raise UserError(
            f"the model was trained with regions of the refiner {config.regions_digest}, but this one is "
            f"{refiner.digest}; use the same detector and image settings"
        )
    return refiner


@dataclasses.dataclass(frozen=True, eq=False)
class OwnExperts:
    """The refiner of the experts in a model's own checkpoint, made when it is first called with images."""

    model: Model
    config: RefinerConfig = RefinerConfig()

    def __call__(self, images: Sequence[object]) -> list[ImageRegions]:
        return self.refiner.refine(images)

    @functools.cached_property
    def refiner(self) -> Refiner:
        """The refiner. Raises UserError without the tag list, and if tokenizer or widths do not fit."""
        model, experts, files = self.model, self.model.vlm.info.experts, self.model.origin_files or {}
        if tagger.TAG_LIST_FILE not in files:
            raise UserError(f"the model's tagger needs {tagger.TAG_LIST_FILE}; copy RAM's list into the model's folder")
        vocabulary = tagger.read_tag_vocabulary([Path(files[tagger.TAG_LIST_FILE]).parent])
        tokens = detector.check_tokenizer(model.processor.prompt.question_tokenizer, experts["detector"])
        parts = (
            Tagger(experts["tagger"], model.params["tagger"], vocabulary),
            Detector(experts["detector"], model.params["detector"], tokens).padded_to(PAD_TO_MULTIPLE),
        )
        return check_fit(Refiner(*parts, config=self.config), model)


@dataclasses.dataclass(frozen=True)
class RefinerFactory:
    """A picklable factory: calling it loads the refiner on all local devices and returns its method `refine_each`.

    `max_regions`: see RefinerConfig; None: as in the folder's settings.
    """

    folder: Path
    max_regions: int | None = None

    def __call__(self) -> Callable[[Sequence[object]], list[ImageRegions | UserError]]:
        config = read_config(self.folder)
        if self.max_regions is not None:
            config = dataclasses.replace(config, max_regions=self.max_regions)
        mesh = sharding.make_mesh(devices=jax.local_devices())
        return load(self.folder, config).replicate(mesh).refine_each


def refiner_factory(folder: str | Path, max_regions: int | None = None) -> RefinerFactory:
    """A RefinerFactory for a folder. Raises UserError at once if the folder lacks a part or has wrong settings."""
    folder = check_folder(folder).absolute()
    read_config(folder)
    tagger.read_tag_vocabulary([folder / "tagger", folder / "tagger" / tagger.convert.ORIGIN])
    return RefinerFactory(folder, max_regions)
