# SPDX-License-Identifier: Apache-2.0
"""`lionjax convert` and `lionjax show --weights`: convert checkpoints, verify them, print their weight map."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `lionjax convert`."""
    parser.add_argument("src", metavar="SRC", type=Path, help="a run, or a folder or file of weights")
    parser.add_argument("dst", metavar="DST", type=Path, help="the folder to write; must not exist")
    parser.add_argument("--to", choices=("torch", "jax", "orbax"), required=True, help="the output format")
    parser.add_argument("--mesh", metavar="A=N,B=N", default="", help="mesh of orbax: fsdp=4,tensor=2")
    parser.add_argument("--system", metavar="NAME", help="the format of SRC, if not in its config.json")
    parser.add_argument("--adapter", metavar="DIR", help="a PEFT folder with a LoRA for SRC")
    parser.add_argument("--base", metavar="DIR", help="the model that SRC is a delta of, or a LoRA for")
    parser.add_argument("--vision-tower", metavar="DIR", help="the CLIP of a LLaVA that only names it")
    parser.add_argument("--add-tokens", metavar="A,B", default="", help="tokens to add to the vocabulary")
    padding = {"metavar": "N", "type": int, "default": 1, "help": "pad the vocabulary to a multiple"}
    parser.add_argument("--pad-vocab-to-multiple-of", **padding)
    # Names of version 0.1.
    parser.add_argument("--add-words", dest="add_tokens", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    hidden = {"type": int, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    parser.add_argument("--vocab-multiple", dest="pad_vocab_to_multiple_of", **hidden)
    parser.add_argument("--image-size", metavar="N", type=int, help="interpolate positions to N pixels")
    parser.add_argument("--merge-lora", action="store_true", help="merge the LoRA into the weights")
    parser.add_argument("--verify", action="store_true", help="compare both models module by module")


def convert(args: argparse.Namespace) -> None:
    """Run `lionjax convert`. Raises UserError for arguments or checkpoints that do not fit."""
    from lionjax.convert import ResizeOptions, convert, load_params
    from lionjax.core.types import UserError
    from lionjax.inference import loading

    if args.to == "orbax":
        _convert_to_orbax(args)
        return
    if loading.is_run(args.src):
        _export_run(args)
        return
    added_tokens = tuple(token for token in args.add_tokens.split(",") if token)
    resize_options = ResizeOptions(added_tokens, args.pad_vocab_to_multiple_of, args.image_size)
    options = {"adapter": args.adapter, "merge_lora": args.merge_lora, "resize_options": resize_options}
    if args.base and args.verify:
        raise UserError("--verify does not work with --base; convert with --base first, then verify the result")
    options |= {"base": args.base, "vision_tower": args.vision_tower}
    print(convert(args.src, args.dst, args.to, args.system, **options))
    if args.verify:
        ours, theirs = args.src, args.dst
        if args.to == "jax":
            ours, theirs = theirs, ours
        _verify(*load_params(ours), theirs, args.dst)


def _convert_to_orbax(args: argparse.Namespace) -> None:
    """Write weights as an Orbax checkpoint, sharded over a mesh of all devices."""
    from lionjax.convert.orbax_folder import save_orbax
    from lionjax.core import sharding
    from lionjax.core.types import UserError
    from lionjax.inference import loading

    unsupported = {
        "--adapter": args.adapter,
        "--base": args.base,
        "--vision-tower": args.vision_tower,
        "--add-tokens": args.add_tokens,
        "--pad-vocab-to-multiple-of": args.pad_vocab_to_multiple_of > 1,
        "--image-size": args.image_size,
        "--merge-lora": args.merge_lora,
        "--verify": args.verify,
    }
    if loading.is_run(args.src) or any(unsupported.values()):
        option = next((name for name, value in unsupported.items() if value), "a run")
        raise UserError(f"{option} does not work with --to orbax; convert --to jax first, then the result --to orbax")
    try:
        axes = {name: int(size) for name, size in (a.split("=") for a in args.mesh.split(",") if a)}
        mesh_config = sharding.MeshConfig(**axes)
    except (TypeError, ValueError) as error:
        raise UserError(f"--mesh is {args.mesh!r}; write axes and sizes as in fsdp=4,tensor=2") from error
    print(save_orbax(args.src, args.dst, sharding.make_mesh(mesh_config), args.system))


def _export_run(args: argparse.Namespace) -> None:
    """Export a run's model, load it again and compare all parameters bitwise; the result goes into report.json."""
    from lionjax.core.files import update_json
    from lionjax.inference import loading

    run = loading.load(args.src)
    run.export(args.dst, args.to, args.merge_lora)
    if args.merge_lora:  # a merged LoRA cannot be separated again
        print(f"written: {args.dst}, LoRA merged")
    else:
        exact = run.equals_bitwise(loading.load(args.dst))
        update_json(args.src / "report.json", {"round_trip_exact": exact})
        result = "every bit is the same" if exact else "BITS DIFFER"
        print(f"written: {args.dst}; loaded again, {result}")
    if args.verify:
        _verify(run.experiment, run.params, args.dst, args.dst)


def _verify(config, params, folder: Path, output_folder: Path) -> None:
    """Run both models on the same inputs and print the largest difference of each module.

    Raises UserError where they differ, or where transformers cannot run the model; `output_folder` stays.
    """
    from lionjax.convert.verify.compare import verify
    from lionjax.core.types import UserError

    try:
        report = verify(config, params, folder)
    except UserError as error:
        raise UserError(f"{output_folder} was written, but cannot be verified: {error}") from error
    print(report)
    if not report.all_close:
        raise UserError(f"the torch model of {folder} and the lionjax model differ by more than rounding errors")


def is_weights_path(path: Path) -> bool:
    """Whether a path is a weight file or a folder with weight files, not a config or a run."""
    if (path / "params").is_dir() and (path / "config").is_dir():  # an Orbax checkpoint
        return True
    files = path.iterdir() if path.is_dir() else [path]
    return any(file.suffix in (".safetensors", ".bin", ".pth", ".pt") for file in files)


def print_weight_map(path: Path) -> None:
    """Print the weight map of a folder or file of weights."""
    from lionjax import convert

    print_weight_mappings(convert.weight_map_of(path))


def print_weight_mappings(mappings) -> None:
    """Print one line per mapping: torch names, tied names, parameter paths, and the layout transform."""
    for mapping in mappings:
        tied = "".join(f"  = {name}" for name in mapping.tied_keys)
        print(f"{', '.join(mapping.torch_keys)}{tied}  ->  {', '.join(mapping.flax_paths)}  ({mapping.transform.name})")
