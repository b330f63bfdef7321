# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time plans for TPU slices: memory, predicted step time and mesh, compiled without the hardware.

Names are imported lazily, because every module of the package loads this file.
"""

TYPE_CHECKING = False  # of typing, whose import takes time
if TYPE_CHECKING:  # lets editors and type checkers find the definitions
    from lionjax.planner.plans import (
        GENERATION,
        Plan,
        dummy_batch,
        find_stage_index,
        fit_mesh,
        generation_target,
        plan,
        train_step_target,
        with_remat,
    )

__all__ = [
    "GENERATION",
    "Plan",
    "dummy_batch",
    "generation_target",
    "fit_mesh",
    "plan",
    "find_stage_index",
    "train_step_target",
    "with_remat",
]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"lionjax.planner has no attribute {name!r}")
    from lionjax.planner import plans

    return getattr(plans, name)


def __dir__():
    return sorted({*globals(), *__all__})
