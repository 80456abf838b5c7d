"""`format: tokenized`: transformers' convention read exactly, and what is said of examples that break it."""

import datasets
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ds.data import Causal, collate, open_dataset
from megatron_ds.data.tokenized.causal import CausalExamples
from megatron_ds.data.tokenized.dataset import TokenizedDataset
from megatron_ds.errors import DataError

VOCAB_SIZE = 50


def open_tokenized(*sources, seq_length=6):
    return open_dataset("tokenized", Causal(), sources, seq_length, VOCAB_SIZE)


def as_lists(sample):
    mask = sample.get("attention_mask")
    return sample["input_ids"].tolist(), sample["targets"].tolist(), None if mask is None else mask.tolist()


def test_labels_are_shifted_and_examples_padded(write_jsonl):
    dataset = open_tokenized(
        write_jsonl(
            [
                {"input_ids": [1, 2, 3, 4]},
                {"input_ids": [5, 6, 7], "labels": [-100, -100, 8]},
                b"",
                {"input_ids": [9, 1, 2, 3, 4, 5], "labels": [9, -100, 7, 3, 4, -100]},
                {"input_ids": [4], "labels": None},
            ]
        )
    )
    x = -100
    assert [as_lists(dataset.sample(index)) for index in range(len(dataset))] == [
        ([1, 2, 3, 4, 0, 0], [2, 3, 4, x, x, x], None),
        ([5, 6, 7, 0, 0, 0], [x, 8, x, x, x, x], None),
        ([9, 1, 2, 3, 4, 5], [x, 7, 3, 4, x, x], None),
        ([4, 0, 0, 0, 0, 0], [x, x, x, x, x, x], None),
    ]
    assert dataset.describe() == "4 examples of up to 6 tokens: 14 tokens, 7 targets"


def test_attention_mask_is_there_for_all_samples_or_none(write_jsonl):
    masked = {"input_ids": [1, 2, 3], "attention_mask": [0, 1, 1]}
    bare = {"input_ids": [4, 5]}
    dataset = open_tokenized(write_jsonl([masked, bare]), write_jsonl([bare], "second.jsonl"))
    assert dataset.columns == ("input_ids", "targets", "attention_mask")
    masks = [dataset.sample(index)["attention_mask"].tolist() for index in range(3)]
    assert masks == [[False, True, True, False, False, False]] + [[True, True, False, False, False, False]] * 2
    batch = collate(dataset, [1, -1])
    assert batch["attention_mask"].dtype == torch.bool
    assert batch["attention_mask"].tolist() == [masks[1], [True] * 6]
    assert batch["targets"].tolist() == [[5, -100, -100, -100, -100, -100], [-100] * 6]
    assert open_tokenized(write_jsonl([bare])).columns == ("input_ids", "targets")
    assert set(collate(open_tokenized(write_jsonl([bare])), [0])) == {"input_ids", "targets"}


def test_jsonl_directory_and_saved_dataset_are_the_same_data(tmp_path, write_jsonl):
    rows = [{"input_ids": [n, n + 1, n + 2][: 1 + n % 3], "labels": [n, -100, n + 1][: 1 + n % 3]} for n in range(20)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "files").mkdir()
    write_jsonl(rows[:7], "files/0.jsonl")
    write_jsonl(rows[7:], "files/1.json")
    opened = [open_tokenized(write_jsonl(rows)), *(open_tokenized(str(tmp_path / name)) for name in ("saved", "files"))]
    for dataset in opened:
        assert [as_lists(dataset.sample(index)) for index in range(20)] == [
            as_lists(opened[0].sample(index)) for index in range(20)
        ]
        assert dataset.fingerprint == opened[0].fingerprint
    assert opened[0].sample(4)["input_ids"].tolist() == [4, 5, 0, 0, 0, 0]


def test_fingerprint_follows_content_order_boundaries_and_length(write_jsonl):
    variants = [
        [{"input_ids": [1, 2]}, {"input_ids": [3]}],
        [{"input_ids": [3]}, {"input_ids": [1, 2]}],
        [{"input_ids": [1]}, {"input_ids": [2, 3]}],
        [{"input_ids": [1, 2], "labels": [1, -100]}, {"input_ids": [3]}],
        [{"input_ids": [1, 2], "attention_mask": [1, 1]}, {"input_ids": [3]}],
    ]
    prints = [open_tokenized(write_jsonl(rows)).fingerprint for rows in variants]
    prints.append(open_tokenized(write_jsonl(variants[0]), seq_length=7).fingerprint)
    assert len(set(prints)) == len(variants) + 1
    assert open_tokenized(write_jsonl(variants[0], "moved.jsonl")).fingerprint == prints[0]


