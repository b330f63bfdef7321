# SPDX-License-Identifier: Apache-2.0
"""A run as one page: report.html, with its pictures beside it as PNGs.

Reads what a run leaves in its folder and runs no model: `report.json` (figures), `metrics.jsonl` (losses),
`routers.json` (mean router ratios) and `evaluation/NAME.jsonl` (one line for each question asked).
What is not there has no section. The page holds its own pictures and works offline, light or dark.

A line of evaluation/NAME.jsonl has `question`, `prediction`, and where they apply `truth` (text or
several), `score` (0..1), `image` (a file, relative to the line's own folder or the run's), `boxes`,
`truth_boxes`, `question_boxes` (x0 y0 x1 y1 in 0..1), `masks` and `truth_masks` (COCO run lengths).
"""

from __future__ import annotations

import base64
import html
import importlib.resources
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from lionjax.core import params as trees
from lionjax.core.types import CATEGORIES, Params, UserError
from lionjax.evaluation.report import goodput, plots
from lionjax.evaluation.report.plots import Overlay

GALLERY_SIZE = 12  # answers of each benchmark on the page: its first ones, not chosen
METRIC_LABELS = {  # key in report.json: what it is, how it prints
    "caption_cider": ("Captions, CIDEr-D", "{:.3f}"),
    "vqa_accuracy": ("Questions, VQA accuracy", "{:.1%}"),
    "rec_accuracy_50": ("Expression to box, IoU ≥ 0.5", "{:.1%}"),
    "rec_accuracy_50_teacher_forced": ("Expression to box behind the true words", "{:.1%}"),
    "res_ciou": ("Expression to mask, cumulative IoU", "{:.1%}"),
    "res_giou": ("Expression to mask, mean IoU", "{:.1%}"),
    "reg_cider": ("Box to expression, CIDEr-D", "{:.3f}"),
    "box_vqa_accuracy": ("Questions about a box, VQA accuracy", "{:.1%}"),
    "phrase_recall_1": ("Grounded captions, phrases found with their boxes", "{:.1%}"),
    "phrase_recall_1_teacher_forced": ("Phrases of true captions to boxes", "{:.1%}"),
    "pope_f1": ("Is it there? F1", "{:.1%}"),
    "vsr_accuracy": ("Spatial statements, accuracy", "{:.1%}"),
    "tag_f1": ("Tags, F1", "{:.1%}"),
    "caption_bleu4": ("Captions, BLEU-4", "{:.3f}"),
    "caption_rouge_l": ("Captions, ROUGE-L", "{:.3f}"),
    "caption_cider_untagged": ("Captions without tags, CIDEr-D", "{:.3f}"),
    "vqa_accuracy_untagged": ("Questions without tags, VQA accuracy", "{:.1%}"),
    "pope_f1_untagged": ("Is it there? Without tags, F1", "{:.1%}"),
    "pope_accuracy": ("Is it there? Accuracy", "{:.1%}"),
}
SPEED_FORMATS = {
    "images_per_second": "{:,.1f} images/s",
    "tokens_per_second": "{:,.0f} tokens/s",
    "generated_tokens_per_second": "{:,.0f} tokens/s generated",
    "step_seconds": "{:.3f} s a step",
    "compile_seconds": "{:.1f} s of compiling",
    "peak_bytes": "{:.2f} GiB of memory at the peak",
}


def write_report(workdir: Path | str) -> Path:
    """Write report.html and its PNGs into the folder of a run; returns the page's path.

    Raises UserError when the folder holds nothing to show.
    """
    workdir = Path(workdir)
    figures = read_json(workdir / "report.json") or {}
    metrics = read_jsonl(workdir / "metrics.jsonl")
    losses = [row for row in metrics if "loss" in row]
    answers = {p.stem: read_jsonl(p) for p in sorted((workdir / "evaluation").glob("*.jsonl"))}
    if not (figures or losses or answers):
        raise UserError(f"{workdir} holds no report.json, metrics.jsonl or evaluation/*.jsonl")
    sections = [metrics_section(figures), stages_section(figures)]
    if losses:
        sections.append(
            render_figure(
                "loss",
                lambda dark: plots.plot_loss_curves(losses, dark),
                workdir,
                "Loss at each logged step, faint, and its running mean.",
            )
        )
    if routers := read_json(workdir / "routers.json"):
        ratios = {name: np.asarray(ratio, float) for name, ratio in routers.items()}
        sections += [
            "<h2>Whom each layer listens to</h2>",
            render_figure(
                "routers",
                lambda dark: plots.plot_router_ratios(ratios, CATEGORIES, dark),
                workdir,
                "Mean over the channels of the ratio that the router gives each adapter.",
            ),
        ]
    if answers:
        sections.append(render_legend())
        sections += [render_gallery(name, rows, workdir) for name, rows in answers.items()]
    sections += [goodput.render_section(figures, metrics), speed_section(figures), environment_section(figures)]
    path = workdir / "report.html"
    write_atomic(path, render_page(report_title(figures, workdir), "\n".join(filter(None, sections))).encode())
    return path


