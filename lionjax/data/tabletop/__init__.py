# SPDX-License-Identifier: Apache-2.0
"""A tabletop with objects of the synthetic scenes and a gripper, for planning (PaLM-E, arXiv 2303.03378)."""
