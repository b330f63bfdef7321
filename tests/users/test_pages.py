# SPDX-License-Identifier: Apache-2.0
"""docs/own_data.md and docs/hub.md, word for word: each command line and Python block, with tiny models and data.

Run by `make test-users`.
"""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import tiny_released
from bucket_server import running_bucket
from hub_server import TOKEN, running_hub
from leafwise import runs_have_one_device  # noqa: F401
from paths import ROOT

if not os.environ.get("LIONJAX_USERS"):
    pytest.skip("run by `make test-users`", allow_module_level=True)
from lionjax.cli import main
from lionjax.core.experiment import Stage
from lionjax.data.config import DataConfig
from lionjax.data.datasets.jsonl import JsonLines
from lionjax.data.processor_config import ProcessorConfig

pytestmark = pytest.mark.timeout(900)  # a page has up to thirty commands
LEFT_OUT = ("--tagger ram/",)  # RAM's weights are not made small here
SHORT = "--batch-size 4 --data.processor.max_prompt_tokens 96 --run.evaluate_limit 2"  # beside what a page says


def code_blocks(page: str, language: str = "") -> list[str]:
    """The code blocks of a page in a language, by default those without one."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def command_lines(page: str) -> list[list[str]]:
    """The words of each `lionjax` line in the code blocks of a page."""
    lines = [line for block in code_blocks(page) for line in block.splitlines() if line.startswith("lionjax ")]
    return [shlex.split(line, comments=True)[1:] for line in lines if not any(text in line for text in LEFT_OUT)]


def follow(page: str, capfd, **names: str) -> dict[str, str]:
    """Run the lines of a page in the working directory; {line: what it prints}. `names` replace those of the page."""
    said = {}
    for words in command_lines(page):
        line = " ".join(words)
        for old, new in names.items():
            words = [word.replace(old, new) for word in words]
        capfd.readouterr()
        words += SHORT.split() if words[0] == "train" else ()
        if any(word.startswith("hf://") for word in words):  # the hub's package reads its variables once a process
            code = subprocess.run([sys.executable, "-m", "lionjax", *words], timeout=300).returncode
        else:
            code = main(words)
        said[line] = "".join(capfd.readouterr())
        assert code == 0, (line, said[line])
    return said


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def write_photos(folder: Path) -> None:
    """1.jpg to 12.jpg with a caption each, and talks.json about them beside the folder."""
    folder.mkdir()
    talks = []
    for number, picture in enumerate(tiny_released.pictures(12), 1):
        picture.save(folder / f"{number}.jpg")
        (folder / f"{number}.txt").write_text("two cats")
        turns = [{"from": "human", "value": "<image>\nWhat is in the picture?"}, {"from": "gpt", "value": "two cats"}]
        talks.append({"image": f"{number}.jpg", "conversations": turns})
    Path("talks.json").write_text(json.dumps(talks))


def write_other_sources() -> None:
    """The data sets that docs/own_data.md names: COCO, VQA, Parquet and tars."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (picture,) = tiny_released.pictures(1)
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    for folder in ("data/coco/images", "val2014", "coco-captions", "shards"):
        Path(folder).mkdir(parents=True)
    picture.save("data/coco/images/000000000001.jpg")
    images = [{"id": 1, "file_name": "000000000001.jpg", "width": picture.width, "height": picture.height}]
    captions = {"images": images, "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}]}
    Path("data/coco/captions.json").write_text(json.dumps(captions))
    picture.save("val2014/COCO_val2014_000000000002.jpg")
    questions = {"questions": [{"question_id": 5, "image_id": 2, "question": "What?"}], "data_subtype": "val2014"}
    answers = [{"answer": "cat", "answer_id": number} for number in range(10)]
    row = {"question_id": 5, "image_id": 2, "answers": answers, "question_type": "what", "answer_type": "other"}
    Path("questions.json").write_text(json.dumps(questions))
    Path("annotations.json").write_text(json.dumps({"annotations": [row], "data_subtype": "val2014"}))
    table = pa.table({"image": [{"bytes": encoded.getvalue(), "path": "a.png"}], "caption": [["a cat"]]})
    pq.write_table(table, "coco-captions/validation-00000-of-00001.parquet")
    for number in range(10):
        with tarfile.open(f"shards/shard-{number:06}.tar", "w") as tar:
            for name, content in ((f"{number}.png", encoded.getvalue()), (f"{number}.txt", b"a cat")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_the_page_of_own_data_is_followed_word_for_word(tmp_path, monkeypatch, capfd):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    tiny_released.save("llava", Path("llava-1.5-7b-hf"))
    write_photos(Path("photos"))
    write_other_sources()
    said = follow("own_data.md", capfd)
    assert "What is in the picture?" in said["data inspect talks.json --images photos"]
    assert Path("runs/photos/base/1_final").is_dir() and Path("data/coco-built").is_dir()
    assert Path("scenes.png").read_bytes()[:4] == b"\x89PNG"
    names = {"DataConfig": DataConfig, "JsonLines": JsonLines, "ProcessorConfig": ProcessorConfig, "Stage": Stage}
    (block,) = code_blocks("own_data.md", "python")
    exec(block, names)
    assert names["stages"][0].mixture[0][0] == "mine/vqa" and names["data"].sources[0].heldout_fraction == 0.1


def test_the_page_of_the_hub_is_followed_word_for_word(tmp_path, monkeypatch, capfd):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    released, converted = Path("hub/llava"), Path("hub/converted")
    tiny_released.save("llava", released)
    assert main(["convert", str(released), str(converted), "--to", "jax"]) == 0
    write_photos(Path("photos"))
    for path in Path("photos").iterdir():  # the page gives no --images
        path.rename(path.name)
    Path("1.jpg").rename("a.jpg")
    row = {"image": "a.jpg", "question": "What is it?", "answer": "two cats"}
    Path("talks.json").write_text("\n".join(json.dumps(row | {"image": f"{n}.jpg"}) for n in range(2, 13)))
    with running_hub() as hub, running_bucket() as (url, bucket):
        files = {folder: contents(folder) for folder in (released, converted)}
        picture = Path("a.jpg").read_bytes()
        hub.files |= {"llava-hf/llava-1.5-7b-hf": files[released], "org/name": files[converted], "org/mine": {}}
        hub.files["datasets/org/name"] = {"rows.jsonl": json.dumps(row).encode(), "a.jpg": picture}
        bucket.objects |= {f"weights/llava/{name}": (value, 1) for name, value in files[converted].items()}
        told = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "LIONJAX_BUCKET_CACHE": str(tmp_path / "buckets")}
        told |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
        told |= {"TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none"}
        for name, value in told.items():
            monkeypatch.setenv(name, value)
        Path("runs").mkdir()
        Path("runs/other").symlink_to("mine")
        said = follow("hub.md", capfd, **{"ORG/NAME": "org/name", "ORG/MINE": "org/mine", "BUCKET": "bucket"})
        assert "model.safetensors" in hub.files["org/mine"] and b"apache-2.0" in hub.files["org/mine"]["README.md"]
        names = {name.partition("/")[2] for name in bucket.objects}
    assert {"mine/report.html", "mine/metrics.jsonl", "mine/evaluation/vqa.jsonl", "other/config.json"} <= names
    assert "gs://bucket/runs/mine holds the trained model" in "".join(said.values())