@pytest.mark.parametrize("with_mask", [False, True])
def test_loss_from_our_targets_is_the_loss_of_transformers(write_jsonl, with_mask):
    """The convention itself: same weights, same examples, labels with uneven masks, shifted by transformers."""
    rng = np.random.default_rng(0)
    rows = []
    for length in (12, 5, 9, 2):
        ids = rng.integers(0, VOCAB_SIZE, length)
        labels = np.where(rng.random(length) < 0.4, -100, rng.integers(0, VOCAB_SIZE, length))
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
        if with_mask:
            rows[-1]["attention_mask"] = (rng.random(length) < 0.7).astype(int).tolist()
            rows[-1]["attention_mask"][0] = 1
    batch = collate(open_tokenized(write_jsonl(rows), seq_length=12), range(4))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    loss_sum, num_targets = 0.0, 0
    with torch.no_grad():
        for row in rows:  # unpadded, one by one: transformers' mean loss times its number of targets
            row = {name: torch.tensor([values]) for name, values in row.items()}
            targets = int((row["labels"][:, 1:] != -100).sum())
            if targets:
                loss_sum += model(**row).loss.item() * targets
            num_targets += targets
        logits = model(batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
        ours = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
    assert num_targets == int((batch["targets"] != -100).sum()) > 8
    # fp32 on the same machine; padding changes only the order of a few sums
    assert ours.item() == pytest.approx(loss_sum, rel=1e-5)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"input_ids": list(range(7))}, "7 tokens exceed data.seq_length=6; raise data.seq_length to 7 or cut"),
        ({"input_ids": [1, 50]}, "input_ids holds 50, but the model's vocab_size=50 ends at 49"),
        ({"input_ids": [1, -100]}, "input_ids holds -100; ids are 0 or more"),
        ({"input_ids": [1, 2], "labels": [1, 51]}, "labels holds 51, but the model's vocab_size=50 ends at 49"),
        ({"input_ids": [1, 2], "labels": [1, -1]}, "labels holds -1; only -100 means ignored"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries, input_ids has 2; they must be equally long"),
        ({"input_ids": [1, 2], "attention_mask": [1, 1, 1]}, "attention_mask has 3 entries, input_ids has 2"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, "attention_mask must hold only 0 and 1, found 2"),
        ({"input_ids": []}, "input_ids is empty; remove the example"),
        ({"input_ids": [1.0, 2.0]}, "input_ids must be a flat list of integers, found float"),
        ({"input_ids": [[1, 2]]}, "input_ids must be a flat list of integers, found list"),
        ({"input_ids": [[1], [1, 2]]}, "input_ids must be a flat list of integers, found list"),
        ({"input_ids": [1, "2"]}, "input_ids must be a flat list of integers, found str"),
        ({"input_ids": [True]}, "input_ids must be a flat list of integers, found bool"),
        ({"input_ids": 3}, "input_ids must be a flat list of integers, found int$"),
        ({"input_ids": [1, 2**70]}, "input_ids must be a flat list of integers, found integers beyond 64 bits"),
        ({"labels": [1]}, "no 'input_ids'; every example needs them"),
        ({"input_ids": None}, "no 'input_ids'; every example needs them"),
        (
            {"input_ids": [1], "label": [1]},
            "unknown column 'label'; known are input_ids, labels, attention_mask, position_ids; did you",
        ),
        ({"input_ids": [1], "loss_mask": [1]}, "unknown column 'loss_mask'; known are .*; remove the column"),
        ({"input_ids": [1], "token_type_ids": [0]}, "column 'token_type_ids' belongs to BERT-like models, but this"),
        ({"input_ids": [1], "next_sentence_label": 0}, "column 'next_sentence_label' belongs to BERT-like models"),
        ({"input_ids": [1], "decoder_input_ids": [0]}, "column 'decoder_input_ids' belongs to encoder-decoder models"),
        (b'{"input_ids": [1', "not JSON"),
        (b'{"input_ids": [1]}\xff', "not UTF-8"),
        ([1, 2], "holds a JSON list; each line must hold one object"),
    ],
)
def test_malformed_example_is_named(write_jsonl, row, problem):
    source = write_jsonl([{"input_ids": [1, 2]}, row])
    with pytest.raises(DataError, match=f"^data: {source}:2: {problem}"):
        open_tokenized(source)


