"""Trackers that are slow, away or not installed, and the names of what they get."""

import csv
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.config import RunConfig, build_run
from megatron_ds.errors import ConfigError
from megatron_ds.monitor import SINKS, SinkInfo, Tracker, ValidMetrics, check_sinks, open_sinks
from megatron_ds.monitor.metrics import LastSteps
from megatron_ds.monitor.trackers import tracker as tracker_module
from megatron_ds.monitor.trackers.csv import Csv
from megatron_ds.monitor.trackers.values import Line, flat_settings, line_of
from tests.monitor.test_metrics import STEP


def run_with(*monitor: Any) -> RunConfig:
    model = {"config": {"model_type": "llama"}}
    data = {"format": "text", "train": ["a.txt"]}
    return build_run({"model": model, "data": data, "train": {"steps": 9}, "output": "out", "monitor": [*monitor]})


class Flaky(Tracker):
    """Takes what `works` allows, after `may_work`."""

    def __init__(self, info: SinkInfo, *, bad: list[int] | None = None) -> None:
        self.bad, self.taken, self.ended = bad or [], list[int](), False
        self.may_work = threading.Event()
        self.may_work.set()
        super().__init__(info, "flaky id")

    def log(self, line: Line) -> None:
        self.may_work.wait(20)
        if line.step in self.bad:
            raise ConnectionError("no route\nto host")
        self.taken.append(line.step)

    def finish(self) -> None:
        self.ended = True


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SINKS._entries, "flaky", Flaky)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(logging.getLogger("megatron_ds"), "propagate", True)
    yield caplog


def open_one(tmp_path: Path, entry: Any, continue_after: int | None = None, **info: Any) -> Any:
    (sink,) = open_sinks(SinkInfo(run_with(entry), tmp_path, continue_after, **info))
    return sink


def test_a_tracker_that_is_away_is_reported_once_and_counted(tmp_path: Path, logged: Any) -> None:
    sink = open_one(tmp_path, {"name": "flaky", "bad": [2, 3]})
    for step in range(1, 6):
        sink.write(replace(STEP, step=step))
    sink.close()
    assert (sink.taken, sink.ended) == ([1, 4, 5], True)
    assert logged.messages == [
        "monitor[0]=flaky takes no lines (ConnectionError: no route to host); the run continues without it",
        "monitor[0]=flaky has lost 2 of 5 lines; metrics.jsonl has all of them",
    ]


def test_a_tracker_that_hangs_holds_up_neither_steps_nor_the_end(
    tmp_path: Path, logged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module, "MAX_WAITING", 3)
    monkeypatch.setattr(tracker_module, "CLOSE_S", 0.05)
    sink = open_one(tmp_path, "flaky")
    sink.may_work.clear()
    for step in range(1, 11):
        sink.write(replace(STEP, step=step))
    sink.close()
    assert sink.taken == [] and not sink.ended
    assert logged.messages[:2] == [
        "monitor[0]=flaky takes no lines (3 lines are waiting); the run continues without it",
        "monitor[0]=flaky did not finish within 0 s",
    ]
    assert logged.messages[2].startswith("monitor[0]=flaky has lost 1")  # 9 or 10, of the thread's own
    sink.may_work.set()


def test_a_resumed_run_sends_no_step_again(tmp_path: Path) -> None:
    open_one(tmp_path, "flaky").close()
    written = LastSteps(step=5, valid=3)
    sink = open_one(tmp_path, "flaky", 2, written=written)
    for step in range(3, 8):
        sink.write(replace(STEP, step=step))
    sink.write(ValidMetrics(3, 1.0))
    sink.write(ValidMetrics(4, 1.0))
    sink.close()
    assert sink.taken == [6, 7, 4]
    again = open_one(tmp_path, "flaky", 2, written=LastSteps(step=2))  # it failed early: metrics.jsonl is shorter now
    for step in range(3, 8):
        again.write(replace(STEP, step=step))
    again.close()
    assert again.taken == [6, 7]
    new = open_one(tmp_path, "flaky", None)
    new.write(STEP)
    new.close()
    assert new.taken == [1], "a new run in the same output"


def test_a_tracker_that_is_added_to_a_resumed_run_gets_all_of_its_lines(tmp_path: Path) -> None:
    sink = open_one(tmp_path, "flaky", 2, written=LastSteps(step=5))
    sink.write(replace(STEP, step=3))
    sink.close()
    assert sink.taken == [3]


