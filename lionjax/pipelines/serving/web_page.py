# SPDX-License-Identifier: Apache-2.0
"""The web page of a served model: its files, its settings, and the example images of a run.

The page asks the server's own API. Only what is listed here is served: three files, the settings and the images of the
examples, by their numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from lionjax.core.errors import UserError
from lionjax.core.files import read_jsonl
from lionjax.data.images import safe_path
from lionjax.inference.model import Model

FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
EXAMPLES_PER_BENCHMARK = 3  # example questions from each benchmark of a run
MAX_EXAMPLES = 8  # so that they fit one screen
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


@dataclasses.dataclass(frozen=True)
class Example:
    """An image of a run and a question about it."""

    image: Path
    question: str


def run_examples(folder: Path) -> list[Example]:
    """Examples from each benchmark of a run folder, of each in turn; empty for other folders.

    Images outside the folder of the benchmarks' files are left out.
    """
    found: list[list[Example]] = []
    for file in sorted((folder / "evaluation").glob("*.jsonl")):
        rows = [row for row in read_jsonl(file) if row.get("image") and not row.get("question_boxes")]
        images = [(_image_file(file.parent, row["image"]), row["question"]) for row in rows]
        kept = [Example(image, text) for image, text in images if image is not None]
        found.append(kept[:EXAMPLES_PER_BENCHMARK])
    in_turn = [one for k in range(EXAMPLES_PER_BENCHMARK) for kept in found for one in kept[k : k + 1]]
    return in_turn[:MAX_EXAMPLES]


def _image_file(folder: Path, name: str) -> Path | None:
    """The path of an image inside a folder, None for anything else."""
    try:
        path = safe_path(folder, name)
    except UserError:
        return None
    return path if path.is_file() and path.suffix.lower() in PICTURE_SUFFIXES else None


class Page:
    """The page of a model. `name`: shown on it; `max_new_tokens`: of an answer, at most."""

    def __init__(
        self,
        model: Model,
        name: str,
        folder: Path,
        max_new_tokens: int,
        has_tagger: bool = False,
        has_key: bool = False,
    ):
        self.examples: Sequence[Example] = run_examples(folder)
        processor, own = model.processor.config, model.generation_config("image_level")
        self.settings: dict[str, Any] = {
            "name": name,
            "max_tokens": max_new_tokens,
            "temperature": own.temperature if own.do_sample else 0.0,
            "top_p": own.top_p if own.do_sample else 1.0,
            "remembers": bool(processor.followup_template),
            "reads_images": model.vlm.info.reads_images,
            "reads_boxes": processor.box_format != "masks",
            "uses_tags": processor.use_tags,
            "has_tagger": has_tagger,
            "has_key": has_key,
            "max_pixels": processor.max_pixels,
            "examples": [
                {"image": f"/examples/{number}", "question": one.question} for number, one in enumerate(self.examples)
            ],
        }

    def routes(self) -> list[Route]:
        """What the server serves of it."""
        files = [Route(path, self._file(*what)) for path, what in FILES.items()]
        return [*files, Route("/page.json", self._settings), Route("/examples/{number:int}", self._example)]

    def _file(self, name: str, kind: str):
        path = Path(__file__).parent / "page" / name

        async def respond(request: Request) -> Response:
            return FileResponse(path, media_type=kind, headers=HEADERS)

        return respond

    async def _settings(self, request: Request) -> Response:
        return JSONResponse(self.settings, headers=HEADERS)

    async def _example(self, request: Request) -> Response:
        number = request.path_params["number"]
        if number >= len(self.examples):
            return JSONResponse({"error": {"message": "there is no such example"}}, 404)
        return FileResponse(self.examples[number].image, headers=HEADERS)
