# SPDX-License-Identifier: Apache-2.0
"""The picture settings of a released folder: of its image processor and of LLaVA's config.json.

`processor_config.json` (key `image_processor`) or `preprocessor_config.json` describe one of transformers' image
processors; the original LLaVA adds `image_aspect_ratio` in config.json. They are read as fields of `ProcessorConfig`,
or refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lionjax.convert.formats.checkpoint_format import read_hf_config
from lionjax.core.types import UserError

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
BICUBIC, BILINEAR = 3, 2
RESAMPLE_NAMES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 5: "hamming"}  # by Pillow's number
PREPROCESSOR_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"

# Defaults of transformers' image processors; `square` says what a size of one number means.
_BASE = {
    "do_resize": True,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_pad": False,
    "resample": BICUBIC,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "crop_size": None,
    "square": True,
}
_CLIP = _BASE | {"do_center_crop": True, "size": {"shortest_edge": 224}, "crop_size": 224, "square": False}
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 224, "width": 224}}
_DETECTOR = {
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "size": {"shortest_edge": 800, "longest_edge": 1333},
    "resample": BILINEAR,
    "do_pad": True,
    "square": False,
}
IMAGE_PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": _CLIP,
    "LlavaImageProcessor": _CLIP,
    "MplugOwlImageProcessor": _CLIP,
    "BlipImageProcessor": _BASE | {"size": {"height": 384, "width": 384}},
    "SiglipImageProcessor": _BASE | _HALF | {"square": False},
    "ViTImageProcessor": _BASE | _HALF | {"resample": BILINEAR},
    "GroundingDinoImageProcessor": _BASE | _DETECTOR,
}
_BY_MODEL_TYPE = {
    "llava": "LlavaImageProcessor",
    "blip-2": "BlipImageProcessor",
    "instructblip": "BlipImageProcessor",
    "grounding-dino": "GroundingDinoImageProcessor",
    "siglip": "SiglipImageProcessor",
}
_KNOWN_FLAGS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad", "do_convert_rgb"}
_KNOWN_FLAGS |= {"do_convert_annotations"}  # of a detector, in training


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The settings of an image processor with its class's defaults; `source`: the file, for errors."""

    values: Mapping[str, Any]
    kind: str
    source: str

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def refuse(self, problem: str, allowed: str) -> UserError:
        return UserError(f"{self.source}: {problem}; {allowed}")


def read_image_settings(
    folder: Path, image_size: int, code_pads: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields of `ProcessorConfig`, fields of its `image_fit`) that the files in `folder` say; empty without files.

    `image_size`: side of the vision tower's input. `code_pads`: the system's own code pads images to a square before
    the image processor, as NExT-Chat's and Shikra's does. Raises UserError, naming the setting, for what is not
    supported.
    """
    hf_config = read_hf_config(folder / "config.json")
    found = _find_processor(folder, hf_config, image_size)
    aspect = _aspect_ratio(hf_config, folder)
    _check_processor_tokens(folder, hf_config)
    if found is None:
        return {}, {}
    pads = _pads_first(found) or aspect == "pad" or code_pads
    fit = _resize_fields(found, image_size)
    _check_output_size(found, image_size, pads)
    if pads and not code_pads:
        fit["pad_rgb"] = _pad_rgb(found)
    return {"pad_to_square": pads} | _normalization(found), fit


def read_detector_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(image_mean and image_std, fields of `ImageFit`) of a detector, whose images keep their aspect ratio.

    Without files in `folder` they are Grounding DINO's. Raises UserError for what is not supported.
    """
    kind = "GroundingDinoImageProcessor"
    found = _find_processor(folder, {"model_type": "grounding-dino"}, 0)
    found = found or _Settings(IMAGE_PROCESSORS[kind], kind, str(folder / PREPROCESSOR_FILE))
    if found["do_center_crop"]:
        raise found.refuse("do_center_crop is true", "a detector reads whole images")
    if found.values.get("pad_size"):
        raise found.refuse(f"pad_size is {found['pad_size']!r}", "leave it out; images are padded as their batch needs")
    return _normalization(found), _resize_fields(found, 0)


def describes_processor(folder: Path, processor: Any, image_size: int, code_pads: bool = False) -> bool:
    """Whether the image settings of the files in `folder` are those of `processor`, a `ProcessorConfig`.

    False where there are none, or some that are not supported. `code_pads`: see `read_image_settings`.
    """
    try:
        fields, fit = read_image_settings(folder, image_size, code_pads)
    except UserError:
        return False
    if not fields:
        return False
    own_fit = {name: getattr(processor.image_fit, name) for name in ("mode", "size", "resample", "pad_rgb")}
    own = {name: tuple(getattr(processor, name)) for name in ("image_mean", "image_std")}
    own["pad_to_square"] = processor.pad_to_square
    colors = {"white": (255, 255, 255), "mean": tuple(int(255 * mean) for mean in processor.image_mean)}
    color = tuple(own_fit.pop("pad_rgb") or colors[processor.pad_color])
    is_same_color = not own["pad_to_square"] or color == tuple(fit.pop("pad_rgb", colors["white"]))
    expected = _resize_of(fit, fields["pad_to_square"], image_size)
    return is_same_color and own == fields and _resize_of(own_fit, own["pad_to_square"], image_size) == expected