def write_router_ratios(workdir: Path | str, params: Params) -> None:
    """Keep the mean ratio of every router in `routers.json`: {where: (layers, tasks, adapters)}."""
    ratios = [(path.split("/"), leaf) for path, leaf in trees.flatten(params).items()]
    ratios = [(parts[:-1], leaf) for parts, leaf in ratios if parts[-1] == "ratio"]
    everywhere = set.intersection(*(set(parts) for parts, _ in ratios)) if len(ratios) > 1 else set()
    means = {
        " ".join(part for part in parts if part not in everywhere): np.asarray(
            multihost_utils.process_allgather(jnp.mean(leaf, -1), tiled=True)
        )
        for parts, leaf in ratios
    }
    if means and jax.process_index() == 0:
        text = json.dumps({name: mean.tolist() for name, mean in means.items()})
        write_atomic(Path(workdir) / "routers.json", text.encode())


def read_json(path: Path) -> Any:
    """What a JSON file holds, None if there is none. Raises UserError when it is broken."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error


def update_report(folder: Path, figures: dict[str, Any]) -> None:
    """Put figures into a run's report.json; what stands there otherwise stays."""
    path = folder / "report.json"
    write_atomic(path, (json.dumps((read_json(path) or {}) | figures, indent=1) + "\n").encode())


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSON-lines file. A last line cut short, as a killed run leaves it, is passed over."""
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is no JSON: {error}") from error
    return rows


def write_atomic(path: Path, content: bytes) -> None:
    """A whole file or none: written beside its place and renamed."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def render_page(heading: str, body: str) -> str:
    """The HTML document."""
    style = importlib.resources.files("lionjax.evaluation.report").joinpath("report.css").read_text()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{heading}</title>
<style>
{style}</style>
</head>
<body>
<h1>{heading}</h1>
{body}
</body>
</html>
"""


def report_title(figures: Mapping, workdir: Path) -> str:
    config = figures.get("config")
    name = config.get("name") if isinstance(config, Mapping) else None
    return escape(name or workdir.resolve().name)


def metrics_section(figures: Mapping) -> str:
    """The table of metrics beside their baselines, with 95 % intervals where they were drawn."""
    metrics, between = figures.get("metrics") or {}, figures.get("intervals") or {}
    baselines = baselines_by_metric(figures)
    columns = list(dict.fromkeys(name for values in baselines.values() for name in values))
    rows = []
    for key in [*(k for k in METRIC_LABELS if k in metrics), *(k for k in metrics if k not in METRIC_LABELS)]:
        words, form = METRIC_LABELS.get(key, (key.replace("_", " "), "{:.3f}"))
        others = [baselines.get(key, {}).get(column) for column in columns]
        numbers = [metrics[key], *(value for value in others if value is not None)]
        most = max(1.0, *numbers) if "%" in form else max(*numbers, 1e-9, 0)
        drawn = "–".join(form.format(edge) for edge in between.get(key) or ())
        said = f'{form.format(metrics[key])}<br><span class="faint">{drawn}</span>' if drawn else ""
        cells = [f'<td class="number">{said or form.format(metrics[key])}</td>']
        cells += [number_cell("–" if value is None else form.format(value)) for value in others]
        bars = "".join(
            f'<div class="bar{" model" if i == 0 else ""}" style="width:{100 * max(n, 0) / most:.1f}%"></div>'
            for i, n in enumerate(numbers)
        )
        rows.append([escape(words), *cells, f'<td class="bars">{bars}</td>'])
    heads = ["", number_cell("this run", "th"), *(number_cell(column, "th") for column in columns), ""]
    return f"<h2>How well</h2>{render_table(heads, rows)}" if rows else ""


def baselines_by_metric(figures: Mapping) -> dict[str, dict[str, float]]:
    """{metric: {name: value}}. In `baselines` a metric has one number, the blind model's, or several with names."""
    found: dict[str, dict[str, float]] = {}
    for name, group in (("blind", figures.get("baselines")), ("majority", figures.get("majority"))):
        for key, value in (group or {}).items():
            found.setdefault(key, {}).update(value if isinstance(value, Mapping) else {name: value})
    return found


