# SPDX-License-Identifier: Apache-2.0
"""Compare the outputs of a converted model with those of the original PyTorch model, module by module."""


def __getattr__(name: str):
    if name != "verify":
        raise AttributeError(f"lionjax.convert.verify has no attribute {name!r}")
    from lionjax.convert.verify.compare import verify

    return verify
