# SPDX-License-Identifier: Apache-2.0
"""What a run reads: data sources, processor, augmentation, and how the pipeline runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lionjax.core.types import ModelInfo, UserError
from lionjax.data.processor import ProcessorConfig
from lionjax.data.scenes.dataset import Scenes


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
    tag_drop: float = 0.0
    crop: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    mask_share: float = 1.0
    buckets: tuple[int, ...] = ()
    on_bad_record: Literal["raise", "replace"] = "raise"
    bad_share: float = 0.01
    quarantine: str = ""
    cache_mib: int = 512
    threads: int = 2
    buffer: int = 4
    workers: int = 0

    def for_model(self, info: ModelInfo) -> DataConfig:
        """This config with what the processor needs to know of the model: how it reads prompts, its image token."""
        processor = self.processor
        if info.is_encoder_decoder is not None:
            processor = replace(processor, reader="encoder" if info.is_encoder_decoder else "decoder")
        if info.splices_images:
            spliced = "{image}" in processor.template and not processor.image_tokens
            processor = replace(processor, image_token=info.image_token if spliced else None)
        return self if processor == self.processor else replace(self, processor=processor)

    def __post_init__(self):
        for field in ("tag_noise", "tag_drop", "mask_share", "bad_share"):
            if not 0 <= getattr(self, field) <= 1:
                raise UserError(f"data.{field} is {getattr(self, field)}; give a share between 0 and 1")
        for field in ("cache_mib", "threads", "buffer", "workers"):
            if getattr(self, field) < 0:
                raise UserError(f"data.{field} is {getattr(self, field)}; give 0 or more")
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise UserError(f"data.crop is {self.crop}; give least and most area, such as (0.5, 1.0)")
        if self.processor.sam_size and (self.flip or self.crop != (1.0, 1.0)):
            raise UserError("data.crop and data.flip move no masks; leave them off with sam_size")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise UserError(f"two data sources have one name in {names}; give each its own")
