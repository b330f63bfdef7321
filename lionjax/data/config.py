# SPDX-License-Identifier: Apache-2.0
"""What a run reads: data sources, processor, augmentation, and how the pipeline runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lionjax.core.renamed import renamed_fields
from lionjax.core.types import ModelInfo, UserError
from lionjax.data.processor import ProcessorConfig
from lionjax.data.scenes.dataset import Scenes


@renamed_fields(
    tag_drop="tag_dropout",
    crop="crop_scale",
    flip="hflip",
    mask_share="mask_fraction",
    buckets="length_buckets",
    bad_share="max_bad_fraction",
    quarantine="bad_records_path",
    cache_mib="image_cache_mib",
    threads="num_threads",
    buffer="prefetch_buffer_size",
    workers="num_workers",
)
@dataclass(frozen=True)
class DataConfig:
    """What is read and how. `sources`: `Scenes`, `Coco`, `EasyVqa`, `RefCoco`, `Vqa`, `Lines` or `Built`.

    `tag_noise`: share of tags that a tagger misses; `tag_drop`: share of examples asked without tags.
    `crop`: least and most area of the window seen of a photo, `flip`: mirror half of them. Both keep boxes whole
    and true, and leave scenes and questions about the whole picture alone. `mask_share`: of the training examples of
    `res` so many have masks, and the others are not used.
    `buckets`: text lengths to choose from by batch; empty pads to the processor's. One shape compiles each.
    `on_bad_record`: stop, or take the next one, note it in `quarantine` (JSON lines), and stop when more than
    `bad_share` are bad. `cache_mib`: memory for pictures at the model's size.
    `threads` read ahead `buffer` batches; `workers` are processes that do the same.
    """

    sources: tuple[object, ...] = (Scenes(),)
    processor: ProcessorConfig = ProcessorConfig()
    tag_noise: float = 0.1
    tag_dropout: float = 0.0
    crop_scale: tuple[float, float] = (1.0, 1.0)
    hflip: bool = False
    mask_fraction: float = 1.0
    length_buckets: tuple[int, ...] = ()
    on_bad_record: Literal["raise", "replace"] = "raise"
    max_bad_fraction: float = 0.01
    bad_records_path: str = ""
    image_cache_mib: int = 512
    num_threads: int = 2
    prefetch_buffer_size: int = 4
    num_workers: int = 0

    def for_model(self, info: ModelInfo) -> DataConfig:
        """This config with what the processor needs to know of the model: how it reads prompts, its image token."""
        processor = self.processor
        if info.is_encoder_decoder is not None:
            processor = replace(processor, reader="encoder" if info.is_encoder_decoder else "decoder")
        if info.splices_images:
            spliced = "{image}" in processor.prompt_template and not processor.num_image_tokens
            processor = replace(processor, image_token=info.image_token if spliced else None)
        return self if processor == self.processor else replace(self, processor=processor)

    def __post_init__(self):
        for field in ("tag_noise", "tag_dropout", "mask_fraction", "max_bad_fraction"):
            if not 0 <= getattr(self, field) <= 1:
                raise UserError(f"data.{field} is {getattr(self, field)}; give a share between 0 and 1")
        for field in ("image_cache_mib", "num_threads", "prefetch_buffer_size", "num_workers"):
            if getattr(self, field) < 0:
                raise UserError(f"data.{field} is {getattr(self, field)}; give 0 or more")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UserError(f"data.crop_scale is {self.crop_scale}; give least and most area, such as (0.5, 1.0)")
        if self.processor.sam_image_size and (self.hflip or self.crop_scale != (1.0, 1.0)):
            raise UserError("data.crop_scale and data.hflip move no masks; leave them off with sam_size")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise UserError(f"two data sources have one name in {names}; give each its own")
