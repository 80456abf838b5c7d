"""Next-sentence pairs: half of them true, the other half with a B from elsewhere."""

import numpy as np
import pytest

from megatron_ds.data import Masked, collate, load_tokenizer, open_dataset
from megatron_ds.errors import DataError
from tests.data.dataset_checks import (
    assert_equal_samples,
    assert_noise_depends_on_the_index_alone,
    assert_shapes,
    assert_share,
)

VOCAB_SIZE = 700
S = 24
CLS, SEP = 2, 3


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def open_pairs(cache, wordpiece):
    def open_text(*sources, seq_length=S, token_types=True, **options):
        objective = Masked(**{"seed": 7, "next_sentence": True, "num_token_types": 1 + token_types, **options})
        return open_dataset("text", objective, [str(s) for s in sources], seq_length, VOCAB_SIZE, wordpiece, cache)

    return open_text


@pytest.fixture
def documents(valid_text, write_jsonl):
    """Documents of all lengths, one token among them, cut from the shipped text; the file of them."""
    paragraphs = [part for part in valid_text.read_text().split("\n\n") if part.strip()]
    texts = [*paragraphs[:60], "the", " ", "the whale", *paragraphs[60:70]]
    return texts, write_jsonl([{"text": text} for text in texts])


def parts_of(sample):
    """A and B as they were before masking, from the token types and the mask."""
    ids = np.where(sample["targets"] == -100, sample["input_ids"], sample["targets"])
    there, types = sample["attention_mask"], sample["token_type_ids"]
    first, second = ids[there & (types == 0)], ids[there & (types == 1)]
    assert first[0] == CLS and first[-1] == second[-1] == SEP
    assert (ids[~there] == 0).all() and (types[~there] == 0).all() and (sample["targets"][~there] == -100).all()
    assert there[: there.sum()].all()
    return first[1:-1].tolist(), second[:-1].tolist()


def find(part, tokens):
    return [at for at in range(len(tokens) - len(part) + 1) if tokens[at : at + len(part)] == part]


def test_pairs_of_documents(documents, open_pairs, wordpiece):
    """Sample by sample: A and a true B are the chunk, a random B is of another document and as long as it can be."""
    texts, source = documents
    tokenizer = load_tokenizer(wordpiece)
    dataset = open_pairs(source)
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    size = S - 3
    chunks = [
        (number, tokens[start : start + size])
        for number, tokens in enumerate(encoded)
        for start in range(0, len(tokens), size)
        if len(tokens[start : start + size]) >= 2
    ]
    assert len(dataset) == len(chunks)
    shorter = 0
    for index in range(3 * len(dataset)):
        sample = dataset.sample(index)
        (first, second), (document, chunk) = parts_of(sample), chunks[index % len(chunks)]
        assert first == chunk[: len(first)] and len(second) >= 1
        if sample["next_sentence_label"] == 0:
            assert first + second == chunk
            continue
        holders = [number for number, tokens in enumerate(encoded) if number != document and find(second, tokens)]
        assert holders
        if len(first) + len(second) < len(chunk):
            shorter += 1
            assert any(encoded[number] == second for number in holders), "shorter than its document"
    assert shorter > 0
    assert_shapes(dataset, [dataset.sample(0)])
    tokens = sum(len(ids) + 1 for ids in encoded)
    assert dataset.describe() == f"{tokens:,} tokens, {len(dataset)} pairs of up to 24, 15 % masked"


def test_half_of_the_pairs_are_true_and_splits_are_uniform(documents, open_pairs):
    dataset = open_pairs(documents[1])
    batch = {name: tensor.numpy() for name, tensor in collate(dataset, range(8 * len(dataset))).items()}
    labels = batch["next_sentence_label"]
    assert set(labels.tolist()) == {0, 1}
    assert_share(int(labels.sum()), len(labels), 0.5)
    whole = (labels == 0) & batch["attention_mask"].all(axis=1)
    lengths = ((batch["token_type_ids"] == 0).sum(axis=1) - 2)[whole]
    assert set(lengths.tolist()) == set(range(1, S - 3))
    assert_share(int((lengths <= 10).sum()), len(lengths), 0.5)


