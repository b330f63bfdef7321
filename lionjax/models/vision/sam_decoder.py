# SPDX-License-Identifier: Apache-2.0
"""SAM's prompt encoder and mask decoder (arXiv 2304.02643), and postprocessing of its masks.

The image is encoded once for any number of prompts (points, boxes, masks, or other tokens). Coordinates of prompts are
pixels of the encoder's input, `SamConfig.image_size` a side.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from lionjax.core import sharding
from lionjax.core.sharding import with_logical_partitioning
from lionjax.core.weight_map import (
    Transform,
    WeightMapping,
    conv,
    conv_transpose,
    linear,
    squeeze,
    stack_tensors,
    with_prefix,
)
from lionjax.models.vision.sam_encoder import HF_NAMES, ImageEncoder, SamConfig, encoder_weight_map, pointwise_conv
from lionjax.nn import attention as attentions
from lionjax.nn.attention import Attention
from lionjax.nn.layers import (
    MLP,
    Dense,
    LayerNorm,
    PatchEmbed,
    StackedMLP,
    dense_weight_map,
    flatten_fan_in,
    gelu,
    norm_weight_map,
    normal,
    take_positions,
    zeros,
)

BACKGROUND, FOREGROUND, TOP_LEFT, BOTTOM_RIGHT = range(4)  # rows of the table of point types
NOT_A_POINT, PADDING = -1, -10  # further point labels
DECODE_GROUP_SIZE = 8  # see `Sam.decode_boxes`
FINAL_NORM_EPS = 1e-5  # of the last norm; `decoder_norm_eps` is that of all others


class PromptEncoder(nn.Module):
    """Tokens of points and boxes with random Fourier position encodings, and the dense embedding of mask prompts."""

    c: SamConfig

    def setup(self):
        c, position = self.c, ("position", "embed")
        self.waves = self.param("waves", with_logical_partitioning(normal(1.0), position), (2, c.prompt_embed_dim // 2))
        self.kinds = self.param("kinds", with_logical_partitioning(normal(1.0), position), (4, c.prompt_embed_dim))
        self.no_point = self.param(
            "no_point", with_logical_partitioning(normal(1.0), ("embed",)), (c.prompt_embed_dim,)
        )
        self.no_mask = self.param("no_mask", with_logical_partitioning(normal(1.0), ("embed",)), (c.prompt_embed_dim,))
        channels = c.mask_input_channels
        self.mask_1, self.mask_norm_1 = PatchEmbed(2, channels // 4, 1), LayerNorm(channels // 4, c.norm_eps)
        self.mask_2, self.mask_norm_2 = PatchEmbed(2, channels, channels // 4), LayerNorm(channels, c.norm_eps)
        self.mask_3 = Dense(c.mask_input_channels, c.prompt_embed_dim, ("embed", None))

    def position_encoding(self, xy_2):
        """Position encodings (..., C) in float32 of points (..., 2), x and y in 0..1."""
        angle = 2 * np.pi * ((2 * xy_2.astype(jnp.float32) - 1) @ self.waves.astype(jnp.float32))
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)

    def dense_position_encoding(self):
        """Position encodings (h, w, C) of the centers of the image embedding's positions."""
        center = (np.arange(self.c.grid_size, dtype=np.float32) + 0.5) / self.c.grid_size
        return self.position_encoding(jnp.asarray(np.stack(np.meshgrid(center, center), axis=-1)))

    def embed_points(self, point_BKT2, label_BKT):
        """Tokens (B, K, T, C) of points in pixels; labels: 1 foreground, 0 background, -1 no point, -10 padding."""
        token_BKTC = self.position_encoding((point_BKT2 + 0.5) / self.c.image_size)
        label_BKT1 = label_BKT[..., None]
        token_BKTC = jnp.where(label_BKT1 == NOT_A_POINT, self.no_point, token_BKTC)
        token_BKTC = jnp.where(label_BKT1 == PADDING, 0.0, token_BKTC)
        for kind in (BACKGROUND, FOREGROUND):
            token_BKTC = token_BKTC + jnp.where(label_BKT1 == kind, self.kinds[kind], 0.0)
        return token_BKTC

    def embed_boxes(self, box_BK4):
        """Two corner tokens (B, K, 2, C) for each box (x0, y0, x1, y1) in pixels."""
        corner_BK22 = (box_BK4.reshape(*box_BK4.shape[:-1], 2, 2) + 0.5) / self.c.image_size
        return self.position_encoding(corner_BK22) + self.kinds[TOP_LEFT:]

    def embed_mask(self, mask_BHW=None):
        """Dense prompt (B, h, w, C) of masks (B, 4 h, 4 w), or the learned embedding of no mask (1, h, w, C)."""
        if mask_BHW is None:
            return jnp.broadcast_to(self.no_mask, (1, self.c.grid_size, self.c.grid_size, self.c.prompt_embed_dim))
        x, side = mask_BHW[..., None], self.c.grid_size
        for scale, embed, norm in ((2, self.mask_1, self.mask_norm_1), (1, self.mask_2, self.mask_norm_2)):
            x = embed(x)
            x = gelu(norm(x.reshape(len(x), side * scale, side * scale, x.shape[-1])))
        return self.mask_3(x)

    def __call__(self, point_BKT2, label_BKT, box_BK4, mask_BHW):
        """Prompt tokens (B, K, T, C) and dense prompt (B or 1, h, w, C) of the prompts that are not None.

        Points without boxes get a further token of label -1, as in the original.
        """
        tokens = []
        if point_BKT2 is not None:
            if box_BK4 is None:
                padding = ((0, 0), (0, 0), (0, 1))
                label_BKT = jnp.pad(label_BKT, padding, constant_values=NOT_A_POINT)
                point_BKT2 = jnp.pad(point_BKT2, (*padding, (0, 0)))
            tokens.append(self.embed_points(point_BKT2, label_BKT))
        if box_BK4 is not None:
            tokens.append(self.embed_boxes(box_BK4))
        if not tokens:
            tokens.append(jnp.zeros((len(mask_BHW), 1, 0, self.c.prompt_embed_dim)))
        return jnp.concatenate(tokens, axis=2), self.embed_mask(mask_BHW)


