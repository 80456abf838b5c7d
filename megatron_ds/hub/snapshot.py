"""Download of a model's files to the client's cache: small ones at once, weights when they are read.

The client's cache holds a directory for each commit (a snapshot), with links to the files that were downloaded, and
next to it a list of all files of the commit. A file that is not there is downloaded by `fetch`: one process of a
machine does, and the others wait for its lock. Of a safetensors file that is not there, `read_header` asks for the
header only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from megatron_ds.atomic import replacing
from megatron_ds.cache import cache_folder
from megatron_ds.errors import HubError
from megatron_ds.hub.ids import HubId, Snapshot, hub_id, snapshot_of
from megatron_ds.hub.problems import explained
from megatron_ds.locks import FileLock
from megatron_ds.log import get_logger
from megatron_ds.remote import as_url, local_model
from megatron_ds.untrusted.limits import TENSOR_HEADER

_CONFIGS = ("config.json", "adapter_config.json")
_SMALL = (".json", ".jinja", ".txt", ".model")  # config, tokenizer, chat template, index of the weights
_SAFETENSORS = ".safetensors"
_SENTENCE_MODULES = "modules.json"  # then folders have modules of their own, which exports carry
_MOST_AT_ONCE = 8
_FIRST_BYTES = 2**17  # of a safetensors file: nearly every header is shorter


def local_directory(text: str, named: str = "", *, with_state: bool = True) -> str:
    """Return the directory that a text names: itself if it is a path, or a copy of a model on the hub or at a URL.

    Config, tokenizer and the index of the weights are downloaded if they are not in the cache; without a net the cache
    must have them.

    Args:
        text: a path or an id; a directory of that name wins.
        named: the beginning of errors, such as "model.path=org/name"; "" = the id.
        with_state: whether the training state of a checkpoint at a URL is copied too.

    Raises:
        HubError: it is an id, and what it names cannot be read.
        RemoteError: it is a URL, and what it names cannot be read.
    """
    if (url := as_url(text)) is not None:
        return local_model(url, named or url, with_state=with_state)
    place = hub_id(text)
    if place is None:
        return text
    from huggingface_hub import HfApi, snapshot_download

    with explained(place, named or text):
        revision = HfApi().resolve_revision(place.repo, revision=place.revision)
        if place.revision == revision.resolved and not _directory_of(place).is_dir():
            # Nothing was asked yet. Without a net this fails at once; the listing of files is tried for half a minute.
            HfApi().model_info(place.repo, revision=place.revision)
        directory = Path(snapshot_download(place.repo, revision=revision, allow_patterns=list(_CONFIGS)))
        missing = [name for name in _at_once(_listed(directory)) if not (directory / name).is_file()]
        if missing:
            snapshot_download(place.repo, revision=revision, allow_patterns=missing)
    return str(directory)


def _directory_of(place: HubId) -> Path:
    """Return the directory of a snapshot, whose commit is the revision."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=place.repo, repo_type="model")
    return Path(constants.HF_HUB_CACHE, folder, "snapshots", str(place.revision))


def pinned(text: str, named: str = "") -> str:
    """Return an id with the commit that its revision is now; a path as it is. Downloads nothing.

    Raises:
        HubError: the hub does not know it, or cannot be reached, and the cache does not know it either.
    """
    place = hub_id(text)
    if place is None:
        return text
    from huggingface_hub import HfApi

    with explained(place, named or text):
        return str(HubId(place.repo, HfApi().resolve_revision(place.repo, revision=place.revision).resolved))


def pinned_dataset(place: HubId, named: str) -> str:
    """Return the commit that the revision of a data set is now; without a net the cached one.

    Raises:
        HubError: the hub does not know it, or cannot be reached, and the cache does not know it either.
    """
    from huggingface_hub import HfApi

    with explained(place, named, "dataset"):
        return HfApi().resolve_revision(place.repo, revision=place.revision, repo_type="dataset").resolved


def exists(file: Path) -> bool:
    """Test whether a file is here, or can be fetched."""
    return file.is_file() or (snapshot_of(file.parent) is not None and file.name in _listed(file.parent))


def size_of(file: Path) -> int:
    """Return the bytes of a file that is here, or can be fetched."""
    return file.stat().st_size if file.is_file() else _listed(file.parent)[file.name]


