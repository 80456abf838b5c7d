"""`format: tokenized` for sequence-to-sequence models: two lengths, and what the decoder reads."""

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from megatron_ds.data import Seq2Seq, collate, open_dataset
from megatron_ds.errors import DataError
from tests.data.dataset_checks import assert_equal_samples, assert_shapes

VOCAB_SIZE = 50
X = -100


def open_seq2seq(*sources, seq_length=5, target_length=4, decoder_start_id=0, **options):
    objective = Seq2Seq(seed=7, decoder_start_id=decoder_start_id, target_length=target_length, **options)
    return open_dataset("tokenized", objective, sources, seq_length, VOCAB_SIZE)


def as_lists(sample):
    return {name: array.tolist() for name, array in sample.items()}


def test_labels_have_a_length_of_their_own_and_are_shifted_for_the_decoder(write_jsonl):
    rows = [
        {"input_ids": [5, 6, 7], "labels": [8, X, 9]},
        {"input_ids": [5, 6, 7, 8, 9], "labels": [8, 9], "decoder_input_ids": [3, 4]},
    ]
    dataset = open_seq2seq(write_jsonl(rows), decoder_start_id=2, padding_id=1)
    assert dataset.columns == ("input_ids", "attention_mask", "decoder_input_ids", "targets")
    assert as_lists(dataset.sample(0)) == {
        "input_ids": [5, 6, 7, 1, 1],
        "attention_mask": [True, True, True, False, False],
        "decoder_input_ids": [2, 8, 1, 9],
        "targets": [8, X, 9, X],
    }
    assert as_lists(dataset.sample(1)) == {
        "input_ids": [5, 6, 7, 8, 9],
        "attention_mask": [True] * 5,
        "decoder_input_ids": [3, 4, 1, 1],
        "targets": [8, 9, X, X],
    }
    assert_equal_samples(dataset.sample(2), dataset.sample(0))
    assert_shapes(dataset, [dataset.sample(0)])
    assert dataset.describe() == "2 examples of up to 5 tokens: 8 tokens, 4 targets"


def test_masks_are_there_where_an_example_needs_them(write_jsonl):
    full = {"input_ids": [1] * 5, "labels": [1]}
    columns = [
        open_seq2seq(write_jsonl([full, other])).columns
        for other in (
            full,
            {**full, "input_ids": [1]},
            {**full, "attention_mask": [1] * 5},
            {**full, "decoder_attention_mask": [1]},
        )
    ]
    masks = [[name for name in names if name.endswith("mask")] for names in columns]
    assert masks == [[], ["attention_mask"], ["attention_mask"], ["decoder_attention_mask"]]
    masked = {"input_ids": [1] * 5, "labels": [1, 2, 3], "decoder_attention_mask": [0, 1, 1]}
    dataset = open_seq2seq(write_jsonl([masked, full]))
    assert dataset.sample(0)["decoder_attention_mask"].tolist() == [False, True, True, False]
    assert dataset.sample(1)["decoder_attention_mask"].tolist() == [True, False, False, False]
    assert_shapes(dataset, [dataset.sample(0)])


def test_decoder_is_as_long_as_the_encoder_where_nothing_is_said(write_jsonl):
    dataset = open_seq2seq(write_jsonl([{"input_ids": [1], "labels": [1] * 5}]), target_length=None)
    assert dataset.target_length == 5
    assert_shapes(dataset, [dataset.sample(0)])


def test_fingerprint_follows_content_and_settings(write_jsonl):
    rows = [{"input_ids": [1, 2], "labels": [3]}]
    others = [
        [{"input_ids": [1], "labels": [2, 3]}],
        [{"input_ids": [1, 2], "labels": [3], "decoder_input_ids": [0]}],
    ]
    prints = [open_seq2seq(write_jsonl(variant)).fingerprint for variant in (rows, *others)]
    source = write_jsonl(rows)
    for options in ({"target_length": 3}, {"decoder_start_id": 1}, {"padding_id": 1}, {"seq_length": 6}):
        prints.append(open_seq2seq(source, **options).fingerprint)
    assert len(set(prints)) == 7


def test_loss_from_our_columns_is_the_loss_of_transformers(write_jsonl):
    """The convention itself: unpadded examples with `labels` alone, against our padded batch."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB_SIZE, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    rows = [
        {"input_ids": [5, 6, 7, 1], "labels": [8, 9, 1]},
        {"input_ids": [9, 1], "labels": [4, X, 11, 12, 1]},
        {"input_ids": [9, 12, 13, 3, 1], "labels": [4, 1]},
    ]
    batch = collate(open_seq2seq(write_jsonl(rows), target_length=8), range(3))
    expected = 0.0
    with torch.no_grad():
        for row in rows:
            tensors = {name: torch.tensor([values]) for name, values in row.items()}
            expected += model(**tensors).loss.item() * int((tensors["labels"] != X).sum())
        targets = batch.pop("targets")
        logits = model(**batch).logits
        ours = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    # fp32 on the same machine; padding changes only the order of a few sums
    assert ours == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"input_ids": [1]}, "no 'labels'; every example of an encoder-decoder model needs them"),
        ({"input_ids": [1], "labels": None}, "no 'labels'; every example"),
        ({"labels": [1]}, "no 'input_ids'; every example needs them"),
        ({"input_ids": [1] * 6, "labels": [1]}, "6 tokens exceed data.seq_length=5; raise data.seq_length to 6 or cut"),
        (
            {"input_ids": [1], "labels": [1] * 5},
            "5 tokens of labels exceed data.target_length=4; raise data.target_length to 5 or cut the example",
        ),
        ({"input_ids": [1], "labels": [1], "attention_mask": [1, 1]}, "attention_mask has 2 entries, input_ids has 1"),
        ({"input_ids": [1], "labels": [1], "decoder_input_ids": [1, 1]}, "decoder_input_ids has 2 entries, labels has"),
        ({"input_ids": [1], "labels": [1], "decoder_attention_mask": [1, 1]}, "decoder_attention_mask has 2 entries"),
        ({"input_ids": [1], "labels": [1], "decoder_attention_mask": [2]}, "decoder_attention_mask must hold only 0"),
        ({"input_ids": [1], "labels": [1], "decoder_input_ids": [50]}, "decoder_input_ids holds 50, but the model's"),
        ({"input_ids": [1], "labels": [1], "decoder_input_ids": [X]}, "decoder_input_ids holds -100; ids are 0 or mor"),
        ({"input_ids": [1], "labels": [51]}, "labels holds 51, but the model's vocab_size=50 ends at 49"),
        (
            {"input_ids": [1], "labels": [1], "token_type_ids": [0]},
            "column 'token_type_ids' belongs to BERT-like models, but this model is encoder-decoder; it takes input_id",
        ),
        ({"input_ids": [1], "label": [1]}, "unknown column 'label'; .*; did you mean 'labels'?"),
    ],
)
def test_malformed_example_is_named(write_jsonl, row, problem):
    source = write_jsonl([{"input_ids": [1, 2], "labels": [3]}, row])
    with pytest.raises(DataError, match=f"^data: {source}:2: {problem}") as caught:
        open_seq2seq(source)
    assert "\n" not in str(caught.value)
