"""`format: indexed` and blends beside what Megatron says of them: damage, caches, order, accounts."""

import json
import multiprocessing
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ds.data import Causal, Dataset, Masked, Order, Split, open_dataset
from megatron_ds.data.blend import Blend, SourceUsage, blend_order, source_usage
from megatron_ds.data.indexed.files import IndexedFile, index_path, prefix_of, tokens_path, write_index
from megatron_ds.errors import DataError

VOCAB_SIZE = 1000


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write_(name: str = "my.corpus", count: int = 50, seed: int = 0, longest: int = 30) -> str:
        chance = np.random.default_rng(seed)
        sizes = chance.integers(1, longest + 1, size=count)
        prefix = str(tmp_path / name)
        chance.integers(0, VOCAB_SIZE, size=sizes.sum()).astype("<u2").tofile(tokens_path(prefix))
        write_index(index_path(prefix), np.dtype("<u2"), sizes, np.arange(count + 1))
        return prefix

    return write_


@pytest.fixture
def open_(tmp_path: Path) -> Callable[..., Dataset]:
    def open__(*sources: str, steps: int | None = 60, seed: int = 1, shuffle: bool = True, **options: Any) -> Dataset:
        order = Order(steps, seed, shuffle) if steps is not None else None
        cache = str(tmp_path / "cache")
        return open_dataset("indexed", Causal(), sources, 8, VOCAB_SIZE, None, cache, order=order, **options)

    return open__


def taken(dataset: Dataset, count: int) -> list[list[int]]:
    return [dataset.sample(index)["input_ids"].tolist() for index in range(count)]


def test_in_order_where_it_is_not_shuffled(write: Any, open_: Any) -> None:
    prefix = write()
    tokens = np.fromfile(f"{prefix}.bin", dtype="<u2")
    dataset = open_(prefix, shuffle=False)
    once = (len(tokens) - 1) // 8
    for index in range(once):
        sample = dataset.sample(index)
        assert sample["input_ids"].tolist() == tokens[index * 8 : index * 8 + 8].tolist()
        assert sample["targets"].tolist() == tokens[index * 8 + 1 : index * 8 + 9].tolist()
    assert taken(open_(prefix, steps=None), once) == taken(dataset, once)
    assert len(open_(prefix, steps=None)) == once


def test_every_way_to_name_it(write: Any, open_: Any) -> None:
    prefix = write()
    first = taken(open_(prefix), 20)
    assert first == taken(open_(f"{prefix}.bin"), 20) == taken(open_(f"{prefix}.idx"), 20)
    assert prefix_of(prefix) == prefix


def test_moved_data_keep_their_cache_and_fingerprint(write: Any, open_: Any, tmp_path: Path) -> None:
    prefix = write()
    before = open_(prefix)
    entries = sorted((tmp_path / "cache").glob("*.indices"))
    (tmp_path / "elsewhere").mkdir()
    for suffix in (".bin", ".idx"):
        shutil.move(f"{prefix}{suffix}", tmp_path / "elsewhere" / f"x{suffix}")
    after = open_(str(tmp_path / "elsewhere" / "x"))
    assert after.fingerprint == before.fingerprint and taken(after, 30) == taken(before, 30)
    assert sorted((tmp_path / "cache").glob("*.indices")) == entries and len(entries) == 1


def test_what_changes_the_samples_changes_the_fingerprint(write: Any, open_: Any) -> None:
    """More steps do only where they change the order: with another number of epochs, or how the last is shuffled."""
    prefix = write()
    once = len(open_(prefix, steps=None))
    same = open_(prefix, steps=10).fingerprint
    assert same == open_(prefix, steps=once).fingerprint == open_(prefix, steps=10, seed=2).fingerprint
    changed = Path(f"{prefix}.bin").read_bytes()
    others = [
        open_(prefix, steps=once + 5).fingerprint,
        open_(prefix, steps=2 * once - 2).fingerprint,
        open_(prefix, steps=10, split=Split((90, 10), 0)).fingerprint,
        open_(write("other", seed=1), steps=10).fingerprint,
        open_(write("longer", count=51), steps=10).fingerprint,
    ]
    Path(f"{prefix}.bin").write_bytes(changed[:-2] + b"\0\0")
    assert len({same, *others, open_(prefix, steps=10).fingerprint}) == 7
    assert taken(open_(prefix, steps=10), 10) == taken(open_(prefix, steps=once), 10)


