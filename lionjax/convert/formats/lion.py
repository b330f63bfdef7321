# SPDX-License-Identifier: Apache-2.0
"""The released LION (arXiv 2311.11860): one file of trained weights next to its frozen EVA ViT-g and FlanT5."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from lionjax.convert.formats.checkpoint_format import CheckpointSource, lionjax_config_format, read_hf_config
from lionjax.convert.formats.hf_language import T5
from lionjax.convert.formats.hf_vision import EVA_IGNORE_PATTERN
from lionjax.convert.formats.key_fit import open_part
from lionjax.convert.formats.lavis import EVA_FILE
from lionjax.convert.io.key_names import remove_generic_prefix
from lionjax.convert.io.reader import TORCH_SUFFIXES, CheckpointTensors, open_weights
from lionjax.core.types import UserError
from lionjax.core.weight_map import bitwise_equal

LION_FILE = re.compile(r"(?i)lion|xx?l_stage3_learnable\.")  # the second is the released file name


def find_lion_file(folder: Path) -> Path | None:
    """The only file of trained LION weights in `folder`, else None."""
    files = [f for f in folder.iterdir() if f.suffix in TORCH_SUFFIXES and LION_FILE.match(f.name)]
    return files[0] if len(files) == 1 else None


def open_lion(path: Path) -> CheckpointSource:
    """A LION from the three parts in one folder. Raises UserError where a part is missing or of another model."""
    folder = path if path.is_dir() else path.parent
    trained, eva = find_lion_file(folder), folder / EVA_FILE
    t5_folders = [f.parent for f in folder.glob("*/config.json") if read_hf_config(f).get("model_type") == "t5"]
    if trained is None or not eva.is_file() or len(t5_folders) != 1:
        raise UserError(
            f"{folder} needs the three parts of a LION: LION-FlanT5-XL.pth (or XXL), eva_vit_g.pth, and one "
            "folder with the FlanT5 of the same size"
        )
    t5_config = read_hf_config(t5_folders[0] / "config.json")
    vision = remove_generic_prefix(open_weights(eva)).with_prefix("visual_encoder.")
    language = open_part(t5_folders[0], T5, T5.config_from_hf(t5_config)).with_prefix("t5_model.")
    trained_tensors = remove_generic_prefix(open_weights(trained))
    tensors = _without_tied_copies(trained_tensors, language) | vision | language
    config = _lion_config_from_tensors(t5_config, tensors)
    return CheckpointSource(LION, config, tensors, t5_folders[0])


def _without_tied_copies(trained: CheckpointTensors, language: CheckpointTensors) -> CheckpointTensors:
    """The trained tensors without the bfloat16 copies of T5's token embeddings that the release contains.

    Raises UserError where a copy differs from this T5's embeddings.
    """
    table, arrays, skipped = language.get("t5_model.shared.weight"), {}, dict(trained.skipped)
    for name, array in trained.items():
        if re.fullmatch(r"t5_model\.(encoder|decoder)\.embed_tokens\.weight", name) and table is not None:
            if not bitwise_equal(table, array):
                raise UserError(
                    f"{name!r} of {trained.files[0]} differs from the token embeddings of this FlanT5; "
                    "use the FlanT5 that the LION was trained with"
                )
            skipped[name] = "a copy of t5_model.shared.weight"
        else:
            arrays[name] = array
    return CheckpointTensors(arrays, trained.files, skipped)


def _lion_config_from_tensors(t5_hf_config: dict, tensors: CheckpointTensors) -> Any:
    """The released LION config with this T5, and with the adapters' number and width of the file."""
    from lionjax.models.connectors.qformer import AggregatorConfig, QFormerConfig
    from lionjax.models.vision.vit import EVA_VIT_G
    from lionjax.models.vlm.lion import Lion
    from lionjax.nn.adapters import AdapterConfig

    down_key = re.compile(r".*adapter\.adapters\.([0-9])\.down_proj\.weight")
    down_projections = {int(match[1]): w for name, w in tensors.items() if (match := down_key.fullmatch(name))}
    if 0 not in down_projections or down_projections[0].ndim != 2:
        raise UserError(f"the trained file has no tensor {down_key.pattern}, so it is no LION; use the released file")
    adapters = AdapterConfig(down_projections[0].shape[0], len(down_projections))
    language = dataclasses.replace(T5.config_from_hf(t5_hf_config), activation="gelu", adapters=adapters)
    return Lion(EVA_VIT_G, QFormerConfig(), AggregatorConfig(), language)


LION = lionjax_config_format(
    "lion", "Lion", ignore_patterns=(r"visual_encoder\." + EVA_IGNORE_PATTERN, r"Qformer\.cls\..*(?#heads of stage 1)")
)
