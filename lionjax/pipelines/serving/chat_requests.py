# SPDX-License-Identifier: Apache-2.0
"""Requests of OpenAI's chat/completions as questions of a `LiveModel`: messages, images, boxes and settings.

What would change the answer and is not supported is refused with a reason; other unknown fields are passed over, as
OpenAI's own server does.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from lionjax.core.types import UserError
from lionjax.data import images
from lionjax.data.boxes import Box
from lionjax.inference.engine import insert_boxes
from lionjax.inference.live_question import LiveQuestion
from lionjax.inference.model import build_inputs

MAX_MESSAGES = 200
MAX_STOPS = 4
POINT_SIDE = 0.04  # of the box around a point, as a fraction of the image
DATA_URL = re.compile(r"data:[\w/+.;=-]*?;base64,", re.ASCII)
# Fields that are refused unless they have one of these values.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "logprobs": (None, False),
    "logit_bias": (None, {}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "top_k": (None, 0, -1),
    "min_p": (None, 0),
    "repetition_penalty": (None,),
    "response_format": (None, {"type": "text"}),
    "audio": (None,),
    "modalities": (None, ["text"]),
}


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A request as it was sent, before its image is read. `image_url`: of its one image, "" for none.

    `turns`: earlier (question, answer) pairs. `boxes`: those of the last question. `tags`: of the image.
    """

    model: str
    question: str
    turns: tuple[tuple[str, str], ...] = ()
    image_url: str = ""
    boxes: tuple[Box, ...] = ()
    tags: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields of LiveQuestion

    def to_question(self, image: Image.Image | None, tags: Sequence[str] = ()) -> LiveQuestion:
        """The question about an image. Raises UserError for boxes that do not fit it."""
        words = self.tags or tuple(tags)
        (sample,) = build_inputs(
            [image],
            [self.question],
            [self.boxes],
            [words] if words else None,
            None,
            [self.turns] if self.turns else None,
        )
        return LiveQuestion(sample, **self.settings)


def parse_request(body: Any) -> ChatRequest:
    """A request's JSON. Raises UserError that names the field and what mends it."""
    if not isinstance(body, dict):
        raise UserError("the request is no JSON object; send one with model and messages")
    for name, allowed in UNSUPPORTED.items():
        if body.get(name) not in allowed:
            raise UserError(f"{name} is not supported here; leave it out")
    stream = _typed(body, "stream", bool, False)
    options = _typed(body, "stream_options", dict, {})
    turns, question, urls, boxes = _parse_messages(body.get("messages"))
    if len(urls) > 1:
        raise UserError(f"the messages show {len(urls)} different images, but this model reads one; begin a new chat")
    tags = _typed(body, "tags", list, [])
    if not all(isinstance(tag, str) for tag in tags):
        raise UserError("tags is no list of texts; give one, as in ['star', 'ring']")
    return ChatRequest(
        model=_typed(body, "model", str, ""),
        question=question,
        turns=turns,
        image_url=urls[0] if urls else "",
        boxes=boxes,
        tags=tuple(tags),
        stream=stream,
        include_usage=bool(options.get("include_usage")),
        settings=_parse_settings(body),
    )


def _typed(body: Mapping[str, Any], name: str, kind: type | tuple[type, ...], default: Any) -> Any:
    """A field of a type; `default` where it is missing or null."""
    value = body.get(name)
    if value is None:
        return default
    is_wrong_bool = isinstance(value, bool) and kind is not bool
    if not isinstance(value, kind) or is_wrong_bool:
        names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise UserError(f"{name} is {str(value)[:40]!r}; give a value of type {names}")
    return value


