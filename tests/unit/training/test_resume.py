# SPDX-License-Identifier: Apache-2.0
"""A run that was stopped, damaged or moved goes on as if nothing had happened, or says why it does not."""

import dataclasses
import fcntl
import json
import logging
import os
import shutil
import signal

import jax
import numpy as np
import pytest
import toy
from safetensors.numpy import save_file

from lionjax.core import config, sharding
from lionjax.core import params as trees
from lionjax.core.errors import RetryError
from lionjax.core.sharding import MeshConfig
from lionjax.core.types import UserError
from lionjax.training import changes, checkpoint, distributed, feature_cache, init, loop, resume, run_folder
from lionjax.training import step as stages

TOTAL = 11  # updates of the toy's two stages, 6 and 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed: its folder, parameters and report."""
    workdir = tmp_path_factory.mktemp("whole")
    params, report = loop.train(toy.experiment(), workdir, toy.Batches)
    return workdir, checkpoint.leaf_checksums(params), report


def copy_of(workdir, target, update=TOTAL):
    """A folder as the run had left it when it was killed after some updates."""
    shutil.copytree(workdir, target)
    for step in checkpoint.all_steps(target / "checkpoints"):
        if step > update:
            shutil.rmtree(target / "checkpoints" / str(step))
    for stage, starts in ((1, 6), (2, TOTAL)):
        if update < starts:
            shutil.rmtree(checkpoint.all_bases(target / "base")[stage])
    return target


def stopping(number, kind=signal.SIGTERM):
    """Batches that send this process a signal when the `number`-th is asked for, counted over all stages."""
    asked = []

    class Stopping(toy.Batches):
        def __next__(self):
            batch = super().__next__()
            asked.append(batch)
            if len(asked) == number + 1:  # one was the example
                os.kill(os.getpid(), kind)
            return batch

    return Stopping


def train(workdir, what=None, batches=toy.Batches):
    params, report = loop.train(what or toy.experiment(), workdir, batches)
    return checkpoint.leaf_checksums(params), report


@pytest.mark.slow
def test_a_run_stopped_anywhere_ends_with_the_same_bits_and_the_same_lines(tmp_path, whole):
    folder, expected, report = whole
    for at in (1, 3, 6, 9):  # at once, between saves, at the end of a stage, in the second stage
        workdir = tmp_path / str(at)
        with pytest.raises(SystemExit) as stop:
            train(workdir, batches=stopping(at))
        assert stop.value.code == 0
        found, again = train(workdir)
        assert found == expected
        assert toy.lines(workdir) == toy.lines(folder)
        for old, new in zip(report["stages"], again["stages"], strict=True):
            for name in ("steps", "loss_first", "loss_last", "trainable_parameters", "frozen_unchanged"):
                assert old[name] == new[name]


@pytest.mark.slow
def test_ctrl_c_saves_the_update_it_interrupts_and_says_so(tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, batches=stopping(3, signal.SIGINT))
    assert checkpoint.all_steps(tmp_path / "checkpoints")[0] == 3
    assert "stopped and saved at stage 'one', step 3" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_a_finished_folder_gives_its_result_without_training(whole):
    folder, expected, report = whole
    found, again = train(folder, batches=stopping(2))  # would stop at the first real batch
    assert found == expected and again["stages"] == report["stages"]


def test_report_and_metrics_hold_what_is_promised(whole):
    folder, _, report = whole
    assert report["stages"] == json.loads((folder / "report.json").read_text())["stages"]
    one, two = report["stages"]
    assert [one["name"], one["steps"], two["name"], two["steps"]] == ["one", 6, "two", 5]
    assert one["frozen_unchanged"] is True and one["compilations"] == two["compilations"] == 1
    assert two["trainable_parameters"] == 16 + 3 * (16 * 16 + 16) + 24 * 16
    assert one["seconds"] > 0 and np.isfinite([one["loss_first"], one["loss_last"]]).all()
    speed = {"images_per_second", "tokens_per_second", "step_seconds", "compile_seconds", "peak_bytes"}
    assert set(report["speed"]) == speed and min(report["speed"].values()) > 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == list(range(1, TOTAL + 1))
    wanted = {"stage", "step", "loss", "learning_rate", "grad_norm", "images_per_second", "tokens_per_second"}
    assert wanted | {"seconds"} <= set(lines[0]) and {"data", "step"} <= set(lines[0]["seconds"])


