# SPDX-License-Identifier: Apache-2.0
"""The HTML report of a run: report.html, and its figures as PNG files.

Reads the files of a run folder and runs no model: `report.json` (metrics), `metrics.jsonl` (losses), `routers.json`
(mean router ratios) and `evaluation/NAME.jsonl` (one line per question). Missing files have no section. The page embeds
its images and works offline, in light and dark mode.

A line of evaluation/NAME.jsonl has `question` and `prediction`, and where they apply `truth` (a text or a list),
`score` (0..1), `image` (a file, relative to the jsonl file's folder or the run folder), `boxes`, `truth_boxes`,
`question_boxes` (x0 y0 x1 y1 in 0..1), `masks` and `truth_masks` (COCO RLE).
"""

from __future__ import annotations

import base64
import html
import importlib.resources
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from lionjax.core import params as trees
from lionjax.core.files import read_json, read_jsonl, write_atomic
from lionjax.core.types import CATEGORIES, Params, UserError
from lionjax.data.rle import decode_rle
from lionjax.evaluation.report import goodput, plots
from lionjax.evaluation.report.metric_labels import METRIC_LABELS, describe_metric, format_number
from lionjax.evaluation.report.plots import Overlay

GALLERY_SIZE = 12  # answers shown per benchmark: the first ones of the file
BASELINE_LABELS = {"blind": "image-blind", "majority": "majority"}  # key in report.json: column of the page
SPEED_FORMATS = {
    "images_per_second": "{:,.1f} images/s",
    "tokens_per_second": "{:,.0f} tokens/s",
    "generated_tokens_per_second": "{:,.0f} generated tokens/s",
    "step_seconds": "{:.3f} s per step",
    "compile_seconds": "{:.1f} s compile time",
    "peak_bytes": "{:.2f} GiB peak memory",
}


def write_report(workdir: Path | str) -> Path:
    """Write report.html and its PNG files into a run folder; returns the path of the page.

    Raises UserError if the folder holds none of the files that the report shows.
    """
    workdir = Path(workdir)
    report_file = workdir / "report.json"
    is_empty = report_file.is_file() and not report_file.stat().st_size  # after a power loss; the other files have more
    figures = {} if is_empty else read_json(report_file) or {}
    metrics = read_jsonl(workdir / "metrics.jsonl")
    losses = [row for row in metrics if row.get("loss") is not None]
    answers = {p.stem: read_jsonl(p) for p in sorted((workdir / "evaluation").glob("*.jsonl"))}
    if not (figures or losses or answers):
        raise UserError(f"{workdir} holds no report.json, metrics.jsonl or evaluation/*.jsonl; give a run folder")
    sections = [metrics_section(figures), stage_changes_section(figures), stages_section(figures, losses)]
    if losses:
        sections.append(
            render_figure(
                "loss",
                lambda dark: plots.plot_loss_curves(losses, dark),
                workdir,
                "Loss at each logged step (faint) and its running mean.",
            )
        )
    if routers := read_json(workdir / "routers.json"):
        ratios = {name: np.asarray(ratio, float) for name, ratio in routers.items()}
        sections += [
            "<h2>Adapter router ratios</h2>",
            render_figure(
                "routers",
                lambda dark: plots.plot_router_ratios(ratios, CATEGORIES, dark),
                workdir,
                "The router's weight of each adapter, averaged over channels.",
            ),
        ]
    if answers:
        names = sorted(answers, key=lambda name: not has_regions(answers[name]))
        sections += [render_legend(), filter_controls([name.replace("_", " ") for name in names])]
        sections += [render_gallery(name, answers[name], workdir) for name in names]
        sections.append(filter_script())
    sections += [goodput.render_section(figures, metrics), speed_section(figures), environment_section(figures)]
    path = workdir / "report.html"
    write_atomic(
        path, render_page(report_title(figures, workdir), with_contents("\n".join(filter(None, sections)))).encode()
    )
    return path


def with_contents(body: str) -> str:
    """The sections below a list of links to their headings, which get anchors."""
    links: list[str] = []

    def anchor(match: re.Match) -> str:
        level, title = match.groups()
        links.append(f'<a class="level{level}" href="#section{len(links)}">{title}</a>')
        return f'<h{level} id="section{len(links) - 1}">{title}</h{level}>'

    body = re.sub(r"<h([23])>(.*?)</h\1>", anchor, body)
    return f'<nav aria-label="Contents">{" ".join(links)}</nav>\n{body}'


def has_regions(rows: Sequence[Mapping]) -> bool:
    """Whether answers of a benchmark show boxes or masks, predicted or true."""
    return any(row.get(f"{kind}{part}") for row in rows for kind in ("", "truth_") for part in ("boxes", "masks"))


