# SPDX-License-Identifier: Apache-2.0
"""Names of the Hugging Face Hub, downloads and uploads, against a small hub on the loopback address."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, running_hub
from paths import ROOT
from PIL import Image

from lionjax.core import hub
from lionjax.core.types import UserError


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("hf://org/name", hub.HubName("org/name")),
        ("hf://org/name@v1.0/sub/file.json", hub.HubName("org/name", "v1.0", "sub/file.json")),
        (Path("hf://org/name@main"), hub.HubName("org/name", "main")),
        ("hf://datasets/org/name/data", hub.HubName("org/name", None, "data", True)),
    ],
)
def test_names_have_repository_revision_and_path(name, wanted):
    assert hub.parse_name(name) == wanted


@pytest.mark.parametrize("name", ["hf://org", "hf://", "hf://org/na me", "hf://org/name/../x", "hf://a/b@"])
def test_other_texts_are_no_names(name):
    with pytest.raises(UserError, match="is no name of the hub; write hf://ORG/NAME"):
        hub.parse_name(name)


def test_local_paths_stay_as_they_are():
    assert hub.local_path("runs/demo") == Path("runs/demo")


@pytest.fixture
def server(tmp_path):
    with running_hub() as server:
        image = io.BytesIO()
        Image.new("RGB", (20, 20), (200, 10, 10)).save(image, "PNG")
        row = json.dumps({"image": "images/a.png", "question": "What color is it?", "answer": "red"})
        server.files["datasets/org/colors"] = {"rows.jsonl": row.encode(), "images/a.png": image.getvalue()}
        yield server


def lionjax(server, tmp_path, *words: str, code: str = "", **env: str) -> subprocess.CompletedProcess:
    """A command line, or Python code, of a user of this hub."""
    ours = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache")}
    ours |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    command = [sys.executable, *(("-c", code) if code else ("-m", "lionjax", *words))]
    return subprocess.run(command, cwd=tmp_path, env=kept | ours | env, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_data_of_the_hub_is_inspected_and_then_read_from_the_cache(server, tmp_path):
    words = ("data", "inspect", "hf://datasets/org/colors/rows.jsonl", "--images", "hf://datasets/org/colors")
    done = lionjax(server, tmp_path, *words)
    assert done.returncode == 0 and "What color is it?" in done.stdout, done.stderr
    server.requests.clear()
    again = lionjax(server, tmp_path, *words, HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout, server.requests) == (0, done.stdout, [])


SENTENCES = [
    ("hf://org/nothing", {}, "there is no model org/nothing on the hub; check the name; a private repository needs", 2),
    ("hf://org/nothing", {"HF_HUB_OFFLINE": "1"}, "is not in the cache, and HF_HUB_OFFLINE is set", 2),
    ("hf://org/closed", {}, "a private repository needs HF_TOKEN", 2),
    ("hf://org/closed@v7", {"HF_TOKEN": TOKEN}, "org/closed on the hub has no revision 'v7'; give a branch, tag", 2),
    ("hf://org/closed/x", {"HF_TOKEN": TOKEN}, "org/closed on the hub has no 'x'; give a file or folder", 2),
    ("hf://org/name", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "check the network and try again", 75),
]


@pytest.mark.slow
def test_what_the_hub_refuses_is_one_sentence_and_the_exit_code_says_whether_to_try_again(server, tmp_path):
    server.files["org/closed"], server.private = {"a.txt": b"a"}, {"org/closed"}
    code = "from lionjax.cli import main; import os, sys\n"
    for name, env, wanted, exit_code in SENTENCES:  # one process each: huggingface_hub reads the environment once
        done = lionjax(server, tmp_path, code=f"{code}sys.exit(main(['show', {name!r}]))", **env)
        lines = done.stderr.strip().splitlines()
        assert (done.returncode, wanted in lines[-1]) == (exit_code, True), (name, done.stderr)
        assert TOKEN not in done.stderr + done.stdout


@pytest.mark.slow
def test_a_download_that_breaks_off_goes_on_and_is_whole(server, tmp_path):
    content = os.urandom(1_000_000) * 22  # written in chunks of 10 MB
    server.files["org/big"], server.cut_after = {"model.safetensors": content, "model.bin": b"repeats it"}, 12_000_000
    code = "from lionjax.core import hub; print(hub.local_path('hf://org/big'))"
    done = lionjax(server, tmp_path, code=code)
    folder = Path(done.stdout.strip())
    assert (folder / "model.safetensors").read_bytes() == content, done.stderr
    assert not (folder / "model.bin").exists()
    assert any(not text.startswith("bytes=0-") for text in server.ranges)


@pytest.mark.slow
def test_push_uploads_the_folder_with_card_license_and_tags(server, tmp_path):
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "model.safetensors").write_bytes(b"weights")
    (exported / "README.md").write_text("---\ntags: [lionjax, llava]\n---\n# Mine\n")
    words = ("push", "exported", "hf://me/mine")
    assert "HF_TOKEN" in lionjax(server, tmp_path, *words, "--license", "mit").stderr
    assert "names no license; give --license" in lionjax(server, tmp_path, *words, HF_TOKEN=TOKEN).stderr
    done = lionjax(server, tmp_path, *words, "--license", "mit", "--tags", "lora", HF_TOKEN=TOKEN)
    assert done.returncode == 0 and f"{server.url}/me/mine/commit/" in done.stdout, done.stderr
    assert server.files["me/mine"]["model.safetensors"] == b"weights"
    card = server.files["me/mine"]["README.md"].decode()
    assert all(text in card for text in ("license: mit", "# Mine", "- lionjax", "- llava", "- lora"))
