"""Slow ranks in runs: a rank that sleeps, one whose data come late, and a run in which none is slow."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megatron_ds as mds
from megatron_ds.config import RunConfig
from megatron_ds.monitor import SilentReporter
from megatron_ds.monitor.report import write_report
from megatron_ds.monitor.report.panels import PANELS
from megatron_ds.training import loop
from megatron_ds.training.callbacks import Callback, RunState
from tests.ranks import preload

MakeRun = Callable[..., RunConfig]
SLOW_S = 0.3


class Sleep(Callback):
    """Sleeps after each step on one rank, as a device does that computes slowly."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_step_end(self, state: RunState) -> None:
        time.sleep(SLOW_S if state.rank == self.rank else 0.0)


class Notes(SilentReporter):
    """Writes what is reported to a file, since ranks are processes."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def note(self, text: str) -> None:
        with open(self.file, "a") as file:
            file.write(text + "\n")

    finish = note

    def __enter__(self) -> "Notes":
        return self

    def __exit__(self, *args: object) -> None:
        pass


def _train(run: RunConfig, tmp_path: Path, callbacks: list[Callback]) -> tuple[list[str], list[dict[str, Any]], Any]:
    """The lines that are reported, those of metrics.jsonl with times of ranks, and stragglers.json."""
    preload()
    mds.train(run, nproc=2, reporter=lambda: Notes(tmp_path / "notes"), callbacks=callbacks)
    output = Path(run.output)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    content = json.loads((output / "stragglers.json").read_text())
    return (tmp_path / "notes").read_text().splitlines(), [line for line in lines if "ranks" in line], content


def _run(make_run: MakeRun, **sections: Any) -> RunConfig:
    train = {"steps": 8, "eval_every": 0, "stragglers": {"every": 2, "windows": 2, "threshold": 0.2}}
    return make_run(train=train, **{"data": {"valid": []}, **sections})


def test_slow_ranks_are_named_on_the_terminal_in_metrics_in_the_report_and_at_the_end(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 gets its data late, and rank 1 computes slowly."""
    given = loop.for_data_rank

    def late(indices: Any, rank: int, *args: Any) -> Any:
        time.sleep(SLOW_S if rank == 0 else 0.0)
        return given(indices, rank, *args)

    monkeypatch.setattr(loop, "for_data_rank", late)
    run = _run(make_run, data={"valid": [], "prefetch": 0})
    notes, lines, content = _train(run, tmp_path, [Sleep(1)])
    data, compute = sorted(note for note in notes if "is slow" in note)
    assert data.startswith("rank 0 (host ") and "it waits for data for 0." in data, notes
    assert compute.startswith("rank 1 (host ") and "it computes for 0." in compute, notes
    assert notes[-1].startswith("done: 8 steps") and "slow ranks: 0 (host " in notes[-1] and ", 1 (host " in notes[-1]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    for numbers in (line["ranks"] for line in lines[1:]):  # the first has the start of the run
        assert numbers["compute_max_rank"] == 1 and numbers["compute_s_max"] >= SLOW_S
        assert numbers["data_max_rank"] == 0 and numbers["data_s_max"] >= SLOW_S
        assert numbers["communication_s_max"] >= SLOW_S / 2
    assert lines[-1]["ranks"]["num_slow"] == 2 and content["windows"] == 4
    assert all(one["slow_in"] >= 2 for one in content["ranks"])
    page = write_report(Path(run.output)).read_text()
    assert "<h2>Ranks</h2>" in page and "slow ranks: 0 (host " in page
    assert all(panel.title in page for panel in PANELS if any("ranks/" in name for name in panel.names))


class SleepInLayer(Sleep):
    """Sleeps in the forward pass of a layer."""

    def on_run_start(self, state: RunState) -> None:
        layer = dict(state.engine.deepspeed.module.named_modules()).get("blocks.1.mlp")
        if layer is not None:
            layer.register_forward_pre_hook(lambda module, given: super(SleepInLayer, self).on_step_end(state))

    def on_step_end(self, state: RunState) -> None:
        """Do nothing."""


@pytest.mark.sweep
@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"tensor": 2, "sequence": True}], ids=str)
def test_other_ranks_do_not_count_as_slow_by_waiting(
    make_run: MakeRun, tmp_path: Path, parallel: dict[str, Any]
) -> None:
    """Tensor ranks wait for one another in each layer, data ranks at the end."""
    notes, _, content = _train(_run(make_run, parallel=parallel), tmp_path, [SleepInLayer(0)])
    assert [note.split(" (")[0] for note in notes if "is slow" in note] == ["rank 0"]
    assert content["ranks"][1]["slow_in"] == 0 and content["ranks"][1]["communication_s"] >= SLOW_S / 2
