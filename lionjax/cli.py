# SPDX-License-Identifier: Apache-2.0
"""The command line: `lionjax VERB`. Each verb is a function that imports what it needs when it runs.

A mistake of the user is one sentence and exit code 2. Anything unexpected is one sentence and exit
code 1; with LIONJAX_TRACEBACK=1 the traceback comes before it. Ctrl-C ends with 130.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import json
import logging
import os
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lionjax.convert import command as weights_command
from lionjax.scaling import command as plan_command
from lionjax.scaling import libtpu

# Verbs


def train(given: argparse.Namespace, overrides: list[str]) -> None:
    """Train all stages of a config, or what is left of them: a folder goes on where it stands."""
    began = time.time()
    from lionjax import config

    experiment = config.load(given.config, overrides)  # before what takes seconds to import

    from lionjax.data import pipeline
    from lionjax.evaluation.report import write_routers
    from lionjax.training import distributed, journal, loop, start

    with distributed.together(explain):
        params, _ = loop.train(experiment, given.workdir, pipeline.batches, began)
        write_routers(given.workdir, params)
        if experiment.run.evaluate_limit:
            from lionjax import model
            from lionjax.evaluation import benchmarks

            asked, made = time.time(), start.updates_before(experiment, len(experiment.stages))
            answerer = model.of_params(experiment, params).answerer
            entries = benchmarks.evaluate_run(answerer, experiment, given.workdir, made)
            journal.note_evaluation(given.workdir, time.time() - asked)
        if distributed.first():
            if experiment.run.evaluate_limit:
                _print_tables(entries, to_stderr=True)
            done = f"{given.workdir} holds the result; `lionjax report {given.workdir}` draws it"
            print(done, file=sys.stderr)


def evaluate(given: argparse.Namespace, fields: list[str]) -> None:
    """Ask a model the questions of a benchmark; figures beside what it would reach without looking."""
    import lionjax
    from lionjax import config
    from lionjax.data import inspection
    from lionjax.evaluation import benchmarks

    source, everything = None, given.benchmark == "all"
    if not everything:
        benchmarks.task_of(given.benchmark)  # a wrong name is said before the model is read
    if given.source is not None:
        source = inspection.recognise(given.source, given.images, given.answers)
        source = config.override(source, fields)
    elif fields:
        raise Usage(f"unknown argument {fields[0]!r}; see `lionjax evaluate --help`")
    model = lionjax.load(given.dir)
    names = benchmarks.names_for(model, given.split, source) if everything else [given.benchmark]
    entries = [benchmarks.evaluate_model(model, name, given.dir, given.limit, given.split, source) for name in names]
    if given.json:
        print(json.dumps(entries, indent=1))
    else:
        _print_tables(entries)


def generate(given: argparse.Namespace, _) -> None:
    """Answer a prompt about a picture; boxes and masks are printed and can be drawn."""
    import lionjax
    from lionjax import plots
    from lionjax.data import pictures

    picture = pictures.open_picture(given.image)
    box = None if given.box is None else _box(given.box)
    tags = None
    if given.tagger is not None:
        from lionjax import tagger

        tags = [found.tags for found in tagger.load(given.tagger).tag([picture])]
    model = lionjax.load(given.dir, prompt_length=given.prompt_length)
    boxes = None if box is None else [[box]]
    (answer,) = model.answer([picture], [given.prompt], boxes=boxes, tags=tags)
    if given.json:
        seen = {} if tags is None else {"tags": list(tags[0])}
        print(json.dumps(_plain(answer) | seen))
    else:
        print(answer.text)
        for found in answer.boxes:
            print("box " + " ".join(f"{edge:.3f}" for edge in found))
    if given.out is not None:
        marks = [] if box is None else [plots.Mark(box, colour=plots.ASKED)]
        marks += [plots.Mark(found, colour=plots.PREDICTED) for found in answer.boxes]
        marks += [plots.Mark(mask=mask, colour=plots.PREDICTED) for mask in answer.masks]
        plots.save(plots.draw(picture, marks), given.out)


def demo(given: argparse.Namespace, _) -> None:
    """Serve a web page to talk to a model: chat, point at things, see boxes and masks."""
    from lionjax import demo

    demo.serve(given.dir, given.host, given.port, given.tagger, given.prompt_length)


def tag(given: argparse.Namespace, _) -> None:
    """Name what is on pictures with RAM, as generate --tagger tells it to a LION."""
    from lionjax import tagger
    from lionjax.data import pictures

    seen = [pictures.open_picture(file) for file in given.image]
    found = tagger.load(given.dir).tag(seen)
    if given.json:
        entries = zip(given.image, map(dataclasses.asdict, found))
        print(json.dumps([{"image": file} | entry for file, entry in entries], ensure_ascii=False))
    else:
        for one in found:
            print(one)


def show(given: argparse.Namespace, overrides: list[str]) -> None:
    """Print the resolved config, typed; with --weights the table of its torch names."""
    from lionjax import config

    path = Path(given.config)
    if given.weights and path.exists() and weights_command.holds_weights(path):
        if overrides:
            raise Usage(f"unknown argument {overrides[0]!r}; weights have no fields to set")
        weights_command.show(path)
        return
    experiment = _experiment(path, overrides)
    if given.weights:
        weights_command.print_rows(experiment.system.torch_rows())
    else:
        print(config.show(experiment))


def data(given: argparse.Namespace, fields: list[str]) -> None:
    """Look at the records of a source (inspect), or write them as ArrayRecord files (build)."""
    from lionjax import config
    from lionjax.data import inspection
    from lionjax.interfaces import UserError

    source = inspection.recognise(given.source, given.images, given.answers)
    source = config.override(source, fields)
    if given.action == "build":
        if given.out is None:
            raise UserError("build wants --out FOLDER, where the files go")
        from lionjax.data import built_writer

        tag = None
        if given.tagger is not None:
            from lionjax import tagger

            tag = tagger.teller(given.tagger)
        flags = None if given.beam is None else given.beam.split()
        print(built_writer.build(source, given.out, tag=tag, beam=flags))
        return
    inspection.inspect(source, given.split, given.limit)
    if given.out is not None:
        _draw_examples(source, given.split, given.limit, given.out)


def convert(given: argparse.Namespace, _) -> None:
    """Write a run or a folder of weights under the original's names (torch), or under ours (jax)."""
    weights_command.convert(given)


