# SPDX-License-Identifier: Apache-2.0
"""The work folder of tools: PNG images under the file names of Visual ChatGPT (arXiv 2303.04671).

An added image is `image/` and 8 hexadecimal digits; one made from another is
`image/{4 digits}_{func}_{prev}_{org}.png`, where org is the image at the start of the chain. Names are all that callers
give, none leads out of the folder, and digits follow from the content, so that a repeated run has the same names.
"""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path

from PIL import Image

from lionjax.core.errors import UserError
from lionjax.core.files import write_atomic
from lionjax.data.images import MAX_PIXELS, open_image, to_pil_image

FOLDER = "image"
NAME = re.compile(rf"(?:{FOLDER}/)?([A-Za-z0-9][A-Za-z0-9_-]{{0,99}}\.png)")
MAX_FILES = 2000
UPLOAD_SIDE, UPLOAD_MULTIPLE = 512, 64  # pixels, of Visual ChatGPT's uploads


def derived_name(source: str, func: str, digits: str) -> str:
    """The file name, without folder, of an image that `func` makes from `source`.

    `source` has one part (an added image) or four, between underscores; raises UserError for others.
    """
    parts = Path(source).stem.split("_")
    if len(parts) not in (1, 4):
        raise UserError(f"the file name {source[:80]!r} has {len(parts)} parts between underscores; use 1 or 4")
    return f"{digits}_{func}_{parts[0]}_{parts[-1]}.png"


def upload_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) to which Visual ChatGPT resizes an image: at most 512 pixels, then multiples of 64.

    At least 64, where the released code makes very long images 0 pixels high.
    """
    ratio = min(UPLOAD_SIDE / width, UPLOAD_SIDE / height)
    sides = (round(width * ratio), round(height * ratio))
    return tuple(max(UPLOAD_MULTIPLE, round(side / UPLOAD_MULTIPLE) * UPLOAD_MULTIPLE) for side in sides)


class Workspace:
    """A folder of images. Raises UserError if it cannot be one."""

    def __init__(self, folder: str | Path, max_files: int = MAX_FILES, max_pixels: int = MAX_PIXELS):
        self.folder, self.max_files, self.max_pixels = Path(folder), max_files, max_pixels
        self.images = self.folder / FOLDER
        if self.images.is_symlink():
            raise UserError(f"{self.images} is a symbolic link; give a work folder of its own")
        try:
            self.images.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the work folder {folder} cannot be made: {error.strerror}") from error

    def add(self, image: object, resize: bool = False) -> str:
        """The name of an image (path, PIL image or uint8 array) that is copied into the folder.

        `resize`: to the size of Visual ChatGPT's uploads. Raises UserError for what is no image.
        """
        image = to_pil_image(image, max_pixels=self.max_pixels)
        if resize:
            image = image.resize(upload_size(*image.size))
        return self._write(image, lambda digits: f"{digits[:8]}.png", "")

    def write(self, image: Image.Image, func: str, source: str) -> str:
        """The name of an image that `func` made from the image `source`."""
        base = self.path(source).name
        return self._write(image, lambda digits: derived_name(base, func, digits[:4]), f"{func} {base}")

    def _write(self, image: Image.Image, make_name, salt: str) -> str:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        content = buffer.getvalue()
        for attempt in range(self.max_files):
            digits = hashlib.sha256(f"{salt} {attempt} ".encode() + content).hexdigest()
            path = self.images / make_name(digits)
            if not path.exists() and not path.is_symlink():
                break
            if path.is_file() and not path.is_symlink() and path.read_bytes() == content:
                return f"{FOLDER}/{path.name}"
        if len(self.names()) >= self.max_files:
            raise UserError(f"the work folder has {self.max_files} images, as many as it may have; use another one")
        write_atomic(path, content)
        return f"{FOLDER}/{path.name}"

    def path(self, name: str) -> Path:
        """The path of an image in the folder. Raises UserError for any other name and for a missing file."""
        match = NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            shown = repr(name)[:80]
            raise UserError(f"{shown} is no file name of the work folder; use one such as {FOLDER}/1a2b3c4d.png")
        path = self.images / match[1]
        if path.is_symlink() or not path.is_file():
            raise UserError(f"there is no image {FOLDER}/{match[1]}; use a file name that a tool gave")
        return path

    def open(self, name: str) -> Image.Image:
        """The RGB image of a name; transparent parts are white. Raises UserError as `path`, and for damaged files."""
        return open_image(self.path(name), name, self.max_pixels)

    def names(self) -> list[str]:
        """The names of all images in order."""
        paths = [path for path in self.images.iterdir() if NAME.fullmatch(path.name) and not path.is_symlink()]
        return sorted(f"{FOLDER}/{path.name}" for path in paths)
