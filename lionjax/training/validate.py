# SPDX-License-Identifier: Apache-2.0
"""Checks of a config and an example batch before training starts; each raises UserError."""

from __future__ import annotations

import numpy as np

from lionjax.core.experiment import Experiment
from lionjax.core.types import Batch, UserError
from lionjax.training.step import model_for_stage


def check_boxes(model, batch: Batch) -> None:
    """Raises UserError unless each row of a batch of numpy arrays has one valid box in 0..1 per box token in its text.

    Meant for custom data loaders, because the jitted model cannot detect a wrong number. Rows without box tokens may
    have boxes, for example where boxes are written as digits.
    """
    token = model.info.box_token
    if token is None or batch.boxes_BK4 is None:
        return
    tokens_B = (np.concatenate([batch.prompt_BL, batch.target_BM], axis=1) == token).sum(axis=1)
    valid_BK, max_boxes = np.asarray(batch.boxes_mask_BK).astype(bool), batch.boxes_mask_BK.shape[1]
    for row, (num_tokens, num_boxes) in enumerate(zip(tokens_B, valid_BK.sum(axis=1))):
        if num_tokens > max_boxes:
            raise UserError(f"the text of row {row} has {num_tokens} box tokens; at most {max_boxes} are allowed")
        if num_tokens and num_tokens != num_boxes:
            raise UserError(
                f"the text of row {row} has {num_tokens} box tokens and {num_boxes} boxes; give one box per token"
            )
    box_RF = np.asarray(batch.boxes_BK4)[valid_BK & (tokens_B > 0)[:, None]]
    good_R = ((box_RF >= 0) & (box_RF <= 1)).all(1) & (box_RF[:, 2:] > box_RF[:, :2]).all(1)
    if not good_R.all():
        box = [round(float(edge), 4) for edge in box_RF[~good_R][0]]
        raise UserError(f"the box {box} is invalid; give x0, y0, x1, y1 in 0..1 with x0 < x1 and y0 < y1")


def check_token_ids(experiment: Experiment, example: Batch) -> None:
    """Raises UserError if the example has token ids outside the vocabulary, such as added box or location tokens."""
    vocab_size, image_token = experiment.model.info.vocab_size, experiment.model.info.image_token
    texts = (example.prompt_BL, example.target_BM)
    # The image token is replaced by image embeddings and may lie outside the vocabulary.
    max_id = int(max(ids[ids != image_token].max(initial=0) for ids in texts))
    if vocab_size is not None and max_id >= vocab_size:
        raise UserError(
            f"the data contain token id {max_id}, but the language model's vocabulary has {vocab_size} tokens; raise "
            "model.language.vocab_size, or set another data.processor.box_format"
        )


def check_prompt_format(experiment: Experiment) -> None:
    """Raises UserError if the prompt template has {image} but the model has no image token to put there."""
    info, processor = experiment.model.info, getattr(experiment.data, "processor", None)
    if processor is None or not info.splices_images or "{image}" not in processor.prompt_template:
        return
    if processor.image_token is None and not processor.num_image_tokens:
        raise UserError(
            "processor.prompt_template has {image}, but this model has no image token and puts images before the text; "
            "remove {image} from the template, or set model.image_token_id"
        )


def check_example_rows(experiment: Experiment) -> None:
    """Raises UserError for a stage with several examples in a row whose model reads one."""
    for stage in experiment.stages:
        if stage.examples_per_row > 1 and model_for_stage(experiment, stage).info.row_layout is None:
            raise UserError(
                f"stage {stage.name!r}: examples_per_row is {stage.examples_per_row}, but this model learns from one "
                "example in a row: several need a decoder-only language model without adapters, and no Q-Former that "
                "reads the question, no regions and no masks; set examples_per_row to 1"
            )
