# SPDX-License-Identifier: Apache-2.0
"""`lionjax push`: upload an exported folder to the Hugging Face Hub, with a model card that says license and tags.

Or copy any folder, a run too, to a bucket of Google Cloud Storage.
"""

from __future__ import annotations

import argparse
from pathlib import Path

CARD = "README.md"
STAYS_HERE = ("lock", "*.tmp", ".cache/*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `lionjax push`."""
    dir_help = "a folder that `lionjax convert` wrote, or a run for gs://"
    parser.add_argument("dir", metavar="DIR", type=Path, help=dir_help)
    target_help = "where to; @BRANCH for another branch than main. gs://BUCKET/PATH: a folder of a bucket"
    parser.add_argument("repository", metavar="hf://ORG/NAME", help=target_help)
    license_help = "license of the weights by its name on the hub, such as apache-2.0 or llama2"
    parser.add_argument("--license", metavar="NAME", help=license_help)
    parser.add_argument("--tags", metavar="TAG", nargs="+", default=[], help="further tags of the model card")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--message", metavar="TEXT", default="", help="message of the commit")


def push(args: argparse.Namespace, _) -> None:
    """Upload a folder of weights to the Hugging Face Hub with card, license and tags, or copy one to a bucket."""
    from lionjax.core import bucket, files, hub
    from lionjax.core.types import UserError
    from lionjax.inference import loading

    if not args.dir.is_dir() or not any(args.dir.iterdir()):
        raise UserError(f"there is no folder {args.dir} with files; give one that `lionjax convert` wrote")
    if bucket.is_bucket_name(args.repository):
        print(bucket.upload(args.dir, args.repository))
        return
    if loading.is_run(args.dir):
        raise UserError(f"{args.dir} is a run; push the folder that `lionjax convert {args.dir} DIR --to torch` writes")
    card = args.dir / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {args.dir.name}\n"
    text = with_metadata(text, args.license, ["lionjax", *args.tags])
    if text is None:
        raise UserError(f"the model card of {args.dir} names no license; give --license, such as --license apache-2.0")
    hub.pushable_name(args.repository)  # before anything is written
    files.write_atomic(card, text)
    print(hub.upload(args.dir, args.repository, args.private, args.message, STAYS_HERE))


def with_metadata(text: str, license_name: str | None, tags: list[str]) -> str | None:
    """A model card with the license and further tags in its YAML head; None if no license is known."""
    from huggingface_hub import ModelCard

    card = ModelCard(text, ignore_metadata_errors=True)
    card.data.license = license_name or card.data.license
    card.data.library_name = card.data.library_name or "lionjax"
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
    return str(card) if card.data.license else None
