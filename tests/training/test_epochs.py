"""`train.epochs`: the steps follow from the data, as in transformers, and are those of every restart."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import megatron_ds as mds
from megatron_ds.config import RunConfig, load_run
from megatron_ds.data.indexed.files import write_index
from megatron_ds.errors import ConfigError
from megatron_ds.training.datasets import open_epochs
from megatron_ds.training.resolve import resolve_run
from tests.ranks import preload

MakeRun = Callable[..., RunConfig]


def train(epochs: float, **entries: Any) -> dict[str, Any]:
    return {"steps": None, "epochs": epochs, **entries}


@pytest.mark.parametrize(
    ("epochs", "samples", "batch", "steps"),
    [
        (1, 64, 8, 8),
        (1, 65, 8, 9),
        (3, 65, 8, 25),  # 195 samples: batches straddle epochs, 3 x 9 would read some samples a fourth time
        (0.5, 64, 8, 4),
        (0.1, 5, 8, 1),
        (0.07, 100, 1, 7),  # 7.000000000000001 in floats
        (0.29, 100, 1, 29),
        (1e-3, 1000, 1, 1),
    ],
)
def test_steps_are_rounded_up(make_run: MakeRun, epochs: float, samples: int, batch: int, steps: int) -> None:
    run = make_run(train=train(epochs, global_batch_size=batch, micro_batch_size=1), schedule={"warmup_steps": 1})
    counted = run.with_steps(samples)
    assert (counted.train.num_steps, counted.train.epochs) == (steps, None)
    assert counted.with_steps(7) == counted


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"schedule": {"warmup_steps": 9}},
            "schedule.warmup_steps=9 is more than train.steps=8, which train.epochs=1 gives; nearest: 8",
        ),
        (
            {"train": train(1, profile={"steps": [3, 12]})},
            "train.profile.steps=[3, 12] goes beyond train.steps=8, which train.epochs=1 gives; nearest: [3, 8]",
        ),
    ],
)
def test_settings_in_steps_are_checked_when_the_steps_are_known(make_run: MakeRun, sections: Any, says: str) -> None:
    run = make_run(**{"train": train(1), **sections})
    with pytest.raises(ConfigError) as caught:
        run.with_steps(64)
    assert str(caught.value) == says


def test_what_has_no_epochs_is_refused(make_run: MakeRun, corpus: Path) -> None:
    blend = [{"path": str(corpus / "train.txt"), "weight": 1}, {"path": str(corpus / "valid.txt"), "weight": 2}]
    with pytest.raises(ConfigError, match=r"^train.epochs=2 is not defined for a blend: .*; set train.steps$"):
        make_run(train=train(2), data={"train": blend})
    scheduler = {"type": "WarmupCosineLR", "params": {"total_num_steps": 5}}
    run = make_run(train=train(2), deepspeed={"scheduler": scheduler})
    with pytest.raises(ConfigError, match=r"train.epochs, from which the steps follow, \(run file\) and .*disagree"):
        resolve_run(run, 1, "cpu")


@pytest.mark.parametrize("format", ["text", "tokenized"])
def test_epochs_of_each_format(make_run: MakeRun, format: str) -> None:
    run = make_run(format=format, train=train(2))
    resolved, data = open_epochs(resolve_run(run, 1, "cpu"))
    assert resolved.run.train.num_steps == -(-2 * len(data) // 8) and not data.ordered


def test_epochs_of_indexed_data_are_passes_over_all_files(make_run: MakeRun, tmp_path: Path) -> None:
    """62 samples of one file and 31 of another; the data are then opened for all of the steps."""
    for name, documents in (("a", 40), ("b", 20)):
        tokens = np.random.default_rng(0).integers(0, 60, 50 * documents).astype("<u2")
        tokens.tofile(tmp_path / f"{name}.bin")
        write_index(tmp_path / f"{name}.idx", tokens.dtype, [50] * documents, range(documents + 1))
    sources = {"train": [str(tmp_path / name) for name in "ab"], "valid": []}
    resolved, data = open_epochs(resolve_run(make_run(format="indexed", data=sources, train=train(3)), 1, "cpu"))
    assert resolved.run.train.num_steps == -(-3 * (62 + 31) // 8) and len(data) == 35 * 8


def test_a_run_of_epochs_is_saved_as_steps_and_resumed(make_run: MakeRun, tmp_path: Path) -> None:
    """64 examples in batches of 8: half an epoch, then one and a half."""
    preload()

    def lines(output: str) -> list[int]:
        return [json.loads(line)["step"] for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]

    sections: dict[str, Any] = {"data": {"valid": []}, "checkpoint": {"every": 2}, "schedule": {"name": "constant"}}
    run = make_run(format="tokenized", train=train(0.5), **sections)
    assert mds.train(run).steps == 4 and lines(run.output) == [1, 2, 3, 4]
    written = load_run(Path(run.output) / "config.yaml", [f"output={tmp_path / 'again'}", "checkpoint.every=0"])
    assert (written.train.steps, written.train.epochs) == (4, None)
    assert mds.train(make_run(format="tokenized", train=train(1.5), **sections)).steps == 12
    assert lines(run.output) == list(range(1, 13))
