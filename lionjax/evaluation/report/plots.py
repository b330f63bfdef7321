# SPDX-License-Identifier: Apache-2.0
"""Pictures for people: boxes and masks on photographs, grids of answers, loss curves, router ratios.

Boxes are x0 y0 x1 y1 in 0..1, masks bool (H, W). Curves and heat maps come for a light or a dark page.
"""

from __future__ import annotations

import dataclasses
import functools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's colours, which people with colour-blindness can tell apart too, without the black.
PALETTE = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2")
PREDICTION_COLOR, TRUTH_COLOR, QUERY_COLOR = PALETTE[0], PALETTE[2], PALETTE[1]
LIGHT_THEME = dict(page="#ffffff", ink="#1f2328", faint="#8b949e", line="#e4e7eb", curve="#0072b2")
DARK_THEME = dict(page="#16191d", ink="#e6e8eb", faint="#848d97", line="#2c3138", curve="#56b4e9")


@dataclasses.dataclass(frozen=True)
class Overlay:
    """One thing to draw on a picture: a box, a mask, or both, with a few words. A dashed one's mask is only edged."""

    box: Sequence[float] | None = None
    label: str = ""
    color: str | None = None  # None: the next of the palette
    dashed: bool = False
    mask: np.ndarray | None = None


def draw_overlays(image, overlays: Sequence[Overlay], min_side: int = 480) -> Image.Image:
    """A copy of the picture (path, PIL or uint8 array) with the marks on it.

    A picture smaller than `side` is enlarged, so that lines and words are sharp. Words stand on a
    plate of the mark's colour, away from other words where there is room.
    """
    picture = as_rgb_image(image)
    scale = max(1.0, min_side / max(picture.size))
    size = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    colours = [mark.color or PALETTE[i % len(PALETTE)] for i, mark in enumerate(overlays)]
    for mark, colour in zip(overlays, colours):
        if mark.mask is not None:
            inside = 0.0 if mark.dashed else 0.45
            picture = blend_mask(picture, np.asarray(mark.mask, bool), colour, inside)
    pen, line = ImageDraw.Draw(picture), max(3, round(max(size) / 130))
    for mark, colour in zip(overlays, colours):
        if mark.box is not None:
            draw_box(pen, box_to_pixels(mark.box, size), colour, line, mark.dashed)
    taken: list[tuple[float, ...]] = []
    for mark, colour in zip(overlays, colours):
        if mark.label:
            corner = mark.box if mark.box is not None else mask_to_box(mark.mask)
            taken.append(draw_label(pen, mark.label, box_to_pixels(corner, size), colour, size, taken))
    return picture


def save_png(image: Image.Image, path: Path | str) -> None:
    """Write a picture as PNG, whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    image.save(part, "PNG")
    part.replace(path)


def as_rgb_image(image) -> Image.Image:
    """An RGB picture from a path, a PIL picture, or an array (H, W, 3) of uint8."""
    if isinstance(image, str | Path):
        with Image.open(image) as opened:
            return opened.convert("RGB")
    return (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB")


def box_to_pixels(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A box of 0..1 in pixels of a picture (width, height), inside it and at least a pixel large."""
    (wide, high), (x0, y0, x1, y1) = size, np.clip(np.asarray(box, float), 0, 1)
    x0, x1 = sorted((x0 * (wide - 1), x1 * (wide - 1)))
    y0, y1 = sorted((y0 * (high - 1), y1 * (high - 1)))
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


def mask_to_box(mask: np.ndarray | None) -> tuple[float, float, float, float]:
    """The box around a mask in 0..1; the whole picture where there is nothing."""
    rows, columns = np.nonzero(mask) if mask is not None else ((), ())
    if not len(rows):
        return 0.0, 0.0, 1.0, 1.0
    high, wide = mask.shape
    return (columns.min() / wide, rows.min() / high, (columns.max() + 1) / wide, (rows.max() + 1) / high)


def blend_mask(image: Image.Image, mask: np.ndarray, color: str, alpha: float) -> Image.Image:
    """The picture with the mask's area edged by a colour and covered by it, `inside` of 0..1."""
    mask = np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))
    padded = np.pad(mask, 2)
    inner = mask.copy()
    for dy, dx in ((0, 2), (4, 2), (2, 0), (2, 4)):
        inner &= padded[dy : dy + mask.shape[0], dx : dx + mask.shape[1]]
    share = np.where(mask & ~inner, 0.95, np.where(mask, alpha, 0.0))[..., None]
    mixed = np.asarray(image) * (1 - share) + np.array(hex_to_rgb(color)) * share
    return Image.fromarray(mixed.round().astype(np.uint8))


