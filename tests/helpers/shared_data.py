# SPDX-License-Identifier: Apache-2.0
"""Photographs, annotations and real tokenizers, and which test needs which of them.

They are no part of the project and lie in $LIONJAX_DATA, by default in shared/data beside the
checkout (see conftest.py).
"""

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("LIONJAX_DATA", Path(__file__).resolve().parents[1] / "data"))


def needs(*names: str):
    """A mark that skips a test unless each of these files or folders is there.

    The reason names $LIONJAX_DATA, by which the run's end finds such tests.
    """
    lacking = [name for name in names if not (ROOT / name).exists()]
    return pytest.mark.skipif(bool(lacking), reason=f"not in $LIONJAX_DATA: {', '.join(lacking)}")
