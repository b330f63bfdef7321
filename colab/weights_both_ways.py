# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Weights both ways
#
# A LLaVA of PyTorch comes to JAX, is changed there, and goes back as a folder that PyTorch loads. Nothing is
# downloaded: the model is a tiny one with random weights. A real one takes the same three calls.
#
# Wants lionjax with its `torch` extra, and transformers.

# %%
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from lionjax import convert

transformers.logging.set_verbosity_error()
folder = Path("weights_both_ways")

# %% [markdown]
# ## A folder from elsewhere
#
# LLaVA-1.5 in small: CLIP's tower, two linears, a LLaMA. Half precision, as such folders mostly are.

# %%
torch.manual_seed(0)
tower = transformers.CLIPVisionConfig(
    image_size=28, patch_size=7, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
)
language = transformers.LlamaConfig(
    vocab_size=100,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
config = transformers.LlavaConfig(vision_config=tower, text_config=language, image_token_index=99)
theirs = transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16).eval()
theirs.save_pretrained(folder / "theirs")

# %% [markdown]
# ## In
#
# One call, a tensor at a time; also `lionjax convert theirs ours --to jax`. It says what was read and what was left.

# %%
print(convert.convert(folder / "theirs", folder / "ours", "jax"))

# %%
system, params = convert.load_params(folder / "ours")
jax.tree.map(lambda leaf: f"{leaf.dtype} {leaf.shape}", params["projector"])

# %% [markdown]
# The table that was read: torch's name, our path, and how the layout changes between them.

# %%
for row in system.weight_map()[:8]:
    print(*row.torch_keys, "->", *row.flax_paths, f"({row.transform.name})")

# %% [markdown]
# ## Is it the same model?
#
# Both run on the same picture and text, and every module with a weight is compared.

# %%
from lionjax.convert.verify.compare import verify

print(found := verify(system, params, folder / "theirs"))
assert found.all_close

# %% [markdown]
# ## Out
#
# Training would change the weights; here the projector is scaled. The folder has config.json, safetensors and a model
# card, and `from_pretrained` misses nothing.

# %%
changed = jax.tree.map(np.asarray, params)
changed["projector"]["up"]["kernel"] = changed["projector"]["up"]["kernel"] * np.asarray(2, "bfloat16")
convert.to_torch(system, changed, folder / "changed")
back, loading = transformers.LlavaForConditionalGeneration.from_pretrained(
    folder / "changed", output_loading_info=True, dtype=torch.bfloat16
)
print({kind: names for kind, names in loading.items() if names} or "no key missing, none too many")
assert torch.equal(
    back.model.multi_modal_projector.linear_1.weight, 2 * theirs.model.multi_modal_projector.linear_1.weight
)
assert verify(system, changed, folder / "changed").all_close

# %% [markdown]
# ## To the bit
#
# What was not changed comes back as it was, every bit of it.

# %%
convert.convert(folder / "ours", folder / "back", "torch")
same = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "back", dtype=torch.bfloat16)
one, other = theirs.state_dict(), same.state_dict()
assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
print(len(one), "tensors, all the same")

# %% [markdown]
# ## With a LoRA, as PEFT lays it out
#
# The config gets a low-rank detour on queries and values; its parameters would be trained. They go out into a folder
# `adapter` that PEFT reads, or into the matrices with `merge_lora=True`. Merging rounds, so this is done in float32.

# %%
import dataclasses

from lionjax.nn.lora import LoraConfig

lora = LoraConfig(rank=4, alpha=8.0, target_modules=("q", "v"))
tuned = dataclasses.replace(system, language=dataclasses.replace(system.language, lora=lora))
rng = np.random.default_rng(0)
wide = jax.tree.map(lambda leaf: leaf.astype(np.float32), changed)
layers, width = system.language.layers, system.language.width
for letter, heads in (("q", system.language.heads), ("v", system.language.kv_heads)):
    shapes = {"lora_a": (layers, width, 4), "lora_b": (layers, 4, heads, system.language.head)}
    for name, shape in shapes.items():
        new = 0.05 * rng.standard_normal(shape)
        wide["language"]["blocks"]["attention"][letter][name] = new.astype(np.float32)
convert.to_torch(tuned, wide, folder / "apart")
convert.to_torch(tuned, wide, folder / "merged", merge_lora=True)
print(*sorted(str(file.relative_to(folder)) for file in folder.glob("*/adapter/*")), sep="\n")
assert verify(tuned, wide, folder / "merged").all_close
