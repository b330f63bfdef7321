# SPDX-License-Identifier: Apache-2.0
"""Where the time of a run went, for its page: one bar a stage, a table, and what was done behind the devices' backs."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

# The parts of `training.journal.Clock` in the order in which they are drawn: (words, colour).
TIME_PARTS = {
    "step": ("updates", "#0072b2"),
    "data": ("waiting for batches", "#e69f00"),
    "save": ("saving", "#009e73"),
    "compile": ("compiling", "#56b4e9"),
    "start": ("starting", "#cc79a7"),
    "log": ("writing metrics", "#8b949e"),
    "evaluate": ("evaluation", "#f0e442"),
    "lost": ("done again after a restart", "#d55e00"),
    "away": ("not running", "#d0d7de"),
}


def seconds_by_stage(figures: Mapping, lines: Iterable[Mapping]) -> dict[str, dict[str, float]]:
    """{stage: {part: seconds}}: of finished stages from report.json, of the one that runs from its lines of metrics."""
    found = {
        str(stage.get("name")): dict(stage["seconds_by_part"])
        for stage in figures.get("stages") or ()
        if stage.get("seconds_by_part")
    }
    running: dict[str, dict[str, float]] = {}
    for line in lines:
        name = str(line.get("stage"))
        if name in found:
            continue
        sums = running.setdefault(name, {})
        for part, seconds in (line.get("seconds") or {}).items():
            sums[part] = sums.get(part, 0.0) + seconds
    return found | {name: sums for name, sums in running.items() if sums}


def render_section(figures: Mapping, lines: Sequence[Mapping]) -> str:
    """The part of the page; empty where nothing was measured."""
    stages = seconds_by_stage(figures, lines)
    if asked := (figures.get("seconds") or {}).get("evaluate"):
        stages["afterwards"] = {"evaluate": asked}
    total: dict[str, float] = {}
    for seconds in stages.values():
        for part, value in seconds.items():
            total[part] = total.get(part, 0.0) + value
    everything = sum(total.values())
    if everything <= 0:
        return ""
    rows = []
    for part in [*(p for p in TIME_PARTS if p in total), *(p for p in total if p not in TIME_PARTS)]:
        words, colour = TIME_PARTS.get(part, (part, "#8b949e"))
        key = f'<span class="key" style="border-color:{colour};background:{colour}"></span>'
        share = total[part] / everything
        rows.append(
            f"<tr><td>{key}{html.escape(words)}</td><td class='number'>{total[part]:,.1f} s</td>"
            f"<td class='number'>{share:.1%}</td></tr>"
        )
    longest = max(sum(seconds.values()) for seconds in stages.values())
    bars = "".join(
        f'<tr><td>{html.escape(name)}</td><td style="width:80%">{render_bar(seconds, longest)}</td></tr>'
        for name, seconds in stages.items()
    )
    good = total.get("step", 0.0) / everything
    return (
        f"<h2>Where the time went</h2><p>{good:.1%} of {everything:,.1f} s were updates.{describe_background(figures, total)}</p>"
        f'<div class="scroll"><table><tbody>{bars}</tbody></table></div>'
        f'<div class="scroll"><table><tbody>{"".join(rows)}</tbody></table></div>'
    )


def render_bar(seconds: Mapping[str, float], max_seconds: float) -> str:
    """The parts of a stage side by side; the longest stage fills the width."""
    pieces = []
    for part in [*(p for p in TIME_PARTS if p in seconds), *(p for p in seconds if p not in TIME_PARTS)]:
        words, colour = TIME_PARTS.get(part, (part, "#8b949e"))
        width = 100 * seconds[part] / max_seconds if max_seconds else 0.0
        pieces.append(
            f'<span title="{html.escape(words)}: {seconds[part]:,.1f} s" style="display:inline-block;height:1rem;'
            f'width:{width:.2f}%;background:{colour}"></span>'
        )
    return f'<div style="white-space:nowrap;font-size:0">{"".join(pieces)}</div>'


def describe_background(figures: Mapping, total: Mapping[str, float]) -> str:
    """In words: how long batches and checkpoints took to make, and how much of that the updates waited for."""
    done: dict[str, float] = {}
    for stage in figures.get("stages") or ():
        for part, seconds in (stage.get("seconds_behind") or {}).items():
            done[part] = done.get(part, 0.0) + seconds
    words = {"data": "making batches", "save": "writing checkpoints"}
    said = [
        f"{words[part]} took {seconds:,.1f} s, of which updates waited {total.get(part, 0.0):,.1f} s"
        for part, seconds in done.items()
        if part in words and seconds > 0
    ]
    return f" Beside them, {'; '.join(said)}." if said else ""
