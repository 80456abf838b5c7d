"""`format: tokenized` for masked models: labels where they stand, or masking; and what is said of what does not fit."""

import datasets
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForPreTraining

from megatron_ds.data import Masked, collate, load_tokenizer, open_dataset
from megatron_ds.errors import DataError
from tests.data.dataset_checks import assert_noise_depends_on_the_index_alone, assert_shapes, assert_share

VOCAB_SIZE = 700
X = -100


def open_masked(*sources, seq_length=6, tokenizer=None, **options):
    objective = Masked(**{"seed": 7, **options})
    return open_dataset("tokenized", objective, sources, seq_length, VOCAB_SIZE, tokenizer)


def as_lists(sample):
    return {name: array.tolist() for name, array in sample.items()}


def test_labels_stay_where_they_are_and_examples_are_padded(write_jsonl):
    dataset = open_masked(
        write_jsonl(
            [
                {"input_ids": [2, 4, 9, 3], "labels": [X, 8, X, X]},
                {"input_ids": [2, 4, 9, 1, 5, 3], "labels": [X, X, 7, X, 5, X], "attention_mask": [1, 1, 0, 1, 1, 1]},
            ]
        ),
        padding_id=6,
    )
    assert dataset.columns == ("input_ids", "targets", "attention_mask")
    assert as_lists(dataset.sample(0)) == {
        "input_ids": [2, 4, 9, 3, 6, 6],
        "targets": [X, 8, X, X, X, X],
        "attention_mask": [True] * 4 + [False] * 2,
    }
    assert as_lists(dataset.sample(1)) == {
        "input_ids": [2, 4, 9, 1, 5, 3],
        "targets": [X, X, 7, X, 5, X],
        "attention_mask": [True, True, False, True, True, True],
    }
    assert as_lists(dataset.sample(3)) == as_lists(dataset.sample(1))
    assert_shapes(dataset, [dataset.sample(0)])
    assert dataset.describe() == "2 examples of up to 6 tokens: 10 tokens, 3 targets"


@pytest.mark.parametrize(
    ("rows", "masked"),
    [
        ([[1] * 6, [1] * 6], False),
        ([[1] * 6, [1] * 5], True),
    ],
)
def test_mask_is_there_as_soon_as_an_example_is_shorter(write_jsonl, rows, masked):
    dataset = open_masked(write_jsonl([{"input_ids": ids, "labels": ids} for ids in rows]))
    assert ("attention_mask" in dataset.columns) == masked


def test_mask_is_there_as_soon_as_an_example_has_one(write_jsonl):
    bare = {"input_ids": [1] * 6, "labels": [1] * 6}
    dataset = open_masked(write_jsonl([bare, {**bare, "attention_mask": [1] * 6}]))
    assert dataset.sample(0)["attention_mask"].all()


def test_types_and_pair_labels(write_jsonl):
    rows = [
        {"input_ids": [2, 9, 3, 9, 3], "labels": [X, 9, X, X, X], "token_type_ids": [0, 0, 0, 1, 1]},
        {"input_ids": [2, 9, 3, 9, 3, 5], "labels": [X] * 6},
    ]
    rows[0]["next_sentence_label"], rows[1]["next_sentence_label"] = 1, -100
    dataset = open_masked(write_jsonl(rows), next_sentence=True, num_token_types=2)
    assert dataset.columns == ("input_ids", "targets", "attention_mask", "token_type_ids", "next_sentence_label")
    assert dataset.sample(0)["token_type_ids"].tolist() == [0, 0, 0, 1, 1, 0]
    assert dataset.sample(1)["token_type_ids"].tolist() == [0] * 6
    assert_shapes(dataset, [dataset.sample(0), dataset.sample(1)])
    batch = collate(dataset, [0, 1, -1])
    assert batch["next_sentence_label"].tolist() == [1, X, X]
    assert batch["next_sentence_label"].dtype == torch.int64


def test_columns_that_the_model_lacks_may_be_null_or_zero(write_jsonl):
    row = {"input_ids": [1, 2], "labels": [1, 2], "token_type_ids": [0, 0], "next_sentence_label": None}
    dataset = open_masked(write_jsonl([row]), seq_length=2)
    assert dataset.columns == ("input_ids", "targets")


