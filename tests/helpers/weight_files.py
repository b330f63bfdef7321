# SPDX-License-Identifier: Apache-2.0
"""Weights that are compared bit by bit, and files damaged at random."""

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

BF16 = ml_dtypes.bfloat16


def assert_same(one, other):
    assert dict(one).keys() == dict(other).keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape, name
        assert one[name].tobytes() == other[name].tobytes(), name


def as_torch(torch, tensors):
    made = {}
    for name, w in tensors.items():
        words = torch.from_numpy(w.view(np.uint16).copy() if w.dtype == BF16 else w.copy())
        made[name] = words.view(torch.bfloat16) if w.dtype == BF16 else words
    return made


damages = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "remove"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, damage) -> bytes:
    for kind, place, extra in damage:
        at = int(place * len(content))
        if kind == "flip":
            content = content[:at] + extra + content[at + len(extra) :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + extra + content[at:]
        else:
            content = content[:at] + content[at + len(extra) :]
    return content
