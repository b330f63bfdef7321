# SPDX-License-Identifier: Apache-2.0
"""A LISA with LoRA in PEFT: our adapter on the released class's modules, and PEFT's adapter on our LISA."""

import dataclasses
import warnings

import jax
import numpy as np
import peft_adapters as adapters
import pytest
from safetensors.numpy import load_file
from small_lisa import TINY, batch_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from lionjax import convert
from lionjax.core import sharding
from lionjax.nn.lora import LoraConfig

LORA = LoraConfig(2, 16.0, 0.05, ("q", "v"))
SYSTEM = dataclasses.replace(TINY, language=dataclasses.replace(TINY.language, lora=LORA))
IDS = np.arange(10, 26, dtype=np.int32).reshape(2, 8)


def random_params(system):
    shapes = sharding.abstract_params(system.init, jax.random.key(0), batch_of([[5]]))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: (0.2 * random.standard_normal(leaf.shape)).astype(np.float32), shapes)


def released_model(folder):
    """The modules of the released class by the names in `folder`: LLaMA's own, CLIP, SAM and projectors around them.

    The code of LISA is no package; its class is LLaMA's with these modules in it.
    """
    c = SYSTEM.language
    sizes = {"hidden_size": c.width, "intermediate_size": c.mlp_dim, "num_hidden_layers": c.depth}
    sizes |= {"num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim}
    sizes |= {"rms_norm_eps": c.norm_eps, "vocab_size": c.vocab_size, "tie_word_embeddings": False}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, rope_theta=c.rope_theta)).eval()
    known = model.state_dict().keys()
    tensors = {name: torch.tensor(array) for name, array in load_file(folder / "model.safetensors").items()}
    assert known < tensors.keys()
    for name in tensors.keys() - known:
        *path, leaf = name.split(".")
        module = model
        for depth, part in enumerate(path):
            if not hasattr(module, part):
                is_linear = depth + 1 == len(path) and leaf == "weight" and tensors[name].ndim == 2
                out, inner = tensors[name].shape if is_linear else (1, 1)
                module.add_module(part, torch.nn.Linear(inner, out) if is_linear else torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, torch.nn.Parameter(tensors[name]))
    model.load_state_dict(tensors, strict=False)
    return model


def modules_with_lora(model) -> set[str]:
    return {name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")}


LORA_MODULES = {f"model.layers.{layer}.self_attn.{which}_proj" for layer in (0, 1) for which in "qv"}


@pytest.mark.slow
def test_peft_loads_the_lora_of_a_lisa_on_queries_and_values_of_its_llama_alone(tmp_path):
    """CLIP and SAM have modules named q_proj and v_proj too."""
    params = random_params(SYSTEM)
    convert.to_torch(SYSTEM, params, tmp_path / "torch")
    model = released_model(tmp_path / "torch")
    others = [n for n, _ in model.named_modules() if n.endswith(("q_proj", "v_proj")) and n not in LORA_MODULES]
    assert any("visual_model" in name for name in others) and any("vision_tower" in name for name in others)
    before = adapters.their_logits(model, {"input_ids": torch.tensor(IDS)})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / "torch" / "adapter").eval()
    assert {name.removeprefix("base_model.model.") for name in modules_with_lora(theirs)} == LORA_MODULES
    wanted = adapters.their_logits(theirs, {"input_ids": torch.tensor(IDS)})
    assert np.abs(wanted - before).max() > 0.01 * np.abs(wanted).max()
    adapters.assert_alike(adapters.decoder_logits(SYSTEM.language, params["language"], IDS), wanted)


@pytest.mark.slow
def test_an_adapter_that_peft_saved_on_lisas_modules_gives_our_lisa_the_same_logits(tmp_path):
    """Its target_modules are full names, as LISA's training code lists them."""
    bare = random_params(TINY)
    convert.to_torch(TINY, bare, tmp_path / "base")
    settings = {"r": 2, "lora_alpha": 16, "lora_dropout": 0.05, "task_type": "CAUSAL_LM"}
    model = released_model(tmp_path / "base")
    theirs = adapters.with_adapter(model, tmp_path / "lora", target_modules=sorted(LORA_MODULES), **settings)
    wanted = adapters.their_logits(theirs, {"input_ids": torch.tensor(IDS)})
    convert.convert(tmp_path / "base", tmp_path / "ours", "jax", adapter=tmp_path / "lora")
    config, params = convert.load_params(tmp_path / "ours")
    assert config == SYSTEM
    adapters.assert_alike(adapters.decoder_logits(config.language, params["language"], IDS), wanted)
