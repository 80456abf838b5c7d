"""Damaged `.idx` files: the error of data or a corpus within its files, and nothing allocated beyond them."""

import random
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_ds.data.indexed.files import IndexedFile, index_path, tokens_path, write_index
from megatron_ds.errors import DataError
from tests.data.cache_mutations import damaged

SIZES = np.random.default_rng(0).integers(0, 20, size=60)
EXTREMES = (0, 1, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 60, 61)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    prefix = str(tmp_path / "corpus")
    np.arange(SIZES.sum()).astype("<u2").tofile(tokens_path(prefix))
    write_index(index_path(prefix), np.dtype("<u2"), SIZES, np.arange(0, len(SIZES) + 1, 3))
    return prefix


def with_number(content: bytes, chance: random.Random) -> bytes:
    """Return an index with another number in place of a length, a start, a boundary or a count."""
    size, code = chance.choice(((4, "<i"), (8, "<q")))
    place = chance.choice((18, 26, 34 + size * chance.randrange((len(content) - 34) // size)))
    value = chance.choice(EXTREMES) if size == 8 else chance.choice(EXTREMES[:5])
    return content[:place] + struct.pack(code, value) + content[place + size :]


def check(prefix: str, seeds: range) -> int:
    """Open a corpus with a damaged index for each seed; return how many were refused."""
    index, refused = index_path(prefix), 0
    whole = index.read_bytes()
    for seed in seeds:
        chance = random.Random(seed)
        index.write_bytes(with_number(whole, chance) if seed % 2 else damaged(whole, chance))
        tracemalloc.start()
        try:
            file = IndexedFile(prefix)
        except DataError as problem:
            assert "\n" not in str(problem)
            refused += 1
        else:  # another number of the same meaning, or other boundaries: all of it is within the files
            assert sum(len(file.read(one)) for one in range(len(file))) == file.num_tokens
            assert (np.diff(file.document_indices) >= 0).all() and file.document_indices[-1] == len(file)
            file.digest()
        finally:
            assert tracemalloc.get_traced_memory()[1] < 10**7, seed
            tracemalloc.stop()
    return refused


def test_a_damaged_index(corpus: str) -> None:
    assert check(corpus, range(150)) > 100


@pytest.mark.sweep
def test_more_damage(corpus: str) -> None:
    assert check(corpus, range(150, 3150)) > 2000


def test_boundaries_whose_difference_wraps(corpus: str) -> None:
    index = index_path(corpus)
    content = bytearray(index.read_bytes())
    start = 34 + 12 * len(SIZES)
    struct.pack_into("<qq", content, start + 8, 2**63 - 1, -(2**63))
    index.write_bytes(bytes(content))
    with pytest.raises(DataError, match="the boundaries of its documents do not ascend"):
        IndexedFile(corpus)
