# SPDX-License-Identifier: Apache-2.0
"""Swin transformer (arXiv 2103.14030): stages of attention in windows, shifted in every second block.

Patch merging between stages halves the sides of the feature map and doubles its width. Attention has a learned
relative position bias. It is the image encoder of RAM and Grounding DINO.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lionjax.core.renamed import renamed_fields
from lionjax.core.sharding import with_logical_constraint, with_logical_partitioning
from lionjax.core.weight_map import (
    Transform,
    WeightMapping,
    constant,
    conv,
    merge_heads_kernel,
    split_fused,
    split_heads,
    split_heads_kernel,
    with_prefix,
)
from lionjax.nn import layers
from lionjax.nn.attention import Attention

PATCH_NORM_EPS = 1e-5  # of the norms before and between stages; `norm_eps` is that of all others


@renamed_fields()
@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """Config of a Swin. Each stage after the first has half the side and twice the width of the one before."""

    image_size: int | None = 224  # pixels a side; None: images of any size, as in detectors
    patch_size: int = 4
    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7  # positions a side
    mlp_ratio: float = 4.0  # hidden size of the feed-forward relative to the width
    attention_biases: str = "qkvo"
    norm_eps: float = 1e-5
    activation: str = "gelu"
    drop_path_rate: float = 0.1  # stochastic depth rate of the last block; it grows linearly from 0
    remat: str = "none"
    output_stages: tuple[int, ...] = ()  # of a backbone: stages with a norm behind their output; (): one final norm

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of each stage."""
        return tuple(self.width << stage for stage in range(len(self.depths)))

    def grid_size(self, stage: int) -> int | None:
        """Side of the feature map of a stage in positions, None if it depends on the image."""
        return None if self.image_size is None else -(-self.image_size // (self.patch_size << stage))

    def window_and_shift(self, stage: int) -> tuple[int, int]:
        """(side, shift) of the windows of a stage; a feature map that fits into one window has no shift."""
        grid = self.grid_size(stage)
        if grid is not None and grid <= self.window_size:
            return grid, 0
        return self.window_size, self.window_size // 2


# Backbones of Grounding DINO; Swin-B was trained with images of 384 px first, so its windows have 12 positions.
SWIN_T_DETECTOR = SwinConfig(image_size=None, output_stages=(1, 2, 3))
SWIN_B_DETECTOR = SwinConfig(
    image_size=None, width=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window_size=12, output_stages=(1, 2, 3)
)
SWIN_L_384 = SwinConfig(image_size=384, width=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window_size=12)


def relative_position_index(window_size: int) -> np.ndarray:
    """Row of the relative position bias table for each (query, key) pair of a window: (L, L) int64."""
    row_L, column_L = np.divmod(np.arange(window_size * window_size), window_size)
    rows_LL, columns_LL = (x[:, None] - x[None, :] + window_size - 1 for x in (row_L, column_L))
    return rows_LL * (2 * window_size - 1) + columns_LL


def shifted_window_mask(height: int, width: int, window_size: int, shift_size: int) -> np.ndarray:
    """Attention mask of the windows of a cyclically shifted feature map: (windows, L, L) bool.

    Positions that the shift moved to the opposite edge do not attend to the others of their window.
    """

    def region(size):
        position = np.arange(size)
        return (position >= size - window_size).astype(int) + (position >= size - shift_size)

    region_HW = region(height)[:, None] * 3 + region(width)[None, :]
    shape = (height // window_size, window_size, width // window_size, window_size)
    region_WL = region_HW.reshape(shape).transpose(0, 2, 1, 3).reshape(-1, window_size * window_size)
    return region_WL[:, :, None] == region_WL[:, None, :]


def drop_path(residual, rate, key):
    """Stochastic depth (arXiv 1603.09382): the residual, 0 for a fraction `rate` of the samples, else / (1 - rate)."""
    if key is None:
        return residual
    keep = jax.random.bernoulli(key, 1 - rate, (len(residual), *(1,) * (residual.ndim - 1)))
    return jnp.where(keep, residual / (1 - rate), 0).astype(residual.dtype)


class Block(nn.Module):
    """x += window attention(norm(x)); x += mlp(norm(x)); in windows shifted by half their side if `shifted`."""

    c: SwinConfig
    stage: int
    shifted: bool

    @nn.compact
    def __call__(self, x_BHWD, rate, key):
        c, width, heads = self.c, self.c.widths[self.stage], self.c.num_heads[self.stage]
        keys = layers.split_key(key, 2)
        change = self.window_attention(layers.LayerNorm(width, c.norm_eps, name="norm1")(x_BHWD), width, heads)
        x_BHWD = x_BHWD + drop_path(change, rate, keys[0])
        change = layers.MLP(width, int(width * c.mlp_ratio), c.activation, name="mlp")(
            layers.LayerNorm(width, c.norm_eps, name="norm2")(x_BHWD)
        )
        x_BHWD = x_BHWD + drop_path(change, rate, keys[1])
        return with_logical_constraint(x_BHWD, "batch", "length", "length", "act_embed")

    def window_attention(self, x_BHWD, width: int, num_heads: int):
        side, shift = self.c.window_and_shift(self.stage)
        shift *= self.shifted
        batch, height, columns, _ = x_BHWD.shape
        # Padding positions are keys too, as in the original, which does not mask them.
        x_BHWD = jnp.pad(x_BHWD, ((0, 0), (0, -height % side), (0, -columns % side), (0, 0)))
        shape, mask = x_BHWD.shape, None
        if shift:
            x_BHWD = jnp.roll(x_BHWD, (-shift, -shift), (1, 2))
            mask_WLL = shifted_window_mask(*shape[1:3], side, shift)
            mask = jnp.tile(mask_WLL, (batch, 1, 1))[:, None]
        init = with_logical_partitioning(layers.normal(0.02), ("position", "heads"))
        table_RN = self.param("places", init, ((2 * side - 1) ** 2, num_heads))
        bias_NLL = table_RN[relative_position_index(side)].transpose(2, 0, 1).astype(jnp.float32)
        attention = Attention(width, num_heads, width // num_heads, biases=self.c.attention_biases, name="attention")
        change_BLD = attention(layers.window_partition(x_BHWD, side), mask=mask, bias=bias_NLL[None])
        change_BHWD = layers.window_reverse(change_BLD, side, shape)
        if shift:
            change_BHWD = jnp.roll(change_BHWD, (shift, shift), (1, 2))
        return change_BHWD[:, :height, :columns]


class ShiftedPair(nn.Module):
    """A block with regular windows, then one with shifted windows."""

    c: SwinConfig
    stage: int

    @nn.compact
    def __call__(self, x_BHWD, layer):
        rates, key = layer
        keys = layers.split_key(key, 2)
        for n in range(2):
            x_BHWD = layers.remat_block(Block, self.c.remat)(self.c, self.stage, n == 1, name=f"block_{n}")(
                x_BHWD, rates[n], keys[n]
            )
        return x_BHWD, None


class SwinStage(nn.Module):
    """All blocks of one stage: scanned pairs, and one more block for an odd depth."""

    c: SwinConfig
    stage: int

    @nn.compact
    def __call__(self, x_BHWD, key):
        c, depths = self.c, self.c.depths
        pairs, odd = divmod(depths[self.stage], 2)
        first = sum(depths[: self.stage])
        rates = np.linspace(0, c.drop_path_rate, sum(depths), dtype=np.float32)
        rates = rates[first : first + depths[self.stage]]
        keys = layers.split_key(key, pairs + odd)
        if pairs:
            scan = layers.scan_blocks(ShiftedPair, pairs)
            pair_keys = None if key is None else keys[:pairs]
            scanned = (jnp.asarray(rates[: 2 * pairs].reshape(pairs, 2)), pair_keys)
            x_BHWD, _ = scan(c, self.stage, name="pairs")(x_BHWD, scanned)
        if odd:
            x_BHWD = layers.remat_block(Block, c.remat)(c, self.stage, False, name="tail")(x_BHWD, rates[-1], keys[-1])
        return x_BHWD


class PatchMerging(nn.Module):
    """Downsampling (B, H, W, D) -> (B, H/2, W/2, 2D): each 2 x 2 positions are concatenated and projected."""

    width: int

    @nn.compact
    def __call__(self, x_BHWD):
        height, width = x_BHWD.shape[1:3]
        x_BHWD = jnp.pad(x_BHWD, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        quarters = [x_BHWD[:, row::2, column::2] for column in range(2) for row in range(2)]
        x_BHWD = layers.LayerNorm(4 * self.width, PATCH_NORM_EPS, name="norm")(jnp.concatenate(quarters, -1))
        return layers.Dense(4 * self.width, 2 * self.width, ("embed", None), use_bias=False, name="narrow")(x_BHWD)


class Swin(nn.Module):
    """Normalized last feature map (B, P, D), row-major, and the feature maps (B, H', W', D') of all stages.

    With `output_stages`, the first is None and the maps are those of these stages, each behind its own norm. `key`
    drives stochastic depth. Raises ValueError for an image (B, H, W, 3) of another size than `image_size`.
    """

    c: SwinConfig

    @nn.compact
    def __call__(self, image_BHWC, key=None):
        c = self.c
        height, width = image_BHWC.shape[1:3]
        if c.image_size is not None and (height, width) != (c.image_size, c.image_size):
            raise ValueError(
                f"the image is {height} x {width} px, but image_size is {c.image_size}; resize the image, or set "
                "image_size=None for images of any size"
            )
        keys = layers.split_key(key, len(c.depths))
        padding = ((0, 0), (0, -height % c.patch_size), (0, -width % c.patch_size), (0, 0))
        x_BPD = layers.PatchEmbed(c.patch_size, c.width, name="patch")(jnp.pad(image_BHWC, padding))
        x_BPD = layers.LayerNorm(c.width, PATCH_NORM_EPS, name="patch_norm")(x_BPD)
        x_BHWD = x_BPD.reshape(-1, -(-height // c.patch_size), -(-width // c.patch_size), c.width)
        maps = []
        for stage in range(len(c.depths)):
            if stage:
                x_BHWD = PatchMerging(c.widths[stage - 1], name=f"merge_{stage - 1}")(x_BHWD)
            x_BHWD = SwinStage(c, stage, name=f"stage_{stage}")(x_BHWD, keys[stage])
            maps.append(x_BHWD)
        if c.output_stages:
            norms = {n: layers.LayerNorm(c.widths[n], c.norm_eps, name=f"norm_{n}") for n in c.output_stages}
            return None, tuple(norm(maps[n]) for n, norm in norms.items())
        last_BPD = x_BHWD.reshape(len(x_BHWD), -1, c.widths[-1])
        return layers.LayerNorm(c.widths[-1], c.norm_eps, name="norm")(last_BPD), tuple(maps)


def original_weight_map(c: SwinConfig) -> tuple[WeightMapping, ...]:
    """Names of the original code, also in RAM and Grounding DINO, with its buffers (position index, masks)."""

    def block(stage):
        heads, head = c.num_heads[stage], c.widths[stage] // c.num_heads[stage]
        kernel, bias = split_heads_kernel(heads, head), split_heads(heads, head)
        kernels, biases = (tuple(f"attention/{x}/{w}" for x in "qkv") for w in ("kernel", "bias"))
        rows = [
            WeightMapping("attn.relative_position_bias_table", "places"),
            WeightMapping("attn.qkv.weight", kernels, split_fused(kernel, kernel, kernel)),
            WeightMapping("attn.proj.weight", "attention/o/kernel", merge_heads_kernel(heads, head)),
            WeightMapping("attn.proj.bias", "attention/o/bias"),
            *layers.norm_weight_map("norm1", "norm1"),
            *layers.norm_weight_map("norm2", "norm2"),
            *layers.dense_weight_map("mlp.fc1", "mlp/up"),
            *layers.dense_weight_map("mlp.fc2", "mlp/down"),
        ]
        if "q" in c.attention_biases:
            rows.append(WeightMapping("attn.qkv.bias", biases, split_fused(bias, bias, bias)))
        return rows

    names = {"patch": "patch_embed.proj", "patch_norm": "patch_embed.norm", "norm": "norm"}
    names |= {f"norm_{stage}": f"norm{stage}" for stage in c.output_stages}
    return (*_weight_map(c, names, "layers.{}.", block), *_buffer_weight_map(c))


def hf_weight_map(c: SwinConfig) -> tuple[WeightMapping, ...]:
    """Names in files of Hugging Face's SwinModel."""

    def block(stage):
        heads, head = c.num_heads[stage], c.widths[stage] // c.num_heads[stage]
        rows = [
            WeightMapping("attention.self.relative_position_bias_table", "places"),
            WeightMapping("attention.output.dense.weight", "attention/o/kernel", merge_heads_kernel(heads, head)),
            WeightMapping("attention.output.dense.bias", "attention/o/bias"),
            *layers.norm_weight_map("layernorm_before", "norm1"),
            *layers.norm_weight_map("layernorm_after", "norm2"),
            *layers.dense_weight_map("intermediate.dense", "mlp/up"),
            *layers.dense_weight_map("output.dense", "mlp/down"),
        ]
        for x, name in (("q", "query"), ("k", "key"), ("v", "value")):
            torch, flax = f"attention.self.{name}", f"attention/{x}"
            rows.append(WeightMapping(f"{torch}.weight", f"{flax}/kernel", split_heads_kernel(heads, head)))
            if x in c.attention_biases:
                rows.append(WeightMapping(f"{torch}.bias", f"{flax}/bias", split_heads(heads, head)))
        return rows

    names = {"patch": "embeddings.patch_embeddings.projection", "patch_norm": "embeddings.norm", "norm": "layernorm"}
    names |= {f"norm_{stage}": f"hidden_states_norms.stage{stage + 1}" for stage in c.output_stages}
    return _weight_map(c, names, "encoder.layers.{}.", block)


def _weight_map(
    c: SwinConfig,
    torch_names: dict[str, str],
    layer_prefix: str,
    block_weight_map: Callable[[int], list[WeightMapping]],
) -> tuple[WeightMapping, ...]:
    """The mappings of patch embedding and norms by `torch_names`, and of all blocks by `block_weight_map(stage)`."""
    rows = [
        WeightMapping(f"{torch_names['patch']}.weight", "patch/kernel", conv),
        WeightMapping(f"{torch_names['patch']}.bias", "patch/bias"),
        *layers.norm_weight_map(torch_names["patch_norm"], "patch_norm"),
    ]
    for stage, depth in enumerate(c.depths):
        layer, (pairs, odd) = layer_prefix.format(stage), divmod(depth, 2)
        for n in range(2 if pairs else 0):
            name = f"{layer}blocks.{{2i+{n}<{pairs}}}."
            rows += with_prefix(name, f"stage_{stage}/pairs/block_{n}/", block_weight_map(stage))
        if odd:
            rows += with_prefix(f"{layer}blocks.{depth - 1}.", f"stage_{stage}/tail/", block_weight_map(stage))
        if stage + 1 < len(c.depths):
            rows += layers.norm_weight_map(f"{layer}downsample.norm", f"merge_{stage}/norm")
            rows += layers.dense_weight_map(f"{layer}downsample.reduction", f"merge_{stage}/narrow", bias=False)
    for norm in [f"norm_{stage}" for stage in c.output_stages] or ["norm"]:
        rows += layers.norm_weight_map(torch_names[norm], norm)
    return tuple(rows)


def _buffer_weight_map(c: SwinConfig) -> list[WeightMapping]:
    """Mappings of the original's buffers in its files: relative position indices and shifted-window masks."""
    rows = []
    for stage, depth in enumerate(c.depths):
        side, shift = c.window_and_shift(stage)
        grid = c.grid_size(stage)
        for n in range(depth):
            attention = f"layers.{stage}.blocks.{n}.attn"
            index = f"{attention}.relative_position_index"
            rows.append(constant(index, lambda side=side: relative_position_index(side)))
            if n % 2 and shift and grid is not None and grid % side == 0:
                rows.append(WeightMapping(f"{attention}_mask", (), _shifted_mask_transform(grid, side, shift)))
    return rows


def _shifted_mask_transform(grid: int, side: int, shift: int) -> Transform:
    """The mask that the original adds to the scores (0 or -100), in float32; in a file it may have 16 bits."""

    def mask():
        return np.where(shifted_window_mask(grid, grid, side, shift), np.float32(0), np.float32(-100))

    def to_flax(w):
        if not np.array_equal(w.astype(np.float32), mask()):
            raise ValueError(f"it differs from the mask of windows of {side} shifted by {shift} on {grid}")
        return ()

    return Transform("mask of shifted windows", to_flax, mask)
