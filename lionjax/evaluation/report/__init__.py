# SPDX-License-Identifier: Apache-2.0
"""The HTML report of a run: curves, tables and answers."""


def __getattr__(name: str):
    if name != "report":
        raise AttributeError(f"lionjax.evaluation.report has no attribute {name!r}")
    from lionjax.evaluation.report.html import write_report

    return write_report
