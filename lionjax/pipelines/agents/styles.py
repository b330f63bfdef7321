# SPDX-License-Identifier: Apache-2.0
"""Open an agent in one of the styles, and write the report of its talk."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lionjax.core.files import write_json
from lionjax.pipelines.agents.mm_react import MmReactAgent
from lionjax.pipelines.agents.tool_calling import ToolCallingAgent
from lionjax.pipelines.agents.turns import Agent, AgentConfig, Turn
from lionjax.pipelines.agents.visual_chatgpt import VisualChatGptAgent
from lionjax.pipelines.completion import LanguageModel
from lionjax.pipelines.tools.toolbox import Toolbox

AGENTS = {"tools": ToolCallingAgent, "visual-chatgpt": VisualChatGptAgent, "mm-react": MmReactAgent}
REPORT_FILE = "report.json"


def open_agent(model: LanguageModel, toolbox: Toolbox, config: AgentConfig) -> Agent:
    """A new conversation in the style of the config."""
    return AGENTS[config.style](model, toolbox, config)


def write_report(folder: Path, config: AgentConfig, turns: Sequence[Turn], model: LanguageModel) -> dict[str, Any]:
    """Write report.json: settings, turns with their steps, and the use of the language model; return its content."""
    report = {
        "agent": dataclasses.asdict(config),
        "language_model": model.describe(),
        "turns": [dataclasses.asdict(turn) for turn in turns],
    }
    write_json(folder / REPORT_FILE, report)
    return report
