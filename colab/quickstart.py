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
# # Quickstart
#
# A small model that comes with lionjax describes an image, answers questions, and finds things with boxes and masks.
# Nothing is downloaded or trained. It knows drawn scenes of colored shapes only; a released model is loaded and asked
# with the same calls. Under a minute on two CPU cores.

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

# %%
from IPython.display import display
from PIL import Image

import lionjax
from lionjax.data.scenes.world import sample_scene

model = lionjax.load("shipped:tiny_lyrics")
image = Image.fromarray(sample_scene("heldout", 7).render(448))
display(image)

# %% [markdown]
# ## Ask
#
# A list of images and one of prompts, which are answered together. Images are paths, PIL images or uint8 arrays.

# %%
prompts = ["Describe the image in one short sentence.", "How many objects are there?", "Is there a red star?"]
answers = model.answer([image] * len(prompts), prompts)
for prompt, answer in zip(prompts, answers):
    print(f"{prompt} {answer.text}")
assert all(answer.text for answer in answers)

# %% [markdown]
# ## Boxes
#
# Boxes in an answer are in `boxes`: x0, y0, x1, y1 as fractions of the image. This model, Lyrics, also says what its
# detector found before it answered: tags, boxes and their names.

# %%
from lionjax.evaluation.report.plots import Overlay, answer_overlays, draw_overlays

(found,) = model.answer([image], ["Where is the green circle?"])
print(found.text, found.boxes)
assert len(found.boxes) == 1
display(draw_overlays(image, answer_overlays(found.boxes, (), ())))
seen = found.regions
display(draw_overlays(image, [Overlay(box, name) for box, name in zip(seen.boxes, seen.names)]))

# %% [markdown]
# ## Masks
#
# A small SAM comes with lionjax as well; it cuts out what is in a box. NExT-Chat and LISA have one inside, and their
# answers have `masks` beside the boxes.

# %%
from safetensors.numpy import load_file

from lionjax.core import params as trees
from lionjax.inference.segmenter import Segmenter
from lionjax.models.vision.sam_encoder import TINY_SAM
from lionjax.training.init import resolve_weights_file

weights = trees.unflatten(load_file(resolve_weights_file("shipped:tiny_sam.safetensors")))["sam"]
masks = Segmenter(TINY_SAM, weights).masks(image, [tuple(box) for box in found.boxes])
assert masks.shape == (1, 448, 448) and masks.any()
display(draw_overlays(image, answer_overlays(found.boxes, masks, ["green circle"])))

# %% [markdown]
# ## Sample
#
# Answers are greedy by default. With `do_sample` they are drawn, each prompt from its own seed.

# %%
import dataclasses

sampled = dataclasses.replace(model.generation_config("image_level"), do_sample=True, temperature=0.8, top_p=0.95)
for answer in model.answer([image] * 3, prompts[:1] * 3, generation_config=sampled, seed=[1, 2, 3]):
    print(answer.text)

# %% [markdown]
# ## Next
#
# `lionjax serve shipped:tiny_lyrics` is a web page and OpenAI's API for the same model. The other notebooks fine-tune a
# model on own data (`finetune_own_data`), point and segment (`point_and_segment`), and convert a LLaVA of PyTorch
# (`weights_both_ways`).
