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
from lionjax.core.sharding import sharded
from lionjax.core.weight_map import Op, Row, conv, conv_transpose, joined, linear, squeeze, under
from lionjax.models.vision.sam_encoder import HUGGING_FACE, ImageEncoder, SamConfig, encoder_rows, pointwise
from lionjax.nn import attention as attentions
from lionjax.nn.attention import Attention
from lionjax.nn.layers import (
    MLP,
    Dense,
    LayerNorm,
    PatchEmbed,
    dense_rows,
    flat_in,
    gelu,
    kaiming_uniform,
    norm_rows,
    normal,
    pick,
    zeros,
)

BACKGROUND, FOREGROUND, CORNER, OTHER_CORNER = range(4)  # rows of the table of point kinds
NOT_A_POINT, PADDING = -1, -10
ROWS_TOGETHER = 8  # see `Sam.point`
FINAL_EPS = 1e-5  # of the last norm, whatever the others' is


class Prompts(nn.Module):
    """Where a prompt points, as tokens of the decoder's width; places are told by waves of random directions."""

    c: SamConfig

    def setup(self):
        c, position = self.c, ("position", "embed")
        self.waves = self.param("waves", sharded(normal(1.0), position), (2, c.channels // 2))
        self.kinds = self.param("kinds", sharded(normal(1.0), position), (4, c.channels))
        self.no_point = self.param("no_point", sharded(normal(1.0), ("embed",)), (c.channels,))
        self.no_mask = self.param("no_mask", sharded(normal(1.0), ("embed",)), (c.channels,))
        narrow = c.mask_channels // 4
        self.mask_1, self.mask_norm_1 = PatchEmbed(2, narrow, 1), LayerNorm(narrow, c.eps)
        self.mask_2, self.mask_norm_2 = (PatchEmbed(2, c.mask_channels, narrow), LayerNorm(c.mask_channels, c.eps))
        self.mask_3 = Dense(c.mask_channels, c.channels, ("embed", None))

    def place(self, point_2):
        """(..., 2) x y in 0..1 -> (..., C), in float32."""
        angle = 2 * np.pi * ((2 * point_2.astype(jnp.float32) - 1) @ self.waves.astype(jnp.float32))
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)

    def grid(self):
        """The places of the map's cells, (h, w, C)."""
        middle = (np.arange(self.c.grid, dtype=np.float32) + 0.5) / self.c.grid
        return self.place(jnp.asarray(np.stack(np.meshgrid(middle, middle), axis=-1)))

    def points(self, point_BKT2, label_BKT):
        """Points in pixels with labels 1 (on the thing), 0 (beside it), -1 (no point), -10 (padding): (B, K, T, C)."""
        place_BKTC = self.place((point_BKT2 + 0.5) / self.c.image)
        label_BKT1 = label_BKT[..., None]
        place_BKTC = jnp.where(label_BKT1 == NOT_A_POINT, self.no_point, place_BKTC)
        place_BKTC = jnp.where(label_BKT1 == PADDING, 0.0, place_BKTC)
        for kind in (BACKGROUND, FOREGROUND):
            place_BKTC = place_BKTC + jnp.where(label_BKT1 == kind, self.kinds[kind], 0.0)
        return place_BKTC

    def boxes(self, box_BK4):
        """Boxes x0 y0 x1 y1 in pixels, as two tokens each: (B, K, 2, C)."""
        corner_BK22 = (box_BK4.reshape(*box_BK4.shape[:-1], 2, 2) + 0.5) / self.c.image
        return self.place(corner_BK22) + self.kinds[CORNER:]

    def mask(self, mask_BHW=None):
        """What is added to the map (B or 1, h, w, C): a mask of 4 h x 4 w given as a prompt, or the word for none."""
        if mask_BHW is None:
            return jnp.broadcast_to(self.no_mask, (1, self.c.grid, self.c.grid, self.c.channels))
        x, side = mask_BHW[..., None], self.c.grid
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
            tokens.append(self.points(point_BKT2, label_BKT))
        if box_BK4 is not None:
            tokens.append(self.boxes(box_BK4))
        if not tokens:
            tokens.append(jnp.zeros((len(mask_BHW), 1, 0, self.c.channels)))
        return jnp.concatenate(tokens, axis=2), self.mask(mask_BHW)


class TwoWay(nn.Module):
    """Tokens look at each other and at the map, are fed forward, and the map looks at the tokens."""

    c: SamConfig
    first: bool

    @nn.compact
    def __call__(self, token_BTC, map_BPC, prompt_BTC, grid_PC):
        c = self.c

        def norm(name, x):
            return LayerNorm(c.channels, c.decoder_eps, name=name)(x)

        own = cross_attention(c, c.channels, "self_attention")
        if self.first:  # nothing has been learned yet that could be kept: no residual, and prompts tell their places
            token_BTC = own(token_BTC)
        else:
            asking = token_BTC + prompt_BTC
            token_BTC = token_BTC + own.look(own.queries(asking), (own.k(asking), own.v(token_BTC)))
        token_BTC = norm("norm1", token_BTC)
        token_BTC = norm("norm2", token_BTC + between(c, "to_map", token_BTC, prompt_BTC, map_BPC, grid_PC))
        change = MLP(c.channels, c.decoder_hidden, "relu", name="mlp")(token_BTC)
        token_BTC = norm("norm3", token_BTC + change)
        map_BPC = norm("norm4", map_BPC + between(c, "to_tokens", map_BPC, grid_PC, token_BTC, prompt_BTC))
        return token_BTC, map_BPC


def cross_attention(c: SamConfig, inner: int, name: str) -> Attention:
    return Attention(c.channels, c.decoder_heads, inner // c.decoder_heads, name=name)


def between(c: SamConfig, name: str, asking, asking_place, asked, asked_place):
    """One side looks at the other: both tell their places, only what is seen does not. Half as wide inside."""
    attention = cross_attention(c, c.channels // 2, name)
    keys_values = attention.k(asked + asked_place), attention.v(asked)
    return attention.look(attention.queries(asking + asking_place), keys_values)


class Perceptron(nn.Module):
    """Dense layers with ReLU between them. With `stack`, so many side by side, along the last axis but one of x."""

    widths: tuple[int, ...]
    stack: int | None = None

    @nn.compact
    def __call__(self, x):
        lead = () if self.stack is None else (self.stack,)
        for n, (inputs, features) in enumerate(zip(self.widths, self.widths[1:])):
            axes = (None,) * len(lead)
            init = sharded(flat_in(kaiming_uniform) if lead else kaiming_uniform, (*axes, "embed", "mlp"))
            kernel = self.param(f"kernel_{n}", init, (*lead, inputs, features)).astype(x.dtype)
            bias = self.param(f"bias_{n}", sharded(zeros, (*axes, "mlp")), (*lead, features)).astype(x.dtype)
            x = jnp.einsum("...SI,SIO->...SO" if lead else "...I,IO->...O", x, kernel) + bias
            x = nn.relu(x) if n < len(self.widths) - 2 else x
        return x


class Upscale(nn.Module):
    """(B, h, w, C) -> (B, 2h, 2w, D): every cell becomes four (a transposed convolution of size and stride 2)."""

    inputs: int
    features: int

    @nn.compact
    def __call__(self, x_BHWC):
        init = sharded(flat_in(normal(0.02)), ("conv", "conv", "embed", None))
        kernel = self.param("kernel", init, (2, 2, self.inputs, self.features)).astype(x_BHWC.dtype)
        bias = self.param("bias", sharded(zeros, (None,)), (self.features,)).astype(x_BHWC.dtype)
        batch, high, wide, _ = x_BHWC.shape
        y = jnp.einsum("BHWC,ijCD->BHiWjD", x_BHWC, kernel)
        return y.reshape(batch, 2 * high, 2 * wide, self.features) + bias


class MaskDecoder(nn.Module):
    """A map (B, h, w, C) and K prompts of T tokens each -> mask logits (B, K, M, 4h, 4w), expected IoUs (B, K, M)."""

    c: SamConfig

    @nn.compact
    def __call__(self, map_BHWC, prompt_BKTC, grid_HWC):
        c, (batch, prompts) = self.c, prompt_BKTC.shape[:2]
        init = sharded(normal(1.0), ("position", "embed"))
        own_SC = self.param("tokens", init, (1 + c.masks, c.channels)).astype(map_BHWC.dtype)
        own_BKSC = jnp.broadcast_to(own_SC, (batch, prompts, *own_SC.shape))
        token = jnp.concatenate([own_BKSC, prompt_BKTC.astype(map_BHWC.dtype)], axis=2)
        token = prompt = token.reshape(batch * prompts, -1, c.channels)
        seen = jnp.repeat(map_BHWC.reshape(batch, -1, c.channels), prompts, axis=0)
        grid_PC = grid_HWC.reshape(-1, c.channels).astype(seen.dtype)
        for n in range(c.decoder_depth):
            token, seen = TwoWay(c, n == 0, name=f"block_{n}")(token, seen, prompt, grid_PC)
        token = token + between(c, "last", token, prompt, seen, grid_PC)
        token = LayerNorm(c.channels, FINAL_EPS, name="norm")(token)

        seen = Upscale(c.channels, c.channels // 4, name="up_1")(seen.reshape(-1, c.grid, c.grid, c.channels))
        seen = gelu(LayerNorm(c.channels // 4, c.eps, name="up_norm")(seen))
        seen = gelu(Upscale(c.channels // 4, c.channels // 8, name="up_2")(seen))
        widths = (c.channels, c.channels, c.channels, c.channels // 8)
        filter_RMC = Perceptron(widths, c.masks, name="filters")(token[:, 1 : 1 + c.masks])
        logits = jnp.einsum("RMC,RHWC->RMHW", filter_RMC, seen, preferred_element_type=jnp.float32)
        widths = (c.channels, *(c.iou_hidden,) * (c.iou_depth - 1), c.masks)
        iou = Perceptron(widths, name="iou")(token[:, 0]).astype(jnp.float32)
        return logits.reshape(batch, prompts, *logits.shape[1:]), iou.reshape(batch, prompts, c.masks)


class Sam(nn.Module):
    """`encode` a picture once, then `decode` prompts on it; `__call__` does both."""

    c: SamConfig

    def setup(self):
        self.encoder, self.prompts, self.decoder = (ImageEncoder(self.c), Prompts(self.c), MaskDecoder(self.c))

    def encode(self, image_BHWC):
        """(B, S, S, 3), normalised -> the map (B, h, w, C)."""
        return self.encoder(image_BHWC)

    def decode(self, map_BHWC, prompt_BKTC, added_BHWC=None):
        """Mask logits (B, K, M, 4h, 4w) and IoUs (B, K, M); mask 0 is for clear prompts, the others for vague ones."""
        added_BHWC = self.prompts.mask() if added_BHWC is None else added_BHWC
        return self.decoder(map_BHWC + added_BHWC.astype(map_BHWC.dtype), prompt_BKTC, self.prompts.grid())

    def point(self, map_BHWC, box_BK4, own_BKTC, asked_BK=None):
        """Mask logits (B, K, 4h, 4w) and IoUs (B, K) of boxes in pixels, with further tokens before them.

        What is not asked for (`asked_BK`) is not computed where that can be helped, and is then 0: a few rows on one
        device, G groups of R, put what they ask for first, and the n-th of each group are decoded together.
        """
        prompt_BKTC = jnp.concatenate([own_BKTC, self.prompts.boxes(box_BK4)], axis=2)
        if asked_BK is None:
            logits_BKMHW, iou_BKM = self.decode(map_BHWC, prompt_BKTC)
            return logits_BKMHW[:, :, 0], iou_BKM[:, :, 0]
        (batch, count), side = asked_BK.shape, 4 * self.c.grid
        together = sharding.rows_beside(batch, ROWS_TOGETHER)
        map_GRHWC = map_BHWC.reshape(-1, together, *map_BHWC.shape[1:])
        prompt_GNTC = prompt_BKTC.reshape(len(map_GRHWC), -1, *prompt_BKTC.shape[2:])
        asked_GN = asked_BK.reshape(prompt_GNTC.shape[:2])
        order_GN = jnp.argsort(~asked_GN, axis=1, stable=True)

        def decoded(sam, n_G):
            map_GHWC = pick(map_GRHWC, n_G[:, None] // count)[:, 0]
            logits_G1MHW, iou_G1M = sam.decode(map_GHWC, pick(prompt_GNTC, n_G[:, None]))
            return logits_G1MHW[:, 0, 0], iou_G1M[:, 0, 0]

        def nothing(sam, n_G):
            return jnp.zeros((len(n_G), side, side)), jnp.zeros((len(n_G),))

        def one(sam, _, n_G):
            wanted = pick(asked_GN, n_G[:, None]).any()
            return None, nn.cond(wanted, decoded, nothing, sam, n_G)

        # Remembering nothing for the backward pass also spares writing what was not computed.
        each = nn.scan(nn.remat(one), variable_broadcast="params", in_axes=1, out_axes=1)
        _, made = each(self, None, order_GN)
        back_GN = jnp.argsort(order_GN, axis=1)
        logits_GNHW, iou_GN = (pick(x, back_GN) for x in made)
        return logits_GNHW.reshape(batch, count, side, side), iou_GN.reshape(batch, count)

    def __call__(self, image_BHWC, point_BKT2=None, label_BKT=None, box_BK4=None, mask_BHW=None):
        return self.decode(self.encode(image_BHWC), *self.prompts(point_BKT2, label_BKT, box_BK4, mask_BHW))


def bilinear(outputs: int, inputs: int) -> np.ndarray:
    """The matrix (outputs, inputs) that resizes one axis bilinearly between pixel centres, as torch's interpolate."""
    place = np.clip((np.arange(outputs) + 0.5) * inputs / outputs - 0.5, 0, inputs - 1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(inputs)[None, :])).astype(np.float32)


def enlarge(logits_HW, pixels: int):
    """Mask logits (..., h, w) -> (..., pixels, pixels), differentiable."""
    matrix = bilinear(pixels, logits_HW.shape[-1])
    return jnp.einsum("Yy,...yx,Xx->...YX", matrix, logits_HW, matrix)


def to_picture(logits_HW, image: int, inside: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    """Mask logits (..., h, w) of a square of `image` pixels -> logits (..., high, wide) on the picture within it.

    `inside`: where the picture lies in the square, as top, left, high, wide in pixels; `size`: its own high and wide. A
    pixel belongs to the mask where its logit is above 0.
    """
    logits_HW = np.asarray(logits_HW, np.float32)
    top, left, high, wide = inside
    down = bilinear(size[0], high) @ bilinear(image, logits_HW.shape[-2])[top : top + high]
    across = bilinear(size[1], wide) @ bilinear(image, logits_HW.shape[-1])[left : left + wide]
    return down @ logits_HW @ across.T


def torch_rows(c: SamConfig) -> tuple[Row, ...]:
    """Names of the original release (sam_vit_h_4b8939.pth)."""
    names = tuple(f"point_embeddings.{n}.weight" for n in range(4))
    prompts = (
        Row("pe_layer.positional_encoding_gaussian_matrix", "waves"),
        Row(names, "kinds", joined(squeeze)),
        *_prompt_rows(*(f"mask_downscaling.{n}" for n in (0, 1, 3, 4, 6))),
    )
    decoder = _decoder_rows(c, "norm", "norm_final_attn", tuple(f"output_upscaling.{n}" for n in (0, 1, 3)), _numbered)
    return (
        *under("image_encoder.", "encoder/", encoder_rows(c)),
        *under("prompt_encoder.", "prompts/", prompts),
        *under("mask_decoder.", "decoder/", decoder),
    )


def hugging_face_rows(c: SamConfig) -> tuple[Row, ...]:
    """Names of Hugging Face's SamModel."""
    shared, names = "positional_embedding", tuple(f"point_embed.{n}.weight" for n in range(4))
    steps = ("conv1", "layer_norm1", "conv2", "layer_norm2", "conv3")
    prompts = (Row(names, "kinds", joined(squeeze)), *_prompt_rows(*(f"mask_embed.{step}" for step in steps)))
    ups = ("upscale_conv1", "upscale_layer_norm", "upscale_conv2")
    decoder = _decoder_rows(c, "layer_norm", "layer_norm_final_attn", ups, _in_and_out)
    also = (f"prompt_encoder.shared_embedding.{shared}",)
    return (
        Row(f"shared_image_embedding.{shared}", "prompts/waves", also=also),
        *under("vision_encoder.", "encoder/", encoder_rows(c, HUGGING_FACE)),
        *under("prompt_encoder.", "prompts/", prompts),
        *under("mask_decoder.", "decoder/", decoder),
    )


def _numbered(n: int, layers: int) -> str:
    return f"layers.{n}"


def _in_and_out(n: int, layers: int) -> str:
    return "proj_in" if n == 0 else "proj_out" if n == layers - 1 else f"layers.{n - 1}"


def _prompt_rows(conv_1: str, norm_1: str, conv_2: str, norm_2: str, conv_3: str) -> tuple[Row, ...]:
    return (
        Row("not_a_point_embed.weight", "no_point", squeeze),
        Row("no_mask_embed.weight", "no_mask", squeeze),
        Row(f"{conv_1}.weight", "mask_1/kernel", conv),
        Row(f"{conv_1}.bias", "mask_1/bias"),
        *norm_rows(norm_1, "mask_norm_1"),
        Row(f"{conv_2}.weight", "mask_2/kernel", conv),
        Row(f"{conv_2}.bias", "mask_2/bias"),
        *norm_rows(norm_2, "mask_norm_2"),
        Row(f"{conv_3}.weight", "mask_3/kernel", pointwise),
        Row(f"{conv_3}.bias", "mask_3/bias"),
    )


def _decoder_rows(c: SamConfig, norm: str, last_norm: str, ups: tuple[str, ...], layer) -> tuple[Row, ...]:
    def attention(theirs, ours, inner):
        names = {x: f"{theirs}.{'out' if x == 'o' else x}_proj" for x in "qkvo"}
        rows = attentions.torch_rows(names, c.decoder_heads, inner // c.decoder_heads, "qkvo")
        return under("", f"{ours}/", rows)

    one_above_others = Op("one above others", lambda a, b: np.concatenate([a, b]), lambda w: (w[:1], w[1:]))
    rows = [Row(("iou_token.weight", "mask_tokens.weight"), "tokens", one_above_others)]
    for n in range(c.decoder_depth):
        block = (
            *attention("self_attn", "self_attention", c.channels),
            *attention("cross_attn_token_to_image", "to_map", c.channels // 2),
            *attention("cross_attn_image_to_token", "to_tokens", c.channels // 2),
            *(row for k in range(1, 5) for row in norm_rows(f"{norm}{k}", f"norm{k}")),
            *dense_rows("mlp.lin1", "mlp/up"),
            *dense_rows("mlp.lin2", "mlp/down"),
        )
        rows += under(f"transformer.layers.{n}.", f"block_{n}/", block)
    rows += under("transformer.", "", attention("final_attn_token_to_image", "last", c.channels // 2))
    rows += norm_rows(f"transformer.{last_norm}", "norm")
    for name, theirs in (("up_1", ups[0]), ("up_2", ups[2])):
        rows += [Row(f"{theirs}.weight", f"{name}/kernel", conv_transpose), Row(f"{theirs}.bias", f"{name}/bias")]
    rows += norm_rows(ups[1], "up_norm")
    for theirs, ours, layers in (
        ("output_hypernetworks_mlps.{i}", "filters", 3),
        ("iou_prediction_head", "iou", c.iou_depth),
    ):
        for n in range(layers):
            name = f"{theirs}.{layer(n, layers)}"
            rows += [Row(f"{name}.weight", f"{ours}/kernel_{n}", linear), Row(f"{name}.bias", f"{ours}/bias_{n}")]
    return tuple(rows)
