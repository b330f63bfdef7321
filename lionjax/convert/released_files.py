# SPDX-License-Identifier: Apache-2.0
"""Whether a folder holds the weights that a system's authors released: names, shapes, and digests where known."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lionjax.convert.formats import detect
from lionjax.convert.formats.ram import RAM_FILE
from lionjax.convert.torch_folder import plan_from_torch
from lionjax.core import params as trees
from lionjax.core.types import UserError

SYSTEMS = ("llava-1.5", "blip2", "instructblip", "kosmos2", "shikra", "lion", "nextchat", "sam", "ram")
# The first hexadecimal digits of the MD5 sums that the files of SAM have in their names.
MD5_PREFIXES = {"sam_vit_h_4b8939.pth": "4b8939", "sam_vit_l_0b3195.pth": "0b3195", "sam_vit_b_01ec64.pth": "01ec64"}
MAX_DIFFERENCES = 4
BLOCK = 1 << 24  # bytes


@dataclasses.dataclass(frozen=True)
class FileCheck:
    """What the files of a folder are. `release`: the released model with exactly these shapes, "" if there is none.

    `nearest` is the release that shares most of them, and `differences` the first parameters in which it differs.
    `digests`: {file: whether its digest is the known one}.
    """

    format_name: str
    num_tensors: int
    release: str
    nearest: str
    differences: tuple[str, ...]
    digests: Mapping[str, bool]

    @property
    def is_released(self) -> bool:
        """Whether names and shapes are those of a release and no known digest differs."""
        return bool(self.release) and all(self.digests.values())

    def __str__(self) -> str:
        lines = [f"files: {self.num_tensors} tensors of the format {self.format_name}, all names and shapes fit"]
        if self.release:
            lines.append(f"sizes: those of {self.release}")
        else:
            lines.append(f"sizes: of no released model; the nearest, {self.nearest}, differs in")
            lines += [f"  {text}" for text in self.differences]
        lines += [f"digest of {file}: {'as released' if same else 'DIFFERS'}" for file, same in self.digests.items()]
        if not self.digests:
            lines.append("digests: none is known for these files; give sha256sum's lines with --digests")
        verdict = "these are the released files" if self.is_released else "these are not the released files"
        if self.is_released and not self.digests:
            verdict = "names and shapes are those of the released files; their values were not checked"
        return "\n".join([*lines, verdict])


def released_models(system: str) -> dict[str, Any]:
    """{name: config with its sizes} of the models that the authors of a system released."""
    from lionjax.models.language import decoder, t5
    from lionjax.models.vision import ram, sam_encoder
    from lionjax.models.vlm import visual_prefix as vlm

    def with_text(model: Any, **fields: Any) -> Any:
        return dataclasses.replace(model, language=dataclasses.replace(model.language, **fields))

    xxl = {"width": t5.FLAN_T5_XXL.width, "num_heads": t5.FLAN_T5_XXL.num_heads, "mlp_dim": t5.FLAN_T5_XXL.mlp_dim}
    v13 = dict.fromkeys(("width", "depth", "num_heads", "num_kv_heads", "mlp_dim"))
    v13 = {field: vars(decoder.VICUNA_13B)[field] for field in v13}
    llava = {"7B": vlm.LLAVA_15_7B, "13B": vlm.LLAVA_15_13B}
    original = {"image_token_id": -200, "torch_names": "original"}
    llava_original = {
        size: dataclasses.replace(with_text(model, vocab_size=32000), **original) for size, model in llava.items()
    }
    models: dict[str, dict[str, Any]] = {
        "llava-1.5": {f"LLaVA-1.5-{size} (transformers)": model for size, model in llava.items()}
        | {f"LLaVA-1.5-{size} (original)": model for size, model in llava_original.items()},
        "blip2": {
            "BLIP-2 OPT-2.7B": vlm.BLIP2_OPT_2_7B,
            "BLIP-2 FlanT5-XL": vlm.BLIP2_FLAN_T5_XL,
            "BLIP-2 FlanT5-XXL": with_text(vlm.BLIP2_FLAN_T5_XL, **xxl),
        },
        "instructblip": {
            "InstructBLIP FlanT5-XL": vlm.INSTRUCTBLIP_FLAN_T5_XL,
            "InstructBLIP FlanT5-XXL": with_text(vlm.INSTRUCTBLIP_FLAN_T5_XL, **xxl),
            "InstructBLIP Vicuna-7B": vlm.INSTRUCTBLIP_VICUNA_7B,
            "InstructBLIP Vicuna-13B": with_text(vlm.INSTRUCTBLIP_VICUNA_7B, **v13),
        },
        "kosmos2": {"Kosmos-2": vlm.KOSMOS2},
        "shikra": {"Shikra-7B": vlm.SHIKRA_7B},
        "sam": {"SAM ViT-H": sam_encoder.SAM_VIT_H, "SAM ViT-L": sam_encoder.SAM_VIT_L}
        | {"SAM ViT-B": sam_encoder.SAM_VIT_B},
        "ram": {"RAM Swin-L": ram.RAM_SWIN_L},
    }
    return models[system] if system in models else _region_models(system)


def _region_models(system: str) -> dict[str, Any]:
    """The released models of LION and NExT-Chat."""
    from lionjax.models.connectors.qformer import AggregatorConfig, QFormerConfig
    from lionjax.models.language import t5
    from lionjax.models.vision.vit import EVA_VIT_G
    from lionjax.models.vlm.lion import Lion
    from lionjax.models.vlm.nextchat import NextChat
    from lionjax.nn.adapters import AdapterConfig

    if system == "nextchat":
        return {"NExT-Chat-7B": NextChat()}
    fields = {"activation": "gelu", "adapters": AdapterConfig(64)}
    sizes = {"LION-4B": t5.FLAN_T5_XL, "LION-12B": t5.FLAN_T5_XXL}
    return {
        name: Lion(EVA_VIT_G, QFormerConfig(), AggregatorConfig(), dataclasses.replace(language, **fields))
        for name, language in sizes.items()
    }


def check_files(system: str, folder: Path, digests: Mapping[str, str] | None = None) -> FileCheck:
    """Compare the weights in a folder with the released models of a system; reads no tensor's values without digests.

    `digests`: {file: SHA-256}; with those of `MD5_PREFIXES` they are compared. Raises UserError for a folder without
    such weights, with names or shapes that do not fit its own config, and for a file in `digests` that is missing.
    """
    if system not in SYSTEMS:
        raise UserError(f"there is no released system {system!r}; choose one of {', '.join(SYSTEMS)}")
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the folder of the released weights")
    source = detect.open_checkpoint(weights_path(folder))
    config, models = detect.model_config_of(source.config), released_models(system)
    _check_system(system, source.checkpoint_format.name, config, models, folder)
    plan_from_torch(source)  # raises UserError where names or shapes do not fit
    shapes = _shapes(config)
    differences = {name: _differences(shapes, _shapes(model)) for name, model in models.items()}
    nearest = min(differences, key=lambda name: len(differences[name]))
    release = nearest if not differences[nearest] else ""
    checked = _check_digests(folder, digests or {})
    shown = tuple(differences[nearest][:MAX_DIFFERENCES])
    return FileCheck(source.checkpoint_format.name, len(source.tensors), release, nearest, shown, checked)


def weights_path(folder: Path) -> Path:
    """A folder of weights, or the released file in it that is opened by itself (SAM's, RAM's)."""
    files = [folder / name for name in (*MD5_PREFIXES, RAM_FILE)]
    return next((file for file in files if file.is_file()), folder)


def _check_system(system: str, format_name: str, config: Any, models: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError for the weights of another system: of another class, or of other parts."""
    formats = {detect.format_of_config(model).name for model in models.values()}
    formats |= {"segment_anything"} if system == "sam" else set()
    if format_name not in formats or type(config) not in {type(model) for model in models.values()}:
        raise UserError(f"{folder} holds a {format_name}, not weights of {system}; give the folder of its weights")


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the parameters of a model of some sizes."""
    _, abstract_params = detect.weight_map_and_abstract_params(detect.format_of_config(config), config)
    return {path: tuple(leaf.shape) for path, leaf in trees.flatten(abstract_params).items()}


def _differences(ours: Mapping[str, tuple], released: Mapping[str, tuple]) -> list[str]:
    paths = [path for path in {**ours, **released} if ours.get(path) != released.get(path)]
    return [f"{path}: {ours.get(path, 'absent')}, released {released.get(path, 'absent')}" for path in paths]


def _check_digests(folder: Path, digests: Mapping[str, str]) -> dict[str, bool]:
    known = [(name, "md5", prefix) for name, prefix in MD5_PREFIXES.items() if (folder / name).is_file()]
    known += [(name, "sha256", digest) for name, digest in digests.items()]
    return {name: file_digest(folder / name, kind).startswith(digest.lower()) for name, kind, digest in known}


def file_digest(path: Path, kind: str) -> str:
    """The digest of a file in hexadecimal digits. Raises UserError if there is no such file."""
    if not path.is_file():
        raise UserError(f"there is no file {path}, whose digest was given; give the digests of the folder's files")
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_digests(path: Path) -> dict[str, str]:
    """{file: SHA-256} of the lines that sha256sum prints. Raises UserError for a line of another form."""
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        digest, _, name = line.strip().partition(" ")
        if len(digest) != 64 or set(digest.lower()) - set("0123456789abcdef") or not name.strip(" *"):
            raise UserError(f"{path}, line {number}, is {line[:60]!r}; give a SHA-256 and a file's name")
        found[name.strip(" *")] = digest
    return found
