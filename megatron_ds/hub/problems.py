"""Errors of the hub's client as one line: the id, the reason why it cannot be read, and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ds.errors import HubError
from megatron_ds.hub.ids import HubId


@contextmanager
def explained(place: HubId, named: str) -> Iterator[None]:
    """Turn what the client raises into a `HubError`.

    Args:
        place: the repository.
        named: the beginning of the line, such as "model.path=org/name".
    """
    from httpx2 import HTTPError
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HfHubHTTPError, RevisionResolutionError

    try:
        yield
    except (HfHubHTTPError, RevisionResolutionError, CachedRepoTreeNotFoundError, HTTPError, OSError) as problem:
        raise HubError(f"{named} {_reason(problem, place)}") from problem


def _reason(problem: Exception, place: HubId) -> str:
    from httpx2 import TransportError
    from huggingface_hub import constants, errors, get_token

    chain = list(_causes(problem))
    page = f"{constants.ENDPOINT}/{place.repo}"

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    if has(errors.GatedRepoError):
        token = "the account of your token has none" if get_token() else "no token is set"
        return f"is a model whose files need permission, and {token}; ask for it on {page}, then try `hf auth login`"
    if has(errors.RepositoryNotFoundError):
        login = "the account of your token may not see it" if get_token() else "it is private: then try `hf auth login`"
        return f"does not exist here, and on the hub there is no such model, or {login}{_near(place)}"
    if has(errors.RevisionNotFoundError):
        return f"is on the hub, but not its revision {place.revision}; see the branches and tags on {page}/tree/main"
    if has(errors.RemoteEntryNotFoundError):
        return f"is on the hub without that file ({_first_line(problem)}); see {page}/tree/main"
    status = next((one.response.status_code for one in chain if isinstance(one, errors.HfHubHTTPError)), None)
    if status in (401, 403):
        return f"cannot be read: the hub refuses your token ({_first_line(problem)}); try `hf auth login`"
    lacks = f"and not all of it is in the cache {constants.HF_HUB_CACHE}"
    download = f"try `{place.download_command}` where there is a net"
    if constants.is_offline_mode():
        return f"does not exist here, HF_HUB_OFFLINE=1 forbids to download it, {lacks}; {download}{_near(place)}"
    away = (errors.LocalEntryNotFoundError, errors.RevisionResolutionError, ConnectionError, TransportError)
    if has(*away) or status is not None:
        why = f"answers with status {status}" if status else "cannot be reached"
        return f"does not exist here, the hub at {constants.ENDPOINT} {why}, {lacks}; {download}{_near(place)}"
    return f"cannot be downloaded ({_first_line(problem)}); try `{place.download_command}`"


def _causes(problem: BaseException | None) -> Iterator[BaseException]:
    while problem is not None:
        yield problem
        problem = problem.__cause__ or problem.__context__


def _first_line(problem: Exception) -> str:
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
