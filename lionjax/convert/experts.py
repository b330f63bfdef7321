# SPDX-License-Identifier: Apache-2.0
"""Published models that tell a system what they see: Swin as a folder of Hugging Face, and the tagger RAM."""

from __future__ import annotations

import json
from typing import Any

from lionjax import config as configs
from lionjax.convert.published import Published, abstract_of_picture, refuse_unless
from lionjax.interfaces import Params

RAM_FILE = "ram_swin_large_14m.pth"  # as everybody calls it; it tells nothing of itself


def _swin_config(s: dict) -> Any:
    """Where a setting is missing transformers means that of the tiny Swin."""
    from lionjax.vision.swin import SwinConfig

    act, sizes = s.get("hidden_act", "gelu"), (s.get("image_size", 224), s.get("patch_size", 4))
    refuse_unless(act in ("gelu", "relu"), f"hidden_act {act!r}", "gelu or relu")
    refuse_unless(all(type(size) is int for size in sizes), f"image and patch sizes {sizes}", "squares")
    refuse_unless(not s.get("use_absolute_embeddings"), "absolute positions", "a Swin with relative ones")
    return SwinConfig(
        *sizes,
        s.get("embed_dim", 96),
        tuple(s.get("depths", (2, 2, 6, 2))),
        tuple(s.get("num_heads", (3, 6, 12, 24))),
        s.get("window_size", 7),
        float(s.get("mlp_ratio", 4.0)),
        "qkvo" if s.get("qkv_bias", True) else "o",
        s.get("layer_norm_eps", 1e-5),
        act,
        float(s.get("drop_path_rate", 0.1)),
    )


def _swin_settings(c: Any) -> dict:
    return {
        "architectures": ["SwinModel"],
        "model_type": "swin",
        "image_size": c.image,
        "patch_size": c.patch,
        "embed_dim": c.width,
        "depths": list(c.depths),
        "num_heads": list(c.heads),
        "window_size": c.window,
        "mlp_ratio": c.ratio,
        "qkv_bias": "q" in c.biases,
        "layer_norm_eps": c.eps,
        "hidden_act": c.activation,
        "drop_path_rate": c.drop_path,
    }


def _swin_rows(c: Any) -> tuple:
    from lionjax.vision import swin
    from lionjax.weight_rows import under

    return under("swin.", "", swin.hugging_face_rows(c))


def _swin_abstract(c: Any, mesh: Any = None) -> Params:
    from lionjax.vision.swin import Swin

    return abstract_of_picture(Swin(c), c.image, mesh)


def _ram_config(s: dict) -> Any:
    """The released file says nothing of its sizes. Our own files say everything."""
    from lionjax.vision import ram

    return configs.from_json(json.dumps(s["system"])) if "system" in s else ram.RAM_SWIN_L


def _ram_rows(c: Any) -> tuple:
    from lionjax.vision import ram

    return ram.torch_rows(c)


def _ram_abstract(c: Any, mesh: Any = None) -> Params:
    from lionjax.vision.ram import Ram

    return abstract_of_picture(Ram(c), c.swin.image, mesh)


SWIN = Published(
    "swin",
    ("swin",),
    lambda c: type(c).__name__ == "SwinConfig",
    _swin_config,
    _swin_settings,
    _swin_rows,
    _swin_abstract,
    # Older files hold the index of places, many a head for ImageNet's classes or for hidden patches.
    ignore=(
        r"swin\.encoder\..*\.relative_position_index(?#it is computed)",
        r"swin\.embeddings\.mask_token(?#for training)",
        r"(classifier|decoder)\..*(?#heads)",
    ),
    base="swin.",
)
RAM = Published(
    "ram",
    ("ram",),
    lambda c: type(c).__name__ == "RamConfig",
    _ram_config,
    lambda c: {"model_type": "ram", "system": json.loads(configs.to_json(c))},
    _ram_rows,
    _ram_abstract,
    # What wrote captions while it was trained.
    ignore=(
        r"(?!visual_encoder\.|image_proj\.|label_embed$|wordvec_proj\.|tagging_head\.|fc\.).*(?#it writes captions)",
    ),
    # Its first name.
    complete=lambda config, tensors, folder: tensors.respelled((r"^vision_multi\.", "tagging_head.")),
)
EXPERTS = (SWIN, RAM)
