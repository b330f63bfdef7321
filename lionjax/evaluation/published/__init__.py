# SPDX-License-Identifier: Apache-2.0
"""Published benchmarks: their answer files, scorers, protocols and submissions. Nothing here imports JAX."""
