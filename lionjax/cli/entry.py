# SPDX-License-Identifier: Apache-2.0
"""The command line `lionjax VERB`: argument parsers and error handling; the verbs are in commands.py.

User errors print one sentence and exit with code 2 (75 if the same command may go well the next time); unexpected
errors print one sentence and exit with code 1, preceded by the traceback if LIONJAX_TRACEBACK=1 is set. Ctrl-C exits
with code 130.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lionjax.cli import answer as answer_command
from lionjax.cli import convert as weights_command
from lionjax.cli import generate as generate_command
from lionjax.cli import judge as judge_command
from lionjax.cli import plan as plan_command
from lionjax.cli import push as push_command
from lionjax.cli import reproduce as reproduce_command
from lionjax.cli import score as score_command
from lionjax.cli import serve as serve_command
from lionjax.cli import synthesize as synthesize_command
from lionjax.cli import tools as tools_command
from lionjax.cli.commands import (
    agent,
    answer,
    benchmark,
    convert,
    data,
    demo,
    detect,
    evaluate,
    generate,
    judge,
    plan,
    rank,
    report,
    reproduce,
    serve,
    show,
    synthesize,
    tag,
    tools,
    train,
)
from lionjax.cli.errors import StrictParser, UsageError, describe_error, positive_int
from lionjax.cli.push import push
from lionjax.planner import libtpu


def build_parsers() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The main parser, and the parsers of its verbs by name. Does not import JAX or other slow modules."""
    parser = StrictParser(prog="lionjax", description="Region-aware vision-language models in JAX.")
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    verbs = parser.add_subparsers(metavar="VERB", title="verbs", dest="verb")

    verb = add_verb(verbs, train, extra_args_help="Any field of the config can be set: --stages.0.steps 20.")
    verb.add_argument("config", metavar="CONFIG", help="a Python file, or the name of one that ships: tiny_lion")
    verb.add_argument("--workdir", metavar="DIR", type=Path, required=True, help="the run folder to write or resume")
    shrink_help = (
        "small widths, depths and pictures, to rehearse a full-size run; text lengths times FRACTION (default 1)"
    )
    verb.add_argument("--shrink", metavar="FRACTION", type=float, nargs="?", const=1.0, help=shrink_help)

    verb = add_verb(verbs, evaluate, extra_args_help="Any field of --source can be set: --heldout_fraction 0.")
    add_evaluate_arguments(verb)

    generate_command.add_arguments(add_verb(verbs, generate))

    answer_command.add_arguments(add_verb(verbs, answer))

    tools_command.add_tools_arguments(add_verb(verbs, tools))
    tools_command.add_agent_arguments(add_verb(verbs, agent))
    judge_command.add_arguments(add_verb(verbs, judge))
    synthesize_command.add_arguments(add_verb(verbs, synthesize))

    serve_command.add_arguments(add_verb(verbs, serve), serve_command.PORT)
    serve_command.add_arguments(add_verb(verbs, demo), serve_command.DEMO_PORT)

    verb = add_verb(verbs, tag)
    verb.add_argument("dir", metavar="DIR", type=Path, help="a folder with RAM's weights and its tag list")
    verb.add_argument("--image", metavar="FILE", nargs="+", required=True, help="images to tag")
    verb.add_argument("--json", action="store_true", help="print tags and probabilities as JSON")

    verb = add_verb(verbs, rank)
    verb.add_argument("dir", metavar="DIR", type=Path, help="a run or a folder with a CLIP or SigLIP and its tokenizer")
    verb.add_argument("--image", metavar="FILE", nargs="+", required=True, help="images to rank the texts for")
    verb.add_argument("--texts", metavar="TEXT", nargs="+", required=True, help='texts, such as "a photo of a cat"')
    verb.add_argument("--json", action="store_true", help="print texts, probabilities and cosines as JSON")

    verb = add_verb(verbs, detect)
    add_detect_arguments(verb)

    verb = add_verb(verbs, show, extra_args_help="Any field of the config can be set: --stages.0.steps 20.")
    verb.add_argument("config", metavar="CONFIG", help="a Python file, the name of one that ships, or a run folder")
    weights_help = "print the table of torch weight names instead; also for a folder or file of weights"
    verb.add_argument("--weights", action="store_true", help=weights_help)

    verb = add_verb(verbs, data, extra_args_help="Any field of the source can be set: --heldout_fraction 0.2.")
    add_data_arguments(verb)

    verb = add_verb(verbs, convert)
    weights_command.add_arguments(verb)

    push_command.add_arguments(add_verb(verbs, push))

    verb = add_verb(verbs, plan, extra_args_help="Any field of the config can be set: --stages.0.batch_size 64.")
    plan_command.add_arguments(verb)

    reproduce_command.add_arguments(add_verb(verbs, reproduce))

    verb = add_verb(verbs, report)
    verb.add_argument("dir", metavar="DIR", type=Path, help="a run folder")

    verb = add_verb(verbs, completion)
    verb.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "tcsh"), help="bash, zsh or tcsh")

    verb = add_verb(verbs, benchmark, extra_args_help="Other arguments are passed to the script.")
    verb.add_argument("name", metavar="NAME", help="a script of benchmarks/, without .py")
    return parser, verbs.choices


