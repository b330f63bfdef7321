# SPDX-License-Identifier: Apache-2.0
"""Open-vocabulary detection with Grounding DINO (arXiv 2303.05499): boxes of what a prompt names.

`load` reads a folder with the detector's weights, released or converted, its BERT tokenizer (`vocab.txt` or
`tokenizer.json`) and, if it has one, `preprocessor_config.json`. Images keep their aspect ratio: 800 pixels for the
shorter side, at most 1333 for the longer one. Only images of one size share a batch, so that an image's result is
that of the original for this image alone and does not depend on the others of a call.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from lionjax.convert.formats.grounding_dino import GROUNDING_DINO_FILES
from lionjax.convert.formats.image_settings import read_detector_settings
from lionjax.core.types import Params, UserError
from lionjax.data import region_phrases, resample
from lionjax.data.image_fit import ImageFit
from lionjax.data.images import require_image_list, require_size, to_pil_image
from lionjax.data.tokenizer import Tokenizer
from lionjax.inference import expert_folder, loading
from lionjax.inference.engine import InferenceEngine, round_up_to_bucket
from lionjax.inference.sampling import require_finite
from lionjax.models.vision.grounding_dino import GroundingDino, GroundingDinoConfig
from lionjax.training.checksum import params_digest

log = logging.getLogger(__name__)

BATCH_SIZES = (1, 2, 4, 8)  # images per device; a few sizes limit the number of compilations
TEXT_LENGTHS = (16, 32, 64, 128, region_phrases.MAX_DETECTOR_TOKENS)
BOX_THRESHOLD, TEXT_THRESHOLD = 0.35, 0.25  # of Grounding DINO's demo
CONTENT = "Grounding DINO's weights and its tokenizer"
DELIMITERS = ("[CLS]", "[SEP]", ".")  # what parts phrases for `remove_combined`


@dataclasses.dataclass(frozen=True)
class DetectorImages:
    """How images are resized and normalized.

    `pad_to_multiple`: 1 pads nothing, and each size compiles a program; images of many sizes share few programs with
    32, at slightly other results, since backbone and group norms see the padding.
    """

    fit: ImageFit = ImageFit("shortest_edge", (800, 1333), "bilinear")
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    pad_to_multiple: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class QueryOutputs:
    """What the detector computes for one image and caption, before any threshold.

    `prob_QL`: for each token of the caption, `ids`. `box_Q4`: center and size in 0..1. `feature_QD`: the region
    features that Lyrics reads, with the refined box in the last four. `num_cut`: tokens of the caption that were cut.
    """

    prob_QL: np.ndarray
    box_Q4: np.ndarray
    feature_QD: np.ndarray
    ids: tuple[int, ...]
    num_cut: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Detections:
    """The boxes found in one image of `size` (width, height), by falling score.

    `boxes_K4`: x0 y0 x1 y1 as fractions of the image; they are not clipped. `features_KD`: see `QueryOutputs`.
    """

    boxes_K4: np.ndarray
    scores: tuple[float, ...]
    phrases: tuple[str, ...]
    features_KD: np.ndarray
    size: tuple[int, int]

    @property
    def pixel_boxes_K4(self) -> np.ndarray:
        """The boxes in pixels of the image."""
        return self.boxes_K4 * np.array([*self.size, *self.size], np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Detector:
    """Grounding DINO with its parameters and tokenizer."""

    config: GroundingDinoConfig
    params: Params
    tokenizer: Tokenizer
    images: DetectorImages = DetectorImages()
    mesh: Mesh | None = None  # images are sharded over its devices; None: one device

    def detect(
        self,
        images: Sequence[object],
        prompts: Sequence[str] | str,
        box_threshold: float = BOX_THRESHOLD,
        text_threshold: float = TEXT_THRESHOLD,
        nms_iou: float | None = None,
        remove_combined: bool = False,
    ) -> list[Detections]:
        """The boxes of what a prompt names in each image (path, PIL image or uint8 array).

        `prompts`: names separated by full stops, "a cat. a dog.", one text for each image or one for all. A box is kept
        if a token's probability exceeds `box_threshold`; its phrase has the tokens above `text_threshold`, with
        `remove_combined` only those of the phrase of the best token. `nms_iou`: also remove boxes that overlap a better
        one by more than this IoU. Raises UserError for thresholds outside 0..1 and for what cannot be read.
        """
        thresholds = {"box_threshold": box_threshold, "text_threshold": text_threshold}
        thresholds |= {} if nms_iou is None else {"nms_iou": nms_iou}
        for name, value in thresholds.items():
            region_phrases.check_threshold(name, value)
        pil_images = check_images(images)
        separators = [self.tokenizer.token_to_id(piece) for piece in DELIMITERS]
        results = []
        for image, found in zip(pil_images, self.forward(pil_images, prompts)):
            score_Q = found.prob_QL.max(axis=1)
            order = np.argsort(-score_Q, kind="stable")
            order = order[score_Q[order] > box_threshold]
            box_K4 = region_phrases.to_corners(found.box_Q4)
            if nms_iou is not None:
                order = order[region_phrases.nms(box_K4[order], score_Q[order], nms_iou)]
            phrases = []
            for prob_L in found.prob_QL[order]:
                is_hit_L = prob_L > text_threshold
                if remove_combined:
                    is_hit_L &= region_phrases.within_best_phrase(found.ids, separators, prob_L)
                max_tokens = self.config.max_text_len
                phrases.append(region_phrases.caption_phrase(self.tokenizer, found.ids, is_hit_L, max_tokens))
            scores = tuple(map(float, score_Q[order]))
            results.append(Detections(box_K4[order], scores, tuple(phrases), found.feature_QD[order], image.size))
        return results

    def forward(self, images: Sequence[object], prompts: Sequence[str] | str) -> list[QueryOutputs]:
        """The outputs of all queries for each image; see `detect` for the arguments.

        Raises UserError for images with a side of one pixel or with fewer positions than queries, for another number of
        prompts, for an empty prompt, and where the detector computes NaN or infinity.
        """
        pil_images = check_images(images)
        prompts = [prompts] * len(pil_images) if isinstance(prompts, str) else list(prompts)
        if len(prompts) != len(pil_images):
            raise UserError(f"{len(prompts)} prompts were given for {len(pil_images)} images; give one each")
        texts = [self._encode(prompt) for prompt in prompts]
        shapes = [self.padded_shape(image) for image in pil_images]
        results: dict[int, QueryOutputs] = {}
        max_batch = BATCH_SIZES[-1] * (1 if self.mesh is None else self.mesh.size)
        for shape in dict.fromkeys(shapes):
            members = [k for k, other in enumerate(shapes) if other == shape]
            for start in range(0, len(members), max_batch):
                group = members[start : start + max_batch]
                found = self._run([pil_images[k] for k in group], [texts[k][0] for k in group], shape)
                for k, (prob_QL, box_Q4, feature_QD) in zip(group, found):
                    ids, num_cut = texts[k]
                    results[k] = QueryOutputs(prob_QL[:, : len(ids)], box_Q4, feature_QD, tuple(ids), num_cut)
        return [results[k] for k in range(len(pil_images))]

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """The resized RGB image, uint8 (height, width, 3)."""
        return resample.resize(image, *self.resized_shape(image), None, self.images.fit.resample)

    def resized_shape(self, image: Image.Image) -> tuple[int, int]:
        """(height, width) of an image after the resize."""
        return self.images.fit.resized(image.height, image.width, 0)

    def padded_shape(self, image: Image.Image) -> tuple[int, int]:
        """(height, width) of an image after resize and padding. Raises UserError if it has too few positions."""
        step = self.images.pad_to_multiple
        height, width = (-(-edge // step) * step for edge in self.resized_shape(image))
        finest = self.config.swin.patch_size << min(self.config.swin.output_stages)
        strides = [finest << level for level in range(self.config.num_levels)]
        positions = sum(-(-height // stride) * -(-width // stride) for stride in strides)
        if positions < self.config.num_queries:
            raise UserError(
                f"an image of {image.width} x {image.height} pixels is too narrow: it gives the detector {positions} "
                f"positions for its {self.config.num_queries} queries; crop or pad it"
            )
        return height, width

    def replicate(self, mesh: Mesh) -> Detector:
        """The same detector with its parameters replicated on all devices of a mesh, which share each batch."""
        params = jax.device_put(self.params, NamedSharding(mesh, PartitionSpec()))
        return dataclasses.replace(self, params=params, mesh=mesh)

    def padded_to(self, multiple: int) -> Detector:
        """The same detector that pads images to a multiple of this many pixels; see `DetectorImages`."""
        return dataclasses.replace(self, images=dataclasses.replace(self.images, pad_to_multiple=multiple))

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits of the parameters, sizes and image settings, by which kept features are recognized."""
        return params_digest(self.params, repr((self.config, self.images)))

    def _encode(self, prompt: str) -> tuple[list[int], int]:
        """(ids, number of ids cut) of a prompt as the detector reads it."""
        if not prompt.strip(" ."):
            raise UserError(f"the prompt is {prompt!r}; give names separated by full stops, such as 'a cat. a dog.'")
        caption, max_tokens = region_phrases.detector_caption(prompt), self.config.max_text_len
        ids, num_cut = region_phrases.encode_caption(self.tokenizer, caption, max_tokens)
        if num_cut:
            log.warning("the prompt has %d tokens; the last %d are cut", len(ids) + num_cut, num_cut)
        return ids, num_cut

    def _run(self, images: Sequence[Image.Image], texts: Sequence[list[int]], shape: tuple[int, int]):
        """(probabilities, boxes, features) of each image of a batch; all are padded to `shape` (height, width)."""
        num_devices = 1 if self.mesh is None else self.mesh.size
        size = num_devices * round_up_to_bucket(-(-len(images) // num_devices), BATCH_SIZES, BATCH_SIZES[-1])
        length = round_up_to_bucket(max(map(len, texts)), TEXT_LENGTHS, TEXT_LENGTHS[-1])
        pixels_BHWC = np.zeros((size, *shape, 3), np.uint8)
        mask_BHW = np.zeros((size, *shape), bool)
        ids_BL, text_mask_BL = np.full((size, length), self.tokenizer.pad_id, np.int32), np.zeros((size, length), bool)
        repeated = [len(images) - 1] * (size - len(images))
        preprocessed = [self.preprocess(image) for image in images]
        for row, source in enumerate([*range(len(images)), *repeated]):
            pixels, ids = preprocessed[source], texts[source]
            pixels_BHWC[row, : pixels.shape[0], : pixels.shape[1]] = pixels
            mask_BHW[row, : pixels.shape[0], : pixels.shape[1]] = True
            ids_BL[row, : len(ids)], text_mask_BL[row, : len(ids)] = ids, True
        arrays = (pixels_BHWC, mask_BHW, ids_BL, text_mask_BL)
        if self.mesh is not None:
            arrays = jax.device_put(arrays, NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names)))
        found = jax.device_get(_outputs(self.config, self.params, self.images.mean, self.images.std, *arrays))
        is_finite = [np.isfinite(array[: len(images)]).reshape(len(images), -1).all(axis=1) for array in found]
        require_finite(np.logical_and.reduce(is_finite), "boxes")
        return list(zip(*(np.asarray(array[: len(images)], np.float32) for array in found)))


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _outputs(config: GroundingDinoConfig, params: Params, mean, std, pixels_BHWC, mask_BHW, ids_BL, text_mask_BL):
    """(probabilities (B, Q, L), boxes (B, Q, 4), features (B, Q, D)) of uint8 images; padding is zero as a number."""
    image_BHWC = (pixels_BHWC.astype(jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std)
    image_BHWC = jnp.where(mask_BHW[..., None], image_BHWC, 0)
    output = GroundingDino(config).apply({"params": params}, image_BHWC, mask_BHW, ids_BL, text_mask_BL)
    return jax.nn.sigmoid(output.logits_BQL.astype(jnp.float32)), output.boxes_BQ4, output.features_BQD


def check_images(images: Sequence[object]) -> list[Image.Image]:
    """The images as RGB PIL images. Raises UserError for a single image, and for one with a side of one pixel."""
    require_image_list(images)
    return [require_size(to_pil_image(image), 2, "the detector") for image in images]


def load(folder: str | Path) -> Detector:
    """The detector of a folder: Grounding DINO's weights, released or converted, with its tokenizer, or a run.

    Raises UserError if weights or tokenizer are missing or of another model.
    """
    folder = expert_folder.check_folder(folder, CONTENT)
    if expert_folder.holds_experiment(folder):
        return from_engine(loading.load(folder).engine, str(folder))
    tokens = expert_folder.load_tokenizer(folder, "BERT's vocab.txt, of bert-base-uncased,")
    config, params, files = expert_folder.load_weights(folder, GroundingDinoConfig, CONTENT, GROUNDING_DINO_FILES)
    return Detector(config, jax.device_put(params), check_tokenizer(tokens, config), read_images(files))


def from_engine(engine: InferenceEngine, name: str = "the model") -> Detector:
    """The detector that a run trained, with the image settings of its data. Raises UserError for another model."""
    if not engine.model.info.detects_phrases:
        raise UserError(f"{name} is a {type(engine.model).__name__}, no detector; give a folder with Grounding DINO")
    c, tokens = engine.processor.config, engine.processor.prompt.question_tokenizer
    fit = dataclasses.replace(c.image_fit, size=c.image_fit.resized(c.image_size, c.image_size, c.image_size))
    images = DetectorImages(fit, c.image_mean, c.image_std)
    mesh = engine.mesh if engine.mesh.size > 1 else None
    return Detector(engine.model.detector, engine.params, check_tokenizer(tokens, engine.model.detector), images, mesh)


def check_tokenizer(tokens: Tokenizer, config: GroundingDinoConfig) -> Tokenizer:
    """The tokenizer. Raises UserError if it is not that of the weights.

    It must not have more tokens than the detector's word table has rows, and its [CLS] and [SEP] must be among the
    tokens that end the detector's phrases.
    """
    ends = {*tokens.bos_ids, tokens.eos_id}
    if not ends <= set(config.delimiter_ids):
        raise UserError(
            f"the tokenizer begins and ends a text with the ids {sorted(ends)}, but the detector's phrases end with "
            f"{list(config.delimiter_ids)}; use the tokenizer that belongs to these weights"
        )
    num_tokens, num_rows = len(tokens.backend.get_vocab(with_added_tokens=False)), config.text.vocab_size
    if num_tokens > num_rows:
        raise UserError(
            f"the tokenizer has {num_tokens} tokens but the detector's word table has {num_rows} rows; use the "
            "tokenizer that belongs to these weights"
        )
    return tokens


def read_images(folder: Path) -> DetectorImages:
    """The image settings of a folder's preprocessor_config.json, or those of the release."""
    normalization, fit = read_detector_settings(folder)
    return DetectorImages(ImageFit(**fit), normalization["image_mean"], normalization["image_std"])
