# SPDX-License-Identifier: Apache-2.0
"""Where the time of a run went: all of it is accounted for, also across restarts, and drawn."""

import json
import os
import time

import pytest
import toy

from lionjax.evaluation.report import goodput
from lionjax.training import checkpoint, loop
from lionjax.training.run_log import PhaseTimer, StageStats, add_evaluation_seconds, downtime, total_seconds


def test_phase_timer_accounts_for_all_time():
    began = time.time() - 5.0
    clock = PhaseTimer(began)
    clock.switch("data")
    time.sleep(0.02)
    clock.switch("step", relabel_as="compile")
    seconds = {"step": 100.0}
    clock.rebind(seconds)
    clock.switch("save")
    assert seconds["start"] >= 5.0 and seconds["compile"] >= 0.02 and "data" not in seconds
    assert sum(seconds.values()) - 100.0 == pytest.approx(time.time() - began, abs=0.02)


def test_time_before_a_restart_is_lost_while_running_and_away_while_stopped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    os.utime(tmp_path / "metrics.jsonl", (1000.0, 1300.0))  # the last sign of life
    assert downtime(tmp_path, [{"clock": 1100.0}], 1500.0) == {"lost": 200.0, "away": 200.0}
    assert downtime(tmp_path, [{"clock": 1400.0}], 1500.0) == {"lost": 0.0, "away": 100.0}  # saved when it stopped
    assert downtime(tmp_path, [{}], 1500.0) == {}  # made by an older version
    assert downtime(tmp_path, [], 1500.0) == {}
    (tmp_path / "base" / "0_one").mkdir(parents=True)
    os.utime(tmp_path / "base" / "0_one", (1000.0, 1200.0))
    assert downtime(tmp_path, [], 1500.0) == {"lost": 100.0, "away": 200.0}


@pytest.mark.slow
def test_all_time_of_a_run_is_in_its_report_and_its_lines(tmp_path):
    what = toy.experiment()
    began = time.time()
    _, report = loop.train(what, tmp_path, toy.Batches, began)
    took = time.time() - began
    assert 0.9 * took < sum(report["seconds"].values()) <= took + 0.01
    assert {"start", "compile", "data", "step", "save", "log"} <= report["seconds"].keys()
    entries = [stage["seconds_by_part"] for stage in report["stages"]]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (record,) = (tmp_path / "base").glob("2_*")
    logged = [entry["logged"]["seconds"] for entry in checkpoint.restore_record(record)["meta"]["history"]]
    for stage, parts, until in zip(("one", "two"), entries, logged):
        sums = {}
        for line in lines:
            for part, seconds in line["seconds"].items():
                sums[part] = sums.get(part, 0.0) + seconds * (line["stage"] == stage)
        assert {part for part, seconds in sums.items() if seconds} == until.keys()
        for part, seconds in until.items():
            assert seconds == pytest.approx(sums[part], abs=1e-4), (stage, part)
            assert seconds <= parts[part] + 1e-3, (stage, part)
    assert sum(stage["seconds_behind"]["save"] for stage in report["stages"]) > 0
    assert report["stages"][0]["seconds"] == pytest.approx(sum(entries[0].values()), abs=0.01)
    add_evaluation_seconds(tmp_path, 2.5)
    add_evaluation_seconds(tmp_path, 1.0)
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["seconds"]["evaluate"] == 3.5
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]["evaluate"] == 3.5
    page = goodput.render_section(again, lines)
    for words in ("<h2>Time</h2>", "updates", "saving", "compiling", "evaluation", "outside the stages"):
        assert words in page
    assert "writing checkpoints took" in page
    assert f"of {sum(again['seconds'].values()):,.1f} s were training updates" in page


def test_lost_and_away_time_does_not_count_as_stage_time():
    entry = StageStats("one", 3, seconds={"step": 4.0, "lost": 50.0, "away": 900.0})
    assert entry.report()["seconds"] == 4.0
    sums = {"evaluate": 7.0, "step": 8.0, "lost": 100.0, "away": 1800.0, "save": 1.0}
    assert total_seconds([entry, entry], {"save": 1.0}, 7.0) == sums


def test_a_stage_that_still_runs_is_drawn_from_its_lines():
    lines = [{"stage": "one", "seconds": {"step": 1.0}}, {"stage": "two", "seconds": {"step": 1.0, "data": 2.0}}] * 2
    figures = {"stages": [{"name": "one", "seconds_by_part": {"step": 8.0}}]}
    assert goodput.seconds_by_stage(figures, lines) == {"one": {"step": 8.0}, "two": {"step": 2.0, "data": 4.0}}
    page = goodput.render_section(figures, lines)
    assert "71.4% of 14.0 s were training updates" in page and "waiting for data" in page
    assert goodput.render_section({}, []) == ""


def test_evaluation_within_a_stage_counts_once():
    figures = {
        "stages": [{"name": "one", "seconds": 6.0, "seconds_by_part": {"step": 4.0, "evaluate": 2.0, "away": 3.0}}],
        "seconds": {"step": 4.0, "evaluate": 7.0, "away": 3.0, "start": 1.0},
    }
    assert goodput.seconds_outside(figures, goodput.seconds_by_stage(figures, [])) == {"evaluate": 5.0, "start": 1.0}
    page = goodput.render_section(figures, [])
    assert "26.7% of 15.0 s were training updates" in page
    for row in ("one</td><td class='number'>9.0 s", "outside the stages</td><td class='number'>6.0 s"):
        assert row in page
    assert goodput.stage_seconds(figures["stages"][0]) == 9.0