def plan(given: argparse.Namespace, overrides: list[str]) -> None:
    """Compile a config for a TPU pod on this machine: does it fit, what does it cost."""
    plan_command.plan(given, overrides)


def report(given: argparse.Namespace, _) -> None:
    """Draw the curves, tables and answers of a run into DIR/report.html."""
    from lionjax.evaluation.report import report

    print(report(given.dir))


def benchmark(given: argparse.Namespace, words: list[str]) -> None:
    """Measure one of the README's numbers on this machine; needs a clone of the project."""
    from lionjax.interfaces import UserError

    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    files = {path.stem: path for path in folder.glob("*.py") if "__main__" in path.read_text()}
    if given.name not in files:
        known = ", ".join(sorted(files)) or "none here: they come with a clone of the project"
        raise UserError(f"there is no benchmark {given.name!r}; there are {known}")
    sys.argv = [str(files[given.name]), *words]
    sys.path.insert(0, str(folder))  # as if run by its path, so that it finds its neighbours
    runpy.run_path(str(files[given.name]), run_name="__main__")


# Their arguments


def parsers() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The whole command line, and its verbs by name. Cheap: nothing of the package is imported."""
    whole = Parser(prog="lionjax", description="Region-aware multimodal language models in JAX.")
    whole.add_argument("--version", action="store_true", help="print the version and stop")
    verbs = whole.add_subparsers(metavar="VERB", title="verbs", dest="verb")

    verb = add(verbs, train, rest="Any field of the config can be set: --stages.0.steps 20.")
    verb.add_argument("config", metavar="CONFIG", help="a Python file, such as configs/tiny_lion.py")
    verb.add_argument("--workdir", metavar="DIR", type=Path, required=True, help="the run's folder")

    verb = add(verbs, evaluate, rest="Any field of --source can be set: --share 0.")
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

    verb = add(verbs, generate)
    verb.add_argument("dir", metavar="DIR", type=Path, help="a run, or a folder of weights")
    verb.add_argument("--image", metavar="FILE", required=True, help="a JPEG, PNG or WebP picture")
    verb.add_argument("--prompt", metavar="TEXT", required=True, help="what to ask")
    verb.add_argument("--box", metavar="X0,Y0,X1,Y1", help="what is asked about, in 0..1")
    verb.add_argument("--tagger", metavar="DIR", type=Path, help="a folder with RAM, for the tags")
    words = "tokens that a prompt may have; by default as in training"
    verb.add_argument("--prompt-length", type=int, help=words)
    verb.add_argument("--json", action="store_true", help="print text, boxes and masks as JSON")
    verb.add_argument("--out", metavar="PNG", type=Path, help="draw the answer into this picture")

    verb = add(verbs, demo)
    verb.add_argument("dir", metavar="DIR", type=Path, help="a run, or a folder of weights")
    words = "whom it answers: 127.0.0.1 this machine alone, 0.0.0.0 all that reach it"
    verb.add_argument("--host", default="127.0.0.1", help=words)
    verb.add_argument("--port", type=int, default=7860, help="where: http://HOST:PORT")
    verb.add_argument("--tagger", metavar="DIR", type=Path, help="a folder with RAM, for the tags")
    words = "tokens that a prompt may have, with the talk before it; at least as in training"
    verb.add_argument("--prompt-length", type=int, default=256, help=words)

    verb = add(verbs, tag)
    verb.add_argument("dir", metavar="DIR", type=Path, help="a folder with RAM and its tag list")
    verb.add_argument("--image", metavar="FILE", nargs="+", required=True, help="pictures")
    verb.add_argument("--json", action="store_true", help="print probabilities as well, as JSON")

    verb = add(verbs, show, rest="Any field of the config can be set: --stages.0.steps 20.")
    verb.add_argument("config", metavar="CONFIG", help="a Python file, or the folder of a run")
    words = "print the torch-name table instead, also of a folder or file of weights"
    verb.add_argument("--weights", action="store_true", help=words)

    verb = add(verbs, data, rest="Any field of the source can be set: --share 0.2.")
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

    verb = add(verbs, convert)
    weights_command.add_arguments(verb)

    verb = add(verbs, plan, rest="Any field of the config can be set: --stages.0.batch_size 64.")
    plan_command.add_arguments(verb)

    verb = add(verbs, report)
    verb.add_argument("dir", metavar="DIR", type=Path, help="the folder of a run")

    verb = add(verbs, benchmark, rest="Further arguments are the benchmark's own.")
    verb.add_argument("name", metavar="NAME", help="a file of benchmarks/, without .py")
    return whole, verbs.choices


class Usage(Exception):
    """A command line that cannot be read. UserError's module imports JAX, too slow for --help."""