class TwoWayAttentionBlock(nn.Module):
    """Self-attention of tokens, cross-attention to the image, feed-forward, cross-attention of the image to tokens."""

    c: SamConfig
    skip_first_layer_pe: bool

    @nn.compact
    def __call__(self, token_BTC, image_BPC, prompt_BTC, image_pe_PC):
        c = self.c

        def norm(name, x):
            return LayerNorm(c.prompt_embed_dim, c.decoder_norm_eps, name=name)(x)

        attention = make_attention(c, c.prompt_embed_dim, "self_attention")
        if self.skip_first_layer_pe:  # in the first block the tokens are the prompts: no residual, no encodings
            token_BTC = attention(token_BTC)
        else:
            query_BTC = token_BTC + prompt_BTC
            keys_values = attention.k(query_BTC), attention.v(token_BTC)
            token_BTC = token_BTC + attention.attend(attention.project_query(query_BTC), keys_values)
        token_BTC = norm("norm1", token_BTC)
        token_BTC = norm("norm2", token_BTC + cross_attend(c, "to_map", token_BTC, prompt_BTC, image_BPC, image_pe_PC))
        change = MLP(c.prompt_embed_dim, c.decoder_mlp_dim, "relu", name="mlp")(token_BTC)
        token_BTC = norm("norm3", token_BTC + change)
        image_BPC = norm(
            "norm4", image_BPC + cross_attend(c, "to_tokens", image_BPC, image_pe_PC, token_BTC, prompt_BTC)
        )
        return token_BTC, image_BPC


