"""The indexed format against megatron-core: files both ways, indices, samples, blends and splits, all exactly."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_ds.data import Causal, Order, Split, open_dataset
from megatron_ds.data.blend import Blend, blend_order, normalized, samples_per_source
from megatron_ds.data.indexed.dataset import IndexedDataset, split_bounds
from megatron_ds.data.indexed.files import IndexedFile, index_path, token_dtype, tokens_path, write_index
from megatron_ds.data.indexed.order import build_indices, count_epochs
from tests.data import oracle

VOCAB_SIZE = 1000


def write_ours(prefix: Path, documents: Sequence[Sequence[np.ndarray]], dtype: np.dtype) -> None:
    sequences = [sequence for document in documents for sequence in document]
    tokens_path(str(prefix)).write_bytes(b"".join(one.astype(dtype).tobytes() for one in sequences))
    bounds = np.cumsum([0, *(len(document) for document in documents)])
    write_index(index_path(str(prefix)), dtype, [len(one) for one in sequences], bounds)


def corpus(
    seed: int, count: int, longest: int, *, per_document: int = 1, empty: bool = False
) -> list[list[np.ndarray]]:
    chance = np.random.default_rng(seed)
    sizes = chance.integers(0 if empty else 1, longest + 1, size=(count, per_document))
    return [[chance.integers(0, VOCAB_SIZE, size=size) for size in document] for document in sizes]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16])
@pytest.mark.parametrize("per_document", [1, 3])
def test_files_are_the_same_byte_for_byte(dtype: type, per_document: int, tmp_path: Path) -> None:
    documents = corpus(1, 40, 9, per_document=per_document, empty=True)
    documents = [[sequence % 100 for sequence in document] for document in documents]
    write_ours(tmp_path / "our.s", documents, np.dtype(dtype))
    oracle.write(tmp_path / "theirs", documents, dtype)
    for suffix in (".bin", ".idx"):
        assert Path(f"{tmp_path}/our.s{suffix}").read_bytes() == Path(f"{tmp_path}/theirs{suffix}").read_bytes()
    sequences, lengths, bounds, kind = oracle.read(tmp_path / "our.s")
    file = IndexedFile(str(tmp_path / "theirs"))
    assert file.dtype == kind and (file.lengths == lengths).all() and (file.document_indices == bounds).all()
    assert file.num_documents == 40 and file.num_tokens == sum(lengths)
    for index, sequence in enumerate(sequences):
        assert file.read(index).tolist() == sequence.tolist()


def test_the_type_goes_by_the_vocabulary() -> None:
    assert [token_dtype(size) for size in (50_257, 65_499, 65_500, 151_936)] == ["<u2", "<u2", "<i4", "<i4"]


# Lengths of documents, with single tokens and none; samples wanted of S, on both sides of one epoch and of 80 % of the
# last one; seeds.
SHAPES = [(1, 40, False), (7, 9, False), (40, 1, False), (60, 25, True), (23, 200, False)]


@pytest.mark.parametrize(("count", "longest", "empty"), SHAPES)
@pytest.mark.parametrize("seq_length", [2, 5, 16])
def test_indices_equal_megatrons(count: int, longest: int, empty: bool, seq_length: int, tmp_path: Path) -> None:
    documents = corpus(count, count, longest, empty=empty)
    write_ours(tmp_path / "corpus", documents, np.dtype("<u2"))
    lengths = IndexedFile(str(tmp_path / "corpus")).lengths
    total = int(lengths.sum())
    in_epoch = (total - 1) // seq_length
    assert in_epoch > 0, "does not fill a sample"
    kinds = set()
    wanted = {1, in_epoch, in_epoch + 1, 2 * in_epoch + in_epoch // 3, 3 * in_epoch - 1, 4 * in_epoch + 3}
    for num_samples, seed in itertools.product(sorted(wanted), (1, 1234)):
        (theirs, _, _) = oracle.datasets([tmp_path / "corpus"], None, "1", (num_samples, None, None), seq_length, seed)
        epochs = count_epochs(total, num_samples, seq_length)
        kinds.add((epochs.count > 1, epochs.first_samples is not None))
        ours = build_indices(lengths, 0, count, seq_length, epochs, seed)
        for mine, other in (
            (ours.documents, theirs.document_index),
            (ours.bounds, theirs.sample_index),
            (ours.shuffle, theirs.shuffle_index),
        ):
            assert mine.dtype == other.dtype and np.array_equal(mine, other), (num_samples, seed)
    if in_epoch > 10:
        assert kinds == {(False, False), (True, False), (True, True)}


def test_samples_blends_and_splits_equal_megatrons(tmp_path: Path) -> None:
    """Through the front door: token for token, in the order in which a run takes them."""
    for name, count in (("a", 90), ("b", 35), ("c", 60)):
        write_ours(tmp_path / name, corpus(count, count, 30), np.dtype("<u2"))
    seq_length, num_samples = 16, 300
    sources = [str(tmp_path / name) for name in "abc"]
    order = Order(num_samples, seed=7, shuffle=True)
    for prefixes, weights in ((sources[:1], None), (sources[:2], [0.3, 0.7]), (sources, [5.0, 1.0, 3.0])):
        theirs = oracle.datasets(
            [Path(one) for one in prefixes], weights, "90,8,2", (num_samples, 20, 0), seq_length, 7
        )
        for part in (0, 1):
            if part == 1 and weights is not None:
                continue  # Megatron blends validation data too; here every sample is taken once
            ours = open_dataset(
                "indexed",
                Causal(),
                prefixes,
                seq_length,
                VOCAB_SIZE,
                None,
                str(tmp_path / "cache"),
                weights=weights,
                order=order if part == 0 else Order(20, seed=7, shuffle=True),
                split=Split((90, 8, 2), part),
            )
            assert ours.ordered
            for index in range(num_samples if part == 0 else 20):
                mine, other = ours.sample(index), theirs[part][index]
                assert mine["input_ids"].tolist() == other["tokens"].tolist(), (prefixes, part, index)
                assert mine["targets"].tolist() == other["labels"].tolist()


@pytest.mark.parametrize(
    "weights", [[1.0], [0.5, 0.5], [0.1, 0.9], [0.3, 0.3, 0.4], [7, 2, 1, 5, 5], [1 / 3, 1 / 7, 1 / 11], [1e-4, 1]]
)
def test_blending_equals_megatrons(weights: list[float]) -> None:
    from megatron.core.datasets import helpers

    size = 5000
    shares = normalized(normalized(weights))
    source, place = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
    helpers.build_blending_indices(source, place, np.array(shares), len(shares), size, False)
    mine = blend_order(shares, size)
    assert np.array_equal(mine[0], source) and np.array_equal(mine[1], place)
    shorter = blend_order(shares, 777)
    assert np.array_equal(shorter[0], source[:777])
    for number, most in enumerate(samples_per_source(weights, size)):
        assert int((source == number).sum()) <= most


@pytest.mark.parametrize("split", ["969,30,1", "1", "90,10", "0.5,0.25,0.25", "98,2,0", "1,1,1"])
def test_splits_equal_megatrons(split: str) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    fractions = tuple(float(part) for part in split.split(","))
    for count in (3, 40, 1001, 123_456):
        for part, ends in enumerate(matrix):
            if ends is not None:
                begin, end = (round(end * float(count)) for end in ends)
                if begin < end:
                    assert split_bounds(count, Split(fractions, part)) == (begin, end)


def test_a_blend_without_weights_goes_by_tokens(tmp_path: Path) -> None:
    for name, count in (("a", 60), ("b", 20)):
        write_ours(tmp_path / name, corpus(count, count, 30), np.dtype("<u2"))
    sources = [str(tmp_path / name) for name in "ab"]
    blend = open_dataset(
        "indexed", Causal(), sources, 8, VOCAB_SIZE, None, str(tmp_path / "cache"), order=Order(100, 1, True)
    )
    assert isinstance(blend, Blend)
    sizes = [IndexedFile(source).num_tokens for source in sources]
    assert blend.weights == normalized(sizes)
    once = open_dataset("indexed", Causal(), sources, 8, VOCAB_SIZE, None, str(tmp_path / "cache"))
    parts = [open_dataset("indexed", Causal(), [one], 8, VOCAB_SIZE, None, str(tmp_path / "cache")) for one in sources]
    assert all(isinstance(one, IndexedDataset) for one in parts)
    run_on_all_ranks = [once.sample(index)["input_ids"].tolist() for index in range(len(once))]
    assert run_on_all_ranks == [one.sample(index)["input_ids"].tolist() for one in parts for index in range(len(one))]
