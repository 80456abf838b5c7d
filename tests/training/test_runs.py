"""Whole runs in this process's ranks: the same losses at every layout, and who tells what goes wrong."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megatron_ds as mds
from megatron_ds.config import RunConfig
from megatron_ds.errors import DataError, LaunchError, TopologyError
from megatron_ds.parallel.launch import RankInfo
from megatron_ds.training import loop
from megatron_ds.training import worker as rank
from megatron_ds.training.launch import check_devices
from tests.ranks import preload, run_ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
}


def losses(output: str | Path, field: str) -> list[float]:
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [line[field] for line in lines if field in line]


@pytest.mark.parametrize("format", [pytest.param("text", marks=pytest.mark.sweep), "tokenized"])
def test_losses_do_not_depend_on_the_layout(make_run: Callable[..., RunConfig], format: str) -> None:
    """Five steps in fp32, sums in another order: 2e-5 relative. Tokenised: ragged examples, a ragged last batch."""
    preload()
    seen = {}
    for name, (ranks, parallel) in LAYOUTS.items():
        run = make_run(name, format, parallel=parallel)
        mds.train(run, nproc=ranks)
        seen[name] = losses(run.output, "loss"), losses(run.output, "valid_loss")
    for name in LAYOUTS:
        assert seen[name][0] == pytest.approx(seen["alone"][0], rel=2e-5), name
        assert seen[name][1] == pytest.approx(seen["alone"][1], rel=2e-5), name
    assert len(set(seen["alone"][0])) == 5 and len(seen["alone"][1]) == 2


def test_the_order_depends_on_the_seed_and_the_written_config_runs_again_bit_for_bit(
    make_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    preload()
    run = make_run("first")
    mds.train(run)
    again = mds.load_run(tmp_path / "first" / "config.yaml", [f"output={tmp_path / 'again'}"])
    mds.train(again)
    other = mds.load_run(tmp_path / "first" / "config.yaml", [f"output={tmp_path / 'other'}", "train.seed=1"])
    mds.train(other)
    first, second, third = (losses(tmp_path / name, "loss") for name in ("first", "again", "other"))
    assert first == second and first != third
    assert losses(tmp_path / "first", "valid_loss") == losses(tmp_path / "again", "valid_loss")


def test_a_data_error_of_one_rank_is_the_error_of_the_run(
    make_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model exists, `together` tells the others; the output stays untouched."""
    preload()
    run = make_run()

    def fail(resolved: Any, found: Any = rank.open_data) -> Any:
        if os.environ["RANK"] == "1":
            raise DataError("train.txt: gone from this node")
        return found(resolved)

    monkeypatch.setattr(rank, "open_data", fail)
    with pytest.raises(DataError, match=r"^train.txt: gone from this node$"):
        mds.train(run, nproc=2)
    assert not Path(run.output).exists()


def test_a_launched_rank_learns_of_another_ranks_error(make_run: Callable[..., RunConfig]) -> None:
    from megatron_ds.parallel.consensus import run_on_all_ranks

    def fn(info: RankInfo) -> str:
        def step() -> int:
            if info.rank == 2:
                raise DataError("rank 2 has no file")
            return info.rank

        try:
            run_on_all_ranks(step)
        except DataError as problem:
            return str(problem)
        except SystemExit as end:
            return f"exit {end.code}"
        return "went on"

    assert run_ranks(fn, 3) == ["rank 2 has no file", "exit 2", "exit 2"]


def test_an_exception_in_the_middle_of_a_run_is_told_with_its_traceback(
    make_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    preload()
    collate = loop.collate

    def fail(dataset: Any, indices: Any) -> Any:
        fail.calls += 1  # type: ignore[attr-defined]
        if os.environ["RANK"] == "1" and fail.calls > 9:  # type: ignore[attr-defined]
            raise ZeroDivisionError("in the third step")
        return collate(dataset, indices)

    fail.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(loop, "collate", fail)
    run = make_run(parallel={"tensor": 2})
    with pytest.raises(LaunchError) as caught:
        mds.train(run, nproc=2)
    message = str(caught.value)
    assert message.startswith("rank 1 failed:\nTraceback") and message.endswith("ZeroDivisionError: in the third step")
    assert "rank 0" not in message
    assert len(losses(run.output, "loss")) == 2, "what was done is kept"


def test_a_run_that_cannot_be_is_refused_before_ranks_start(
    make_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ds.training.launch.run_local", lambda *_: pytest.fail("ranks were started"))
    run = make_run(parallel={"tensor": 3})
    with pytest.raises(TopologyError, match=r"parallel\.tensor=3"):
        mds.train(run, nproc=3)
    with pytest.raises(TopologyError, match="--nproc=0 is less than one rank; nearest: 1"):
        mds.train(run, nproc=0)
    assert not Path(run.output).exists()


def test_nproc_under_a_launcher_is_refused(make_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TopologyError, match=r"--nproc=2 .* a launcher started rank 1 of 4; leave --nproc out"):
        mds.train(make_run(), nproc=2)


def test_a_rank_needs_a_device() -> None:
    check_devices(8, "cpu", 1)
    check_devices(8, "cuda", 8)
    with pytest.raises(TopologyError, match="--nproc=9 is more than the 8 cuda devices here; nearest: 8"):
        check_devices(9, "cuda", 8)