def stages_section(figures: Mapping) -> str:
    """The table of stages: how long, from which loss to which, what trained, what stayed."""
    rows = []
    for stage in figures.get("stages") or ():
        frozen = stage.get("frozen_unchanged")
        said = {True: '<span class="right">bit for bit</span>', False: '<span class="wrong">no</span>'}
        rows.append(
            [
                escape(str(stage.get("name", ""))),
                number_cell(format_value("{:,}", stage.get("steps"))),
                number_cell(format_duration(stage.get("seconds"))),
                number_cell(format_value("{:.3f}", stage.get("loss_first"))),
                number_cell(format_value("{:.3f}", stage.get("loss_last"))),
                number_cell(format_value("{:,}", stage.get("trainable_parameters"))),
                said.get(frozen, "–"),
            ]
        )
    heads = ["stage", *(number_cell(n, "th") for n in ("steps", "time", "first loss", "last loss"))]
    heads += [number_cell("parameters trained", "th"), "frozen half unchanged"]
    return f"<h2>Training</h2>{render_table(heads, rows)}" if rows else ""


def render_figure(name: str, plot_fn, workdir: Path, caption: str) -> str:
    """A figure, light and dark, as PNG files and as a picture of the page."""
    sources = {}
    for look, dark in (("", False), ("-dark", True)):
        buffer = io.BytesIO()
        plot_fn(dark).savefig(buffer, format="png")
        write_atomic(workdir / f"{name}{look}.png", buffer.getvalue())
        sources[look] = data_url(buffer.getvalue(), "png")
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{sources["-dark"]}">'
        f'<img src="{sources[""]}" alt="{escape(caption)}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def render_legend() -> str:
    """What the colours of the boxes mean."""
    keys = (
        (plots.PREDICTION_COLOR, "", "answered"),
        (plots.TRUTH_COLOR, "dashed", "true"),
        (plots.QUERY_COLOR, "", "asked about"),
    )
    marks = "".join(
        f'<span class="key {style}" style="border-color:{colour}"></span>{words}' for colour, style, words in keys
    )
    return f'<h2>Answers</h2><p class="faint">Boxes:{marks}</p>'


def render_gallery(name: str, rows: Sequence[Mapping], workdir: Path) -> str:
    """The first answers of a benchmark as cards, and the same as one PNG."""
    cards, cells = [], []
    for row in rows[:GALLERY_SIZE]:
        picture = annotated_image(row, workdir)
        truth = join_references(row.get("truth", ""))
        score, said = row.get("score"), str(row.get("prediction", ""))
        mark = "" if score is None else "right" if score >= 0.5 else "wrong"
        sign = {"right": "✓ ", "wrong": "✗ "}.get(mark, "")
        cards.append(render_card(picture, str(row.get("question", "")), sign + said, mark, truth))
        if picture is not None:
            ink = {"right": "#00785a", "wrong": "#b4430a"}.get(mark, plots.LIGHT_THEME["ink"])
            lines = [(str(row.get("question", "")), plots.LIGHT_THEME["ink"]), (sign + said, ink)]
            cells.append((picture, [*lines, (truth, "#656d76")]))
    if cells:
        write_atomic(workdir / f"answers_{name}.png", encode_png(plots.image_grid(cells)))
    shown = f"The first {len(cards)} of {len(rows):,}" if len(rows) > len(cards) else f"All {len(rows)}"
    return (
        f"<h3>{escape(name.replace('_', ' '))}</h3>"
        f'<p class="faint">{shown}, as they came.</p><div class="answers">{"".join(cards)}</div>'
    )