def completion(args: argparse.Namespace, _) -> None:
    """Print a completion script for a shell: eval "$(lionjax completion bash)"."""
    import shtab

    print(shtab.complete(build_parsers()[0], args.shell))


INT8_HELP = "round the language model's matrices to int8"


def nonnegative_int(text: str) -> int:
    """An integer of 0 or more from the command line. Raises ArgumentTypeError for anything else."""
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of 0 or more")
    return int(text)


def add_evaluate_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `lionjax evaluate`."""
    dir_help = "a run folder or a folder of weights; none is needed with --predictions"
    verb.add_argument("dir", metavar="DIR", type=Path, nargs="?", help=dir_help)
    names = "caption, vqa, relation, existence, rec, res, reg, grounded, box_vqa, tags, choice or all; "
    names += "coco/vqa for one source, rec@digits for another box format; or a published benchmark (docs/benchmarks.md)"
    verb.add_argument("--benchmark", metavar="NAME", required=True, help=names)
    verb.add_argument("--limit", metavar="N", type=positive_int, help="maximum number of questions per benchmark")
    verb.add_argument("--split", default="heldout", help="train, validation or heldout (default: heldout)")
    verb.add_argument("--source", help="data to use instead of the run's: a folder or an annotation file")
    add_annotation_arguments(verb)
    verb.add_argument("--int8", action="store_true", help=INT8_HELP)
    workers_help = "processes that read images ahead; 0: threads (default: by the CPU cores, 0 below 5)"
    verb.add_argument("--workers", metavar="N", type=nonnegative_int, help=workers_help)
    score_command.add_arguments(verb)
    verb.add_argument("--json", action="store_true", help="print the metrics as JSON")


def add_annotation_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of an annotation file as a data source."""
    verb.add_argument("--images", metavar="DIR", default="", help="image folder of an annotation file")
    verb.add_argument("--answers", metavar="FILE", default="", help="VQA annotations file with the answers")


def add_detect_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `lionjax detect`."""
    verb.add_argument("dir", metavar="DIR", type=Path, help="a folder with Grounding DINO's weights and its tokenizer")
    verb.add_argument("--image", metavar="FILE", nargs="+", required=True, help="images to search")
    verb.add_argument("--prompt", metavar="TEXT", required=True, help='names, as in "a cat. a dog."')
    score_help = "keep boxes with a token of a higher probability (default: 0.35)"
    verb.add_argument("--box-threshold", metavar="P", type=float, default=0.35, help=score_help)
    text_help = "tokens of a higher probability are a box's phrase (default: 0.25)"
    verb.add_argument("--text-threshold", metavar="P", type=float, default=0.25, help=text_help)
    verb.add_argument(
        "--nms", metavar="IOU", type=float, help="remove boxes that overlap a better one by more than this"
    )
    pad_help = "pad images to a multiple of N pixels: so that images of many sizes share programs (default: 1)"
    verb.add_argument("--pad-to-multiple", metavar="N", type=positive_int, default=1, help=pad_help)
    combined_help = "a box's phrase has words of one name only"
    verb.add_argument("--remove-combined", action="store_true", help=combined_help)
    verb.add_argument("--json", action="store_true", help="print boxes, scores and phrases as JSON")
    verb.add_argument("--out", metavar="PNG", type=Path, help="write the images with their boxes to this file")


def add_data_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of `lionjax data`."""
    verb.add_argument("action", metavar="ACTION", choices=("inspect", "build", "check"), help="inspect, build or check")
    source_help = "scenes, easy_vqa, a folder, a table, tars or annotations; for check a config or a run folder"
    verb.add_argument("source", metavar="SOURCE", help=source_help)
    add_annotation_arguments(verb)
    verb.add_argument("--split", default="train", help="train, validation or heldout (default: train)")
    verb.add_argument(
        "--limit", metavar="N", type=positive_int, default=3, help="examples to print per task (default: 3)"
    )
    verb.add_argument("--out", metavar="PATH", type=Path, help="inspect: a PNG to write; build: the output folder")
    verb.add_argument("--tagger", metavar="DIR", type=Path, help="build: add tags with RAM from this folder")
    refiner_help = "build: keep tags, boxes and region features that the refiner in this folder finds"
    verb.add_argument("--refiner", metavar="DIR", type=Path, help=refiner_help)
    regions_help = "build --refiner: keep the features of this many queries per image (default: 100)"
    verb.add_argument("--regions", metavar="N", type=positive_int, default=100, help=regions_help)
    beam_help = 'build: run on Apache Beam with these flags, as in --beam="--runner=DirectRunner"'
    verb.add_argument("--beam", metavar="FLAGS", nargs="?", const="", help=beam_help)


