# SPDX-License-Identifier: Apache-2.0
"""Scenes on disk: a TFDS builder that writes and reads ArrayRecord files without TensorFlow."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tensorflow_datasets as tfds

from lionjax.data.scenes.source import SceneSource
from lionjax.data.scenes.world import SPLITS


@dataclasses.dataclass(eq=False)
class ScenesBuilderConfig(tfds.core.BuilderConfig):
    """Number of scenes per split, image size and seed. The config name contains all of them."""

    name: str = ""
    sizes: tuple[int, int, int] = (3000, 500, 500)
    image_size: int = 128
    seed: int = 0

    def __post_init__(self):
        counts = "-".join(str(size) for size in self.sizes)
        self.name = f"pixels{self.image_size}-seed{self.seed}-{counts}"


class ScenesBuilder(tfds.core.GeneratorBasedBuilder):
    """Images of colored shapes with exact ground truth."""

    name = "scenes"  # name of the folder that it writes
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [ScenesBuilderConfig()]

    def _info(self) -> tfds.core.DatasetInfo:
        pixels = self.builder_config.image_size
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(pixels, pixels, 3), encoding_format="png"),
            "truth": tfds.features.Text(),
        }
        # Unshuffled, so that record i on disk is record i of SceneSource; readers shuffle.
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager):
        c = self.builder_config
        return {
            split: self._generate_examples(SceneSource(split, size, c.seed, c.image_size))
            for split, size in zip(SPLITS, c.sizes)
        }

    def _generate_examples(self, source: SceneSource):
        # PNG bytes, as TFDS needs TensorFlow to encode an array.
        yield from enumerate(source)


def build(folder, sizes=(3000, 500, 500), image_size: int = 128, seed: int = 0) -> Path:
    """Writes the three splits under `folder` and returns the folder of the data set; a complete one is kept.

    TFDS writes to a temporary folder and renames it at the end, so an existing folder is complete.
    """
    config = ScenesBuilderConfig(sizes=tuple(sizes), image_size=image_size, seed=seed)
    builder = ScenesBuilder(data_dir=folder, config=config, file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_path)


class StoredScenes:
    """Random access to a split that `build` wrote, with the same records as SceneSource."""

    def __init__(self, folder, split: str):
        builder = tfds.builder_from_directory(str(folder))
        raw = {"image": tfds.decode.SkipDecoding()}
        self._records = builder.as_data_source(split=split, decoders=raw)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, str | bytes]:
        record = self._records[index]
        texts = {key: record[key].decode() for key in ("id", "truth")}
        return {**record, **texts}
