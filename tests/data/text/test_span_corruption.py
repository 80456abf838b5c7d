"""Span corruption: lengths that fit, spans that go back to where they were cut, and the paper's rates."""

import numpy as np
import pytest

from megatron_ds.data import Seq2Seq, load_tokenizer, open_dataset
from megatron_ds.data.noise.seeded_random import SeededRandom
from megatron_ds.data.noise.span_corruption import corrupt, corruption_lengths, fit_lengths
from megatron_ds.data.text.span_corruption import find_sentinels
from megatron_ds.errors import DataError
from tests.data.dataset_checks import (
    assert_equal_samples,
    assert_noise_depends_on_the_index_alone,
    assert_shapes,
    assert_share,
)
from tests.data.tiny_tokenizers import NUM_SENTINELS, save_sentencepiece

VOCAB_SIZE = 700
PAD, EOS, START = 0, 1, 0
RATES = [(0.15, 3.0), (0.15, 1.0), (0.5, 3.0), (0.01, 3.0), (0.9, 1.0), (0.15, 10.0)]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def open_corrupted(cache, sentencepiece):
    def open_text(*sources, seq_length=64, tokenizer=sentencepiece, vocab_size=VOCAB_SIZE, **options):
        objective = Seq2Seq(**{"seed": 7, "decoder_start_id": START, **options})
        return open_dataset("text", objective, [str(s) for s in sources], seq_length, vocab_size, tokenizer, cache)

    return open_text


def sentinel_ids(tokenizer_path, number=NUM_SENTINELS):
    return load_tokenizer(tokenizer_path).convert_tokens_to_ids([f"<extra_id_{n}>" for n in range(number)])


def merged(inputs, targets, sentinels):
    """The spans put back in the places of their sentinels; checks that both use the same ones in the same order."""
    assert inputs[-1] == targets[-1] == EOS
    spans: dict[int, list[int]] = {}
    for token in targets[:-1]:
        if token in sentinels:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    assert list(spans) == list(sentinels[: len(spans)])
    assert [token for token in inputs if token in sentinels] == list(spans)[:-1]
    assert spans[list(spans)[-1]] == [] and all(list(spans.values())[:-1])
    return [token for piece in inputs[:-1] for token in spans.get(piece, [piece])], list(spans.values())[:-1]


@pytest.mark.parametrize(("rate", "mean_span"), RATES)
def test_lengths_are_the_largest_that_fit_and_never_go_down(rate, mean_span):
    before = corruption_lengths(2, rate, mean_span)
    for raw in range(3, 1200):
        lengths = corruption_lengths(raw, rate, mean_span)
        assert 1 <= lengths.spans <= min(lengths.noise, raw - lengths.noise)
        assert lengths.inputs >= before.inputs and lengths.targets >= before.targets
        before = lengths
    for seq_length in range(3, 300):
        lengths = fit_lengths(seq_length, rate, mean_span)
        assert lengths.inputs <= seq_length < corruption_lengths(lengths.raw + 1, rate, mean_span).inputs
        assert seq_length - lengths.inputs <= 1
    assert fit_lengths(2, rate, mean_span) is None


def test_lengths_of_the_paper():
    """512 positions hold 568 tokens, as in T5's own code; figure 2's last sentinel makes its 114 targets 115."""
    lengths = fit_lengths(512, 0.15, 3.0)
    assert (lengths.raw, lengths.noise, lengths.spans) == (568, 85, 28)
    assert (lengths.inputs, lengths.targets, lengths.sentinels) == (512, 115, 29)


@pytest.mark.parametrize(("rate", "mean_span"), RATES)
def test_spans_put_back_give_the_tokens(rate, mean_span):
    for seq_length in (3, 4, 17, 120):
        lengths = fit_lengths(seq_length, rate, mean_span)
        tokens = np.arange(1000, 1000 + lengths.raw)
        sentinels = np.arange(2, 2 + lengths.sentinels)
        for index in range(20):
            inputs, targets = corrupt(tokens, lengths, sentinels, EOS, SeededRandom(5, index))
            assert (len(inputs), len(targets)) == (lengths.inputs, lengths.targets)
            whole, spans = merged(inputs.tolist(), targets.tolist(), sentinels.tolist())
            assert whole == tokens.tolist()
            assert (len(spans), sum(map(len, spans))) == (lengths.spans, lengths.noise)
            assert inputs[0] == 1000, "a sample begins with text"


