# SPDX-License-Identifier: Apache-2.0
"""`DataConfig`: data sources, processor, augmentation, and settings of the Grain input pipeline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lionjax.core.errors import check_ranges
from lionjax.core.renamed import renamed_fields
from lionjax.core.types import ModelInfo, UserError
from lionjax.data.box_text import PackingConfig
from lionjax.data.processor import ProcessorConfig
from lionjax.data.scenes.dataset import Scenes


@renamed_fields()
@dataclass(frozen=True)
class DataConfig:
    """Data sources and settings of the input pipeline. Raises UserError for values outside their range.

    `sources`: dataset configs such as `Scenes`, `Coco`, `EasyVqa`, `RefCoco`, `Vqa`, `ScienceQa`, `JsonLines` or
    `ArrayRecordDataset`.
    `tag_noise`: fraction of tags that a simulated tagger misses. `tag_dropout`: fraction of examples without tags.
    `crop_scale`: (minimum, maximum) area of a random crop, as fractions of the image. `hflip`: flip half of the images
    horizontally. Both move boxes along and never apply to scenes; only captions and examples with boxes are cropped,
    and examples that mention left or right are not flipped. `augmentation` "image_only" instead crops and flips the
    images of all examples and leaves boxes and texts as they are (`mixture.augment_image_only`).
    `mask_fraction`: fraction of the `res` training examples that are used.
    `length_buckets`: text lengths to choose from per batch; empty: the processor's lengths. Each length is compiled.
    `on_bad_record`: "raise", or "replace" it by the next record and append it to `bad_records_path` (JSON lines); more
    than `max_bad_fraction` of the records that the run has seen raise. `image_cache_mib`: MiB of memory for images at
    the model's size.
    `num_threads` prefetch `prefetch_buffer_size` batches; `num_workers`: Grain worker processes.
    """

    sources: tuple[object, ...] = (Scenes(),)
    processor: ProcessorConfig = ProcessorConfig()
    tag_noise: float = 0.1
    tag_dropout: float = 0.0
    crop_scale: tuple[float, float] = (1.0, 1.0)
    hflip: bool = False
    augmentation: Literal["box_aware", "image_only"] = "box_aware"
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
        """This config with the fields of `processor` that the model decides, such as `reader`, set to what it needs."""
        processor = self.processor
        if info.is_encoder_decoder is not None:
            processor = replace(processor, reader="encoder" if info.is_encoder_decoder else "decoder")
        if info.splices_images:
            # A placeholder outside the vocabulary stands for each image token (LISA), as the tokenizer has none.
            is_placeholder = info.image_token is not None and info.image_token < 0
            has_image = "{image}" in processor.prompt_template
            spliced = has_image and (is_placeholder or not processor.num_image_tokens)
            processor = replace(processor, image_token=info.image_token if spliced else None)
        packing = (processor.packing or PackingConfig()) if info.reads_packed_text else None
        fields = {"detects_phrases": info.detects_phrases, "region_width": info.region_width, "packing": packing}
        fields["slots"] = info.slots
        processor = replace(processor, **fields)
        return self if processor == self.processor else replace(self, processor=processor)

    def __post_init__(self):
        for field in ("tag_noise", "tag_dropout", "mask_fraction", "max_bad_fraction"):
            if not 0 <= getattr(self, field) <= 1:
                raise UserError(f"data.{field} is {getattr(self, field)}; give a fraction between 0 and 1")
        for field in ("image_cache_mib", "num_threads", "prefetch_buffer_size", "num_workers"):
            if getattr(self, field) < 0:
                raise UserError(f"data.{field} is {getattr(self, field)}; give 0 or more")
        check_ranges(self, "data.", length_buckets=">= 1")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UserError(
                f"data.crop_scale is {self.crop_scale}; give minimum and maximum area in 0..1, such as (0.5, 1.0)"
            )
        if self.processor.sam_image_size and (self.hflip or self.crop_scale != (1.0, 1.0)):
            raise UserError(
                "data.crop_scale and data.hflip do not transform masks; leave both unset with processor.sam_image_size"
            )
        if self.processor.region_width and (self.hflip or self.crop_scale != (1.0, 1.0)):
            raise UserError(
                "data.crop_scale and data.hflip do not move the regions that a refiner kept; leave both unset for a "
                "model that reads regions"
            )
        if self.augmentation == "image_only" and self.processor.pad_to_square:
            raise UserError(
                "data.augmentation='image_only' does not move boxes, which processor.pad_to_square would do; "
                "set one of them to its default"
            )
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise UserError(f"two data sources have the same name in {names}; give each its own name")
