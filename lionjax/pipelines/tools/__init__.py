# SPDX-License-Identifier: Apache-2.0
"""Models of this package as tools that a language model uses."""
