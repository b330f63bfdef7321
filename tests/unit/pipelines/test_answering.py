# SPDX-License-Identifier: Apache-2.0
"""`lionjax answer` from files to files, with an endpoint on this machine and with a model that is loaded."""

import dataclasses
import json
import types

import numpy as np
import pytest
from endpoint_server import TOO_MANY, Failure, chat_reply, endpoint_server, error_body, prompt_of

import lionjax
from lionjax import cli
from lionjax.core.types import UserError
from lionjax.data.processor import Processor
from lionjax.inference import loading
from lionjax.inference.engine import Answer
from lionjax.inference.sampling import GenerationConfig
from lionjax.models.language.decoder import TINY_DECODER
from lionjax.models.vlm.text_lm import TextLM
from lionjax.pipelines import answering
from lionjax.pipelines.answering import AnsweringConfig
from lionjax.pipelines.completion import CompletionRequest
from lionjax.pipelines.loaded_model import LoadedModel

SECRET = "sk-in-no-file"
LANGUAGE = dataclasses.replace(
    TINY_DECODER, width=8, depth=1, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8, vocab_size=1024
)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Three questions, four examples and features by which question k is like example k."""
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    row = {"tags": ["kite"], "answers": ["red"] * 10}
    questions = [row | {"question": f"Question {k}?", "caption": f"caption {k}", "question_id": k} for k in range(3)]
    examples = [
        row | {"question": f"Example {k}?", "captions": [f"human {k}"], "answers": [f"answer {k}"]} for k in range(4)
    ]
    for name, rows in (("questions", questions), ("examples", examples)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.savez(tmp_path / "features.npz", val_features=np.eye(3, 4), train_features=np.eye(4))
    return tmp_path


def run(files, server, *words, method="pica"):
    names = {"--examples": "examples.jsonl", "--features": "features.npz", "--workdir": "out"}
    given = [word for name, file in names.items() for word in (name, str(files / file))]
    url = ["--endpoint", server.url, "--model", "m"]
    given += ["--method", method, "--shots", "1", *words]
    return cli.main(["answer", str(files / "questions.jsonl"), *url, *given])


def reply(body):
    """Red for even questions; others are answered as the example is."""
    prompt = prompt_of(body)
    question = prompt.rpartition("Q: ")[2]
    text = " Red." if "1?" not in question else " " + prompt.split("\nA: ")[1].split("\n")[0]
    return chat_reply(text, log_probs=[(text, -0.1)])


@pytest.mark.parametrize("method", answering.METHODS)
def test_questions_are_answered_into_a_folder_and_a_second_run_asks_nothing(files, capsys, method):
    with endpoint_server(reply) as server:
        assert run(files, server, method=method) == 0
        assert "3 of 3 questions" in capsys.readouterr().out and len(server.bodies) == 3
        answers = (files / "out" / "answers.jsonl").read_text()
        assert [json.loads(line)["answer"] for line in answers.splitlines()] == ["red", "answer 1", "red"]
        assert all(f"human {k}" in prompt_of(b) for k, b in enumerate(sorted(server.bodies, key=prompt_of)))
        assert run(files, server, method=method) == 0
        assert len(server.bodies) == 3 and (files / "out" / "answers.jsonl").read_text() == answers
    report = json.loads((files / "out" / "report.json").read_text())
    assert report["scores"]["vqa_accuracy"] == pytest.approx(2 / 3) and report["num_answered"] == 3
    assert report["language_model"]["num_from_journal"] == 3 and report["method"]["method"] == method
    written = "".join(path.read_text() for path in (files / "out").rglob("*") if path.is_file())
    assert SECRET not in written and "prompt_tokens" in written


def test_a_dry_run_asks_nothing_and_shows_the_first_prompt(files, capsys):
    with endpoint_server(reply) as server:
        assert run(files, server, "--dry-run", "--ensemble", "2") == 0
        out = capsys.readouterr().out
        assert "6 requests, 0 of them answered already" in out and "Q: Question 0?\nA:" in out
        assert run(files, server, "--limit", "1") == 0
        assert run(files, server, "--dry-run") == 0 and "3 requests, 1 of them" in capsys.readouterr().out
    assert len(server.bodies) == 1


def test_a_budget_ends_the_run_with_what_is_answered(files, capsys):
    with endpoint_server(reply) as server:
        assert run(files, server, "--budget", "50", "--at-once", "1") == 0
    assert "1 of 3 questions" in capsys.readouterr().out and len(server.bodies) == 1


@pytest.mark.parametrize("failure, code", [(TOO_MANY, 75), (Failure(401, error_body("no")), 2)])
def test_the_exit_code_says_whether_to_try_again(files, capsys, failure, code):
    with endpoint_server(lambda body: failure) as server:
        assert run(files, server, "--at-once", "1") == code
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--shots", "5"], "5 examples are shown and only 4"),
        (["--shots", "-1"], "num_shots is -1"),
        (["--similarity", "tags"], "similarity is 'tags'"),
        (["--lm", "."], "both --lm and an endpoint"),
        (["--features", "questions.jsonl"], "no npz file"),
        (["--examples", "none.jsonl"], "no file none.jsonl"),
        (["--method", "promptcap", "--ensemble", "2"], "leave out the ensemble"),
    ],
)
def test_what_does_not_fit_is_one_sentence(files, capsys, monkeypatch, words, sentence):
    monkeypatch.chdir(files)
    with endpoint_server(reply) as server:
        assert run(files, server, *words) == 2
    assert sentence in capsys.readouterr().err and not server.bodies


def test_a_language_model_must_be_named(files, capsys):
    assert cli.main(["answer", str(files / "questions.jsonl"), "--workdir", str(files / "out")]) == 2
    assert "give --lm DIR, or --model NAME" in capsys.readouterr().err


def test_features_of_other_questions_are_refused(tmp_path):
    file = tmp_path / "features.npz"
    np.savez(file, val_question=np.eye(3), train_question=np.eye(3), val_image=np.full((3, 2), np.nan))
    with pytest.raises(UserError, match="val_image of .* finite features, 3 rows"):
        answering.read_features(file, 3, 3)
    with pytest.raises(UserError, match="val_question of .* 4 rows"):
        answering.read_features(file, 4, 3)
    np.savez(file, val_question=np.eye(3))
    with pytest.raises(UserError, match="no array train_question"):
        answering.read_features(file, 3, 3)


def test_examples_are_random_without_features(caplog):
    config = AnsweringConfig(num_shots=2, num_ensemble=2, seed=1)
    orders = answering.choose_examples(config, None, 5, 9)
    assert all(len(set(order)) == 4 for order in orders) and "drawn at random" in caplog.text
    assert orders == answering.choose_examples(config, None, 5, 9)


def test_a_free_answer_to_a_question_with_choices_is_written_as_a_choice(tmp_path):
    row = answering.CaptionedQuestion("Which?", ("c",), answers=("iron",), choices=("wood", "iron"))
    report = answering.write_answers(
        tmp_path, [row, row], ["the irn", None], answering.RequestRecorder(), AnsweringConfig()
    )
    assert report["scores"]["choice_accuracy"] == 1.0 and report["num_answered"] == 1
    assert json.loads((tmp_path / "answers.jsonl").read_text())["choice_text"] == "iron"


# ---------------------------------------------------------------- a model that is loaded


class Continued:
    """Stands for a Model: continues prompts by ids that `texts` spell, and keeps what it was asked."""

    def __init__(self, texts, max_prompt_tokens=64):
        processor = Processor(loading.released_experiment(TextLM(LANGUAGE), loading.Path("tiny")).data.processor)
        config = dataclasses.replace(processor.config, max_prompt_tokens=max_prompt_tokens)
        self.processor, self.texts, self.calls = Processor(config), texts, []
        self.vlm = TextLM(LANGUAGE)

    def generation_config(self, category):
        return GenerationConfig(eos_token_id=self.processor.tokenizer.eos_id, num_beams=4, repetition_penalty=2.0)

    def complete(self, prompts, config, seed):
        self.calls.append((list(prompts), config, seed))
        answers = []
        for prompt in prompts:
            ids = self.processor.tokenizer.encode(self.texts[prompt])[: config.max_new_tokens]
            answers.append(Answer("", np.zeros((0, 4)), None, tuple(ids), tuple(-0.5 for _ in ids)))
        return answers


def test_a_loaded_model_continues_up_to_the_stop_text_with_the_tokens_before_it():
    model = LoadedModel(Continued({"A:": "a star\nQ: what", "B:": "star"}))
    first, second = model.complete(
        [CompletionRequest(p, max_tokens=40, stop=("\n", "Q:"), may_be_cut=True) for p in ("A:", "B:")]
    )
    assert first.text.rstrip() == "a star" and "".join(first.tokens).startswith("a star")
    assert len(first.tokens) == len(first.token_log_probs) < 12 and second.text == "star"
    (_, config, _), *others = model.model.calls
    assert not others and config.output_logprobs and not config.do_sample
    assert (config.num_beams, config.repetition_penalty, config.max_new_tokens) == (1, 1.0, 40)


def test_a_loaded_model_refuses_a_long_prompt_and_says_which_replies_are_cut():
    model = LoadedModel(Continued({"A:": "a star on a star", "B:": "star"}, max_prompt_tokens=8))
    requests = [CompletionRequest(p, max_tokens=2) for p in ("B:", "star " * 30, "A:")]
    replies = model.complete(requests)
    assert [reply.problem for reply in replies] == ["length", "refused: too long", "length"]
    assert model.describe() == {"model": "TextLM", "num_asked": 3, "num_refused": 1}
    assert model.complete([dataclasses.replace(requests[0], may_be_cut=True)])[0].is_readable


def test_samples_of_a_loaded_model_have_seeds_of_their_own():
    model = LoadedModel(Continued({"A:": "star", "B:": "star"}), seed=7)
    model.complete(
        [
            CompletionRequest(p, max_tokens=4, temperature=1.0, top_p=0.96, sample=sample)
            for sample in (0, 1)
            for p in ("A:", "B:")
        ]
    )
    assert [(prompts, seed) for prompts, _, seed in model.model.calls] == [(["A:", "B:"], 7), (["A:", "B:"], 8)]
    assert all(config.do_sample and config.top_p == 0.96 for _, config, _ in model.model.calls)


@pytest.mark.slow
def test_a_tiny_language_model_answers_questions_from_files(files, monkeypatch, capsys):
    import jax
    import leafwise

    experiment = loading.released_experiment(TextLM(LANGUAGE), loading.Path("tiny"))
    model = loading.from_params(experiment, {})
    batch = loading.dummy_batch(model.processor)
    params = leafwise.init_leafwise(model.vlm.init, jax.random.key(0), batch)
    monkeypatch.setattr(lionjax, "load", lambda *_, **__: loading.from_params(experiment, params))
    words = ["--lm", "tiny", "--workdir", str(files / "out"), "--shots", "0"]
    assert cli.main(["answer", str(files / "questions.jsonl"), *words]) == 0
    assert "3 of 3 questions" in capsys.readouterr().out
    (found, *_) = model_complete(loading.from_params(experiment, params))
    assert len(found.token_log_probs) == len(found.token_ids) > 0 and max(found.token_log_probs) <= 0


def model_complete(model):
    config = dataclasses.replace(
        model.generation_config("image_level"), max_new_tokens=answering.pica.MAX_ANSWER_TOKENS, output_logprobs=True
    )
    return model.complete(["a star"], config)


def test_generate_continues_a_text_without_an_image_and_only_with_a_model_that_reads_none(monkeypatch, capsys):
    info = types.SimpleNamespace(reads_images=False)
    model = types.SimpleNamespace(
        vlm=types.SimpleNamespace(info=info),
        complete=lambda prompts, seed: [types.SimpleNamespace(text=f"{prompts[0]}!")],
    )
    monkeypatch.setattr(lionjax, "load", lambda *_, **__: model)
    assert cli.main(["generate", "lm", "--prompt", "Once"]) == 0 and capsys.readouterr().out == "Once!\n"
    assert cli.main(["generate", "lm", "--prompt", "Once", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"text": "Once!"}
    info.reads_images = True
    assert cli.main(["generate", "lm", "--prompt", "Once"]) == 2 and "give --image FILE" in capsys.readouterr().err
    assert cli.main(["generate", "lm", "--prompt", "Once", "--box", "0,0,1,1"]) == 2
