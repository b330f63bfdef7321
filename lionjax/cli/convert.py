# SPDX-License-Identifier: Apache-2.0
"""The command line's side of weights: converting them, holding them against the original, showing their table."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """What `lionjax convert` takes."""
    verb.add_argument("src", metavar="SRC", type=Path, help="a run, or a folder or file of weights")
    verb.add_argument("dst", metavar="DST", type=Path, help="the folder to write; it must be new")
    verb.add_argument("--to", choices=("torch", "jax", "orbax"), required=True, help="what to write")
    verb.add_argument("--mesh", metavar="A=N,B=N", default="", help="of orbax: fsdp=4,tensor=2")
    verb.add_argument("--system", metavar="NAME", help="the kind of model, where SRC does not say")
    verb.add_argument("--adapter", metavar="DIR", help="a LoRA for SRC, as PEFT writes it")
    verb.add_argument("--base", metavar="DIR", help="the LLaMA from which SRC is a difference")
    verb.add_argument("--add-words", metavar="A,B", default="", help="new words for its vocabulary")
    verb.add_argument("--vocab-multiple", metavar="N", type=int, default=1, help="fill it to that")
    verb.add_argument("--image-size", metavar="N", type=int, help="resample positions to that")
    verb.add_argument("--merge-lora", action="store_true", help="merge a LoRA into its matrices")
    verb.add_argument("--verify", action="store_true", help="run both models, compare each stage")


def convert(given: argparse.Namespace) -> None:
    """`lionjax convert`. Raises UserError for all that does not fit."""
    from lionjax.convert import Wanted, convert, load_params
    from lionjax.core.types import UserError
    from lionjax.inference import loading

    if given.to == "orbax":
        _to_orbax(given)
        return
    if loading.is_run(given.src):
        _export(given)
        return
    words = tuple(word for word in given.add_words.split(",") if word)
    wanted = Wanted(words, given.vocab_multiple, given.image_size)
    more = {"adapter": given.adapter, "merge_lora": given.merge_lora, "wanted": wanted}
    if given.base and given.verify:
        raise UserError("a difference runs nowhere; write it --to torch when it is added, and --verify that")
    more |= {"base": given.base}
    print(convert(given.src, given.dst, given.to, given.system, **more))
    if given.verify:
        ours, theirs = given.src, given.dst
        if given.to == "jax":
            ours, theirs = theirs, ours
        _verify(*load_params(ours), theirs, given.dst)


def _to_orbax(given: argparse.Namespace) -> None:
    """Weights as an Orbax checkpoint, laid out on a mesh of all devices."""
    from lionjax.convert.orbax_folder import save_orbax
    from lionjax.core import sharding
    from lionjax.core.types import UserError
    from lionjax.inference import loading

    odd = {
        "--adapter": given.adapter,
        "--base": given.base,
        "--add-words": given.add_words,
        "--vocab-multiple": given.vocab_multiple > 1,
        "--image-size": given.image_size,
        "--merge-lora": given.merge_lora,
        "--verify": given.verify,
    }
    if loading.is_run(given.src) or any(odd.values()):
        why = next((name for name, value in odd.items() if value), "a run")
        raise UserError(f"{why} does not go with --to orbax; convert --to jax first, and that to orbax")
    try:
        axes = {name: int(size) for name, size in (a.split("=") for a in given.mesh.split(",") if a)}
        wanted = sharding.MeshConfig(**axes)
    except (TypeError, ValueError) as error:
        raise UserError(f"--mesh {given.mesh!r} is no mesh; write fsdp=4,tensor=2") from error
    print(save_orbax(given.src, given.dst, sharding.make_mesh(wanted), given.system))


def _export(given: argparse.Namespace) -> None:
    """A run written out, and read back to see whether every bit is the same."""
    from lionjax.evaluation.report.html import note
    from lionjax.inference import loading

    run = loading.load(given.src)
    run.export(given.dst, given.to, given.merge_lora)
    if given.merge_lora:  # what is merged cannot be taken apart again
        print(f"written: {given.dst}, with its LoRA merged")
    else:
        exact = run.has_the_bits_of(loading.load(given.dst))
        note(given.src, {"round_trip_exact": exact})
        same = "every bit is the same" if exact else "BITS DIFFER"
        print(f"written: {given.dst}; read back, {same}")
    if given.verify:
        _verify(run.experiment, run.params, given.dst, given.dst)


def _verify(config, params, folder: Path, written: Path) -> None:
    """Both models on the same inputs; their largest difference at each stage is printed. `written` was before."""
    from lionjax.convert.verify.compare import verify
    from lionjax.core.types import UserError

    try:
        found = verify(config, params, folder)
    except UserError as error:
        raise UserError(f"{written} is written, but cannot be verified: {error}") from error
    print(found)
    if not found.agree:
        raise UserError(f"the model of {folder} and ours differ by more than rounding does")


def holds_weights(path: Path) -> bool:
    """Whether a path is a file of weights or a folder with some, and not a config or the folder of a run."""
    if (path / "params").is_dir() and (path / "config").is_dir():  # Orbax's
        return True
    files = path.iterdir() if path.is_dir() else [path]
    return any(file.suffix in (".safetensors", ".bin", ".pth", ".pt") for file in files)


def show(path: Path) -> None:
    """Print the table of a folder or file of weights."""
    from lionjax import convert

    print_rows(convert.table_of(path))


def print_rows(rows) -> None:
    """One line a row: torch's names, those tied to it, our paths, and the change of layout."""
    for row in rows:
        tied = "".join(f"  = {name}" for name in row.also)
        print(f"{', '.join(row.names)}{tied}  ->  {', '.join(row.paths)}  ({row.op.name})")