@pytest.mark.parametrize("whole_words", [False, True])
def test_pairs_depend_on_the_index_alone_and_change_each_epoch(documents, open_pairs, whole_words):
    assert_noise_depends_on_the_index_alone(lambda: open_pairs(documents[1], whole_words=whole_words))


def test_random_parts_are_of_all_other_documents_alike(open_pairs, write_jsonl, wordpiece):
    tokenizer = load_tokenizer(wordpiece)
    letters = "abcde"
    dataset = open_pairs(write_jsonl([{"text": " ".join(letter * 40)} for letter in letters]))
    own = [tokenizer.convert_tokens_to_ids(letter) for letter in letters]
    seen = np.zeros((5, 5), dtype=int)
    for index in range(400 * len(dataset)):
        sample = dataset.sample(index)
        first, second = parts_of(sample)
        assert len(set(first)) == len(set(second)) == 1
        if sample["next_sentence_label"] == 1:
            seen[own.index(first[0]), own.index(second[0])] += 1
    assert (np.diag(seen) == 0).all()
    for document in range(5):
        for other in set(range(5)) - {document}:
            assert_share(int(seen[document, other]), int(seen[document].sum()), 1 / 4)


def test_one_document_pairs_with_its_own_other_places(valid_text, open_pairs, wordpiece):
    """A random B is outside the chunk, and from all over the text."""
    tokens = load_tokenizer(wordpiece).encode(valid_text.read_text(), add_special_tokens=False)
    dataset = open_pairs(valid_text)
    size = S - 3
    places = []
    for index in range(2 * len(dataset)):
        sample = dataset.sample(index)
        first, second = parts_of(sample)
        start = index % len(dataset) * size
        stop = min(start + size, len(tokens))
        assert first == tokens[start : start + len(first)]
        assert len(first) + len(second) == stop - start
        if sample["next_sentence_label"] == 1 and len(second) > 8:
            found = find(second, tokens)
            assert [at for at in found if at + len(second) <= start or at >= stop]
            places.append(found[0] / len(tokens))
    assert_share(sum(place < 0.5 for place in places), len(places), 0.5)


def test_the_smallest_text_that_has_a_random_part(open_pairs, write_jsonl):
    dataset = open_pairs(write_jsonl([{"text": " ".join("abcdef")}]), seq_length=8)  # a chunk of 5, and one token more
    assert len(dataset) == 1
    seconds = {tuple(parts_of(dataset.sample(index))[1]) for index in range(60)}
    randoms = {
        tuple(parts_of(dataset.sample(i))[1]) for i in range(60) if dataset.sample(i)["next_sentence_label"] == 1
    }
    assert len(randoms) == 1 and len(randoms.pop()) == 1
    assert len(seconds) == 5


def test_token_types_are_left_out_where_the_model_has_none(documents, open_pairs):
    dataset, typed = (open_pairs(documents[1], token_types=wanted) for wanted in (False, True))
    assert dataset.columns == ("input_ids", "targets", "attention_mask", "next_sentence_label")
    assert_shapes(dataset, [dataset.sample(0)])
    typed_sample = dict(typed.sample(3))
    del typed_sample["token_type_ids"]
    assert_equal_samples(dataset.sample(3), typed_sample)


def test_padding_is_the_models(documents, open_pairs):
    dataset = open_pairs(documents[1], padding_id=9)
    sample = next(sample for sample in map(dataset.sample, range(100)) if not sample["attention_mask"].all())
    assert (sample["input_ids"][~sample["attention_mask"]] == 9).all()


def test_what_cannot_be_is_refused(open_pairs, write_jsonl):
    source = write_jsonl([{"text": "a b c"}])
    for length, message in (
        (4, "data.seq_length=4 leaves no room for a pair next to 3 special tokens; nearest: 5"),
        (
            6,
            f"data: {source}: one document of 3 tokens holds one pair of data.seq_length=6 and no text for a random "
            "one; add a document, or lower data.seq_length",
        ),
    ):
        with pytest.raises(DataError) as caught:
            open_pairs(source, seq_length=length)
        assert str(caught.value) == message
    assert len(open_pairs(source, seq_length=5)) == 1
    source = write_jsonl([{"text": "a"}, {"text": "b"}])
    with pytest.raises(DataError, match=r"no document of 2 tokens to make a pair of; add text$"):
        open_pairs(source)
