# SPDX-License-Identifier: Apache-2.0
"""Rotary positions of a LLaMA in config.json: rope_parameters, and rope_scaling and rope_theta of earlier versions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lionjax.convert.formats.config_table import ConfigTable, join, require_same, show, unsupported
from lionjax.core.types import UserError

if TYPE_CHECKING:
    from lionjax.nn.rope import RopeScaling

ROPE_FIELDS = {"rope_parameters": None, "rope_scaling": None, "rope_theta": None, "max_position_embeddings": 2048}
ROPE_FIXED = {"partial_rotary_factor": (None, 1.0), "rope_interleaved": (False, None)}


def _rope_table(rope_type: str, *optional: str, **numbers: float) -> ConfigTable:
    return ConfigTable(
        (f"rope_type {rope_type!r}",),
        computed={"rope_type": "default", "rope_theta": None, **dict.fromkeys(optional), **numbers},
        fixed=ROPE_FIXED,
        aliases={"type": "rope_type"},
    )


_YARN_OPTIONAL = ("factor", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow")
ROPE_TABLES = {
    "default": _rope_table("default"),
    "linear": _rope_table("linear", "factor"),
    "llama3": _rope_table(
        "llama3", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    ),
    "yarn": _rope_table("yarn", *_YARN_OPTIONAL, "original_max_position_embeddings", truncate=True),
}


def rope_from_hf(settings: Mapping[str, Any], path: str = "") -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of the rotary positions of `settings`, a config with `ROPE_FIELDS`, at `path` of config.json.

    Raises UserError for an unsupported rope_type, and where two spellings disagree.
    """
    parsed = {}
    for name in ("rope_parameters", "rope_scaling"):
        if settings[name]:
            rope = _read_rope(settings[name], join(path, name))
            parsed[name] = (rope["rope_theta"], _scaling(rope, settings["max_position_embeddings"], join(path, name)))
    theta, scaling = settings["rope_theta"], None
    for name, (rope_theta, rope_scaling) in parsed.items():
        require_same(join(path, name) + ".rope_theta", rope_theta, join(path, "rope_theta"), theta)
        theta = rope_theta if theta is None else theta
        scaling = rope_scaling
    if len(parsed) == 2 and len({scaling for _, scaling in parsed.values()}) == 2:
        raise UserError(
            f"config.json has {join(path, 'rope_scaling')} {show(settings['rope_scaling'])} and "
            f"{join(path, 'rope_parameters')} {show(settings['rope_parameters'])}, which differ; remove one"
        )
    return (10000.0 if theta is None else _number({"rope_theta": theta}, "rope_theta", path)), scaling


def _read_rope(rope: Any, path: str) -> dict[str, Any]:
    if not isinstance(rope, Mapping):
        raise UserError(f"config.json has {path} {show(rope)}; it must be a JSON object or null")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in ROPE_TABLES:
        raise unsupported(join(path, "rope_type"), rope_type, tuple(ROPE_TABLES))
    return ROPE_TABLES[rope_type].read(rope, path)


def _scaling(rope: dict[str, Any], max_positions: int, path: str) -> RopeScaling | None:
    """The `RopeScaling` of a rope object that its table has read; None for rope_type "default"."""
    from lionjax.nn.rope import RopeScaling

    rope_type = rope["rope_type"]
    if rope_type == "default":
        return None
    if rope_type == "linear":
        return RopeScaling(rope_type, _number(rope, "factor", path))
    if rope["original_max_position_embeddings"] is None:
        rope |= {"original_max_position_embeddings": max_positions}
    original = _number(rope, "original_max_position_embeddings", path)
    if rope_type == "llama3":
        factors = (_number(rope, name, path) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        factor, low, high = factors
        return RopeScaling(rope_type, factor, int(original), low, high)
    if rope["factor"] is None:
        rope |= {"factor": max_positions / original}
    factor = _number(rope, "factor", path)
    return RopeScaling(
        rope_type,
        factor,
        int(original),
        beta_fast=_number(rope, "beta_fast", path) if rope["beta_fast"] else 32.0,
        beta_slow=_number(rope, "beta_slow", path) if rope["beta_slow"] else 1.0,
        attention_factor=_yarn_attention_factor(rope, factor, path),
        truncate=rope["truncate"],
    )


def _yarn_attention_factor(rope: dict[str, Any], factor: float, path: str) -> float:
    if rope["attention_factor"] is not None:
        return _number(rope, "attention_factor", path)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope["mscale"] and rope["mscale_all_dim"]:
        return mscale(_number(rope, "mscale", path)) / mscale(_number(rope, "mscale_all_dim", path))
    return mscale(1.0)


def _number(rope: Mapping[str, Any], name: str, path: str) -> float:
    value = rope[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"config.json has {join(path, name)} {show(value)}; it must be a number above 0")
    return float(value)


def rope_to_hf(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """rope_theta, rope_parameters, and rope_scaling, which transformers before version 5 reads."""
    if scaling is None:
        return {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    rope: dict[str, Any] = {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling.rope_type != "linear":
        rope["original_max_position_embeddings"] = scaling.original_max_positions
    if scaling.rope_type == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.rope_type == "yarn":
        names = ("beta_fast", "beta_slow", "attention_factor", "truncate")
        rope |= {name: getattr(scaling, name) for name in names}
    return {"rope_theta": theta, "rope_parameters": rope | {"rope_theta": theta}, "rope_scaling": rope}
