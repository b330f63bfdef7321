# SPDX-License-Identifier: Apache-2.0
"""`ConversionReport`: what a conversion read, wrote and skipped; `lionjax convert` prints it."""

from __future__ import annotations

import dataclasses
import re

from lionjax.convert.formats.checkpoint_format import CheckpointFormat
from lionjax.convert.io.reader import CheckpointTensors
from lionjax.convert.mapping.plan import ConversionPlan


@dataclasses.dataclass
class ConversionReport:
    """What a conversion read, wrote and skipped."""

    format_name: str
    tensors: int = 0  # number of torch tensors
    parameters: int = 0  # number of parameter arrays, layers stacked
    bytes: int = 0
    seconds: float = 0.0
    files: tuple[str, ...] = ()  # written
    ignored: dict[str, str] = dataclasses.field(default_factory=dict)  # torch name -> reason
    tied: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # torch name -> names of its copies
    nan_tensors: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        rate = self.bytes / max(self.seconds, 1e-9) / 1e9
        lines = [
            f"{self.format_name}: {self.tensors} torch tensors, {self.parameters} parameters, "
            f"{self.bytes / 1e9:.3f} GB in {self.seconds:.1f} s ({rate:.2f} GB/s)",
            f"written: {', '.join(self.files)}",
        ]
        lines += [f"tied: {name} = {', '.join(copies)}" for name, copies in self.tied.items()]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.ignored.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            lines.append(f"skipped ({reason}): {', '.join(names[:4])}{more}")
        lines += [f"warning: {name} holds NaN" for name in self.nan_tensors]
        return "\n".join(lines)


def make_report(
    checkpoint_format: CheckpointFormat, plan: ConversionPlan, tensors: CheckpointTensors
) -> ConversionReport:
    """The report of a plan, without files and seconds; `bytes` counts the outputs."""
    tied = {mapped.torch_keys[0]: mapped.tied_keys for mapped in plan.mapped_tensors if mapped.tied_keys}
    ignored = tensors.skipped | {name: _ignore_reason(pattern) for name, pattern in plan.ignored.items()}
    count = sum(len(mapped.torch_keys) + len(mapped.tied_keys) for mapped in plan.mapped_tensors)
    paths = {path for mapped in plan.mapped_tensors for path in mapped.mapping.flax_paths}
    size = sum(spec.nbytes for spec in plan.output_specs.values())
    return ConversionReport(checkpoint_format.name, count, len(paths), size, ignored=ignored, tied=tied)


def _ignore_reason(pattern: str) -> str:
    """The reason in a pattern's last comment, (?#reason), else the pattern itself."""
    comments = re.findall(r"\(\?#([^)]*)\)", pattern)
    return comments[-1] if comments else f"matches {pattern}"
