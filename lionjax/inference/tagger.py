# SPDX-License-Identifier: Apache-2.0
"""Image tagging with RAM (Recognize Anything, arXiv 2306.03514); LION puts the tags into its prompts.

`load` reads a folder with RAM's weights and its tag list, as released: `ram_tag_list.txt` (one tag per line),
`ram_tag_list_threshold.txt` (the probability that each tag must exceed) and `ram_tag_list_chinese.txt`. The latter two
are optional.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lionjax import convert
from lionjax.convert.formats.ram import RAM_FILE
from lionjax.core import sharding
from lionjax.core.types import Params, UserError
from lionjax.data import resample
from lionjax.data.images import require_image_list, to_pil_image
from lionjax.inference import expert_folder
from lionjax.inference.engine import round_up_to_bucket
from lionjax.inference.sampling import require_finite
from lionjax.models.vision.ram import Ram, RamConfig

TAG_LIST_FILE, CHINESE_TAG_LIST_FILE, THRESHOLD_FILE = (
    f"ram_tag_list{end}.txt" for end in ("", "_chinese", "_threshold")
)
DEFAULT_THRESHOLD = 0.68  # RAM's default, for tags without their own
BATCH_SIZES = (1, 2, 4, 8, 16)  # images per device; a few sizes limit the number of compilations
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, eq=False)
class TagVocabulary:
    """The tag names of a tagger's outputs and the probability threshold of each. Raises UserError if lengths differ."""

    names: tuple[str, ...]
    threshold_V: np.ndarray  # a threshold of 1 is never exceeded
    chinese: tuple[str, ...] = ()  # empty, or one for each name
    excluded: tuple[int, ...] = ()  # indices of tags that are never returned

    def __post_init__(self):
        sizes = {"thresholds": len(self.threshold_V), "Chinese tags": len(self.chinese)}
        for name, size in sizes.items():
            if size != len(self.names) and (size or name == "thresholds"):
                raise UserError(f"there are {size} {name} for {len(self.names)} tags; give one for each tag")

    def above_threshold(self, probs_BV) -> np.ndarray:
        """Bool (B, V): whether each probability exceeds its tag's threshold; False for excluded tags."""
        # Compare in float32, as the original code does.
        seen_BV = np.asarray(probs_BV, np.float32) > np.asarray(self.threshold_V, np.float32)
        seen_BV[:, list(self.excluded)] = False
        return seen_BV


@dataclasses.dataclass(frozen=True)
class TagResult:
    """The tags of one image, in the order of the tag list. `str()` gives `a dog | grass`."""

    tags: tuple[str, ...]
    chinese: tuple[str, ...]
    probabilities: tuple[float, ...]

    def __str__(self) -> str:
        return " | ".join(self.tags)