def make_attention(c: SamConfig, internal_dim: int, name: str) -> Attention:
    """Attention of width `internal_dim` over all heads."""
    return Attention(c.prompt_embed_dim, c.decoder_num_heads, internal_dim // c.decoder_num_heads, name=name)


def cross_attend(c: SamConfig, name: str, query, query_pe, source, source_pe):
    """Attention of `query` to `source` at half the width; position encodings are added to queries and keys only."""
    attention = make_attention(c, c.prompt_embed_dim // 2, name)
    keys_values = attention.k(source + source_pe), attention.v(source)
    return attention.attend(attention.project_query(query + query_pe), keys_values)


class ConvTranspose2x2(nn.Module):
    """Transposed convolution (B, h, w, C) -> (B, 2h, 2w, D) with kernel size and stride 2."""

    in_features: int
    features: int

    @nn.compact
    def __call__(self, x_BHWC):
        init = with_logical_partitioning(flatten_fan_in(normal(0.02)), ("conv", "conv", "embed", None))
        kernel = self.param("kernel", init, (2, 2, self.in_features, self.features)).astype(x_BHWC.dtype)
        bias = self.param("bias", with_logical_partitioning(zeros, (None,)), (self.features,)).astype(x_BHWC.dtype)
        batch, height, width, _ = x_BHWC.shape
        y = jnp.einsum("BHWC,ijCD->BHiWjD", x_BHWC, kernel)
        return y.reshape(batch, 2 * height, 2 * width, self.features) + bias


class MaskDecoder(nn.Module):
    """Mask logits (B, K, M, 4h, 4w) and predicted IoUs (B, K, M) of an image embedding and K prompts of T tokens."""

    c: SamConfig

    @nn.compact
    def __call__(self, image_embedding_BHWC, prompt_BKTC, image_pe_HWC):
        c, (batch, prompts) = self.c, prompt_BKTC.shape[:2]
        init = with_logical_partitioning(normal(1.0), ("position", "embed"))
        dtype = image_embedding_BHWC.dtype
        # The IoU token, then the mask tokens.
        output_SC = self.param("tokens", init, (1 + c.num_mask_tokens, c.prompt_embed_dim)).astype(dtype)
        output_BKSC = jnp.broadcast_to(output_SC, (batch, prompts, *output_SC.shape))
        token = jnp.concatenate([output_BKSC, prompt_BKTC.astype(dtype)], axis=2)
        token = prompt = token.reshape(batch * prompts, -1, c.prompt_embed_dim)
        image = jnp.repeat(image_embedding_BHWC.reshape(batch, -1, c.prompt_embed_dim), prompts, axis=0)
        image_pe_PC = image_pe_HWC.reshape(-1, c.prompt_embed_dim).astype(dtype)
        for n in range(c.decoder_depth):
            token, image = TwoWayAttentionBlock(c, n == 0, name=f"block_{n}")(token, image, prompt, image_pe_PC)
        token = token + cross_attend(c, "last", token, prompt, image, image_pe_PC)
        token = LayerNorm(c.prompt_embed_dim, FINAL_NORM_EPS, name="norm")(token)

        image = ConvTranspose2x2(c.prompt_embed_dim, c.prompt_embed_dim // 4, name="up_1")(
            image.reshape(-1, c.grid_size, c.grid_size, c.prompt_embed_dim)
        )
        image = gelu(LayerNorm(c.prompt_embed_dim // 4, c.norm_eps, name="up_norm")(image))
        image = gelu(ConvTranspose2x2(c.prompt_embed_dim // 4, c.prompt_embed_dim // 8, name="up_2")(image))
        widths = (c.prompt_embed_dim, c.prompt_embed_dim, c.prompt_embed_dim, c.prompt_embed_dim // 8)
        filter_RMC = StackedMLP(widths, c.num_mask_tokens, name="filters")(token[:, 1 : 1 + c.num_mask_tokens])
        logits = jnp.einsum("RMC,RHWC->RMHW", filter_RMC, image, preferred_element_type=jnp.float32)
        widths = (c.prompt_embed_dim, *(c.iou_head_mlp_dim,) * (c.iou_head_depth - 1), c.num_mask_tokens)
        iou = StackedMLP(widths, name="iou")(token[:, 0]).astype(jnp.float32)
        return logits.reshape(batch, prompts, *logits.shape[1:]), iou.reshape(batch, prompts, c.num_mask_tokens)


class Sam(nn.Module):
    """`encode` an image once, then `decode` prompts with its embedding; `__call__` does both."""

    c: SamConfig

    def setup(self):
        self.encoder, self.prompts, self.decoder = (ImageEncoder(self.c), PromptEncoder(self.c), MaskDecoder(self.c))

    def encode(self, image_BHWC):
        """Image embedding (B, h, w, C) of normalized images (B, S, S, 3), S = `image_size`."""
        return self.encoder(image_BHWC)

    def decode(self, image_embedding_BHWC, prompt_BKTC, dense_prompt_BHWC=None):
        """Mask logits (B, K, M, 4h, 4w) and IoUs (B, K, M); mask 0 is for clear prompts, others for ambiguous ones."""
        dense_prompt_BHWC = self.prompts.embed_mask() if dense_prompt_BHWC is None else dense_prompt_BHWC
        return self.decoder(
            image_embedding_BHWC + dense_prompt_BHWC.astype(image_embedding_BHWC.dtype),
            prompt_BKTC,
            self.prompts.dense_position_encoding(),
        )

    def decode_boxes(self, image_embedding_BHWC, box_BK4, extra_tokens_BKTC, valid_BK=None):
        """Mask logits (B, K, 4h, 4w) and IoUs (B, K) of boxes in pixels, with extra prompt tokens before their corners.

        `valid_BK`: see `decode_valid`.
        """
        prompt_BKTC = jnp.concatenate([extra_tokens_BKTC, self.prompts.embed_boxes(box_BK4)], axis=2)
        return self.decode_valid(image_embedding_BHWC, prompt_BKTC, valid_BK)

    def decode_valid(self, image_embedding_BHWC, prompt_BKTC, valid_BK=None):
        """Mask logits (B, K, 4h, 4w) and IoUs (B, K) of clear prompts of T tokens.

        With `valid_BK`, most masks of invalid prompts are not computed and are 0: rows on one device form G groups of
        up to `DECODE_GROUP_SIZE`, each group sorts its valid prompts first, the n-th prompts of all groups are decoded
        together, and an n without a valid prompt is skipped.
        """
        if valid_BK is None:
            logits_BKMHW, iou_BKM = self.decode(image_embedding_BHWC, prompt_BKTC)
            return logits_BKMHW[:, :, 0], iou_BKM[:, :, 0]
        (batch, count), side = valid_BK.shape, 4 * self.c.grid_size
        group_size = sharding.aligned_group_size(batch, DECODE_GROUP_SIZE)
        image_GRHWC = image_embedding_BHWC.reshape(-1, group_size, *image_embedding_BHWC.shape[1:])
        prompt_GNTC = prompt_BKTC.reshape(len(image_GRHWC), -1, *prompt_BKTC.shape[2:])
        valid_GN = valid_BK.reshape(prompt_GNTC.shape[:2])
        order_GN = jnp.argsort(~valid_GN, axis=1, stable=True)

        def decode_prompts(sam, n_G):
            image_GHWC = take_positions(image_GRHWC, n_G[:, None] // count)[:, 0]
            logits_G1MHW, iou_G1M = sam.decode(image_GHWC, take_positions(prompt_GNTC, n_G[:, None]))
            return logits_G1MHW[:, 0, 0], iou_G1M[:, 0, 0]

        def skip(sam, n_G):
            return jnp.zeros((len(n_G), side, side)), jnp.zeros((len(n_G),))

        def step(sam, _, n_G):
            any_valid = take_positions(valid_GN, n_G[:, None]).any()
            return None, nn.cond(any_valid, decode_prompts, skip, sam, n_G)

        # With remat, no intermediates are saved for the backward pass, which would be written for skipped steps too.
        scan = nn.scan(nn.remat(step), variable_broadcast="params", in_axes=1, out_axes=1)
        _, outputs = scan(self, None, order_GN)
        inverse_GN = jnp.argsort(order_GN, axis=1)
        logits_GNHW, iou_GN = (take_positions(x, inverse_GN) for x in outputs)
        return logits_GNHW.reshape(batch, count, side, side), iou_GN.reshape(batch, count)

    def __call__(self, image_BHWC, point_BKT2=None, label_BKT=None, box_BK4=None, mask_BHW=None):
        return self.decode(self.encode(image_BHWC), *self.prompts(point_BKT2, label_BKT, box_BK4, mask_BHW))


def bilinear_matrix(outputs: int, inputs: int) -> np.ndarray:
    """Matrix (outputs, inputs) of bilinear resizing along one axis, as torch's interpolate(align_corners=False)."""
    position = np.clip((np.arange(outputs) + 0.5) * inputs / outputs - 0.5, 0, inputs - 1)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(inputs)[None, :])).astype(np.float32)


def image_mask_logits(logits_BKHW, image_size: int, inner_B2, outer_B2, side: tuple[int, int]):
    """Mask logits (B, K, *side) of original images, from logits (B, K, h, w) of SAM's padded input, differentiable.

    `image_size`: side of SAM's input. `inner_B2`: height and width of each image in the upper left corner of it;
    `outer_B2`: those of its original, in the upper left corner of `side`. Beyond an original, logits are those of its
    edge. All are in pixels. As torch's interpolate to SAM's input, the cut, and interpolate to the original.
    """

    def matrix(axis: int):
        enlarge = bilinear_matrix(image_size, logits_BKHW.shape[2 + axis])
        inputs_B1, outputs_B1 = (size[:, axis : axis + 1].astype(jnp.float32) for size in (inner_B2, outer_B2))
        position_BY = (jnp.arange(side[axis]) + 0.5) * (inputs_B1 / outputs_B1) - 0.5
        position_BY = jnp.clip(position_BY, 0, inputs_B1 - 1)
        resize_BYS = jnp.maximum(0, 1 - jnp.abs(position_BY[..., None] - jnp.arange(image_size)))
        return resize_BYS @ enlarge

    return jnp.einsum("BYy,BKyx,BXx->BKYX", matrix(0), logits_BKHW.astype(jnp.float32), matrix(1))


def resize_mask_logits(logits_HW, size: int):
    """Mask logits (..., size, size) resized bilinearly from (..., h, h), differentiable."""
    matrix = bilinear_matrix(size, logits_HW.shape[-1])
    return jnp.einsum("Yy,...yx,Xx->...YX", matrix, logits_HW, matrix)


def postprocess_masks(
    logits_HW, image_size: int, pixel_rect: tuple[int, int, int, int], original_size: tuple[int, int]
) -> np.ndarray:
    """Mask logits (..., *original_size) of the original image, from logits (..., h, w) of SAM's padded input.

    `image_size`: side of SAM's input. `pixel_rect`: top, left, height and width of the image in it. `original_size`:
    height and width of the original image. All are in pixels. A pixel is in the mask if its logit is above 0.
    """
    logits_HW = np.asarray(logits_HW, np.float32)
    top, left, height, width = pixel_rect
    to_rows = bilinear_matrix(image_size, logits_HW.shape[-2])[top : top + height]
    to_columns = bilinear_matrix(image_size, logits_HW.shape[-1])[left : left + width]
    inside_HW = to_rows @ logits_HW @ to_columns.T
    return _resize_linear(_resize_linear(inside_HW, original_size[0], -2), original_size[1], -1)


def _resize_linear(array: np.ndarray, outputs: int, axis: int) -> np.ndarray:
    """`bilinear_matrix(outputs, inputs)` along one axis, without the matrix, which is large for long images."""
    inputs = array.shape[axis]
    position = np.clip((np.arange(outputs) + 0.5) * inputs / outputs - 0.5, 0, inputs - 1)
    low = position.astype(np.int64)
    weight = np.expand_dims(np.float32(position - low), -1) if axis == -2 else np.float32(position - low)
    high = np.minimum(low + 1, inputs - 1)
    return np.take(array, low, axis) * (1 - weight) + np.take(array, high, axis) * weight


def original_weight_map(c: SamConfig) -> tuple[WeightMapping, ...]:
    """Names of the original release (sam_vit_h_4b8939.pth)."""
    names = tuple(f"point_embeddings.{n}.weight" for n in range(4))
    prompts = (
        WeightMapping("pe_layer.positional_encoding_gaussian_matrix", "waves"),
        WeightMapping(names, "kinds", stack_tensors(squeeze)),
        *_prompt_encoder_weight_map(*(f"mask_downscaling.{n}" for n in (0, 1, 3, 4, 6))),
    )
    decoder = _mask_decoder_weight_map(
        c, "norm", "norm_final_attn", tuple(f"output_upscaling.{n}" for n in (0, 1, 3)), _original_mlp_layer_name
    )
    return (
        *with_prefix("image_encoder.", "encoder/", encoder_weight_map(c)),
        *with_prefix("prompt_encoder.", "prompts/", prompts),
        *with_prefix("mask_decoder.", "decoder/", decoder),
    )


def hf_weight_map(c: SamConfig) -> tuple[WeightMapping, ...]:
    """Names of Hugging Face's SamModel."""
    shared, names = "positional_embedding", tuple(f"point_embed.{n}.weight" for n in range(4))
    steps = ("conv1", "layer_norm1", "conv2", "layer_norm2", "conv3")
    prompts = (
        WeightMapping(names, "kinds", stack_tensors(squeeze)),
        *_prompt_encoder_weight_map(*(f"mask_embed.{step}" for step in steps)),
    )
    ups = ("upscale_conv1", "upscale_layer_norm", "upscale_conv2")
    decoder = _mask_decoder_weight_map(c, "layer_norm", "layer_norm_final_attn", ups, _hf_mlp_layer_name)
    tied_keys = (f"prompt_encoder.shared_embedding.{shared}",)
    return (
        WeightMapping(f"shared_image_embedding.{shared}", "prompts/waves", tied_keys=tied_keys),
        *with_prefix("vision_encoder.", "encoder/", encoder_weight_map(c, HF_NAMES)),
        *with_prefix("prompt_encoder.", "prompts/", prompts),
        *with_prefix("mask_decoder.", "decoder/", decoder),
    )


def _original_mlp_layer_name(n: int, num_layers: int) -> str:
    return f"layers.{n}"


def _hf_mlp_layer_name(n: int, num_layers: int) -> str:
    return "proj_in" if n == 0 else "proj_out" if n == num_layers - 1 else f"layers.{n - 1}"


def _prompt_encoder_weight_map(
    conv_1: str, norm_1: str, conv_2: str, norm_2: str, conv_3: str
) -> tuple[WeightMapping, ...]:
    return (
        WeightMapping("not_a_point_embed.weight", "no_point", squeeze),
        WeightMapping("no_mask_embed.weight", "no_mask", squeeze),
        WeightMapping(f"{conv_1}.weight", "mask_1/kernel", conv),
        WeightMapping(f"{conv_1}.bias", "mask_1/bias"),
        *norm_weight_map(norm_1, "mask_norm_1"),
        WeightMapping(f"{conv_2}.weight", "mask_2/kernel", conv),
        WeightMapping(f"{conv_2}.bias", "mask_2/bias"),
        *norm_weight_map(norm_2, "mask_norm_2"),
        WeightMapping(f"{conv_3}.weight", "mask_3/kernel", pointwise_conv),
        WeightMapping(f"{conv_3}.bias", "mask_3/bias"),
    )


def _mask_decoder_weight_map(
    c: SamConfig, norm_name: str, final_norm_name: str, upscale_names: tuple[str, ...], mlp_layer_name
) -> tuple[WeightMapping, ...]:
    def attention(torch, flax, internal_dim):
        names = {x: f"{torch}.{'out' if x == 'o' else x}_proj" for x in "qkvo"}
        mappings = attentions.weight_map(names, c.decoder_num_heads, internal_dim // c.decoder_num_heads, "qkvo")
        return with_prefix("", f"{flax}/", mappings)

    concatenate = Transform("one above others", lambda a, b: np.concatenate([a, b]), lambda w: (w[:1], w[1:]))
    rows = [WeightMapping(("iou_token.weight", "mask_tokens.weight"), "tokens", concatenate)]
    for n in range(c.decoder_depth):
        block = (
            *attention("self_attn", "self_attention", c.prompt_embed_dim),
            *attention("cross_attn_token_to_image", "to_map", c.prompt_embed_dim // 2),
            *attention("cross_attn_image_to_token", "to_tokens", c.prompt_embed_dim // 2),
            *(row for k in range(1, 5) for row in norm_weight_map(f"{norm_name}{k}", f"norm{k}")),
            *dense_weight_map("mlp.lin1", "mlp/up"),
            *dense_weight_map("mlp.lin2", "mlp/down"),
        )
        rows += with_prefix(f"transformer.layers.{n}.", f"block_{n}/", block)
    rows += with_prefix("transformer.", "", attention("final_attn_token_to_image", "last", c.prompt_embed_dim // 2))
    rows += norm_weight_map(f"transformer.{final_norm_name}", "norm")
    for flax, torch in (("up_1", upscale_names[0]), ("up_2", upscale_names[2])):
        rows += [
            WeightMapping(f"{torch}.weight", f"{flax}/kernel", conv_transpose),
            WeightMapping(f"{torch}.bias", f"{flax}/bias"),
        ]
    rows += norm_weight_map(upscale_names[1], "up_norm")
    for torch, flax, layers in (
        ("output_hypernetworks_mlps.{i}", "filters", 3),
        ("iou_prediction_head", "iou", c.iou_head_depth),
    ):
        for n in range(layers):
            name = f"{torch}.{mlp_layer_name(n, layers)}"
            rows += [
                WeightMapping(f"{name}.weight", f"{flax}/kernel_{n}", linear),
                WeightMapping(f"{name}.bias", f"{flax}/bias_{n}"),
            ]
    return tuple(rows)
