# SPDX-License-Identifier: Apache-2.0
"""Images in place of the image tokens of a text (LLaVA)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def splice(text_BLD, mask_BL, is_image_BL, image_BKPD, prepend_image: bool):
    """Text with the k-th image of each row in place of its k-th image token.

    Returns embeddings (B, L + K P, D), right-padded, and their mask. `is_image_BL` marks the image tokens. A row
    without one has its images prepended if `prepend_image`, else it has none. Image tokens beyond the number of images
    are dropped.
    """
    rows, num_images, patches, width = image_BKPD.shape
    prepend_B1 = ~is_image_BL.any(axis=1, keepdims=True) & prepend_image
    is_image_BL = jnp.concatenate([prepend_B1, is_image_BL], axis=1)
    valid_BL = jnp.concatenate([prepend_B1, mask_BL], axis=1)
    text_BLD = jnp.pad(text_BLD, ((0, 0), (1, 0), (0, 0)))
    image_index_BL = jnp.cumsum(is_image_BL, axis=1) - 1
    span_BL = jnp.where(is_image_BL, patches * (image_index_BL < num_images), 1)
    span_BL = span_BL.at[:, 0].set(num_images * patches) * valid_BL  # output positions that each input token takes
    end_BL = jnp.cumsum(span_BL, axis=1)
    position_S = jnp.arange(mask_BL.shape[1] + num_images * patches)
    token_BS = jax.vmap(lambda end_L: jnp.searchsorted(end_L, position_S, side="right"))(end_BL)
    token_BS = jnp.minimum(token_BS, end_BL.shape[1] - 1)

    def of_token(x_BL):
        return jnp.take_along_axis(x_BL, token_BS, axis=1)

    patch_BS = of_token(image_index_BL) * patches + position_S - of_token(end_BL - span_BL)
    patch_BS = jnp.clip(patch_BS, 0, num_images * patches - 1)
    image_BPD = image_BKPD.reshape(rows, -1, width)
    x_BSD = jnp.where(
        of_token(is_image_BL)[..., None],
        jnp.take_along_axis(image_BPD, patch_BS[..., None], axis=1),
        jnp.take_along_axis(text_BLD, token_BS[..., None], axis=1),
    )
    return x_BSD, position_S < end_BL[:, -1:]