def render_card(picture: Image.Image | None, question: str, prediction: str, mark: str, truth: str) -> str:
    image = "" if picture is None else f'<img src="{data_url(encode_jpeg(picture), "jpeg")}" alt="" loading="lazy">'
    parts = [("question", question, ""), ("answer", prediction, mark), ("truth", truth, "")]
    words = "".join(f'<dt>{name}</dt><dd class="{style}">{escape(text)}</dd>' for name, text, style in parts if text)
    return f'<div class="answer">{image}<dl>{words}</dl></div>'


def join_references(references: str | Sequence[str], max_chars: int = 80) -> str:
    """The first of several accepted answers, further ones while there is room, how many are left."""
    references = [references] if isinstance(references, str) else list(dict.fromkeys(map(str, references)))
    shown = references[:1]
    for truth in references[1:]:
        if sum(map(len, shown)) + len(truth) > max_chars:
            break
        shown.append(truth)
    left = len(references) - len(shown)
    return " · ".join(shown) + (f" (and {left} more)" if left else "")


def annotated_image(row: Mapping, workdir: Path) -> Image.Image | None:
    """The picture of one answer with what was asked about, answered and true marked on it."""
    name = row.get("image")
    folders = (workdir / "evaluation", workdir)
    path = next((f / name for f in folders if (f / name).is_file()), None) if name else None
    if path is None:
        return None
    marks = []
    for kind, colour, dashed in (
        ("question_", plots.QUERY_COLOR, False),
        ("truth_", plots.TRUTH_COLOR, True),
        ("", plots.PREDICTION_COLOR, False),
    ):
        marks += [Overlay(box, color=colour, dashed=dashed) for box in row.get(kind + "boxes") or ()]
        masks = decode_rles(row.get(kind + "masks") or ())
        marks += [Overlay(color=colour, dashed=dashed, mask=mask) for mask in masks]
    return plots.draw_overlays(path, marks)


def decode_rles(masks: Iterable[Mapping]) -> list[np.ndarray]:
    """Masks (H, W) from COCO's compressed run lengths {"size": [H, W], "counts": text}."""
    from pycocotools import mask as coco

    return [coco.decode({**mask, "counts": str(mask["counts"]).encode()}).astype(bool) for mask in masks]


def speed_section(figures: Mapping) -> str:
    given = figures.get("speed") or {}
    units = {"peak_bytes": 2**30}
    known = [(key, given[key] / units.get(key, 1)) for key in SPEED_FORMATS if given.get(key) is not None]
    words = [SPEED_FORMATS[key].format(value) for key, value in known]
    return f"<h2>How fast</h2><p>{escape(', '.join(words))}.</p>" if words else ""


def environment_section(figures: Mapping) -> str:
    """What else the report says: round trip, environment, config."""
    exact = figures.get("round_trip_exact")
    rows = [] if exact is None else [["To PyTorch and back", "exact" if exact else "not exact"]]
    where = figures.get("environment") or {}
    where = where if isinstance(where, Mapping) else {"environment": where}
    rows += [[escape(str(key)), escape(str(value))] for key, value in where.items()]
    config = figures.get("config")
    text = config if isinstance(config, str) else json.dumps(config, indent=1) if config else ""
    folded = f"<details><summary>Config</summary><pre>{escape(text)}</pre></details>" if text else ""
    return f"<h2>Where and with what</h2>{render_table([], rows)}{folded}" if rows or folded else ""


def render_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a cell that is not yet one becomes a plain one."""
    top = "".join(cell if cell.startswith("<th") else f"<th>{cell}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(c if c.startswith('<td') else f'<td>{c}</td>' for c in row)}</tr>" for row in rows)
    head = f"<thead><tr>{top}</tr></thead>" if top else ""
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>' if rows else ""


def number_cell(text: str, tag: str = "td") -> str:
    return f'<{tag} class="number">{escape(text)}</{tag}>'


def format_value(template: str, value: Any) -> str:
    return "–" if value is None else template.format(value)


def format_duration(seconds: float | None) -> str:
    """90 -> "1 min 30 s"."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def escape(text: str) -> str:
    return html.escape(text, quote=True)


def data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def encode_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
