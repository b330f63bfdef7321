# SPDX-License-Identifier: Apache-2.0
"""Checks of a config and its batches before training starts; each raises UserError with one sentence."""

from __future__ import annotations

import numpy as np

from lionjax.core.experiment import Experiment
from lionjax.core.types import Batch, UserError


def check_boxes(model, batch: Batch) -> None:
    """Raise UserError unless each text of a batch of numpy arrays has one box in 0..1 for each of its location tokens.

    For loaders of one's own: inside a model a wrong count would go unseen. Rows that name no place may have boxes,
    which are then said in another way, as in digits.
    """
    token = model.info.box_token
    if token is None or batch.boxes_BK4 is None:
        return
    named_B = (np.concatenate([batch.prompt_BL, batch.target_BM], axis=1) == token).sum(axis=1)
    real_BK, most = np.asarray(batch.boxes_mask_BK).astype(bool), batch.boxes_mask_BK.shape[1]
    for row, (named, given) in enumerate(zip(named_B, real_BK.sum(axis=1))):
        if named > most:
            raise UserError(f"the text of row {row} names {named} regions; at most {most} are allowed")
        if named and named != given:
            raise UserError(f"the text of row {row} names {named} regions but has {given} boxes; give one each")
    box_RF = np.asarray(batch.boxes_BK4)[real_BK & (named_B > 0)[:, None]]
    good_R = ((box_RF >= 0) & (box_RF <= 1)).all(1) & (box_RF[:, 2:] > box_RF[:, :2]).all(1)
    if not good_R.all():
        wrong = [round(float(edge), 4) for edge in box_RF[~good_R][0]]
        raise UserError(f"the box {wrong} is none; give x0, y0, x1, y1 between 0 and 1 with x0 < x1 and y0 < y1")


def check_token_ids(experiment: Experiment, example: Batch) -> None:
    """Raises UserError where the data make words that the language model does not have, such as location tokens."""
    vocab, picture = experiment.model.info.vocab_size, experiment.model.info.image_token  # need not be a word
    written = (example.prompt_BL, example.target_BM)
    most = int(max(ids[ids != picture].max(initial=0) for ids in written))
    if vocab is not None and most >= vocab:
        raise UserError(
            f"the data make the token {most}, but the language model has {vocab}; raise model.language.vocab_size, "
            "or write places otherwise (data.processor.places)"
        )


def check_prompt_format(experiment: Experiment) -> None:
    """Raises UserError where the prompt template has a place for the image that nothing fills."""
    info, processor = experiment.model.info, getattr(experiment.data, "processor", None)
    if processor is None or not info.splices_images or "{image}" not in processor.template:
        return
    if processor.image_token is None and not processor.num_image_tokens:
        raise UserError(
            "processor.prompt_template has {image}, but this model has no image token and puts images before the text; "
            "remove {image} from the template, or set model.image_token_id"
        )
