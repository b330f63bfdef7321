# SPDX-License-Identifier: Apache-2.0
"""Language models that use tools: tool calling, and the protocols of Visual ChatGPT and MM-REACT."""
