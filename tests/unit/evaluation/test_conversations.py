# SPDX-License-Identifier: Apache-2.0
"""The benchmark of conversations: ROUGE-L and token F1 of the last answer, with and without images."""

import json

import jax
import leafwise
import numpy as np
import pytest
from chat_prompts import PICTURE, decoder_prompts
from PIL import Image

from lionjax.core.experiment import Experiment
from lionjax.data.config import DataConfig
from lionjax.data.datasets.conversations import Conversations
from lionjax.data.processor import Processor
from lionjax.data.scenes.tasks import Example
from lionjax.evaluation import runner, tasks
from lionjax.evaluation.metrics.vqa import squad_scores
from lionjax.inference.loading import dummy_batch, from_params
from lionjax.models.language.decoder import DecoderConfig
from lionjax.models.vision.vit import ViTConfig
from lionjax.models.vlm.visual_prefix import VisualPrefixLM


@pytest.mark.parametrize(
    "answer, references, exact, f1",
    [
        ("The red bus.", ["a red bus"], 1.0, 1.0),
        ("red red bus", ["red bus"], 0.0, 0.8),  # a repeated word counts once
        ("blue", ["red", "dark blue"], 0.0, 2 / 3),
        ("the", ["A."], 1.0, 1.0),  # no words on both sides
        ("", ["red"], 0.0, 0.0),
    ],
)
def test_squad_scores_are_those_of_the_official_code(answer, references, exact, f1):
    assert squad_scores(answer, references) == pytest.approx((exact, f1))


def test_a_conversation_is_scored_by_rouge_l_and_token_f1():
    examples = [Example("conversation", "image", "?", text, (text,), "region_level") for text in ("red bus", "a tree")]
    scores = tasks.SCORERS["conversation"](examples, ["red bus", "house"])
    assert scores.metrics == pytest.approx({"conversation_rouge_l": 0.5, "conversation_f1": 0.5})
    assert scores.details == {"exact_match": 0.5} and scores.sample_scores == [1.0, 0.0]
    assert set(scores.bootstrap_intervals()) == set(scores.metrics)


@pytest.mark.slow
def test_rows_with_one_image_several_and_none_are_one_benchmark(tmp_path):
    for number in range(2):
        Image.new("RGB", (20, 10), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")

    def row(*texts, **images):
        messages = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        return {"conversations": messages} | images

    rows = [
        row("<image>\nWhat?", "red", "And?", "blue", image="0.png"),
        row("Compare <image> with <image>.", "red", images=["0.png", "1.png"]),
        row("Hi", "red"),
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    decoder = DecoderConfig(1024, 32, 2, 2, 2, 16, 48, eos_token_id=1)
    system = VisualPrefixLM(ViTConfig(14, 7, 16, 1, 2, 24), decoder, image_token_id=PICTURE, feature_layer=-1)
    processor = decoder_prompts(image_size=14, max_images=2, followup_template="{question}", max_target_tokens=8)
    data = DataConfig((Conversations(str(tmp_path / "rows.json"), str(tmp_path)),), processor)
    experiment = Experiment("talk", system, data, stages=())
    params = leafwise.init_leafwise(system.init, jax.random.key(0), dummy_batch(Processor(processor)))
    model = from_params(experiment, params)
    assert runner.model_benchmarks(model) == ["conversation"]
    entry = runner.evaluate_model(model, "conversation", tmp_path / "run", with_blind=True)
    assert entry["samples"] == 3 and {kind: group["samples"] for kind, group in entry["kinds"].items()} == {
        "image": 2,
        "text": 1,
    }
    assert set(entry["metrics"]) == {"conversation_rouge_l", "conversation_f1"} <= set(entry["blind"])
    assert entry["majority"]["conversation_f1"] == pytest.approx(2 / 3)  # "red"
    lines = [json.loads(line) for line in (tmp_path / "run/evaluation/conversation.jsonl").read_text().splitlines()]
    (history,) = [line["history"] for line in lines if "history" in line]
    assert history == [["<image>\nWhat?", "red"]] and np.isfinite([line["score"] for line in lines]).all()