def draw_box(pen: ImageDraw.ImageDraw, box, color: str, line_width: int, dashed: bool) -> None:
    """A rectangle in a colour, edged in black or white to stand out on any ground."""
    x0, y0, x1, y1 = box
    for shade, edge in ((contrast_color(color), 1), (color, 0)):
        l, t, r, b = x0 - edge, y0 - edge, x1 + edge, y1 + edge
        width = line_width + 2 * edge
        if not dashed:
            pen.rectangle((l, t, r, b), outline=shade, width=width)
            continue
        for x in np.arange(x0, x1, 5 * line_width):
            for y in (t, b - width + 1):
                end = min(x + 3 * line_width, x1) + edge
                pen.rectangle((x - edge, y, end, y + width - 1), fill=shade)
        for y in np.arange(y0, y1, 5 * line_width):
            for x in (l, r - width + 1):
                end = min(y + 3 * line_width, y1) + edge
                pen.rectangle((x, y - edge, x + width - 1, end), fill=shade)


def draw_label(pen: ImageDraw.ImageDraw, text: str, box, color: str, image_size, occupied) -> tuple[float, ...]:
    """Words on a plate beside a box's corner; returns where it stands. `taken` are other plates."""
    face = load_font(max(12, round(max(image_size) / 30)))
    text = textwrap.shorten(text, 60, placeholder="…")
    wide, high = face.getlength(text) + 8, face.size + 7
    x0, y0, x1, y1 = box
    spots = [(x0, y0 - high), (x0, y1), (x0, y0), (x1 - wide, y1), (x1 - wide, y0 - high)]
    spots += [(x0, y) for y in range(0, round(image_size[1] - high), round(high) + 1)]

    def free(x: float, y: float) -> bool:
        inside = x >= 0 and y >= 0 and x + wide <= image_size[0] and y + high <= image_size[1]
        apart = (x >= r or x + wide <= l or y >= b or y + high <= t for l, t, r, b in occupied)
        return inside and all(apart)

    x, y = next((spot for spot in spots if free(*spot)), spots[2])
    x, y = max(0, min(x, image_size[0] - wide)), max(0, min(y, image_size[1] - high))
    pen.rectangle((x, y, x + wide, y + high), fill=color)
    pen.text((x + 4, y + high / 2), text, fill=contrast_color(color), font=face, anchor="lm")
    return x, y, x + wide, y + high


def image_grid(cells: Sequence[tuple[Image.Image, Sequence[tuple[str, str]]]], columns: int = 4):
    """One picture of many: each cell a picture above lines of (text, colour)."""
    side, gap, face = 320, 16, load_font(16)
    blocks = []
    for picture, lines in cells:
        wrapped = [(part, ink) for text, ink in lines for part in wrap_text(text, face, side)]
        blocks.append((fit_to_square(picture, side), wrapped))
    columns = max(1, min(columns, len(blocks)))
    rows = [blocks[start : start + columns] for start in range(0, len(blocks), columns)]
    step = face.size + 6
    heights = [max(side + 8 + step * len(lines) for _, lines in row) + gap for row in rows]
    sheet = Image.new("RGB", (columns * (side + gap) + gap, sum(heights) + gap), LIGHT_THEME["page"])
    pen, top = ImageDraw.Draw(sheet), gap
    for row, height in zip(rows, heights):
        for column, (picture, lines) in enumerate(row):
            left = gap + column * (side + gap)
            sheet.paste(picture, (left, top))
            for number, (text, ink) in enumerate(lines):
                pen.text((left, top + side + 8 + step * number), text, fill=ink, font=face)
        top += height
    return sheet


def fit_to_square(image: Image.Image, side: int) -> Image.Image:
    """The whole picture in the middle of a square."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (side, side), LIGHT_THEME["line"])
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def wrap_text(text: str, face: ImageFont.FreeTypeFont, width: int, max_lines: int = 6) -> list[str]:
    """Lines of at most a width in pixels; what does not fit into `most` lines ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        while face.getlength(word) > width:
            word = word[:-2] + "…"
        longer = f"{lines[-1]} {word}".strip()
        if face.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if len(lines) <= max_lines else [*lines[: max_lines - 1], lines[max_lines - 1].rstrip("….") + "…"]