def add_verb(subparsers, command: Callable, extra_args_help: str = "") -> argparse.ArgumentParser:
    """Add a verb with the name and docstring of its function.

    `extra_args_help` describes further arguments, which are passed to the function; if empty, they are an error.
    """
    verb = subparsers.add_parser(
        command.__name__, help=command.__doc__, description=f"{command.__doc__} {extra_args_help}"
    )
    verb.set_defaults(run=command, takes_rest=bool(extra_args_help))
    return verb


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and print errors; returns the exit code."""
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        os.environ.setdefault("PJRT_NPROC", "32")  # with fewer threads, virtual devices can deadlock
    libtpu.enlarge_thread_stack()
    try:
        run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # stdout's reader, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("LIONJAX_TRACEBACK"):
            traceback.print_exception(error)
        sentence, code = describe_error(error)
        print(f"lionjax: {sentence}", file=sys.stderr)
        return code


def run(argv: list[str]) -> None:
    """Run a command line. Raises UsageError for an invalid one, and the verb's own errors."""
    parser, verbs = build_parsers()
    if argv and not argv[0].startswith("-") and argv[0] not in verbs:
        import difflib

        suggestions = difflib.get_close_matches(argv[0], verbs, n=1) or ["--help"]
        raise UsageError(f"there is no verb {argv[0]!r}; did you mean `lionjax {suggestions[0]}`?")
    args, extra_args = parser.parse_known_args(argv)
    if args.version:
        import lionjax

        print(lionjax.__version__)
    elif args.verb is None:
        parser.print_help()
    elif extra_args and not args.takes_rest:
        raise UsageError(f"unknown argument {extra_args[0]!r}; see `lionjax {args.verb} --help`")
    else:
        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        logging.getLogger("lionjax").setLevel(logging.INFO)
        logging.getLogger("absl").setLevel(logging.ERROR)  # hide Orbax's internal warnings
        run_verb(args, extra_args)


def run_verb(args: argparse.Namespace, extra_args: list[str]) -> None:
    """Run a verb; names of the hub and of buckets among its arguments become local folders, but not in texts.

    What `evaluate` and `report` write beside a run is copied to its bucket. Raises UsageError where such a name is to
    be written to by another verb than `train`.
    """
    verb, copied = vars(args).get("verb"), {}
    for name, value in vars(args).items():
        if str(value).startswith(("hf:/", "gs:/")) and name not in ("repository", "prompt", "message"):
            from lionjax.core import bucket, hub

            if (verb, name) == ("train", "workdir") and bucket.is_bucket_name(value):
                continue
            if name in ("workdir", "out", "dst", "submission"):
                raise UsageError(
                    f"{name} is {str(value)!r}, but files are written to a file system: give a local folder and copy "
                    f"it with `lionjax push DIR {value}`, or mount the bucket (gcsfuse)".replace(":/", "://")
                )
            setattr(args, name, type(value)(hub.local_path(value)))
            if (verb, name) in (("evaluate", "dir"), ("report", "dir")) and bucket.is_bucket_name(value):
                copied[getattr(args, name)] = value
    start_time = time.time()
    args.run(args, extra_args)
    for folder, value in copied.items():
        copy_back(folder, value, start_time)


def copy_back(folder: Path, value: Path, start_time: float) -> None:
    """Copy to the bucket what a verb has written since `start_time` into the copy `folder` of a run there."""
    from lionjax.core import bucket
    from lionjax.core.errors import UserError

    try:
        bucket.upload(folder, value, newer_than=start_time)
    except UserError as error:
        logging.getLogger("lionjax").warning("what was written stays in %s: %s", folder, error)


if __name__ == "__main__":
    sys.exit(main())
