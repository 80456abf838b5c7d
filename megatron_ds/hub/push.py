"""Upload of a complete export to a repository on the hub, in one commit."""

from __future__ import annotations

import time
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

from megatron_ds.errors import HubError
from megatron_ds.hub.ids import HubId
from megatron_ds.hub.problems import explained_upload, first_line, may_pass
from megatron_ds.log import get_logger
from megatron_ds.remote import WEIGHTS, is_url

CARD = "README.md"
_MESSAGE = "Upload a model exported by megatron-ds"
_WAITS_S = (2.0, 15.0, 60.0)  # before further tries; files that were sent are not sent again


def prepare_push(target: HubId, named: str, *, private: bool) -> None:
    """Check that a repository can be written, before anything is spent; it is made if need be.

    Args:
        target: the repository; its revision is a branch.
        named: the beginning of errors, such as "export.push_to=org/name".
        private: whether a repository that is made is visible only to its owner.

    Raises:
        HubError: there is no token or no net, or the token's account may not write there.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if constants.is_offline_mode():
        raise HubError(f"{named} needs a net, and HF_HUB_OFFLINE=1 forbids to use it; try `{_later(target)}` later")
    if get_token() is None:
        raise HubError(f"{named} needs a token that may write; try `hf auth login`, or set HF_TOKEN")
    with explained_upload(named, _later(target)):
        api = HfApi()
        try:
            api.auth_check(target.repo, write=True)
        except RepositoryNotFoundError:
            api.create_repo(target.repo, private=private)
        if target.revision is not None:
            api.create_branch(target.repo, branch=target.revision, exist_ok=True)


def push(directory: Path, target: HubId, named: str, card: str, leave_out: Collection[str] = ()) -> str:
    """Upload the files of a directory in one commit; returns its address.

    Files of weights that are in the repository and not in the directory are deleted; others stay. A model card that is
    there stays too.

    Args:
        directory: a complete export.
        target: the repository, which `prepare_push` has checked.
        named: the beginning of errors.
        card: the content of README.md, if the repository has none.
        leave_out: names of files that are not uploaded.

    Raises:
        HubError: the upload has failed several times; the message has the command that does it later.
    """
    with explained_upload(named, f"{directory} is complete: try `{_later(target, directory)}`"):
        for wait_s in _WAITS_S:
            try:
                return _push(directory, target, card, leave_out)
            except Exception as problem:
                if not may_pass(problem):
                    raise
                get_logger().warning("%s: %s; the upload is tried again in %.0f s", named, first_line(problem), wait_s)
                time.sleep(wait_s)
        return _push(directory, target, card, leave_out)


def describe_upload(target: str, address: str) -> str:
    """Return the line that says that an export was uploaded.

    Args:
        target: a repository or a URL, as the user wrote it.
        address: the page of the commit, or the URL.
    """
    return f"uploaded to {'' if is_url(target) else 'the hub: '}{address}"


def _push(directory: Path, target: HubId, card: str, leave_out: Collection[str]) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    files = {one.relative_to(directory).as_posix(): one for one in sorted(directory.rglob("*")) if one.is_file()}
    there = api.list_repo_files(target.repo, revision=target.revision)
    former = [name for name in there if name not in files and any(fnmatch(name, one) for one in WEIGHTS)]
    operations = [CommitOperationAdd(name, file) for name, file in files.items() if name not in leave_out]
    if CARD not in files and CARD not in there:
        operations.append(CommitOperationAdd(CARD, card.encode()))
    done = api.create_commit(
        target.repo,
        [*operations, *map(CommitOperationDelete, former)],
        commit_message=_MESSAGE,
        revision=target.revision,
    )
    return str(done.commit_url)


def _later(target: HubId, directory: Path | None = None) -> str:
    revision = f" --revision {target.revision}" if target.revision else ""
    return f"hf upload {target.repo} {directory or 'DIRECTORY'} .{revision}"
