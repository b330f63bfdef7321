# SPDX-License-Identifier: Apache-2.0
"""Conversations of several rounds about images: LLaVA's JSON, ShareGPT's, and `messages` of chat APIs.

LLaVA (arXiv 2304.08485): {"id", "image", "conversations": [{"from": "human" or "gpt", "value"}]}, with `<image>` in a
human value. `messages`: [{"role", "content"}], the content a text or a list of parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from lionjax.core.renamed import renamed_fields
from lionjax.core.types import UserError
from lionjax.data.datasets.annotated_images import AnnotatedImages, Annotation, ImageInfo
from lionjax.data.datasets.annotation_files import AnnotatedImagesBuilder, AnnotationFile, read_rows
from lionjax.data.rounds import IMAGE_MARK

USER_ROLES = ("human", "user")
MODEL_ROLES = ("gpt", "assistant", "model", "chatgpt", "bard", "bing")
SYSTEM_ROLES = ("system",)
ROUND_KEYS = ("conversations", "conversation", "messages")  # a row has one of them
IMAGE_KEYS = ("image", "images")
OTHER_KEYS = ("system", "id", "model", "type")
MAX_TRIES = 8  # images of one folder that are looked for in other folders
# Where LLaVA's releases have their images: the folders of the 665k mixture, and COCO for LLaVA-Instruct.
IMAGE_FOLDERS = (
    *("", "images", "coco/train2017", "train2017", "coco/train2014", "train2014", "coco/val2014", "val2014"),
    *("gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg", "vg/VG_100K", "vg/VG_100K_2"),
)


@renamed_fields()
@dataclass(frozen=True)
class Conversations(AnnotationFile):
    """A JSON list or JSON Lines of conversations, as the task `conversation`; gzipped or not.

    The rounds are `conversations` (`from`, `value`) or `messages` (`role`, `content`); the images are `image` or
    `images`, one path or a list, or parts of a content. `<image>` in a user's text is the place of an image; without
    it all images are in front of the first question. A system message is put in front of the first question, and a
    model's greeting before it is left out, as in LLaVA. A row without images is text only.

    `padded_boxes`: boxes in the texts, such as "[0.25, 0.1, 0.5, 0.9]", are fractions of the image padded to a square,
    as in LLaVA-1.5's mixture; False: of the image.

    An image is `image_dir` with the path of the row, or with the last parts of that path: "coco/train2017/1.jpg" is
    also found in an `image_dir` that is train2017, and "1.jpg" in the folders of LLaVA's mixture. A row that cannot be
    used, also a line that is not JSON, is a bad record (`DataConfig.on_bad_record`).
    """

    name: str = "conversations"
    padded_boxes: bool = True

    def open(self, split: str, max_pixels: int) -> AnnotatedImages:
        file, root = Path(self.file), Path(self.image_dir)
        builder, folders = AnnotatedImagesBuilder(root, split, self.heldout_fraction), ImageFolders(root)
        for location, row in read_rows(file):
            with builder.row(location, "conversation"):
                add_conversation(builder, folders.find, row, location, self)
        return builder.build(max_pixels)


class ConversationSource(Protocol):
    """A source whose file has conversations; see `Conversations.padded_boxes`."""

    @property
    def file(self) -> str: ...

    @property
    def padded_boxes(self) -> bool: ...


def add_conversation(
    builder: AnnotatedImagesBuilder,
    find_image: Callable[[str], str],
    row: object,
    location: str,
    source: ConversationSource,
) -> None:
    """Adds a row to a builder. `find_image`: from the name of an image in the row to its path under the root.

    Raises UserError for a row that is no conversation.
    """
    rounds, names = parse_row(row, location)
    builder.check_keys(row, (*ROUND_KEYS, *IMAGE_KEYS, *OTHER_KEYS), IMAGE_KEYS, location, Path(source.file))
    question, answer, turns, image_marks = _annotation(rounds, len(names), location)
    paths = [find_image(name) for name in names]
    if not (builder.includes(paths[0]) if paths else builder.includes_text(str(rounds))):
        return
    indices = [builder.add_image(path, ImageInfo(path, padded_boxes=source.padded_boxes)) for path in paths]
    if not indices:
        indices = [builder.add_image(("text", location), ImageInfo(""))]
    fields = {"kind": "image" if names else "text", "image_marks": image_marks, "turns": turns}
    fields["more_images"] = tuple(indices[1:])
    builder.add_annotation("conversation", Annotation(indices[0], (answer,), question, **fields))


def parse_row(row: object, location: str) -> tuple[list[tuple[str, str]], list[str]]:
    """([(question, answer)], image paths) of a row. Raises UserError with the location for any other row."""
    if isinstance(row, UserError):
        raise row
    keys = [key for key in ROUND_KEYS if isinstance(row, dict) and key in row]
    if len(keys) != 1:
        raise UserError(f"{location} has no list of rounds as one of {', '.join(map(repr, ROUND_KEYS))}; add it")
    messages = row[keys[0]]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{location} has no list of rounds as {keys[0]!r}; give at least a question and an answer")
    names, system, rounds, question = _image_names(row, location), row.get("system") or "", [], None
    for number, message in enumerate(messages, 1):
        role, text, part_names = _parse_message(message, f"{location} message {number}")
        names += part_names
        if role == "system":
            system = text
        elif role == "user":
            if question is not None:
                raise UserError(f"{location} message {number} is a second question without an answer; add the answer")
            question = f"{system}\n{text}" if system and not rounds else text
        elif question is not None:
            if IMAGE_MARK in text:
                raise UserError(
                    f"{location} message {number} has {IMAGE_MARK} in an answer; only questions have images"
                )
            rounds.append((question, text))
            question = None
        elif rounds:
            raise UserError(f"{location} message {number} is an answer without a question; add the question")
    if not rounds:
        raise UserError(f"{location} has no question with an answer in {keys[0]!r}; add one")
    return rounds, names


def _image_names(row: dict, location: str) -> list[str]:
    """The image paths of a row's own keys."""
    names: list[str] = []
    for key in IMAGE_KEYS:
        value = row.get(key)
        values = value if isinstance(value, list) else [] if value in (None, "") else [value]
        names += [_path(item.get("path") if isinstance(item, dict) else item, location) for item in values]
    return names