class Parser(argparse.ArgumentParser):
    """argparse that raises its errors and takes no abbreviations, which could hide a field."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str):
        raise Usage(f"{message}; see `{self.prog} --help`")


def add(verbs, run: Callable, rest: str = "") -> argparse.ArgumentParser:
    """A verb named and described by its function; `rest` says what it does with unknown arguments."""
    verb = verbs.add_parser(run.__name__, help=run.__doc__, description=f"{run.__doc__} {rest}")
    verb.set_defaults(run=run, takes_rest=bool(rest))
    return verb


def _box(text: str) -> tuple[float, float, float, float]:
    from lionjax.data import pictures

    return pictures.unit_box(text.split(","), name="--box")


def _draw_examples(source, split: str, limit: int, path: Path) -> None:
    """A picture of the examples that `data inspect` lists, with what they ask about and answer."""
    from lionjax import plots
    from lionjax.data import examples, pictures, sources

    data = examples.DataConfig(sources=(source,), on_bad_record="replace")
    cells = []
    for task in sources.open_split(source, split, data.processor.max_pixels).sizes:
        for sample in examples.examples(data, task, split, limit):
            example = sample.example
            masks = sample.masks() if task == "res" else ()
            marks = [plots.Mark(box, colour=plots.ASKED) for box in example.question_boxes]
            marks += [plots.Mark(box, colour=plots.TRUE) for box in example.boxes]
            marks += [plots.Mark(mask=mask, colour=plots.TRUE) for mask in masks]
            ink = plots.LIGHT["ink"]
            lines = [(task, plots.LIGHT["faint"]), (example.question, ink), (example.answer, "#00785a")]
            cells.append((plots.draw(pictures.as_picture(sample.picture), marks), lines))
    plots.save(plots.grid(cells), path)


def _print_tables(entries, to_stderr: bool = False) -> None:
    from rich.console import Console

    from lionjax.evaluation import benchmarks

    console = Console(stderr=to_stderr)
    for entry in entries:
        console.print(benchmarks.table(entry))


def _plain(answer) -> dict:
    """An answer for JSON: masks as COCO's compressed run lengths."""
    import numpy as np
    from pycocotools import mask as coco

    masks = [coco.encode(np.asfortranarray(mask, np.uint8)) for mask in answer.masks]
    return {
        "text": answer.text,
        "boxes": np.asarray(answer.boxes, float).reshape(-1, 4).tolist(),
        "masks": [{"size": mask["size"], "counts": mask["counts"].decode()} for mask in masks],
    }