def test_table_and_lines_are_the_same_data(write_jsonl, tmp_path):
    rows = [{"input_ids": [n, 5, 6], "labels": [X, 5, X], "next_sentence_label": n % 2} for n in range(5)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    lines, table = (open_masked(source, next_sentence=True) for source in (write_jsonl(rows), str(tmp_path / "saved")))
    assert lines.fingerprint == table.fingerprint
    assert [as_lists(lines.sample(n)) for n in range(5)] == [as_lists(table.sample(n)) for n in range(5)]


def test_fingerprint_follows_content_and_what_the_model_takes(write_jsonl):
    rows = [{"input_ids": [1, 2], "labels": [X, 2]}]
    others = [[{"input_ids": [1, 2], "labels": [1, X]}], [{**rows[0], "attention_mask": [1, 1]}]]
    prints = [open_masked(write_jsonl(variant)).fingerprint for variant in (rows, *others)]
    source = write_jsonl(rows)
    for options in ({"padding_id": 1}, {"num_token_types": 2}, {"seq_length": 7}):
        prints.append(open_masked(source, **options).fingerprint)
    assert len(set(prints)) == 6
    assert open_masked(write_jsonl(rows, "moved.jsonl")).fingerprint == prints[0]


@pytest.fixture
def unlabelled(write_jsonl, wordpiece, valid_text):
    """Examples without labels, of many lengths, some with a mask at their end; and their ids."""
    tokenizer = load_tokenizer(wordpiece)
    ids = tokenizer.encode(valid_text.read_text(), add_special_tokens=False)
    rows = [{"input_ids": [2, *ids[at : at + 40 + at % 60], 3]} for at in range(0, 6000, 97)]
    for row in rows[::3]:
        row["attention_mask"] = [1] * (len(row["input_ids"]) - 10) + [0] * 10
    return write_jsonl(rows), rows


def test_examples_without_labels_are_masked(unlabelled, wordpiece):
    source, rows = unlabelled
    dataset = open_masked(source, seq_length=128, tokenizer=wordpiece)
    assert_shapes(dataset, [dataset.sample(0)])
    masked = total = 0
    for index in range(20 * len(rows)):
        sample, row = dataset.sample(index), rows[index % len(rows)]
        chosen = sample["targets"] != -100
        ids = np.where(chosen, sample["targets"], sample["input_ids"])[: len(row["input_ids"])]
        assert ids.tolist() == row["input_ids"]
        seen = np.array(row.get("attention_mask", [1] * len(ids)), dtype=bool) & ~np.isin(ids, [0, 2, 3, 4])
        assert not chosen[len(ids) :].any() and not (chosen[: len(ids)] & ~seen).any()
        assert chosen.sum() == max(1, round(0.15 * seen.sum()))
        masked, total = masked + int((sample["input_ids"][chosen] == 4).sum()), total + int(chosen.sum())
    assert_share(masked, total, 0.8)
    said = sum(int((dataset.sample(index)["targets"] != -100).sum()) for index in range(len(rows)))
    assert dataset.describe().endswith(f", {said:,} targets")


@pytest.mark.parametrize("whole_words", [False, True])
def test_masking_depends_on_the_index_alone_and_changes_each_epoch(unlabelled, wordpiece, whole_words):
    options = {"seq_length": 128, "tokenizer": wordpiece, "whole_words": whole_words}
    assert_noise_depends_on_the_index_alone(lambda: open_masked(unlabelled[0], **options))
    assert (
        open_masked(unlabelled[0], **options).fingerprint != open_masked(unlabelled[0], **options, seed=8).fingerprint
    )


def test_tokenizer_is_not_looked_at_where_all_examples_have_labels(write_jsonl):
    row = {"input_ids": [1, 2], "labels": [1, 2]}
    assert len(open_masked(write_jsonl([row]), tokenizer="no/such")) == 1
    with pytest.raises(DataError, match="tokenizer no/such: no such directory"):
        open_masked(write_jsonl([row, {"input_ids": [1]}]), tokenizer="no/such")


def test_loss_from_our_columns_is_the_loss_of_transformers(write_jsonl):
    """The convention itself: same weights, labels not shifted, padding not seen, the pair label as transformers'."""
    rng = np.random.default_rng(0)
    rows = []
    for length, label in ((12, 0), (5, 1), (9, 1)):
        ids = rng.integers(5, 50, length)
        row = {"input_ids": ids.tolist(), "labels": np.where(rng.random(length) < 0.5, ids, X).tolist()}
        row |= {"token_type_ids": (np.arange(length) > length // 2).astype(int).tolist(), "next_sentence_label": label}
        rows.append(row)
    dataset = open_masked(write_jsonl(rows), seq_length=12, next_sentence=True, num_token_types=2)
    batch = collate(dataset, range(3))
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = BertForPreTraining(config).eval()
    with torch.no_grad():
        out = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            token_type_ids=batch["token_type_ids"],
        )
        cross_entropy = torch.nn.functional.cross_entropy
        ours = cross_entropy(out.prediction_logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
        pairs = cross_entropy(out.seq_relationship_logits, batch["next_sentence_label"], reduction="sum")
        expected = expected_pairs = 0.0
        for row in rows:  # unpadded, one by one: transformers' mean losses times their numbers of targets
            tensors = {name: torch.tensor([values]) for name, values in row.items()}
            label, labels = tensors.pop("next_sentence_label"), tensors["labels"]
            loss = model(**tensors, next_sentence_label=label).loss.item()
            pair = cross_entropy(
                model(**{k: v for k, v in tensors.items() if k != "labels"}).seq_relationship_logits, label
            ).item()
            expected += (loss - pair) * int((labels != X).sum())
            expected_pairs += pair
    # fp32 on the same machine; padding changes only the order of a few sums
    assert ours.item() == pytest.approx(expected, rel=1e-4)
    assert pairs.item() == pytest.approx(expected_pairs, rel=1e-4)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"input_ids": [1] * 7}, "7 tokens exceed data.seq_length=6; raise data.seq_length to 7 or cut the example"),
        ({"input_ids": [700]}, "input_ids holds 700, but the model's vocab_size=700 ends at 699; tokenize with the"),
        ({"input_ids": [1], "labels": [-1]}, "labels holds -1; only -100 means ignored"),
        ({"input_ids": [1], "labels": [1, 2]}, "labels has 2 entries, input_ids has 1; they must be equally long"),
        ({"input_ids": [1], "labels": [1], "token_type_ids": [0, 0]}, "token_type_ids has 2 entries, input_ids has 1"),
        ({"input_ids": [1], "labels": [1], "token_type_ids": [-1]}, "token_type_ids holds -1; types are 0 or more"),
        (
            {"input_ids": [1], "labels": [1], "token_type_ids": [1]},
            "column 'token_type_ids' holds 1, but this model has no token types; remove the column",
        ),
        (
            {"input_ids": [1], "labels": [1], "next_sentence_label": 0},
            "column 'next_sentence_label': this model has no next-sentence head; remove the column",
        ),
        ({"input_ids": [1], "labels": [1], "next_sentence_label": 2}, "next_sentence_label must be 0 .*, found 2$"),
        ({"input_ids": [1], "labels": [1], "next_sentence_label": True}, "next_sentence_label must be .*, found True$"),
        ({"input_ids": [1], "labels": [1], "next_sentence_label": [1]}, r"next_sentence_label must .* found \[1\]$"),
        (
            {"input_ids": [1]},
            "no 'labels', and no tokenizer to mask the example with; set model.tokenizer, or give every example labels",
        ),
        (
            {"input_ids": [1], "decoder_input_ids": [0]},
            "column 'decoder_input_ids' belongs to encoder-decoder models, but this model is BERT-like; it takes inp",
        ),
        ({"input_ids": [1], "token_types": [0]}, "unknown column 'token_types'; .*; did you mean 'token_type_ids'?"),
    ],
)
def test_malformed_example_is_named(write_jsonl, row, problem):
    source = write_jsonl([{"input_ids": [1, 2], "labels": [X, 2]}, row])
    with pytest.raises(DataError, match=f"^data: {source}:2: {problem}") as caught:
        open_masked(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", [{}, {"next_sentence_label": None}])
def test_a_model_with_the_head_needs_the_label_of_every_pair(write_jsonl, label):
    source = write_jsonl([{"input_ids": [1], "labels": [1], "next_sentence_label": 0}, {"input_ids": [1], **label}])
    with pytest.raises(DataError) as caught:
        open_masked(source, next_sentence=True)
    assert str(caught.value) == (
        f"data: {source}:2: no 'next_sentence_label', but this model has a next-sentence head; "
        "give 0 (the second part follows), 1 (it is random) or -100 (no loss)"
    )


def test_a_segment_that_the_model_does_not_have_is_refused(write_jsonl):
    rows = [{"input_ids": [7, 8, 9], "labels": [X, X, 9], "token_type_ids": [0, 1, 2]}]
    open_masked(write_jsonl(rows), num_token_types=3)
    with pytest.raises(DataError, match=r":1: token_type_ids holds 2, but this model's type_vocab_size=2 ends at 1$"):
        open_masked(write_jsonl(rows), num_token_types=2)
