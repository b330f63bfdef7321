# SPDX-License-Identifier: Apache-2.0
"""Which tool a request of MM-REACT (arXiv 2303.11381) means, and the text of what a tool observed, as in its code.

Paths are found in one pass. The released code never ends on a command with two local paths, as it searches the rest of
the command by places in the whole; and two URLs on a line are one path to it, which `compatible` keeps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

COMMAND = "Assistant,"
IMAGE_TOOL, OCR_TOOL, SEARCH_TOOL = "Image Understanding", "OCR Understanding", "Bing Search"
INVOICE_TOOL, RECEIPT_TOOL, LAYOUT_TOOL = "Invoice Understanding", "Receipt Understanding", "Layout Understanding"
EDITING_TOOL = "Photo Editing"
EDITING = ("photo edit", "image edit")
# The first of these words in what precedes the first path decides; "ocr" beside "table" is a layout.
KEYWORDS = (
    ("invoice", INVOICE_TOOL),
    ("receipt", RECEIPT_TOOL),
    ("business card", "Business Card Understanding"),
    ("ocr", OCR_TOOL),
    ("celebrit", "Celebrity Understanding"),
    ("facial rec", "Celebrity Understanding"),
    (" faces ", "Celebrity Understanding"),
    ("landmark", SEARCH_TOOL),
    ("brand", SEARCH_TOOL),
    ("bing search", SEARCH_TOOL),
    ("objects", IMAGE_TOOL),
)
FILE_HINTS = (("invoice", INVOICE_TOOL), ("receipt", RECEIPT_TOOL), ("table", LAYOUT_TOOL))  # of OCR, in a path
SEARCH_PREFIXES = ("bing search for", "bing search", "search for", "search")
_FILE_URL = r"https?://{}\.(?:jpg|jpeg|png|bmp|pdf)"
_URL, _LOCAL = r"https?://\S+", r"/[\w/-]{1,200}\.(?:jpg|jpeg|png|bmp|pdf)"
PATHS = {
    greedy: re.compile("|".join(f"({part})" for part in (_FILE_URL.format(any_), _URL, _LOCAL)), re.IGNORECASE)
    for greedy, any_ in ((True, ".{1,500}"), (False, r"\S{1,500}?"))
}
MIN_COVERED = 0.3  # of a dense caption's box by an object, which it then replaces


def find_paths(command: str, compatible: bool = False) -> list[tuple[int, str]]:
    """(place, path) of each URL and each absolute path of an image in a command, in order."""
    found = []
    for match in PATHS[compatible].finditer(command):
        path = match[0]
        found.append((match.start(), path[:-1] if match[2] and path[-1] in '.?"' else path))
    return found


def parse_requests(text: str, compatible: bool = False) -> list[tuple[str | None, str]] | None:
    """[(tool, input)] of a reply's commands, the last command first; None if it has none.

    A command begins at `Assistant,` and ends where the next begins. The tool is None where nothing says which.
    """
    commands, rest = [], text
    while (place := rest.rfind(COMMAND)) >= 0:
        commands.append((rest[place + len(COMMAND) :].strip(), rest))
        rest = rest[:place].strip()
    if not commands:
        return None
    return [request for command, whole in commands for request in _parse_command(command, whole, compatible)]


def _parse_command(command: str, text: str, compatible: bool) -> list[tuple[str | None, str]]:
    """The requests of one command in the order of its paths; `text` is the reply up to its end."""
    if any(word in text for word in EDITING):
        return [(EDITING_TOOL, command)]
    paths = find_paths(command, compatible)
    if not paths:
        return [(SEARCH_TOOL, _search_words(command)) if command.endswith("?") else (None, "")]
    words = command[: paths[0][0]].strip().lower()
    return [(_route(words, path.lower()), path) for _, path in paths]


def _search_words(command: str) -> str:
    """What follows the first of the search prefixes, or the whole command."""
    lower = command.lower()
    for prefix in SEARCH_PREFIXES:
        if (place := lower.find(prefix)) >= 0:
            return command[place + len(prefix) :].strip()
    return command


def _route(words: str, path: str) -> str | None:
    """The tool that the words before the first path, and then the path itself, mean."""
    tool = next((name for word, name in KEYWORDS if word in words), None)
    if tool == OCR_TOOL and "table" in words:
        tool = LAYOUT_TOOL
    asks_for_text = " is written" in words or " text" in words or words.endswith(" say?")
    if tool is None and (asks_for_text or words.startswith(("parse ", "analyze "))):
        tool = OCR_TOOL
    if tool == IMAGE_TOOL and path.endswith(".pdf"):
        tool = OCR_TOOL
    if tool == RECEIPT_TOOL and "invoice" in path:
        tool = INVOICE_TOOL
    if tool == OCR_TOOL:
        tool = next((name for hint, name in FILE_HINTS if hint in path), OCR_TOOL)
    if tool is None and (words.startswith("search ") or " the name of " in words):
        tool = SEARCH_TOOL
    return tool


def format_observation(results: Mapping[str, Any], is_text: bool = False) -> str:
    """What a tool saw, as the language model reads it.

    `results`: img_url, and any of description, objects and captions [(name, box in pixels x0 y0 x1 y1)], tags, words,
    and size {width, height}. Places have their origin at the bottom left, in hundredths of the image; the y is that of
    a box's top. `is_text`: the sentence for an image where nothing was found speaks of text.
    """
    captions = [(name, tuple(box)) for name, box in results.get("captions", ())]
    objects = [(name, tuple(box)) for name, box in results.get("objects", ())]
    description = results.get("description") or max(captions, key=lambda one: _area(one[1]), default=("",))[0]
    places = captions + [one for one in objects if not any(_covers(one[1], box) for _, box in captions)]
    width, height = _size(results.get("size"), [box for _, box in places])
    listed = [f"{name} {_place(box, width, height)}" for name, box in places]
    found = (
        (" objects and their descriptions", "object descriptions, and their locations in this image", listed),
        (" object tags", "object tags seen in this image", results.get("tags")),
        (" text", "OCR texts (words) seen in this image", results.get("words")),
    )
    sections = [section for section in found if section[2]]
    lines = [str(results["img_url"])]
    if description:
        lines.append(f"Image description is: {description}.")
    if not sections:
        if not description:
            lines.append("\nThis image is too blurry" + (" for OCR text extraction" if is_text else ""))
        return "\n".join(lines)
    lines.append("\nThis image contains" + ",".join(kind for kind, _, _ in sections))
    for _, title, entries in sections:
        lines += [f"\nList of {title}:", *map(str, entries)]
    return "\n".join(lines) + "\n"


def _area(box: Sequence[float]) -> float:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def _covers(box: Sequence[float], caption_box: Sequence[float]) -> bool:
    """Whether an object overlaps so much of a dense caption's box that the caption stands for it."""
    common = [max(box[k], caption_box[k]) for k in (0, 1)] + [min(box[k], caption_box[k]) for k in (2, 3)]
    return _area(common) >= MIN_COVERED * _area(caption_box) > 0


def _size(size: Mapping[str, float] | None, boxes: Sequence[Sequence[float]]) -> tuple[float, float]:
    """(width, height) of the image; without a size both are the largest edge of the boxes."""
    largest = max((edge for box in boxes for edge in box), default=1) or 1
    return (size["width"], size["height"]) if size else (largest, largest)


def _place(box: Sequence[float], width: float, height: float) -> str:
    x0, y0, x1, _ = box
    return f"{int(100 * (x0 + (x1 - x0) // 2) // width)} {int(100 * (height - y0) // height)}"