def test_malformed_row_of_a_table_is_named(tmp_path):
    path = tmp_path / "saved"
    datasets.Dataset.from_list([{"input_ids": [1]}, {"input_ids": [99]}]).save_to_disk(str(path))
    with pytest.raises(DataError, match=f"^data: {path}: row 1: input_ids holds 99"):
        open_tokenized(str(path))


def test_unrelated_columns_are_ignored_and_named_once(write_jsonl, caplog):
    rows = [{"input_ids": [1, 2], "text": "whale", "special_tokens_mask": [0, 1]}, {"input_ids": [3], "id": 7}]
    with caplog.at_level("INFO", logger="megatron_ds"):
        dataset = open_tokenized(write_jsonl(rows))
    assert [as_lists(dataset.sample(index))[0][:2] for index in range(2)] == [[1, 2], [3, 0]]
    assert [record.getMessage() for record in caplog.records] == [
        "columns that models do not read: id, special_tokens_mask, text"
    ]


def test_boolean_masks_are_taken(write_jsonl):
    dataset = open_tokenized(write_jsonl([{"input_ids": [1, 2], "attention_mask": [False, True]}]))
    assert dataset.sample(0)["attention_mask"].tolist() == [False, True, False, False, False, False]


def test_sources_without_examples_are_refused(tmp_path, write_jsonl):
    source = write_jsonl([b"", b"  "])
    with pytest.raises(DataError, match="no examples; each line or row must hold one"):
        open_tokenized(source)
    (tmp_path / "a.txt").write_text("whale")
    with pytest.raises(DataError, match=r"reads files that end in \.jsonl, \.json, .*\.arrow, also .*not in '\.txt'"):
        open_tokenized(str(tmp_path / "a.txt"))


def test_opening_does_not_hold_the_examples(write_jsonl):
    """Lines are indexed and parsed when asked for: what is kept of 2,000 of them is 3 numbers a line."""
    source = write_jsonl([{"input_ids": [n % VOCAB_SIZE] * 6} for n in range(2000)])
    dataset = TokenizedDataset([source], CausalExamples(6, VOCAB_SIZE))
    part = dataset._parts[0]
    assert part._index.shape == (2000, 3)
    assert isinstance(part._raw, np.memmap)
    assert dataset.sample(1999)["input_ids"].tolist() == [49] * 6


def test_documents_that_share_an_example_predict_nothing_of_each_other(write_jsonl):
    packed = {"input_ids": [1, 2, 3, 4, 5], "position_ids": [0, 1, 0, 0, 1]}
    dataset = open_tokenized(write_jsonl([packed, {"input_ids": [6, 7]}]), seq_length=7)
    assert dataset.columns == ("input_ids", "targets", "position_ids")
    x = -100
    first, second = dataset.sample(0), dataset.sample(1)
    assert first["targets"].tolist() == [2, x, x, 5, x, x, x]
    assert first["position_ids"].tolist() == [0, 1, 0, 0, 1, 0, 1]
    assert second["position_ids"].tolist() == [0, 1, 0, 1, 2, 3, 4]
    assert dataset.blank()["position_ids"].tolist() == list(range(7))
    assert dataset.describe() == "2 examples of up to 7 tokens: 7 tokens, 3 targets"


@pytest.mark.parametrize(
    ("positions", "says"),
    [
        ([1, 2, 3], "position_ids holds 1 after -1; each is one more than the one before, or 0"),
        ([0, 2, 3], "position_ids holds 2 after 0;"),
        ([0, 1, 1], "position_ids holds 1 after 1;"),
        ([0, 1], "position_ids has 2 entries, input_ids has 3"),
    ],
)
def test_positions_that_do_not_go_on_are_refused(write_jsonl, positions, says):
    with pytest.raises(DataError, match=says):
        open_tokenized(write_jsonl([{"input_ids": [1, 2, 3], "position_ids": positions}]))
