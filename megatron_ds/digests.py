"""Hashes of files. XXH3 detects any change at the speed of memory, and is no signature; SHA-256 names caches."""

import hashlib
import stat
import time
from functools import lru_cache
from pathlib import Path

import xxhash

_READ_BYTES = 2**18  # stays in the cache of a core
_SETTLED_NS = 2 * 10**9
"""Age from which a change of a file would show in its times; clocks of file systems may be as coarse as that."""
_SAMPLED_BYTES, _BLOCK_BYTES, _NUM_BLOCKS = 2**18, 2**13, 16


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex: names caches."""
    return _hexdigest(path, hashlib.sha256())


def file_xxh3(path: Path) -> str:
    """Return the 128-bit xxh3 of a file's bytes, in hex: the checksum in manifests, much faster than SHA-256."""
    return _hexdigest(path, xxhash.xxh3_128())


def known_xxh3(path: Path) -> str:
    """Return `file_xxh3`, read once in a process while the file's inode, size and times stay the same.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path.name} is no regular file")
    if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) < _SETTLED_NS:
        return file_xxh3(path)
    return _xxh3_of(path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))


@lru_cache(maxsize=1024)
def _xxh3_of(path: Path, identity: tuple[int, ...]) -> str:
    return file_xxh3(path)


def sampled_xxh3(path: Path) -> str:
    """Return the 128-bit xxh3 of a file's size and of blocks that are spread evenly over it, in hex.

    Files up to `_SAMPLED_BYTES` are read completely. Of a longer one, the first and the last block are among those that
    are read, so that two files with different headers, lengths or ends differ.
    """
    size = path.stat().st_size
    digest = xxhash.xxh3_128(str(size).encode())
    with path.open("rb", buffering=0) as file:
        if size <= _SAMPLED_BYTES:
            digest.update(file.read(_SAMPLED_BYTES))
        else:
            for number in range(_NUM_BLOCKS):
                file.seek((size - _BLOCK_BYTES) * number // (_NUM_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _hexdigest(path: Path, digest: "hashlib._Hash | xxhash.xxh3_128") -> str:
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