def filter_controls(labels: Sequence[str]) -> str:
    """The fields that choose among the answers on a page by benchmark, mark and words; `filter_script` obeys them."""
    options = "".join(f"<option>{escape(label)}</option>" for label in dict.fromkeys(labels))
    choices = '<option value="">right, wrong and unscored</option><option>right</option><option>wrong</option>'
    return (
        f'<p class="filters"><select id="benchmark"><option value="">all benchmarks</option>{options}</select> '
        f'<select id="mark">{choices}</select> '
        '<input id="words" type="search" placeholder="words of question or answer"> <span id="count"></span></p>'
    )


def filter_script() -> str:
    """The script element of `filter_controls`, for the end of the page."""
    script = importlib.resources.files("lionjax.evaluation.report").joinpath("results.js").read_text()
    return f"<script>\n{script}</script>"


def write_router_ratios(workdir: Path | str, params: Params) -> None:
    """Write the mean ratio of every router to `routers.json`: {module path: (layers, tasks, adapters)}."""
    ratios = [(path.split("/"), leaf) for path, leaf in trees.flatten(params).items()]
    ratios = [(parts[:-1], leaf) for parts, leaf in ratios if parts[-1] == "ratio"]
    common_parts = set.intersection(*(set(parts) for parts, _ in ratios)) if len(ratios) > 1 else set()
    means = {
        " ".join(part for part in parts if part not in common_parts): np.asarray(
            multihost_utils.process_allgather(jnp.mean(leaf, -1), tiled=True)
        )
        for parts, leaf in ratios
    }
    if means and jax.process_index() == 0:
        text = json.dumps({name: mean.tolist() for name, mean in means.items()})
        write_atomic(Path(workdir) / "routers.json", text.encode())


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
    """The experiment's name, else the folder's, escaped for HTML."""
    config = figures.get("config")
    name = config.get("name") if isinstance(config, Mapping) else None
    return escape(name or workdir.resolve().name)


def metrics_section(figures: Mapping) -> str:
    """The table of metrics, their 95 % intervals and their baselines; empty without metrics."""
    metrics, intervals = figures.get("metrics") or {}, figures.get("intervals") or {}
    baselines = baselines_by_metric(figures)
    columns = list(dict.fromkeys(name for values in baselines.values() for name in values))
    rows = []
    for key in [*(k for k in METRIC_LABELS if k in metrics), *(k for k in metrics if k not in METRIC_LABELS)]:
        metric = describe_metric(key)
        baseline_values = [baselines.get(key, {}).get(column) for column in columns]
        values = [metrics[key], *(value for value in baseline_values if value is not None)]
        bar_maximum = max(*values, metric.best or 1e-9, 1e-9)
        interval = "–".join(map(metric.format, intervals.get(key) or ()))
        text = metric.format(metrics[key]) + (f'<br><span class="faint">{interval}</span>' if interval else "")
        cells = [f'<td class="number">{text}</td>']
        cells += [number_cell("–" if value is None else metric.format(value)) for value in baseline_values]
        bars = "".join(
            f'<div class="bar{" model" if i == 0 else ""}" style="width:{100 * max(n, 0) / bar_maximum:.1f}%"></div>'
            for i, n in enumerate(values)
        )
        rows.append([escape(metric.label), *cells, f'<td class="bars">{bars}</td>'])
    titles = ["this run", *(BASELINE_LABELS.get(column, column) for column in columns)]
    heads = ["", *(number_cell(title, "th") for title in titles), ""]
    return f"<h2>Metrics</h2>{render_table(heads, rows)}" if rows else ""


def baselines_by_metric(figures: Mapping) -> dict[str, dict[str, float]]:
    """{metric: {baseline: value}}. `figures["baselines"][metric]` is the image-blind value, or a dict by baseline."""
    by_metric: dict[str, dict[str, float]] = {}
    for name, group in (("blind", figures.get("baselines")), ("majority", figures.get("majority"))):
        for key, value in (group or {}).items():
            by_metric.setdefault(key, {}).update(value if isinstance(value, Mapping) else {name: value})
    return by_metric


