# SPDX-License-Identifier: Apache-2.0
"""A tagger to ask: `load` a folder with RAM and its list of tags, `tag` pictures. LION takes the tags into its prompts.

The list comes as RAM's makers hand it out, beside the weights: `ram_tag_list.txt` with a tag on each line,
`ram_tag_list_threshold.txt` with the probability that each must exceed, `ram_tag_list_chinese.txt`. The latter two may
be missing.
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
from PIL import Image

from lionjax import convert
from lionjax.convert.formats.ram import RAM_FILE
from lionjax.core import sharding
from lionjax.core.types import Params, UserError
from lionjax.data import images as pictures
from lionjax.inference import engine
from lionjax.models.vision.ram import Ram, RamConfig

TAG_LIST_FILE, CHINESE_TAG_LIST_FILE, THRESHOLD_FILE = (
    f"ram_tag_list{end}.txt" for end in ("", "_chinese", "_threshold")
)
DEFAULT_THRESHOLD = 0.68  # RAM's, for tags that have none of their own
BATCH_SIZES = (1, 2, 4, 8, 16)  # pictures; few sizes, so that few are compiled
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, eq=False)
class TagVocabulary:
    """The words behind a tagger's outputs, and how probable each must be to count.

    A threshold of 1 is never exceeded. `chinese` is empty or as long as `words`; `left_out` are places in the list.
    """

    names: tuple[str, ...]
    threshold_V: np.ndarray
    chinese: tuple[str, ...] = ()
    excluded: tuple[int, ...] = ()

    def __post_init__(self):
        sizes = {"thresholds": len(self.threshold_V), "Chinese tags": len(self.chinese)}
        for name, size in sizes.items():
            if size != len(self.names) and (size or name == "thresholds"):
                raise UserError(f"{size} {name} for {len(self.names)} tags; give one for each")

    def above_threshold(self, probs_BV) -> np.ndarray:
        """Which tags count, of probabilities (B, V): bool (B, V)."""
        # In float32 on both sides, as the original compares them.
        seen_BV = np.asarray(probs_BV, np.float32) > np.asarray(self.threshold_V, np.float32)
        seen_BV[:, list(self.excluded)] = False
        return seen_BV


@dataclasses.dataclass(frozen=True)
class TagResult:
    """The tags of one picture, in the order of the list. As text: `a dog | grass`."""

    tags: tuple[str, ...]
    chinese: tuple[str, ...]
    probabilities: tuple[float, ...]

    def __str__(self) -> str:
        return " | ".join(self.tags)


@dataclasses.dataclass(frozen=True, eq=False)
class Tagger:
    """RAM with its parameters and its list."""

    config: RamConfig
    params: Params
    vocabulary: TagVocabulary
    mesh: Mesh | None = None  # over whose devices pictures are divided; None: one device

    def __post_init__(self):
        if len(self.vocabulary.names) != self.config.num_tags:
            raise UserError(
                f"the list has {len(self.vocabulary.names)} tags where the weights have {self.config.num_tags}; "
                "take the list that belongs to them"
            )

    def tag(self, images: Sequence[object]) -> list[TagResult]:
        """What is on pictures (paths, PIL pictures or uint8 arrays). Raises UserError for what is no picture."""
        share_BV, words = self.probabilities(images), self.vocabulary
        found = []
        for share_V, seen_V in zip(share_BV, words.above_threshold(share_BV)):
            places = np.flatnonzero(seen_V)
            chinese = tuple(words.chinese[place] for place in places if words.chinese)
            shares = tuple(float(share_V[place]) for place in places)
            found.append(TagResult(tuple(words.names[place] for place in places), chinese, shares))
        return found

    def probabilities(self, images: Sequence[object]) -> np.ndarray:
        """The probability of every tag for each picture: float32 (B, V)."""
        one = isinstance(images, np.ndarray) and images.ndim < 4
        if one or isinstance(images, str | bytes | Path | Image.Image):
            raise UserError(f"images is one {type(images).__name__}; give a list of pictures")
        made = [np.zeros((0, self.config.num_tags), np.float32)]
        each = 1 if self.mesh is None else self.mesh.size
        most = BATCH_SIZES[-1] * each
        for start in range(0, len(images), most):
            part = [self.preprocess(image) for image in images[start : start + most]]
            rows = each * engine.round_up_to_bucket(-(-len(part) // each), BATCH_SIZES, BATCH_SIZES[-1])
            pixels_BHWC = np.stack([*part, *[part[-1]] * (rows - len(part))])
            if self.mesh is not None:
                where = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
                pixels_BHWC = jax.device_put(pixels_BHWC, where)
            share_BV = _probabilities(self.config, self.params, pixels_BHWC)
            made.append(np.asarray(share_BV)[: len(part)])
        return np.concatenate(made)

    def replicate(self, mesh: Mesh) -> Tagger:
        """The same tagger with its parameters on all devices of a mesh, each of which looks at a part of a batch."""
        params = jax.device_put(self.params, NamedSharding(mesh, PartitionSpec()))
        return dataclasses.replace(self, params=params, mesh=mesh)

    def preprocess(self, image: object) -> np.ndarray:
        """A picture as RAM reads it, uint8 (side, side, 3): bilinear, aspect not kept."""
        side = self.config.swin.image_size
        picture = pictures.to_pil_image(image)
        return np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR))

    def with_tags(
        self, names: Sequence[str], label_embed_VC, thresholds: float | Sequence[float] = DEFAULT_THRESHOLD
    ) -> Tagger:
        """The same eyes for other tags, each known by CLIP's embedding of its name (V, label_width).

        RAM's are averages over prompts such as "a photo of a ...", of length 1. Raises UserError where lengths differ.
        """
        label_embed_VC = jnp.asarray(label_embed_VC, self.params["labels"].dtype)
        wanted = (len(names), self.config.label_embed_dim)
        if label_embed_VC.shape != wanted:
            raise UserError(f"the embeddings are {label_embed_VC.shape} where {wanted} are wanted")
        if not isinstance(thresholds, Sequence):
            thresholds = [thresholds] * len(names)
        config = dataclasses.replace(self.config, tags=len(names))
        tags = TagVocabulary(tuple(names), np.asarray(thresholds, np.float32))
        made = Tagger(config, self.params | {"labels": label_embed_VC}, tags)
        return made if self.mesh is None else made.replicate(self.mesh)

    def without(self, names: Collection[str]) -> Tagger:
        """The same tagger, which never says these words. Raises UserError for one that is not in its list."""
        places = {word: place for place, word in enumerate(self.vocabulary.names)}
        if unknown := [word for word in names if word not in places]:
            raise UserError(f"the list of tags has no {unknown[0]!r}")
        left_out = (*self.vocabulary.excluded, *(places[word] for word in names))
        return dataclasses.replace(self, tags=dataclasses.replace(self.vocabulary, left_out=left_out))


@functools.partial(jax.jit, static_argnums=0)
def _probabilities(config: RamConfig, params: Params, pixels_BHWC) -> jax.Array:
    mean, std = jnp.asarray(IMAGENET_MEAN, jnp.float32), jnp.asarray(IMAGENET_STD, jnp.float32)
    image_BHWC = (pixels_BHWC.astype(jnp.float32) / 255 - mean) / std
    return jax.nn.sigmoid(Ram(config).apply({"params": params}, image_BHWC).astype(jnp.float32))


def load(folder: str | Path) -> Tagger:
    """The tagger of a folder: ram_swin_large_14m.pth, or what `lionjax convert` made of it, and the list of tags.

    Raises UserError where one of them is missing or they do not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give one with RAM's weights and its tags")
    tags = read_tag_vocabulary([folder, folder / convert.ORIGIN])
    if convert.holds_params(folder):
        config, params = convert.load_params(folder)
    else:
        released = folder / RAM_FILE
        config, params = convert.from_torch(released if released.is_file() else folder)
    if not isinstance(config, RamConfig):
        raise UserError(f"{folder} holds a {type(config).__name__}, which is no tagger")
    return Tagger(config, jax.device_put(params), tags)