def test_rates_of_the_paper_and_spans_in_all_places():
    lengths = fit_lengths(512, 0.15, 3.0)
    tokens, sentinels = np.arange(1000, 1000 + lengths.raw), np.arange(2, 2 + lengths.sentinels)
    cut = np.zeros(lengths.raw)
    sizes = []
    for index in range(2000):
        _, spans = merged(
            *(part.tolist() for part in corrupt(tokens, lengths, sentinels, EOS, SeededRandom(5, index))),
            sentinels.tolist(),
        )
        sizes += [len(span) for span in spans]
        cut[np.concatenate(spans) - 1000] += 1
    assert lengths.noise / lengths.raw == pytest.approx(0.15, abs=0.5 / lengths.raw)
    assert np.mean(sizes) == pytest.approx(3, abs=0.05)
    # 85 tokens cut at 27 of 84 places: a span is of one token 27 times of 84
    assert_share(sum(size == 1 for size in sizes), len(sizes), 27 / 84)
    assert max(sizes) > 10
    middle = cut[50:-50] / 2000
    assert middle.mean() == pytest.approx(0.15, abs=0.01)
    assert middle.min() > 0.1 and middle.max() < 0.2


def test_samples_are_the_text(open_corrupted, sentencepiece, valid_text):
    tokenizer = load_tokenizer(sentencepiece)
    text = valid_text.read_bytes().decode()
    stream = [*tokenizer.encode(text, add_special_tokens=False), EOS]
    dataset = open_corrupted(valid_text)
    raw = fit_lengths(64, 0.15, 3.0)
    assert len(dataset) == len(stream) // raw.raw
    assert dataset.target_length == 16 == -(-raw.targets // 8) * 8
    sentinels = sentinel_ids(sentencepiece)
    pieces = []
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        targets = sample["targets"]
        assert (targets[raw.targets :] == -100).all()
        whole, _ = merged(sample["input_ids"].tolist(), targets[: raw.targets].tolist(), sentinels)
        pieces += whole
        expected = [START, *np.where(targets == -100, PAD, targets)[:-1]]
        assert sample["decoder_input_ids"].tolist() == expected
    assert pieces == stream[: len(pieces)]
    assert text.startswith(tokenizer.decode(pieces[:-40]))
    assert dataset.columns == ("input_ids", "decoder_input_ids", "targets")
    assert_shapes(dataset, [dataset.sample(0)])
    assert dataset.describe() == (
        f"{len(stream):,} tokens, {len(dataset)} samples of 64 with targets of 16, 15 % masked in spans of 3"
    )


def test_decoder_reads_what_transformers_would_make_of_the_labels(open_corrupted, valid_text):
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    dataset = open_corrupted(valid_text, decoder_start_id=5, padding_id=6)
    config = T5Config(
        vocab_size=VOCAB_SIZE, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=5
    )
    config.pad_token_id = 6
    model = T5ForConditionalGeneration(config)
    sample = dataset.sample(0)
    expected = model._shift_right(torch.from_numpy(sample["targets"])[None])[0]
    assert sample["decoder_input_ids"].tolist() == expected.tolist()


def test_corruption_depends_on_the_index_alone_and_changes_each_epoch(open_corrupted, valid_text):
    assert_noise_depends_on_the_index_alone(lambda: open_corrupted(valid_text))


def test_another_source_leaves_the_samples_before_it_as_they_were(open_corrupted, valid_text, tmp_path):
    (tmp_path / "a.txt").write_text("Call me Ishmael. " * 40)
    alone, both = open_corrupted(valid_text), open_corrupted(valid_text, tmp_path / "a.txt")
    assert len(both) > len(alone)
    for index in range(len(alone)):
        assert_equal_samples(alone.sample(index), both.sample(index))


def test_an_input_that_is_one_short_is_padded_and_says_so(open_corrupted, valid_text):
    rate, mean_span = 0.9, 1.0  # only where there are as many spans as pieces of text left between them
    short = next(length for length in range(20, 80) if fit_lengths(length, rate, mean_span).inputs < length)
    dataset = open_corrupted(valid_text, seq_length=short, padding_id=6, mask_rate=rate, mean_span=mean_span)
    sample = dataset.sample(3)
    assert sample["attention_mask"].tolist() == [True] * (short - 1) + [False]
    assert sample["input_ids"][-2:].tolist() == [EOS, 6]
    assert_shapes(dataset, [sample])


def test_target_length_is_taken_or_refused(open_corrupted, valid_text):
    needed = fit_lengths(64, 0.15, 3.0).targets
    assert open_corrupted(valid_text, target_length=needed).target_length == needed
    roomy = open_corrupted(valid_text, target_length=needed + 5)
    assert (roomy.sample(0)["targets"] != -100).sum() == needed
    assert_shapes(roomy, [roomy.sample(0)])
    with pytest.raises(DataError) as caught:
        open_corrupted(valid_text, target_length=needed - 1)
    assert str(caught.value) == (
        f"data.target_length={needed - 1} is below the {needed} target tokens that data.seq_length=64, "
        f"mask_rate=0.15 and mean_span=3 give; nearest: {needed}"
    )


def test_fingerprint_follows_all_that_changes_a_sample(open_corrupted, valid_text):
    variants = [{}, {"seed": 8}, {"mask_rate": 0.2}, {"mean_span": 2.0}, {"target_length": 24}, {"padding_id": 5}]
    variants += [{"seq_length": 65}, {"decoder_start_id": 2}]
    assert len({open_corrupted(valid_text, **options).fingerprint for options in variants}) == len(variants)


def test_too_few_sentinels_are_refused_with_what_would_do(open_corrupted, valid_text, tmp_path, wordpiece, cache):
    few = save_sentencepiece(valid_text, tmp_path / "few", num_sentinels=5)
    with pytest.raises(DataError) as caught:
        open_corrupted(valid_text, tokenizer=few, seq_length=512)
    largest = max(length for length in range(3, 513) if fit_lengths(length, 0.15, 3.0).sentinels <= 5)
    assert str(caught.value) == (
        f"tokenizer {few}: it has 5 sentinels, <extra_id_0> to <extra_id_4>, but data.seq_length=512 with mean_span=3 "
        f"takes 29; lower data.seq_length to {largest}, raise data.mean_span or use a T5 tokenizer with more"
    )
    assert open_corrupted(valid_text, tokenizer=few, seq_length=largest)
    with pytest.raises(DataError, match=f"lower data.seq_length to {largest}"):
        open_corrupted(valid_text, tokenizer=few, seq_length=largest + 1)
    one = save_sentencepiece(valid_text, tmp_path / "one", num_sentinels=1)
    with pytest.raises(DataError, match=r"takes 2; raise data\.mean_span or use a T5 tokenizer with more$"):
        open_corrupted(valid_text, tokenizer=one, seq_length=8)
    with pytest.raises(DataError, match=r"eos_token is not set, but data\.format=text ends each document with it"):
        open_corrupted(valid_text, tokenizer=wordpiece)
    no_sentinel = load_tokenizer(wordpiece)
    no_sentinel.eos_token = "[SEP]"
    no_sentinel.save_pretrained(tmp_path / "bert")
    with pytest.raises(DataError) as caught:
        open_corrupted(valid_text, tokenizer=str(tmp_path / "bert"))
    assert str(caught.value) == (
        f"tokenizer {tmp_path}/bert: it has no sentinel <extra_id_0>, but data.seq_length=64 with mean_span=3 takes 4; "
        "use a T5 tokenizer"
    )


def test_what_cannot_be_is_refused(open_corrupted, sentencepiece, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("the the the the")
    tokens = len(load_tokenizer(sentencepiece).encode("the the the the")) + 1
    with pytest.raises(DataError) as caught:
        open_corrupted(path, seq_length=30)
    raw = fit_lengths(30, 0.15, 3.0).raw
    largest = max(length for length in range(3, 30) if fit_lengths(length, 0.15, 3.0).raw <= tokens)
    assert str(caught.value) == (
        f"data: {path}: {tokens} tokens do not fill one sample of data.seq_length=30, which takes {raw}; "
        f"lower data.seq_length to at most {largest} or add text"
    )
    assert len(open_corrupted(path, seq_length=largest)) == 1
    with pytest.raises(DataError, match=r"data.seq_length=2 leaves no room for text .*; nearest: 3$"):
        open_corrupted(path, seq_length=2)
    path.write_text("")
    with pytest.raises(DataError, match=r"0 tokens do not fill .*; add text$"):
        open_corrupted(path)
    with pytest.raises(DataError, match="gives ids up to 699, but the model's vocab_size=640 ends at 639"):
        find_sentinels(load_tokenizer(sentencepiece), "dir", 64, Seq2Seq(1, 0), 640)
