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
# # Point and segment
#
# From words to boxes by a detector (Grounding DINO), from boxes to masks by SAM, from a click to what lies there, and
# masks for other programs. All three models are small ones that come with lionjax and know drawn scenes; folders of the
# released models are loaded by the same calls. Half a minute on two CPU cores.

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
import numpy as np
from IPython.display import display
from PIL import Image
from safetensors.numpy import load_file

from lionjax.core import params as trees
from lionjax.data.scenes.world import sample_scene
from lionjax.evaluation.report.plots import Overlay, draw_overlays
from lionjax.inference import detector
from lionjax.inference.segmenter import Segmenter
from lionjax.models.vision.sam_encoder import TINY_SAM
from lionjax.training.init import resolve_weights_file

dino = detector.load(resolve_weights_file("shipped:tiny_lyrics/origin/refiner/detector"))
weights = trees.unflatten(load_file(resolve_weights_file("shipped:tiny_sam.safetensors")))["sam"]
sam = Segmenter(TINY_SAM, weights)
scene = sample_scene("heldout", 7)
image = Image.fromarray(scene.render(448))
display(image)

# %% [markdown]
# ## From words to boxes
#
# Names are separated by full stops.

# %%
(found,) = dino.detect([image], "blue cross. blue star. cyan triangle. green circle. purple circle.")
boxes = [tuple(map(float, box)) for box in np.clip(found.boxes_K4, 0, 1)]
for score, phrase, box in zip(found.scores, found.phrases, boxes):
    print(f"{score:.2f} {phrase:16} {np.round(box, 2)}")

# %% [markdown]
# ## From boxes to masks
#
# The true masks of a drawn scene are known, so each mask has an IoU, written behind its name.

# %%
masks = sam.masks(image, boxes)
truth = scene.masks(448)
ious = [max(float((mask & true).sum() / (mask | true).sum()) for true in truth) for mask in masks]
print(f"mean IoU {np.mean(ious):.2f}")
assert len(masks) >= 4 and np.mean(ious) > 0.6
labels = [f"{phrase} {iou:.2f}" for phrase, iou in zip(found.phrases, ious)]
display(
    draw_overlays(
        image, [Overlay(*row) for row in zip(boxes, labels, [None] * len(boxes), [False] * len(boxes), masks)]
    )
)

# %% [markdown]
# ## From a click to what lies there
#
# The smallest mask under the point. `lionjax serve` has a page on which one clicks; a point goes to the model as a
# small box around it.

# %%
thing = scene.things[0]
x, y = np.mean(np.reshape(thing.box, (2, 2)), axis=0)
hits = [k for k, mask in enumerate(masks) if mask[int(y * 448), int(x * 448)]]
clicked = min(hits, key=lambda k: masks[k].sum())
print(f"at ({x:.2f}, {y:.2f}): {found.phrases[clicked]}; it is a {thing.color} {thing.shape}")
assert thing.shape in found.phrases[clicked]

# %% [markdown]
# ## Ask about a box
#
# A chat model reads boxes in prompts: `{box}` is replaced by the box, and the answer may have boxes of its own.

# %%
import lionjax

model = lionjax.load("shipped:tiny_lyrics")
(answer,) = model.answer([image], ["What is in {box}?"], boxes=[[boxes[clicked]]])
print(answer.text)
assert answer.text

# %% [markdown]
# ## Masks for other programs
#
# COCO's run lengths, as `lionjax serve` sends them.

# %%
from pycocotools import mask as coco

lengths = coco.encode(np.asfortranarray(masks[clicked].astype(np.uint8)))
print(lengths["size"], lengths["counts"][:40])
assert (coco.decode(lengths) == masks[clicked]).all()
