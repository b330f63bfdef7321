# SPDX-License-Identifier: Apache-2.0
"""The LION release: one checkpoint of the trained weights beside its frozen parts."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from lionjax.convert.formats.checkpoint_format import Published, Source, abstract, read_settings
from lionjax.convert.formats.hf_language import T5
from lionjax.convert.formats.hf_vision import EVA_IGNORES
from lionjax.convert.formats.lavis import EVA_FILE
from lionjax.convert.io.reader import TORCH_SUFFIXES, Tensors, open_weights
from lionjax.core import config as configs
from lionjax.core.types import UserError
from lionjax.core.weight_map import same_numbers

LION_FILE = re.compile(r"(?i)lion|xx?l_stage3_learnable\.")  # the second is what its makers called it


def _lion_file(folder: Path) -> Path | None:
    files = [f for f in folder.iterdir() if f.suffix in TORCH_SUFFIXES and LION_FILE.match(f.name)]
    return files[0] if len(files) == 1 else None


def _open_lion(path: Path) -> Source:
    """LION's three parts in one folder. The trained part alone does not make a model."""
    folder = path if path.is_dir() else path.parent
    trained, eva = _lion_file(folder), folder / EVA_FILE
    towers = [f.parent for f in folder.glob("*/config.json") if read_settings(f).get("model_type") == "t5"]
    if trained is None or not eva.is_file() or len(towers) != 1:
        raise UserError(
            f"{folder} wants the three parts of a LION: LION-FlanT5-XL.pth (or XXL), eva_vit_g.pth, and one "
            "folder with the FlanT5 of the same size"
        )
    vision = open_weights(eva).under("visual_encoder.")
    language = open_weights(towers[0]).under("t5_model.")
    tensors = _without_copies(open_weights(trained), language) | vision | language
    return Source(_LION, _lion_config(read_settings(towers[0] / "config.json"), tensors), tensors, towers[0])


def _without_copies(trained: Tensors, language: Tensors) -> Tensors:
    """The trained part without its copies of T5's word table, which its saver left in by mistake, as bfloat16."""
    table, kept, left = language.get("t5_model.shared.weight"), {}, dict(trained.left)
    for name, array in trained.items():
        if re.fullmatch(r"t5_model\.(encoder|decoder)\.embed_tokens\.weight", name) and table is not None:
            if not same_numbers(table, array):
                raise UserError(f"{name!r} of {trained.sources[0]} is not the word table of this FlanT5")
            left[name] = "a copy of t5_model.shared.weight"
        else:
            kept[name] = array
    return Tensors(kept, trained.sources, left)


def _lion_config(t5_settings: dict, tensors: Tensors) -> Any:
    """The released sizes, around this T5 and with adapters as wide as they are in the file."""
    from lionjax.models.connectors.qformer import AggregatorConfig, QFormerConfig
    from lionjax.models.vision.vit import EVA_VIT_G
    from lionjax.models.vlm.lion import Lion
    from lionjax.nn.adapters import AdapterConfig

    shape = re.compile(r".*adapter\.adapters\.([0-9])\.down_proj\.weight")
    downs = {int(found[1]): w for name, w in tensors.items() if (found := shape.fullmatch(name))}
    if 0 not in downs or downs[0].ndim != 2:
        raise UserError("the trained file holds no adapters, so it is no LION")
    adapters = AdapterConfig(downs[0].shape[0], len(downs))
    language = dataclasses.replace(T5.config(t5_settings), activation="gelu", adapters=adapters)
    return Lion(EVA_VIT_G, QFormerConfig(), AggregatorConfig(), language)


# LION first: a folder with its files also holds a T5.
_LION = Published(
    "lion",
    ("lion",),
    lambda c: type(c).__name__ == "Lion",
    config=lambda settings: configs.from_json(json.dumps(settings["system"])),
    settings=lambda c: {"model_type": "lion", "system": json.loads(configs.to_json(c))},
    rows=lambda c: c.torch_rows(),
    abstract=abstract,
    ignore=(r"visual_encoder\." + EVA_IGNORES, r"Qformer\.cls\..*(?#heads of its first stage)"),
)
