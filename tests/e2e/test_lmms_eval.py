# SPDX-License-Identifier: Apache-2.0
"""The real lmms-eval runs a local task with our plugin: `make test-lmms`. Skipped where it is not installed.

lmms-eval ends with exit code 0 after an error, so the tests look for its results file.
"""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

pytest.importorskip("lmms_eval", reason="lmms-eval, of `make test-lmms`, is not installed")

import datasets
import small_lion

from lionjax.pipelines.serving.harness import HarnessModel, Request

TASK = """
task: toy_pope
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_visual: !function toy_pope.visual
doc_to_text: !function toy_pope.text
doc_to_target: answer
process_results: !function toy_pope.process
generation_kwargs: {{max_new_tokens: 6, temperature: 0}}
metric_list:
  - {{metric: accuracy, aggregation: mean, higher_is_better: true}}
"""
FUNCTIONS = """
def visual(doc):
    return [doc["image"].convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def process(doc, results):
    return {"accuracy": float(results[0].strip().rstrip(".").lower() == doc["answer"])}
"""
# A model that says yes to red pictures, behind lmms-eval's own command line.
SCRIPTED = """
import types, lionjax
from lionjax.inference.sampling import GenerationConfig
class Model:
    vlm = types.SimpleNamespace(info=types.SimpleNamespace(reads_images=True))
    def generation_config(self, category):
        return GenerationConfig()
    def answer(self, images, prompts, generation_config=None):
        assert generation_config.max_new_tokens == 6
        return [types.SimpleNamespace(text="Yes." if image.getpixel((0, 0))[0] else "No.") for image in images]
lionjax.load = lambda folder, **options: Model()
"""
COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255)}
ROWS = [{"question": f"Is it red? {k}", "color": ("red", "blue")[k % 2]} for k in range(5)]


def run_lmms_eval(tmp_path, pretrained, *arguments, script=""):
    """(results, samples) that lmms-eval wrote for the toy task."""
    rows = [
        {"image": Image.new("RGB", (30 + 7 * k, 40), COLORS[row["color"]]), "question": row["question"]}
        | {"answer": "yes" if row["color"] == "red" else "no"}
        for k, row in enumerate(ROWS)
    ]
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "data"))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "toy_pope.yaml").write_text(TASK.format(data=tmp_path / "data"))
    (tasks / "toy_pope.py").write_text(FUNCTIONS)
    code = f"{script}\nfrom lmms_eval.__main__ import cli_evaluate\ncli_evaluate()"
    command = [sys.executable, "-c", code, "--model", "lionjax", "--model_args", f"pretrained={pretrained}"]
    command += ["--tasks", "toy_pope", "--include_path", str(tasks), "--batch_size", "2", "--log_samples"]
    command += ["--output_path", str(tmp_path / "out"), *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    results, samples = ([*(tmp_path / "out").rglob(name)] for name in ("*_results.json", "*_samples_toy_pope.jsonl"))
    assert len(results) == len(samples) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in samples[0].read_text().splitlines()]
    return json.loads(results[0].read_text())["results"]["toy_pope"], lines


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--force_simple",)])
def test_a_scripted_model_has_an_accuracy_of_1(tmp_path, arguments):
    results, samples = run_lmms_eval(tmp_path, "runs/mine", *arguments, script=SCRIPTED)
    assert results["accuracy,none"] == 1.0 and len(samples) == len(ROWS)


@pytest.mark.slow
def test_answers_of_a_run_are_lionjaxs_own(tmp_path):
    small_lion.finished(tmp_path / "run", small_lion.experiment())
    _, samples = run_lmms_eval(tmp_path, tmp_path / "run")
    images = [Image.new("RGB", (30 + 7 * k, 40), COLORS[row["color"]]) for k, row in enumerate(ROWS)]
    requests = [Request(row["question"], [i], {"max_new_tokens": 6}) for row, i in zip(ROWS, images)]
    answers = HarnessModel(tmp_path / "run", batch_size=2).answer(requests)
    given = [sample["filtered_resps"] for sample in samples]  # a text, or in other versions a list of one
    given = [text if isinstance(text, str) else text[0] for text in given]
    assert [text.strip() for text in given] == [answer.strip() for answer in answers]
