"""`data.long_context`: shares of samples, formats that agree, packed documents kept apart, and what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from megatron_ds.data import Causal, Dataset, Masked, Order, Split, collate, open_dataset
from megatron_ds.data.blend import SourceUsage, source_usage
from megatron_ds.data.held_out import HeldOut
from megatron_ds.data.indexed.documents import IndexedDocuments
from megatron_ds.data.indexed.files import IndexedFile, index_path, tokens_path, write_index
from megatron_ds.data.long_context.open import LongContext
from megatron_ds.data.parts import ends_of, parts_of
from megatron_ds.data.prepare import PrepareOptions, prepare
from megatron_ds.data.readers.placeholders import Placeholders
from megatron_ds.data.text import token_cache
from megatron_ds.errors import DataError

S, END, VOCAB_SIZE = 8, 0, 4096
MIX = LongContext(((0, 0.3), (20, 0.7)))
WORDS = "call me ishmael some years ago never mind how long precisely"


@pytest.fixture
def lines(write_jsonl: Callable[..., str]) -> str:
    """40 documents of 3 to about 60 tokens."""
    chance = np.random.default_rng(0)
    words = WORDS.split()
    return write_jsonl(
        [{"text": " ".join(chance.choice(words, size=size))} for size in chance.integers(1, 40, size=40)]
    )


@pytest.fixture
def prefix(lines: str, tokenizer_path: str, tmp_path: Path) -> str:
    prepare(PrepareOptions([lines], tokenizer_path, str(tmp_path / "corpus"), workers=1))
    return str(tmp_path / "corpus")


@pytest.fixture
def opened(tmp_path: Path, tokenizer_path: str) -> Callable[..., Dataset]:
    def open_(*sources: str, format: str = "text", mix: LongContext = MIX, **options: Any) -> Dataset:
        options.setdefault("order", Order(200, 1, True))
        cache, path = str(tmp_path / "cache"), tokenizer_path if format == "text" else None
        objective = options.pop("objective", Causal())
        vocab_size = options.pop("vocab_size", VOCAB_SIZE)
        return open_dataset(format, objective, sources, S, vocab_size, path, cache, long_context=mix, **options)

    return open_


def documents_of(source: str, tokenizer_path: str) -> list[tuple[int, ...]]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    texts = [json.loads(line)["text"] for line in Path(source).read_text().splitlines()]
    return [(*tokenizer.encode(text, add_special_tokens=False), END) for text in texts]


def rows_of(data: Dataset, number: int | None = None) -> list[list[int]]:
    samples = [data.sample(index) for index in range(len(data) if number is None else number)]
    for sample in samples:
        learned = sample["targets"][:-1] != -100
        np.testing.assert_array_equal(sample["input_ids"][1:][learned], sample["targets"][:-1][learned])
    return [[*sample["input_ids"].tolist(), int(sample["targets"][-1])] for sample in samples]


def refused(open_: Callable[[], Any]) -> str:
    with pytest.raises(DataError) as caught:
        open_()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_samples_come_from_bands_in_their_shares(opened: Any, lines: str, tokenizer_path: str) -> None:
    data = opened(lines)
    documents = documents_of(lines, tokenizer_path)
    long = [one for one in documents if len(one) >= 20]
    assert 0 < len(long) < 40, "the bound is a token count, the end of the document included"
    (short_band, long_band) = [part for _, part in parts_of(data)]
    assert sorted(short_band.lengths.tolist()) == sorted(len(one) for one in documents if len(one) < 20)
    assert sorted(long_band.lengths.tolist()) == sorted(map(len, long))
    usage = source_usage(data, 200)
    assert [(one.name, one.samples) for one in usage] == [
        ("documents of less than 20 tokens", 60),
        ("documents of 20 tokens or more", 140),
    ]
    assert usage[1] == SourceUsage(usage[1].name, 0.7, 140, 140 / len(long_band))
    whole = {tuple(row) for row in rows_of(data)}
    cut = {one[start : start + S + 1] for one in long for start in range(0, len(one) - S, S)}
    assert cut <= whole, "every whole row of every long document is read"
    assert data.describe().startswith("blend of 0.300 documents of less than 20 tokens (")
    assert ends_of(data) == {END: AutoTokenizer.from_pretrained(tokenizer_path).convert_ids_to_tokens(END)}


def test_text_and_prepared_files_give_the_same_samples(opened: Any, lines: str, prefix: str) -> None:
    text, indexed = opened(lines), opened(prefix, format="indexed")
    assert rows_of(text) == rows_of(indexed)
    assert text.fingerprint != opened(lines, mix=LongContext(((0, 0.4), (20, 0.6)))).fingerprint
    assert indexed.fingerprint != opened(prefix, format="indexed", mix=LongContext(((0, 0.3), (21, 0.7)))).fingerprint


def test_the_order_depends_on_seed_and_position_alone(opened: Any, lines: str) -> None:
    data, longer = opened(lines), opened(lines, order=Order(900, 1, True))
    assert rows_of(longer, 200) == rows_of(data) and longer.fingerprint == data.fingerprint
    assert rows_of(opened(lines, order=Order(200, 2, True))) != rows_of(data)
    backward = [data.sample(index)["input_ids"].tolist() for index in reversed(range(200))]
    assert backward == [row[:-1] for row in reversed(rows_of(data))]
    assert set(collate(data, np.arange(3))) == {"input_ids", "targets"}


def test_packed_documents_do_not_see_one_another(opened: Any, lines: str, tokenizer_path: str) -> None:
    plain, data = opened(lines), opened(lines, mix=LongContext(MIX.shares, packing=True))
    assert data.columns == ("input_ids", "targets", "position_ids") and data.fingerprint != plain.fingerprint
    documents = [",".join(map(str, one)) + "," for one in documents_of(lines, tokenizer_path)]
    seen = bare = 0
    for index in range(len(data)):
        sample, other = data.sample(index), plain.sample(index)
        np.testing.assert_array_equal(sample["input_ids"], other["input_ids"])
        starts = np.flatnonzero(sample["position_ids"] == 0).tolist()
        assert starts[0] == 0
        for start, stop in zip(starts, [*starts[1:], S]):
            assert sample["position_ids"][start:stop].tolist() == list(range(stop - start))
            part = ",".join(map(str, sample["input_ids"][start:stop])) + ","
            assert any(part in one for one in documents), "tokens between two starts are of one document"
            if stop < S:
                assert sample["targets"][stop - 1] == -100, "the next document is not predicted"
                seen += 1
            learned = sample["targets"][start : stop - 1]
            np.testing.assert_array_equal(learned, sample["input_ids"][start + 1 : stop])
        ends = sample["input_ids"] == END
        assert (sample["targets"][ends] == -100).all(), "nothing follows the end, at the end of a row either"
        assert (sample["targets"][~ends] == other["targets"][~ends]).all()
        bare += int((other["targets"] == -100).sum())
    assert seen > 50 and 0 < bare < seen, "without packing, only the middle of a document is not predicted"
    assert set(data.blank()) == set(data.columns)


def test_weights_keep_the_sources_and_lengths_are_mixed_in_each(opened: Any, lines: str, book: Path) -> None:
    data = opened(lines, str(book), mix=LongContext(((10, 1.0),)), weights=[3.0, 1.0], order=Order(80, 1, True))
    names = [f"{name}: documents of 10 tokens or more" for name in (lines, book)]
    assert [(one.name, one.weight, one.samples) for one in source_usage(data, 80)] == [
        (names[0], 0.75, 60),
        (names[1], 0.25, 20),
    ]
    found = refused(lambda: opened(lines, str(book), weights=[1.0, 1.0]))
    assert found.startswith(
        f"data.long_context={{0: ...}}: {book} has no documents of less than 20 tokens; the longest"
    )
    assert found.endswith("; try without the key 0")


def test_a_share_is_held_out_of_each_band(opened: Any, lines: str) -> None:
    train = opened(lines, held_out=HeldOut(0.2, False), order=Order(400, 1, True))
    valid = opened(lines, held_out=HeldOut(0.2, True), order=None)
    assert len(valid) == sum(round(0.2 * len(part)) for part in (part for _, part in parts_of(opened(lines))))
    held_out, trained = set(map(tuple, rows_of(valid))), set(map(tuple, rows_of(train)))
    everything = set(map(tuple, rows_of(opened(lines, order=Order(800, 1, True)))))
    assert held_out | trained == everything
    assert len(held_out & trained) < 3, "only rows that are equal by chance"
    twice = opened(lines, lines, held_out=HeldOut(0.2, True, by_source=True), order=None)
    assert rows_of(twice) == rows_of(valid) * 2


def test_validation_reads_all_documents_once(opened: Any, prefix: str, lines: str) -> None:
    data = opened(prefix, format="indexed", order=None)
    assert rows_of(data) == rows_of(opened(lines, order=None))
    lengths = IndexedFile(prefix).lengths
    assert data.num_documents == 40 and data.num_tokens == lengths.sum()
    parts = [opened(prefix, format="indexed", order=None, split=Split((0.5, 0.5), part)) for part in (0, 1)]
    assert [part.num_tokens for part in parts] == [lengths[:20].sum(), lengths[20:].sum()]
    assert parts[1].lengths.tolist() == lengths[20:].tolist()


def test_documents_of_several_sequences_are_read_whole(tmp_path: Path) -> None:
    sizes, bounds = [3, 4, 0, 5, 2, 6], [0, 2, 2, 5, 6]
    tokens = np.arange(sum(sizes), dtype="<u2")
    tokens.tofile(tokens_path(str(tmp_path / "c")))
    write_index(index_path(str(tmp_path / "c")), np.dtype("<u2"), sizes, bounds)
    file = IndexedFile(str(tmp_path / "c"))
    documents = IndexedDocuments(file, 100)
    assert documents.lengths.tolist() == [7, 7, 6]
    assert [documents.read(number, 2, 3).tolist() for number in range(3)] == [[2, 3, 4], [9, 10, 11], [16, 17, 18]]
    part = IndexedDocuments(file, 100, Split((0.5, 0.5), 1))
    assert part.lengths.tolist() == [7, 6] and part.read(0, 0, 7).tolist() == [7, 8, 9, 10, 11, 12, 13]
    with pytest.raises(DataError, match=r"begins at sequence 5 holds the id 14, but the model's vocab_size=14 ends at"):
        IndexedDocuments(file, 14).read(2, 0, 6)
    with pytest.raises(DataError, match=r"begins at sequence 0: holds the id 3, which is image_token_id"):
        IndexedDocuments(file, 100, None, Placeholders({"image_token_id": 3})).read(0, 0, 6)


def test_a_cache_without_lengths_is_completed(
    opened: Any, lines: str, tokenizer_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = rows_of(opened(lines))
    (file,) = (tmp_path / "cache").glob("*.lengths")
    before = file.read_bytes()
    for damage in (b"", None):
        file.unlink() if damage is None else file.write_bytes(damage)
        assert rows_of(opened(lines)) == expected and file.read_bytes() == before
    file.unlink()
    monkeypatch.setattr(token_cache, "_write_tokens", lambda *_: pytest.fail("tokenized again"))
    open_dataset("text", Causal(), [lines], S, VOCAB_SIZE, tokenizer_path, str(file.parent))


def test_what_is_refused(opened: Any, lines: str, prefix: str) -> None:
    lengths = IndexedFile(prefix).lengths
    shortest, longest = int(lengths.min()), int(lengths.max())
    found = refused(lambda: opened(lines, mix=LongContext(((0, 0.5), (shortest + 1, 0.5)))))
    assert f" documents of less than {shortest + 1} tokens do not fill a sample of data.seq_length=8, which" in found
    assert re.match(rf"data: {lines}: \d tokens in \d documents ", found)
    far = LongContext(((0, 0.5), (4000, 0.5)))
    for found in (refused(lambda: opened(lines, mix=far)), refused(lambda: opened(prefix, format="indexed", mix=far))):
        assert found.startswith("data.long_context={4000: ...}: /")
        assert found.endswith(
            f" has no documents of 4,000 tokens or more; the longest has {longest} tokens; nearest: {longest}"
        )
    masked = Masked(seed=1)
    assert refused(lambda: opened(lines, objective=masked)).startswith("data.long_context is for causal models")
    assert "indexed is for causal models" in refused(lambda: opened(prefix, format="indexed", objective=masked))
    assert "gives ids up to" in refused(lambda: opened(lines, vocab_size=100))
