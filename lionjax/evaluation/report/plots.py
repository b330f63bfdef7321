# SPDX-License-Identifier: Apache-2.0
"""Plots and overlays for reports: boxes and masks on images, image grids, loss curves, router ratios.

Boxes are x0 y0 x1 y1 in 0..1, masks bool (H, W). Curves and heat maps have a light and a dark theme.
"""

from __future__ import annotations

import dataclasses
import functools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lionjax.data.boxes import box_around

# The color-blind safe palette of Okabe and Ito, without black.
PALETTE = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2")
PREDICTION_COLOR, TRUTH_COLOR, QUERY_COLOR = PALETTE[0], PALETTE[2], PALETTE[1]
ANSWER_COLORS = tuple(color for color in PALETTE if color != QUERY_COLOR)  # of the masks of one answer
LIGHT_THEME = dict(page="#ffffff", ink="#1f2328", faint="#8b949e", line="#e4e7eb", curve="#0072b2")
DARK_THEME = dict(page="#16191d", ink="#e6e8eb", faint="#848d97", line="#2c3138", curve="#56b4e9")


@dataclasses.dataclass(frozen=True)
class Overlay:
    """A box, a mask, or both, to draw on an image, with an optional label. A dashed overlay's mask is not filled."""

    box: Sequence[float] | None = None
    label: str = ""
    color: str | None = None  # None: the next color of PALETTE
    dashed: bool = False
    mask: np.ndarray | None = None


def draw_overlays(image, overlays: Sequence[Overlay], min_side: int = 480) -> Image.Image:
    """A copy of the image (path, PIL image or uint8 array) with the overlays drawn on it.

    An image whose longer side is below `min_side` pixels is upscaled, so that lines and text are sharp. Labels are
    placed to avoid each other where there is room.
    """
    canvas = as_rgb_image(image)
    scale = max(1.0, min_side / max(canvas.size))
    size = (round(canvas.width * scale), round(canvas.height * scale))
    canvas = canvas.resize(size, Image.Resampling.LANCZOS)
    colors = [overlay.color or PALETTE[i % len(PALETTE)] for i, overlay in enumerate(overlays)]
    line_width = max(3, round(max(size) / 130))
    for overlay, color in sorted(zip(overlays, colors), key=lambda pair: pair[0].dashed):  # outlines above fillings
        if overlay.mask is not None:
            alpha, edge = (0.0, line_width) if overlay.dashed else (0.45, 2)
            canvas = blend_mask(canvas, np.asarray(overlay.mask, bool), color, alpha, edge)
    drawing = ImageDraw.Draw(canvas)
    for overlay, color in zip(overlays, colors):
        if overlay.box is not None:
            draw_box(drawing, box_to_pixels(overlay.box, size), color, line_width, overlay.dashed)
    label_boxes: list[tuple[float, ...]] = []
    for overlay, color in zip(overlays, colors):
        if overlay.label:
            anchor_box = overlay.box if overlay.box is not None else mask_to_box(overlay.mask)
            label_boxes.append(
                draw_label(drawing, overlay.label, box_to_pixels(anchor_box, size), color, size, label_boxes)
            )
    return canvas


def answer_overlays(boxes, masks, phrases: Sequence[str]) -> list[Overlay]:
    """Overlays of an answer's boxes, and of its masks, each with its phrase; several masks have a color each.

    Boxes have the colors of their masks if each mask has one, or each that is not empty (LISA).
    """
    if not len(masks):
        return [Overlay(box, color=PREDICTION_COLOR) for box in boxes]
    colors = [ANSWER_COLORS[k % len(ANSWER_COLORS)] for k in range(len(masks))]
    labels = [*phrases, *[""] * len(masks)]
    overlays = [Overlay(label=labels[k], color=colors[k], mask=mask) for k, mask in enumerate(masks) if mask.any()]
    own = colors if len(boxes) == len(masks) else [overlay.color for overlay in overlays]
    own = own if len(own) == len(boxes) else [PREDICTION_COLOR] * len(boxes)
    return [*map(Overlay, boxes, [""] * len(boxes), own), *overlays]