def stage_changes_section(figures: Mapping) -> str:
    """The benchmarks after each stage and what each stage changed; empty without benchmarks of an earlier stage.

    The last stage's are the run's own metrics.
    """
    measured, final = dict(figures.get("stage_metrics") or {}), figures.get("metrics") or {}
    names = [str(stage.get("name")) for stage in figures.get("stages") or ()]
    if not any(measured.values()):
        return ""
    if names and final:
        measured[names[-1]] = final
    names = [name for name in dict.fromkeys((*names, *measured)) if name in measured]
    keys = dict.fromkeys(key for name in names for key in measured[name])
    keys = [key for key in keys if sum(key in measured[name] for name in names) > 1]
    rows = []
    for key in keys:
        metric, cells, before = describe_metric(key), [], None
        for name in names:
            value = measured[name].get(key)
            text = format_value(metric.template, value)
            if value is not None and before is not None:
                change = metric.format(value - before)
                text += f" ({change if change.startswith('-') else '+' + change})"
            before = before if value is None else value
            cells.append(number_cell(text))
        rows.append([escape(metric.label), *cells])
    heads = ["", *(number_cell(f"after {name}", "th") for name in names)]
    return f"<h2>What each stage changed</h2>{render_table(heads, rows)}" if rows else ""


def stages_section(figures: Mapping, losses: Sequence[Mapping] = ()) -> str:
    """The table of training stages: steps, time, first and last loss, trained parameters, frozen check.

    The losses are the ends of the curve's running mean, which shows `losses`; without them those of report.json.
    """
    rows = []
    for stage in figures.get("stages") or ():
        curve = [row["loss"] for row in losses if str(row.get("stage", "")) == str(stage.get("name", ""))]
        mean = plots.running_mean(np.array(curve, float)) if curve else None
        first, last = (stage.get("loss_first"), stage.get("loss_last")) if mean is None else (mean[0], mean[-1])
        frozen = stage.get("frozen_unchanged")
        verdicts = {True: '<span class="right">bit for bit</span>', False: '<span class="wrong">no</span>'}
        rows.append(
            [
                escape(str(stage.get("name", ""))),
                number_cell(format_value("{:,}", stage.get("steps"))),
                number_cell(format_duration(goodput.stage_seconds(stage))),
                number_cell(format_value("{:.3f}", first)),
                number_cell(format_value("{:.3f}", last)),
                number_cell(format_value("{:,}", stage.get("trainable_parameters"))),
                verdicts.get(frozen, "–"),
            ]
        )
    heads = ["stage", *(number_cell(n, "th") for n in ("steps", "time", "first loss", "last loss"))]
    heads += [number_cell("trained parameters", "th"), "frozen parameters unchanged"]
    return f"<h2>Training</h2>{render_table(heads, rows)}" if rows else ""


def render_figure(name: str, plot_fn, workdir: Path, caption: str) -> str:
    """A <figure> for the page with light and dark variants, also written as PNG files NAME.png and NAME-dark.png."""
    sources = {}
    for suffix, dark in (("", False), ("-dark", True)):
        buffer = io.BytesIO()
        plot_fn(dark).savefig(buffer, format="png")
        write_atomic(workdir / f"{name}{suffix}.png", buffer.getvalue())
        sources[suffix] = data_url(buffer.getvalue(), "png")
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{sources["-dark"]}">'
        f'<img src="{sources[""]}" alt="{escape(caption)}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def render_legend() -> str:
    """The heading of the galleries and the legend of the box colors."""
    keys = (
        (plots.PREDICTION_COLOR, "", "prediction"),
        (plots.TRUTH_COLOR, "dashed", "ground truth"),
        (plots.QUERY_COLOR, "", "given in the question"),
    )
    samples = "".join(
        f'<span class="key {style}" style="border-color:{color}"></span>{label}' for color, style, label in keys
    )
    masks = "Masks: prediction filled, ground truth as an outline."
    return f'<h2>Answers</h2><p class="faint">Boxes:{samples}<br>{masks}</p>'


def render_gallery(name: str, rows: Sequence[Mapping], workdir: Path) -> str:
    """The first GALLERY_SIZE answers of a benchmark as cards, also written as answers_NAME.png."""
    cards, cells = [], []
    for row in rows[:GALLERY_SIZE]:
        image = annotated_image(row, workdir)
        truth = join_references(row.get("truth", ""))
        score, prediction = row.get("score"), str(row.get("prediction", row.get("answer", "")))
        mark = "" if score is None else "right" if score >= 0.5 else "wrong"
        sign = {"right": "✓ ", "wrong": "✗ "}.get(mark, "")
        attributes = f' data-benchmark="{escape(name.replace("_", " "))}" data-mark="{mark}"'
        cards.append(render_card(image, str(row.get("question", "")), sign + prediction, mark, truth, attributes))
        if image is not None:
            ink = {"right": "#00785a", "wrong": "#b4430a"}.get(mark, plots.LIGHT_THEME["ink"])
            lines = [(str(row.get("question", "")), plots.LIGHT_THEME["ink"]), (sign + prediction, ink)]
            cells.append((image, [*lines, (truth, "#656d76")]))
    if cells:
        write_atomic(workdir / f"answers_{name}.png", encode_png(plots.image_grid(cells)))
    count_text = f"The first {len(cards)} of {len(rows):,}" if len(rows) > len(cards) else f"All {len(rows)}"
    return (
        f"<h3>{escape(name.replace('_', ' '))}</h3>"
        f'<p class="faint">{count_text}, in file order.</p><div class="answers">{"".join(cards)}</div>'
    )


