# SPDX-License-Identifier: Apache-2.0
"""Load untrusted image files safely; resize and crop images together with their boxes.

Only JPEG, PNG and WebP are read. The pixel count in the header is checked before decoding, paths must stay inside
their data folder, and every failure raises a UserError that names the file.
"""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lionjax.core import hub
from lionjax.core.types import UserError
from lionjax.data import resample
from lionjax.data.boxes import Box

ALLOWED_FORMATS = ("JPEG", "PNG", "WEBP")
LINK_ROOTS_ENV = hub.LINK_ROOTS
MAX_PIXELS = 64_000_000
MAX_FILE_BYTES = 256 * 2**20
FULL_IMAGE: Box = (0.0, 0.0, 1.0, 1.0)
NO_IMAGE_NAME = "no picture"  # record name of a text-only row


def safe_path(root: str | Path, name: str) -> Path:
    """The path of file `name` under `root`, with symbolic links followed.

    Raises UserError if `name` itself leaves `root`, and if a link leads out of it, unless it leads into a folder of the
    environment variable LIONJAX_LINK_ROOTS (several are separated by ":").
    """
    try:
        base = Path(root).resolve()
        path = (base / name).resolve()
        written = Path(os.path.normpath(base / name))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{name!r} is not a valid path ({error}); correct it") from error
    if path.is_relative_to(base):
        return path
    if not written.is_relative_to(base):
        raise UserError(f"the path {name!r} leaves the data folder {root}; keep images inside it")
    allowed = [Path(folder).resolve() for folder in os.environ.get(LINK_ROOTS_ENV, "").split(os.pathsep) if folder]
    if not any(path.is_relative_to(folder) for folder in allowed):
        raise UserError(
            f"{name!r} is a symbolic link out of the data folder {root}; keep images inside it, or set "
            f"{LINK_ROOTS_ENV}={path.parent} to allow links there"
        )
    return path


