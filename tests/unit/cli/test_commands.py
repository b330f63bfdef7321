# SPDX-License-Identifier: Apache-2.0
"""The command line: what it answers, what it refuses, and how it ends."""

import errno
import json
import re
import subprocess
import sys
import time
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
from paths import CONFIGS, ROOT
from PIL import Image

from lionjax import cli, convert
from lionjax.cli import entry
from lionjax.cli.errors import describe_error
from lionjax.cli.serve import model_name
from lionjax.core import config, hub
from lionjax.core.errors import EXTRA_MODULES, RetryError
from lionjax.core.types import UserError
from lionjax.data import pipeline
from lionjax.data.scenes import tasks
from lionjax.evaluation.report import plots
from lionjax.inference import loading, tagger
from lionjax.inference.model import Answer
from lionjax.pipelines import loading as with_helpers
from lionjax.tiny.shrink import shrink
from lionjax.training import loop

VERBS = list(entry.build_parsers()[1])
TOY = """
from lionjax.core.experiment import Experiment, Stage
from lionjax.nn.lora import LoraConfig
from lionjax.core.sharding import MeshConfig


def get_config():
    stage = Stage("one", steps=10, trainable=("a",), mixture=(("vqa", 1.0),), batch_size=4)
    return Experiment("toy", LoraConfig(), MeshConfig(), (stage,))
"""


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(TOY)
    return str(path)