@dataclasses.dataclass(frozen=True)
class TaggerFactory:
    """Called, it loads a tagger over all devices of this machine and gives the function that tags pictures.

    Small enough to be sent to other machines.
    """

    folder: Path

    def __call__(self) -> Callable[[Sequence[object]], list[tuple[str, ...]]]:
        mesh = sharding.make_mesh(devices=jax.local_devices())
        loaded = load(self.folder).replicate(mesh)
        return lambda images: [found.tags for found in loaded.tag(images)]


def tagger_factory(folder: str | Path) -> TaggerFactory:
    """A `Teller` of a folder. Raises UserError at once where it has no list of tags."""
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give one with RAM's weights and its tags")
    read_tag_vocabulary([folder, folder / convert.ORIGIN])
    return TaggerFactory(folder)


def read_tag_vocabulary(folders: Sequence[Path]) -> TagVocabulary:
    """The list of tags in the first folder that has one. Raises UserError where none has, and for a damaged one."""
    folder = next((f for f in folders if (f / TAG_LIST_FILE).is_file()), None)
    if folder is None:
        raise UserError(
            f"{folders[0]} has no {TAG_LIST_FILE}; put the list there that came with the weights, a tag on each line, "
            f"and {THRESHOLD_FILE}"
        )
    words, chinese, numbers = (
        _read_lines(folder / name) for name in (TAG_LIST_FILE, CHINESE_TAG_LIST_FILE, THRESHOLD_FILE)
    )
    try:
        thresholds = [float(number) for number in numbers] or [DEFAULT_THRESHOLD] * len(words)
    except ValueError as error:
        raise UserError(f"{folder / THRESHOLD_FILE} wants a number on each line: {error}") from error
    if not all(map(math.isfinite, thresholds)):
        raise UserError(f"{folder / THRESHOLD_FILE} holds a number that is not finite")
    return TagVocabulary(tuple(words), np.asarray(thresholds, np.float32), tuple(chinese))


def _read_lines(path: Path) -> list[str]:
    """The lines of a text file, of which the last may lack its end; none where there is no file."""
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from error
    return [line.strip() for line in text.removesuffix("\n").split("\n")]
