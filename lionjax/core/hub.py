# SPDX-License-Identifier: Apache-2.0
"""Folders of the Hugging Face Hub by name: `hf://ORG/NAME[@REVISION][/PATH]`, `hf://datasets/ORG/NAME...`.

A name may stand wherever a folder of weights or data may. Files are downloaded once into the hub's cache ($HF_HOME);
interrupted downloads go on where they stopped; with HF_HUB_OFFLINE=1 only the cache is read. The token of private and
gated repositories is read from the environment variable HF_TOKEN alone, HF_ENDPOINT names another hub.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lionjax.core import bucket
from lionjax.core.errors import RetryError, UserError

NAME = re.compile(
    r"hf:/{1,2}(?P<datasets>datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.%-]+))?(?:/(?P<path>.+))?"
)
LINK_ROOTS = "LIONJAX_LINK_ROOTS"  # environment variable: folders into which links of a folder may lead
HTTP_LIBRARIES = ("httpx", "httpx2")  # of versions of huggingface_hub
# Formats beside safetensors that repositories repeat their weights in.
OTHER_FRAMEWORKS = ("*.msgpack", "*.h5", "*.ot", "onnx/*", "openvino/*", "coreml/*")
TORCH_PICKLES = ("*.bin", "*.pth", "*.pt")


@dataclasses.dataclass(frozen=True)
class HubName:
    """A parsed name. `path`: a file or folder in the repository, or ""."""

    repo: str
    revision: str | None = None
    path: str = ""
    is_dataset: bool = False

    @property
    def repo_type(self) -> str:
        return "dataset" if self.is_dataset else "model"


def is_hub_name(value: object) -> bool:
    """Whether a text or a path (which has lost a slash) is a name of the hub."""
    return str(value).startswith("hf:/")


def parse_name(value: str | Path) -> HubName:
    """The parts of a name. Raises UserError for one that is not of the form."""
    match = NAME.fullmatch(str(value).rstrip("/"))
    if match is None or ".." in str(value).split("/"):
        raise UserError(f"{str(value)!r} is no name of the hub; write hf://ORG/NAME, with @REVISION for another one")
    revision = match["revision"]
    revision = None if revision is None else revision.replace("%2F", "/")
    return HubName(match["repo"], revision, match["path"] or "", match["datasets"] is not None)


def local_path(value: str | Path) -> Path:
    """The local copy of a name of the hub or of a bucket (`core.bucket`), downloaded where needed; other paths as is.

    Raises UserError for a repository, revision or file that does not exist or needs a token, and RetryError where the
    hub does not answer.
    """
    if bucket.is_bucket_name(value):
        return bucket.download(value)
    if not is_hub_name(value):
        return Path(value)
    name = parse_name(value)
    import huggingface_hub as hub

    options = {"repo_id": name.repo, "repo_type": name.repo_type, "revision": name.revision, "token": _token()}
    inside = [name.path, f"{name.path}/*"] if name.path else None
    with _errors(name):
        skipped = [] if hub.is_offline_mode() else _skipped(hub.HfApi().repo_info(**options))
        folder = Path(hub.snapshot_download(**options, allow_patterns=inside, ignore_patterns=skipped))
    _allow_links(folder)
    if name.path and not (folder / name.path).exists():
        raise UserError(f"{name.repo} on the hub has no {name.path!r}; give a file or folder of the repository")
    return folder / name.path


def pushable_name(value: str | Path) -> HubName:
    """The parts of a name that can be pushed to. Raises UserError for another one, without HF_TOKEN, and offline."""
    name = parse_name(value)
    if name.path:
        raise UserError(f"{value} names a path in a repository; push to hf://ORG/NAME")
    if not _token():
        raise UserError("pushing needs a token with write access; set HF_TOKEN in the environment")
    if os.environ.get("HF_HUB_OFFLINE"):
        raise UserError("HF_HUB_OFFLINE is set; unset it to push")
    return name


def upload(
    folder: Path, value: str | Path, private: bool = False, message: str = "", ignored: Sequence[str] = ()
) -> str:
    """Upload a folder's files to a repository, which is made if it does not exist; returns the address of the commit.

    `ignored`: patterns of files that stay here. Raises errors as `local_path`.
    """
    name = pushable_name(value)
    import huggingface_hub as hub

    api, options = hub.HfApi(token=_token()), {"repo_id": name.repo, "repo_type": name.repo_type}
    with _errors(name):
        api.create_repo(**options, private=private, exist_ok=True)
        commit = api.upload_folder(
            **options,
            folder_path=folder,
            revision=name.revision,
            commit_message=message or f"Upload {folder.name}",
            ignore_patterns=list(ignored),
        )
    return str(commit.commit_url)


def _allow_links(snapshot: Path) -> None:
    """Let the links of a snapshot in the hub's cache lead to its blobs."""
    roots = [root for root in os.environ.get(LINK_ROOTS, "").split(":") if root]
    os.environ[LINK_ROOTS] = ":".join(dict.fromkeys([*roots, str(snapshot.parent.parent / "blobs")]))


def _token() -> str | bool:
    """The token of the environment; False: none, not even one that another program has stored."""
    return os.environ.get("HF_TOKEN") or False


def _skipped(info) -> list[str]:
    """Patterns of files that repeat a repository's safetensors weights; `info`: what the hub says of the repository."""
    has_safetensors = any(file.rfilename.endswith(".safetensors") for file in info.siblings or ())
    return [*OTHER_FRAMEWORKS, *TORCH_PICKLES] if has_safetensors else list(OTHER_FRAMEWORKS)


@contextmanager
def _errors(name: HubName) -> Iterator[None]:
    """The hub's errors as one sentence each."""
    from huggingface_hub import errors

    where = f"{name.repo} on the hub"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"{where} is gated; accept its terms on its page and set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{where} has no revision {name.revision!r}; give a branch, tag or commit of it") from error
    except errors.RepositoryNotFoundError as error:
        hint = "check the name" if _token() else "check the name; a private repository needs HF_TOKEN"
        raise UserError(f"there is no {name.repo_type} {where}; {hint}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if os.environ.get("HF_HUB_OFFLINE"):
            raise UserError(f"{where} is not in the cache, and HF_HUB_OFFLINE is set; unset it to download") from error
        raise RetryError(f"the hub does not answer, and {name.repo} is not in the cache; try again") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        kind = UserError if status in (400, 401, 403, 409, 422) else RetryError
        hint = "check HF_TOKEN and its rights" if status in (401, 403) else "try again"
        raise kind(f"the hub answers {status} for {name.repo}; {hint}") from error
    except Exception as error:
        what = type(error).__name__
        if type(error).__module__.partition(".")[0] not in HTTP_LIBRARIES:
            raise
        raise RetryError(f"no connection to the hub ({what}); check the network and try again") from error
