# SPDX-License-Identifier: Apache-2.0
"""Image and text preprocessing: image, question and answer to a `Batch`, for training, evaluation and inference.

Images are resized or padded to a square and normalized with CLIP's mean and deviation. Text is tokenized by
`data.prompt` and padded on the right to fixed lengths, so that each jitted function compiles once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lionjax.core.types import CATEGORIES, Batch, PackedText, UserError
from lionjax.data import images, letterbox
from lionjax.data.box_text import pack_text
from lionjax.data.boxes import Box
from lionjax.data.chat import DEFAULT_FORMAT, PromptFormat, render_history
from lionjax.data.detection import encode_detection
from lionjax.data.image_fit import ImageFit
from lionjax.data.letterbox import Letterbox
from lionjax.data.processor_config import CLIP_MEAN, CLIP_STD, ProcessorConfig
from lionjax.data.prompt import NO_LETTERBOX, PromptBuilder
from lionjax.data.regions import ImageRegions, pad_regions
from lionjax.data.rounds import without_marks
from lionjax.data.sentences import NO_DATA, SlotData, slot_arrays
from lionjax.data.tokenizer import Tokenizer

__all__ = ("CLIP_MEAN", "CLIP_STD", "ImageTextInput", "Processor", "ProcessorConfig")


@dataclass(frozen=True)
class ImageTextInput:
    """One image and question for inference. `image`: a path, the bytes of a file, a PIL image or a uint8 array."""

    image: object
    question: str
    tags: tuple[str, ...] = ()
    category: str = "image_level"
    boxes: tuple[Box, ...] = ()  # exact coordinates of the boxes that the question rounds to three decimals
    shots: tuple[tuple[object, str, str], ...] = ()  # in-context examples: image, question, answer
    turns: tuple[tuple[str, str], ...] = ()  # earlier (question, answer) pairs about this image
    regions: ImageRegions | None = None  # what a refiner found in the image, for models that read regions
    slots: SlotData = NO_DATA  # what the slots in the question hold, for models with slots


class Processor:
    """Converts images, prompts and answers to the arrays of a `Batch`."""

    def __init__(self, config: ProcessorConfig):
        self.config = config
        self.prompt = PromptBuilder(config)

    @property
    def tokenizer(self) -> Tokenizer:
        """The language model's tokenizer."""
        return self.prompt.tokenizer

    def __reduce__(self):
        return Processor, (self.config,)

    # ------------------------------------------------------------------ images

    def load_pixels(self, source, crop: Box = images.FULL_IMAGE) -> np.ndarray:
        """The image, or its window `crop` in 0..1, as uint8 (image_size, image_size, 3).

        `source`: any type that `images.to_pil_image` accepts.
        """
        c = self.config
        image = images.to_pil_image(source, max_pixels=c.max_pixels)
        if not c.pad_to_square and c.image_fit == ImageFit():
            return images.resize(image, c.image_size, crop)
        if crop != images.FULL_IMAGE:
            width, height = image.size
            edges = np.array(crop) * (width, height, width, height)
            image = image.crop(tuple(edges.round().astype(int).tolist()))
        return c.image_fit.apply(image, c.image_size, self._pad_rgb() if c.pad_to_square else None)

    def _pad_rgb(self) -> tuple[int, int, int]:
        c = self.config
        if c.image_fit.pad_rgb:
            return c.image_fit.pad_rgb
        return letterbox.WHITE if c.pad_color == "white" else tuple(int(255 * m) for m in c.image_mean)

    def get_letterbox(self, source, crop: Box = images.FULL_IMAGE) -> Letterbox:
        """The padded square in which the model's boxes are fractions, for an image or its window `crop`."""
        if not self.config.pad_to_square:
            return NO_LETTERBOX
        width, height = images.to_pil_image(source, max_pixels=self.config.max_pixels).size
        width_fraction, height_fraction = crop[2] - crop[0], crop[3] - crop[1]
        return Letterbox(max(1, round(width * width_fraction)), max(1, round(height * height_fraction)))

    def load_sam_pixels(self, source) -> dict[str, np.ndarray]:
        """{"sam": uint8 (sam_image_size, sam_image_size, 3), "sam_size": (width, height) of the image} for an example.

        Empty if `sam_image_size` is 0.
        """
        if not self.config.sam_image_size:
            return {}
        image = images.to_pil_image(source, max_pixels=self.config.max_pixels)
        pixels = letterbox.letterbox_sam_image(image, self.config.sam_image_size, self.sam_corner)
        return {"sam": pixels, "sam_size": np.array(image.size, np.int32)}

    @property
    def sam_corner(self) -> bool:
        """Whether SAM's image lies in the upper left corner of its square."""
        return self.config.sam_padding == "corner"

    def _sam_fields(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The fields of a `Batch` for SAM's images in stacked examples, if there are any."""
        if "sam" not in rows:
            return {}
        fields = {"sam_image_BHWC": letterbox.normalize_sam_image(rows["sam"], rows["sam_size"], self.sam_corner)}
        if not self.sam_corner:
            return fields
        rects = [Letterbox(*size, True).pixel_rect(rows["sam"].shape[1])[2:] for size in rows["sam_size"].tolist()]
        return fields | {"sam_size_B2": np.array(rects, np.int32)}

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """float32 (..., 3) from uint8 (..., 3): (pixels / 255 - image_mean) / image_std."""
        image = pixels.astype(np.float32)
        # Broadcast over rows of width * 3 values: numpy is slow when the innermost axis has only 3.
        rows = image.reshape(*pixels.shape[:-2], -1)
        mean, std = (np.tile(np.float32(c), pixels.shape[-2]) for c in (self.config.image_mean, self.config.image_std))
        rows /= np.float32(255)
        rows -= mean
        rows /= std
        return image

    def preprocess_image(self, source) -> np.ndarray:
        """The model's image input: normalized float32 (image_size, image_size, 3)."""
        return self.normalize(self.load_pixels(source))

    # ------------------------------------------------------------------ arrays

    def encode_example(
        self,
        pixels: np.ndarray,
        question: str,
        tags=(),
        answer: str | None = None,
        category: str = "image_level",
        boxes: Iterable[Box] = (),
        image_letterbox: Letterbox = NO_LETTERBOX,
        box_format: str | None = None,
        prompt_format: PromptFormat = DEFAULT_FORMAT,
        context: str = "",
        slot_data: SlotData = NO_DATA,
    ) -> dict[str, np.ndarray]:
        """One example as a dict of arrays of fixed shape; stacked, they are the input of `collate`.

        `boxes` are the exact coordinates of boxes in `question` and `answer`; `image_letterbox` and `box_format`: see
        `encode_with_boxes`. Boxes in `prompt_format.turns` are written in the config's `box_format` and add no
        rows to key "boxes". `context` stands before the question in the prompt, but not in key "question". `slot_data`:
        of the question's slots (see `data.sentences`). Key "size"
        is (width, height) of the original image; "num_cut" is the number of target tokens that exceed
        `max_target_tokens`. Raises UserError for prompts or boxes that exceed the config's lengths.
        """
        c = self.config
        asked = f"{context.strip()} {question}" if context.strip() else question
        built = self.prompt.build_example(asked, answer, tags, boxes, image_letterbox, box_format, prompt_format)
        pad = self.tokenizer.pad_id
        texts = {
            "prompt": _pad_and_mask(built.prompt_ids, c.max_prompt_tokens, pad),
            "question": _pad_and_mask(
                self.prompt.encode_question(without_marks(question, prompt_format)),
                c.max_question_tokens,
                self.prompt.question_tokenizer.pad_id,
            ),
            "target": _pad_and_mask(built.target_ids, c.max_target_tokens, pad),
        }
        masks = {f"{name}_mask": mask for name, (_, mask) in texts.items()}
        masks["loss_mask"] = _pad_and_mask(built.loss_mask, c.max_target_tokens, 0)[0]
        ids = {name: ids for name, (ids, _) in texts.items()}
        size = np.array((image_letterbox.width, image_letterbox.height), np.int32)
        row = {"pixels": pixels, "task": np.int32(_task_id(category)), "size": size, **ids, **masks}
        row["num_cut"] = np.int32(built.num_cut)
        if c.slots is not None:
            texts = (*(earlier for earlier, _ in prompt_format.turns), asked)
            sentence = " ".join(texts) if self.prompt.is_sentence(asked, prompt_format) else ""
            num_images = len(pixels) if pixels.ndim == 4 else 1
            row |= slot_arrays(sentence, slot_data, c.slots, c.image_size, num_images)
        return row | self._pad_boxes(built.boxes, box_format or c.box_format)

    def _pad_boxes(self, boxes: Sequence[Box], box_format: str) -> dict[str, np.ndarray]:
        max_boxes = self.config.max_boxes
        if box_format == "embeddings" and boxes and not max_boxes:
            raise UserError("this model has no box embeddings (processor.max_boxes is 0); set processor.max_boxes")
        if box_format in ("embeddings", "masks") and len(boxes) > max_boxes:
            raise UserError(
                f"question and answer contain {len(boxes)} boxes, but at most {max_boxes} are allowed; use fewer boxes "
                "or raise processor.max_boxes"
            )
        if not max_boxes:
            return {}
        box_K4, mask_K = np.zeros((max_boxes, 4), np.float32), np.zeros(max_boxes, np.int32)
        kept_boxes = boxes[:max_boxes]
        box_K4[: len(kept_boxes)], mask_K[: len(kept_boxes)] = np.reshape(kept_boxes, (-1, 4)), 1
        return {"boxes": box_K4, "boxes_mask": mask_K}

    def spatial_context(self, regions: ImageRegions | None) -> str:
        """What stands before the question in the prompt: the boxes as text, with `spatial_text_in_prompt`."""
        return regions.spatial_text if regions and self.config.spatial_text_in_prompt else ""

    def encode_regions(
        self, found: Sequence[ImageRegions | None], caption: str, rng: np.random.Generator, name: str = "the image"
    ) -> dict[str, np.ndarray]:
        """The arrays of a model that reads regions: features of each image, and packed text with the caption.

        `found`: of the example's images; `rng` draws the masked elements of the first one's boxes. Empty for models
        that read none. Raises UserError for an image that was not refined, or by another refiner.
        """
        c, rows = self.config, {}
        if not c.region_width:
            return rows
        for regions in found:
            if regions is None:
                raise UserError(
                    f"{name} has no kept regions, which this model reads; refine the images first with "
                    "`lionjax data build SOURCE --refiner FOLDER`"
                )
            if c.regions_digest and regions.digest not in ("", c.regions_digest):  # text-only records have none
                raise UserError(
                    f"the regions of {name} were made by the refiner {regions.digest!r}, but processor.regions_digest "
                    f"is {c.regions_digest!r}; refine the data again, or set the digest to ''"
                )
        rows = pad_regions(found, c.region_width, c.max_regions, max(c.max_images, len(found)))
        if c.packing is not None:
            first = found[0]
            packed = pack_text(self.prompt.question_tokenizer, caption, first.names, first.boxes, rng, c.packing)
            rows |= {f"packed_{field}": array for field, array in packed.items()}
        return rows

    def encode_detection(self, caption: str, boxes: Sequence[Box], names) -> dict[str, np.ndarray]:
        """The arrays by which a detector learns boxes (see `data.detection`); empty without `detects_phrases`."""
        c = self.config
        if not c.detects_phrases:
            return {}
        sizes = (c.max_question_tokens, c.max_boxes)
        return encode_detection(self.prompt.question_tokenizer, caption, boxes, names, *sizes)

    def collate(
        self,
        rows: dict[str, np.ndarray],
        length_buckets: Sequence[int] = (),
        max_across_processes: Callable[..., list[int]] | None = None,
    ) -> Batch:
        """A `Batch` of stacked examples; text is cut to the shortest of `length_buckets` that fits, if given.

        `max_across_processes`: the largest of each number over the processes that must have the same lengths.
        """
        text, names = {}, ("prompt", "question", "target")
        needed = [int(rows[f"{name}_mask"].sum(1).max(initial=1)) for name in names]
        if length_buckets and max_across_processes is not None:
            needed = max_across_processes(*needed)
        for name, longest in zip(names, needed):
            ids, mask = rows[name], rows[f"{name}_mask"]
            length = min((b for b in length_buckets if b >= longest), default=ids.shape[1])
            text[name], text[f"{name}_mask"] = ids[:, :length], mask[:, :length]
        loss_mask_BM = rows.get("loss_mask", rows["target_mask"])[:, : text["target"].shape[1]]
        return Batch(
            image_BHWC=self.normalize(rows["pixels"]),
            prompt_BL=text["prompt"],
            prompt_mask_BL=text["prompt_mask"],
            question_BL=text["question"],
            question_mask_BL=text["question_mask"],
            target_BM=text["target"],
            target_mask_BM=text["target_mask"],
            loss_mask_BM=loss_mask_BM,
            task_B=rows["task"],
            record_B=rows.get("record", np.arange(len(rows["task"]), dtype=np.int32)),
            boxes_BK4=rows.get("boxes"),
            boxes_mask_BK=rows.get("boxes_mask"),
            box_tokens_BKL=None if "box_tokens" not in rows else rows["box_tokens"][..., : text["question"].shape[1]],
            masks_BKHW=rows.get("masks"),
            masks_mask_BK=rows.get("masks_mask"),
            dataset_B=rows.get("part"),
            region_BKD=rows.get("regions"),
            region_mask_BK=rows.get("regions_mask"),
            state_BKS=rows.get("states"),
            object_mask_BKHW=rows.get("object_masks"),
            packed=_packed_text(rows),
            **self._sam_fields(rows),
        )

    def encode_input(self, sample: ImageTextInput, answer: str | None = None) -> dict[str, np.ndarray]:
        """The arrays of one input (see `encode_example`), with key "sam" if the config has a `sam_image_size`.

        With shots, "pixels" is (K, H, W, 3): the images of the shots, then the input's own. Earlier turns are written
        into the prompt with `processor.followup_template`, or merged into one question if that is empty. Raises
        UserError for an input with both shots and turns, and with shots for a model that reads regions.
        """
        if sample.shots and sample.turns:
            raise UserError("an input has both shots and turns, but may have shots or turns, not both")
        if sample.turns and not self.config.followup_template:
            sample = replace(sample, question=render_history(sample.turns, sample.question), turns=())
        if sample.shots and self.config.region_width:
            raise UserError("a model that reads regions takes no shots; give the question alone")
        image = images.to_pil_image(sample.image, max_pixels=self.config.max_pixels)
        arguments = (sample.question, sample.tags, answer, sample.category, sample.boxes, self.get_letterbox(image))
        prompt_format = PromptFormat(
            "", tuple(map(self._padded_shot, sample.shots)) or sample.turns, bool(sample.shots)
        )
        pixels = [self.load_pixels(source) for source, *_ in (*sample.shots, (image,))]
        context, row = self.spatial_context(sample.regions), self.load_sam_pixels(image)
        if sample.regions is not None:
            row |= self.encode_regions((sample.regions,), answer or "", np.random.default_rng(0))
        arguments = (self.stack_images(pixels), *arguments)
        encoded = self.encode_example(*arguments, prompt_format=prompt_format, context=context, slot_data=sample.slots)
        return encoded | row

    def _padded_shot(self, shot: tuple[object, str, str]) -> tuple[str, str]:
        """(question, answer) of an in-context example, with boxes as fractions of its image's padded square."""
        image, *texts = shot
        question, answer = (letterbox.pad_boxes(text, self.get_letterbox(image)) for text in texts)
        return question, answer

    def stack_images(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """The images of one example: (H, W, 3), or (K, H, W, 3) padded with mean-color images if `max_images` > 1."""
        c, num_images = self.config, max(self.config.max_images, len(pixels))
        if num_images == 1:
            return pixels[0]
        color = np.clip(np.round(255 * np.array(c.image_mean)), 0, 255).astype(np.uint8)
        blank = np.broadcast_to(color, pixels[0].shape)
        return np.stack([*pixels, *[blank] * (num_images - len(pixels))])

    def batch(
        self, inputs: Sequence[ImageTextInput], answers: Sequence[str] | None = None, length_buckets: Sequence[int] = ()
    ) -> Batch:
        """A `Batch` of inputs, with target answers if a loss is computed.

        Raises UserError for no inputs, for another number of answers, and for inputs with different numbers of shots.
        """
        if not inputs:
            raise UserError("the batch has no inputs; give at least one image and one question")
        targets = [None] * len(inputs) if answers is None else list(answers)
        if len(targets) != len(inputs):
            raise UserError(f"{len(targets)} answers were given for {len(inputs)} questions; give one each")
        if len(counts := {len(sample.shots) for sample in inputs}) > 1:
            raise UserError(f"inputs of one batch have {sorted(counts)} shots; give all the same number")
        rows = [self.encode_input(sample, answer) for sample, answer in zip(inputs, targets)]
        return self.collate({key: np.stack([row[key] for row in rows]) for key in rows[0]}, length_buckets)


def _packed_text(rows: dict[str, np.ndarray]) -> PackedText | None:
    fields = {f"{name.removeprefix('packed_')}_BL": ids for name, ids in rows.items() if name.startswith("packed_")}
    return PackedText(**fields) if fields else None


def _task_id(category: str) -> int:
    if category not in CATEGORIES:
        raise UserError(f"there is no category {category!r}; choose {' or '.join(CATEGORIES)}")
    return CATEGORIES.index(category)


def _pad_and_mask(ids: list[int], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    row, mask = np.full(length, pad, np.int32), np.zeros(length, np.int32)
    row[: len(ids)], mask[: len(ids)] = ids, 1
    return row, mask
