# SPDX-License-Identifier: Apache-2.0
"""Names of Grounding DINO's weights: of the original code, of Lyrics' copy of it, and of Hugging Face's."""

from __future__ import annotations

from lionjax.core.weight_map import (
    WeightMapping,
    conv,
    linear,
    merge_heads_kernel,
    rename_torch_keys,
    split_fused,
    split_heads,
    split_heads_kernel,
    with_prefix,
)
from lionjax.models.language import bert
from lionjax.models.vision import swin
from lionjax.models.vision.grounding_dino_encoder import GroundingDinoConfig
from lionjax.nn import attention as attentions
from lionjax.nn import deformable_attention
from lionjax.nn.layers import dense_weight_map, norm_weight_map

# Lyrics (Fengshenbang-LM) wraps the backbone and names the scales of the fusion otherwise.
LYRICS_NAMES = (("backbone.0.", "backbone.swintransformer."), (".gamma_v", ".temp_v"), (".gamma_l", ".temp_l"))


def original_weight_map(c: GroundingDinoConfig) -> tuple[WeightMapping, ...]:
    """Names of IDEA-Research/GroundingDINO, with its buffers."""

    def attention(torch, flax, heads):
        kernel, bias = split_heads_kernel(heads, c.width // heads), split_heads(heads, c.width // heads)
        kernels, biases = (tuple(f"{flax}/{x}/{w}" for x in "qkv") for w in ("kernel", "bias"))
        return (
            WeightMapping(f"{torch}.in_proj_weight", kernels, split_fused(kernel, kernel, kernel)),
            WeightMapping(f"{torch}.in_proj_bias", biases, split_fused(bias, bias, bias)),
            WeightMapping(f"{torch}.out_proj.weight", f"{flax}/o/kernel", merge_heads_kernel(heads, c.width // heads)),
            WeightMapping(f"{torch}.out_proj.bias", f"{flax}/o/bias"),
        )

    names = {"image_norm": "layer_norm_v", "text_norm": "layer_norm_l", "image_scale": "gamma_v"}
    names |= {"text_scale": "gamma_l", "image_query": "attn.v_proj", "text_key": "attn.l_proj"}
    names |= {"image_value": "attn.values_v_proj", "text_value": "attn.values_l_proj"}
    names |= {"image_out": "attn.out_v_proj", "text_out": "attn.out_l_proj"}
    mlp = (*dense_weight_map("linear1", "mlp/up"), *dense_weight_map("linear2", "mlp/down"))
    two_norms = (*norm_weight_map("norm1", "norm1"), *norm_weight_map("norm2", "norm2"))
    text_layer = (*attention("self_attn", "attention", c.num_heads // 2), *two_norms, *mlp)
    deformable = deformable_attention.weight_map()
    image_layer = (*with_prefix("self_attn.", "attention/", deformable), *two_norms, *mlp)
    decoder_layer = (
        *attention("self_attn", "attention", c.num_heads),
        *attention("ca_text", "to_text", c.num_heads),
        *with_prefix("cross_attn.", "to_image/", deformable),
        *(*two_norms, *norm_weight_map("norm3", "norm3"), *norm_weight_map("catext_norm", "text_norm")),
        *mlp,
    )
    return (
        *with_prefix("backbone.0.", "swin/", swin.original_weight_map(c.swin)),
        *with_prefix("bert.", "text/", bert.weight_map(c.text)),
        *dense_weight_map("feat_map", "text_projection"),
        *_levels("input_proj", c),
        WeightMapping("transformer.level_embed", "level_embed"),
        WeightMapping("transformer.tgt_embed.weight", "queries"),
        *with_prefix("transformer.encoder.fusion_layers.{i}.", "enhancer/fusion/", _fusion(names, c)),
        *with_prefix("transformer.encoder.text_layers.{i}.", "enhancer/text/", text_layer),
        *with_prefix("transformer.encoder.layers.{i}.", "enhancer/image/", image_layer),
        *dense_weight_map("transformer.enc_output", "selection/dense"),
        *norm_weight_map("transformer.enc_output_norm", "selection/norm"),
        *_mlp("transformer.enc_out_bbox_embed", "selection/boxes", 3),
        *with_prefix("transformer.decoder.layers.{i}.", "decoder/", decoder_layer),
        *norm_weight_map("transformer.decoder.norm", "norm"),
        *_mlp("transformer.decoder.ref_point_head", "positions", 2),
        *_mlp("bbox_embed.0", "boxes", 3, _box_head_copies("transformer.decoder.bbox_embed", c)),
    )


def lyrics_weight_map(c: GroundingDinoConfig, prefix: str = "grounding_dino.") -> tuple[WeightMapping, ...]:
    """Names of the detector in checkpoints of Lyrics, with the prefix of its module there."""
    return with_prefix(prefix, "", rename_torch_keys(original_weight_map(c), *LYRICS_NAMES))


def hf_weight_map(c: GroundingDinoConfig) -> tuple[WeightMapping, ...]:
    """Names in files of Hugging Face's GroundingDinoForObjectDetection."""

    def attention(torch, flax, heads):
        letters = {"q": f"{torch}.query", "k": f"{torch}.key", "v": f"{torch}.value", "o": f"{torch}.out_proj"}
        return with_prefix("", f"{flax}/", attentions.weight_map(letters, heads, c.width // heads, "qkvo"))

    names = {"image_norm": "layer_norm_vision", "text_norm": "layer_norm_text", "image_scale": "vision_param"}
    names |= {"text_scale": "text_param", "image_query": "attn.vision_proj", "text_key": "attn.text_proj"}
    names |= {"image_value": "attn.values_vision_proj", "text_value": "attn.values_text_proj"}
    names |= {"image_out": "attn.out_vision_proj", "text_out": "attn.out_text_proj"}
    mlp = (*dense_weight_map("fc1", "mlp/up"), *dense_weight_map("fc2", "mlp/down"))
    deformable = deformable_attention.weight_map()
    layer = (
        *with_prefix("fusion_layer.", "fusion/", _fusion(names, c)),
        *with_prefix(
            "text_enhancer_layer.",
            "text/",
            (
                *attention("self_attn", "attention", c.num_heads // 2),
                *norm_weight_map("layer_norm_before", "norm1"),
                *norm_weight_map("layer_norm_after", "norm2"),
                *mlp,
            ),
        ),
        *with_prefix(
            "deformable_layer.",
            "image/",
            (
                *with_prefix("self_attn.", "attention/", deformable),
                *norm_weight_map("self_attn_layer_norm", "norm1"),
                *norm_weight_map("final_layer_norm", "norm2"),
                *mlp,
            ),
        ),
    )
    decoder_layer = (
        *attention("self_attn", "attention", c.num_heads),
        *norm_weight_map("self_attn_layer_norm", "norm2"),
        *attention("encoder_attn_text", "to_text", c.num_heads),
        *norm_weight_map("encoder_attn_text_layer_norm", "text_norm"),
        *with_prefix("encoder_attn.", "to_image/", deformable),
        *norm_weight_map("encoder_attn_layer_norm", "norm1"),
        *norm_weight_map("final_layer_norm", "norm3"),
        *mlp,
    )
    model = (
        *with_prefix("backbone.conv_encoder.model.", "swin/", swin.hf_weight_map(c.swin)),
        *with_prefix("text_backbone.", "text/", bert.weight_map(c.text)),
        *dense_weight_map("text_projection", "text_projection"),
        *_levels("input_proj_vision", c),
        WeightMapping("level_embed", "level_embed"),
        WeightMapping("query_position_embeddings.weight", "queries"),
        *with_prefix("encoder.layers.{i}.", "enhancer/", layer),
        *dense_weight_map("enc_output", "selection/dense"),
        *norm_weight_map("enc_output_norm", "selection/norm"),
        *_mlp("encoder_output_bbox_embed", "selection/boxes", 3),
        *with_prefix("decoder.layers.{i}.", "decoder/", decoder_layer),
        *norm_weight_map("decoder.layer_norm", "norm"),
        *_mlp("decoder.reference_points_head", "positions", 2),
    )
    boxes = _mlp("bbox_embed.0", "boxes", 3, _box_head_copies("model.decoder.bbox_embed", c))
    return (*with_prefix("model.", "", model), *boxes)


def _fusion(names: dict[str, str], c: GroundingDinoConfig) -> tuple[WeightMapping, ...]:
    """The mappings of one fusion layer, whose torch modules are `names` = {flax: torch}."""
    heads, head = c.num_heads // 2, c.mlp_dim // c.num_heads
    rows = [WeightMapping(names[flax], flax) for flax in ("image_scale", "text_scale")]
    for flax in ("image_norm", "text_norm"):
        rows += norm_weight_map(names[flax], flax)
    for flax in ("image_query", "text_key", "image_value", "text_value"):
        rows.append(WeightMapping(f"{names[flax]}.weight", f"{flax}/kernel", split_heads_kernel(heads, head)))
        rows.append(WeightMapping(f"{names[flax]}.bias", f"{flax}/bias", split_heads(heads, head)))
    for flax in ("image_out", "text_out"):
        rows.append(WeightMapping(f"{names[flax]}.weight", f"{flax}/kernel", merge_heads_kernel(heads, head)))
        rows.append(WeightMapping(f"{names[flax]}.bias", f"{flax}/bias"))
    return tuple(rows)


def _levels(torch: str, c: GroundingDinoConfig) -> list[WeightMapping]:
    """The mappings of the projections and norms of all levels."""
    rows = []
    for level in range(c.num_levels):
        projection, norm = f"levels/projection_{level}", f"levels/norm_{level}"
        rows.append(WeightMapping(f"{torch}.{level}.0.weight", f"{projection}/kernel", conv))
        rows.append(WeightMapping(f"{torch}.{level}.0.bias", f"{projection}/bias"))
        rows += norm_weight_map(f"{torch}.{level}.1", norm)
    return rows


def _mlp(torch: str, flax: str, depth: int, copies: tuple[str, ...] = ()) -> list[WeightMapping]:
    """The mappings of a StackedMLP of `depth` layers; `copies` are torch modules that hold the same weights."""
    rows = []
    for n in range(depth):
        for name, param, transform in (("weight", "kernel", {"transform": linear}), ("bias", "bias", {})):
            tied = tuple(f"{copy}.layers.{n}.{name}" for copy in copies)
            rows.append(WeightMapping(f"{torch}.layers.{n}.{name}", f"{flax}/{param}_{n}", tied_keys=tied, **transform))
    return rows


def _box_head_copies(decoder_name: str, c: GroundingDinoConfig) -> tuple[str, ...]:
    """The other modules with the weights of bbox_embed.0: those of the other layers, and the decoder's."""
    layers = range(c.decoder_depth)
    return (*(f"bbox_embed.{n}" for n in layers[1:]), *(f"{decoder_name}.{n}" for n in layers))
