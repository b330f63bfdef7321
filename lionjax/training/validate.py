# SPDX-License-Identifier: Apache-2.0
"""Checks of a config and its batches before training starts; each raises UserError with one sentence."""

from __future__ import annotations

import numpy as np

from lionjax.core.experiment import Experiment
from lionjax.core.types import Batch, UserError


def check_boxes(system, batch: Batch) -> None:
    """Raise UserError unless each text of a batch of numpy arrays has one box in 0..1 for each of its location tokens.

    For loaders of one's own: inside a model a wrong count would go unseen. Rows that name no place may have boxes,
    which are then said in another way, as in digits.
    """
    token = getattr(getattr(system, "places", None) or system, "location_token", None)
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


def check_words(experiment: Experiment, example: Batch) -> None:
    """Raises UserError where the data make words that the language model does not have, such as location tokens."""
    vocab = getattr(getattr(experiment.system, "language", None), "vocab", None)
    picture = getattr(experiment.system, "image_token", None)  # it need not be a word
    written = (example.prompt_BL, example.target_BM)
    most = int(max(ids[ids != picture].max(initial=0) for ids in written))
    if vocab is not None and most >= vocab:
        raise UserError(
            f"the data make the token {most}, but the language model has {vocab}; raise system.language.vocab, "
            "or write places otherwise (data.processor.places)"
        )


def check_prompts(experiment: Experiment) -> None:
    """Raises UserError where prompts are not written as the system reads them, which would train without a word."""
    system, written = experiment.system, getattr(experiment.data, "processor", None)
    encodes, token = getattr(system, "encodes", None), getattr(system, "image_token", None)
    if written is None:
        return
    wanted = {None: written.reader, True: "encoder", False: "decoder"}[encodes]
    if written.reader != wanted:
        raise UserError(f"processor.reader is {written.reader!r}, but the language model is one that wants {wanted!r}")
    if hasattr(system, "image_token") and written.image_token not in (None, token):
        raise UserError(
            f"processor.image_token is {written.image_token}, but system.image_token {token}; give both the same"
        )
    said = "{image}" in written.template
    if said and hasattr(system, "image_token") and written.image_token is None and not written.image_tokens:
        raise UserError(
            f"processor.template says {{image}}, but not what stands there; set processor.image_token to {token}"
        )
    if written.image_token is not None and not said:
        raise UserError(
            "processor.image_token is set, but processor.template says nowhere {image}; say where the picture stands"
        )
