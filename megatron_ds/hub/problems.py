"""Errors of the hub's client as one line: the id, the reason why it cannot be read, and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ds.errors import HubError
from megatron_ds.hub.ids import HubId


@contextmanager
def explained(place: HubId, named: str, kind: str = "model") -> Iterator[None]:
    """Turn what the client raises into a `HubError`.

    Args:
        place: the repository.
        named: the beginning of the line, such as "model.path=org/name".
        kind: of the repository, "model" or "dataset".
    """
    from httpx2 import HTTPError
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HfHubHTTPError, RevisionResolutionError

    try:
        yield
    except (HfHubHTTPError, RevisionResolutionError, CachedRepoTreeNotFoundError, HTTPError, OSError) as problem:
        raise HubError(f"{named} {_reason(problem, place, kind)}") from problem


@contextmanager
def explained_upload(named: str, fix: str) -> Iterator[None]:
    """Turn what the client raises while it writes into a `HubError`.

    Args:
        named: the beginning of the line, such as "export.push_to=org/name".
        fix: how it is done later; a token that may not write is fixed by another one.
    """
    from huggingface_hub import constants

    try:
        yield
    except Exception as problem:  # the client wraps those of uploads in a RuntimeError
        if isinstance(problem, HubError) or not (_status(problem) or may_pass(problem)):
            raise
        if _status(problem) in (401, 403):
            reason = "cannot be written with your token"
            fix = f"try `hf auth login` with one that may write there; {fix}"
        elif (status := _status(problem)) is not None:
            reason = f"cannot be written: the hub answers with status {status}"
        else:
            reason = f"cannot be written: the hub at {constants.ENDPOINT} cannot be reached"
        raise HubError(f"{named} {reason} ({first_line(problem)}); {fix}") from problem


def may_pass(problem: BaseException) -> bool:
    """Test whether an error may be gone at the next try: no connection, or a hub that is down or busy."""
    from httpx2 import TransportError

    status = _status(problem)
    if status is not None:
        return status in (408, 409, 412, 429) or status >= 500
    return any(isinstance(one, TransportError | ConnectionError) for one in _causes(problem))


def _status(problem: BaseException) -> int | None:
    """Return the status of the hub's answer that an error is about; None = it is about something else."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((one.response.status_code for one in _causes(problem) if isinstance(one, HfHubHTTPError)), None)


def _reason(problem: Exception, place: HubId, kind: str) -> str:
    from httpx2 import TransportError
    from huggingface_hub import constants, errors, get_token

    chain = list(_causes(problem))
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{place.repo}"

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    if has(errors.GatedRepoError):
        token = "the account of your token has none" if get_token() else "no token is set"
        return f"is a {kind} whose files need permission, and {token}; ask for it on {page}, then try `hf auth login`"
    if has(errors.RepositoryNotFoundError):
        login = "the account of your token may not see it" if get_token() else "it is private: then try `hf auth login`"
        return f"does not exist here, and on the hub there is no such {kind}, or {login}{_near(place)}"
    if has(errors.RevisionNotFoundError):
        return f"is on the hub, but not its revision {place.revision}; see the branches and tags on {page}/tree/main"
    if has(errors.RemoteEntryNotFoundError):
        return f"is on the hub without that file ({first_line(problem)}); see {page}/tree/main"
    status = _status(problem)
    if status in (401, 403):
        return f"cannot be read: the hub refuses your token ({first_line(problem)}); try `hf auth login`"
    lacks = f"and not all of it is in the cache {constants.HF_HUB_CACHE}"
    command = place.download_command + (" --repo-type dataset" if kind == "dataset" else "")
    download = f"try `{command}` where there is a net"
    if constants.is_offline_mode():
        return f"does not exist here, HF_HUB_OFFLINE=1 forbids to download it, {lacks}; {download}{_near(place)}"
    away = (errors.LocalEntryNotFoundError, errors.RevisionResolutionError, ConnectionError, TransportError)
    if has(*away) or status is not None:
        why = f"answers with status {status}" if status else "cannot be reached"
        return f"does not exist here, the hub at {constants.ENDPOINT} {why}, {lacks}; {download}{_near(place)}"
    return f"cannot be downloaded ({first_line(problem)}); try `{command}`"


def _causes(problem: BaseException | None) -> Iterator[BaseException]:
    while problem is not None:
        yield problem
        problem = problem.__cause__ or problem.__context__


def first_line(problem: BaseException) -> str:
    """Return the first line of an error."""
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__


def _near(place: HubId) -> str:
    """Return a hint at a directory here of a similar name; "" = there is no such one."""
    org, _, name = place.repo.partition("/")
    folders = [one.name for one in Path().iterdir() if one.is_dir()]
    found = []
    for folder in difflib.get_close_matches(org, folders, n=1, cutoff=0.6):
        inside = [one.name for one in Path(folder).iterdir() if one.is_dir()]
        found += [f"{folder}/{one}" for one in difflib.get_close_matches(name, inside, n=1, cutoff=0.6)]
    return f"; nearest: {found[0]}" if found else ""
