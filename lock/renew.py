# SPDX-License-Identifier: Apache-2.0
"""Write the pins of the running Python: `python3.11 lock/renew.py`, `python3.12 lock/renew.py`.

Asks pip which versions it would take for every extra that the tests and the demo use, and writes
them to py311.txt or py312.txt (3.12 and newer). Nothing is installed. A pin file is a constraints
file: it says which version, not what to install. `python3.11 lock/renew.py prepare` writes
prepare.txt, for the extra of that name, whose Apache Beam does not go with the rest.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "data,torch,tensorboard,wandb,mlflow,serve,demo,llm,mcp,xlsx,users,docs,dev"
# Not simply the newest: what was tested here together with the rest.
HELD = {
    "py311": ["torch==2.13.0"],
    "py312": ["torch==2.13.0", "jax==0.11.2"],
    "prepare": ["apache-beam==2.77.0", "jax==0.10.2"],
}
# Builds of torch for accelerators bring these and pin them exactly; builds for the CPU do without.
BROUGHT_BY_TORCH = re.compile(r"nvidia-|cuda-|triton$")


def main():
    name = "py311" if sys.version_info < (3, 12) else "py312"
    wanted = [f"{ROOT}[{EXTRAS}]"]
    if sys.argv[1:] == ["prepare"]:  # and what `make test-prepare` runs its test with
        name, wanted = "prepare", [f"{ROOT}[prepare]", "pytest", "pytest-timeout"]
    with tempfile.TemporaryDirectory() as folder:
        report, held = Path(folder, "report.json"), Path(folder, "held.txt")
        held.write_text("\n".join(HELD[name]) + "\n")
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
            + ["--report", str(report), "-c", str(held), *wanted],
            check=True,
        )
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    pins = {re.sub(r"[-_.]+", "-", m["name"]).lower(): m["version"].split("+")[0] for m in found}
    lines = [
        f"{package}=={version}"
        for package, version in sorted(pins.items())
        if package != "lionjax" and not BROUGHT_BY_TORCH.match(package)
    ]
    version = "3.12 and newer" if name == "py312" else "3.11"
    what = " for the extra prepare" if name == "prepare" else ""
    header = f"# Versions tested together on Python {version}{what}; written by lock/renew.py.\n"
    (ROOT / "lock" / f"{name}.txt").write_text(header + "\n".join(lines) + "\n")
    print(f"lock/{name}.txt: {len(lines)} pins")


if __name__ == "__main__":
    main()