def _resize_of(fit: Mapping[str, Any], pads: bool, image_size: int) -> tuple:
    """What a resize does, in one spelling: the fields of `image_fit`, of which a padded image is square."""
    mode, (first, second) = fit.get("mode", "stretch"), fit.get("size", (0, 0))
    if mode == "none":
        return (mode,)
    size = (first or image_size, second if mode == "shortest_edge" else second or image_size)
    if mode == "shortest_edge" and pads:
        mode, size = "stretch", (min(size[0], second or size[0]),) * 2
    return mode, size, fit.get("resample", "bicubic")


def image_fit_config(processor: Any) -> dict[str, Any]:
    """Fields of preprocessor_config.json for the `image_fit` of a `ProcessorConfig`, the reverse of the reading.

    They name CLIP's image processor where images are cropped, which BLIP's does not do.
    """
    fit, side = processor.image_fit, processor.image_size
    size = {"height": fit.size[0] or side, "width": fit.size[1] or side}
    crops = fit.mode != "stretch" or set(size.values()) != {side}
    if fit.mode != "stretch":
        size = {"shortest_edge": fit.size[0] or side} | ({"longest_edge": fit.size[1]} if fit.size[1] else {})
    number = next(value for value, name in RESAMPLE_NAMES.items() if name == fit.resample)
    fields: dict[str, Any] = {"do_resize": fit.mode != "none", "size": size, "resample": number}
    if crops:
        crop = {"do_center_crop": True, "crop_size": {"height": side, "width": side}}
        fields |= {"image_processor_type": "CLIPImageProcessor"} | crop
    return fields


def _find_processor(folder: Path, hf_config: Mapping[str, Any], image_size: int) -> _Settings | None:
    """The image processor's settings, nested ones first, as transformers reads them; None where no file has any."""
    nested, name = read_hf_config(folder / PROCESSOR_FILE).get("image_processor"), PROCESSOR_FILE
    if not isinstance(nested, Mapping):
        nested, name = read_hf_config(folder / PREPROCESSOR_FILE), PREPROCESSOR_FILE
    is_original_llava = "mm_vision_tower" in hf_config and "text_config" not in hf_config
    if not nested and is_original_llava:  # the processor of its CLIP, whose folder is not part of the release
        nested = {"image_processor_type": "CLIPImageProcessor", "size": image_size, "crop_size": image_size}
        name = "config.json"
    if not nested:
        return None
    source = str(folder / name)
    given = nested.get("image_processor_type") or nested.get("feature_extractor_type")
    default = _BY_MODEL_TYPE.get(str(hf_config.get("model_type")), "CLIPImageProcessor")
    kind = str(given or default).replace("FeatureExtractor", "ImageProcessor")
    kind = kind.removesuffix("Fast").removesuffix("Pil")
    if kind not in IMAGE_PROCESSORS:
        known = ", ".join(IMAGE_PROCESSORS)
        raise UserError(f"{source}: image_processor_type is {given!r}; it can be {known}")
    set_values = {key: value for key, value in nested.items() if value is not None}
    for key, value in set_values.items():
        if key.startswith("do_") and key not in _KNOWN_FLAGS and value:
            raise UserError(f"{source}: {key} is {value!r}; only {', '.join(sorted(_KNOWN_FLAGS))} are supported")
    values = IMAGE_PROCESSORS[kind] | set_values
    if set_values.get("use_square_size"):  # Kosmos-2
        edge = IMAGE_PROCESSORS[kind]["size"]["shortest_edge"]
        values = values | {"size": {"height": edge, "width": edge}}
    return _Settings(values, kind, source)


def _aspect_ratio(hf_config: Mapping[str, Any], folder: Path) -> str:
    """`image_aspect_ratio` of an original LLaVA: "square" (the processor alone) or "pad" (to a square first)."""
    aspect = hf_config.get("image_aspect_ratio") or "square"
    if "text_config" in hf_config:  # transformers' classes do not read it
        return "square"
    if aspect not in ("square", "pad"):
        raise UserError(
            f"{folder / 'config.json'}: image_aspect_ratio is {aspect!r}; only square and pad are supported"
        )
    return aspect


def _pads_first(found: _Settings) -> bool:
    """Whether images are padded to a square before the resize."""
    if found["do_pad"] and found.kind != "LlavaImageProcessor" and found.values.get("pad_size"):
        raise found.refuse(f"pad_size is {found['pad_size']}", "padding after the resize is not supported")
    by_us = any(found.values.get(f"{color}_square_first") for color in ("white", "mean"))  # `lionjax convert` wrote it
    return by_us or bool(found["do_pad"] and found.kind == "LlavaImageProcessor")


def _pad_rgb(found: _Settings) -> tuple[int, int, int]:
    if found.values.get("white_square_first"):
        return 255, 255, 255
    color = tuple(int(255 * mean) for mean in _three(found, "image_mean"))
    if not all(0 <= level <= 255 for level in color):
        raise found.refuse(f"image_mean is {found['image_mean']}", "padding with the mean color needs it in 0..1")
    return color