def _path(value: object, location: str) -> str:
    is_path = isinstance(value, str) and value.strip() and not value.startswith("data:")
    if not is_path or "://" in value.removeprefix("file://"):
        raise UserError(f"{location} has the image {str(value)[:60]!r}; give the path of a file in the image folder")
    return value.removeprefix("file://").removeprefix("./")


def _parse_message(message: object, location: str) -> tuple[str, str, list[str]]:
    """("user", "model" or "system", text, image paths) of one message."""
    if not isinstance(message, dict):
        raise UserError(f"{location} is {str(message)[:40]!r}; give an object with 'from' and 'value'")
    role = message.get("from", message.get("role"))
    roles = {"user": USER_ROLES, "model": MODEL_ROLES, "system": SYSTEM_ROLES}
    kind = next((kind for kind, names in roles.items() if str(role).lower() in names), None)
    if kind is None:
        known = ", ".join((*USER_ROLES, *MODEL_ROLES[:2], *SYSTEM_ROLES))
        raise UserError(f"{location} is from {role!r}; the roles that are read are {known}")
    content = message.get("value", message.get("content"))
    if isinstance(content, str):
        return kind, content.strip(), []
    if not isinstance(content, list):
        raise UserError(f"{location} has no text as 'value' or 'content'; add it")
    texts, names = [], []
    for part in content:
        text, part_names = _parse_part(part, location)
        texts.append(text)
        names += part_names
    return kind, "\n".join(texts).strip(), names


def _parse_part(part: object, location: str) -> tuple[str, list[str]]:
    """(text or image mark, image paths) of one part of a content."""
    if isinstance(part, str):
        return part, []
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"], []
    if kind in ("image", "image_url"):
        value = next((part[key] for key in ("image", "image_url", "path", "url") if part.get(key) is not None), None)
        value = value.get("url", value.get("path")) if isinstance(value, dict) else value
        return IMAGE_MARK, [] if value is None else [_path(value, location)]
    raise UserError(f"{location} has a part of type {kind!r}; the parts that are read are text and image")


def _annotation(
    rounds: Sequence[tuple[str, str]], num_images: int, location: str
) -> tuple[str, str, tuple[tuple[str, str], ...], bool]:
    """(last question, last answer, earlier rounds, whether the texts have image marks)."""
    counts = [question.count(IMAGE_MARK) for question, _ in rounds]
    if num_images and not any(counts):  # in front of the first question
        rounds = [(IMAGE_MARK * num_images + "\n" + rounds[0][0], rounds[0][1]), *rounds[1:]]
        counts[0] = num_images
    if num_images == 1 and sum(map(bool, counts)) == 1:  # as in LLaVA, where a repeated mark is one image
        place = counts.index(max(counts))
        text = rounds[place][0].replace(IMAGE_MARK, "").strip()
        rounds = [*rounds]
        rounds[place] = (f"{IMAGE_MARK}\n{text}", rounds[place][1])
        counts[place] = 1
    if sum(counts) != num_images:
        named = f"{num_images} image{'s' * (num_images != 1)}" if num_images else "no image"
        raise UserError(
            f"{location} has {sum(counts)} {IMAGE_MARK} in its questions but {named}; give an image for each"
        )
    for number, (question, answer) in enumerate(rounds, 1):
        if not answer.strip() or not question.replace(IMAGE_MARK, "").strip() and IMAGE_MARK not in question:
            raise UserError(f"{location} has no text in round {number}; add a question and an answer")
    *turns, (question, answer) = rounds
    only_text = question.replace(IMAGE_MARK, "").strip()
    if not turns and num_images < 2 and only_text:  # the prompt template has the place of the image
        return only_text, answer, (), False
    return question, answer, tuple(turns), True


class ImageFolders:
    """Finds the folder of images whose paths were written for another folder; each folder is looked up once."""

    def __init__(self, root: Path):
        self.root, self.found, self.tries = root, {}, Counter()

    def find(self, name: str) -> str:
        """The path under the root of an image; `name` itself if there is no other place for it."""
        path = PurePosixPath(name)
        folder = str(path.parent)
        if folder not in self.found and self.tries[folder] < MAX_TRIES:  # an image may be missing where others are
            self.tries[folder] += 1
            places = (place for place in self._places(path.parent) if (self.root / place / path.name).is_file())
            if (found := next(places, None)) is not None:
                self.found[folder] = found
        return str(PurePosixPath(self.found.get(folder, folder)) / path.name)

    def _places(self, folder: PurePosixPath) -> list[str]:
        parts = folder.parts
        inner = ["/".join(parts[start:]) for start in range(len(parts) + 1)]
        if folder.is_absolute() or ".." in parts:
            return [str(folder)]
        return [*inner, *(f"{place}/{part}".strip("/") for place in IMAGE_FOLDERS for part in inner)]
