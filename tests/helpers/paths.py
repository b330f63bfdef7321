# SPDX-License-Identifier: Apache-2.0
"""Where things lie in the checkout."""

from pathlib import Path

HELPERS = Path(__file__).resolve().parent
TESTS = HELPERS.parent
ROOT = TESTS.parent
CONFIGS = ROOT / "configs"