@dataclasses.dataclass(frozen=True, eq=False)
class Tagger:
    """RAM with its parameters and tag list. Raises UserError if the number of tags differs."""

    config: RamConfig
    params: Params
    vocabulary: TagVocabulary
    mesh: Mesh | None = None  # images are sharded over its devices; None: one device

    def __post_init__(self):
        if len(self.vocabulary.names) != self.config.num_tags:
            raise UserError(
                f"the tag list has {len(self.vocabulary.names)} tags but the weights have {self.config.num_tags}; "
                "use the list released with these weights"
            )

    def tag(self, images: Sequence[object]) -> list[TagResult]:
        """The tags of each image (path, PIL image or uint8 array). Raises UserError for anything else."""
        probs_BV, vocabulary = self.probabilities(images), self.vocabulary
        results = []
        for probs_V, present_V in zip(probs_BV, vocabulary.above_threshold(probs_BV)):
            indices = np.flatnonzero(present_V)
            names = tuple(vocabulary.names[i] for i in indices)
            chinese = tuple(vocabulary.chinese[i] for i in indices if vocabulary.chinese)
            results.append(TagResult(names, chinese, tuple(float(probs_V[i]) for i in indices)))
        return results

    def probabilities(self, images: Sequence[object]) -> np.ndarray:
        """The probability of every tag for each image: float32 (B, V).

        Raises UserError for a single image and for probabilities that are NaN.
        """
        require_image_list(images)
        results = [np.zeros((0, self.config.num_tags), np.float32)]
        num_devices = 1 if self.mesh is None else self.mesh.size
        max_batch = BATCH_SIZES[-1] * num_devices
        for start in range(0, len(images), max_batch):
            pixels = [self.preprocess(image) for image in images[start : start + max_batch]]
            padded_size = num_devices * round_up_to_bucket(-(-len(pixels) // num_devices), BATCH_SIZES, BATCH_SIZES[-1])
            pixels_BHWC = np.stack([*pixels, *[pixels[-1]] * (padded_size - len(pixels))])
            if self.mesh is not None:
                batch_sharding = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
                pixels_BHWC = jax.device_put(pixels_BHWC, batch_sharding)
            probs_BV = _probabilities(self.config, self.params, pixels_BHWC)
            results.append(np.asarray(probs_BV)[: len(pixels)])
            require_finite(np.isfinite(results[-1]).all(axis=1), "tag probabilities")
        return np.concatenate(results)

    def replicate(self, mesh: Mesh) -> Tagger:
        """The same tagger with its parameters replicated on all devices of a mesh, which share each batch."""
        params = jax.device_put(self.params, NamedSharding(mesh, PartitionSpec()))
        return dataclasses.replace(self, params=params, mesh=mesh)

    def preprocess(self, image: object) -> np.ndarray:
        """An image as RAM's input, uint8 (side, side, 3): bilinear resize without keeping the aspect ratio."""
        side = self.config.swin.image_size
        return resample.resize(to_pil_image(image), side, side, None, "bilinear")

    def with_tags(
        self, names: Sequence[str], label_embed_VC, thresholds: float | Sequence[float] = DEFAULT_THRESHOLD
    ) -> Tagger:
        """The tagger with another tag list (open-set), given a CLIP text embedding of each: (V, label_embed_dim).

        RAM's embeddings are averaged over prompts such as "a photo of a ..." and L2-normalized. Raises UserError if the
        numbers of names, embeddings and thresholds differ.
        """
        label_embed_VC = jnp.asarray(label_embed_VC, self.params["labels"].dtype)
        expected_shape = (len(names), self.config.label_embed_dim)
        if label_embed_VC.shape != expected_shape:
            raise UserError(f"label_embed_VC has shape {label_embed_VC.shape}; give {expected_shape}")
        if not isinstance(thresholds, Sequence):
            thresholds = [thresholds] * len(names)
        config = dataclasses.replace(self.config, num_tags=len(names))
        vocabulary = TagVocabulary(tuple(names), np.asarray(thresholds, np.float32))
        tagger = Tagger(config, self.params | {"labels": label_embed_VC}, vocabulary)
        return tagger if self.mesh is None else tagger.replicate(self.mesh)

    def without(self, names: Collection[str]) -> Tagger:
        """The tagger without some of its tags. Raises UserError for a name that is not in its tag list."""
        index_of = {name: i for i, name in enumerate(self.vocabulary.names)}
        if unknown := [name for name in names if name not in index_of]:
            raise UserError(f"the tag list has no {unknown[0]!r}; give names of {TAG_LIST_FILE}")
        excluded = (*self.vocabulary.excluded, *(index_of[name] for name in names))
        return dataclasses.replace(self, vocabulary=dataclasses.replace(self.vocabulary, excluded=excluded))


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(config: RamConfig, params: Params, pixels_BHWC) -> jax.Array:
    mean, std = jnp.asarray(IMAGENET_MEAN, jnp.float32), jnp.asarray(IMAGENET_STD, jnp.float32)
    image_BHWC = (pixels_BHWC.astype(jnp.float32) / 255 - mean) / std
    return jax.nn.sigmoid(Ram(config).apply({"params": params}, image_BHWC).astype(jnp.float32))


def load(folder: str | Path) -> Tagger:
    """The tagger of a folder with ram_swin_large_14m.pth, or its `lionjax convert` output, and the tag list.

    Raises UserError if weights or tag list are missing or do not match.
    """
    folder = expert_folder.check_folder(folder, "RAM's weights and its tag list")
    vocabulary = read_tag_vocabulary([folder, folder / convert.ORIGIN])
    config, params, _ = expert_folder.load_weights(folder, RamConfig, "RAM's weights and its tag list", (RAM_FILE,))
    return Tagger(config, jax.device_put(params), vocabulary)


@dataclasses.dataclass(frozen=True)
class TaggerFactory:
    """A picklable factory: calling it loads the tagger on all local devices and returns a function images -> tags."""

    folder: Path

    def __call__(self) -> Callable[[Sequence[object]], list[tuple[str, ...]]]:
        mesh = sharding.make_mesh(devices=jax.local_devices())
        loaded = load(self.folder).replicate(mesh)
        return lambda images: [result.tags for result in loaded.tag(images)]


def tagger_factory(folder: str | Path) -> TaggerFactory:
    """A TaggerFactory for a folder. Raises UserError at once if the folder has no tag list."""
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a folder with RAM's weights and its tag list")
    read_tag_vocabulary([folder, folder / convert.ORIGIN])
    return TaggerFactory(folder)


def read_tag_vocabulary(folders: Sequence[Path]) -> TagVocabulary:
    """The tag list in the first folder that has one. Raises UserError if none has one or it cannot be parsed."""
    folder = next((f for f in folders if (f / TAG_LIST_FILE).is_file()), None)
    if folder is None:
        raise UserError(
            f"{folders[0]} has no {TAG_LIST_FILE}; copy the list released with the weights (one tag per line) and "
            f"{THRESHOLD_FILE} there"
        )
    names, chinese, threshold_lines = (
        _read_lines(folder / file_name) for file_name in (TAG_LIST_FILE, CHINESE_TAG_LIST_FILE, THRESHOLD_FILE)
    )
    try:
        thresholds = [float(line) for line in threshold_lines] or [DEFAULT_THRESHOLD] * len(names)
    except ValueError as error:
        raise UserError(f"{folder / THRESHOLD_FILE} must have one number per line: {error}") from error
    if not all(map(math.isfinite, thresholds)):
        raise UserError(f"{folder / THRESHOLD_FILE} contains a non-finite number; give finite numbers")
    return TagVocabulary(tuple(names), np.asarray(thresholds, np.float32), tuple(chinese))


def _read_lines(path: Path) -> list[str]:
    """The stripped lines of a UTF-8 file; empty if there is no file. Raises UserError if it is not text."""
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from error
    return [line.strip() for line in text.removesuffix("\n").split("\n")]
