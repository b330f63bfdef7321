# SPDX-License-Identifier: Apache-2.0
"""A model that reads regions refines images when it is asked: by its own experts, or by a refiner's folder."""

import dataclasses
import json

import numpy as np
import pytest
import small_lion
import small_lyrics
from small_detector import picture

import lionjax
from lionjax import cli
from lionjax.core.types import UserError
from lionjax.data.regions import ImageRegions
from lionjax.inference import loading
from lionjax.inference.model import Model
from lionjax.pipelines import loading as with_helpers
from lionjax.pipelines import refiner

WIDTH = small_lyrics.DETECTOR.feature_width
IMAGE = picture(50, 40)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    """The model of a run's folder, with its own tagger and detector."""
    workdir = tmp_path_factory.mktemp("lyrics") / "run"
    small_lyrics.finished(workdir, small_lyrics.experiment())
    return lionjax.load(workdir)


def found(scale: float) -> ImageRegions:
    features_KD = scale * np.random.default_rng(0).standard_normal((5, WIDTH)).astype(np.float32)
    box = (0.1, -0.05, 0.6, 0.8)
    return ImageRegions(("cat", "dog"), (), (box,), (0.7,), ("a cat",), ("cat",), features_KD, "abc")


@pytest.mark.slow
def test_given_regions_are_read_and_are_in_the_answer(model):
    first, second = found(1.0), found(-2.0)
    one, two = (model.answer([IMAGE], ["What is it?"], regions=[regions])[0] for regions in (first, second))
    assert one.regions is first and two.regions is second and one.token_ids != two.token_ids
    model = dataclasses.replace(model, refine=lambda images: [second] * len(images))
    (again,) = model.answer([IMAGE], ["What is it?"])
    assert again.regions is second and again.token_ids == two.token_ids
    ranked = model.rank_candidates([IMAGE], ["What is it?"], [["red", "blue"]])
    assert sorted(ranked[0]) == [0, 1]


@pytest.mark.slow
def test_one_command_prints_tags_boxes_spatial_text_and_an_answer(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(with_helpers, "load", lambda folder, prompt_length, refiner: model)  # the run, which takes time
    IMAGE.save(tmp_path / "a.png")
    words = ["generate", str(tmp_path), "--image", str(tmp_path / "a.png"), "--prompt", "What is it?"]
    calls, real = [], refiner.Refiner.refine
    monkeypatch.setattr(refiner.Refiner, "refine", lambda self, images: (calls.append(self), real(self, images))[1])
    assert cli.main(words) == 0  # the experts of its own checkpoint
    lines = capsys.readouterr().out.splitlines()
    assert len(calls) == 1 and lines[0].startswith("tags ")
    (expected,) = real(calls[0], [IMAGE])
    assert lines[0] == f"tags {' | '.join(expected.tags)}"
    assert lines[1 + len(expected.boxes)] == f"spatial text{expected.spatial_text}"
    assert expected.features_KD.shape == (12, WIDTH)
    monkeypatch.setattr(refiner.Refiner, "refine", lambda self, images: [found(1.0)])
    assert cli.main([*words, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)["refined"]
    assert seen["names"] == ["cat"] and seen["spatial_text"] == " cat: [0.1, -0.05, 0.6, 0.8]"


def test_a_model_without_a_refiner_and_a_refiner_that_does_not_fit_are_refused_in_a_sentence(model, tmp_path):
    assert model.refine is not None
    with pytest.raises(UserError, match="this model reads regions, and its folder has no refiner"):
        dataclasses.replace(model, refine=None).answer([IMAGE], ["What is it?"])
    with pytest.raises(UserError, match="1 regions were given for 2 prompts"):
        model.answer([IMAGE] * 2, ["What is it?"] * 2, regions=[found(1.0)])
    with pytest.raises(UserError, match="the model's tagger needs ram_tag_list.txt"):
        refiner.attach(dataclasses.replace(model, origin_files={})).answer([IMAGE], ["What is it?"])
    with pytest.raises(UserError, match="the kept regions have 5 features, but the model reads 36"):
        wrong = dataclasses.replace(found(1.0), features_KD=np.zeros((2, 5), np.float32))
        model.answer([IMAGE], ["What is it?"], regions=[wrong])


def test_regions_of_another_detector_are_refused_by_their_digest(model, tmp_path):
    processor = dataclasses.replace(model.experiment.data.processor, regions_digest="0123")
    data = dataclasses.replace(model.experiment.data, processor=processor)
    engine = dataclasses.replace(model.engine, processor=type(model.processor)(processor))
    pinned = dataclasses.replace(model, experiment=dataclasses.replace(model.experiment, data=data), engine=engine)
    with pytest.raises(UserError, match="were made by the refiner 'abc', but processor.regions_digest is '0123'"):
        pinned.answer([IMAGE], ["What is it?"], regions=[found(1.0)])
    with pytest.raises(UserError, match="the model was trained with regions of the refiner 0123, but this one is"):
        refiner.check_fit(refiner.OwnExperts(model).refiner, pinned)


def test_a_model_that_reads_no_regions_takes_none():
    plain = loading.from_params(small_lion.experiment(), {})
    assert refiner.attach(plain) is plain
    with pytest.raises(UserError, match="this model reads no regions; leave out the refiner"):
        refiner.attach(plain, "anywhere")
    with pytest.raises(UserError, match="this model reads no regions; leave them out"):
        plain.answer([IMAGE], ["What is it?"], regions=[found(1.0)])
