# SPDX-License-Identifier: Apache-2.0
"""Instruction data made by language models that see no image, and by experts that do, written so that it trains."""