def _experiment(path: Path, overrides: Sequence[str]):
    from lionjax import config
    from lionjax.interfaces import UserError

    if not path.is_dir():
        return config.load(path, overrides)
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} holds no config.json; give a config file or the folder of a run")
    return config.override(config.from_json(file.read_text()), overrides)


# Running one


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code."""
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        os.environ.setdefault("PJRT_NPROC", "32")  # with few threads virtual devices can wait for each other for ever
    libtpu.deepen_stack()
    try:
        run(list(sys.argv[1:] if words is None else words))
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("LIONJAX_TRACEBACK"):
            traceback.print_exception(error)
        sentence, code = explain(error)
        print(f"lionjax: {sentence}", file=sys.stderr)
        return code


def run(words: list[str]) -> None:
    """Run one command line. Raises Usage for one that cannot be read, and what the verb raises."""
    whole, verbs = parsers()
    if words and not words[0].startswith("-") and words[0] not in verbs:
        near = difflib.get_close_matches(words[0], verbs, n=1) or ["--help"]
        raise Usage(f"there is no verb {words[0]!r}; did you mean `lionjax {near[0]}`?")
    given, rest = whole.parse_known_args(words)
    if given.version:
        import lionjax

        print(lionjax.__version__)
    elif given.verb is None:
        whole.print_help()
    elif rest and not given.takes_rest:
        raise Usage(f"unknown argument {rest[0]!r}; see `lionjax {given.verb} --help`")
    else:
        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        logging.getLogger("lionjax").setLevel(logging.INFO)
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of its own making
        given.run(given, rest)


def explain(error: BaseException) -> tuple[str, int]:
    """(what to say, exit code) of an exception."""
    if isinstance(error, Usage):
        return str(error), 2
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C", 130
    from lionjax.interfaces import UserError

    if isinstance(error, UserError):
        return str(error), 2
    lines = str(error).strip().splitlines() or ["no message"]
    if is_disk_full(error):
        return f"the disk is full ({lines[0]}); make room and give the same command again", 2
    if isinstance(error, PermissionError):
        return f"no permission for {error.filename}", 2
    more = "" if os.environ.get("LIONJAX_TRACEBACK") else "; set LIONJAX_TRACEBACK=1 for the traceback"
    return f"unexpected {type(error).__name__}: {lines[0]}{more}", 1


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, says that no space is left, by its number or its text."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC).lower() in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


if __name__ == "__main__":
    sys.exit(main())
