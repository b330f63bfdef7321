# SPDX-License-Identifier: Apache-2.0
"""From a JSON of conversations to an exported fine-tuned LLaVA, by the command lines that a user types.

Inspect, build, fine-tune by LoRA, stopped by a damaged image, mended in the same folder, more steps, export. The
exported folder answers as the run does.
"""

import json
from pathlib import Path

import pytest
import tiny_released
from leafwise import runs_have_one_device  # noqa: F401

import lionjax
from lionjax.cli import main

QUESTIONS = ("What is in the picture?", "Where is the red star?")
CONFIG = """
import dataclasses

from lionjax.core.experiment import Mix, RunConfig, Stage, Weights
from lionjax.data.config import DataConfig
from lionjax.data.datasets.array_record import ArrayRecordDataset
from lionjax.data.datasets.conversations import Conversations
from lionjax.inference.loading import read_experiment
from lionjax.nn.lora import LoraConfig


def get_config():
    released = read_experiment("llava")
    language = dataclasses.replace(released.model.language, lora=LoraConfig(4, 8.0))
    processor = dataclasses.replace(released.data.processor, max_prompt_tokens=96, max_target_tokens=32)
    sources = (ArrayRecordDataset("built"), Conversations("fresh.jsonl", "images", name="fresh"))
    mixture = (Mix("conversation", 4.0, source="built"), Mix("conversation", 1.0, source="fresh"))
    return dataclasses.replace(
        released,
        name="mine",
        model=dataclasses.replace(released.model, language=language),
        data=DataConfig(sources=sources, processor=processor),
        stages=(Stage("tune", 5, (".*/lora_[ab]",), mixture, 8, learning_rate=3e-2, warmup_steps=1),),
        run=RunConfig(log_every=1, save_every=1, evaluate_limit=0, frozen_dtype="float32"),
        weights=tuple(Weights(part, "llava/params.safetensors") for part in ("vision", "projector", "language")),
    )
"""


def lionjax_says(capfd, *words: str, code: int = 0) -> str:
    """What a command line prints on both streams."""
    capfd.readouterr()
    ended = main(list(words))
    text = "".join(capfd.readouterr())
    assert ended == code, text
    return text


def conversation(image: str | None, *answers: str) -> dict:
    """A row in LLaVA's format, with a round for each answer."""
    turns = []
    for question, answer in zip(QUESTIONS, answers):
        value = f"<image>\n{question}" if image and not turns else question
        turns += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return ({"image": image} if image else {}) | {"conversations": turns}


def write_data() -> None:
    """lines.jsonl with rounds, text-only rows and a broken line; fresh.jsonl, one of whose images is cut off."""
    Path("images").mkdir()
    for number, picture in enumerate(tiny_released.pictures(14)):
        picture.save(f"images/{number}.png")
    rows = [conversation(f"{number}.png", "two cats", "in the picture") for number in range(6)]
    rows += [conversation(None, "the red star"), conversation(None, "a user", "many")]
    lines = [json.dumps(row) for row in rows]
    Path("lines.jsonl").write_text("\n".join([*lines[:3], lines[3][:40], *lines[3:]]) + "\n")
    fresh = [conversation(f"{number}.png", "the image in detail") for number in range(6, 14)]
    Path("fresh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fresh))
    damaged = Path("images/11.png")
    damaged.write_bytes(damaged.read_bytes()[:200])


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """A released LLaVA's folder, converted."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("weights")
    tiny_released.save("llava", folder / "released")
    assert main(["convert", str(folder / "released"), str(folder / "llava"), "--to", "jax"]) == 0
    return folder / "llava"


def answers(model) -> list[str]:
    return [answer.text for answer in model.answer(tiny_released.pictures(2, seed=3), list(QUESTIONS))]


def stage_steps() -> list[int]:
    return [stage["steps"] for stage in json.loads(Path("run/report.json").read_text())["stages"]]


@pytest.mark.slow
def test_conversations_are_inspected_built_learned_mended_continued_and_exported(
    llava, tmp_path, monkeypatch, capfd, caplog
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("llava").symlink_to(llava)
    write_data()
    Path("mine.py").write_text(CONFIG)

    seen = lionjax_says(capfd, "data", "inspect", "lines.jsonl", "--images", "images")
    assert "What is in the picture?" in seen and "Where is the red star?" in seen and "line 4" in seen
    lionjax_says(capfd, "data", "build", "lines.jsonl", "--images", "images", "--out", "built")
    (left_out,) = Path("built").rglob("left_out.txt")
    assert "lines.jsonl, line 4, is not valid JSON" in left_out.read_text()

    train = ("train", "mine.py", "--workdir", "run")
    stopped = lionjax_says(capfd, *train, code=2)
    assert "11.png" in stopped.splitlines()[-1]
    done = max(int(path.name) for path in Path("run/checkpoints").iterdir() if path.name.isdigit())
    mend = ("--data.on_bad_record", "replace", "--data.max_bad_fraction", "0.2")
    lionjax_says(capfd, *train, *mend)
    assert 1 <= done < 5 and stage_steps() == [5]
    assert "11.png" in Path("run/bad_records.jsonl").read_text()
    before = answers(lionjax.load("run"))

    refused = lionjax_says(capfd, *train, *mend, "--stages.0.steps", "3", code=2)
    assert refused.count("\n") == 1 and "stage 'tune' has done 5 updates already; give 5 or more" in refused
    lionjax_says(capfd, *train, *mend, "--stages.0.steps", "8")
    assert "'tune' follows the learning-rate schedule of 8 steps from step 5 on" in caplog.text and stage_steps() == [8]
    lines = [json.loads(line) for line in Path("run/changes.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [done, 5]

    lionjax_says(capfd, "convert", "run", "exported", "--to", "torch")
    run, exported = lionjax.load("run"), lionjax.load("exported")
    assert answers(run) == answers(exported) != before


@pytest.mark.slow
def test_own_data_is_learned_by_one_command_and_answered_by_the_next(llava, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_data()
    rows = [conversation(f"{number}.png", "two cats", "in the picture") for number in range(6)]
    Path("talks.json").write_text(json.dumps(rows))
    words = ("train", "own_data", "--data", "talks.json", "--images", "images", "--workdir", "run")
    assert "the config own_data needs --base. Give --data FILE" in lionjax_says(capfd, *words, code=2)
    assert "lionjax convert images DIR --to jax" in lionjax_says(capfd, *words, "--base", "images", code=2)
    settings = ("--heldout", "0", "--epochs", "2", "--batch-size", "4", "--data.processor.max_prompt_tokens", "96")
    lionjax_says(capfd, *words, "--base", str(llava), *settings)
    (line,) = (json.loads(text) for text in Path("run/metrics.jsonl").read_text().splitlines()[-1:])
    assert line["step"] == 3 and line["loss"] > 0
    assert lionjax_says(capfd, "generate", "run", "--image", "images/1.png", "--prompt", QUESTIONS[0])
