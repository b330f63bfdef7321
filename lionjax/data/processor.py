# SPDX-License-Identifier: Apache-2.0
"""A picture and a question become arrays. The same way in training, in evaluation and in talk.

The picture is shrunk or padded to a square and normalised as CLIP's were; what becomes of the words stands in
`texts`. Texts are padded on the right to fixed lengths, so that nothing is compiled twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lionjax.core.types import CATEGORIES, Batch, UserError
from lionjax.data import images, letterbox
from lionjax.data.chat import DEFAULT_FORMAT, PromptFormat, render_history
from lionjax.data.images import Box
from lionjax.data.letterbox import Letterbox
from lionjax.data.prompt import CLIP_MEAN, CLIP_STD, NO_LETTERBOX, ProcessorConfig, PromptBuilder, strip_prompt

__all__ = ("CLIP_MEAN", "CLIP_STD", "ImageTextInput", "Processor", "ProcessorConfig")


@dataclass(frozen=True)
class ImageTextInput:
    """One thing to ask. `image`: a path, the bytes of a file, a PIL picture or a uint8 array."""

    image: object
    question: str
    tags: tuple[str, ...] = ()
    category: str = "image_level"
    boxes: tuple[Box, ...] = ()  # with all the decimals that the question does not write
    shots: tuple[tuple[object, str, str], ...] = ()  # picture, question and answer, shown before
    turns: tuple[tuple[str, str], ...] = ()  # what was asked and answered before of this picture


class Processor(PromptBuilder):
    """Turns pictures, prompts and answers into the arrays of a `Batch`."""

    def __reduce__(self):
        return Processor, (self.config,)

    # ------------------------------------------------------------------ pictures

    def load_pixels(self, source, crop: images.Box = images.FULL_IMAGE) -> np.ndarray:
        """A picture as uint8 (size, size, 3); see `pictures.as_picture` for what may be given."""
        c = self.config
        picture = images.to_pil_image(source, max_pixels=c.max_pixels)
        if not c.pad_to_square:
            return images.resize(picture, c.image_size, crop)
        if crop != images.FULL_IMAGE:
            width, height = picture.size
            edges = np.array(crop) * (width, height, width, height)
            picture = picture.crop(tuple(edges.round().astype(int).tolist()))
        color = letterbox.WHITE if c.pad_color == "white" else tuple(int(255 * m) for m in c.image_mean)
        return letterbox.letterbox_image(picture, c.image_size, color)

    def get_letterbox(self, source, crop: images.Box = images.FULL_IMAGE) -> Letterbox:
        """The square whose fractions the model's boxes are, of a picture or of a window of it."""
        if not self.config.pad_to_square:
            return NO_LETTERBOX
        width, height = images.to_pil_image(source, max_pixels=self.config.max_pixels).size
        across, down = crop[2] - crop[0], crop[3] - crop[1]
        return Letterbox(max(1, round(width * across)), max(1, round(height * down)))

    def load_sam_pixels(self, source) -> dict[str, np.ndarray]:
        """The picture for SAM, to stand in a row; nothing where no masks are made."""
        if not self.config.sam_image_size:
            return {}
        picture = images.to_pil_image(source, max_pixels=self.config.max_pixels)
        return {"sam": letterbox.letterbox_sam_image(picture, self.config.sam_image_size)}

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (..., 3) to float32: divided by 255, less the mean, by the deviation."""
        image = pixels.astype(np.float32)
        # A row of pixels at a time: three numbers at a time keep numpy busy with its own loop.
        rows = image.reshape(*pixels.shape[:-2], -1)
        mean, std = (np.tile(np.float32(c), pixels.shape[-2]) for c in (self.config.image_mean, self.config.image_std))
        rows /= np.float32(255)
        rows -= mean
        rows /= std
        return image

    def preprocess_image(self, source) -> np.ndarray:
        """A picture as a model reads it, float32 (size, size, 3)."""
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
    ) -> dict[str, np.ndarray]:
        """One example as arrays of fixed shape, which stack to what `assemble` reads.

        `boxes`, `square`, `how`: see `spell`. `size` is the picture's, for the way back. `form`: see there; its turns
        write their boxes in digits.
        """
        c, boxes = self.config, tuple(boxes)
        asked, asked_boxes = self.encode_with_boxes(strip_prompt(question), boxes, image_letterbox, box_format)
        said, said_boxes = (
            ([], []) if answer is None else self.encode_with_boxes(answer, boxes, image_letterbox, box_format)
        )
        end = "plain" if prompt_format.kind == "plain" else "answer"
        target = [] if answer is None else self.append_end(said, end)
        prompt, target, learned = self.build(question, asked, tags, target, prompt_format)
        pad = self.tokenizer.pad_id
        texts = {
            "prompt": _pad_and_mask(prompt, c.max_prompt_tokens, pad),
            "question": _pad_and_mask(
                self.encode_question(question), c.max_question_tokens, self.question_tokenizer.pad_id
            ),
            "target": _pad_and_mask(target, c.max_target_tokens, pad),
        }
        masks = {f"{name}_mask": mask for name, (_, mask) in texts.items()}
        masks["loss_mask"] = _pad_and_mask(learned, c.max_target_tokens, 0)[0]
        ids = {name: ids for name, (ids, _) in texts.items()}
        size = np.array((image_letterbox.width, image_letterbox.height), np.int32)
        row = {"pixels": pixels, "task": np.int32(_task_id(category)), "size": size, **ids, **masks}
        return row | self._pad_boxes([*asked_boxes, *said_boxes], box_format or c.box_format)

    def _pad_boxes(self, boxes: Sequence[Box], box_format: str) -> dict[str, np.ndarray]:
        most = self.config.max_boxes
        if box_format == "embeddings" and boxes and not most:
            raise UserError("places are no embeddings in this model (processor.max_boxes is 0)")
        if box_format == "embeddings" and len(boxes) > most:
            raise UserError(
                f"question and answer name {len(boxes)} regions where {most} are allowed; ask about fewer, "
                "or raise processor.max_boxes"
            )
        if not most:
            return {}
        box_K4, mask_K = np.zeros((most, 4), np.float32), np.zeros(most, np.int32)
        kept = boxes[:most]
        box_K4[: len(kept)], mask_K[: len(kept)] = np.reshape(kept, (-1, 4)), 1
        return {"boxes": box_K4, "boxes_mask": mask_K}

    def collate(self, rows: dict[str, np.ndarray], length_buckets: Sequence[int] = ()) -> Batch:
        """Stacked rows as a `Batch`. Texts are padded to the shortest of `buckets` that holds them all, if given."""
        text = {}
        for name in ("prompt", "question", "target"):
            ids, mask = rows[name], rows[f"{name}_mask"]
            longest = int(mask.sum(1).max(initial=1))
            length = min((b for b in length_buckets if b >= longest), default=ids.shape[1])
            text[name], text[f"{name}_mask"] = ids[:, :length], mask[:, :length]
        learned_BM = rows.get("loss_mask", rows["target_mask"])[:, : text["target"].shape[1]]
        return Batch(
            image_BHWC=self.normalize(rows["pixels"]),
            prompt_BL=text["prompt"],
            prompt_mask_BL=text["prompt_mask"],
            question_BL=text["question"],
            question_mask_BL=text["question_mask"],
            target_BM=text["target"],
            target_mask_BM=text["target_mask"],
            loss_mask_BM=learned_BM,
            task_B=rows["task"],
            record_B=rows.get("record", np.arange(len(rows["task"]), dtype=np.int32)),
            boxes_BK4=rows.get("boxes"),
            boxes_mask_BK=rows.get("boxes_mask"),
            masks_BKHW=rows.get("masks"),
            masks_mask_BK=rows.get("masks_mask"),
            dataset_B=rows.get("part"),
            sam_image_BHWC=(letterbox.normalize_sam_image(rows["sam"], rows["size"]) if "sam" in rows else None),
        )

    def encode_input(self, sample: ImageTextInput, answer: str | None = None) -> dict[str, np.ndarray]:
        """The row of one thing to ask, with the picture for SAM where masks may be wanted.

        With shots its pixels are (K, H, W, 3): theirs, then its own. Turns before it are part of the prompt: by
        `processor.followup_template`, or where there is none as one question.
        """
        if sample.shots and sample.turns:
            raise UserError("a question has shots or turns before it, not both")
        if sample.turns and not self.config.followup_template:
            sample = replace(sample, question=render_history(sample.turns, sample.question), turns=())
        picture = images.to_pil_image(sample.image, max_pixels=self.config.max_pixels)
        words = (sample.question, sample.tags, answer, sample.category, sample.boxes, self.get_letterbox(picture))
        form = PromptFormat(
            "", tuple((asked, said) for _, asked, said in sample.shots) or sample.turns, bool(sample.shots)
        )
        pixels = [self.load_pixels(source) for source, *_ in (*sample.shots, (picture,))]
        pixels = self.stack_images(pixels)
        return self.encode_example(pixels, *words, prompt_format=form) | self.load_sam_pixels(picture)

    def stack_images(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Pictures of a row as one array, (K, H, W, 3) where rows have several; what is left is blank."""
        c, many = self.config, max(self.config.max_images, len(pixels))
        if many == 1:
            return pixels[0]
        blank = np.broadcast_to(np.uint8([round(255 * mean) for mean in c.image_mean]), pixels[0].shape)
        return np.stack([*pixels, *[blank] * (many - len(pixels))])

    def batch(
        self, inputs: Sequence[ImageTextInput], answers: Sequence[str] | None = None, length_buckets: Sequence[int] = ()
    ) -> Batch:
        """A `Batch` of questions, with their answers when a loss is wanted."""
        if not inputs:
            raise UserError("there is nothing to ask; give at least one picture and one question")
        said = [None] * len(inputs) if answers is None else list(answers)
        if len(said) != len(inputs):
            raise UserError(f"{len(said)} answers were given for {len(inputs)} questions; give one each")
        if len(counts := {len(one.shots) for one in inputs}) > 1:
            raise UserError(f"questions of one batch have {sorted(counts)} shots; give each as many")
        rows = [self.encode_input(one, answer) for one, answer in zip(inputs, said)]
        return self.collate({key: np.stack([row[key] for row in rows]) for key in rows[0]}, length_buckets)


def _task_id(category: str) -> int:
    if category not in CATEGORIES:
        raise UserError(f"there is no category {category!r}; choose {' or '.join(CATEGORIES)}")
    return CATEGORIES.index(category)


def _pad_and_mask(ids: list[int], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    row, mask = np.full(length, pad, np.int32), np.zeros(length, np.int32)
    row[: len(ids)], mask[: len(ids)] = ids, 1
    return row, mask