def _open_late(prefix: str, cache: str, at: float, results: Any) -> None:
    time.sleep(max(0.0, at - time.time()))
    order = Order(60, 1, True)
    dataset = open_dataset("indexed", Causal(), [prefix], 8, VOCAB_SIZE, None, cache, order=order)
    results.put(taken(dataset, 20))


def test_many_may_make_the_cache_at_once(write: Any, open_: Any, tmp_path: Path) -> None:
    prefix, cache = write(count=3000), str(tmp_path / "shared")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    at = time.time() + 0.3
    ranks = [context.Process(target=_open_late, args=(prefix, cache, at, results)) for _ in range(6)]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join(60)
    assert all(one == taken(open_(prefix), 20) for one in found)
    assert len(list(Path(cache).glob("*.indices"))) == 1 and not list(Path(cache).glob("*.tmp"))


def test_a_damaged_cache_is_made_again(write: Any, open_: Any, tmp_path: Path) -> None:
    prefix = write()
    whole = taken(open_(prefix), 30)
    (entry,) = (tmp_path / "cache").glob("*.indices")
    for damage in (b"", b"\x93NUMPY half of it", (entry / "bounds.npy").read_bytes()[:200]):
        (entry / "bounds.npy").write_bytes(damage)
        assert taken(open_(prefix), 30) == whole
    (entry / "shuffle.npy").unlink()
    assert taken(open_(prefix), 30) == whole


def _header(prefix: str, **fields: int) -> None:
    raw = bytearray(Path(f"{prefix}.idx").read_bytes())
    offsets = {
        "version": ("<Q", 9),
        "code": ("<B", 17),
        "count": ("<Q", 18),
        "length": ("<i", 34),
        "start": ("<q", 242),
    }
    for name, value in fields.items():
        struct.pack_into(offsets[name][0], raw, offsets[name][1], value)
    Path(f"{prefix}.idx").write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda prefix: Path(f"{prefix}.idx").unlink(), "no such file"),
        (lambda prefix: Path(f"{prefix}.bin").unlink(), "no such file"),
        (lambda prefix: Path(f"{prefix}.idx").write_bytes(b"x" * 99), "its first bytes are not MMIDIDX"),
        (lambda prefix: Path(f"{prefix}.idx").write_bytes(b"MMIDIDX"), "its first bytes are not MMIDIDX"),
        (lambda prefix: _header(prefix, version=2), "version 2 of the format; only version 1 is read"),
        (lambda prefix: _header(prefix, code=7), "code 7 of the type of a token; only integers"),
        (lambda prefix: _header(prefix, code=99), "code 99 of the type of a token"),
        (lambda prefix: _header(prefix, count=51), "the file was cut or damaged"),
        (lambda prefix: _header(prefix, length=1000), "does not begin where the one before ends"),
        (lambda prefix: _header(prefix, length=-1), "does not begin where the one before ends"),
        (lambda prefix: _header(prefix, code=4), "does not begin where the one before ends"),
        (lambda prefix: Path(f"{prefix}.bin").write_bytes(b"xy"), "2 bytes, but"),
    ],
)
def test_damage_is_told_in_one_line(damage: Callable[[str], Any], says: str, write: Any, open_: Any) -> None:
    prefix = write()
    damage(prefix)
    with pytest.raises(DataError) as caught:
        open_(prefix)
    assert says in str(caught.value) and "\n" not in str(caught.value) and "my.corpus" in str(caught.value)


