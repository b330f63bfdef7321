# SPDX-License-Identifier: Apache-2.0
"""Matrices in int8 with one scale for each output channel (weight-only quantization, as LLM.int8's arXiv 2208.07339).

An `Int8Matrix` stands where a float kernel stood: a layer that casts its kernel to the dtype of its input gets the
dequantized values, and the compiler reads a quarter of float32's bytes from memory.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lionjax.core.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Matrix:
    """`values` (..., inputs, outputs) int8 times `scale` (..., 1, outputs) float32."""

    values: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self):
        return self.values.dtype

    def astype(self, dtype) -> Array:
        """The float matrix."""
        return self.values.astype(dtype) * self.scale.astype(dtype)

    def reshape(self, *shape: int) -> Int8Matrix:
        """With its input axes merged: the last axis must stay."""
        return Int8Matrix(self.values.reshape(*shape), self.scale.reshape(1, self.scale.shape[-1]))


def quantize(kernel: Array, input_axes: tuple[int, ...]) -> Int8Matrix:
    """The kernel rounded to 255 steps between plus and minus the largest absolute value of each output channel."""
    kernel = kernel.astype(jnp.float32)
    scale = jnp.abs(kernel).max(axis=input_axes, keepdims=True) / 127
    scale = jnp.where(scale == 0, 1.0, scale)
    return Int8Matrix(jnp.round(kernel / scale).astype(jnp.int8), scale)