def test_what_lines_are_called() -> None:
    step = replace(STEP, mfu=0.5, metrics={"accuracy": 0.25}, terms={"aux": 2.0}, system={"gpu0_power_watts": 300.0})
    assert {**line_of(step).values} == {
        "train/loss": 0.1 + 0.2,
        "train/grad_norm": STEP.grad_norm,
        "train/lr": 3e-4,
        "train/tokens": 32768.0,
        "train/step_s": STEP.step_s,
        "train/tokens_per_s": 1e300,
        "train/tflops_per_rank": 5e-324,
        "train/data_s": STEP.data_s,
        "train/mfu": 0.5,
        "train/accuracy": 0.25,
        "train/terms/aux": 2.0,
        "system/gpu0_power_watts": 300.0,
    }
    valid = ValidMetrics(4, 2.0, {"macro_f1": 0.5}, {"wiki": 3.0})
    assert line_of(valid) == (4, {"valid/loss": 2.0, "valid/macro_f1": 0.5, "valid/losses/wiki": 3.0})


def test_settings_have_dotted_keys(tmp_path: Path) -> None:
    found = flat_settings(SinkInfo(run_with(), tmp_path, None))
    assert found["optimizer.betas"] == "[0.9, 0.95]" and found["train.steps"] == 9 and found["data.shuffle"] is True


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_package_that_is_missing_is_named_with_its_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    (tmp_path / name).mkdir()  # as wandb leaves in the working directory
    with pytest.raises(ConfigError) as caught:
        check_sinks(run_with("csv", name))
    assert str(caught.value) == (
        f"monitor[1]={name} needs the package {name}, which is not installed; try pip install 'megatron-ds[{name}]'"
    )


def test_options_have_types() -> None:
    with pytest.raises(ConfigError, match=r"^monitor\[0\].mode=ofline is not one of online, offline, disabled"):
        check_sinks(run_with({"name": "wandb", "mode": "ofline"}))
    with pytest.raises(ConfigError, match=r"^monitor\[0\].tags=small is not a list"):
        check_sinks(run_with({"name": "wandb", "tags": "small"}))
    check_sinks(run_with({"name": "mlflow", "tags": {"size": "small"}}))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"name": "trackio", "server_url": "http://host:7860?write_token=x"},
            "monitor[0].server_url has a password or a token in its address, which config.yaml and report.html would "
            "show; try TRACKIO_WRITE_TOKEN",
        ),
        (
            {"name": "mlflow", "tracking_uri": "https://me:secret@host/x"},
            "monitor[0].tracking_uri has a password or a token in its address, which config.yaml and report.html would "
            "show; try MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        ),
    ],
)
def test_a_secret_in_the_run_file_is_refused(entry: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_sinks(run_with(entry))
    assert str(caught.value) == message
    key = "server_url" if entry["name"] == "trackio" else "tracking_uri"
    check_sinks(run_with({**entry, key: "https://host:5000/x?y=1"}))


def test_a_tracker_that_cannot_be_opened_is_refused_and_others_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Csv, info: SinkInfo) -> None:
        raise ValueError("two\nlines")

    opened: list[Flaky] = []
    monkeypatch.setattr(Csv, "__init__", broken)
    monkeypatch.setitem(SINKS._entries, "flaky", lambda info: opened.append(Flaky(info)) or opened[0])
    with pytest.raises(ConfigError) as caught:
        open_sinks(SinkInfo(run_with("flaky", "csv"), tmp_path, None))
    assert str(caught.value) == (
        "monitor[1]=csv cannot be opened (ValueError: two lines); change its options, or remove it"
    )
    assert opened[0].ended


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def test_a_table_grows_columns_and_loses_the_rows_that_are_run_again(tmp_path: Path) -> None:
    sink = open_one(tmp_path, "csv")
    sink.write(STEP)
    sink.write(ValidMetrics(1, 2.0))
    sink.write(replace(STEP, step=2, metrics={"new, with a comma": 0.5}, loss=float("nan")))
    sink.close()
    path = tmp_path / "metrics.csv"
    first, valid, second = rows_of(path)
    assert float(first["train/loss"]) == STEP.loss and first["train/new, with a comma"] == first["valid/loss"] == ""
    assert valid["valid/loss"] == "2.0" and (second["train/new, with a comma"], second["train/loss"]) == ("0.5", "nan")
    with path.open("a") as file:
        file.write("3,0.")  # torn by a crash
    sink = open_one(tmp_path, "csv", 1)
    sink.write(replace(STEP, step=2, loss=7.0))
    sink.close()
    assert [(row["step"], row["train/loss"]) for row in rows_of(path)] == [
        ("1", repr(STEP.loss)),
        ("1", ""),
        ("2", "7.0"),
    ]
    open_one(tmp_path, "csv").close()
    assert rows_of(path) == [] and len(rows_of(tmp_path / "metrics.1.csv")) == 3
