"""Masking: how many tokens, which, and behind what; whole words as the three kinds of tokenizers mark them."""

import numpy as np
import pytest

from megatron_ds.data import Masked, load_tokenizer
from megatron_ds.data.noise.masking import Masker, MaskingIds, load_masker
from megatron_ds.data.noise.word_boundaries import word_boundaries
from megatron_ds.errors import DataError
from tests.data.dataset_checks import assert_share

VOCAB_SIZE = 700
CLS, SEP, MASK, PAD = 2, 3, 4, 0
IDS = MaskingIds(CLS, SEP, MASK, (PAD,))
SPECIAL = [CLS, SEP, MASK, PAD]


def framed(tokenizer, text):
    return np.array([tokenizer.cls_token_id, *tokenizer.encode(text, add_special_tokens=False), tokenizer.sep_token_id])


def masker_of(**options):
    return Masker(Masked(seed=3, **options), IDS, VOCAB_SIZE, None)


def random_ids(length=128, seed=0):
    ids = np.random.default_rng(seed).integers(0, VOCAB_SIZE, length)
    ids[[0, length // 2, length - 1]] = CLS, MASK, SEP
    return ids


@pytest.mark.parametrize("rate", [0.01, 0.15, 0.4, 0.99])
def test_the_number_of_masked_tokens_is_exact_and_no_special_one_is_among_them(rate):
    masker = masker_of(mask_rate=rate)
    for index in range(200):
        ids = random_ids(seed=index)
        inputs, targets = masker.hide(ids, index)
        ordinary = ~np.isin(ids, SPECIAL)
        chosen = targets != -100
        assert chosen.sum() == max(1, round(rate * ordinary.sum()))
        assert not (chosen & ~ordinary).any()
        np.testing.assert_array_equal(np.where(chosen, targets, inputs), ids)  # put back, it is the original


def test_80_10_10_and_every_position_and_id_alike():
    masker = masker_of()
    ids = np.arange(5, 105)
    samples = [masker.hide(ids, index) for index in range(2000)]
    inputs, targets = (np.stack(arrays) for arrays in zip(*samples))
    chosen = targets != -100
    total = int(chosen.sum())
    assert total == 2000 * 15
    kept = (inputs == ids) & chosen
    masked = (inputs == MASK) & chosen
    replaced = inputs[chosen & ~kept & ~masked]
    # a random id may be the token itself or the mask: each 1 of 700 times
    assert_share(int(masked.sum()), total, 0.8 + 0.1 / VOCAB_SIZE)
    assert_share(int(kept.sum()), total, 0.1 + 0.1 / VOCAB_SIZE)
    assert_share(len(replaced), total, 0.1 * (1 - 2 / VOCAB_SIZE))
    assert replaced.min() < 20 and replaced.max() > VOCAB_SIZE - 20
    assert {CLS, SEP, PAD} <= set(replaced.tolist())  # special ids too, as in BERT's own code
    assert_share(int((replaced < VOCAB_SIZE // 2).sum()), len(replaced), 0.5)
    for position in range(len(ids)):
        assert_share(int(chosen[:, position].sum()), 2000, 0.15)
    for number in set((masked.sum(axis=1)).tolist()):
        assert 4 <= number <= 15  # each token by itself: the numbers of a sample vary
    assert len(set(masked.sum(axis=1).tolist())) > 5


def test_tokens_that_may_not_be_hidden_are_not():
    ids = random_ids()
    allowed = np.arange(128) < 40
    for index in range(50):
        _, targets = masker_of().hide(ids, index, allowed)
        assert (targets[40:] == -100).all()
        assert (targets != -100).sum() == round(0.15 * (~np.isin(ids[:40], SPECIAL)).sum())
    inputs, targets = masker_of().hide(np.array(SPECIAL), 0)
    assert inputs.tolist() == SPECIAL
    assert (targets == -100).all()
    _, targets = masker_of().hide(np.array([CLS, 9, SEP]), 0)
    assert targets.tolist() == [-100, 9, -100]


def test_noise_follows_seed_and_index():
    ids = random_ids()
    hidden = [Masker(Masked(seed), IDS, VOCAB_SIZE, None).hide(ids, index)[1] for seed in (1, 2) for index in (0, 1)]
    assert len({array.tobytes() for array in hidden}) == 4
    assert masker_of().identity != masker_of(mask_rate=0.2).identity


# ---- whole words


def test_wordpiece_words(wordpiece):
    tokenizer = load_tokenizer(wordpiece)
    ids = framed(tokenizer, "Call me Ishmael. Whales, unbelievable")
    breaks = np.isin(ids, SPECIAL)
    words = word_boundaries(tokenizer, wordpiece, VOCAB_SIZE).word_numbers(ids, breaks)
    spelled = [tokenizer.decode(ids[words == number]).replace(" ", "") for number in range(words.max() + 1)]
    assert spelled == ["[CLS]", "call", "me", "ishmael", ".", "whales", ",", "unbelievable", "[SEP]"]


def test_byte_level_words_end_at_line_ends_too(byte_level):
    tokenizer = load_tokenizer(byte_level)
    ids = np.array(tokenizer.encode("Call me\nIshmael. \tWhales\n\nξένος and λόγος", add_special_tokens=False))
    words = word_boundaries(tokenizer, byte_level, VOCAB_SIZE).word_numbers(ids, np.zeros(len(ids), dtype=bool))
    spelled = [tokenizer.decode(ids[words == number]) for number in range(words.max() + 1)]
    assert "".join(spelled) == "Call me\nIshmael. \tWhales\n\nξένος and λόγος"
    lettered = [word for word in spelled if word.strip()]
    assert lettered == ["Call", " me", "Ishmael.", "Whales", "ξένος", " and", " λόγος"]


def test_sentencepiece_words(sentencepiece):
    tokenizer = load_tokenizer(sentencepiece)
    ids = np.array(tokenizer.encode("Call me Ishmael. Unbelievable", add_special_tokens=False))
    words = word_boundaries(tokenizer, sentencepiece, VOCAB_SIZE).word_numbers(ids, np.zeros(len(ids), dtype=bool))
    assert [tokenizer.decode(ids[words == number]) for number in range(4)] == ["Call", "me", "Ishmael.", "Unbelievable"]


@pytest.mark.parametrize("kind", ["wordpiece", "byte_level"])
def test_whole_words_are_never_split_and_fill_the_number(kind, request, valid_text):
    path = request.getfixturevalue(kind)
    tokenizer = load_tokenizer(path)
    objective = Masked(seed=1, whole_words=True)
    masker = load_masker(tokenizer, path, objective, VOCAB_SIZE)
    marks = word_boundaries(tokenizer, path, VOCAB_SIZE)
    text = valid_text.read_text()
    exact = several = 0
    for index in range(300):
        ids = framed(tokenizer, text[index * 40 : index * 40 + 500])
        inputs, targets = masker.hide(ids, index)
        chosen = targets != -100
        special = np.isin(ids, masker.ids.special)
        words = marks.word_numbers(ids, special)
        np.testing.assert_array_equal(np.where(chosen, targets, inputs), ids)
        for number in np.unique(words):
            assert len(set(chosen[words == number].tolist())) == 1, "a word is split"
        wanted = max(1, round(0.15 * (~special).sum()))
        assert 0 < chosen.sum() <= wanted
        exact += chosen.sum() == wanted
        several += len(np.unique(words[chosen])) < chosen.sum()
    assert exact > 290, "short words fill what long ones leave"
    assert several > 290, "words of several tokens are chosen too"


def test_at_least_one_word_is_hidden_however_long(wordpiece):
    tokenizer = load_tokenizer(wordpiece)
    masker = load_masker(tokenizer, wordpiece, Masked(seed=1, whole_words=True), VOCAB_SIZE)
    ids = framed(tokenizer, "unbelievable whatsoever")
    words = word_boundaries(tokenizer, wordpiece, VOCAB_SIZE).word_numbers(ids, np.isin(ids, masker.ids.special))
    assert np.bincount(words).tolist()[1:3] > [1, 1]
    hidden = {frozenset(words[masker.hide(ids, index)[1] != -100].tolist()) for index in range(50)}
    assert hidden == {frozenset({1}), frozenset({2})}


def test_tokenizers_that_do_not_mark_words_are_refused(wordpiece, monkeypatch):
    tokenizer = load_tokenizer(wordpiece)
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda _: {"a": 7, "b": 8, "##": 9})
    with pytest.raises(DataError) as caught:
        load_masker(tokenizer, "dir", Masked(seed=1, whole_words=True), VOCAB_SIZE)
    assert str(caught.value) == (
        "tokenizer dir: its tokens do not show where words begin (none has ## or Ġ or ▁), "
        "but data.whole_words=true needs that; set data.whole_words=false"
    )


@pytest.mark.parametrize(
    ("token", "use"),
    [
        ("mask_token", "masking hides tokens behind it"),
        ("cls_token", "a masked model's sample begins with it"),
        ("sep_token", "a masked model's sample and each document end with it"),
    ],
)
def test_missing_special_token_is_refused_with_the_fix(wordpiece, token, use):
    tokenizer = load_tokenizer(wordpiece)
    setattr(tokenizer, token, None)
    with pytest.raises(DataError) as caught:
        load_masker(tokenizer, "dir", Masked(seed=1), VOCAB_SIZE)
    assert str(caught.value) == (
        f'tokenizer dir: {token} is not set, but {use}; set "{token}" in its tokenizer_config.json '
        "to a token of its vocabulary"
    )


def test_random_tokens_are_ids_of_both_the_tokenizer_and_the_model(wordpiece):
    tokenizer = load_tokenizer(wordpiece)
    ids = np.full(2000, 50)
    for vocab_size, largest in ((VOCAB_SIZE + 300, VOCAB_SIZE - 1), (60, 59)):
        masker = load_masker(tokenizer, wordpiece, Masked(seed=1, mask_rate=0.9), vocab_size)
        inputs = np.concatenate([masker.hide(ids, index)[0] for index in range(20)])
        assert inputs.max() == largest
    with pytest.raises(DataError, match="gives ids up to 4, but the model's vocab_size=4 ends at 3"):
        load_masker(tokenizer, wordpiece, Masked(seed=1), 4)