def test_a_half_written_line_and_lines_of_lost_updates_are_made_again(tmp_path, whole):
    folder, expected, _ = whole
    workdir = copy_of(folder, tmp_path / "run", update=8)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "two", "step": 5, "upd')
    assert train(workdir)[0] == expected
    assert toy.lines(workdir) == toy.lines(folder)


def test_a_damaged_step_is_put_aside_by_name_and_the_one_before_it_is_used(tmp_path, whole, caplog):
    folder, expected, _ = whole
    workdir = copy_of(folder, tmp_path / "run", update=10)
    files = [path for path in (workdir / "checkpoints" / "10").rglob("d/*") if path.stat().st_size > 1000]
    data = max(files, key=lambda path: path.stat().st_size)
    whole_bytes = bytearray(data.read_bytes())
    whole_bytes[len(whole_bytes) // 2] ^= 1
    data.write_bytes(whole_bytes)
    with caplog.at_level(logging.WARNING):
        found, _ = train(workdir)
    assert found == expected and toy.lines(workdir) == toy.lines(folder)
    (aside,) = [path for path in (workdir / "quarantined").iterdir() if path.is_dir()]
    assert "checkpoints_10" in aside.name and str(workdir / "checkpoints" / "10") in caplog.text
    assert "going back to stage 'two', step 2" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("part", ["base/1_two/learned", "frozen", "base/1_two/record"])
def test_damaged_base_of_a_stage_is_rebuilt(tmp_path, whole, caplog, part):
    folder, expected, _ = whole
    workdir = copy_of(folder, tmp_path / "run", update=8)
    for data in (workdir / part).rglob("*"):
        if data.is_file() and ("d" in data.parts or data.name == "metadata"):
            data.write_bytes(bytes(255 - byte for byte in data.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert train(workdir)[0] == expected
    assert f"moved {tmp_path}" in caplog.text


def test_frozen_parameters_that_cannot_be_mended_are_an_error(tmp_path, whole, monkeypatch):
    workdir = copy_of(whole[0], tmp_path / "run", update=8)
    shutil.rmtree(workdir / "frozen")
    start = init.init_params
    other = lambda what, *rest: start(dataclasses.replace(what, seed=5), *rest)  # noqa: E731
    monkeypatch.setattr(resume, "init_params", other)
    with pytest.raises(UserError, match="its config no longer gives the same ones"):
        train(workdir)


@pytest.mark.slow
def test_run_resumes_on_another_mesh(tmp_path, whole):
    folder, _, _ = whole
    workdir = copy_of(folder, tmp_path / "run", update=8)
    train(workdir, toy.experiment(mesh=MeshConfig(2, 2, 2)))
    losses = [[line["loss"] for line in toy.lines(run)] for run in (folder, workdir)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert len(losses[1]) == TOTAL and losses[0][:8] == losses[1][:8]


def test_a_folder_of_another_config_is_refused_with_the_fields_that_differ(tmp_path, whole):
    what = toy.experiment()
    one = dataclasses.replace(what.stages[0], weight_decay=0.5)
    other = dataclasses.replace(what, seed=3, stages=(one, what.stages[1]))
    with pytest.raises(
        UserError, match=r"another config: stages.0.weight_decay 0.05 -> 0.5 \(stage .one. is finished.*; seed 0 -> 3"
    ):
        train(whole[0], other)
    free = dataclasses.replace(what, run=dataclasses.replace(what.run, log_every=7, save_every=100, max_to_keep=1))
    workdir = copy_of(whole[0], tmp_path / "run")
    assert train(workdir, free)[0] == whole[1]


def test_a_first_start_that_failed_before_it_had_weights_may_be_mended(tmp_path):
    run_folder.check_or_write_config(tmp_path, toy.experiment(weights=(("tower", "missing.safetensors"),)))
    run_folder.check_or_write_config(tmp_path, toy.experiment())
    assert config.from_json((tmp_path / "config.json").read_text()) == toy.experiment()


def test_a_folder_that_cannot_be_used_is_refused_in_one_sentence(tmp_path, whole):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in .*file"):
        train(tmp_path / "file")
    with (whole[0] / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RetryError, match="another process is training"):
            train(whole[0])
    orphan = copy_of(whole[0], tmp_path / "orphan")
    (orphan / "config.json").unlink()
    with pytest.raises(UserError, match="holds checkpoints but no config.json"):
        train(orphan)


def test_a_dtype_that_the_config_does_not_want_is_refused(tmp_path, whole, monkeypatch):
    workdir = copy_of(whole[0], tmp_path / "run", update=8)
    monkeypatch.setattr(changes, "MUTABLE_FIELDS", (*changes.MUTABLE_FIELDS, r"run\.frozen_dtype"))
    what = toy.experiment(run={"frozen_dtype": "float32"})
    with pytest.raises(UserError, match="'never/.* was saved as bfloat16 .* needs float32"):
        train(workdir, what)


def test_frozen_parameters_stand_on_disk_once_and_steps_do_not_hold_them(whole):
    folder = whole[0]
    assert len(list((folder / "frozen").iterdir())) == 1
    leaves = checkpoint.restore_record(folder / "checkpoints" / "10")["leaves"]
    trained = ("hint", "blocks/up", "words")
    assert all(any(name in leaf for name in trained) or "count" in leaf for leaf in leaves)


@pytest.mark.slow
def test_a_stage_from_scratch_begins_with_the_first_parameters(tmp_path):
    two = toy.stage("two", 4, ("blocks", "hint"), start="scratch", system=(("attention", 0.5),))
    what = toy.experiment(toy.stage("one", 2), two)
    expected, _ = train(tmp_path / "a", what)
    with pytest.raises(SystemExit):
        train(tmp_path / "b", what, batches=stopping(5))
    assert train(tmp_path / "b", what)[0] == expected
    result = layout_and_read(tmp_path / "a", what)
    first = sharding.init_sharded(toy.Toy().init, jax.random.key(0), toy.batch_of(range(8)))
    assert (result["output"]["kernel"] == first["output"]["kernel"]).all()  # what stage one made of it is gone
    assert not (result["hint"] == first["hint"]).all()


def layout_and_read(workdir, what):
    mesh = sharding.make_mesh(what.mesh)
    layout = init.make_param_specs(what, toy.batch_of(range(8)), mesh)
    return checkpoint.restore_tree(workdir / "base" / "2_final", {"learned": layout.trainable})[0]["learned"]


@pytest.mark.slow
def test_weight_files_are_read_by_path_and_the_rest_is_random(tmp_path):
    random = np.random.default_rng(0)
    tower = {"tower/kernel": random.normal(size=(192, 16)), "tower/bias": random.normal(size=16)}
    tower = {name: value.astype(np.float32) for name, value in tower.items()}
    save_file(tower, tmp_path / "tower.safetensors")
    what = toy.experiment(weights=(("tower", str(tmp_path / "tower.safetensors")),))
    layout = init.make_param_specs(what, toy.batch_of(range(8)), sharding.make_mesh(MeshConfig()))
    never, learned = init.init_params(what, toy.batch_of(range(8)), layout)
    np.testing.assert_array_equal(never["tower"]["kernel"], tower["tower/kernel"].astype("bfloat16"))
    plain = sharding.init_sharded(toy.Toy().init, jax.random.key(0), toy.batch_of(range(8)))
    flat = trees.flatten(plain)
    assert all((leaf == flat[path]).all() for path, leaf in trees.flatten(learned).items())

    cases = {
        "lacks 'tower/bias', which no stage trains": {"tower/kernel": tower["tower/kernel"]},
        "holds 'tower/gate', which this model does not have": tower | {"tower/gate": tower["tower/bias"]},
        r"'tower/bias' has shape \(3,\), but the config needs \(16,\)": tower | {"tower/bias": tower["tower/bias"][:3]},
    }
    for sentence, tensors in cases.items():
        save_file(tensors, tmp_path / "tower.safetensors")
        with pytest.raises(UserError, match=sentence):
            init.init_params(what, toy.batch_of(range(8)), layout)
    (tmp_path / "tower.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read"):
        init.init_params(what, toy.batch_of(range(8)), layout)


@pytest.mark.slow
def test_cached_features_give_the_same_losses_and_run_the_tower_once_per_record(tmp_path, monkeypatch):
    seen = []
    seer = feature_cache.make_feature_fn

    def counting(*args):
        see = seer(*args)
        return lambda batch: seen.append(batch.record_B.tolist()) or see(batch)

    monkeypatch.setattr(feature_cache, "make_feature_fn", counting)
    stages = (toy.stage("one", 7), toy.stage("two", 5, ("hint", "words")))
    plain, cached = (toy.experiment(*stages, run={"cache_features": flag}) for flag in (False, True))
    train(tmp_path / "plain", plain)
    train(tmp_path / "cached", cached)
    losses = [[line["loss"] for line in toy.lines(tmp_path / name)] for name in ("plain", "cached")]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    assert len(losses[0]) == 12 and len(seen) == 3 + 1  # 24 records in batches of 8, and a look at stage two's first
    assert sorted(sum(seen[:3], [])) == list(range(24))


def test_a_stage_that_sees_otherwise_begins_with_an_empty_memory():
    memory, batches = feature_cache.FeatureCache(10**6), toy.Batches(toy.ToyData(), toy.stage(), 0, 8, 0, 1)
    for value, held in ((1.0, 24), (1.0, 24), (2.0, 8)):
        see = lambda batch, value=value: np.full((len(batch.record_B), 4), value)  # noqa: E731
        kept = feature_cache.CachedBatches(batches, see, memory)
        for _ in range(3 if value == 1.0 else 1):
            assert (next(kept).features == value).all()
        assert len(memory.rows) == held


@pytest.mark.slow
def test_a_run_with_kept_features_goes_on_with_the_same_bits(tmp_path):
    what = toy.experiment(toy.stage("one", 8), run={"cache_features": True})
    expected, _ = train(tmp_path / "whole", what)
    with pytest.raises(SystemExit):
        train(tmp_path / "stopped", what, batches=stopping(5))
    assert train(tmp_path / "stopped", what)[0] == expected


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"optimizer": "muon"}, {"moment_dtype": "bfloat16", "second_moment": "factored"}])
def test_run_with_another_optimizer_state_than_that_of_adamw_resumes_bitwise_equal(tmp_path, changes):
    what = toy.experiment(toy.stage("one", 6, **changes))
    expected, _ = train(tmp_path / "whole", what)
    with pytest.raises(SystemExit):
        train(tmp_path / "stopped", what, batches=stopping(3))
    assert train(tmp_path / "stopped", what)[0] == expected


def test_caching_features_of_a_trained_tower_or_augmented_images_is_refused(tmp_path):
    what = toy.experiment(toy.stage(trainable=("tower", "output")), run={"cache_features": True})
    with pytest.raises(UserError, match="features depend on a parameter that some stage trains"):
        train(tmp_path / "trained", what)
    changing = type("Changing", (toy.Batches,), {"random_augmentation": True})
    with pytest.raises(UserError, match="the data augment images at random"):
        train(tmp_path / "changing", toy.experiment(run={"cache_features": True}), changing)


def test_cached_features_stay_within_their_memory_limit():
    batches = toy.Batches(toy.ToyData(), toy.stage(), 0, 8, 0, 1)
    see = lambda batch: np.ones((len(batch.record_B), 100), np.float32)  # noqa: E731
    memory = feature_cache.FeatureCache(5 * 400)
    kept = feature_cache.CachedBatches(batches, see, memory)
    for _ in range(6):
        assert next(kept).features.shape == (8, 100)
    assert len(memory.rows) == 5 and memory.num_bytes == 2000


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_second_signal_acts_at_once_as_it_would_without_us(number):
    class Acted(Exception):
        pass

    def act(*_):
        raise Acted

    before = signal.signal(number, act)
    try:
        with distributed.PreemptionHandler() as stop:
            assert not stop.should_stop()
            os.kill(os.getpid(), number)
            assert stop.should_stop() and stop.received_signal == number
            with pytest.raises(Acted):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is act
    finally:
        signal.signal(number, before)


def test_a_step_that_changes_a_frozen_parameter_ends_the_run(tmp_path, monkeypatch):
    make_step = stages.make_train_step

    def changing(*args):
        step = make_step(*args)

        def run(state, frozen, *rest):
            made = step(state, frozen, *rest)
            frozen["hint"] = frozen["hint"].at[0].add(1.0)
            return made

        return run

    monkeypatch.setattr(stages, "make_train_step", changing)
    what = toy.experiment(toy.stage("one", 2))
    with pytest.raises(RuntimeError, match="stage 'one' changed frozen parameters"):
        loop.train(what, tmp_path, toy.Batches)
    assert list(checkpoint.all_bases(tmp_path / "base")) == [0]  # the stage is not taken as done


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\x00"], ids=["empty", "cut", "binary"])
def test_damaged_small_files_do_not_stop_a_run_and_are_kept(tmp_path, whole, content, caplog):
    workdir = copy_of(whole[0], tmp_path / "run", update=8)
    lines = (workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_bytes(b"".join(lines[:2]) + content + b"\n" + b"".join(lines[2:]))
    (workdir / "report.json").write_bytes(content)
    (workdir / "config.json").write_bytes(content)
    weights, report = train(workdir)
    losses = [[part["loss_last"] for part in one["stages"]] for one in (report, whole[2])]
    assert weights == whole[1] and losses[0] == losses[1]
    assert [line["loss"] for line in toy.lines(workdir)] == [line["loss"] for line in toy.lines(whole[0])]
    assert (workdir / "report.json.damaged").read_bytes() == content
    assert config.from_json((workdir / "config.json").read_text()) == toy.experiment()
    assert "config of this command is used unchecked" in caplog.text


def test_a_damaged_config_is_held_to_its_copy_in_the_report(tmp_path, whole):
    workdir = copy_of(whole[0], tmp_path / "run")
    (workdir / "config.json").write_text("")
    assert run_folder.saved_config(workdir) == toy.experiment()
    with pytest.raises(UserError, match="another config: seed 0 -> 3"):
        train(workdir, dataclasses.replace(toy.experiment(), seed=3))


@pytest.mark.slow
def test_parameters_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    make = loop.stages.make_train_step

    def breaking(*arguments):
        step = make(*arguments)

        def run(state, *others):  # finite losses and gradients, but an update that is not
            state, metrics = step(state, *others)
            if int(state.step) == 4:
                spoiled = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(np.inf), state.trainable)
                state = dataclasses.replace(state, trainable=spoiled)
            return state, metrics

        return run

    monkeypatch.setattr(loop.stages, "make_train_step", breaking)
    with pytest.raises(UserError, match=r"stage 'one', step 4: the parameters .* are not finite"):
        train(tmp_path, toy.experiment(run={"save_every": 2}))
    assert checkpoint.all_steps(tmp_path / "checkpoints") == [2]
    assert set(checkpoint.all_bases(tmp_path / "base")) == {0}


@pytest.mark.slow
def test_rate_batch_size_and_weights_may_change_in_a_folder_and_are_recorded(tmp_path, whole):
    workdir, what = copy_of(whole[0], tmp_path / "run", update=8), toy.experiment()
    second = dataclasses.replace(what.stages[1], learning_rate=1e-3, batch_size=4)
    changed = dataclasses.replace(what, stages=(what.stages[0], second), weights=(("tower", "moved.safetensors"),))
    weights, report = train(workdir, changed)
    assert weights != whole[1] and report["stages"][1]["steps"] == second.steps
    old, new = toy.lines(whole[0]), toy.lines(workdir)
    assert [line["loss"] for line in new[:8]] == [line["loss"] for line in old[:8]]
    assert new[-1]["learning_rate"] < old[-1]["learning_rate"]
    (line,) = map(json.loads, (workdir / "changes.jsonl").read_text().splitlines())
    assert line["update"] == 8 and line["changed"]["stages.1.batch_size"] == ["8", "4"]
    assert set(line["changed"]) == {"stages.1.batch_size", "stages.1.learning_rate", "weights"}
