# SPDX-License-Identifier: Apache-2.0
"""The command line: `lionjax VERB`. Each verb is a function that imports what it needs when it runs.

A mistake of the user is one sentence and exit code 2. Anything unexpected is one sentence and exit
code 1; with LIONJAX_TRACEBACK=1 the traceback comes before it. Ctrl-C ends with 130.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lionjax.cli import convert as weights_command
from lionjax.cli import plan as plan_command
from lionjax.cli.commands import benchmark, convert, data, demo, evaluate, generate, plan, report, show, tag, train
from lionjax.cli.errors import StrictParser, UsageError, describe_error
from lionjax.planner import libtpu

# Verbs


# Their arguments


def build_parsers() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The whole command line, and its verbs by name. Cheap: nothing of the package is imported."""
    whole = StrictParser(prog="lionjax", description="Region-aware multimodal language models in JAX.")
    whole.add_argument("--version", action="store_true", help="print the version and stop")
    verbs = whole.add_subparsers(metavar="VERB", title="verbs", dest="verb")

    verb = add_verb(verbs, train, extra_args_help="Any field of the config can be set: --stages.0.steps 20.")
    verb.add_argument("config", metavar="CONFIG", help="a Python file, such as configs/tiny_lion.py")
    verb.add_argument("--workdir", metavar="DIR", type=Path, required=True, help="the run's folder")

    verb = add_verb(verbs, evaluate, extra_args_help="Any field of --source can be set: --share 0.")
    verb.add_argument("dir", metavar="DIR", type=Path, help="a run, or a folder of weights")
    names = "caption, vqa, relation, existence, rec, res, reg, grounded, box_vqa, tags, choice, "
    names += "one source's as coco/vqa, another codec's as rec@digits, or all"
    verb.add_argument("--benchmark", metavar="NAME", required=True, help=names)
    verb.add_argument("--limit", type=int, help="ask only so many questions of each")
    verb.add_argument("--split", default="heldout", help="train, validation or heldout")
    verb.add_argument("--source", help="other data than the run's: a folder or annotation file")
    verb.add_argument("--images", metavar="DIR", default="", help="where a file's pictures lie")
    verb.add_argument("--answers", metavar="FILE", default="", help="the answers to VQA questions")
    verb.add_argument("--json", action="store_true", help="print the figures as JSON")

    verb = add_verb(verbs, generate)
    verb.add_argument("dir", metavar="DIR", type=Path, help="a run, or a folder of weights")
    verb.add_argument("--image", metavar="FILE", required=True, help="a JPEG, PNG or WebP picture")
    verb.add_argument("--prompt", metavar="TEXT", required=True, help="what to ask")
    verb.add_argument("--box", metavar="X0,Y0,X1,Y1", help="what is asked about, in 0..1")
    verb.add_argument("--tagger", metavar="DIR", type=Path, help="a folder with RAM, for the tags")
    words = "tokens that a prompt may have; by default as in training"
    verb.add_argument("--prompt-length", type=int, help=words)
    verb.add_argument("--json", action="store_true", help="print text, boxes and masks as JSON")
    verb.add_argument("--out", metavar="PNG", type=Path, help="draw the answer into this picture")

    verb = add_verb(verbs, demo)
    verb.add_argument("dir", metavar="DIR", type=Path, help="a run, or a folder of weights")
    words = "whom it answers: 127.0.0.1 this machine alone, 0.0.0.0 all that reach it"
    verb.add_argument("--host", default="127.0.0.1", help=words)
    verb.add_argument("--port", type=int, default=7860, help="where: http://HOST:PORT")
    verb.add_argument("--tagger", metavar="DIR", type=Path, help="a folder with RAM, for the tags")
    words = "tokens that a prompt may have, with the talk before it; at least as in training"
    verb.add_argument("--prompt-length", type=int, default=256, help=words)

    verb = add_verb(verbs, tag)
    verb.add_argument("dir", metavar="DIR", type=Path, help="a folder with RAM and its tag list")
    verb.add_argument("--image", metavar="FILE", nargs="+", required=True, help="pictures")
    verb.add_argument("--json", action="store_true", help="print probabilities as well, as JSON")

    verb = add_verb(verbs, show, extra_args_help="Any field of the config can be set: --stages.0.steps 20.")
    verb.add_argument("config", metavar="CONFIG", help="a Python file, or the folder of a run")
    words = "print the torch-name table instead, also of a folder or file of weights"
    verb.add_argument("--weights", action="store_true", help=words)

    verb = add_verb(verbs, data, extra_args_help="Any field of the source can be set: --share 0.2.")
    verb.add_argument("action", metavar="ACTION", choices=("inspect", "build"), help="what to do")
    verb.add_argument("source", metavar="SOURCE", help="scenes, easy_vqa, or a folder or file")
    verb.add_argument("--images", metavar="DIR", default="", help="where a file's pictures lie")
    verb.add_argument("--answers", metavar="FILE", default="", help="the answers to VQA questions")
    verb.add_argument("--split", default="train", help="train, validation or heldout")
    verb.add_argument("--limit", type=int, default=3, help="examples shown of each task")
    verb.add_argument("--out", metavar="PATH", type=Path, help="a PNG to draw, a folder to build")
    verb.add_argument("--tagger", metavar="DIR", type=Path, help="build: tags by RAM in this folder")
    words = 'build: by Apache Beam, with its flags, as in --beam="--runner=DirectRunner"'
    verb.add_argument("--beam", metavar="FLAGS", nargs="?", const="", help=words)

    verb = add_verb(verbs, convert)
    weights_command.add_arguments(verb)

    verb = add_verb(verbs, plan, extra_args_help="Any field of the config can be set: --stages.0.batch_size 64.")
    plan_command.add_arguments(verb)

    verb = add_verb(verbs, report)
    verb.add_argument("dir", metavar="DIR", type=Path, help="the folder of a run")

    verb = add_verb(verbs, benchmark, extra_args_help="Further arguments are the benchmark's own.")
    verb.add_argument("name", metavar="NAME", help="a file of benchmarks/, without .py")
    return whole, verbs.choices


