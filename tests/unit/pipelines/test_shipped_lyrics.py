# SPDX-License-Identifier: Apache-2.0
"""The tiny Lyrics that ships with its refiner answers on a fresh clone, without any download or training."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from lionjax import cli
from lionjax.data.scenes import world
from lionjax.evaluation.metrics.regions import rec_ious
from lionjax.training.init import resolve_weights_file

FOLDER = resolve_weights_file("shipped:tiny_lyrics")
MAX_BYTES = 6_000_000


@pytest.mark.slow
def test_one_command_on_a_fresh_clone_gives_tags_boxes_spatial_text_and_an_answer(tmp_path, capsys):
    scene = world.sample_scene("heldout", 0)
    Image.fromarray(scene.render(224)).save(tmp_path / "scene.png")
    words = ["generate", "shipped:tiny_lyrics", "--image", str(tmp_path / "scene.png"), "--json"]
    assert cli.main([*words, "--prompt", "What is in the image?"]) == 0
    reply = json.loads(capsys.readouterr().out)
    refined, true_words = reply["refined"], {word for thing in scene.things for word in (thing.shape, thing.color)}
    assert set(refined["tags"]) & true_words
    assert len(refined["boxes"]) == len(refined["names"]) > 0
    assert refined["spatial_text"].startswith(f" {refined['names'][0]}: [")
    true_boxes = np.array([thing.box for thing in scene.things])
    hits = [max(rec_ious([tuple(box)] * len(true_boxes), true_boxes)) for box in refined["boxes"]]
    assert max(hits) > 0.5
    said = reply["text"].lower()
    assert any(word in said for word in true_words), said


def test_the_shipped_folder_is_small_and_names_no_file_of_the_machine_that_made_it():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert 1_000_000 < sum(path.stat().st_size for path in files) < MAX_BYTES
    texts = [path.read_text() for path in files if path.suffix == ".json"]
    assert not [text for text in texts if re.search(r'"/\w|\bruns/', text)]  # no absolute path, no run folder
