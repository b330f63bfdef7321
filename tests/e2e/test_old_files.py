# SPDX-License-Identifier: Apache-2.0
"""What lionjax 0.1 wrote is still loaded, gone on with, converted, evaluated and reported.

The files lie in `data/v0.1`, with what that version answered to them in `expected.json`; its
README.md says how they were made. Paths within them are relative to that folder: every test works
in a copy of what it needs.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import compile_flags
import jaxlib
import numpy as np
import pytest
from paths import TESTS

import lionjax
from lionjax import convert

DATA = TESTS / "data" / "v0.1"
EXPECTED = json.loads((DATA / "expected.json").read_text(encoding="utf-8"))
MODELS, FORMS, RUNS = EXPECTED["models"], EXPECTED["forms"], EXPECTED["runs"]
ANSWERING = [name for name, entry in MODELS.items() if "answers" in entry]
QUICK = ("models/llava15", "models/frozen")  # to compile
CLOCKS = ("seconds", "images_per_second", "tokens_per_second")


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A function that copies old files, by name, into the empty folder in which the test works."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("LIONJAX_TRACEBACK", raising=False)
    for name in ("tokenizer", "picture.png"):
        copied(name)
    return copied


def copied(*names: str) -> None:
    """Copies of old files or folders, under their names, in the working directory."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if (DATA / name).is_dir():
            shutil.copytree(DATA / name, name)
        else:
            shutil.copyfile(DATA / name, name)


def leaves_of(tree, path: str = "") -> dict:
    """{path: leaf} of nested dicts."""
    if not hasattr(tree, "items"):
        return {path: tree}
    inside = (leaves_of(part, f"{path}/{name}" if path else name) for name, part in tree.items())
    return {path: leaf for some in inside for path, leaf in some.items()}


