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
# # Fine-tune with LoRA on your own data
#
# Own images and a JSON of conversations in LLaVA's format, inspected, learned by LoRA, and asked about. The same four
# commands fine-tune a released LLaVA; here the model is a tiny one, so that all takes about two minutes on two CPU
# cores.

# %%
# Installs lionjax where it is not, as on Colab. Put the address of this repository in place of URL.
import importlib.util
import os
import subprocess
import sys

SOURCE = os.environ.get("LIONJAX_SOURCE", "git+URL")
if importlib.util.find_spec("lionjax") is None:
    assert not SOURCE.endswith("URL"), "put the address of this repository in place of URL"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"lionjax[data] @ {SOURCE}"], check=True)

# %% [markdown]
# ## The data
#
# Badges in three colors, and the team of each, which no model can know: team star is red, team ring green, team heart
# blue. In a project of your own, `badges/` is your folder of photographs and `talks.json` your file.

# %%
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLORS = {"star": (210, 40, 40), "ring": (40, 160, 60), "heart": (40, 80, 200)}
QUESTION = "Which team is it?"
rng = np.random.default_rng(0)


def draw_badge(team: str) -> Image.Image:
    """A disk of the team's color somewhere on a gray background."""
    image = Image.new("RGB", (224, 224), tuple(int(x) for x in rng.integers(150, 220, 3)))
    radius, (x, y) = rng.integers(30, 60), rng.integers(70, 154, 2)
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), COLORS[team])
    return image


Path("badges").mkdir(exist_ok=True)
rows = []
for number in range(96):
    team = list(COLORS)[number % 3]
    draw_badge(team).save(f"badges/{number}.png")
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": team}]
    rows.append({"image": f"{number}.png", "conversations": turns})
Path("talks.json").write_text(json.dumps(rows))

# %% [markdown]
# ## Inspect
#
# `lionjax data inspect` says what is read, and what cannot be. Commands run here with `lionjax.cli.main`; in a terminal
# they begin with `lionjax`.

# %%
from lionjax.cli import main

assert main("data inspect talks.json --images badges --limit 2".split()) == 0

# %% [markdown]
# ## The base
#
# For a released model this is `lionjax convert llava-1.5-7b-hf base --to jax`. Here it is a small LLaVA over the vision
# tower and the language model that come with lionjax, after a few steps on drawn scenes.

# %%
# The tower is aligned with the language model, so a projector that starts as the identity needs no first stage.
few_steps = "--model.identity_init_scale 0.08 --stages.0.steps 1 --stages.1.steps 30 --stages.1.warmup_steps 5"
assert main(f"train tiny_llava --workdir base_run --run.evaluate_limit 0 {few_steps}".split()) == 0
assert main("convert base_run base --to jax".split()) == 0

# %% [markdown]
# ## Before

# %%
import lionjax

tests = [(team, draw_badge(team)) for team in list(COLORS) * 4]


def accuracy(model) -> float:
    """Share of new badges whose team the model names."""
    answers = model.answer([image for _, image in tests], [QUESTION] * len(tests))
    print([answer.text for answer in answers])
    return float(np.mean([answer.text == team for answer, (team, _) in zip(answers, tests)]))


before = accuracy(lionjax.load("base"))
print(f"accuracy {before:.2f}")

# %% [markdown]
# ## Train
#
# `own_data` is a config that ships: LoRA on the language model of the base. A tenth of the images is held out.

# %%
command = "train own_data --data talks.json --images badges --base base --workdir run"
settings = "--epochs 16 --batch_size 16 --learning_rate 3e-3 --lora_rank 16 --run.log_every 15"
assert main(f"{command} {settings}".split()) == 0

# %% [markdown]
# ## After

# %%
model = lionjax.load("run")
after = accuracy(model)
print(f"accuracy {before:.2f} before, {after:.2f} after")
assert after > before + 0.4

# %% [markdown]
# ## Keep only the adapter, or merge it
#
# `lionjax convert` writes the run as PyTorch weights with the LoRA as PEFT's adapter, or merged into the weights.

# %%
assert main("convert run exported --to torch".split()) == 0
assert main("convert run merged --to torch --merge-lora".split()) == 0
print(*sorted(str(file) for folder in ("exported", "merged") for file in Path(folder).rglob("*.safetensors")), sep="\n")
