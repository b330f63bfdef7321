# SPDX-License-Identifier: Apache-2.0
"""The config of `data.processor.Processor`: image size, token lengths, prompt templates and tokenizers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from lionjax.core.errors import check_finite, check_ranges
from lionjax.core.renamed import renamed_fields
from lionjax.core.types import SentenceSlots, UserError
from lionjax.data import images
from lionjax.data.box_text import PackingConfig
from lionjax.data.image_fit import ImageFit

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@renamed_fields()
@dataclass(frozen=True)
class ProcessorConfig:
    """Image size, token lengths, prompt templates and tokenizers. Raises UserError for values outside their range.

    `tokenizer` (language model) and `question_tokenizer` (Q-Former, detector): `"tiny"`, `"tiny_wordpiece"`, or a local
    folder with tokenizer files, such as T5's and BERT's in LION. `max_*_tokens` include the end token; a
    longer answer is cut and has none. `use_tags` puts LION's tag prompt before the question.
    `pad_to_square`: the image is padded to a square, in which boxes are fractions; else it is stretched. `pad_color`:
    "white" as in NExT-Chat, or "mean" (the mean color) as in LLaVA-1.5. `image_fit`: how images are resized.
    `prompt_tokenization`: "whole" tokenizes template, question and answers as one text between special ids, with the
    start and end tokens that the tokenizer's own files name, as the original systems do (see `data.whole_prompt`);
    "parts" strips each part of the template and the question and tokenizes it alone.
    `reader`: with "encoder" the prompt ends in an end token; with "decoder" it begins with the start token, if the
    tokenizer has one, and the answer follows in the same sequence. `prompt_template` is the text around {question}; at
    {image} it gets `num_image_tokens` image tokens, or the one `image_token` of a model that expands it itself
    (with both: that many of this id).
    `shot_end` ends the answer of an in-context example (OpenFlamingo: <|endofchunk|>; empty: nothing), `answer_end` any
    other answer, and `caption_end` a caption without a question (both empty: the end token).
    `followup_template` is the template of later questions about the same image; empty: all turns are merged into one
    question. `max_images`: images per example; missing ones are filled with blank images that no token refers to.
    `box_format`: how the model writes boxes, see `data.boxes`. `location_bins_per_side`: location tokens per side of
    the grid (Kosmos-2: 32; 0: no location tokens); their ids are the tokenizer's own if it has Kosmos-2's, else they
    follow its vocabulary. `max_boxes`: boxes per example as arrays. `sam_image_size`: pixels per side of SAM's image
    and masks; `sam_padding`: the image lies in the center of that square (NExT-Chat) or in its upper left corner (SAM,
    LISA). `mask_token`: the tokenizer's token at which an answer has a mask, with box format "masks".
    `detects_phrases`: the question is a detector's caption, and boxes come with the tokens that name them (see
    `data.detection`). `region_width`: width of the region features that the model reads (0: none), which a refiner kept
    with the data; at most `max_regions` of an image are read, the kept boxes and the strongest queries first.
    `regions_digest`: of the refiner that must have made them; empty: any. `packing`: boxes and caption are packed as
    text for the first stage of Lyrics; None: not. `spatial_text_in_prompt`: the refiner's boxes stand as text before
    the question (not in Lyrics' released code). `slots`: those of states and objects that a sentence may have (see
    `data.sentences`); None: `<state>` and `<obj_1>` are text. `detects_phrases`, `region_width`, `slots` and, unless
    given, `packing` are set by the model that needs them.
    """

    image_size: int = 224
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    tokenizer: str = "tiny"
    question_tokenizer: str = "tiny"
    max_prompt_tokens: int = 128
    max_question_tokens: int = 128
    max_target_tokens: int = 128
    use_tags: bool = True
    max_pixels: int = images.MAX_PIXELS
    pad_to_square: bool = False
    pad_color: Literal["white", "mean"] = "white"
    image_fit: ImageFit = ImageFit()
    reader: Literal["encoder", "decoder"] = "encoder"
    prompt_tokenization: Literal["parts", "whole"] = "parts"
    prompt_template: str = "{question}"
    num_image_tokens: int = 0
    image_token: int | None = None
    shot_end: str = ""
    answer_end: str = ""
    caption_end: str = ""
    followup_template: str = ""
    max_images: int = 1
    box_format: Literal["digits", "bins", "embeddings", "masks"] = "digits"
    location_bins_per_side: int = 0
    max_boxes: int = 0
    sam_image_size: int = 0
    sam_padding: Literal["center", "corner"] = "center"
    mask_token: str = "[SEG]"
    detects_phrases: bool = False
    region_width: int = 0
    max_regions: int = 900
    regions_digest: str = ""
    packing: PackingConfig | None = None
    spatial_text_in_prompt: bool = False
    slots: SentenceSlots | None = None

    def __post_init__(self):
        lengths = (
            *("image_size", "max_prompt_tokens", "max_question_tokens", "max_target_tokens"),
            *("max_pixels", "max_images", "max_regions"),
        )
        for field in lengths:
            if getattr(self, field) < 1:
                raise UserError(f"processor.{field} is {getattr(self, field)}; give at least 1")
        counts = ("num_image_tokens", "location_bins_per_side", "max_boxes", "sam_image_size", "region_width")
        check_ranges(self, "processor.", **dict.fromkeys(counts, ">= 0"), image_std="> 0")
        check_finite(self, "processor.")
        placeholders = set(re.findall(r"{(\w+)}", self.prompt_template + self.followup_template))
        if unknown := sorted(placeholders - {"question", "image"}):
            raise UserError(
                f"a processor template contains {{{unknown[0]}}}; only {{question}} and {{image}} are allowed"
            )
        if self.prompt_template.count("{question}") != 1 or self.prompt_template.count("{image}") > 1:
            raise UserError(
                f"processor.prompt_template is {self.prompt_template!r}; "
                "it needs {question} once and {image} at most once"
            )
        if self.followup_template and (
            self.followup_template.count("{question}") != 1 or "{image}" in self.followup_template
        ):
            raise UserError(
                f"processor.followup_template is {self.followup_template!r}; it needs {{question}} once, no {{image}}"
            )
        if self.prompt_tokenization == "whole" and self.use_tags:
            raise UserError(
                "processor.prompt_tokenization is 'whole', which has no tag prompt; set processor.use_tags to false or "
                "prompt_tokenization to 'parts'"
            )
        if self.box_format in ("embeddings", "masks") and not self.max_boxes:
            raise UserError(
                f"processor.box_format is {self.box_format!r}, but processor.max_boxes is 0; set it to at least 1"
            )
        if self.box_format == "bins" and not self.location_bins_per_side:
            raise UserError(
                "processor.box_format is 'bins', but processor.location_bins_per_side is 0; "
                "set it to at least 1 (Kosmos-2: 32)"
            )
        if self.sam_image_size and self.sam_padding == "center" and not self.pad_to_square:
            raise UserError(
                "processor.sam_image_size needs processor.pad_to_square; set it to true, as SAM's image is square, or "
                "processor.sam_padding to 'corner'"
            )
