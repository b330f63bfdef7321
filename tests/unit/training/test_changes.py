# SPDX-License-Identifier: Apache-2.0
"""A run gets more steps, another stage or a moved tokenizer in its folder, or hears why it does not."""

import dataclasses
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import small_lion
import toy

from lionjax.core.types import UserError
from lionjax.data import tokenizer
from lionjax.training import changes, checkpoint, loop, run_folder
from lionjax.training.optimizer import learning_rate_schedule

CONSTANT = {"warmup_steps": 0, "end_learning_rate": 1e-2}  # a rate that does not depend on the number of steps
ONE, TWO = toy.stage("one", 2, **CONSTANT), toy.stage("two", 3, ("hint", "blocks/up", "words"), **CONSTANT)
THREE = toy.stage("three", 2, ("tower", "hint"), **CONSTANT)  # no other stage trains the tower


def experiment(*stages, **changed):
    return toy.experiment(*stages, run={"frozen_dtype": "float32", "save_every": 1, "max_to_keep": 9} | changed)


def train(workdir, *stages, **changed):
    params, report = loop.train(experiment(*stages, **changed), workdir, toy.Batches)
    return checkpoint.leaf_checksums(params), report


def longer(stage, steps, **changed):
    return dataclasses.replace(stage, steps=steps, **changed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two stages."""
    workdir = tmp_path_factory.mktemp("finished")
    train(workdir, ONE, TWO)
    return workdir


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The folder of a run that was planned with more steps in the second stage and with a third, and its parameters."""
    workdir = tmp_path_factory.mktemp("planned")
    params, _ = train(workdir, ONE, longer(TWO, 5), THREE)
    return workdir, params


def copy_at(workdir, target, update):
    """A copy of a run's folder as it was after `update`."""
    shutil.copytree(workdir, target)
    for step in checkpoint.all_steps(target / "checkpoints"):
        if step > update:
            shutil.rmtree(target / "checkpoints" / str(step))
    for stage, path in checkpoint.all_bases(target / "base").items():
        if update < (0, 2, 5)[stage]:
            shutil.rmtree(path)
    return target


def changes_of(workdir):
    return [json.loads(line) for line in (workdir / "changes.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("update", [1, 4, 5], ids=["in stage one", "in stage two", "finished"])
def test_a_run_given_more_steps_and_a_stage_ends_as_one_planned_so(tmp_path, finished, planned, update):
    workdir = copy_at(finished, tmp_path / "run", update)
    params, report = train(workdir, ONE, longer(TWO, 5), THREE)
    assert params == planned[1]
    assert [stage["steps"] for stage in report["stages"]] == [2, 5, 2]
    assert toy.lines(workdir) == toy.lines(planned[0])
    assert sorted(path.name for path in (workdir / "base").iterdir()) == ["0_one", "1_two", "2_three", "3_final"]
    (line,) = changes_of(workdir)
    assert line["update"] == update and line["changed"] == {
        "stages.1.steps": ["3", "5"],
        "stages.2": ["None", "'three'"],
    }
    assert "stage 'three' is added at the end" in line["notes"]


@pytest.mark.slow
def test_a_stage_added_to_a_finished_run_begins_with_its_result(tmp_path, finished):
    workdir = copy_at(finished, tmp_path / "run", 5)
    added = toy.stage("more", 1, TWO.trainable, **CONSTANT)
    _, report = train(workdir, ONE, TWO, added)
    assert [stage["name"] for stage in report["stages"]] == ["one", "two", "more"]
    assert toy.lines(workdir)[:5] == toy.lines(finished)
    before, after = (
        checkpoint.restore_record(folder)["leaves"]
        for folder in (finished / "base" / "2_final", workdir / "base" / "2_more")
    )
    assert before == after and not (workdir / "base" / "2_final").exists()
    assert run_folder.latest_position(workdir, experiment(ONE, TWO, added)) == (3, 0)


@pytest.mark.slow
def test_parameters_of_an_added_stage_go_on_from_the_frozen_values(tmp_path, caplog):
    train(tmp_path, ONE, frozen_dtype="bfloat16")
    what = experiment(ONE, longer(THREE, 1), frozen_dtype="bfloat16")
    caplog.set_level("INFO")
    params, _ = loop.train(what, tmp_path, toy.Batches)
    assert "3 parameters that were frozen so far (hint, ...) go on from the run's bfloat16 values" in caplog.text
    held = np.asarray(params["tower"]["kernel"])
    assert held.dtype == np.float32 and (held != held.astype(jnp.bfloat16)).any()  # trained in its own precision


@pytest.mark.slow
def test_a_stage_that_has_not_begun_may_be_changed_or_left_out(tmp_path, finished):
    other = dataclasses.replace(THREE, name="other", steps=1)  # trains the tower, and no longer the words
    workdir = copy_at(finished, tmp_path / "run", 1)
    params, report = train(workdir, ONE, other)
    assert [stage["name"] for stage in report["stages"]] == ["one", "other"]
    assert params == train(tmp_path / "planned", ONE, other)[0]
    workdir = copy_at(finished, tmp_path / "shorter", 1)
    train(workdir, ONE)
    assert changes_of(workdir)[0]["changed"] == {"stages.1": ["'two'", "None"]}
    assert sorted(path.name for path in (workdir / "base").iterdir()) == ["0_one", "1_final"]


@pytest.mark.slow
def test_a_finished_run_without_its_last_checkpoint_repeats_the_updates_since_the_newest(tmp_path, finished, caplog):
    workdir = copy_at(finished, tmp_path / "run", 5)
    shutil.rmtree(workdir / "checkpoints" / "5")  # as versions before 0.2 left it
    caplog.set_level("INFO")
    _, report = train(workdir, ONE, longer(TWO, 4))
    assert "'two' goes on after step 2, of which the newest checkpoint is; steps 3 to 3 are made again" in caplog.text
    assert report["stages"][1]["steps"] == 4
    assert toy.lines(workdir)[:5] == toy.lines(finished)


@pytest.mark.slow
def test_the_learning_rate_follows_the_schedule_of_the_new_number_of_steps(tmp_path):
    cosine = toy.stage("one", 3, warmup_steps=1)
    train(tmp_path, cosine)
    train(tmp_path, longer(cosine, 6))
    rates = [line["learning_rate"] for line in toy.lines(tmp_path)]
    old, new = (learning_rate_schedule(longer(cosine, steps)) for steps in (3, 6))
    np.testing.assert_allclose(rates, [*map(old, range(3)), *map(new, range(3, 6))], rtol=1e-6)
    (line,) = changes_of(tmp_path)
    (note,) = line["notes"]
    assert note.startswith("stage 'one' follows the learning-rate schedule of 6 steps from step 3 on: 0.00655 there")
    (aside,) = [path for path in (tmp_path / "quarantined").iterdir() if path.is_dir()]
    assert aside.name.startswith("base_1_final")


PLANS = {  # (stage, step) of the newest checkpoint, the changed stages, and the sentence
    "fewer steps than done": ((1, 2), (ONE, longer(TWO, 1)), "stage 'two' has done 2 updates already; give 2 or more"),
    "fewer in a finished run": ((2, 0), (ONE, longer(TWO, 2)), "has done 3 updates already; give 3 or more"),
    "an earlier stage": ((1, 2), (longer(ONE, 9), TWO), "stages.0.steps 2 -> 9 .stage 'one' is finished, and the next"),
    "an earlier stage of a finished run": ((2, 0), (longer(ONE, 9), TWO), "stage 'one' is finished, and the next"),
    "the rate of a finished run": (
        (2, 0),
        (ONE, longer(TWO, 3, learning_rate=1.0)),
        "stages.1.learning_rate 0.01 -> 1.0 .stage 'two' is finished; only with more steps can it go on",
    ),
    "what a stage trains": (
        (0, 1),
        (longer(ONE, 2, trainable=("words",)), TWO),
        "stages.0.trainable .* .stage 'one' has begun and its optimizer state depends on it",
    ),
    "a mixture": ((0, 1), (longer(ONE, 2, mixture=(("vqa", 1.0),)), TWO), "the order of its records depends on it"),
    "a stage that is left out": ((1, 2), (ONE,), "stages.1 'two' -> None .stage 'two' has begun"),
}


@pytest.mark.parametrize("name", PLANS)
def test_what_may_not_change_in_stages_is_named_with_why(tmp_path, name):
    position, stages, sentence = PLANS[name]
    with pytest.raises(UserError, match=sentence) as error:
        changes.plan_changes(tmp_path, experiment(ONE, TWO), experiment(*stages), [position])
    assert "\n" not in str(error.value)


def test_all_that_may_not_change_is_named_at_once_with_why(tmp_path):
    old = experiment(ONE, TWO)
    new = dataclasses.replace(old, seed=3, model=toy.Toy(rate=0.2), data=toy.ToyData(records=12))
    with pytest.raises(UserError) as error:
        changes.plan_changes(tmp_path, old, new, [(0, 0)])
    assert str(error.value) == (
        f"{tmp_path} was made by another config: model.rate 0.1 -> 0.2 (the saved parameters are those of this model); "
        "data.records 24 -> 12 (the parameters are trained on records made with it); seed 0 -> 3 (the initial "
        "parameters and the order of the records depend on it); restore what is named here, or set another --workdir"
    )


def tokenizer_folder(folder, **changed):
    """A folder with the tiny tokenizer, where parts of its file are changed."""
    folder.mkdir(parents=True)
    content = json.loads(tokenizer.TINY_TOKENIZER_FILE.read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | changed))
    return str(folder)


def test_a_moved_tokenizer_is_accepted_where_it_gives_the_same_ids(tmp_path):
    same = tokenizer.load(tokenizer_folder(tmp_path / "same", truncation=None))
    moved = tokenizer.load(tokenizer_folder(tmp_path / "moved"))
    assert tokenizer.describe_difference(same, moved) is None
    other = tokenizer.load(tokenizer_folder(tmp_path / "other", normalizer={"type": "Lowercase"}))
    assert "other rules to split a text" in tokenizer.describe_difference(same, other)
    content = json.loads(tokenizer.TINY_TOKENIZER_FILE.read_text())
    model, vocabulary = content["model"], dict(content["model"]["vocab"])
    first, second = list(vocabulary)[500:502]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    swapped = tokenizer.load(tokenizer_folder(tmp_path / "swapped", model=model | {"vocab": vocabulary}))
    said = tokenizer.describe_difference(same, swapped)
    assert said.startswith("its token ") and "has the id 50" in said


def test_a_moved_tokenizer_is_compared_with_the_copy_of_the_run(tmp_path):
    def with_tokenizer(folder):
        what = small_lion.experiment()
        processor = dataclasses.replace(what.data.processor, tokenizer=str(folder))
        return dataclasses.replace(what, data=dataclasses.replace(what.data, processor=processor))

    old = with_tokenizer(tmp_path / "gone")
    moved = with_tokenizer(tokenizer_folder(tmp_path / "moved"))
    with pytest.raises(UserError, match="the run holds no copy of its tokenizer to compare it with"):
        changes.plan_changes(tmp_path, old, moved, [(0, 1)])
    tokenizer_folder(tmp_path / "origin")
    planned = changes.plan_changes(tmp_path, old, moved, [(0, 1)])
    assert list(planned.fields) == ["data.processor.tokenizer"] and not planned.notes
    other = with_tokenizer(tokenizer_folder(tmp_path / "other", normalizer={"type": "Lowercase"}))
    with pytest.raises(UserError, match="data.processor.tokenizer .*gone.* -> .*other.*other rules to split a text"):
        changes.plan_changes(tmp_path, old, other, [(0, 1)])


def test_an_added_stage_may_read_a_further_source(tmp_path):
    old = small_lion.experiment()
    sources = (*old.data.sources, dataclasses.replace(old.data.sources[0], name="more"))
    new = dataclasses.replace(old, data=dataclasses.replace(old.data, sources=sources))
    planned = changes.plan_changes(tmp_path, old, new, [(3, 0)])
    assert planned.fields == {"data.sources.1": (None, "more")}


@pytest.mark.parametrize(
    ("field", "mutable"),
    [
        ("data.on_bad_record", True),
        ("data.max_bad_fraction", True),
        ("data.sources.1.image_dir", True),
        ("data.sources.0.file", True),
        ("data.sources.0.heldout_fraction", False),
        ("data.sources.0.class", False),
        ("stages.0.trainable", False),
        ("model.dtype", False),
    ],
)
def test_what_stopped_a_run_may_be_mended_and_what_its_parameters_depend_on_may_not(field, mutable):
    assert mutable == any(re.fullmatch(pattern, field) for pattern in changes.MUTABLE_FIELDS)