def plot_loss_curves(rows: Sequence[Mapping], dark: bool = False):
    """A figure of the loss in each stage, from the lines of metrics.jsonl: every value, and smoothed."""
    look, stages = DARK_THEME if dark else LIGHT_THEME, {}
    for row in rows:
        if row.get("loss") is not None:
            stages.setdefault(str(row.get("stage", "")), []).append((row["step"], row["loss"]))
    figure, axes = make_axes(max(1, len(stages)), look, sharey=True)
    for axis, (name, points) in zip(axes, stages.items()):
        step, loss = np.array(points, float).T
        axis.plot(step, loss, color=PALETTE[1], alpha=0.35, linewidth=1)
        axis.plot(step, running_mean(loss), color=look["curve"], linewidth=2)
        axis.set_title(name, loc="left", fontsize=11, color=look["ink"])
        axis.set_xlabel("step")
        axis.annotate(
            f"{running_mean(loss)[-1]:.2f}",
            (step[-1], running_mean(loss)[-1]),
            (4, 0),
            textcoords="offset points",
            va="center",
            color=look["ink"],
        )
    axes[0].set_ylabel("loss")
    return figure


def plot_router_ratios(ratios: Mapping[str, np.ndarray], tasks: Sequence[str], dark: bool = False):
    """A figure of how far each layer listens to each adapter: ratios (layers, tasks, adapters).

    `ratios` maps a stack of layers, such as "encoder", to its mean ratios over the channels.
    """
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    look = DARK_THEME if dark else LIGHT_THEME
    colours = LinearSegmentedColormap.from_list("ratio", [look["page"], look["curve"]])
    figure, axes = make_axes(len(ratios), look, height=1.2 + 0.24 * max(map(len, ratios.values())))
    top = max(1.0, *(float(np.max(ratio)) for ratio in ratios.values()))
    low = min(0.0, *(float(np.min(ratio)) for ratio in ratios.values()))
    for axis, (name, ratio_LTA) in zip(axes, ratios.items()):
        layers, _, adapters = ratio_LTA.shape
        flat = ratio_LTA.reshape(layers, -1)
        shown = axis.imshow(flat, aspect="auto", cmap=colours, vmin=low, vmax=top)
        for (row, column), value in np.ndenumerate(flat):
            ink = contrast_color(to_hex(colours(shown.norm(value))))
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
        words = [f"{task.replace('_', ' ')}\nadapter {a}" for task in tasks for a in range(adapters)]
        axis.set_xticks(range(len(words)), words, fontsize=8)
        axis.set_yticks(range(layers), range(layers))
        axis.set_title(name, loc="left", fontsize=11, color=look["ink"])
        axis.grid(False)
    axes[0].set_ylabel("layer")
    return figure


def make_axes(num_panels: int, theme: Mapping[str, str], height: float = 3.0, **subplot_kwargs):
    """A row of axes in the project's look, and their figure; no window, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (9.6, height)
    figure = Figure(size, dpi=160, facecolor=theme["page"], layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(1, num_panels, **subplot_kwargs))
    for axis in axes:
        axis.set_facecolor(theme["page"])
        axis.grid(color=theme["line"], linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(colors=theme["faint"], length=0, labelsize=9)
        axis.xaxis.label.set_color(theme["faint"])
        axis.yaxis.label.set_color(theme["faint"])
        for spine in axis.spines.values():
            spine.set_visible(False)
    return figure, axes


def running_mean(values: np.ndarray, window_fraction: float = 0.05) -> np.ndarray:
    """Running mean over a share of the values, each window centred and cut at the ends."""
    half = int(len(values) * window_fraction / 2)
    total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(values))])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


@functools.cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and knows many scripts."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


def hex_to_rgb(color: str) -> tuple[int, int, int]:
    """ "#e69f00" -> (230, 159, 0)."""
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def contrast_color(color: str) -> str:
    """Black or white, whichever is easier to read on a colour (WCAG's relative luminance)."""
    parts = [c / 255 for c in hex_to_rgb(color)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (light + 0.05) / 0.05 > 1.05 / (light + 0.05) else "#ffffff"