def fetch(files: Iterable[Path], note: Callable[[str], object] | None = None) -> None:
    """Download those of these files that are not here; if another process of this machine does, wait for it.

    Args:
        files: any files.
        note: gets a line on what is downloaded; None = the log does.

    Raises:
        HubError: the download fails.
    """
    missing = [file for file in files if not file.is_file() and exists(file)]
    for directory in dict.fromkeys(file.parent for file in missing):
        snapshot = snapshot_of(directory)
        assert snapshot is not None, directory
        own = [file for file in missing if file.parent == directory]
        what = own[0].name if len(own) == 1 else f"{len(own)} files"
        size = sum(map(size_of, own)) / 1e9
        (note or get_logger().info)(f"downloading {what} of {snapshot.id.repo}, {size:,.1f} GB")
        _fetch(snapshot, [file.name for file in own])


def download_hint(directory: Path) -> str:
    """Return the command that downloads what a snapshot lacks, to end a message; empty for another directory."""
    snapshot = snapshot_of(directory)
    return "" if snapshot is None else f"; try `{snapshot.id.download_command}`"


def _fetch(snapshot: Snapshot, names: list[str]) -> None:
    from huggingface_hub import snapshot_download

    place = snapshot.id
    with explained(place, f"{place}: {', '.join(names)}"):
        snapshot_download(
            place.repo,
            revision=place.revision,
            allow_patterns=names,
            cache_dir=snapshot.cache,
            max_workers=_MOST_AT_ONCE,
        )


def read_headers(files: Collection[Path]) -> None:
    """Have `read_header` ask for those of several files at once."""
    missing = [file for file in files if not file.is_file() and file.suffix == _SAFETENSORS and exists(file)]
    with ThreadPoolExecutor(_MOST_AT_ONCE) as pool:
        list(pool.map(read_header, missing))


def read_header(file: Path) -> bytes:
    """Return the first bytes of a safetensors file that is not here: the length of its header, and the header.

    It is asked for once a machine, and kept in the cache of this package.

    Raises:
        HubError: the hub cannot be read.
    """
    snapshot = snapshot_of(file.parent)
    assert snapshot is not None, file
    folder = cache_folder("hub_headers") / snapshot.directory.parents[1].name / snapshot.commit
    kept = folder / f"{file.name}.header"
    if not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{file.name}.lock"):
            if not kept.is_file():
                with explained(snapshot.id, f"{snapshot.id}: {file.name}"):
                    content = _download_header(snapshot, file.name)
                with replacing(kept) as temporary:
                    temporary.write_bytes(content)
    return kept.read_bytes()


def _download_header(snapshot: Snapshot, name: str) -> bytes:
    start = _download_range(snapshot, name, 0, _FIRST_BYTES)
    end = 8 + int.from_bytes(start[:8], "little")
    if end > 8 + TENSOR_HEADER.max_bytes:
        raise HubError(f"{snapshot.id}: {name}: damaged, or not safetensors (its header has {end - 8:,} bytes)")
    return start[:end] if end <= len(start) else start + _download_range(snapshot, name, len(start), end)


def _download_range(snapshot: Snapshot, name: str, first: int, end: int) -> bytes:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    url = hf_hub_url(snapshot.id.repo, name, revision=snapshot.id.revision)
    headers = {**build_hf_headers(), "Range": f"bytes={first}-{end - 1}"}
    response = http_backoff("GET", url, headers=headers)
    hf_raise_for_status(response)
    return bytes(response.content)


def _listed(directory: Path) -> dict[str, int]:
    """Return the files of a snapshot with their bytes; empty if the cache has no list, as after older clients."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    snapshot = snapshot_of(directory)
    assert snapshot is not None, directory
    try:
        found = get_cached_repo_tree(snapshot.id.repo, revision=snapshot.commit, cache_dir=snapshot.cache)
    except CachedRepoTreeNotFoundError:
        return {}
    return {one.path: one.size for one in found}


def _at_once(names: Collection[str]) -> list[str]:
    """Return the files that are downloaded before a model is opened: all but weights, images and other formats.

    The weights of adapters are among them, and those of modules behind the model, which exports carry.
    """
    other = ".bin" if any(name.endswith(_SAFETENSORS) for name in names) else _SAFETENSORS
    return [name for name in sorted(names) if other not in name and _is_small(PurePosixPath(name), names)]


def _is_small(path: PurePosixPath, names: Collection[str]) -> bool:
    if len(path.parts) > 1:
        return _SENTENCE_MODULES in names and re.fullmatch(r"[0-9]+_\w+", path.parts[0]) is not None
    return path.suffix in _SMALL or path.stem == "adapter_model"
