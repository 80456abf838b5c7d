"""Addresses of remote files, and the packages that read them."""

from __future__ import annotations

import re
from importlib.util import find_spec
from urllib.parse import urlsplit

from megatron_ds.errors import ConfigError

_URL = re.compile(r"([a-z][a-z0-9+.-]*):(//?)(.+)")
_CLIENTS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
}
"""Scheme -> the package with its client, in addition to fsspec."""
_IN_EXTRA = ("s3fs", "gcsfs", "aiohttp")
READ_ONLY = ("http", "https")


def as_url(text: str) -> str | None:
    """Return the address of remote files that a text is; None = it is a path.

    That of a `Path` has lost one of its slashes.
    """
    match = _URL.fullmatch(text)
    if match is None or match[1] == "file" or (match[2] == "/" and match[1] not in _CLIENTS):
        return None
    return f"{match[1]}://{match[3]}"


def scheme_of(url: str) -> str:
    """Return the scheme of a URL."""
    return url.partition(":")[0]


def is_url(text: str) -> bool:
    """Return whether a text is the address of remote files."""
    return as_url(text) is not None


def require_local(path: str, named: str, fix: str) -> None:
    """Check that a path is that of a disk.

    Args:
        path: the path.
        named: the field or option.
        fix: the end of the error.

    Raises:
        ConfigError: it is a URL.
    """
    if (url := as_url(path)) is not None:
        raise ConfigError(f"{named}={url} is a URL, and must be a path on a disk; {fix}")


def require_client(url: str, named: str, *, writes: bool = False) -> None:
    """Check that the packages are installed that read, or write, a URL.

    Args:
        url: the URL.
        named: the beginning of errors, such as "model.path=s3://bucket/model".
        writes: whether it is written.

    Raises:
        ConfigError: a package is missing, the scheme is unknown, it cannot be written, or it has a password.
    """
    scheme = scheme_of(url)
    if urlsplit(url).password is not None:
        raise ConfigError(
            f"{named.partition('=')[0]}: a URL has a password, which config.yaml and report.html would show; leave it "
            "out, and give it to the client's library by the environment (docs/remote.md)"
        )
    if scheme not in _CLIENTS:
        raise ConfigError(f"{named}: {scheme}:// is not one of {', '.join(f'{one}://' for one in _CLIENTS)}")
    if writes and scheme in READ_ONLY:
        raise ConfigError(f"{named}: a web server cannot be written to; try s3://BUCKET/NAME or gs://BUCKET/NAME")
    client = _CLIENTS[scheme]
    for package in ("fsspec", client):
        if find_spec(package) is None:
            fix = "'megatron-ds[remote]'" if package == "fsspec" or client in _IN_EXTRA else package
            raise ConfigError(f"{named} needs the package {package}; try pip install {fix}")
