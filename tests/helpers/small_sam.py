# SPDX-License-Identifier: Apache-2.0
"""The sizes of a tiny SAM of transformers."""

SAM = {
    "vision_config": dict(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=64,
        patch_size=8,
        mlp_dim=48,
        window_size=3,
        global_attn_indexes=[1, 3],
        output_channels=16,
        num_pos_feats=8,
    ),
    "prompt_encoder_config": dict(hidden_size=16, image_size=64, patch_size=8, mask_input_channels=8),
    "mask_decoder_config": dict(hidden_size=16, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=12),
}
