"""Hashes of files. XXH3 detects any change at the speed of memory, and is no signature; SHA-256 names caches."""

import hashlib
from pathlib import Path

import xxhash

_READ_BYTES = 2**18  # stays in the cache of a core


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex: names caches."""
    return _hexdigest(path, hashlib.sha256())


def file_xxh3(path: Path) -> str:
    """Return the 128-bit xxh3 of a file's bytes, in hex: the checksum in manifests, much faster than SHA-256."""
    return _hexdigest(path, xxhash.xxh3_128())


def _hexdigest(path: Path, digest: "hashlib._Hash | xxhash.xxh3_128") -> str:
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
