# SPDX-License-Identifier: Apache-2.0
"""An evaluation that is killed goes on where it stopped, with the same figures; foreign journals are refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from lionjax import cli
from lionjax.core.files import read_whole_lines
from lionjax.evaluation import asking
from lionjax.evaluation.published import model_answers

pytestmark = pytest.mark.slow
NUM_QUESTIONS = 45  # more than a batch


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    for k in range(5):
        Image.new("RGB", (40, 30), (50 * k, 200 - 40 * k, 90)).save(folder / f"{k}.png")
    rows = [
        {"image": f"{k % 6}.png", "question": f"What is it{'?' * (1 + k)}", "answer": "red"}
        for k in range(NUM_QUESTIONS)
    ]
    (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))  # one in six has no picture
    return folder


def command(run, questions) -> list[str]:
    source = [str(questions / "lines.jsonl"), "--images", str(questions)]
    return ["evaluate", str(run), "--benchmark", "vqa", "--blind", "--json", "--source", *source]


def lines(run) -> str:
    return next((run / "evaluation").glob("*_vqa.jsonl")).read_text()


def kill_once_kept(words: list[str], journal, count: int, setting: str = "pass") -> int:
    """Kill a process with these words once its journal has `count` rows; returns how many it has then.

    `setting`: a statement that the process runs first.
    """
    code = f"import sys, small_lion; from lionjax import cli; {setting}; sys.exit(cli.main(sys.argv[1:]))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen([sys.executable, "-c", code, *words], env=env, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(read_whole_lines(journal)[0]) < count:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = len(read_whole_lines(journal)[0])
    assert kept >= count
    return kept


def test_a_killed_evaluation_goes_on_and_gives_the_same_figures(finished_run, questions, capsys):
    words = command(finished_run, questions)
    assert cli.main(words) == 0
    (wanted,) = json.loads(capsys.readouterr().out)
    answers = lines(finished_run)
    journal = finished_run / "evaluation" / f"{wanted['benchmark']}.journal.jsonl"
    assert not journal.exists()
    kept = kill_once_kept(words, journal, 10)
    with journal.open("a") as file:
        file.write('{"key": "44 blind", "te')  # a line that the kill left unfinished
    asked = []
    real = asking._Asking.record

    def counted(self, sample, variant, answer):
        asked.append((sample.position, variant))
        real(self, sample, variant, answer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking._Asking, "record", counted)
        assert cli.main(words) == 0
    (found,) = json.loads(capsys.readouterr().out)
    found["seconds"] = wanted["seconds"]
    assert found == wanted and lines(finished_run) == answers
    assert 0 < len(asked) == 2 * wanted["samples"] - (kept - 1), "what the journal held was asked again"
    assert not journal.exists()


def test_a_killed_run_of_a_published_benchmark_loses_a_batch_and_changes_no_figure(
    finished_run, questions, capsys, monkeypatch
):
    rows = [
        {"question_id": k, "image": f"{k % 5}.png", "text": f"Is there a thing{'?' * (1 + k)}", "label": "yes"}
        for k in range(NUM_QUESTIONS)
    ]
    file = questions / "coco_pope_random.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate", str(finished_run), "--benchmark", "pope", "--json", "--source", str(file)]
    words += ["--images", str(questions)]
    monkeypatch.setattr(model_answers, "BATCH_SIZE", 4)
    assert cli.main(words) == 0
    wanted = json.loads(capsys.readouterr().out)
    answers = (finished_run / "evaluation" / "pope_official.jsonl").read_text()
    journal = finished_run / "evaluation" / "pope_official.journal.jsonl"
    setting = "from lionjax.evaluation.published import model_answers; model_answers.BATCH_SIZE = 4"
    kept = kill_once_kept(words, journal, 3, setting) - 1  # without the settings
    asked, real = [], model_answers.predict_batch
    monkeypatch.setattr(model_answers, "predict_batch", lambda *given: asked.extend(given[3]) or real(*given))
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found | {"seconds": 0} == wanted | {"seconds": 0}
    assert (finished_run / "evaluation" / "pope_official.jsonl").read_text() == answers
    assert 0 < len(asked) == NUM_QUESTIONS - 4 * kept and not journal.exists()


def test_missing_pictures_are_counted_listed_and_said(finished_run, questions, capsys):
    assert cli.main([*command(finished_run, questions), "--limit", "12"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    left_out = entry["left_out"]
    assert left_out["questions"] == 12 - entry["samples"] > 0 and left_out["records"] == len(left_out["names"]) > 0
    words = [word for word in command(finished_run, questions) if word != "--json"]
    assert cli.main([*words, "--limit", "12"]) == 0
    assert f"without {left_out['questions']} that could not be read or asked" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_journal_of_another_model_or_other_questions_is_refused_in_one_sentence(finished_run, questions, capsys):
    words = command(finished_run, questions)
    journal = finished_run / "evaluation" / "lines_vqa.journal.jsonl"
    for field in ("model", "set of questions"):
        settings = {"model": "a", "generation setting": "b", "set of questions": "c"}
        journal.write_text(json.dumps({"key": "settings", **settings}) + "\n")
        assert cli.main(words) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"another {field}" in said and "delete it to start anew" in said
    journal.unlink()