def refused(capsys, *words) -> str:
    """The sentence of a command line that ends with 2."""
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("lionjax: ") and err.count("\n") == 1 and "Traceback" not in err
    return err.removeprefix("lionjax: ").strip()


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], *([v, "--help"] for v in VERBS)])
def test_help_loads_nothing_heavy(words):
    code = (
        "import sys\nfrom lionjax import cli\n"
        "try:\n    cli.main(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = 'jax flax numpy PIL matplotlib grain torch transformers tyro rich'.split()\n"
        "assert not set(heavy) & set(sys.modules), set(heavy) & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_help_names_every_verb_and_what_it_does(capsys):
    assert cli.main([]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for name, verb in entry.build_parsers()[1].items():
        assert verb.get_default("run").__doc__ in out and f" {name} " in out


def test_completion_scripts_name_every_verb(capsys):
    assert cli.main(["completion", "bash"]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"[( ]{name}[) ]", out) for name in entry.build_parsers()[1])
    assert "choose from" in refused(capsys, "completion", "csh")


def test_a_prompt_that_begins_as_a_name_of_the_hub_stays_a_text(monkeypatch):
    monkeypatch.setattr(hub, "local_path", lambda value: Path("cache") / Path(value).name)
    seen = []
    verb = types.SimpleNamespace(run=lambda args, _: seen.append(args), dir=Path("hf://org/name"), prompt="hf://org/x?")
    entry.run_verb(verb, [])
    assert (seen[0].dir, seen[0].prompt) == (Path("cache/name"), "hf://org/x?")


@pytest.mark.parametrize(
    ("module", "package"), [("grain.python", "lionjax[data]"), ("cv2", "lionjax[opencv]"), ("foo.bar", "foo")]
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(module, package):
    message, code = describe_error(ModuleNotFoundError(f"No module named {module!r}", name=module))
    assert (message.rpartition("; ")[2], code) == (f"run `pip install '{package}'`", 2)


def test_the_extras_of_missing_modules_are_those_of_the_project():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRA_MODULES) <= set(extras)


def test_a_wrong_command_line_raises_a_one_sentence_error(capsys, toy):
    assert refused(capsys, "trian") == "there is no verb 'trian'; did you mean `lionjax train`?"
    assert refused(capsys, "xyz").endswith("did you mean `lionjax --help`?")
    assert "required: --workdir; see `lionjax train --help`" in refused(capsys, "train", toy)
    assert refused(capsys, "report", "x", "--fast").startswith("unknown argument '--fast'")
    assert refused(capsys, "show", "nothing.py").startswith("no config file 'nothing.py'")
    assert refused(capsys, "report", "nothing").startswith("nothing holds no report.json")
    assert refused(capsys, "benchmark", "nothing").startswith("there is no benchmark 'nothing'")


@pytest.mark.parametrize("verb", ["show", "train"])
def test_an_unknown_field_is_one_sentence_with_the_nearest_one(capsys, toy, tmp_path, verb):
    words = [verb, toy, "--stages.0.stepz", "20"]
    words += ["--workdir", str(tmp_path / "run")] if verb == "train" else []
    wanted = "Experiment has no field 'stages.0.stepz'; did you mean 'stages.0.steps'?"
    assert refused(capsys, *words) == wanted
    assert not (tmp_path / "run").exists()


def test_train_shrinks_a_config_and_leaves_what_the_command_line_sets(tmp_path, monkeypatch):
    seen, file = [], str(CONFIGS / "llava15_7b.py")
    monkeypatch.setattr(loop, "train", lambda experiment, *given: (seen.append(experiment), ({}, {}))[1])
    set_here = ["--model.language.depth", "5", "--stages.0.steps", "3", "--run.evaluate_limit", "0"]
    assert cli.main(["train", file, "--workdir", str(tmp_path), "--shrink", "0.25", *set_here]) == 0
    assert seen == [config.apply_overrides(shrink(config.load(file), 0.25), set_here)]
    assert seen[0].model.language.depth == 5 and seen[0].model.language.width < 100


def test_train_passes_the_config_with_overrides_to_the_training_loop(toy, tmp_path, monkeypatch):
    seen = []

    def train(*given):
        seen.extend(given)
        return {"blocks": {"adapters": {"ratio": np.ones((3, 2, 2, 4))}}}, {}

    monkeypatch.setattr(loop, "train", train)
    overrides = ["--stages.0.steps", "20", "--run.evaluate_limit", "0"]
    words = ["train", toy, *overrides, "--workdir", str(tmp_path), "--mesh.data", "-1"]
    before = time.time()
    assert cli.main(words) == 0
    *given, began, evaluator = seen
    assert given == [config.load(toy, overrides), tmp_path, pipeline.batches]
    assert before <= began <= time.time() and evaluator is None
    kept = json.loads((tmp_path / "routers.json").read_text())
    assert kept == {"blocks adapters": np.ones((3, 2, 2)).tolist()}


def test_show_prints_the_config_of_a_file_and_of_a_run(capsys, toy, tmp_path):
    assert cli.main(["show", toy, "--stages.0.steps", "20"]) == 0
    out = capsys.readouterr().out
    assert "    steps: int = 20" in out.splitlines()
    (tmp_path / "config.json").write_text(config.to_json(config.load(toy, ["--stages.0.steps", "20"])))
    assert cli.main(["show", str(tmp_path)]) == 0
    assert capsys.readouterr().out == out
    (tmp_path / "config.json").unlink()
    assert "holds no config.json" in refused(capsys, "show", str(tmp_path))


def test_inspect_says_what_a_source_holds_and_draws_it(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["data", "inspect", "scenes", "--pixels", "64", "--limit", "1", "--split", "heldout"]
    assert cli.main([*words, "--out", str(tmp_path / "look.png")]) == 0
    out = capsys.readouterr().out
    assert "500 records" in out and all(f" {task} " in out for task in tasks.TASKS)
    assert "64 x 64" in out
    look = Image.open(tmp_path / "look.png")
    assert look.width == 4 * 336 + 16 and look.height > 3 * 336  # ten tasks in three rows


def test_a_source_that_is_wrongly_named_or_set_raises_a_one_sentence_error(capsys):
    assert refused(capsys, "data", "inspect", "cocoo").startswith("there is no source 'cocoo'")
    assert "did you mean 'image_size'?" in refused(capsys, "data", "inspect", "scenes", "--image_siz", "3")
    assert refused(capsys, "data", "build", "scenes").startswith("build needs --out FOLDER")
    assert refused(capsys, "data", "inspect", "scenes", "--split", "x").startswith("there is no split")
    assert "choose from" in refused(capsys, "data", "incpect", "scenes")


def test_build_writes_scenes_that_inspect_reads_back(capsys, tmp_path):
    sizes = ["--sizes", "2", "1", "1", "--pixels", "32"]
    assert cli.main(["data", "build", "scenes", "--out", str(tmp_path), *sizes]) == 0
    folder = capsys.readouterr().out.splitlines()[-1]
    assert cli.main(["data", "inspect", folder]) == 0
    built = capsys.readouterr().out
    assert cli.main(["data", "inspect", "scenes", *sizes]) == 0
    assert built == capsys.readouterr().out and "2 records" in built


def test_convert_reports_what_it_converted_and_refuses_unreadable_input(capsys, tmp_path, monkeypatch):
    seen, source, target = [], tmp_path / "nothing", tmp_path / "out"
    words = ["convert", str(source), str(target), "--to", "jax"]
    assert "nothing" in refused(capsys, *words)
    assert not target.exists()
    monkeypatch.setattr(convert, "convert", lambda *given, **more: seen.append((given, more)) or "table")
    wanted = convert.ResizeOptions(("<a>", "<b>"), 8)
    more = {"adapter": "lora", "merge_lora": False, "resize_options": wanted, "base": None, "vision_tower": None}
    # The second pair are the names of version 0.1.
    for added, multiple in (("--add-tokens", "--pad-vocab-to-multiple-of"), ("--add-words", "--vocab-multiple")):
        assert cli.main([*words, "--system", "t5", added, "<a>,<b>", multiple, "8", "--adapter", "lora"]) == 0
        assert capsys.readouterr().out == "table\n" and seen[-1] == ((source, target, "jax", "t5"), more)


def test_show_prints_the_table_of_a_config_and_of_a_folder_of_weights(capsys, tmp_path):
    from published_folders import tiny_t5

    assert cli.main(["show", "configs/tiny_lion.py", "--weights"]) == 0
    assert "Qformer.bert.embeddings.word_embeddings.weight  ->  qformer/words/table  (same)" in capsys.readouterr().out
    convert.to_torch(*tiny_t5(), tmp_path / "torch")
    convert.convert(tmp_path / "torch", tmp_path / "ours", "jax")
    tables = []
    for folder in ("torch", "ours"):
        assert cli.main(["show", str(tmp_path / folder), "--weights"]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    tied = "shared.weight  = encoder.embed_tokens.weight  = decoder.embed_tokens.weight  ->  embedding/table  (same)"
    assert tied in tables[0].splitlines()
    assert "no fields to set" in refused(capsys, "show", str(tmp_path / "torch"), "--weights", "--a", "1")


@pytest.mark.slow
def test_convert_verify_fails_where_outputs_differ(capsys, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from published_folders import LLAMA

    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "theirs")
    words = ["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--to", "jax", "--verify"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "model.layers.{i}.self_attn.q_proj" in said and "logits" in said
    words = ["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "torch", "--verify"]
    assert cli.main(words) == 0
    monkeypatch.setattr("lionjax.convert.verify.compare.RELATIVE_TOLERANCE", 0.0)
    assert cli.main([*words[:2], str(tmp_path / "other"), *words[3:]]) == 2
    said = capsys.readouterr()
    assert "<- differs most in" in said.out and "differ by more than rounding errors" in said.err
    monkeypatch.setattr("lionjax.convert.verify.compare.COMPARISON_RUNS", {})
    assert cli.main([*words[:2], str(tmp_path / "third"), *words[3:]]) == 2
    said = f"{tmp_path / 'third'} was written, but cannot be verified: transformers has no class"
    assert said in capsys.readouterr().err and (tmp_path / "third" / "model.safetensors").is_file()


@pytest.mark.parametrize("exact", [True, False])
def test_convert_exports_a_run_and_says_whether_every_bit_comes_back(capsys, tmp_path, monkeypatch, exact):
    seen = []
    loaded = types.SimpleNamespace(export=lambda *given: seen.append(given), equals_bitwise=lambda other: exact)
    monkeypatch.setattr(loading, "is_run", lambda path: path == tmp_path)
    monkeypatch.setattr(loading, "load", lambda path: loaded)
    (tmp_path / "report.json").write_text('{"config": 1}')
    assert cli.main(["convert", str(tmp_path), "out", "--to", "torch"]) == 0
    said = capsys.readouterr().out
    assert seen == [(Path("out"), "torch", False)] and ("every bit is the same" in said) == exact
    assert json.loads((tmp_path / "report.json").read_text()) == {"config": 1, "round_trip_exact": exact}


class Model:
    """Answers with half of the box it was asked about, or of the whole picture."""

    def answer(self, images, prompts, boxes=None, tags=None, seed=None):
        x0, y0, x1, y1 = boxes[0][0] if boxes else (0.0, 0.0, 1.0, 1.0)
        mask = np.zeros((20, 30), bool)
        mask[:10] = True
        found = np.array([[x0, y0, (x0 + x1) / 2, y1]])
        text = f"{prompts[0]} {images[0].size}" + (f" {', '.join(tags[0])}" if tags else "")
        return [Answer(text, found, mask[None])]


@pytest.fixture
def asked(tmp_path, monkeypatch):
    Image.new("RGB", (30, 20), "#808080").save(tmp_path / "gray.png")
    monkeypatch.setattr(with_helpers, "load", lambda folder, prompt_length, refiner: Model())
    return ["generate", str(tmp_path), "--image", str(tmp_path / "gray.png"), "--prompt", "where?"]


def test_generate_prints_the_answer_and_draws_it(capsys, asked, tmp_path):
    out = tmp_path / "out.png"
    assert cli.main([*asked, "--box", "0.2,0.2,0.8,0.8", "--out", str(out)]) == 0
    assert capsys.readouterr().out == "where? (30, 20)\nbox 0.200 0.200 0.500 0.800\n"
    drawn = Image.open(out)
    colors = {color for _, color in drawn.getcolors(1 << 20)}
    assert drawn.size == (480, 320) and {(230, 159, 0), (86, 180, 233)} <= colors


def test_generate_gives_json_with_masks_that_can_be_read_back(capsys, asked):
    from pycocotools import mask as coco

    assert cli.main([*asked, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == "where? (30, 20)" and answer["boxes"] == [[0.0, 0.0, 0.5, 1.0]]
    assert coco.area(answer["masks"][0]) == 300


def test_generate_prints_each_mask_with_its_phrase_and_draws_it_in_its_own_color(capsys, asked, tmp_path, monkeypatch):
    masks = np.zeros((3, 20, 30), bool)
    masks[0, :5], masks[1, 15:] = True, True
    text = "A red star [0.000,0.000,1.000,0.250], [SEG] and a blue ring [0.000,0.750,1.000,1.000]."
    boxes = np.array([[0.0, 0.0, 1.0, 0.25], [0.0, 0.75, 1.0, 1.0]])
    monkeypatch.setattr(Model, "answer", lambda *_, **given: [Answer(text, boxes, masks[[0, 2, 1]])])
    out = tmp_path / "out.png"
    assert cli.main([*asked, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == text and lines[3:] == [
        "mask 150 pixels A red star",
        "mask 0 pixels",
        "mask 150 pixels a blue ring",
    ]
    drawn = np.asarray(Image.open(out), int)
    first, third = (plots.hex_to_rgb(plots.ANSWER_COLORS[k]) for k in (0, 2))
    for color, tall in ((first, (20, 60)), (third, (260, 300))):
        halves = 0.55 * 128 + 0.45 * np.array(color)  # of the gray image
        assert (np.abs(drawn[slice(*tall), 240:460] - halves).max(axis=-1) < 3).mean() > 0.5
    assert (np.abs(drawn[120:200, 240:460] - 128) < 3).all()
    assert cli.main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["phrases"] == ["A red star", "", "a blue ring"]


class Tagger:
    """Sees a cat wherever it looks."""

    def tag(self, images):
        return [tagger.TagResult(("cat", "gray"), ("猫",), (0.75, 0.5)) for _ in images]


def test_generate_passes_the_tags_of_a_tagger_to_the_model(capsys, asked, monkeypatch):
    monkeypatch.setattr(tagger, "load", lambda folder: Tagger())
    assert cli.main([*asked, "--tagger", "ram"]) == 0
    assert capsys.readouterr().out.startswith("where? (30, 20) cat, gray\n")
    assert cli.main([*asked, "--tagger", "ram", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tags"] == ["cat", "gray"]


def test_tag_prints_a_line_for_each_picture_or_everything_as_json(capsys, asked, monkeypatch):
    monkeypatch.setattr(tagger, "load", lambda folder: Tagger())
    file = asked[asked.index("--image") + 1]
    assert cli.main(["tag", "ram", "--image", file, file]) == 0
    assert capsys.readouterr().out == "cat | gray\ncat | gray\n"
    assert cli.main(["tag", "ram", "--image", file, "--json"]) == 0
    found = {"image": file, "tags": ["cat", "gray"], "chinese": ["猫"], "probabilities": [0.75, 0.5]}
    assert json.loads(capsys.readouterr().out) == [found]
    assert "nothing.png" in refused(capsys, "tag", "ram", "--image", "nothing.png")


@pytest.mark.parametrize("box", ["0.5,0.5,0.5,0.9", "0,0,2,1", "a,b,c,d", "0.1,0.2,0.3"])
def test_generate_refuses_an_invalid_box(capsys, asked, box):
    assert refused(capsys, *asked, "--box", box).startswith("--box")


def test_generate_refuses_a_missing_picture_before_it_loads_the_model(capsys, asked, monkeypatch):
    monkeypatch.setattr(with_helpers, "load", lambda folder: pytest.fail("the model was loaded"))
    asked[asked.index("--image") + 1] = "nothing.png"
    assert "nothing.png" in refused(capsys, *asked)


def chained(text):
    error = ValueError("could not write")
    error.__cause__ = RuntimeError(text)
    return error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("the box is empty"), 2, "the box is empty"),
        (RetryError("a host did not answer"), 75, "a host did not answer"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "the disk is full"),
        (chained("Internal: write failed: no space left on device"), 2, "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "no permission for /x"),
        (ZeroDivisionError("by\nzero"), 1, "unexpected ZeroDivisionError: by; set LIONJAX_TRACEBACK=1"),
        (AssertionError(), 1, "unexpected AssertionError: no message"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_error_is_one_sentence_with_its_exit_code(capsys, monkeypatch, error, code, said):
    monkeypatch.delenv("LIONJAX_TRACEBACK", raising=False)

    def run(words):
        raise error

    monkeypatch.setattr(entry, "run", run)
    assert cli.main([]) == code
    err = capsys.readouterr().err
    assert err.startswith(f"lionjax: {said}") and err.count("\n") == 1


def test_traceback_is_printed_if_lionjax_traceback_is_set(capsys, monkeypatch):
    monkeypatch.setenv("LIONJAX_TRACEBACK", "1")
    assert cli.main(["show", "nothing.py"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("lionjax: no config file")


@pytest.mark.parametrize(
    ("folder", "name"),
    [("runs/demo", "demo"), ("shipped:tiny_lyrics", "tiny_lyrics"), ("c/models--org--chat/snapshots/0a1b", "chat")],
)
def test_a_served_model_has_the_name_of_its_folder_or_repository(folder, name):
    assert model_name(Path(folder)) == name


@pytest.mark.slow
def test_closed_output_pipe_is_not_an_error(toy):
    command = f"{sys.executable} -m lionjax.cli show {toy} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("Experiment\n", "", 0)
