"""The cache of tokens: keyed on content, whole or remade, and written by one process of many."""

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from megatron_ds.data import Causal, default_cache_dir, load_tokenizer, open_dataset
from megatron_ds.data.readers.tokenizer import special_id, tokenizer_digest
from megatron_ds.data.text import token_cache
from megatron_ds.data.text.documents import TextSource
from megatron_ds.errors import DataError

TEXT = "There she blows! A hump like a snow-hill! It is Moby Dick!\n" * 20


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def written(monkeypatch):
    """A list that grows by one entry each time a source is tokenized."""
    keys = []
    write = token_cache._write_tokens

    def counted(source, tokenizer, end_id, directory, key):
        keys.append(key)
        return write(source, tokenizer, end_id, directory, key)

    monkeypatch.setattr(token_cache, "_write_tokens", counted)
    return keys


def tokens_of(source, tokenizer_path, cache):
    tokenizer = load_tokenizer(tokenizer_path)
    return token_cache.cached_tokens(TextSource(str(source)), tokenizer, tokenizer.eos_token_id, cache)


def test_second_reading_tokenizes_nothing_even_from_a_read_only_cache(
    text, tokenizer_path, cache, written, monkeypatch
):
    first = tokens_of(text, tokenizer_path, cache)
    monkeypatch.setattr(token_cache, "FileLock", lambda *_: pytest.fail("locked a cache that is whole"))
    second = tokens_of(text, tokenizer_path, cache)
    assert written == [first.key]
    assert (second.key, second.info) == (first.key, first.info)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    assert first.tokens.dtype == np.uint16
    assert first.info.num_documents == 1 and first.info.largest_id == first.tokens.max()


def test_key_follows_the_content_not_the_path_or_time(text, tokenizer_path, cache, written, tmp_path):
    key = tokens_of(text, tokenizer_path, cache).key
    os.utime(text, (1, 1))
    moved = tmp_path / "elsewhere" / "b.txt"
    moved.parent.mkdir()
    shutil.move(text, moved)
    copied = tmp_path / "tokenizer_copy"
    shutil.copytree(tokenizer_path, copied)
    assert tokens_of(moved, str(copied), cache).key == key
    moved.write_text(TEXT[:-2] + "?\n")
    assert tokens_of(moved, tokenizer_path, cache).key != key
    assert len(written) == 2


def test_key_follows_the_id_that_ends_a_document(text, tokenizer_path, cache):
    first, second = load_tokenizer(tokenizer_path), load_tokenizer(tokenizer_path)
    assert tokenizer_digest(first, 0) == tokenizer_digest(second, 0)
    assert tokenizer_digest(first, 0) != tokenizer_digest(first, 1)
    ended = [token_cache.cached_tokens(TextSource(str(text)), first, end_id, cache) for end_id in (0, 1)]
    assert ended[0].key != ended[1].key
    assert [part.tokens[-1] for part in ended] == [0, 1]


@pytest.mark.parametrize("field", ["vocab", "eos"])
def test_key_follows_the_tokenizer(text, tokenizer_path, cache, tmp_path, field):
    key = tokens_of(text, tokenizer_path, cache).key
    other = tmp_path / "other"
    shutil.copytree(tokenizer_path, other)
    if field == "vocab":
        backend = json.loads((other / "tokenizer.json").read_text())
        vocab = backend["model"]["vocab"]
        vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
        (other / "tokenizer.json").write_text(json.dumps(backend))
    else:
        settings = json.loads((other / "tokenizer_config.json").read_text())
        (other / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "A"}))
    assert tokens_of(text, str(other), cache).key != key


def test_a_txt_and_a_jsonl_of_the_same_bytes_differ(tmp_path, tokenizer_path, cache):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text('{"text": "whale"}\n')
    lines, text = (tokens_of(tmp_path / name, tokenizer_path, cache) for name in ("a.jsonl", "a.txt"))
    assert lines.key != text.key
    assert len(lines.tokens) < len(text.tokens)


@pytest.mark.parametrize(
    "damage",
    [
        lambda ids, info: ids.write_bytes(ids.read_bytes()[:-2]),
        lambda ids, info: ids.write_bytes(ids.read_bytes() + b"\0\0"),
        lambda ids, info: ids.unlink(),
        lambda ids, info: info.unlink(),
        lambda ids, info: info.write_text('{"format_version": 1'),
        lambda ids, info: info.write_text("[]"),
        lambda ids, info: info.write_text(info.read_text().replace('"format_version": 1', '"format_version": 0')),
    ],
    ids=["short", "long", "no ids", "no sidecar", "cut sidecar", "strange sidecar", "old version"],
)
def test_damaged_cache_is_remade(text, tokenizer_path, cache, written, damage):
    first = tokens_of(text, tokenizer_path, cache)
    expected = np.array(first.tokens)
    damage(cache / f"{first.key}.bin", cache / f"{first.key}.json")
    again = tokens_of(text, tokenizer_path, cache)
    np.testing.assert_array_equal(again.tokens, expected)
    assert len(written) == 2
    tokens_of(text, tokenizer_path, cache)
    assert len(written) == 2


