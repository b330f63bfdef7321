# SPDX-License-Identifier: Apache-2.0
"""A tiny RAM and its tags."""

from lionjax.models.vision.ram import RamConfig
from lionjax.models.vision.swin import SwinConfig

TINY = RamConfig(SwinConfig(16, 4, 4, (2,), (1,), 2, 1.0), 5, 6, 6, 8, 2, 8)

WORDS = ("abacus", "cat", "dog", "grass", "zoo")
