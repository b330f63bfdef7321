# SPDX-License-Identifier: Apache-2.0
"""The wheel and the sdist: built, looked into, and used in an environment that has no checkout."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from paths import EXPERIMENTS, ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """The folder of both files."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder), "-t", "wheel", "-t", "sdist"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory) -> Path:
    """An environment with the wheel, which borrows all other packages from the environment of the tests."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run(installed: Path, code: str, folder: Path) -> subprocess.CompletedProcess:
    """A Python program in the environment, away from the checkout."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    command = [installed / "bin" / "python", "-c", "import sys\n" + code]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_the_wheel_holds_configs_weights_types_and_no_tests(dist):
    names = set(zipfile.ZipFile(next(dist.glob("*.whl"))).namelist())
    assert {f"lionjax/configs/{name}.py" for name in EXPERIMENTS} <= names
    assert {"lionjax/py.typed", "lionjax/data/assets/tiny_t5.safetensors"} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"lionjax"}
    assert not [name for name in names if name.endswith(".pyc") or "/tests/" in name]


def test_the_sdist_holds_what_builds_and_tests_it(dist):
    names = tarfile.open(next(dist.glob("*.tar.gz"))).getnames()
    inside = {name.partition("/")[2] for name in names}
    wanted = "pyproject.toml README.md LICENSE CHANGELOG.md CITATION.cff configs/tiny_lion.py lock/py311.txt"
    assert set(wanted.split()) | {"tests/conftest.py", "docs/index.md"} <= inside
    assert not [name for name in inside if name.startswith((".venv", "runs", "site/"))]


SCRIPT = """
import lionjax

answers = lionjax.load("runs/demo").answer(["a.png"], ["Where is the ring?"])
reveal_type(answers)
reveal_type(answers[0].boxes)
lionjax.load(3)
"""


# Of what the packages that lionjax imports say of their types, only numpy's matter here; reading jax takes a minute.
MYPY = """[mypy-jax.*,flax.*,optax.*,orbax.*,chex.*,transformers.*,torch.*,grain.*]
follow_imports = skip
"""


def test_mypy_knows_the_types_of_a_users_script(installed, tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text(MYPY)
    options = ["--python-executable", str(installed / "bin" / "python"), "--cache-dir", str(tmp_path / "cache")]
    command = [sys.executable, "-m", "mypy", *options, "script.py"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert 'Revealed type is "list[lionjax.inference.engine.Answer]"' in said, said
    assert 'Revealed type is "numpy.ndarray' in said
    assert 'Argument 1 to "load" has incompatible type "int"; expected "str | Path"' in said


def test_an_installed_wheel_trains_a_config_by_name_without_a_checkout(installed, tmp_path):
    words = ["train", "tiny_text_lm", "--workdir", "run", "--run.evaluate_limit", "0"]
    words += ["--stages.0.steps", "2", "--stages.0.warmup_steps", "1"]
    done = run(installed, f"from lionjax.cli import main\nsys.exit(main({words}))", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.json").is_file()


def test_an_installed_wheel_names_the_extra_that_is_missing(installed, tmp_path):
    code = "sys.modules['grain'] = None\nfrom lionjax.cli import main\n"
    words = ["train", "tiny_lion", "--workdir", "run"]
    done = run(installed, f"{code}sys.exit(main({words}))", tmp_path)
    assert done.returncode == 2 and "pip install 'lionjax[data]'" in done.stderr.splitlines()[-1], done.stderr
