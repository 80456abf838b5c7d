"""Megatron's `.idx` and `.bin` files: a memory-mapped reader of a corpus, and the writer of an `.idx`.

`PREFIX.bin` holds the tokens of all sequences, one after the other; `PREFIX.idx` holds the start of each, and which of
them begin documents. Little-endian, N sequences, D - 1 documents:

| bytes of `.idx` | |
| --- | --- |
| 9 | `MMIDIDX\\0\\0` |
| 8 | version: 1 |
| 1 | type of a token: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 6 f64, 7 f32, 8 u16 |
| 8, 8 | N, D |
| 4N | lengths in tokens, i32 |
| 8N | start of each in `.bin`, in bytes, i64 |
| 8D | the first sequence of each document, and N at the end, i64 |
| N | a mode for each sequence, i8; only where not all are text |
"""

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from megatron_ds.errors import DataError
from megatron_ds.remote import is_url, local_data

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_TYPE_OF_CODE = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_LARGEST_LENGTH = np.iinfo(np.int32).max
_READ_BYTES = 1 << 22
_BLOCK_BYTES = 1 << 16
_NUM_BLOCKS = 64
_CHECK_SEQUENCES = 1 << 22  # bounds the memory of a check


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype of Megatron's writer for ids below `vocab_size`: u16 below 65,500, else i32."""
    return np.dtype("<u2" if vocab_size < 65_500 else "<i4")


def index_path(prefix: str) -> Path:
    """Return `PREFIX.idx`; a prefix may hold dots."""
    return Path(f"{prefix}.idx")


def tokens_path(prefix: str) -> Path:
    """Return `PREFIX.bin`; a prefix may hold dots."""
    return Path(f"{prefix}.bin")


def prefix_of(source: str) -> str:
    """Return the prefix of a source: a prefix, a `.bin` or an `.idx`."""
    if is_url(source):
        return str(local_data(source, f"data: {source}", prefix=True))
    expanded = os.path.expanduser(source)
    if not index_path(expanded).exists():
        for suffix in (".bin", ".idx"):
            if expanded.endswith(suffix):
                return expanded.removesuffix(suffix)
    return expanded


