"""Runs whose batches and rows grow: they equal runs of the shorter rows, at layouts, and go on from any step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megatron_ds as mds
from megatron_ds.config import RunConfig, build_run
from megatron_ds.errors import ConfigError, TopologyError
from megatron_ds.training.resolve import resolve_run
from tests.ranks import preload
from tests.training.tiny import run_mapping

MakeRun = Callable[..., RunConfig]
RAMPS = {
    "batch_ramp": {"start": 4, "increment": 4, "samples": 16},  # 4, 4, 8, 12, 12, 12
    "length_ramp": {"start": 8, "steps": 4},  # 8, 8, 16, 16, 32, 32
}
TRAIN = {"steps": 6, "global_batch_size": 12, "micro_batch_size": 2, **RAMPS}


def lines_of(run: RunConfig) -> list[dict[str, Any]]:
    text = (Path(run.output) / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if "loss" in line]


def values(run: RunConfig, *names: str) -> list[Any]:
    return [tuple(line[name] for name in names) if len(names) > 1 else line[names[0]] for line in lines_of(run)]


def test_rows_that_are_cut_are_those_of_shorter_data(make_run: MakeRun) -> None:
    """Samples of text follow one another: 2 rows of 32 tokens are 8 of 8, with the same labels."""
    preload()
    small = {"steps": 3, "global_batch_size": 16, "micro_batch_size": 8}
    given = make_run("short", data={"seq_length": 8, "shuffle": False, "valid": []}, train=small)
    cut = {"steps": 3, "global_batch_size": 4, "micro_batch_size": 2, "length_ramp": {"start": 8, "steps": 1000}}
    ramped = make_run("cut", data={"shuffle": False, "valid": []}, train=cut)
    for run in (given, ramped):
        mds.train(run)
    assert values(given, "loss", "grad_norm", "tokens") == values(ramped, "loss", "grad_norm", "tokens")
    assert values(ramped, "seq_length") == [8, 8, 8]


LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "tp2sp": (2, {"tensor": 2, "sequence": True}, 2),
    "pp2": (2, {"pipeline": 2}, 1),
    "dp2": (2, {}, 3),
    "cp2": (2, {"context": 2}, 1),
}
SWEPT = [pytest.param("dp2", marks=pytest.mark.sweep), pytest.param("cp2", marks=pytest.mark.sweep)]
STEPS = list(zip([4, 4, 8, 12, 12, 12], [8, 8, 16, 16, 32, 32]))
RESULTS = ("loss", "grad_norm", "lr", "tokens", "samples", "seq_length")


def resumed(make_run: MakeRun, run: RunConfig, step: int, ranks: int) -> list[Any]:
    """The results of a run that goes on from a checkpoint of another."""
    again = make_run(f"{Path(run.output).name}-{step}", train=TRAIN, parallel=run.parallel.model_dump())
    source = {"resume": f"{run.output}/checkpoints/step_0000000{step}"}
    again = again.model_copy(
        update={"checkpoint": run.checkpoint.model_copy(update=source), "deepspeed": run.deepspeed}
    )
    mds.train(again, nproc=ranks)
    return values(again, *RESULTS)


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run on one rank with a checkpoint after each step."""
    preload()
    run = build_run(
        {
            **run_mapping(corpus, tmp_path_factory.mktemp("ramps") / "alone"),
            "deepspeed": {"zero_optimization": {"stage": 0}},
            "train": TRAIN,
            "checkpoint": {"every": 1, "keep": 9},
        }
    )
    mds.train(run)
    return run


@pytest.mark.parametrize("step", [3, *(pytest.param(one, marks=pytest.mark.sweep) for one in (1, 2, 4, 5))])
def test_a_run_goes_on_from_any_step_bit_for_bit(alone: RunConfig, make_run: MakeRun, step: int) -> None:
    assert values(alone, "samples", "seq_length") == STEPS
    assert resumed(make_run, alone, step, 1) == values(alone, *RESULTS)[step:]


@pytest.mark.parametrize("name", ["tp2sp", "pp2", *SWEPT])
def test_losses_do_not_depend_on_the_layout(alone: RunConfig, make_run: MakeRun, name: str) -> None:
    """Six steps in fp32, sums in another order: 2e-5 relative. At the same layout resumed steps are equal."""
    ranks, parallel, stage = LAYOUTS[name]
    sections = {"parallel": parallel, "deepspeed": {"zero_optimization": {"stage": stage}}, "train": TRAIN}
    run = make_run(name, **sections, checkpoint={"every": 4})
    mds.train(run, nproc=ranks)
    assert values(run, "samples", "seq_length") == STEPS
    assert values(run, "loss") == pytest.approx(values(alone, "loss"), rel=2e-5)
    if name == "pp2":
        assert resumed(make_run, run, 4, ranks) == values(run, *RESULTS)[4:]


def test_every_token_is_learned_once(make_run: MakeRun) -> None:
    """An epoch of a batch ramp has as many labels as one of equal batches, and `learned` counts them."""
    preload()
    equal = make_run("equal", train={"steps": None, "epochs": 1, "global_batch_size": 6, "micro_batch_size": 2})
    ramped = make_run("ramped", train={**TRAIN, "steps": None, "epochs": 1})
    for run in (equal, ramped):
        mds.train(run)
    samples = sum(values(ramped, "samples"))
    assert sum(values(ramped, "tokens")) == samples * 32
    assert sum(values(equal, "tokens")) == 6 * len(lines_of(equal)) * 32
    epoch = 2500 // 32
    assert epoch <= samples < epoch + 12, "the last step completes the epoch"


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"data": {"format": "chat"}}, "train.length_ramp.start=8 cuts samples into shorter ones"),
    ],
)
def test_refused_before_the_data_are_opened(make_run: MakeRun, sections: dict[str, Any], says: str) -> None:
    run = make_run(train=TRAIN)
    run = run.model_copy(update={"data": run.data.model_copy(update=sections["data"])})
    with pytest.raises(ConfigError, match=says):
        resolve_run(run, 1, "cpu")


def test_a_batch_that_data_ranks_cannot_share_is_refused_before_the_run(corpus: Path, tmp_path: Path) -> None:
    ramp = {"start": 2, "increment": 2, "samples": 16}
    mapping = run_mapping(corpus, tmp_path / "out")
    run = build_run({**mapping, "train": {**mapping["train"], "batch_ramp": ramp}})
    with pytest.raises(
        TopologyError, match=r"^train\.batch_ramp\.start=2 is not divisible by train\.micro_batch_size=2 \* 2 "
    ):
        resolve_run(run, 2, "cpu")
    resolve_run(run, 1, "cpu")
