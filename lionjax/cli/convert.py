# SPDX-License-Identifier: Apache-2.0
"""The command line's side of weights: converting them, holding them against the original, showing their table."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `lionjax convert` takes."""
    parser.add_argument("src", metavar="SRC", type=Path, help="a run, or a folder or file of weights")
    parser.add_argument("dst", metavar="DST", type=Path, help="the folder to write; it must be new")
    parser.add_argument("--to", choices=("torch", "jax", "orbax"), required=True, help="what to write")
    parser.add_argument("--mesh", metavar="A=N,B=N", default="", help="of orbax: fsdp=4,tensor=2")
    parser.add_argument("--system", metavar="NAME", help="the kind of model, where SRC does not say")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA for SRC, as PEFT writes it")
    parser.add_argument("--base", metavar="DIR", help="the LLaMA from which SRC is a difference")
    parser.add_argument("--add-words", metavar="A,B", default="", help="new words for its vocabulary")
    parser.add_argument("--vocab-multiple", metavar="N", type=int, default=1, help="fill it to that")
    parser.add_argument("--image-size", metavar="N", type=int, help="resample positions to that")
    parser.add_argument("--merge-lora", action="store_true", help="merge a LoRA into its matrices")
    parser.add_argument("--verify", action="store_true", help="run both models, compare each stage")


def convert(args: argparse.Namespace) -> None:
    """`lionjax convert`. Raises UserError for all that does not fit."""
    from lionjax.convert import ResizeOptions, convert, load_params
    from lionjax.core.types import UserError
    from lionjax.inference import loading

    if args.to == "orbax":
        _convert_to_orbax(args)
        return
    if loading.is_run(args.src):
        _export_run(args)
        return
    added_tokens = tuple(token for token in args.add_words.split(",") if token)
    resize_options = ResizeOptions(added_tokens, args.vocab_multiple, args.image_size)
    options = {"adapter": args.adapter, "merge_lora": args.merge_lora, "resize_options": resize_options}
    if args.base and args.verify:
        raise UserError("a difference runs nowhere; write it --to torch when it is added, and --verify that")
    options |= {"base": args.base}
    print(convert(args.src, args.dst, args.to, args.system, **options))
    if args.verify:
        ours, theirs = args.src, args.dst
        if args.to == "jax":
            ours, theirs = theirs, ours
        _verify(*load_params(ours), theirs, args.dst)


def _convert_to_orbax(args: argparse.Namespace) -> None:
    """Weights as an Orbax checkpoint, laid out on a mesh of all devices."""
    from lionjax.convert.orbax_folder import save_orbax
    from lionjax.core import sharding
    from lionjax.core.types import UserError
    from lionjax.inference import loading

    unsupported = {
        "--adapter": args.adapter,
        "--base": args.base,
        "--add-words": args.add_words,
        "--vocab-multiple": args.vocab_multiple > 1,
        "--image-size": args.image_size,
        "--merge-lora": args.merge_lora,
        "--verify": args.verify,
    }
    if loading.is_run(args.src) or any(unsupported.values()):
        option = next((name for name, value in unsupported.items() if value), "a run")
        raise UserError(f"{option} does not go with --to orbax; convert --to jax first, and that to orbax")
    try:
        axes = {name: int(size) for name, size in (a.split("=") for a in args.mesh.split(",") if a)}
        mesh_config = sharding.MeshConfig(**axes)
    except (TypeError, ValueError) as error:
        raise UserError(f"--mesh {args.mesh!r} is no mesh; write fsdp=4,tensor=2") from error
    print(save_orbax(args.src, args.dst, sharding.make_mesh(mesh_config), args.system))


def _export_run(args: argparse.Namespace) -> None:
    """A run written out, and read back to see whether every bit is the same."""
    from lionjax.core.files import update_json
    from lionjax.inference import loading

    run = loading.load(args.src)
    run.export(args.dst, args.to, args.merge_lora)
    if args.merge_lora:  # what is merged cannot be taken apart again
        print(f"written: {args.dst}, with its LoRA merged")
    else:
        exact = run.equals_bitwise(loading.load(args.dst))
        update_json(args.src / "report.json", {"round_trip_exact": exact})
        same = "every bit is the same" if exact else "BITS DIFFER"
        print(f"written: {args.dst}; read back, {same}")
    if args.verify:
        _verify(run.experiment, run.params, args.dst, args.dst)


def _verify(config, params, folder: Path, output_folder: Path) -> None:
    """Both models on the same inputs; their largest difference at each stage is printed. `written` was before."""
    from lionjax.convert.verify.compare import verify
    from lionjax.core.types import UserError

    try:
        report = verify(config, params, folder)
    except UserError as error:
        raise UserError(f"{output_folder} is written, but cannot be verified: {error}") from error
    print(report)
    if not report.all_close:
        raise UserError(f"the model of {folder} and ours differ by more than rounding does")


def is_weights_path(path: Path) -> bool:
    """Whether a path is a file of weights or a folder with some, and not a config or the folder of a run."""
    if (path / "params").is_dir() and (path / "config").is_dir():  # Orbax's
        return True
    files = path.iterdir() if path.is_dir() else [path]
    return any(file.suffix in (".safetensors", ".bin", ".pth", ".pt") for file in files)


def print_weight_map(path: Path) -> None:
    """Print the table of a folder or file of weights."""
    from lionjax import convert

    print_weight_mappings(convert.weight_map_of(path))


def print_weight_mappings(mappings) -> None:
    """One line a row: torch's names, those tied to it, our paths, and the change of layout."""
    for mapping in mappings:
        tied = "".join(f"  = {name}" for name in mapping.tied_keys)
        print(f"{', '.join(mapping.torch_keys)}{tied}  ->  {', '.join(mapping.flax_paths)}  ({mapping.transform.name})")
