# SPDX-License-Identifier: Apache-2.0
"""Frequencies of rotary positions (arXiv 2104.09864), also rescaled for longer texts than the model was trained on."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from lionjax.core.errors import check_choices

ROPE_TYPES = ("linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are rescaled; fields and formulas are those of transformers' `rope_parameters`.

    - "linear": all frequencies divided by `factor` (position interpolation, arXiv 2306.15595).
    - "llama3": frequencies with fewer than `low_freq_factor` turns in `original_max_positions` are divided by `factor`,
      those with more than `high_freq_factor` turns are kept (LLaMA 3.1).
    - "yarn": likewise with `beta_slow` and `beta_fast` turns, interpolated over the feature axis (arXiv 2309.00071);
      cosine and sine are multiplied by `attention_factor`. `truncate`: the ends of the ramp are whole features.
    """

    rope_type: str = "linear"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True

    def __post_init__(self):
        check_choices(self, rope_type=ROPE_TYPES)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Angle per position (H/2,) of each pair of features, in float32."""
    frequency_H = theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if scaling is None:
        return frequency_H
    scaled_H = frequency_H / np.float32(scaling.factor)
    if scaling.rope_type == "linear":
        return scaled_H
    if scaling.rope_type == "llama3":
        turns_H = frequency_H * np.float32(scaling.original_max_positions / (2 * math.pi))
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept_H = np.clip((turns_H - low) / (high - low), 0, 1)
    else:
        kept_H = 1 - _yarn_ramp(head_dim, theta, scaling)
    return (kept_H * frequency_H + (1 - kept_H) * scaled_H).astype(np.float32)


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """0 for the features whose frequency is kept, 1 for those divided by the factor, a line between them (H/2,)."""

    def feature_of(turns: float) -> float:
        return head_dim * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = feature_of(scaling.beta_fast), feature_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    return np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
