# SPDX-License-Identifier: Apache-2.0
"""The time section of the HTML report (goodput): one bar per stage, a table, and the time of background work."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

# The parts of `training.run_log.PhaseTimer` in drawing order: (label, color).
TIME_PARTS = {
    "step": ("updates", "#0072b2"),
    "data": ("waiting for data", "#e69f00"),
    "save": ("saving checkpoints", "#009e73"),
    "compile": ("compiling", "#56b4e9"),
    "start": ("startup", "#cc79a7"),
    "log": ("writing metrics", "#8b949e"),
    "evaluate": ("evaluation", "#f0e442"),
    "lost": ("steps recomputed after a restart", "#d55e00"),
    "away": ("downtime", "#d0d7de"),
}


def seconds_by_stage(figures: Mapping, lines: Iterable[Mapping]) -> dict[str, dict[str, float]]:
    """{stage: {part: seconds}}: finished stages from report.json, the running one from its lines of metrics.jsonl."""
    finished = {
        str(stage.get("name")): dict(stage["seconds_by_part"])
        for stage in figures.get("stages") or ()
        if stage.get("seconds_by_part")
    }
    running: dict[str, dict[str, float]] = {}
    for line in lines:
        name = str(line.get("stage"))
        if name in finished:
            continue
        sums = running.setdefault(name, {})
        for part, seconds in (line.get("seconds") or {}).items():
            sums[part] = sums.get(part, 0.0) + seconds
    return finished | {name: sums for name, sums in running.items() if sums}


def stage_seconds(stage: Mapping) -> float | None:
    """All seconds of a stage of report.json, as in its bar; `seconds` leaves out those lost or away."""
    parts = stage.get("seconds_by_part")
    return sum(parts.values()) if parts else stage.get("seconds")


def seconds_outside(figures: Mapping, stages: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """{part: seconds} of the run's total in report.json that no stage has, such as the benchmarks after training."""
    outside = {}
    for part, seconds in (figures.get("seconds") or {}).items():
        rest = seconds - sum(parts.get(part, 0.0) for parts in stages.values())
        if rest > 0.01:
            outside[part] = rest
    return outside


def render_section(figures: Mapping, lines: Sequence[Mapping]) -> str:
    """The section of the page; empty without measured times."""
    stages = seconds_by_stage(figures, lines)
    if outside := seconds_outside(figures, stages):
        stages["outside the stages"] = outside
    total: dict[str, float] = {}
    for seconds in stages.values():
        for part, value in seconds.items():
            total[part] = total.get(part, 0.0) + value
    total_seconds = sum(total.values())
    if total_seconds <= 0:
        return ""
    rows = []
    for part in [*(p for p in TIME_PARTS if p in total), *(p for p in total if p not in TIME_PARTS)]:
        label, color = TIME_PARTS.get(part, (part, "#8b949e"))
        key = f'<span class="key" style="border-color:{color};background:{color}"></span>'
        fraction = total[part] / total_seconds
        rows.append(
            f"<tr><td>{key}{html.escape(label)}</td><td class='number'>{total[part]:,.1f} s</td>"
            f"<td class='number'>{fraction:.1%}</td></tr>"
        )
    longest = max(sum(seconds.values()) for seconds in stages.values())
    rows.append(f"<tr><td>all</td><td class='number'>{total_seconds:,.1f} s</td><td class='number'>100.0%</td></tr>")
    bars = "".join(
        f"<tr><td>{html.escape(name)}</td><td class='number'>{sum(seconds.values()):,.1f} s</td>"
        f'<td style="width:70%">{render_bar(seconds, longest)}</td></tr>'
        for name, seconds in stages.items()
    )
    update_fraction = total.get("step", 0.0) / total_seconds
    return (
        f"<h2>Time</h2><p>{update_fraction:.1%} of {total_seconds:,.1f} s were training updates."
        f"{describe_background(figures, total)}</p>"
        f'<div class="scroll"><table><tbody>{bars}</tbody></table></div>'
        f'<div class="scroll"><table><tbody>{"".join(rows)}</tbody></table></div>'
    )


def render_bar(seconds: Mapping[str, float], max_seconds: float) -> str:
    """A bar with the parts of a stage; its width is proportional to the time, 100 % for `max_seconds`."""
    segments = []
    for part in [*(p for p in TIME_PARTS if p in seconds), *(p for p in seconds if p not in TIME_PARTS)]:
        label, color = TIME_PARTS.get(part, (part, "#8b949e"))
        width = 100 * seconds[part] / max_seconds if max_seconds else 0.0
        segments.append(
            f'<span title="{html.escape(label)}: {seconds[part]:,.1f} s" style="display:inline-block;height:1rem;'
            f'width:{width:.2f}%;background:{color}"></span>'
        )
    return f'<div style="white-space:nowrap;font-size:0">{"".join(segments)}</div>'


def describe_background(figures: Mapping, total: Mapping[str, float]) -> str:
    """A sentence with the seconds of background data loading and checkpoint writing, and how long training waited."""
    background: dict[str, float] = {}
    for stage in figures.get("stages") or ():
        for part, seconds in (stage.get("seconds_behind") or {}).items():
            background[part] = background.get(part, 0.0) + seconds
    labels = {"data": "loading data", "save": "writing checkpoints"}
    sentences = [
        f"{labels[part]} took {seconds:,.1f} s (training waited {total.get(part, 0.0):,.1f} s of them)"
        for part, seconds in background.items()
        if part in labels and seconds > 0
    ]
    return f" In the background, {'; '.join(sentences)}." if sentences else ""
