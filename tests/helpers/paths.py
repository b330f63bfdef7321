# SPDX-License-Identifier: Apache-2.0
"""Where things lie in the checkout."""

from pathlib import Path

HELPERS = Path(__file__).resolve().parent
TESTS = HELPERS.parent
ROOT = TESTS.parent
CONFIGS = ROOT / "configs"
WITH_ARGUMENTS = {"own_data"}  # configs that need a user's files
EXPERIMENTS = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem not in WITH_ARGUMENTS)
