"""Hashes of files."""

import hashlib
from pathlib import Path

import xxhash

_READ_BYTES = 1 << 22


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex: names caches."""
    return _hexdigest(path, hashlib.sha256())


def file_xxh3(path: Path) -> str:
    """Return the 128-bit xxh3 of a file's bytes, in hex: the checksum in manifests, much faster than SHA-256."""
    return _hexdigest(path, xxhash.xxh3_128())


def _hexdigest(path: Path, digest: "hashlib._Hash | xxhash.xxh3_128") -> str:
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