def test_interrupted_tokenizing_leaves_nothing_that_counts(text, tokenizer_path, cache, written, monkeypatch):
    encode = token_cache._encode
    monkeypatch.setattr(token_cache, "_encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tokens_of(text, tokenizer_path, cache)
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]
    monkeypatch.setattr(token_cache, "_encode", encode)
    assert len(tokens_of(text, tokenizer_path, cache).tokens) > 0


def _tokenize_in_child(text: Path, tokenizer_path: str, cache: Path, log: Path) -> None:
    write = token_cache._write_tokens

    def slow_write(*arguments):
        with log.open("a") as file:
            file.write("tokenized\n")
        time.sleep(0.5)  # long enough for the other processes to arrive
        return write(*arguments)

    token_cache._write_tokens = slow_write
    cached = tokens_of(text, tokenizer_path, cache)
    with log.open("a") as file:
        file.write(f"{len(cached.tokens)}\n")


def test_processes_that_start_at_once_tokenize_once(text, tokenizer_path, cache, tmp_path):
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_tokenize_in_child, args=(text, tokenizer_path, cache, log)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    lines = log.read_text().split()
    assert lines.count("tokenized") == 1
    assert len(lines) == 5 and len(set(lines)) == 2


def test_large_vocabulary_is_kept_in_32_bits(text, tokenizer_path, cache, monkeypatch):
    small = tokens_of(text, tokenizer_path, cache / "small")
    monkeypatch.setattr(token_cache, "largest_token_id", lambda _: 1 << 16)
    large = tokens_of(text, tokenizer_path, cache / "large")
    assert (small.tokens.dtype, large.tokens.dtype) == (np.uint16, np.uint32)
    np.testing.assert_array_equal(small.tokens, large.tokens)


def test_settings_that_cut_or_pad_do_not_reach_the_tokens(text, tokenizer_path, cache, tmp_path):
    expected = np.array(tokens_of(text, tokenizer_path, cache).tokens)
    other = tmp_path / "cutting"
    shutil.copytree(tokenizer_path, other)
    backend = json.loads((other / "tokenizer.json").read_text())
    backend["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (other / "tokenizer.json").write_text(json.dumps(backend))
    np.testing.assert_array_equal(tokens_of(text, str(other), cache).tokens, expected)


def test_tokenizer_without_a_fast_backend_works(text, cache, tmp_path):
    path = tmp_path / "byt5"
    ByT5Tokenizer().save_pretrained(path)
    cached = tokens_of(text, str(path), cache)
    assert cached.tokens.tolist() == [*(byte + 3 for byte in TEXT.encode()), 1]
    assert tokenizer_digest(load_tokenizer(str(path)), 0) == tokenizer_digest(load_tokenizer(str(path)), 0)
    ByT5Tokenizer(extra_ids=7).save_pretrained(tmp_path / "other")
    assert tokens_of(text, str(tmp_path / "other"), cache).key != cached.key


def test_cache_that_cannot_be_written_is_named(text, tokenizer_path, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DataError, match=r"the token cache .*/file/tokens cannot be written .*; set data.cache_dir"):
        tokens_of(text, tokenizer_path, blocked / "tokens")


def test_default_cache_dir_follows_the_environment(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/megatron_ds/tokens")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache/megatron_ds/tokens"


def test_tokenizers_that_cannot_serve_are_refused(tokenizer_path, tmp_path):
    with pytest.raises(DataError, match=r"no/such: no such directory; point model\.tokenizer at"):
        load_tokenizer("no/such")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path / "empty"))
    for model_type in ("gpt2", "bert", "t5", "gemma"):  # transformers makes these up from a config.json alone
        (tmp_path / "empty" / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(DataError, match="holds no vocabulary, only special tokens"):
            load_tokenizer(str(tmp_path / "empty"))
    (tmp_path / "empty" / "tokenizer.json").write_text('{"version"')
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path / "empty"))


def test_tokenizer_without_end_of_text_is_refused(text, tokenizer_path, cache, tmp_path):
    other = tmp_path / "no_eos"
    shutil.copytree(tokenizer_path, other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match=r"eos_token is not set.*set \"eos_token\" in its tokenizer_config.json"):
        open_dataset("text", Causal(), [str(text)], 8, 4096, str(other), str(cache))
    assert not cache.exists()
    assert special_id(load_tokenizer(tokenizer_path), tokenizer_path, "eos_token", "") == 0


def test_a_tokenizer_that_is_no_directory(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    link = tmp_path / "link"
    link.symlink_to("gone")
    for path, expected in (
        (str(file), f"is a file, and its directory is needed; try {tmp_path}"),
        (str(link), "is a link to gone, which does not exist; point model.tokenizer at"),
        ("gpt2", "try `hf download gpt2 --local-dir gpt2` first"),
        ("Qwen/Qwen3-0.6B", "try `hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B` first"),
        (f"{tmp_path}/none", "no such directory; point model.tokenizer at"),
    ):
        with pytest.raises(DataError) as refused:
            load_tokenizer(path)
        assert expected in str(refused.value)
        assert ("hub" in str(refused.value)) == ("hf download" in expected)
