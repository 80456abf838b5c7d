"""`format: text` for masked models: the stream in frames, masked anew each epoch."""

import numpy as np
import pytest

from megatron_ds.data import Causal, Masked, collate, load_tokenizer, open_dataset
from megatron_ds.errors import DataError
from tests.data.dataset_checks import (
    assert_equal_samples,
    assert_noise_depends_on_the_index_alone,
    assert_shapes,
    assert_share,
)

VOCAB_SIZE = 700


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def open_masked(cache):
    def open_text(tokenizer, *sources, seq_length=32, vocab_size=VOCAB_SIZE, **options):
        objective = Masked(**{"seed": 7, **options})
        return open_dataset("text", objective, [str(s) for s in sources], seq_length, vocab_size, tokenizer, cache)

    return open_text


def restored(sample):
    return np.where(sample["targets"] == -100, sample["input_ids"], sample["targets"])


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level"])
def test_masked_positions_put_back_give_the_framed_stream(kind, request, open_masked, valid_text, tmp_path):
    path = request.getfixturevalue(kind)
    tokenizer = load_tokenizer(path)
    (tmp_path / "a.txt").write_text("Call me Ishmael.")
    dataset = open_masked(path, tmp_path / "a.txt", valid_text)
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    documents = ["Call me Ishmael.", valid_text.read_bytes().decode()]
    stream = [token for text in documents for token in (*tokenizer.encode(text, add_special_tokens=False), sep)]
    assert len(dataset) == len(stream) // 30
    for index in (*range(len(dataset)), len(dataset), 3 * len(dataset) + 5):
        start = index % len(dataset) * 30
        assert restored(dataset.sample(index)).tolist() == [cls, *stream[start : start + 30], sep]
    assert dataset.columns == ("input_ids", "targets")
    assert_shapes(dataset, [dataset.sample(0)])
    assert dataset.describe() == f"{len(stream):,} tokens, {len(dataset):,} samples of 32, 15 % masked"


def test_share_of_masked_tokens_over_the_whole_text(open_masked, wordpiece, valid_text):
    dataset = open_masked(wordpiece, valid_text, seq_length=128, num_token_types=2)
    batch = {name: tensor.numpy() for name, tensor in collate(dataset, range(4 * len(dataset))).items()}
    chosen = batch["targets"] != -100
    assert (chosen.sum(axis=1) == round(0.15 * 126)).all()
    assert not (chosen[:, 0] | chosen[:, -1]).any()
    assert_share(int((batch["input_ids"][chosen] == 4).sum()), int(chosen.sum()), 0.8)
    assert not batch["token_type_ids"].any()
    assert_shapes(dataset, [dataset.sample(0)])


@pytest.mark.parametrize("whole_words", [False, True])
def test_masking_depends_on_the_index_alone_and_changes_each_epoch(open_masked, wordpiece, valid_text, whole_words):
    assert_noise_depends_on_the_index_alone(lambda: open_masked(wordpiece, valid_text, whole_words=whole_words))


def test_another_source_leaves_the_samples_before_it_as_they_were(open_masked, wordpiece, valid_text, tmp_path):
    (tmp_path / "a.txt").write_text("Call me Ishmael. " * 40)
    alone, both = open_masked(wordpiece, valid_text), open_masked(wordpiece, valid_text, tmp_path / "a.txt")
    assert len(both) > len(alone)
    for index in range(len(alone)):
        assert_equal_samples(alone.sample(index), both.sample(index))


def test_fingerprint_follows_all_that_changes_a_sample(open_masked, wordpiece, valid_text):
    variants = [{}, {"seed": 8}, {"mask_rate": 0.2}, {"whole_words": True}, {"num_token_types": 2}, {"seq_length": 33}]
    variants += [{"next_sentence": True}, {"padding_id": 9}]
    assert len({open_masked(wordpiece, valid_text, **options).fingerprint for options in variants}) == len(variants)


def test_separator_decides_the_cache_of_tokens(open_masked, byte_level, valid_text, tmp_path, cache):
    """A causal model of the same tokenizer ends documents with eos, a masked one with sep."""
    tokenizer = load_tokenizer(byte_level)
    tokenizer.sep_token = "Ġ"
    tokenizer.save_pretrained(tmp_path / "other")
    source = tmp_path / "a.txt"
    source.write_text("Call me Ishmael.")
    path = str(tmp_path / "other")
    length = len(tokenizer.encode("Call me Ishmael."))
    masked = open_masked(path, source, seq_length=length + 3)
    causal = open_dataset("text", Causal(), [str(source)], length, VOCAB_SIZE, path, cache)
    assert restored(masked.sample(0))[-2] == tokenizer.sep_token_id != tokenizer.eos_token_id
    assert causal.sample(0)["targets"][-1] == tokenizer.eos_token_id


def test_sample_without_a_word_to_hide_has_no_targets(open_masked, wordpiece, write_jsonl):
    dataset = open_masked(wordpiece, write_jsonl([{"text": "[SEP] [MASK]"}]), seq_length=3)
    assert len(dataset) == 3
    assert (dataset.sample(0)["targets"] == -100).all()


def test_what_cannot_be_is_refused(open_masked, wordpiece, tokenizer_path, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("the the the")
    with pytest.raises(DataError) as caught:
        open_masked(wordpiece, path, seq_length=2)
    assert str(caught.value) == "data.seq_length=2 leaves no room for text next to 2 special tokens; nearest: 3"
    with pytest.raises(DataError) as caught:
        open_masked(wordpiece, path, seq_length=7)
    assert str(caught.value) == (
        f"data: {path}: 4 tokens do not fill one sample of data.seq_length=7, which takes 5; "
        "lower data.seq_length to at most 6 or add text"
    )
    assert len(open_masked(wordpiece, path, seq_length=6)) == 1
    path.write_text("")
    with pytest.raises(DataError, match=r"0 tokens do not fill .*; add text$"):
        open_masked(wordpiece, path)
    path.write_text("the the")
    with pytest.raises(DataError, match="cls_token is not set, but a masked model's sample begins with it"):
        open_masked(tokenizer_path, path)