def render_card(
    image: Image.Image | None, question: str, prediction: str, mark: str, truth: str, attributes: str = ""
) -> str:
    """The HTML of one answer. `attributes`: further ones of its element, with a blank before each."""
    image_tag = "" if image is None else f'<img src="{data_url(encode_jpeg(image), "jpeg")}" alt="" loading="lazy">'
    parts = [("question", question, ""), ("answer", prediction, mark), ("truth", truth, "")]
    entries = "".join(f'<dt>{name}</dt><dd class="{style}">{escape(text)}</dd>' for name, text, style in parts if text)
    return f'<div class="answer"{attributes}>{image_tag}<dl>{entries}</dl></div>'


def join_references(references: str | Sequence[str], max_chars: int = 80) -> str:
    """The first accepted answers that fit into `max_chars`, and the number of others."""
    references = [references] if isinstance(references, str) else list(dict.fromkeys(map(str, references)))
    visible = references[:1]
    for truth in references[1:]:
        if sum(map(len, visible)) + len(truth) > max_chars:
            break
        visible.append(truth)
    num_omitted = len(references) - len(visible)
    return " · ".join(visible) + (f" (and {num_omitted} more)" if num_omitted else "")


def annotated_image(row: Mapping, workdir: Path) -> Image.Image | None:
    """The image of one answer with boxes and masks of question, truth and prediction; None without an image file."""
    name = row.get("image")
    folders = (workdir / "evaluation", workdir)
    path = next((f / name for f in folders if (f / name).is_file()), None) if name else None
    if path is None:
        return None
    overlays = []
    for kind, color, dashed in (
        ("question_", plots.QUERY_COLOR, False),
        ("truth_", plots.TRUTH_COLOR, True),
        ("", plots.PREDICTION_COLOR, False),
    ):
        overlays += [Overlay(box, color=color, dashed=dashed) for box in row.get(kind + "boxes") or ()]
        masks = map(decode_rle, row.get(kind + "masks") or ())
        overlays += [Overlay(color=color, dashed=dashed, mask=mask) for mask in masks]
    return plots.draw_overlays(path, overlays)


def speed_section(figures: Mapping) -> str:
    """Throughput, compile time and memory in one line; empty without them."""
    speed = figures.get("speed") or {}
    units = {"peak_bytes": 2**30}
    values = [(key, speed[key] / units.get(key, 1)) for key in SPEED_FORMATS if speed.get(key) is not None]
    texts = [SPEED_FORMATS[key].format(value) for key, value in values]
    return f"<h2>Speed and memory</h2><p>{escape(', '.join(texts))}.</p>" if texts else ""


def environment_section(figures: Mapping) -> str:
    """The torch round-trip result, the environment, and the config."""
    exact = figures.get("round_trip_exact")
    rows = [] if exact is None else [["PyTorch round trip", "exact" if exact else "not exact"]]
    environment = figures.get("environment") or {}
    environment = environment if isinstance(environment, Mapping) else {"environment": environment}
    rows += [[escape(str(key)), escape(str(value))] for key, value in environment.items()]
    config = figures.get("config")
    text = config if isinstance(config, str) else json.dumps(config, indent=1) if config else ""
    details = f"<details><summary>Config</summary><pre>{escape(text)}</pre></details>" if text else ""
    return f"<h2>Environment and config</h2>{render_table([], rows)}{details}" if rows or details else ""


def render_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; texts that are not <th> or <td> elements are wrapped in one."""
    head_cells = "".join(cell if cell.startswith("<th") else f"<th>{cell}</th>" for cell in heads)
    body = "".join(f"<tr>{''.join(c if c.startswith('<td') else f'<td>{c}</td>' for c in row)}</tr>" for row in rows)
    head = f"<thead><tr>{head_cells}</tr></thead>" if head_cells else ""
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>' if rows else ""


def number_cell(text: str, tag: str = "td") -> str:
    """A right-aligned table cell."""
    return f'<{tag} class="number">{escape(text)}</{tag}>'


def format_value(template: str, value: Any) -> str:
    """The value as text, without a minus before zero; "–" for None."""
    return "–" if value is None else format_number(template, value)


def format_duration(seconds: float | None) -> str:
    """90 -> "1 min 30 s"."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, remaining_seconds = divmod(round(seconds), 60)
    return f"{minutes} min {remaining_seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


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