def add_verb(subparsers, command: Callable, extra_args_help: str = "") -> argparse.ArgumentParser:
    """A verb named and described by its function; `rest` says what it does with unknown arguments."""
    verb = subparsers.add_parser(
        command.__name__, help=command.__doc__, description=f"{command.__doc__} {extra_args_help}"
    )
    verb.set_defaults(run=command, takes_rest=bool(extra_args_help))
    return verb


# Running one


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code."""
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        os.environ.setdefault("PJRT_NPROC", "32")  # with few threads virtual devices can wait for each other for ever
    libtpu.enlarge_thread_stack()
    try:
        run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("LIONJAX_TRACEBACK"):
            traceback.print_exception(error)
        sentence, code = describe_error(error)
        print(f"lionjax: {sentence}", file=sys.stderr)
        return code


def run(argv: list[str]) -> None:
    """Run one command line. Raises Usage for one that cannot be read, and what the verb raises."""
    whole, verbs = build_parsers()
    if argv and not argv[0].startswith("-") and argv[0] not in verbs:
        near = difflib.get_close_matches(argv[0], verbs, n=1) or ["--help"]
        raise UsageError(f"there is no verb {argv[0]!r}; did you mean `lionjax {near[0]}`?")
    given, rest = whole.parse_known_args(argv)
    if given.version:
        import lionjax

        print(lionjax.__version__)
    elif given.verb is None:
        whole.print_help()
    elif rest and not given.takes_rest:
        raise UsageError(f"unknown argument {rest[0]!r}; see `lionjax {given.verb} --help`")
    else:
        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        logging.getLogger("lionjax").setLevel(logging.INFO)
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of its own making
        given.run(given, rest)


if __name__ == "__main__":
    sys.exit(main())
