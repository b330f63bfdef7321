# SPDX-License-Identifier: Apache-2.0
"""Full-size LLaVAs, BLIP-2s and InstructBLIPs against every name and shape in transformers; no weights are needed."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from paths import CONFIGS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from lionjax.convert.formats.detect import format_of_config
from lionjax.convert.io.reader import CheckpointTensors
from lionjax.convert.mapping.plan import plan_params, plan_state_dict
from lionjax.core import config as configs
from lionjax.core import params as trees
from lionjax.core.types import UserError

NAMES = ("llava15_7b", "llava15_13b", "blip2_opt27b", "blip2_flant5xl", "instructblip_flant5xl", "kosmos2")
# Parameters, as their users have counted.
PUBLISHED = {"llava15_7b": 7_063_427_072, "blip2_opt27b": 3_744_761_856, "kosmos2": 1_664_485_376}


def theirs(system) -> dict[str, np.ndarray]:
    """Every tensor of their class with our settings, as blanks that take no memory."""
    settings = copy.deepcopy(format_of_config(system).config_to_hf(system))
    model = getattr(transformers, settings["architectures"][0])
    with torch.device("meta"):
        state = model(model.config_class.from_dict(settings)).state_dict()
    return {name: np.broadcast_to(np.zeros((), np.float16), tuple(w.shape)) for name, w in state.items()}


def numbers(system, state: dict) -> int:
    """Numbers in a state dict, tied tensors counted once."""
    tied = {name for row in format_of_config(system).weight_map(system) for name in row.tied_keys}
    spelled = format_of_config(system).prepare_tensors(
        system, CheckpointTensors(state, (Path("theirs"),)), Path("theirs")
    )
    return sum(w.size for name, w in spelled.items() if name not in tied)


def check(system, state: dict) -> dict:
    """Both ways, strictly. Returns {name: form} of the way out."""
    kind = format_of_config(system)
    state = kind.prepare_tensors(system, CheckpointTensors(state, (Path("theirs"),)), Path("theirs"))
    model = kind.abstract_params(system)
    plan = plan_params(kind.weight_map(system), state, kind.ignore_patterns, model)
    read = {name for piece in plan.mapped_tensors for name in (*piece.torch_keys, *piece.tied_keys)}
    assert read == set(state) and not plan.ignored
    out = plan_state_dict(kind.weight_map(system), trees.flatten(model)).output_specs
    assert {name: out[name].shape for name in state} == {name: w.shape for name, w in state.items()}
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_a_full_size_config_covers_every_tensor_of_transformers_and_every_leaf(name):
    system = configs.load(CONFIGS / f"{name}.py").model
    state = theirs(system)
    out = check(system, state)
    kind = format_of_config(system)
    nothing = system.vision.depth * system.vision.width if system.qformer else 0  # biases of EVA's keys, all zero
    assert trees.count_params(kind.abstract_params(system)) + nothing == PUBLISHED.get(name, numbers(system, state))
    some = next(name for name in sorted(state) if name.endswith("layers.1.layer_norm1.weight"))
    with pytest.raises(UserError, match="layers.1.layer_norm1.weight"):
        check(system, {n: w for n, w in state.items() if n != some})
    assert len(out) >= len(state)


def test_the_full_size_table_of_llava_v0_covers_its_file():
    """The names of LLaMA, CLIP and a single linear in LLaVA's own code, at 224 pixels."""
    system = configs.load(CONFIGS / "llava_7b.py").model
    language = dataclasses.replace(system.language, pad_vocab_to_multiple_of=1)
    text = theirs(language)
    clip = {f"model.vision_tower.vision_tower.{n}": w for n, w in theirs(system.vision).items()}
    clip = {
        n if "vision_model." in n else n.replace("tower.vision_tower.", "tower.vision_tower.vision_model."): w
        for n, w in clip.items()
    }
    shapes = {"model.mm_projector.weight": (4096, 1024), "model.mm_projector.bias": (4096,)}
    own = {name: np.broadcast_to(np.zeros((), np.float16), shape) for name, shape in shapes.items()}
    assert clip["model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight"].shape[0] == 257
    check(system, text | clip | own)


@pytest.mark.slow
def test_the_vocabulary_of_instructblip_is_padded_in_memory_and_unpadded_in_its_file():
    system = configs.load(CONFIGS / "instructblip_vicuna7b.py").model
    assert (system.language.vocab_size, system.language.padded_vocab_size) == (32001, 32128)
    out = check(system, theirs(system))
    assert out["language_model.lm_head.weight"].shape == (32001, 4096)
    assert out["language_model.model.embed_tokens.weight"].shape == (32001, 4096)
