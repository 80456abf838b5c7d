"""Indexed files that are damaged or not text, what a cache must not mix up, and the edge of Megatron's 80 % rule."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_ds.data import Causal, Dataset, Order, Split, open_dataset
from megatron_ds.data.indexed import files
from megatron_ds.data.indexed.files import IndexedFile, index_path, tokens_path, write_index
from megatron_ds.data.indexed.order import Epochs, build_indices, count_epochs
from megatron_ds.errors import DataError
from tests.data import oracle

VOCAB_SIZE = 100
NUM_DOCUMENTS, LENGTH, SEQ_LENGTH = 50, 20, 8
DOCUMENT_INDICES_AT = 34 + 12 * NUM_DOCUMENTS


def write(prefix: Path, dtype: str = "<u2", tokens: np.ndarray | None = None) -> str:
    """Documents of one length, so that parts of a file look alike."""
    if tokens is None:
        tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, size=NUM_DOCUMENTS * LENGTH)
    tokens.astype(dtype).tofile(tokens_path(str(prefix)))
    write_index(index_path(str(prefix)), np.dtype(dtype), [LENGTH] * NUM_DOCUMENTS, list(range(NUM_DOCUMENTS + 1)))
    return str(prefix)


def overwrite(path: Path, offset: int, value: int) -> None:
    raw = bytearray(path.read_bytes())
    struct.pack_into("<q", raw, offset, value)
    path.write_bytes(raw)


@pytest.mark.parametrize(("place", "value"), [(0, 1), (3, 7), (NUM_DOCUMENTS, NUM_DOCUMENTS - 1)])
def test_boundaries_of_documents_must_ascend_from_the_first_sequence_to_the_last(
    place: int, value: int, tmp_path: Path
) -> None:
    prefix = write(tmp_path / "a")
    overwrite(index_path(prefix), DOCUMENT_INDICES_AT + 8 * place, value)
    with pytest.raises(DataError, match=r"a\.idx: the boundaries of its documents do not ascend from 0 to its 50"):
        IndexedFile(prefix)


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_length_is_refused(suffix: str, change: int, tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    path = Path(f"{prefix}{suffix}")
    raw = path.read_bytes()
    path.write_bytes(raw[:change] if change < 0 else raw + b"\0" * change)
    with pytest.raises(DataError, match=rf"a\{suffix}: .* bytes, but .* take"):
        IndexedFile(prefix)


def test_modes_are_for_corpora_that_are_not_all_text(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    with index_path(prefix).open("ab") as file:
        file.write(bytes(NUM_DOCUMENTS))
    assert IndexedFile(prefix).num_tokens == NUM_DOCUMENTS * LENGTH
    raw = bytearray(index_path(prefix).read_bytes())
    raw[5 - NUM_DOCUMENTS] = 1
    index_path(prefix).write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.idx: sequence 5 is not text \(mode 1 of a multimodal corpus\)"):
        IndexedFile(prefix)


def test_a_corpus_without_tokens_or_sequences_is_one(tmp_path: Path) -> None:
    for name, lengths in (("none", []), ("empty", [0, 0])):
        prefix = str(tmp_path / name)
        tokens_path(prefix).touch()
        write_index(index_path(prefix), np.dtype("<i4"), lengths, [0, *([len(lengths)] if lengths else [])])
        file = IndexedFile(prefix)
        assert file.num_tokens == 0 and [len(file.read(index)) for index in range(len(file))] == lengths
        with pytest.raises(DataError, match="0 tokens in"):
            open_dataset("indexed", Causal(), [prefix], SEQ_LENGTH, VOCAB_SIZE, None, str(tmp_path / "cache"))


def test_a_sequence_longer_than_the_format_can_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sequence 1 has 2,147,483,648 tokens; the format takes at most 2,147,483,647"):
        write_index(tmp_path / "a.idx", np.dtype("<u2"), [1, 2**31], [0, 2])
    assert not (tmp_path / "a.idx").exists()


def test_an_id_below_zero_is_refused(tmp_path: Path) -> None:
    tokens = np.full(NUM_DOCUMENTS * LENGTH, 5)
    tokens[12] = -1
    dataset = open_(write(tmp_path / "a", "<i4", tokens), tmp_path / "cache", order=None)
    assert dataset.sample(0)["targets"].tolist() == [5] * SEQ_LENGTH
    with pytest.raises(DataError, match="holds the id -1"):
        dataset.sample(1)


def open_(
    prefix: str, cache: Path, *, order: Order | None, split: Split | None = None, seq_length: int = SEQ_LENGTH
) -> Dataset:
    return open_dataset(
        "indexed", Causal(), [prefix], seq_length, VOCAB_SIZE, None, str(cache), order=order, split=split
    )


def test_a_cache_keeps_apart_whatever_changes_the_order(tmp_path: Path) -> None:
    """Each opened from one cache is what it is from a cache of its own, though all documents are of one length."""
    prefix = write(tmp_path / "a")
    halves = [Split((1.0, 1.0), part) for part in (0, 1)]
    opened = [
        (Order(60, 1, True), None, SEQ_LENGTH),
        (Order(60, 2, True), None, SEQ_LENGTH),
        (Order(60, 1, False), None, SEQ_LENGTH),
        (Order(60, 1, True), halves[0], SEQ_LENGTH),
        (Order(60, 1, True), halves[1], SEQ_LENGTH),
        (Order(60, 1, True), None, SEQ_LENGTH + 1),
        (Order(130, 1, True), None, SEQ_LENGTH),
        (Order(240, 1, True), None, SEQ_LENGTH),
        (None, None, SEQ_LENGTH),
    ]
    seen: dict[str, int] = {}
    for number, (order, split, seq_length) in enumerate(opened):
        one, alone = (
            open_(prefix, tmp_path / folder, order=order, split=split, seq_length=seq_length)
            for folder in ("shared", f"alone_{number}")
        )
        mine, other = (
            [one_of.sample(index)["input_ids"].tolist() for index in range(len(one_of))] for one_of in (one, alone)
        )
        assert mine == other, (order, split, seq_length)
        seen.setdefault(str(mine), number)
    assert len(seen) == len(opened) - 1, "validation is training without shuffling; all others differ"


def near_the_edge(total: int, seq_length: int) -> Sequence[int]:
    """Numbers of samples that take 75 % to 85 % of the second epoch."""
    first, in_epoch = (total - 1) // seq_length, (2 * total - 1) // seq_length - (total - 1) // seq_length
    return range(first + int(0.75 * in_epoch), first + int(0.85 * in_epoch) + 1)


def test_the_last_epoch_is_apart_where_it_is_in_megatron(tmp_path: Path) -> None:
    documents = [[np.full(size, size)] for size in np.random.default_rng(3).integers(1, 30, size=40)]
    oracle.write(tmp_path / "a", documents, np.uint16)
    lengths = IndexedFile(str(tmp_path / "a")).lengths
    total = int(lengths.sum())
    kinds: list[Epochs] = []
    for num_samples in near_the_edge(total, 4):
        (theirs, _, _) = oracle.datasets([tmp_path / "a"], None, "1", (num_samples, None, None), 4, 7)
        kinds.append(count_epochs(total, num_samples, 4))
        ours = build_indices(lengths, 0, len(lengths), 4, kinds[-1], 7)
        assert np.array_equal(ours.documents, theirs.document_index), num_samples
        assert np.array_equal(ours.shuffle, theirs.shuffle_index), num_samples
    apart = [kind.first_samples is not None for kind in kinds]
    assert apart == sorted(apart, reverse=True) and len(set(apart)) == 2


def test_many_sequences_are_checked_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_CHECK_SEQUENCES", 7)
    prefix = write(tmp_path / "a")
    assert IndexedFile(prefix).num_tokens == NUM_DOCUMENTS * LENGTH
    overwrite(index_path(prefix), 34 + 4 * NUM_DOCUMENTS + 8 * 30, 30 * 2 * LENGTH + 2)
    with pytest.raises(DataError, match="sequence 30 does not begin where the one before ends"):
        IndexedFile(prefix)
