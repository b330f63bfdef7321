# SPDX-License-Identifier: Apache-2.0
"""Compare a converted model with the original, stage by stage."""


def __getattr__(name: str):
    if name != "verify":
        raise AttributeError(f"lionjax.convert.verify has no attribute {name!r}")
    from lionjax.convert.verify.compare import verify

    return verify
