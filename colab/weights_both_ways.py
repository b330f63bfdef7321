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
# # Convert weights between PyTorch and JAX
#
# A PyTorch LLaVA is converted to JAX, changed, and written back as a folder that PyTorch loads. Nothing is
# downloaded: the model is tiny, with random weights. A released model takes the same three calls.
#
# Needs lionjax with its `torch` extra, which has transformers. About half a minute on two CPU cores.

# %%
# Installs lionjax where it is not, as on Colab. Put the address of this repository in place of URL.
import importlib.util
import os
import subprocess
import sys

SOURCE = os.environ.get("LIONJAX_SOURCE", "git+URL")
if importlib.util.find_spec("lionjax") is None:
    assert not SOURCE.endswith("URL"), "put the address of this repository in place of URL"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"lionjax[data,torch] @ {SOURCE}"], check=True)

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
# ## A folder written by transformers
#
# A small LLaVA-1.5: CLIP's vision tower, a projector of two linear layers, a LLaMA. bfloat16, as released weights
# often are.

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
# One call, which reads one tensor at a time; also `lionjax convert theirs ours --to jax`. The report lists what was
# read and what was skipped.

# %%
print(convert.convert(folder / "theirs", folder / "ours", "jax"))

# %%
model, params = convert.load_params(folder / "ours")
jax.tree.map(lambda leaf: f"{leaf.dtype} {leaf.shape}", params["projector"])

# %% [markdown]
# The weight map: torch's key, the parameter path in JAX, and the change of layout between them.

# %%
for mapping in model.weight_map()[:8]:
    print(*mapping.torch_keys, "->", *mapping.flax_paths, f"({mapping.transform.name})")

# %% [markdown]
# ## Is it the same model?
#
# Both run on the same image and text, and the outputs of every module with weights are compared.

# %%
from lionjax.convert.verify.compare import verify

print(report := verify(model, params, folder / "theirs"))
assert report.all_close

# %% [markdown]
# ## From JAX to PyTorch
#
# Training would change the weights; here the projector is scaled. The folder has config.json, safetensors and a model
# card, and `from_pretrained` reports no missing or unexpected key.

# %%
changed = jax.tree.map(np.asarray, params)
changed["projector"]["up"]["kernel"] = changed["projector"]["up"]["kernel"] * np.asarray(2, "bfloat16")
convert.to_torch(model, changed, folder / "changed")
back, loading = transformers.LlavaForConditionalGeneration.from_pretrained(
    folder / "changed", output_loading_info=True, dtype=torch.bfloat16
)
print({kind: names for kind, names in loading.items() if names} or "no key missing, none too many")
assert torch.equal(
    back.model.multi_modal_projector.linear_1.weight, 2 * theirs.model.multi_modal_projector.linear_1.weight
)
assert verify(model, changed, folder / "changed").all_close

# %% [markdown]
# ## Unchanged weights are bit-identical
#
# Weights converted to JAX and back without a change equal the original ones bit for bit.

# %%
convert.convert(folder / "ours", folder / "back", "torch")
same = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "back", dtype=torch.bfloat16)
one, other = theirs.state_dict(), same.state_dict()
assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
print(len(one), "tensors, all the same")

# %% [markdown]
# ## LoRA in PEFT's format
#
# The config gets a LoRA on queries and values, whose parameters would be trained. They are written to a subfolder
# `adapter` that PEFT reads, or merged into the kernels with `merge_lora=True`. Merging rounds, so it is done in
# float32.

# %%
import dataclasses

from lionjax.nn.lora import LoraConfig

lora = LoraConfig(rank=4, alpha=8.0, target_modules=("q", "v"))
tuned = dataclasses.replace(model, language=dataclasses.replace(model.language, lora=lora))
rng = np.random.default_rng(0)
wide = jax.tree.map(lambda leaf: leaf.astype(np.float32), changed)
depth, width = model.language.depth, model.language.width
for letter, heads in (("q", model.language.num_heads), ("v", model.language.num_kv_heads)):
    shapes = {"lora_a": (depth, width, 4), "lora_b": (depth, 4, heads, model.language.head_dim)}
    for name, shape in shapes.items():
        new = 0.05 * rng.standard_normal(shape)
        wide["language"]["blocks"]["attention"][letter][name] = new.astype(np.float32)
convert.to_torch(tuned, wide, folder / "apart")
convert.to_torch(tuned, wide, folder / "merged", merge_lora=True)
print(*sorted(str(file.relative_to(folder)) for file in folder.glob("*/adapter/*")), sep="\n")
assert verify(tuned, wide, folder / "merged").all_close
