# SPDX-License-Identifier: Apache-2.0
"""`lionjax generate DIR --guide CLIP_DIR`: captions by a language model that a CLIP guides."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lionjax.cli.errors import UsageError

# Options of each method: {name of the option: field of its config}.
MAGIC_FIELDS = {
    "alpha": "degeneration_penalty",
    "beta": "image_weight",
    "k": "num_candidates",
    "new_tokens": "max_new_tokens",
}
ZEROCAP_FIELDS = {
    "k": "num_candidates",
    "new_tokens": "max_new_tokens",
    "beams": "num_beams",
    "steps": "num_iterations",
    "step_size": "step_size",
    "fluency": "fluency_weight",
}
ZEROCAP_FILES = ("end", "forbid")
IMAGE_OPTIONS = ("method", "plus", "minus")


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the arguments of captions guided by a CLIP."""
    group = verb.add_argument_group("guidance", "a language model alone describes an image that a CLIP sees")
    group.add_argument("--guide", metavar="CLIP_DIR", type=Path, help="a folder with a CLIP or SigLIP of both towers")
    group.add_argument("--method", choices=("magic", "zerocap"), help="default: magic")
    group.add_argument("--plus", metavar="FILE", action="append", help="an image to add to --image; several times too")
    group.add_argument("--minus", metavar="FILE", action="append", help="an image to subtract; several times too")
    group.add_argument("--k", metavar="N", type=int, help="candidates of each token (magic 45, zerocap 512)")
    group.add_argument("--new-tokens", metavar="N", type=int, help="tokens of the caption (magic 16, zerocap 15)")
    group.add_argument("--alpha", metavar="A", type=float, help="magic: penalty of repetition, 0 to 1 (0.1)")
    group.add_argument("--beta", metavar="B", type=float, help="magic: weight of the image (2.0)")
    group.add_argument("--beams", metavar="N", type=int, help="zerocap: beams (5)")
    group.add_argument("--steps", metavar="N", type=int, help="zerocap: gradient steps of each token (5)")
    group.add_argument("--step-size", metavar="S", type=float, help="zerocap: length of a gradient step (0.3)")
    group.add_argument("--fluency", metavar="W", type=float, help="zerocap: weight of the fluency loss (0.2)")
    group.add_argument("--end", metavar="TEXT", help='zerocap: the token that ends a caption (".")')
    group.add_argument("--forbid", metavar="FILE", type=Path, help="zerocap: token ids to avoid, .npy or JSON")


def generate(args: argparse.Namespace) -> None:
    """Print the caption of an image, or of a sum of images. Raises UserError for what cannot be described."""
    import lionjax
    from lionjax.core.types import UserError
    from lionjax.data import images
    from lionjax.inference import dual_encoder, guided_captions
    from lionjax.inference.guidance import GuidanceConfig
    from lionjax.inference.zerocap import ZeroCapConfig, combine_images

    _check(args)
    if args.image is None:
        raise UserError("there is no image to describe; give --image FILE")
    files = [*args.image, *(args.plus or ()), *(args.minus or ())]
    weights = [1.0] * (1 + len(args.plus or ())) + [-1.0] * len(args.minus or ())
    pictures = [images.open_image(file) for file in files]
    fields = {**(MAGIC_FIELDS if args.method != "zerocap" else ZEROCAP_FIELDS)}
    given = {field: getattr(args, name) for name, field in fields.items() if getattr(args, name) is not None}
    config = ZeroCapConfig(**given) if args.method == "zerocap" else GuidanceConfig(**given)
    encoder = dual_encoder.load(args.guide)
    model = lionjax.load(args.dir, prompt_length=args.prompt_length)
    image_BE = combine_images(encoder.image_projections(pictures), weights)[None]
    if args.method == "zerocap":
        prompt = guided_captions.ZEROCAP_PROMPT if args.prompt is None else args.prompt
        if args.forbid is not None:
            import dataclasses

            config = dataclasses.replace(config, forbidden_token_ids=_read_ids(args.forbid))
        config = guided_captions.with_end_text(config, model, args.end)
        (captions,) = guided_captions.zerocap_captions(model, encoder, image_BE, prompt, config)
    else:
        captions = guided_captions.magic_captions(model, encoder, image_BE, args.prompt or "", config)
    if args.json:
        entries = [
            {"text": one.text, "mean_log_prob": one.mean_log_prob, "similarity": one.similarity} for one in captions
        ]
        print(json.dumps({"text": captions[0].text, "captions": entries}, ensure_ascii=False))
    else:
        print(captions[0].text)


def _check(args: argparse.Namespace) -> None:
    """Raise UsageError for options that do not go together."""
    unused = ("box", "tagger", "refiner", "out", "questions", "answers", "temperature", "top_p", "max_tokens")
    if args.stream or len(args.image or ()) > 1:
        raise UsageError("--stream and several images are not used with --guide; leave them out")
    others = MAGIC_FIELDS if args.method == "zerocap" else (*ZEROCAP_FIELDS, *ZEROCAP_FILES)
    own = ZEROCAP_FIELDS if args.method == "zerocap" else MAGIC_FIELDS
    for name in (*unused, *others):
        if name not in own and getattr(args, name) is not None:
            use = "with --guide" if name in unused else f"by --method {args.method or 'magic'}"
            raise UsageError(f"--{name.replace('_', '-')} is not used {use}; leave it out")


def check_unguided(args: argparse.Namespace) -> None:
    """Raise UsageError for options of guidance without --guide, and for no prompt."""
    for name in (*IMAGE_OPTIONS, *MAGIC_FIELDS, *ZEROCAP_FIELDS, *ZEROCAP_FILES):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} needs a CLIP; give --guide CLIP_DIR")
    if args.prompt is None and args.questions is None:
        raise UsageError("the following arguments are required: --prompt; see `lionjax generate --help`")


def _read_ids(file: Path) -> tuple[int, ...]:
    """Token ids of a file, an array of NumPy or a JSON list. Raises UserError for anything else."""
    import numpy as np

    from lionjax.core.types import UserError

    try:
        ids = np.load(file).ravel().tolist() if file.suffix == ".npy" else json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); give a .npy array or a JSON list of token ids") from error
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise UserError(f"{file} holds no token ids; give a .npy array or a JSON list of integers")
    return tuple(ids)
