# SPDX-License-Identifier: Apache-2.0
"""`lionjax tools` and `lionjax agent`: loaded models as tools, listed, served over MCP, or used by a language model."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import unicodedata
from pathlib import Path

from lionjax.cli.language_model import add_language_model_arguments, open_language_model

STYLES = ("tools", "visual-chatgpt", "mm-react")


def add_tools_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `lionjax tools`."""
    _add_toolbox_arguments(parser)
    parser.add_argument("--mcp", action="store_true", help="serve the tools to MCP clients, over stdio or --port")
    port_help = "with --mcp: serve HTTP at http://127.0.0.1:PORT/mcp, for this machine only"
    parser.add_argument("--port", metavar="PORT", type=int, help=port_help)
    warm_help = "with --mcp: ask each model once before serving, so that no call waits for compilation"
    parser.add_argument("--warm-up", action="store_true", help=warm_help)
    parser.add_argument("--json", action="store_true", help="print the tools as OpenAI's API takes them")


def add_agent_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `lionjax agent`."""
    _add_toolbox_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT", nargs="+", required=True, help="what to ask, one turn each")
    parser.add_argument("--style", choices=STYLES, default="tools", help="protocol of the tools (default: tools)")
    parser.add_argument("--rounds", metavar="N", type=int, default=8, help="replies of a turn at most (default: 8)")
    compatible_help = "keep what the published code of a style does where ours mends it"
    parser.add_argument("--compatible", action="store_true", help=compatible_help)
    parser.add_argument("--show", action="store_true", help="tools: send the images to the language model too")
    parser.add_argument("--max-tokens", metavar="N", type=int, default=1024, help="of a reply (default: 1024)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of samples (default: 0)")
    parser.add_argument("--json", action="store_true", help="print turns with their steps as JSON")
    add_language_model_arguments(parser)


def _add_toolbox_arguments(parser: argparse.ArgumentParser) -> None:
    dir_help = "a run or a folder of weights; folders of Grounding DINO, RAM and SAM are recognized"
    parser.add_argument("dir", metavar="DIR", type=Path, nargs="*", help=dir_help)
    work_help = "work folder, which nothing leaves (default: work)"
    parser.add_argument("--workdir", metavar="DIR", type=Path, default=Path("work"), help=work_help)
    parser.add_argument("--image", metavar="FILE", nargs="+", default=[], help="images to copy into the work folder")


def tools(args: argparse.Namespace) -> None:
    """Run `lionjax tools`. Raises UserError for folders, images and settings that do not fit."""
    from lionjax.core.errors import UserError

    if args.port is not None and not args.mcp:
        raise UserError("--port is where --mcp serves; add --mcp")
    if args.port is not None and not 0 < args.port < 65536:
        raise UserError(f"--port is {args.port}; give 1 to 65535")
    with contextlib.redirect_stdout(sys.stderr if args.mcp else sys.stdout):  # the protocol owns standard output
        toolbox, names = _open_toolbox(args, resize=False)
        if args.mcp and args.warm_up:
            from lionjax.pipelines.tools.experts import warm_up

            warm_up(toolbox.experts)
    if args.mcp:
        from lionjax.pipelines.tools import mcp_server

        mcp_server.serve(toolbox, args.port)
    elif args.json:
        print(json.dumps([tool.openai_schema for tool in toolbox.tools], indent=1))
    else:
        for name in names:
            print(name)
        for tool in toolbox.tools:
            print(f"{tool.name}({', '.join(tool.hints)}): {tool.description} Cost: {tool.cost}.")


def agent(args: argparse.Namespace) -> None:
    """Run `lionjax agent`. Raises UserError for folders, images and settings that do not fit."""
    import dataclasses

    from lionjax.core.errors import UserError
    from lionjax.pipelines.agents import styles

    if args.lm is None and not args.model:
        raise UserError("there is no language model; give --lm DIR, or --model NAME of an endpoint")
    if not all(prompt.strip() for prompt in args.prompt):
        raise UserError("--prompt is empty; give a question about the images")
    config = styles.AgentConfig(args.style, args.rounds, args.max_tokens, args.show, args.compatible)
    toolbox, names = _open_toolbox(args, resize=args.style == "visual-chatgpt")
    model = open_language_model(args, "agent")
    talk = styles.open_agent(model, toolbox, config)
    turns = []
    for number, prompt in enumerate(args.prompt):
        turn = talk.respond(prompt, names if number == 0 else ())
        turns.append(turn)
        if not args.json:
            _print_turn(turn)
        if turn.problem:
            break
    styles.write_report(args.workdir, config, turns, model)
    if args.json:
        print(json.dumps([dataclasses.asdict(turn) for turn in turns], indent=1))
    if turns[-1].problem:
        raise UserError(f"the talk ended early: {turns[-1].problem}")


def _print_turn(turn) -> None:
    print(_printable(f"> {turn.question}"))
    for step in turn.steps:
        print(_printable(f"  {step.tool} {step.arguments}\n    {step.observation}"))
    print(_printable(turn.answer))


def _printable(text: str) -> str:
    """The text without what steers a terminal; a language model wrote it."""
    is_steering = (char not in "\n\t" and unicodedata.category(char) in ("Cc", "Cs") for char in text)
    return "".join(ascii(char)[1:-1] if steers else char for char, steers in zip(text, is_steering))


def _open_toolbox(args: argparse.Namespace, resize: bool):
    """(the toolbox, names of the images that were added)."""
    from lionjax.data import images
    from lionjax.pipelines.tools.experts import load_experts
    from lionjax.pipelines.tools.toolbox import Toolbox
    from lionjax.pipelines.tools.workspace import Workspace

    opened = [images.open_image(file) for file in args.image]
    workspace = Workspace(args.workdir)
    names = [workspace.add(image, resize) for image in opened]
    return Toolbox(workspace, load_experts(args.dir)), names