def open_image(file: str | Path | bytes, name: str = "", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB image from a path or the bytes of a file, rotated by its EXIF orientation.

    Transparency becomes white, 16-bit gray keeps its upper 8 bits, and an animation gives its first frame. Raises
    UserError for a missing, damaged or too large file, and for other formats than JPEG, PNG and WebP.
    """
    name = name or (str(file) if not isinstance(file, bytes) else "image")
    if not isinstance(file, bytes):
        _check_image_file(Path(file), name)
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=ALLOWED_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise _too_large_error(name, f"{width} x {height}", max_pixels)
            image.load()
            return _to_rgb(_apply_exif_orientation(image))
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large_error(name, "too many", max_pixels) from error
    except Exception as error:  # decoders of damaged files raise nearly anything
        reason = "not JPEG, PNG or WebP" if isinstance(error, Image.UnidentifiedImageError) else error
        raise UserError(f"{name} cannot be read as an image ({reason}); replace or remove it") from error


def _check_image_file(path: Path, name: str) -> None:
    if not path.is_file():
        raise UserError(f"there is no image {name}; check the path")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise UserError(f"{name} is larger than {MAX_FILE_BYTES >> 20} MiB; shrink the image first")


def _too_large_error(name: str, size: str, max_pixels: int) -> UserError:
    millions = max_pixels / 1e6
    return UserError(f"{name} has {size} pixels, more than the {millions:g} million allowed; shrink it first")


def _apply_exif_orientation(image: Image.Image) -> Image.Image:
    orientation = image.getexif().get(0x0112, 1)
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        # Pillow's own conversion from 16 bits clips all values above 255 to white.
        gray = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        image = Image.fromarray(gray)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_pil_image(source, name: str = "", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB image from a path, bytes, a PIL image or a uint8 array (H, W), (H, W, 3) or (H, W, 4).

    Raises UserError for another type or shape, for more than `max_pixels` pixels, and as `open_image` does.
    """
    if isinstance(source, Image.Image):
        width, height = source.size
        if width * height > max_pixels:
            raise _too_large_error(name or "the image", f"{width} x {height}", max_pixels)
        return _to_rgb(_apply_exif_orientation(source))
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or 0 in source.shape:
            allowed = "uint8 (H, W), (H, W, 3) or (H, W, 4)"
            raise UserError(f"the image is an array {source.dtype} {source.shape}; give {allowed}")
        if source.ndim == 3 and source.shape[2] not in (3, 4):
            raise UserError(f"the image is an array of shape {source.shape}; give (H, W, 3) or (H, W, 4)")
        height, width = source.shape[:2]
        if width * height > max_pixels:
            raise _too_large_error(name or "the image", f"{width} x {height}", max_pixels)
        return _to_rgb(Image.fromarray(source))
    if not isinstance(source, str | Path | bytes):
        raise UserError(f"the image is a {type(source).__name__}; give a path, bytes, a PIL image or a uint8 array")
    return open_image(source, name, max_pixels)


def image_bytes(source) -> int:
    """Memory of an image of any type that `to_pil_image` accepts."""
    if isinstance(source, Image.Image):
        return len(source.getbands()) * source.width * source.height
    return source.nbytes if isinstance(source, np.ndarray) else len(source) if isinstance(source, bytes) else 0


def require_image_list(images) -> None:
    """Raise UserError for a single image in the place of a list."""
    is_single = isinstance(images, np.ndarray) and images.ndim < 4
    if is_single or isinstance(images, str | bytes | Path | Image.Image):
        raise UserError(f"images is a single {type(images).__name__}; give a list of images")


def require_size(image: Image.Image, min_side: int, reader: str) -> Image.Image:
    """The image. Raises UserError where a side has fewer than `min_side` pixels; `reader` is what reads it."""
    if min(image.size) < min_side:
        raise UserError(
            f"an image is {image.width} x {image.height} pixels; {reader} needs at least {min_side} on each side"
        )
    return image


def resize(image: Image.Image, size: int, crop: Box = FULL_IMAGE) -> np.ndarray:
    """The window `crop` (in 0..1) of an image as uint8 (size, size, 3): bicubic, antialiased, without aspect ratio.

    Equals torchvision's Resize of a PIL image, which LION uses.
    """
    width, height = image.size
    x0, y0, x1, y1 = crop
    box = None if crop == FULL_IMAGE else (x0 * width, y0 * height, x1 * width, y1 * height)
    return resample.resize(image, size, size, box)


def normalize_box(box, size: tuple[float, float] = (1.0, 1.0), tolerance: float = 1e-3, name: str = "the box") -> Box:
    """The box (x0, y0, x1, y1) as fractions of the image, from units of `size` (width, height).

    Edges up to `tolerance` (in units of `size`) outside the image are clipped, as annotations are imprecise. Raises
    UserError for anything but four finite numbers, and for a box outside the image or without area.
    """
    try:
        numbers = [float(edge) for edge in box]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise UserError(f"{name} is {box!r}; give four numbers x0, y0, x1, y1")
    ends = (*size, *size)
    if any(edge < -tolerance or edge > end + tolerance for edge, end in zip(numbers, ends)):
        raise UserError(f"{name} {tuple(numbers)} leaves the image of {size[0]:g} x {size[1]:g}; give a box inside it")
    x0, y0, x1, y1 = (min(max(edge, 0.0), end) / end for edge, end in zip(numbers, ends))
    if x1 <= x0 or y1 <= y0:
        raise UserError(f"{name} {tuple(numbers)} has no area; give x0 < x1 and y0 < y1")
    return x0, y0, x1, y1


def bbox_safe_random_crop(boxes, rng: np.random.Generator, scale: tuple[float, float]) -> Box:
    """A random crop in 0..1 that contains all boxes; its area is in `scale` (minimum, maximum) of the image.

    Like torchvision's RandomResizedCrop, with the boxes as a constraint; the full image if 10 tries fail.
    """
    for _ in range(10):
        area, ratio = rng.uniform(*scale), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if width > 1 or height > 1:
            continue
        x0, y0 = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
        crop = (x0, y0, x0 + width, y0 + height)
        if all(x0 <= b[0] and y0 <= b[1] and b[2] <= crop[2] and b[3] <= crop[3] for b in boxes):
            return crop
    return FULL_IMAGE


def random_crop(
    width: int, height: int, rng: np.random.Generator, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels of a random crop, as torchvision's RandomResizedCrop draws it.

    Its area is in `scale` (minimum, maximum) of the image and its aspect ratio in 3/4..4/3; after 10 tries it is the
    largest crop in the image's center whose aspect ratio is in that range.
    """
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area, ratio = width * height * rng.uniform(*scale), math.exp(rng.uniform(math.log(low), math.log(high)))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = int(rng.integers(width - crop_width + 1)), int(rng.integers(height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    crop_width, crop_height = min(width, round(height * high)), min(height, round(width / low))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def crop_and_flip_box(box: Box, crop: Box, hflip: bool = False) -> Box:
    """The coordinates in 0..1 of an image box within the window `crop`, flipped horizontally if `hflip`."""
    width, height = crop[2] - crop[0], crop[3] - crop[1]
    x0, x1 = ((edge - crop[0]) / width for edge in (box[0], box[2]))
    y0, y1 = ((edge - crop[1]) / height for edge in (box[1], box[3]))
    x0, x1 = (1 - x1, 1 - x0) if hflip else (x0, x1)
    return tuple(min(max(edge, 0.0), 1.0) for edge in (x0, y0, x1, y1))
