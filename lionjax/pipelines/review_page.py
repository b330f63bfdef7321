# SPDX-License-Identifier: Apache-2.0
"""A page on which people choose for each item, such as a rating or keep and drop, and save their choices as a file.

The page is one HTML file with its images inside; it loads nothing and sends nothing.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lionjax.core.errors import UserError
from lionjax.core.files import write_atomic
from lionjax.data.datasets.annotation_files import read_all_rows

IMAGE_SIDE = 384  # pixels of the longer side
SCRIPT = """
function save() {
  const rows = [...document.querySelectorAll("fieldset")].map(item => {
    const chosen = item.querySelector("input:checked");
    return chosen && JSON.stringify({[KEY]: ID(item.dataset.id), [FIELD]: chosen.value});
  }).filter(Boolean);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([rows.join("\\n") + "\\n"], {type: "application/jsonl"}));
  link.download = FILE;
  link.click();
}
"""
STYLE = "body{font:16px sans-serif;max-width:50rem;margin:2rem auto}fieldset{margin:1rem 0}img{max-width:100%}"


@dataclass(frozen=True)
class ReviewItem:
    """An item with its texts, {title: text}, and an image or None. `default`: the choice that is set at first."""

    id: str
    texts: Mapping[str, str]
    image: Image.Image | None = None
    default: str = ""


def write_page(
    path: Path, title: str, items: Sequence[ReviewItem], choices: Mapping[str, str], key: str, field: str, file: str
) -> None:
    """Write a page with a radio button for each of `choices` {value: what it means} beside each item.

    It saves rows {`key`: id, `field`: value} of the items with a choice as `file`.
    """
    legend = "".join(f"<li><b>{html.escape(value)}</b> {html.escape(says)}</li>" for value, says in choices.items())
    names = {"KEY": key, "FIELD": field, "FILE": file}
    constants = "".join(f'const {name} = "{value}";' for name, value in names.items())
    constants += "const ID = text => /^\\d{1,15}$/.test(text) && String(Number(text)) === text ? Number(text) : text;"
    body = "".join(_item(number, item, choices) for number, item in enumerate(items))
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><ul>{legend}</ul>{body}"
        f'<button onclick="save()">Save {html.escape(file)}</button><script>{constants}{SCRIPT}</script></html>\n'
    )
    write_atomic(path, page)


def _item(number: int, item: ReviewItem, choices: Mapping[str, str]) -> str:
    texts = "".join(f"<p><b>{html.escape(title)}</b> {html.escape(text)}</p>" for title, text in item.texts.items())
    buttons = "".join(
        f'<label><input type="radio" name="i{number}" value="{html.escape(value)}"'
        f"{' checked' if value == item.default else ''}> {html.escape(value)}</label> "
        for value in choices
    )
    image = "" if item.image is None else f'<img alt="" src="{_data_url(item.image)}">'
    name = html.escape(item.id)
    return f'<fieldset data-id="{name}"><legend>{name}</legend>{image}{texts}{buttons}</fieldset>'


def _data_url(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def read_choices(path: Path, key: str, field: str, choices: Sequence[str]) -> dict[str, str]:
    """{id: choice} of a saved file. Raises UserError for a missing file, another choice, or an id that stands twice."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; save it from the page")
    found: dict[str, str] = {}
    for row in read_all_rows(path):
        name, choice = (
            str(row.get(key)) if isinstance(row, dict) else "",
            row.get(field) if isinstance(row, dict) else 0,
        )
        if choice not in choices:
            raise UserError(f"{path} has the choice {choice!r} for {name!r}; it can be one of {', '.join(choices)}")
        if name in found:
            raise UserError(f"{path} has {name!r} twice; keep one row")
        found[name] = choice
    return found