def _parse_settings(body: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of generation, as fields of `LiveQuestion`."""
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else _typed(body, "stop", list, [])
    if len(stops) > MAX_STOPS or not all(isinstance(text, str) and text for text in stops):
        raise UserError(f"stop is {str(stop)[:40]!r}; give one text or a list of at most {MAX_STOPS}, none empty")
    limits = [_typed(body, name, int, None) for name in ("max_completion_tokens", "max_tokens")]
    return {
        "temperature": _typed(body, "temperature", (int, float), None),
        "top_p": _typed(body, "top_p", (int, float), None),
        "seed": _typed(body, "seed", int, None),
        "max_new_tokens": next((limit for limit in limits if limit is not None), None),
        "stops": tuple(stops),
    }


def _parse_messages(messages: Any) -> tuple[tuple[tuple[str, str], ...], str, list[str], tuple[Box, ...]]:
    """(earlier turns, the last question, different image URLs, boxes of the last question)."""
    if not isinstance(messages, list) or not messages:
        raise UserError("messages is missing or empty; give a list whose last message is the user's question")
    if len(messages) > MAX_MESSAGES:
        raise UserError(f"there are {len(messages)} messages, but at most {MAX_MESSAGES} are read; begin a new chat")
    texts: list[str] = []
    urls: dict[str, None] = {}
    boxes: tuple[Box, ...] = ()
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UserError(f"messages[{number}] is no object; give one with role and content")
        role = message.get("role")
        if role in ("system", "developer"):
            raise UserError(
                f"messages[{number}] has the role {role!r}, which this model's prompt has no place for; put its text "
                "into the first question"
            )
        expected = "assistant" if len(texts) % 2 else "user"
        if role != expected:
            raise UserError(f"messages[{number}] has the role {role!r} where {expected!r} is next; let them take turns")
        text, found = _parse_content(message.get("content"), f"messages[{number}].content")
        urls |= dict.fromkeys(found)
        boxes = _parse_boxes(message.get("regions"), f"messages[{number}].regions") if role == "user" else ()
        if role == "user" and boxes and number + 1 < len(messages):
            text, boxes = insert_boxes(text, boxes), ()  # in digits, as it was asked
        texts.append(text)
    if len(texts) % 2 == 0:
        raise UserError("the last message is the assistant's; end with the user's question")
    if not texts[-1].strip():
        raise UserError("the last message has no text; ask a question")
    return tuple(zip(texts[:-1:2], texts[1::2])), texts[-1], list(urls), boxes


def _parse_content(content: Any, where: str) -> tuple[str, list[str]]:
    """(text, image URLs) of a message: a text, or parts of type text and image_url."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise UserError(f"{where} is no text and no list of parts; give one of them")
    texts, urls = [], []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            if not isinstance(url, str):
                raise UserError(f"{where}[{number}] has no image_url.url; give a data URL")
            urls.append(url)
        else:
            raise UserError(f"{where}[{number}] is of type {kind!r}; parts are of type text or image_url")
    return "\n".join(texts), urls


def _parse_boxes(regions: Any, where: str) -> tuple[Box, ...]:
    """The boxes of a message's regions; a point is a small box around it. Answers' regions may be sent as they came."""
    if regions is None:
        return ()
    if not isinstance(regions, list):
        raise UserError(f"{where} is no list; give regions such as {{'box': [0.1, 0.2, 0.5, 0.6]}}")
    found = []
    for number, region in enumerate(regions):
        name = f"{where}[{number}]"
        if isinstance(region, dict) and "box" in region:
            found.append(images.normalize_box(region["box"], name=f"{name}.box"))
        elif isinstance(region, dict) and "point" in region:
            found.append(point_box(region["point"], f"{name}.point"))
        else:
            raise UserError(f"{name} has no box and no point; give one of them, in fractions of the image")
    return tuple(found)


def point_box(point: Any, name: str = "the point") -> Box:
    """A box of `POINT_SIDE` around a point (x, y) in 0..1, inside the image. Raises UserError for others."""
    is_pair = isinstance(point, list | tuple) and len(point) == 2
    if not is_pair or not all(isinstance(edge, int | float) and 0 <= edge <= 1 for edge in point):
        raise UserError(f"{name} is {str(point)[:40]!r}; give two numbers x, y in 0..1")
    x0, y0 = (min(max(edge - POINT_SIDE / 2, 0.0), 1.0 - POINT_SIDE) for edge in point)
    return x0, y0, x0 + POINT_SIDE, y0 + POINT_SIDE


def read_data_url(url: str) -> bytes:
    """The bytes of a base64 data URL. Raises UserError for other URLs, with the reason."""
    if url.split(":", 1)[0].lower() in ("http", "https", "ftp", "file"):
        raise UserError(
            f"the image is the address {url[:40]!r}, which is not fetched, so that nobody can make this server read "
            "its own network or files; send the image itself as a data URL, data:image/png;base64,..."
        )
    if (match := DATA_URL.match(url)) is None:
        raise UserError(f"the image {url[:30]!r} is no base64 data URL; send data:image/png;base64,...")
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"the image is no valid base64 ({error}); encode the file's bytes again") from error


def open_data_url(url: str, max_pixels: int) -> Image.Image:
    """The RGB image of a data URL. Raises UserError as `read_data_url` and `images.open_image` do."""
    content = read_data_url(url)
    if not content:
        raise UserError("the image is empty; send the bytes of a JPEG, PNG or WebP file")
    return images.open_image(content, "the image", max_pixels)