def sha256_of(params) -> str:
    """Of path, dtype, shape and bytes of every leaf, sorted by path."""
    digest = hashlib.sha256()
    for path, leaf in sorted(leaves_of(params).items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return digest.hexdigest()


def same_machine() -> bool:
    """Whether losses must be the same to the bit: the same XLA on the same kind of processor."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else platform.machine()
    flags = next((line for line in text.splitlines() if line.startswith("flags")), platform.machine())
    made = hashlib.sha256(f"{jaxlib.__version__} {sorted(flags.split())}".encode()).hexdigest()[:16]
    return made == EXPECTED["machine"]


# Version 0.1 ended an answer that it cut in an end token; training by its rule gives its losses.
CUT_AS_0_1 = """
import sys
from lionjax.cli import main
from lionjax.data.prompt import PromptBuilder

def cut_target(self, ids, end_ids=()):
    num_cut = max(0, len(ids) - self.config.max_target_tokens)
    return [*ids[: len(ids) - len(end_ids)][: self.config.max_target_tokens - len(end_ids)], *end_ids], num_cut

assert callable(PromptBuilder._cut_target)
PromptBuilder._cut_target = cut_target
sys.exit(main(sys.argv[1:]))
"""


def says(*words: str, code: int = 0, program: tuple[str, str] = ("-m", "lionjax")) -> tuple[str, str]:
    """(stdout, stderr) of a command line in a process of its own, on one device.

    It is compiled as for users where losses must be the same to the bit, and with little care elsewhere.
    """
    ours = ("XLA_FLAGS", "PJRT_NPROC", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    if not same_machine():
        env |= {"XLA_FLAGS": compile_flags.XLA_FLAGS, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(lionjax.__file__).parent.parent), env.get("PYTHONPATH", "")])
    command = [sys.executable, *program, *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def here(capsys, *words: str, code: int = 0) -> tuple[str, str]:
    """The same in this process, where what is imported and compiled is so already."""
    try:
        from lionjax.cli import main
    except ImportError:
        return says(*words, code=code)
    capsys.readouterr()
    ended = main(list(words))
    out, err = capsys.readouterr()
    assert ended == code, err
    return out, err


def assert_answers(model, answers: list[dict]) -> None:
    """The model says of picture.png what it said."""
    prompts, boxes = EXPECTED["prompts"], None
    if model.processor.config.places == "embeddings":
        boxes = [[], [EXPECTED["box"]]]
    found = model.answer(["picture.png"] * len(prompts), prompts, boxes=boxes)
    assert [one.text for one in found] == [one["text"] for one in answers]
    for one, wanted in zip(found, answers, strict=True):
        np.testing.assert_allclose(one.boxes, np.reshape(wanted["boxes"], (-1, 4)), atol=2e-3)
        assert list(one.masks.shape) == wanted["masks"]
        covered = one.masks.mean() if one.masks.size else 0.0
        assert covered == pytest.approx(wanted["covered"], abs=0.01)


def lines_of(workdir: str) -> list[dict]:
    """The lines of metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in Path(workdir, "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def assert_losses(workdir: str, wanted: list[dict]) -> None:
    """The lines of metrics are those of 0.1: to the bit on the same machine, else to rounding."""
    found, most = lines_of(workdir), 0.0 if same_machine() else 1e-4
    assert [line["update"] for line in found] == [line["update"] for line in wanted]
    for mine, line in zip(found, wanted):
        for name in ("loss", "grad_norm", "learning_rate"):
            assert mine.get(name) == pytest.approx(line.get(name), rel=most, abs=0.0), (name, line)


# Folders of weights


@pytest.mark.parametrize("name", [*MODELS, *FORMS])
def test_folders_of_0_1_hold_the_same_parameters(name, old):
    old(name)
    entry = MODELS.get(name) or FORMS[name]
    if name.startswith("torch/"):
        _, params = convert.from_torch(name)
    else:
        _, params = convert.load_params(name)
    assert sha256_of(params) == entry["params"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ANSWERING])
def test_exported_folder_of_0_1_loads_and_gives_the_same_answers(name, old):
    old(name)
    model = lionjax.load(name)
    assert sha256_of(model.params) == MODELS[name]["params"]
    assert_answers(model, MODELS[name]["answers"])


@pytest.mark.parametrize("name", [name for name in FORMS if "like" in FORMS[name]])
def test_torch_and_orbax_folders_of_0_1_load_as_their_source_model(name, old):
    old(name)
    model = lionjax.load(name)
    assert sha256_of(model.params) == MODELS[FORMS[name]["like"]]["params"]


@pytest.mark.slow
def test_tagger_of_0_1_gives_the_same_tags(old, capsys):
    old("parts/ram")
    out, _ = here(capsys, "tag", "parts/ram", "--image", "picture.png", "--json")
    (found,), wanted = json.loads(out), MODELS["parts/ram"]["tags"]
    assert found["tags"] == wanted["tags"] and found["chinese"] == wanted["chinese"]
    np.testing.assert_allclose(found["probabilities"], wanted["probabilities"], atol=1e-4)


# Runs


@pytest.mark.parametrize("name", RUNS)
def test_run_of_0_1_loads_with_the_same_parameters(name, old):
    old(name, "resized")
    assert sha256_of(lionjax.load(name).params) == RUNS[name]["params"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_run_of_0_1_gives_the_same_answers(name, old):
    old(name, "resized")
    assert_answers(lionjax.load(name), RUNS[name]["answers"])


@pytest.mark.slow
def test_run_that_0_1_stopped_in_its_second_stage_ends_as_if_never_stopped(old):
    old("trained/stopped", "user/lion.py")
    finished = RUNS["trained/stopped"]["finished"]
    before = lines_of("trained/stopped")
    assert before[-1]["stage"] == "region_level" and len(before) < len(finished["metrics"])
    # The same values under the names that fields had; and some that a run may go on with.
    old_names = ("--stages.0.accumulate", "2", "--system.language.vocab", "96", "--run.keep", "2")
    says("train", "user/lion.py", "--workdir", "trained/stopped", *old_names, program=("-c", CUT_AS_0_1))
    assert_losses("trained/stopped", finished["metrics"])
    report = json.loads(Path("trained/stopped/report.json").read_text())
    assert [stage["frozen_unchanged"] for stage in report["stages"]] == [True, True]
    if same_machine():
        assert sha256_of(lionjax.load("trained/stopped").params) == finished["params"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trained/lora", "trained/resized"])
def test_finished_run_of_0_1_is_recognized_as_finished(name, old):
    """The old config file belongs to the run, which has nothing left to do."""
    old(name, "user", "built", "features", "resized", "lines")
    before = Path(name, "metrics.jsonl").read_bytes()
    says("train", f"user/{Path(name).name}.py", "--workdir", name, "--run.evaluate_limit", "0")
    assert Path(name, "metrics.jsonl").read_bytes() == before
    assert sha256_of(lionjax.load(name).params) == RUNS[name]["params"]


@pytest.mark.slow
def test_finished_run_of_0_1_goes_on_with_more_steps(old):
    """From its newest checkpoint: that version saved none of its last update."""
    old("trained/lora", "user", "built")
    before = lines_of("trained/lora")
    words = ("--stages.0.steps", str(len(before) + 1), "--run.evaluate_limit", "0", "--run.feature_cache_dir", "")
    _, err = says("train", "user/lora.py", "--workdir", "trained/lora", *words)
    assert f"goes on after step {len(before) - 1}, of which the newest checkpoint is" in err
    after = lines_of("trained/lora")
    assert [line["update"] for line in after] == [*range(1, len(before) + 2)] and after[:-2] == before[:-1]
    assert json.loads(Path("trained/lora/report.json").read_text())["stages"][0]["steps"] == len(before) + 1


@pytest.mark.slow
def test_training_anew_by_an_old_config_uses_old_data_and_kept_features(old):
    """Losses are those of 0.1, from its ArrayRecord files, and no features are added to its own."""
    old("user/lora.py", "built/scenes", "features")
    before = sorted(Path("features").rglob("*"))
    says("train", "user/lora.py", "--workdir", "again", "--run.evaluate_limit", "0", program=("-c", CUT_AS_0_1))
    assert_losses("again", RUNS["trained/lora"]["metrics"])
    assert sorted(Path("features").rglob("*")) == before


@pytest.mark.slow
def test_records_of_a_run_of_0_1_are_kept_and_reported(old, capsys):
    old("trained/resized")
    refused = [json.loads(line) for line in Path("trained/resized/refused.jsonl").read_text().splitlines()]
    assert refused == RUNS["trained/resized"]["refused"] and refused
    assert Path("trained/resized/bad_records.jsonl").read_text()
    assert len(list(Path("trained/resized/quarantined").glob("*.txt"))) == 1
    here(capsys, "report", "trained/resized")
    page = Path("trained/resized/report.html").read_text()
    assert "align" in page and "small_resized" in page


@pytest.mark.slow
def test_run_of_0_1_is_evaluated_as_it_was(old, capsys):
    old("trained/lora", "built/scenes")
    before = Path("trained/lora/evaluation/vqa.jsonl").read_text().splitlines()
    shutil.rmtree("trained/lora/evaluation")
    words = ("--benchmark", "vqa", "--limit", "2", "--json")
    (entry,) = json.loads(here(capsys, "evaluate", "trained/lora", *words)[0])
    assert entry["metrics"] == RUNS["trained/lora"]["evaluation"]["vqa"]
    after = Path("trained/lora/evaluation/vqa.jsonl").read_text().splitlines()
    said = [[json.loads(line).get("answer") for line in lines] for lines in (before, after)]
    assert said[0] == said[1] and len(said[0]) == 2
    here(capsys, "report", "trained/lora")
    assert Path("trained/lora/report.html").is_file()


# Commands, configs and data


def marked(command: dict):
    """A command as a parameter of a test; one that answers benchmarks is slow."""
    marks = pytest.mark.slow if command["words"][0] == "evaluate" else ()
    return pytest.param(command, marks=marks, id=" ".join(command["words"])[:70])


@pytest.mark.parametrize("command", [marked(command) for command in EXPECTED["commands"]])
def test_command_of_0_1_gives_the_same_result(command, old, capsys):
    """Options and field names are those of 0.1."""
    names = ("user", "trained/lora", "torch", "orbax", "models/llava15", "built", "lines")
    needed = {name for name in names if any(word.startswith(name) for word in command["words"])}
    needed |= {"built"} if "trained/lora" in needed else set()
    old(*sorted(needed))
    words = ["out" if word == "OUT" else word for word in command["words"]]
    out, err = here(capsys, *words, code=command.get("code", 0))
    if "shows" in command:  # the one line that the override changes
        plain = next((place for place, word in enumerate(words) if word.startswith("--")), None)
        other, _ = here(capsys, *words[:plain])
        changed = [line for line in out.splitlines() if line not in other.splitlines()]
        assert [line.rpartition(" = ")[2] for line in changed] == [command["shows"]]
    if "prints" in command:
        assert command["prints"] in out
    if "error" in command:
        assert command["error"] in err and err.count("\n") == 1
    if "same" in command:
        wanted = (MODELS | FORMS)[command["same"]]["params"]
        assert sha256_of(convert.load_params("out")[1]) == wanted
    if "answer" in command:
        assert json.loads(out)["text"] == RUNS["trained/lora"]["answers"][command["answer"]]["text"]
    if "figures" in command:
        assert json.loads(out)[0]["metrics"] == RUNS["trained/lora"]["evaluation"][command["figures"]]


def test_torch_folder_of_a_run_of_0_1_comes_back_to_the_same_bits(old, capsys):
    old("trained/lora")
    here(capsys, "convert", "trained/lora", "theirs", "--to", "torch")
    here(capsys, "convert", "theirs", "ours", "--to", "jax")
    assert sha256_of(convert.load_params("ours")[1]) == RUNS["trained/lora"]["params"]
    assert Path("theirs/adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", EXPECTED["configs"])
def test_recorded_config_of_0_1_is_read(name, old, capsys):
    """config.json of every config that 0.1 shipped, and one with every source of data."""
    old(name)
    out, err = here(capsys, "show", name)
    assert len(out.splitlines()) > EXPECTED["configs"][name]["fields"] / 2
    assert "no config class" not in err


@pytest.mark.parametrize("name", ["user/lion.py", "user/lora.py", "user/resized.py"])
def test_config_file_of_0_1_shows_what_its_run_recorded(name, old, capsys):
    run = {"lion": "stopped"}.get(Path(name).stem, Path(name).stem)
    old(name, f"trained/{run}")
    assert here(capsys, "show", name)[0] == here(capsys, "show", f"trained/{run}")[0]


@pytest.mark.parametrize("folder", EXPECTED["built"])
def test_built_data_of_0_1_are_read(folder, old, capsys):
    old(folder)
    out, _ = here(capsys, "data", "inspect", folder, "--split", "train", "--limit", "2")
    rows = [line for line in EXPECTED["built"][folder]["inspected"] if line.startswith("│")]
    cells = {cell.strip() for row in rows for cell in row.split("│") if cell.strip()}
    found = {cell.strip() for line in out.splitlines() for cell in line.split("│")}
    assert cells <= found
