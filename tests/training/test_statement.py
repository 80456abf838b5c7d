"""What a run says before its first step, and what it refuses there because it would end without a trace."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.config import RunConfig
from megatron_ds.data.blend import SourceUsage
from megatron_ds.errors import DataError
from megatron_ds.training.datasets import has_validation, open_split
from megatron_ds.training.resolve import resolve_run
from megatron_ds.training.statement import (
    describe_keeping,
    describe_learning,
    describe_sources,
    describe_validation,
    format_epochs,
)
from megatron_ds.training.summary import describe_gpu
from tests.training.test_loop import CountingEngine, Numbers, drive

MakeRun = Callable[..., RunConfig]
NAMES = ("valid.txt", "train.txt")


@pytest.mark.parametrize("split", ["train", "valid"])
def test_data_without_labels_are_refused_with_their_name(make_run: MakeRun, tmp_path: Path, split: str) -> None:
    (tmp_path / "empty.jsonl").write_text(json.dumps({"input_ids": [3, 4], "labels": [-100, -100]}) + "\n")
    run = make_run(format="tokenized", data={split: [str(tmp_path / "empty.jsonl")]})
    with pytest.raises(DataError) as caught:
        open_split(resolve_run(run, 1, "cpu"), split)
    assert str(caught.value).startswith(f"data.{split}: {tmp_path}/empty.jsonl: no label carries loss in any of 1 ")


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"steps": 2}, "0.8 epochs of 20 samples; about 168 tokens with loss"),
        ({"steps": 5}, "2 epochs of 20 samples; 420 tokens with loss"),
        ({"steps": 5, "global_batch_size": 4}, "1 epoch of 20 samples; 210 tokens with loss"),
        (
            {"steps": 2, "global_batch_size": 40},
            "4 epochs of 20 samples; 840 tokens with loss; train.global_batch_size=40 repeats samples in each step",
        ),
    ],
)
def test_learning_is_counted_in_epochs(make_run: MakeRun, train: dict[str, Any], says: str) -> None:
    assert describe_learning(make_run(train=train), Numbers(20), ["targets"]) == says


def test_a_learning_rate_of_zero_is_said(make_run: MakeRun) -> None:
    run = make_run(optimizer={"lr": 0.0}, schedule={"min_lr": 0.0})
    assert describe_learning(run, Numbers(20), ["targets"]).endswith("; optimizer.lr=0 changes no weight")


@pytest.mark.parametrize(
    ("epochs", "says"), [(1.0, "1 epoch"), (0.375, "0.38 epochs"), (3, "3 epochs"), (0.0004, "0.0004 epochs")]
)
def test_epochs_have_few_digits(epochs: float, says: str) -> None:
    assert format_epochs(epochs) == says


def test_sources_are_counted_one_by_one() -> None:
    usage = [SourceUsage("a", 0.6, 6, 0.5), SourceUsage("b", 0.4, 4, 2.0)]
    text = "a: 6 samples (0.60, wanted 0.60), 0.50 epochs; b: 4 samples (0.40, wanted 0.40), 2.00 epochs"
    assert describe_sources(usage) == text


@pytest.mark.parametrize(
    ("every", "valid", "says", "at"),
    [
        (2, True, "every 2 steps and after the last, on numbers", [2, 4, 5]),
        (1, True, "after every step, on numbers", [1, 2, 3, 4, 5]),
        (0, True, "once, after the last step (train.eval_every=0), on numbers", [5]),
        (5, True, "once, after the last step, on numbers", [5]),
        (9, True, "once, after the last step (train.eval_every=9 is more than train.steps=5), on numbers", [5]),
        (0, False, "never: no data.valid", []),
        (3, False, "never: train.eval_every=3 does nothing without data.valid", []),
    ],
)
def test_validation_runs_when_the_statement_says(
    make_run: MakeRun, every: int, valid: bool, says: str, at: list[int]
) -> None:
    run = make_run(train={"steps": 5, "eval_every": every})
    data = Numbers(11) if valid else None
    assert describe_validation(run, data) == says
    _, lines, _, _ = drive(run, CountingEngine(), data)
    assert [line["step"] for line in lines if "valid_loss" in line] == at


def test_validation_on_training_data_is_said(make_run: MakeRun, corpus: Path) -> None:
    run = make_run(data={"train": [str(corpus / "train.txt")], "valid": [str(corpus / name) for name in NAMES]})
    says = f"every 3 steps and after the last, on numbers; {corpus}/train.txt is training data too"
    assert describe_validation(run, Numbers(11)) == says


def test_a_share_of_the_training_data_is_validated(make_run: MakeRun) -> None:
    run = make_run(data={"valid": {"share": 0.05}})
    assert has_validation(run)
    resolved = resolve_run(run, 1, "cpu")
    train, valid = (open_split(resolved, split) for split in ("train", "valid"))
    assert len(train) + len(valid) == 78 and len(valid) == 4
    assert describe_validation(run, valid) == f"every 3 steps and after the last, on {valid.describe()}"
    assert valid.describe() == "4 of 78 samples held out of 2,501 tokens, 78 samples of 32"


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {},
            "nothing: the trained weights are lost when the run ends; set checkpoint.every or export.path to keep them",
        ),
        ({"checkpoint": {"every": 2}}, "checkpoints every 2 steps and after the last, 3 at a time"),
        ({"checkpoint": {"every": 2, "keep": 1}}, "checkpoints every 2 steps and after the last, 1 at a time"),
        ({"checkpoint": {"every": 1}}, "checkpoints after every step, 3 at a time"),
        ({"checkpoint": {"every": 99}}, "a checkpoint after the last step"),
        ({"export": {"path": "out/hf"}}, "a Hugging Face directory after the last step: out/hf"),
        (
            {"checkpoint": {"every": 99}, "export": {"path": "out/hf"}},
            "a checkpoint after the last step; a Hugging Face directory after the last step: out/hf",
        ),
    ],
)
def test_what_is_kept_is_stated(make_run: MakeRun, sections: dict[str, Any], says: str) -> None:
    assert describe_keeping(make_run(**sections)) == says


def test_a_gpu_is_named_with_its_peak_or_with_the_reason_why_there_is_no_mfu() -> None:
    assert describe_gpu("NVIDIA H200", "bf16", 989e12) == "NVIDIA H200 (peak 989 TFLOP/s in bf16)"
    unknown = "NVIDIA H200 (no MFU: its peak in fp32 is unknown)"
    assert describe_gpu("NVIDIA H200", "fp32", None) == unknown