def save_png(image: Image.Image, path: Path | str) -> None:
    """Write an image as PNG atomically."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    image.save(part, "PNG")
    part.replace(path)


def as_rgb_image(image) -> Image.Image:
    """An RGB PIL image from a path, a PIL image, or a uint8 array (H, W, 3)."""
    if isinstance(image, str | Path):
        with Image.open(image) as opened:
            return opened.convert("RGB")
    return (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB")


def box_to_pixels(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A box in 0..1 as pixel coordinates of an image of `size` (width, height), clipped and at least 1 pixel large."""
    (width, height), (x0, y0, x1, y1) = size, np.clip(np.asarray(box, float), 0, 1)
    x0, x1 = sorted((x0 * (width - 1), x1 * (width - 1)))
    y0, y1 = sorted((y0 * (height - 1), y1 * (height - 1)))
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


def mask_to_box(mask: np.ndarray | None) -> tuple[float, float, float, float]:
    """The bounding box of a mask in 0..1; the whole image for an empty mask or None."""
    return (None if mask is None else box_around(mask)) or (0.0, 0.0, 1.0, 1.0)


def blend_mask(image: Image.Image, mask: np.ndarray, color: str, alpha: float, edge: int = 2) -> Image.Image:
    """The image with the mask filled with a color at opacity `alpha` (0..1), and with an edge of `edge` pixels."""
    mask = np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))
    padded = np.pad(mask, edge)
    inner = mask.copy()
    for dy, dx in ((0, edge), (2 * edge, edge), (edge, 0), (edge, 2 * edge)):
        inner &= padded[dy : dy + mask.shape[0], dx : dx + mask.shape[1]]
    opacity = np.where(mask & ~inner, 0.95, np.where(mask, alpha, 0.0))[..., None]
    mixed = np.asarray(image) * (1 - opacity) + np.array(hex_to_rgb(color)) * opacity
    return Image.fromarray(mixed.round().astype(np.uint8))


def draw_box(pen: ImageDraw.ImageDraw, box, color: str, line_width: int, dashed: bool) -> None:
    """Draw a rectangle with a black or white border for contrast."""
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
    """Draw a label at a corner of a box; returns its rectangle in pixels. `occupied` are other labels' rectangles."""
    font = load_font(max(12, round(max(image_size) / 30)))
    text = textwrap.shorten(text, 60, placeholder="…")
    width, height = font.getlength(text) + 8, font.size + 7
    x0, y0, x1, y1 = box
    positions = [(x0, y0 - height), (x0, y1), (x0, y0), (x1 - width, y1), (x1 - width, y0 - height)]
    positions += [(x0, y) for y in range(0, round(image_size[1] - height), round(height) + 1)]

    def is_free(x: float, y: float) -> bool:
        inside = x >= 0 and y >= 0 and x + width <= image_size[0] and y + height <= image_size[1]
        disjoint = (x >= r or x + width <= l or y >= b or y + height <= t for l, t, r, b in occupied)
        return inside and all(disjoint)

    x, y = next((position for position in positions if is_free(*position)), positions[2])
    x, y = max(0, min(x, image_size[0] - width)), max(0, min(y, image_size[1] - height))
    pen.rectangle((x, y, x + width, y + height), fill=color)
    pen.text((x + 4, y + height / 2), text, fill=contrast_color(color), font=font, anchor="lm")
    return x, y, x + width, y + height


def image_grid(cells: Sequence[tuple[Image.Image, Sequence[tuple[str, str]]]], columns: int = 4):
    """One image with a grid of cells, each an image above lines of (text, color)."""
    side, gap, font = 320, 16, load_font(16)
    blocks = []
    for image, lines in cells:
        wrapped = [(part, color) for text, color in lines for part in wrap_text(text, font, side)]
        blocks.append((fit_to_square(image, side), wrapped))
    columns = max(1, min(columns, len(blocks)))
    rows = [blocks[start : start + columns] for start in range(0, len(blocks), columns)]
    step = font.size + 6
    heights = [max(side + 8 + step * len(lines) for _, lines in row) + gap for row in rows]
    sheet = Image.new("RGB", (columns * (side + gap) + gap, sum(heights) + gap), LIGHT_THEME["page"])
    drawing, top = ImageDraw.Draw(sheet), gap
    for row, height in zip(rows, heights):
        for column, (image, lines) in enumerate(row):
            left = gap + column * (side + gap)
            sheet.paste(image, (left, top))
            for i, (text, color) in enumerate(lines):
                drawing.text((left, top + side + 8 + step * i), text, fill=color, font=font)
        top += height
    return sheet