def test_what_does_not_fit_is_refused(write: Any, tmp_path: Path, open_: Any) -> None:
    prefix, cache = write(), str(tmp_path / "cache")
    with pytest.raises(DataError, match=r"holds the id \d+, but the model's vocab_size=500 ends at 499; prepare"):
        taken(open_dataset("indexed", Causal(), [prefix], 8, 500, None, cache), 50)
    Path(f"{prefix}.json").write_text(json.dumps({"largest_id": 999}))
    with pytest.raises(DataError, match="holds ids up to 999, but the model's vocab_size=500 ends at 499"):
        open_dataset("indexed", Causal(), [prefix], 8, 500, None, cache)
    with pytest.raises(DataError, match="is for causal models"):
        open_dataset("indexed", Masked(seed=0), [prefix], 8, VOCAB_SIZE, None, cache)
    with pytest.raises(DataError, match=r"tokens in 1 documents do not fill a sample of data\.seq_length=8"):
        open_(write("short", count=1, longest=5))
    with pytest.raises(DataError, match="leaves none of 50 documents for part 2; give it more"):
        open_(prefix, split=Split((1.0, 0.0), 1))


def test_splits_share_no_document(write: Any, open_: Any) -> None:
    prefix = write(count=200)
    file = IndexedFile(prefix)
    parts = [open_(prefix, steps=None, split=Split((8, 2), part)) for part in (0, 1)]
    stop = 160
    tokens = np.concatenate([file.read(index) for index in range(200)])
    cut = int(file.lengths[:stop].sum())
    for dataset, mine in zip(parts, (tokens[:cut], tokens[cut:])):
        flat = [token for sample in taken(dataset, len(dataset)) for token in sample]
        assert flat == mine[: len(flat)].tolist() and len(mine) - len(flat) <= 8


def test_an_account_of_what_was_taken(write: Any, open_: Any) -> None:
    a, b = write("a", count=80), write("b", count=30, seed=1)
    blend = open_(a, b, steps=500, weights=[3.0, 1.0])
    assert isinstance(blend, Blend)
    sizes = [len(open_(one, steps=None)) for one in (a, b)]
    for number in (0, 1, 100, 500):
        shares = source_usage(blend, number)
        assert [share.name for share in shares] == [a, b] and [share.weight for share in shares] == [0.75, 0.25]
        assert sum(share.samples for share in shares) == number
        for share, size in zip(shares, sizes):
            assert abs(share.samples - share.weight * number) <= 1 and share.epochs == share.samples / size
    assert blend.describe().startswith(f"blend of 0.750 {a} (")
    alone = open_(a)
    assert source_usage(alone, 40) == (SourceUsage(a, 1.0, 40, 40 / sizes[0]),)


def test_text_is_blended_in_an_order_of_its_own_each_epoch(
    valid_text: Path, tokenizer_path: str, tmp_path: Path
) -> None:
    half = tmp_path / "half.txt"
    half.write_text(valid_text.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    whole = [str(valid_text), str(half)]

    def opened(weights: list[float] | None, seed: int = 1, shuffle: bool = True) -> Dataset:
        order = Order(900, seed, shuffle)
        cache = str(tmp_path / "cache")
        return open_dataset("text", Causal(), whole, 16, 4096, tokenizer_path, cache, weights=weights, order=order)

    blend = opened([1.0, 1.0])
    alone = open_dataset("text", Causal(), [str(half)], 16, 4096, tokenizer_path, str(tmp_path / "cache"))
    of_half = [blend.sample(index)["input_ids"].tolist() for index in range(900) if index % 2]
    assert len(alone) < 440 and blend.ordered
    epochs = [of_half[start : start + len(alone)] for start in (0, len(alone))][:1]
    for epoch in epochs:
        assert sorted(epoch) == sorted(taken(alone, len(alone))) and epoch != taken(alone, len(alone))
    assert of_half[len(alone) :] != of_half[: 450 - len(alone)]
    assert taken(opened([1.0, 1.0]), 50) == taken(blend, 50) != taken(opened([1.0, 1.0], seed=2), 50)
    assert taken(opened([1.0, 1.0], shuffle=False), 4)[1::2] == taken(alone, 2)
    assert opened([1.0, 2.0]).fingerprint != blend.fingerprint
    assert not opened(None).ordered


def test_long_blends_are_made_in_time() -> None:
    began = time.perf_counter()
    source, place = blend_order([0.7, 0.2, 0.1], 1_000_000)
    assert time.perf_counter() - began < 10
    assert [int((source == one).sum()) for one in range(3)] == pytest.approx([700_000, 200_000, 100_000], abs=1)
    assert place[source == 1].tolist() == list(range(int((source == 1).sum())))
