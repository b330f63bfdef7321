# SPDX-License-Identifier: Apache-2.0
"""A module of the package with a mistake in it."""

import sys
import types
from pathlib import Path


def mutated(monkeypatch, module, old: str, new: str):
    """The module's text with one thing changed, run as a module of its own."""
    text = Path(module.__file__).read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {module.__name__}"
    made = types.ModuleType(f"{module.__name__}_mutated")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    exec(compile(text.replace(old, new), module.__file__, "exec"), made.__dict__)
    return made
