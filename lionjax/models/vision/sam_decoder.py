# SPDX-License-Identifier: Apache-2.0
"""SAM's second half: prompts (points, boxes, masks, tokens from elsewhere) and the decoder that makes masks of them.

The picture is encoded once; any number of prompts is then answered from the same map. Pixels are those of the encoder's
square, `SamConfig.image` a side.
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
    dense_weight_map,
    flatten_fan_in,
    gelu,
    kaiming_uniform,
    norm_weight_map,
    normal,
    take_positions,
    zeros,
)

BACKGROUND, FOREGROUND, TOP_LEFT, BOTTOM_RIGHT = range(4)  # rows of the table of point kinds
NOT_A_POINT, PADDING = -1, -10
DECODE_GROUP_SIZE = 8  # see `Sam.point`
FINAL_NORM_EPS = 1e-5  # of the last norm, whatever the others' is


class PromptEncoder(nn.Module):
    """Where a prompt points, as tokens of the decoder's width; places are told by waves of random directions."""

    c: SamConfig

    def setup(self):
        c, position = self.c, ("position", "embed")
        self.waves = self.param("waves", with_logical_partitioning(normal(1.0), position), (2, c.prompt_embed_dim // 2))
        self.kinds = self.param("kinds", with_logical_partitioning(normal(1.0), position), (4, c.prompt_embed_dim))
        self.no_point = self.param(
            "no_point", with_logical_partitioning(normal(1.0), ("embed",)), (c.prompt_embed_dim,)
        )
        self.no_mask = self.param("no_mask", with_logical_partitioning(normal(1.0), ("embed",)), (c.prompt_embed_dim,))
        narrow = c.mask_input_channels // 4
        self.mask_1, self.mask_norm_1 = PatchEmbed(2, narrow, 1), LayerNorm(narrow, c.norm_eps)
        self.mask_2, self.mask_norm_2 = (
            PatchEmbed(2, c.mask_input_channels, narrow),
            LayerNorm(c.mask_input_channels, c.norm_eps),
        )
        self.mask_3 = Dense(c.mask_input_channels, c.prompt_embed_dim, ("embed", None))

    def position_encoding(self, xy_2):
        """(..., 2) x y in 0..1 -> (..., C), in float32."""
        angle = 2 * np.pi * ((2 * xy_2.astype(jnp.float32) - 1) @ self.waves.astype(jnp.float32))
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)

    def dense_position_encoding(self):
        """The places of the map's cells, (h, w, C)."""
        middle = (np.arange(self.c.grid_size, dtype=np.float32) + 0.5) / self.c.grid_size
        return self.position_encoding(jnp.asarray(np.stack(np.meshgrid(middle, middle), axis=-1)))

    def embed_points(self, point_BKT2, label_BKT):
        """Points in pixels with labels 1 (on the thing), 0 (beside it), -1 (no point), -10 (padding): (B, K, T, C)."""
        place_BKTC = self.position_encoding((point_BKT2 + 0.5) / self.c.image_size)
        label_BKT1 = label_BKT[..., None]
        place_BKTC = jnp.where(label_BKT1 == NOT_A_POINT, self.no_point, place_BKTC)
        place_BKTC = jnp.where(label_BKT1 == PADDING, 0.0, place_BKTC)
        for kind in (BACKGROUND, FOREGROUND):
            place_BKTC = place_BKTC + jnp.where(label_BKT1 == kind, self.kinds[kind], 0.0)
        return place_BKTC

    def embed_boxes(self, box_BK4):
        """Boxes x0 y0 x1 y1 in pixels, as two tokens each: (B, K, 2, C)."""
        corner_BK22 = (box_BK4.reshape(*box_BK4.shape[:-1], 2, 2) + 0.5) / self.c.image_size
        return self.position_encoding(corner_BK22) + self.kinds[TOP_LEFT:]

    def embed_mask(self, mask_BHW=None):
        """What is added to the map (B or 1, h, w, C): a mask of 4 h x 4 w given as a prompt, or the word for none."""
        if mask_BHW is None:
            return jnp.broadcast_to(self.no_mask, (1, self.c.grid_size, self.c.grid_size, self.c.prompt_embed_dim))
        x, side = mask_BHW[..., None], self.c.grid_size
        for scale, embed, norm in ((2, self.mask_1, self.mask_norm_1), (1, self.mask_2, self.mask_norm_2)):
            x = embed(x)
            x = gelu(norm(x.reshape(len(x), side * scale, side * scale, x.shape[-1])))
        return self.mask_3(x)

    def __call__(self, point_BKT2, label_BKT, box_BK4, mask_BHW):
        """Tokens (B, K, T, C) and map (B or 1, h, w, C) of what is given; points alone get an empty one behind."""
        tokens = []
        if point_BKT2 is not None:
            if box_BK4 is None:
                room = ((0, 0), (0, 0), (0, 1))
                label_BKT = jnp.pad(label_BKT, room, constant_values=NOT_A_POINT)
                point_BKT2 = jnp.pad(point_BKT2, (*room, (0, 0)))
            tokens.append(self.embed_points(point_BKT2, label_BKT))
        if box_BK4 is not None:
            tokens.append(self.embed_boxes(box_BK4))
        if not tokens:
            tokens.append(jnp.zeros((len(mask_BHW), 1, 0, self.c.prompt_embed_dim)))
        return jnp.concatenate(tokens, axis=2), self.embed_mask(mask_BHW)


class TwoWayAttentionBlock(nn.Module):
    """Tokens look at each other and at the map, are fed forward, and the map looks at the tokens."""

    c: SamConfig
    skip_first_layer_pe: bool

    @nn.compact
    def __call__(self, token_BTC, image_BPC, prompt_BTC, image_pe_PC):
        c = self.c

        def norm(name, x):
            return LayerNorm(c.prompt_embed_dim, c.decoder_norm_eps, name=name)(x)

        own = make_attention(c, c.prompt_embed_dim, "self_attention")
        if (
            self.skip_first_layer_pe
        ):  # nothing has been learned yet that could be kept: no residual, and prompts tell their places
            token_BTC = own(token_BTC)
        else:
            asking = token_BTC + prompt_BTC
            token_BTC = token_BTC + own.attend(own.project_query(asking), (own.k(asking), own.v(token_BTC)))
        token_BTC = norm("norm1", token_BTC)
        token_BTC = norm("norm2", token_BTC + cross_attend(c, "to_map", token_BTC, prompt_BTC, image_BPC, image_pe_PC))
        change = MLP(c.prompt_embed_dim, c.decoder_mlp_dim, "relu", name="mlp")(token_BTC)
        token_BTC = norm("norm3", token_BTC + change)
        image_BPC = norm(
            "norm4", image_BPC + cross_attend(c, "to_tokens", image_BPC, image_pe_PC, token_BTC, prompt_BTC)
        )
        return token_BTC, image_BPC


def make_attention(c: SamConfig, internal_dim: int, name: str) -> Attention:
    return Attention(c.prompt_embed_dim, c.decoder_num_heads, internal_dim // c.decoder_num_heads, name=name)


def cross_attend(c: SamConfig, name: str, query, query_pe, source, source_pe):
    """One side looks at the other: both tell their places, only what is seen does not. Half as wide inside."""
    attention = make_attention(c, c.prompt_embed_dim // 2, name)
    keys_values = attention.k(source + source_pe), attention.v(source)
    return attention.attend(attention.project_query(query + query_pe), keys_values)


class StackedMLP(nn.Module):
    """Dense layers with ReLU between them. With `stack`, so many side by side, along the last axis but one of x."""

    widths: tuple[int, ...]
    num_stacked: int | None = None

    @nn.compact
    def __call__(self, x):
        lead = () if self.num_stacked is None else (self.num_stacked,)
        for n, (inputs, features) in enumerate(zip(self.widths, self.widths[1:])):
            axes = (None,) * len(lead)
            init = with_logical_partitioning(
                flatten_fan_in(kaiming_uniform) if lead else kaiming_uniform, (*axes, "embed", "mlp")
            )
            kernel = self.param(f"kernel_{n}", init, (*lead, inputs, features)).astype(x.dtype)
            bias = self.param(f"bias_{n}", with_logical_partitioning(zeros, (*axes, "mlp")), (*lead, features)).astype(
                x.dtype
            )
            x = jnp.einsum("...SI,SIO->...SO" if lead else "...I,IO->...O", x, kernel) + bias
            x = nn.relu(x) if n < len(self.widths) - 2 else x
        return x


class ConvTranspose2x2(nn.Module):
    """(B, h, w, C) -> (B, 2h, 2w, D): every cell becomes four (a transposed convolution of size and stride 2)."""

    in_features: int
    features: int

    @nn.compact
    def __call__(self, x_BHWC):
        init = with_logical_partitioning(flatten_fan_in(normal(0.02)), ("conv", "conv", "embed", None))
        kernel = self.param("kernel", init, (2, 2, self.in_features, self.features)).astype(x_BHWC.dtype)
        bias = self.param("bias", with_logical_partitioning(zeros, (None,)), (self.features,)).astype(x_BHWC.dtype)
        batch, high, wide, _ = x_BHWC.shape
        y = jnp.einsum("BHWC,ijCD->BHiWjD", x_BHWC, kernel)
        return y.reshape(batch, 2 * high, 2 * wide, self.features) + bias


class MaskDecoder(nn.Module):
    """A map (B, h, w, C) and K prompts of T tokens each -> mask logits (B, K, M, 4h, 4w), expected IoUs (B, K, M)."""

    c: SamConfig

    @nn.compact
    def __call__(self, image_embedding_BHWC, prompt_BKTC, image_pe_HWC):
        c, (batch, prompts) = self.c, prompt_BKTC.shape[:2]
        init = with_logical_partitioning(normal(1.0), ("position", "embed"))
        own_SC = self.param("tokens", init, (1 + c.num_mask_tokens, c.prompt_embed_dim)).astype(
            image_embedding_BHWC.dtype
        )
        own_BKSC = jnp.broadcast_to(own_SC, (batch, prompts, *own_SC.shape))
        token = jnp.concatenate([own_BKSC, prompt_BKTC.astype(image_embedding_BHWC.dtype)], axis=2)
        token = prompt = token.reshape(batch * prompts, -1, c.prompt_embed_dim)
        seen = jnp.repeat(image_embedding_BHWC.reshape(batch, -1, c.prompt_embed_dim), prompts, axis=0)
        grid_PC = image_pe_HWC.reshape(-1, c.prompt_embed_dim).astype(seen.dtype)
        for n in range(c.decoder_depth):
            token, seen = TwoWayAttentionBlock(c, n == 0, name=f"block_{n}")(token, seen, prompt, grid_PC)
        token = token + cross_attend(c, "last", token, prompt, seen, grid_PC)
        token = LayerNorm(c.prompt_embed_dim, FINAL_NORM_EPS, name="norm")(token)

        seen = ConvTranspose2x2(c.prompt_embed_dim, c.prompt_embed_dim // 4, name="up_1")(
            seen.reshape(-1, c.grid_size, c.grid_size, c.prompt_embed_dim)
        )
        seen = gelu(LayerNorm(c.prompt_embed_dim // 4, c.norm_eps, name="up_norm")(seen))
        seen = gelu(ConvTranspose2x2(c.prompt_embed_dim // 4, c.prompt_embed_dim // 8, name="up_2")(seen))
        widths = (c.prompt_embed_dim, c.prompt_embed_dim, c.prompt_embed_dim, c.prompt_embed_dim // 8)
        filter_RMC = StackedMLP(widths, c.num_mask_tokens, name="filters")(token[:, 1 : 1 + c.num_mask_tokens])
        logits = jnp.einsum("RMC,RHWC->RMHW", filter_RMC, seen, preferred_element_type=jnp.float32)
        widths = (c.prompt_embed_dim, *(c.iou_head_mlp_dim,) * (c.iou_head_depth - 1), c.num_mask_tokens)
        iou = StackedMLP(widths, name="iou")(token[:, 0]).astype(jnp.float32)
        return logits.reshape(batch, prompts, *logits.shape[1:]), iou.reshape(batch, prompts, c.num_mask_tokens)


class Sam(nn.Module):
    """`encode` a picture once, then `decode` prompts on it; `__call__` does both."""

    c: SamConfig

    def setup(self):
        self.encoder, self.prompts, self.decoder = (ImageEncoder(self.c), PromptEncoder(self.c), MaskDecoder(self.c))

    def encode(self, image_BHWC):
        """(B, S, S, 3), normalised -> the map (B, h, w, C)."""
        return self.encoder(image_BHWC)

    def decode(self, image_embedding_BHWC, prompt_BKTC, dense_prompt_BHWC=None):
        """Mask logits (B, K, M, 4h, 4w) and IoUs (B, K, M); mask 0 is for clear prompts, the others for vague ones."""
        dense_prompt_BHWC = self.prompts.embed_mask() if dense_prompt_BHWC is None else dense_prompt_BHWC
        return self.decoder(
            image_embedding_BHWC + dense_prompt_BHWC.astype(image_embedding_BHWC.dtype),
            prompt_BKTC,
            self.prompts.dense_position_encoding(),
        )

    def decode_boxes(self, image_embedding_BHWC, box_BK4, extra_tokens_BKTC, valid_BK=None):
        """Mask logits (B, K, 4h, 4w) and IoUs (B, K) of boxes in pixels, with further tokens before them.

        What is not asked for (`asked_BK`) is not computed where that can be helped, and is then 0: a few rows on one
        device, G groups of R, put what they ask for first, and the n-th of each group are decoded together.
        """
        prompt_BKTC = jnp.concatenate([extra_tokens_BKTC, self.prompts.embed_boxes(box_BK4)], axis=2)
        if valid_BK is None:
            logits_BKMHW, iou_BKM = self.decode(image_embedding_BHWC, prompt_BKTC)
            return logits_BKMHW[:, :, 0], iou_BKM[:, :, 0]
        (batch, count), side = valid_BK.shape, 4 * self.c.grid_size
        together = sharding.aligned_group_size(batch, DECODE_GROUP_SIZE)
        map_GRHWC = image_embedding_BHWC.reshape(-1, together, *image_embedding_BHWC.shape[1:])
        prompt_GNTC = prompt_BKTC.reshape(len(map_GRHWC), -1, *prompt_BKTC.shape[2:])
        asked_GN = valid_BK.reshape(prompt_GNTC.shape[:2])
        order_GN = jnp.argsort(~asked_GN, axis=1, stable=True)

        def decoded(sam, n_G):
            map_GHWC = take_positions(map_GRHWC, n_G[:, None] // count)[:, 0]
            logits_G1MHW, iou_G1M = sam.decode(map_GHWC, take_positions(prompt_GNTC, n_G[:, None]))
            return logits_G1MHW[:, 0, 0], iou_G1M[:, 0, 0]

        def nothing(sam, n_G):
            return jnp.zeros((len(n_G), side, side)), jnp.zeros((len(n_G),))

        def one(sam, _, n_G):
            wanted = take_positions(asked_GN, n_G[:, None]).any()
            return None, nn.cond(wanted, decoded, nothing, sam, n_G)

        # Remembering nothing for the backward pass also spares writing what was not computed.
        each = nn.scan(nn.remat(one), variable_broadcast="params", in_axes=1, out_axes=1)
        _, made = each(self, None, order_GN)
        back_GN = jnp.argsort(order_GN, axis=1)
        logits_GNHW, iou_GN = (take_positions(x, back_GN) for x in made)
        return logits_GNHW.reshape(batch, count, side, side), iou_GN.reshape(batch, count)

    def __call__(self, image_BHWC, point_BKT2=None, label_BKT=None, box_BK4=None, mask_BHW=None):
        return self.decode(self.encode(image_BHWC), *self.prompts(point_BKT2, label_BKT, box_BK4, mask_BHW))


def bilinear_matrix(outputs: int, inputs: int) -> np.ndarray:
    """The matrix (outputs, inputs) that resizes one axis bilinearly between pixel centres, as torch's interpolate."""
    place = np.clip((np.arange(outputs) + 0.5) * inputs / outputs - 0.5, 0, inputs - 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(inputs)[None, :])).astype(np.float32)


def resize_mask_logits(logits_HW, size: int):
    """Mask logits (..., h, w) -> (..., pixels, pixels), differentiable."""
    matrix = bilinear_matrix(size, logits_HW.shape[-1])
    return jnp.einsum("Yy,...yx,Xx->...YX", matrix, logits_HW, matrix)


def postprocess_masks(
    logits_HW, image_size: int, pixel_rect: tuple[int, int, int, int], original_size: tuple[int, int]
) -> np.ndarray:
    """Mask logits (..., h, w) of a square of `image` pixels -> logits (..., high, wide) on the picture within it.

    `inside`: where the picture lies in the square, as top, left, high, wide in pixels; `size`: its own high and wide. A
    pixel belongs to the mask where its logit is above 0.
    """
    logits_HW = np.asarray(logits_HW, np.float32)
    top, left, high, wide = pixel_rect
    down = bilinear_matrix(original_size[0], high) @ bilinear_matrix(image_size, logits_HW.shape[-2])[top : top + high]
    across = (
        bilinear_matrix(original_size[1], wide) @ bilinear_matrix(image_size, logits_HW.shape[-1])[left : left + wide]
    )
    return down @ logits_HW @ across.T


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
    also = (f"prompt_encoder.shared_embedding.{shared}",)
    return (
        WeightMapping(f"shared_image_embedding.{shared}", "prompts/waves", tied_keys=also),
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
    def attention(theirs, ours, inner):
        names = {x: f"{theirs}.{'out' if x == 'o' else x}_proj" for x in "qkvo"}
        rows = attentions.weight_map(names, c.decoder_num_heads, inner // c.decoder_num_heads, "qkvo")
        return with_prefix("", f"{ours}/", rows)

    one_above_others = Transform("one above others", lambda a, b: np.concatenate([a, b]), lambda w: (w[:1], w[1:]))
    rows = [WeightMapping(("iou_token.weight", "mask_tokens.weight"), "tokens", one_above_others)]
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
    for name, theirs in (("up_1", upscale_names[0]), ("up_2", upscale_names[2])):
        rows += [
            WeightMapping(f"{theirs}.weight", f"{name}/kernel", conv_transpose),
            WeightMapping(f"{theirs}.bias", f"{name}/bias"),
        ]
    rows += norm_weight_map(upscale_names[1], "up_norm")
    for theirs, ours, layers in (
        ("output_hypernetworks_mlps.{i}", "filters", 3),
        ("iou_prediction_head", "iou", c.iou_head_depth),
    ):
        for n in range(layers):
            name = f"{theirs}.{mlp_layer_name(n, layers)}"
            rows += [
                WeightMapping(f"{name}.weight", f"{ours}/kernel_{n}", linear),
                WeightMapping(f"{name}.bias", f"{ours}/bias_{n}"),
            ]
    return tuple(rows)