def fit_to_square(image: Image.Image, side: int) -> Image.Image:
    """The image scaled down to fit a square of `side` pixels, centered."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (side, side), LIGHT_THEME["line"])
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def wrap_text(text: str, face: ImageFont.FreeTypeFont, width: int, max_lines: int = 6) -> list[str]:
    """`text` as at most `max_lines` lines of at most `width` pixels; longer text ends in an ellipsis."""
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
    """A matplotlib figure of the loss of each stage and its running mean, from the lines of metrics.jsonl."""
    theme, stages = DARK_THEME if dark else LIGHT_THEME, {}
    for row in rows:
        if row.get("loss") is not None:
            stages.setdefault(str(row.get("stage", "")), []).append((row["step"], row["loss"]))
    figure, axes = make_axes(max(1, len(stages)), theme, sharey=True)
    for axis, (name, points) in zip(axes, stages.items()):
        step, loss = np.array(points, float).T
        axis.plot(step, loss, color=PALETTE[1], alpha=0.35, linewidth=1)
        axis.plot(step, running_mean(loss), color=theme["curve"], linewidth=2)
        axis.set_title(name, loc="left", fontsize=11, color=theme["ink"])
        axis.set_xlabel("step")
        axis.annotate(
            f"{running_mean(loss)[-1]:.2f}",
            (step[-1], running_mean(loss)[-1]),
            (4, 0),
            textcoords="offset points",
            va="center",
            color=theme["ink"],
        )
    axes[0].set_ylabel("loss")
    return figure


def plot_router_ratios(ratios: Mapping[str, np.ndarray], tasks: Sequence[str], dark: bool = False):
    """A matplotlib figure of the router's weight of each adapter, by layer and task.

    `ratios` maps a stack of layers, such as "encoder", to its mean ratios (layers, tasks, adapters) over channels.
    """
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    theme = DARK_THEME if dark else LIGHT_THEME
    colormap = LinearSegmentedColormap.from_list("ratio", [theme["page"], theme["curve"]])
    figure, axes = make_axes(len(ratios), theme, height=1.2 + 0.24 * max(map(len, ratios.values())))
    high = max(1.0, *(float(np.max(ratio)) for ratio in ratios.values()))
    low = min(0.0, *(float(np.min(ratio)) for ratio in ratios.values()))
    for axis, (name, ratio_LTA) in zip(axes, ratios.items()):
        layers, _, adapters = ratio_LTA.shape
        flat = ratio_LTA.reshape(layers, -1)
        heatmap = axis.imshow(flat, aspect="auto", cmap=colormap, vmin=low, vmax=high)
        for (row, column), value in np.ndenumerate(flat):
            text_color = contrast_color(to_hex(colormap(heatmap.norm(value))))
            axis.text(column, row, f"{value:z.2f}", ha="center", va="center", fontsize=8, color=text_color)
        labels = [f"{task.replace('_', ' ')}\nadapter {a}" for task in tasks for a in range(adapters)]
        axis.set_xticks(range(len(labels)), labels, fontsize=8)
        axis.set_yticks(range(layers), range(layers))
        axis.set_title(name, loc="left", fontsize=11, color=theme["ink"])
        axis.grid(False)
    axes[0].set_ylabel("layer")
    return figure


def make_axes(num_panels: int, theme: Mapping[str, str], height: float = 3.0, **subplot_kwargs):
    """A matplotlib figure and its row of axes with a theme applied; uses no window and no pyplot state."""
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
    """Running mean over a fraction of the values; windows are centered and truncated at the ends."""
    half = int(len(values) * window_fraction / 2)
    total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(values))])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


@functools.cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans of a size in pixels, which matplotlib ships."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


def hex_to_rgb(color: str) -> tuple[int, int, int]:
    """ "#e69f00" -> (230, 159, 0)."""
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def contrast_color(color: str) -> str:
    """Black or white, whichever has the higher contrast on a color (WCAG relative luminance)."""
    parts = [c / 255 for c in hex_to_rgb(color)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"
