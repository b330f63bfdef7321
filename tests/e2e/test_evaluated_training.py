# SPDX-License-Identifier: Apache-2.0
"""A short training that evaluates each stage and draws answers: what the report and TensorBoard then show."""

import json
from pathlib import Path

import pytest

from lionjax.cli import main

CONFIG = """
import dataclasses

from lionjax.core import config
from lionjax.core.experiment import Mix, Stage


def get_config():
    tiny = config.load("tiny_text_lm")
    language = dataclasses.replace(tiny.model.language, depth=1)
    processor = dataclasses.replace(tiny.data.processor, max_prompt_tokens=16, max_target_tokens=8)
    stages = tuple(Stage(name, 2, (".*",), (Mix("caption"),), 4, warmup_steps=1) for name in ("first", "second"))
    return dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, language=language, contrastive_margin=0.0),
        data=dataclasses.replace(tiny.data, processor=processor),
        stages=stages,
        run=dataclasses.replace(tiny.run, log_every=1, save_every=10),
        generation=dataclasses.replace(tiny.generation, max_new_tokens=4),
    )
"""


@pytest.mark.slow
def test_each_stage_is_evaluated_and_answers_are_drawn_for_report_and_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.chdir(tmp_path)
    Path("two_stages.py").write_text(CONFIG)
    settings = "--run.evaluate_stages true --run.evaluate_limit 2 --run.evaluate_pictures 1"
    assert main(f"train two_stages.py --workdir run {settings}".split()) == 0
    assert main(["report", "run"]) == 0

    report = json.loads(Path("run/report.json").read_text())
    assert (
        list(report["stage_metrics"]) == ["first"]
        and report["stage_metrics"]["first"].keys() <= report["metrics"].keys()
    )
    assert report["stage_metrics"]["first"] and report["seconds"]["evaluate"] > 0
    events = b"".join(path.read_bytes() for path in Path("run/tensorboard").iterdir())
    assert events.count(b"answers/caption_0") >= 2 and b"first/loss" in events and b"second/loss" in events
    page = Path("run/report.html").read_text()
    assert "What each stage changed" in page and "after first" in page and "after second" in page
    assert len(Path("run/evaluation/caption.jsonl").read_text().splitlines()) == 2