def _three(found: _Settings, name: str) -> list[float]:
    """Three finite numbers, from three or one for all channels."""
    value = found[name]
    numbers = value if isinstance(value, Sequence) and not isinstance(value, str) else [value] * 3
    is_number = [isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in numbers]
    if len(numbers) != 3 or not all(is_number) or (name == "image_std" and 0 in numbers):
        raise found.refuse(f"{name} is {value!r}", "give three finite numbers, none of image_std 0")
    return [float(x) for x in numbers]


def _normalization(found: _Settings) -> dict[str, Any]:
    """`image_mean` and `image_std` of pixels / 255, with the rescaling of the processor folded into them."""
    factor = found["rescale_factor"] if found["do_rescale"] else 1.0
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor) or not factor > 0:
        raise found.refuse(f"rescale_factor is {factor!r}", "give a number above 0")
    mean, std = [0.0] * 3, [1.0] * 3
    if found["do_normalize"]:
        mean, std = _three(found, "image_mean"), _three(found, "image_std")
    scale = 255 * factor
    scale = 1.0 if abs(scale - 1) < 1e-9 else scale
    return {"image_mean": tuple(m / scale for m in mean), "image_std": tuple(s / scale for s in std)}


def _size(found: _Settings, name: str, square: bool) -> dict[str, int]:
    """`size` or `crop_size` as a dict: one number is a square, or the shortest edge; two are height and width."""
    value = found[name]
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    value = {k: v for k, v in value.items() if v is not None} if isinstance(value, Mapping) else {}
    allowed = ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"})
    whole = all(isinstance(edge, int) and not isinstance(edge, bool) and edge > 0 for edge in value.values())
    if set(value) not in (allowed[:1] if name == "crop_size" else allowed) or not whole:
        kinds = "height and width" if name == "crop_size" else "height and width, or shortest_edge and longest_edge"
        raise found.refuse(f"{name} is {found[name]!r}", f"give {kinds} in pixels")
    return dict(value)


def _resize_fields(found: _Settings, image_size: int) -> dict[str, Any]:
    if not found["do_resize"]:
        return {"mode": "none"}
    number = found["resample"]
    if isinstance(number, bool) or number not in RESAMPLE_NAMES:
        known = ", ".join(f"{value} ({name})" for value, name in RESAMPLE_NAMES.items())
        raise found.refuse(f"resample is {number!r}", f"it can be {known}")
    size = _size(found, "size", found["square"])
    if "height" in size:
        height, width = size["height"], size["width"]
        fit = {"mode": "stretch", "size": (0, 0) if height == width == image_size else (height, width)}
    else:
        fit = {"mode": "shortest_edge", "size": (size["shortest_edge"], size.get("longest_edge", 0))}
    return fit | {"resample": RESAMPLE_NAMES[number]}


def _check_output_size(found: _Settings, image_size: int, pads: bool) -> None:
    """Raise UserError unless every image comes out as `image_size` x `image_size` pixels."""
    tower = f"the vision tower reads {image_size} x {image_size} pixels"
    if found["do_center_crop"]:
        crop = _size(found, "crop_size", True)
        if crop != {"height": image_size, "width": image_size}:
            raise found.refuse(f"crop_size is {found['crop_size']!r}", f"it must be {image_size}, as {tower}")
        return
    if not found["do_resize"]:
        raise found.refuse("do_resize and do_center_crop are false", f"set one of them, as {tower}")
    size = _size(found, "size", found["square"])
    if "shortest_edge" in size and not pads:
        raise found.refuse(
            f"size is {found['size']!r} and do_center_crop is false", f"images would keep their shape, but {tower}"
        )
    edges = {min(size["shortest_edge"], size.get("longest_edge", math.inf))} if "shortest_edge" in size else None
    if (edges or set(size.values())) != {image_size}:
        raise found.refuse(f"size is {found['size']!r}", f"it must be {image_size}, as {tower}")


def _check_processor_tokens(folder: Path, hf_config: Mapping[str, Any]) -> None:
    """Raise UserError where processor_config.json counts other image tokens than config.json's model makes."""
    processor, vision = read_hf_config(folder / PROCESSOR_FILE), hf_config.get("vision_config") or {}
    if "text_config" not in hf_config:
        return
    model_type = hf_config.get("model_type")
    expected: dict[str, Any] = {}
    if model_type == "llava" and processor.get("patch_size") is not None:  # without it, it counts no tokens
        expected = {
            "patch_size": vision.get("patch_size", 14 if not vision else 32),
            "vision_feature_select_strategy": hf_config.get("vision_feature_select_strategy", "default"),
            "num_additional_image_tokens": 1,  # CLIP's class token
        }
    elif model_type in ("blip-2", "instructblip"):
        expected = {"num_query_tokens": hf_config.get("num_query_tokens", 32)}
    for name, value in expected.items():
        if processor.get(name) not in (None, value):
            raise UserError(
                f"{folder / PROCESSOR_FILE}: {name} is {processor[name]!r}, but the model of config.json needs "
                f"{value!r}"
            )