class IndexedFile:
    """The sequences of one corpus. Tokens are copied when they are read; all of `.idx` is checked on opening.

    Args:
        source: a prefix, or either of its files.

    Attributes:
        prefix: path without `.bin` or `.idx`.
        dtype: of a token.
        lengths: of the sequences, in tokens: (N,) int32.
        pointers: start of each, in bytes: (N,) int64.
        document_indices: the first sequence of each document, and N: (D,) int64.

    Raises:
        DataError: a file is missing, damaged or does not fit the other.
    """

    def __init__(self, source: str) -> None:
        self.prefix = prefix_of(source)
        for path in (index_path(self.prefix), tokens_path(self.prefix)):
            if not path.is_file():
                raise DataError(
                    f"data: {source}: no such file {path} (looked in {Path.cwd()}); data.format=indexed reads "
                    "PREFIX.bin and PREFIX.idx: name their PREFIX"
                )
        self.dtype, num_sequences, num_indices = self._read_header()
        index = np.memmap(index_path(self.prefix), dtype=np.uint8, mode="r")
        lengths_end = _HEADER.size + 4 * num_sequences
        pointers_end = lengths_end + 8 * num_sequences
        self.lengths = index[_HEADER.size : lengths_end].view("<i4")
        self.pointers = index[lengths_end:pointers_end].view("<i8")
        self.document_indices = index[pointers_end : pointers_end + 8 * num_indices].view("<i8")
        self._check_modes(index[pointers_end + 8 * num_indices :])
        self._check_documents()
        self.num_tokens = self._check_sequences()
        self._check_tokens()
        empty = self.num_tokens == 0  # an empty file cannot be mapped
        self._tokens = np.empty(0, self.dtype) if empty else np.memmap(tokens_path(self.prefix), self.dtype, mode="r")

    def __len__(self) -> int:
        """Return N, the number of sequences."""
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """D - 1, the number of documents."""
        return len(self.document_indices) - 1

    def read(self, sequence: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return tokens [offset, offset + length) of a sequence, or all from `offset` on; a view of the file."""
        size = int(self.lengths[sequence])
        length = size - offset if length is None else length
        assert 0 <= offset <= offset + length <= size, f"[{offset}, {offset + length}) of {size} tokens"
        start = int(self.pointers[sequence]) // self.dtype.itemsize + offset
        return self._tokens[start : start + length]

    def read_tokens(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) of the file, of any sequences; a view of it."""
        assert 0 <= start <= stop <= self.num_tokens, f"[{start}, {stop}) of {self.num_tokens} tokens"
        return self._tokens[start:stop]

    def digest(self) -> str:
        """Return a hash of all of `.idx` and of evenly spaced blocks of `.bin`. Names and paths do not count.

        Reading all tokens at every start would take too long: a change by hand between the blocks is not detected. Up
        to 4 MiB, the blocks cover the file.
        """
        digest = xxhash.xxh3_128()
        with index_path(self.prefix).open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                digest.update(chunk)
        tokens = self._tokens.view(np.uint8)
        last = max(0, len(tokens) - _BLOCK_BYTES)
        for number in range(_NUM_BLOCKS if last else 1):
            start = last * number // (_NUM_BLOCKS - 1)
            digest.update(tokens[start : start + _BLOCK_BYTES].tobytes())
        return digest.hexdigest()

    def _read_header(self) -> tuple[np.dtype, int, int]:
        """Return the dtype of a token, N and D; the file must have the size that they imply."""
        path = index_path(self.prefix)
        with path.open("rb") as file:
            raw = file.read(_HEADER.size)
        if len(raw) < _HEADER.size or not raw.startswith(_MAGIC):
            raise DataError(f"data: {path}: not an index of Megatron: its first bytes are not MMIDIDX; write it again")
        _, version, code, num_sequences, num_indices = _HEADER.unpack(raw)
        if version != _VERSION:
            raise DataError(f"data: {path}: version {version} of the format; only version {_VERSION} is read")
        if code not in _TYPE_OF_CODE:
            raise DataError(
                f"data: {path}: code {code} of the type of a token; only integers are read, whose codes are "
                f"{', '.join(map(str, _TYPE_OF_CODE))}"
            )
        size, expected = path.stat().st_size, _HEADER.size + 12 * num_sequences + 8 * num_indices
        if size not in (expected, expected + num_sequences):
            raise DataError(
                f"data: {path}: {size:,} bytes, but {num_sequences:,} sequences and {num_indices:,} boundaries of "
                f"documents take {expected:,}; the file was cut or damaged: copy or write it again"
            )
        return np.dtype(_TYPE_OF_CODE[code]), num_sequences, num_indices

    def _check_modes(self, modes: np.ndarray) -> None:
        if modes.any():
            raise DataError(
                f"data: {index_path(self.prefix)}: sequence {int(np.flatnonzero(modes)[0])} is not text (mode "
                f"{int(modes[modes != 0][0])} of a multimodal corpus); only text is read"
            )

    def _check_documents(self) -> None:
        indices = self.document_indices
        ascends = bool((indices[1:] >= indices[:-1]).all())  # a difference of two numbers of a damaged file may wrap
        if len(indices) == 0 or indices[0] != 0 or indices[-1] != len(self.lengths) or not ascends:
            raise DataError(
                f"data: {index_path(self.prefix)}: the boundaries of its documents do not ascend from 0 to its "
                f"{len(self.lengths):,} sequences; the file is damaged: copy or write it again"
            )

    def _check_sequences(self) -> int:
        """Return the number of tokens; each sequence must begin at the end of the one before."""
        begin = 0
        for start in range(0, len(self.lengths), _CHECK_SEQUENCES):
            lengths = self.lengths[start : start + _CHECK_SEQUENCES].astype(np.int64)
            ends = begin + np.cumsum(lengths) * self.dtype.itemsize
            wrong = (lengths < 0) | (
                self.pointers[start : start + _CHECK_SEQUENCES] != ends - lengths * self.dtype.itemsize
            )
            if wrong.any():
                raise DataError(
                    f"data: {index_path(self.prefix)}: sequence {start + int(np.flatnonzero(wrong)[0])} does not begin "
                    "where the one before ends; the file is damaged: copy or write it again"
                )
            begin = int(ends[-1])
        return begin // self.dtype.itemsize

    def _check_tokens(self) -> None:
        path = tokens_path(self.prefix)
        size, expected = path.stat().st_size, self.num_tokens * self.dtype.itemsize
        if size != expected:
            raise DataError(
                f"data: {path}: {size:,} bytes, but {index_path(self.prefix)} lists {self.num_tokens:,} tokens of "
                f"{self.dtype.itemsize} bytes, which take {expected:,}; copy or write both again"
            )


def write_index(
    path: Path, dtype: np.dtype, lengths: Sequence[int] | np.ndarray, document_indices: Sequence[int] | np.ndarray
) -> None:
    """Write an `.idx`.

    Args:
        path: the file; an existing one is overwritten.
        dtype: of the tokens in the `.bin`.
        lengths: of the sequences, in tokens: (N,).
        document_indices: the first sequence of each document, and N: (D,).

    Raises:
        DataError: a sequence is longer than the format allows.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    starts = np.asarray(document_indices, dtype="<i8")
    assert len(starts) and starts[0] == 0 and starts[-1] == len(sizes), f"boundaries {starts[:1]} .. {starts[-1:]}"
    if len(sizes) and sizes.max() > _LARGEST_LENGTH:
        sequence = int(sizes.argmax())
        raise DataError(
            f"data: {path}: sequence {sequence} has {sizes[sequence]:,} tokens; the format takes at most "
            f"{_LARGEST_LENGTH:,}: cut the document"
        )
    code = next(code for code, name in _TYPE_OF_CODE.items() if np.dtype(name) == dtype)
    with Path(path).open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, _VERSION, code, len(sizes), len(starts)))
        file.write(sizes.astype("<i4").tobytes())
        file.write(((np.cumsum(sizes) - sizes) * np.dtype(dtype).itemsize).astype("<i8").tobytes())
        file.write(starts.tobytes())
