# SPDX-License-Identifier: Apache-2.0
"""Where things are: boxes into the language model's space and back, and its states into prompts for masks (pix2emb).

A box stands in a text as two tokens. At the trigger the model's state is read as a box; the location token behind it
carries the box itself, as an embedding in place of a word's (NExT-Chat, arXiv 2311.04498, section 3).
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from lionjax.interfaces import UserError
from lionjax.layers import MLP, dense_rows
from lionjax.weight_rows import Row


class Locations(nn.Module):
    """Boxes x0 y0 x1 y1 in 0..1 <-> the language model's space, in float32: a thousandth of a picture counts."""

    width: int
    hidden: int

    def setup(self):
        self.encoder = MLP(4, self.hidden, "relu", features=self.width)
        self.decoder = MLP(self.width, self.hidden, "relu", features=4)

    def encode(self, box_BK4):
        """(..., 4) -> (..., D): the original's G."""
        return self.encoder(box_BK4.astype(jnp.float32))

    def decode(self, state_BKD):
        """(..., D) -> (..., 4): the original's F. Nothing keeps the numbers in 0..1 or in order."""
        return self.decoder(state_BKD.astype(jnp.float32))


class MaskPrompts(nn.Module):
    """A trigger's state as tokens for SAM's mask decoder: (..., D) -> (..., T, C)."""

    width: int
    tokens: int
    channels: int

    @nn.compact
    def __call__(self, state_BKD):
        mlp = MLP(self.width, self.width, "relu", features=self.tokens * self.channels, name="mlp")
        return mlp(state_BKD).reshape(*state_BKD.shape[:-1], self.tokens, self.channels)


def put(x_BLD, here_BL, piece_BKD):
    """x with the k-th piece of a row at the k-th marked place of that row."""
    place_BL = jnp.clip(jnp.cumsum(here_BL, axis=1) - 1, 0, piece_BKD.shape[1] - 1)
    spread_BLD = jnp.take_along_axis(piece_BKD.astype(x_BLD.dtype), place_BL[..., None], axis=1)
    return jnp.where(here_BL[..., None], spread_BLD, x_BLD)


def places(here_BL, count: int):
    """The first `count` marked places of each row: indices (B, K), and which of them are real (B, K)."""
    count = min(count, here_BL.shape[1])
    place_BK = jnp.argsort(~here_BL.astype(bool), axis=1, stable=True)[:, :count]
    return place_BK, jnp.take_along_axis(here_BL.astype(bool), place_BK, axis=1)


def pick(x_BLD, place_BK):
    """Rows of x at these places: (B, L, ...) -> (B, K, ...)."""
    return jnp.take_along_axis(
        x_BLD, place_BK.reshape(*place_BK.shape, *(1,) * (x_BLD.ndim - 2)), axis=1
    )


def check_boxes(ids_BL, location_token: int, box_BK4, mask_BK, name: str = "prompt") -> None:
    """Raise UserError unless each row has one box in 0..1 for each of its location tokens. For numpy arrays.

    Data and users meet the model here; inside it a wrong count would go unseen.
    """
    ids_BL, mask_BK = np.asarray(ids_BL), np.asarray(mask_BK).astype(bool)
    for row, (wanted, given) in enumerate(zip((ids_BL == location_token).sum(1), mask_BK.sum(1))):
        if wanted > mask_BK.shape[1]:
            raise UserError(
                f"the {name} of row {row} names {wanted} regions; at most {mask_BK.shape[1]} are allowed"
            )
        if wanted != given:
            raise UserError(
                f"the {name} of row {row} names {wanted} regions but has {given} boxes; give one each"
            )
    box_RF = np.asarray(box_BK4)[mask_BK]
    good_R = (
        ((box_RF >= 0) & (box_RF <= 1)).all(1)
        & (box_RF[:, 2] > box_RF[:, 0])
        & (box_RF[:, 3] > box_RF[:, 1])
    )
    if not good_R.all():
        wrong = [round(float(edge), 4) for edge in box_RF[~good_R][0]]
        raise UserError(
            f"the box {wrong} is none; give x0, y0, x1, y1 between 0 and 1 with x0 < x1 and y0 < y1"
        )


def location_rows() -> tuple[Row, ...]:
    """NExT-Chat's names of `Locations`."""
    pairs = (("loc_encoder", "encoder"), ("loc_decoder", "decoder"))
    layers = ((0, "up"), (2, "down"))
    return tuple(
        row
        for theirs, ours in pairs
        for n, x in layers
        for row in dense_rows(f"{theirs}.{n}", f"{ours}/{x}")
    )


def mask_prompt_rows() -> tuple[Row, ...]:
    """NExT-Chat's names of `MaskPrompts`."""
    return (*dense_rows("seg_prompt_mlp.0", "mlp/up"), *dense_rows("seg_prompt_mlp.2", "mlp/down"))
