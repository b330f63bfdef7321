# SPDX-License-Identifier: Apache-2.0
"""VLMEvalKit with a lionjax model: `python -m lionjax.pipelines.serving.vlmevalkit DIR --data NAME ...`.

VLMEvalKit has no plugins: its models are those of one table. This program adds `lionjax` to that table and hands over
to VLMEvalKit's own run.py, which takes all further arguments.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lionjax.core.types import UserError
from lionjax.pipelines.serving.harness import SEVERAL_IMAGES, HarnessModel, Request

NOT_INSTALLED = (
    "VLMEvalKit is not installed; install it from a clone with `pip install -e .`, or as `pip install ms-vlmeval`"
)


def make_model_class(base: type) -> type:
    """VLMEvalKit's model class of lionjax, on its `BaseModel`."""

    class LionJax(base):
        """A lionjax model as VLMEvalKit asks it: parts of a message, each a text or the path of an image."""

        INTERLEAVE = False

        def __init__(self, pretrained: str, max_new_tokens: int | None = None, **options):
            super().__init__()
            self.harness = HarnessModel(pretrained, **options)
            self.settings = {"max_new_tokens": max_new_tokens}

        def generate_inner(self, message: Sequence[dict], dataset: str | None = None) -> str:
            """The answer to one message; its texts are joined by line ends."""
            return self.harness.answer([message_request(message, self.settings)])[0]

    return LionJax


def message_request(message: Sequence[dict], settings: dict[str, Any]) -> Request:
    """A message of VLMEvalKit as a request. Raises UserError for a part that is neither text nor image."""
    texts = [part["value"] for part in message if part["type"] == "text"]
    if other := sorted({part["type"] for part in message} - {"text", "image"}):
        raise UserError(f"a message has {', '.join(other)}; lionjax reads text and images")
    return Request("\n".join(texts), [part["value"] for part in message if part["type"] == "image"], settings)


def find_run_script(package: Path, given: str | None) -> Path:
    """VLMEvalKit's run.py: inside the package (ms-vlmeval), or beside it (a clone). Raises UserError without one."""
    places = [Path(given)] if given else [package / "run.py", package.parent / "run.py"]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise UserError(f"there is no {' and no '.join(map(str, places))}; give VLMEvalKit's run.py with --run-script")
    return found


def register(folder: str, options: dict[str, Any]) -> Path:
    """Add `lionjax` to VLMEvalKit's models; returns its package's folder. Raises UserError if it is not installed."""
    try:
        vlm, table = importlib.import_module("vlmeval.vlm"), importlib.import_module("vlmeval.config").supported_VLM
        base = importlib.import_module("vlmeval.vlm.base").BaseModel
    except ImportError as error:
        raise UserError(f"{NOT_INSTALLED} ({error})") from error
    vlm.LionJax = make_model_class(base)
    table["lionjax"] = functools.partial(vlm.LionJax, pretrained=folder, **options)
    return Path(vlm.__file__).parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    """Run VLMEvalKit with the model of a folder; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lionjax.pipelines.serving.vlmevalkit", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("dir", metavar="DIR", help="a run folder or a folder of weights")
    parser.add_argument("--run-script", metavar="FILE", help="VLMEvalKit's run.py, where it is not beside its package")
    parser.add_argument("--tagger", metavar="FOLDER", help="a folder with RAM, to tag images")
    parser.add_argument("--refiner", metavar="FOLDER", help="a refiner's folder, for a model that reads regions")
    parser.add_argument("--plain", action="store_true", help="answers of one word lose their final dot")
    parser.add_argument("--several-images", choices=SEVERAL_IMAGES, default="join", help="default: join")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, help="of an answer (default: the model's)")
    args, rest = parser.parse_known_args(argv)
    options = {key: value for key, value in vars(args).items() if key not in ("dir", "run_script")}
    try:
        if not Path(args.dir).is_dir():
            raise UserError(f"there is no folder {args.dir}; give a run folder or a folder of weights")
        script = find_run_script(register(args.dir, options), args.run_script)
    except UserError as error:
        print(f"lionjax: {error}", file=sys.stderr)
        return 2
    sys.argv = [str(script), "--model", "lionjax", *rest]
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
