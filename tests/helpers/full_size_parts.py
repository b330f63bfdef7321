# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of full-size models of one part."""

import numpy as np
from full_size import Blank

from lionjax.convert.formats.detect import FORMATS
from lionjax.convert.mapping.plan import plan_params, plan_state_dict
from lionjax.core import params as trees

KINDS = {kind.name: kind for kind in FORMATS}


def check(kind, config, state) -> None:
    """Both ways, strictly: no gap, nothing left over but what is known to say nothing, every shape right."""
    rows, model = kind.weight_map(config), kind.abstract_params(config)
    plan = plan_params(rows, state, kind.ignore_patterns, model)
    read = {name for piece in plan.mapped_tensors for name in (*piece.torch_keys, *piece.tied_keys)}
    assert read | set(plan.ignored) == set(state)
    out = plan_state_dict(rows, trees.flatten(model)).output_specs
    assert {n: out[n].shape for n in read} == {n: state[n].shape for n in read}


def blank(shapes: dict) -> Blank:
    return Blank({name: (shape, np.float16) for name, shape in shapes.items()})


def openai_clip_release() -> dict:
    """Every tensor of clip_vit_L.pth: name -> shape."""
    state = {"class_embedding": (1024,), "positional_embedding": (257, 1024), "conv1.weight": (1024, 3, 14, 14)}
    state |= {"proj": (1024, 768)}
    shapes = {
        "ln_1": (1024,),
        "ln_2": (1024,),
        "attn.out_proj": (1024, 1024),
        "mlp.c_fc": (4096, 1024),
        "mlp.c_proj": (1024, 4096),
    }
    layers = {f"transformer.resblocks.{i}.{name}": shape for i in range(24) for name, shape in shapes.items()}
    for name, shape in (layers | {"ln_pre": (1024,), "ln_post": (1024,)}).items():
        state |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for i in range(24):
        block = f"transformer.resblocks.{i}.attn.in_proj_"
        state |= {f"{block}weight": (3072, 1024), f"{block}bias": (3072,)}
    return state
