"""A run with all trackers that an error ends, and that is resumed, as each tracker's own reader shows it."""

import csv
import json
import logging
import math
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import megatron_ds as mds
from megatron_ds.config import build_run
from megatron_ds.errors import ConfigError, LaunchError
from megatron_ds.monitor import SinkInfo, Tracker, open_sinks
from megatron_ds.monitor.metrics import LastSteps
from megatron_ds.training.callbacks import Callback
from tests.monitor.test_metrics import STEP
from tests.ranks import preload, run_alone
from tests.training.mlflow_server import serve_mlflow
from tests.training.tiny import run_mapping

STEPS = [*range(1, 7)]
TRACKERS = ["tensorboard", "wandb", "mlflow", "trackio", "csv"]


class FailAt5(Callback):
    """Ends the run at step 6, after the lines of step 5 and of the validation after it; step 4 has been saved."""

    def on_step_end(self, state: Any) -> None:
        if state.step == 6:
            raise RuntimeError("the disk has caught fire")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Path]:
    """The output of the resumed run."""
    folder = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "WANDB_MODE": "offline",
            "WANDB_CONFIG_DIR": str(folder),
            "WANDB_X_DISABLE_STATS": "true",
            "MLFLOW_TRACKING_URI": f"file:{folder}/mlruns",
            "MLFLOW_ALLOW_FILE_STORE": "true",
            "TRACKIO_DIR": str(folder / "trackio"),
        }.items():
            patch.setenv(name, value)
        preload()
        mapping = run_mapping(corpus, folder / "out")
        mapping["train"] |= {"steps": 6, "eval_every": 5, "log_system": True}
        mapping["optimizer"] |= {"groups": [{"match": "model.embed_tokens.*", "lr_factor": 0.5}]}
        options = {"name": "wandb", "project": "tiny", "run_name": "first", "tags": ["a", "b"], "notes": "small"}
        named = {"wandb": options, "mlflow": {"name": "mlflow", "experiment": "tiny", "tags": {"size": "small"}}}
        run = build_run({**mapping, "checkpoint": {"every": 2}, "monitor": [named.get(one, one) for one in TRACKERS]})
        with pytest.raises(LaunchError, match="caught fire"):
            mds.train(run, callbacks=[FailAt5()])
        (folder / "out" / "report.html").rename(folder / "failed.html")
        (folder / "status").write_text(run_alone(mlflow_status, folder))
        mds.train(run)
        yield folder / "out"


def mlflow_status(folder: Path) -> str:
    from mlflow import MlflowClient

    client = MlflowClient(f"file:{folder}/mlruns")
    (run,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    return run.info.status


def lines_of(output: Path, key: str, file: str = "metrics.jsonl") -> dict[int, float]:
    """Step -> value of all lines of a metrics file that have a key."""
    lines = map(json.loads, (output / file).read_text().splitlines())
    return {line["step"]: line[key] for line in lines if key in line}


def test_tensorboard_hides_the_steps_after_the_checkpoint(output: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (directory,) = (output / "tensorboard").iterdir()
    assert directory.name == "out_1" and len([*directory.iterdir()]) == 2, "a file for each part of the run"
    found = EventAccumulator(str(directory)).Reload()
    for tag, key in (("train/loss", "loss"), ("train/lr", "lr"), ("valid/loss", "valid_loss")):
        expected = lines_of(output, key)
        assert [one.step for one in found.Scalars(tag)] == [*expected]
        assert [one.value for one in found.Scalars(tag)] == pytest.approx([*expected.values()], rel=1e-6)
    assert "system/host_memory_bytes" in found.Tags()["scalars"]
    assert "warmup_steps: 2" in found.Tensors("run file/text_summary")[0].tensor_proto.string_val[0].decode()
    settings = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"schedule.warmup_steps" in settings


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a wandb file: LevelDB's log format, blocks of 32 KiB after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def test_wandb_has_each_step_once_under_one_id(output: Path) -> None:
    first, second = sorted((output / "wandb").glob("offline-run-*/*.wandb"))
    parts, ids = [], set()
    for path in (first, second):
        records = [*wandb_records(path)]
        (started,) = [record.run for record in records if record.HasField("run")]
        ids.add(started.run_id)
        assert (started.project, started.display_name, [*started.tags]) == ("tiny", "first", ["a", "b"])
        settings = {item.key: json.loads(item.value_json) for item in started.config.update}
        assert settings["schedule"]["warmup_steps"] == 2 and settings["train"]["steps"] == 6
        rows: dict[int, dict[str, float]] = {}
        for record in records:
            if record.HasField("history"):
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                rows[record.history.step.num] = {name: json.loads(value) for name, value in items.items()}
        parts.append(rows)
        (ended,) = [record.exit for record in records if record.HasField("exit")]
        assert ended.exit_code == int(path == first), "the first part failed"
    assert len(ids) == 1 and json.loads((output / "trackers.json").read_text())["wandb"]["id"] in ids
    assert [*parts[0]] == [1, 2, 3, 4, 5] and [*parts[1]] == [6]
    merged = parts[0] | parts[1]
    assert {step: row["train/loss"] for step, row in merged.items()} == lines_of(output, "loss")
    assert {step: row["valid/loss"] for step, row in merged.items() if "valid/loss" in row} == lines_of(
        output, "valid_loss"
    )
    assert all(row["system/process_memory_bytes"] > 1e6 for row in merged.values())


def mlflow_run(output: Path) -> dict[str, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"file:{output.parent}/mlruns")
    (run,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {
        "id": run.info.run_id,
        "name": run.info.run_name,
        "status": run.info.status,
        "params": run.data.params,
        "tags": run.data.tags,
        "history": {name: [(one.step, one.value) for one in values] for name, values in history.items()},
    }


def test_mlflow_has_each_step_once_in_one_run(output: Path) -> None:
    found = run_alone(mlflow_run, output)
    assert (output.parent / "status").read_text() == "FAILED"
    assert (found["name"], found["status"], found["tags"]["size"]) == ("out", "FINISHED", "small")
    assert found["id"] == json.loads((output / "trackers.json").read_text())["mlflow"]["id"]
    assert found["params"]["schedule.warmup_steps"] == "2" and found["params"]["model.config.vocab_size"] == "61"
    assert found["history"]["train/loss"] == [*lines_of(output, "loss").items()]
    assert len(found["history"]["train/lrs/model.embed_tokens._"]) == 6, "MLflow allows no asterisk"
    assert found["history"]["valid/loss"] == [*lines_of(output, "valid_loss").items()]
    assert [step for step, _ in found["history"]["system/host_memory_bytes"]] == STEPS


def trackio_rows(output: Path) -> tuple[list[tuple[str, Any]], list[dict[str, Any]]]:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    runs = [*trackio.Api().runs("megatron-ds")]
    logs = SQLiteStorage.get_logs("megatron-ds", runs[0].name, run_id=runs[0].id)
    return [(run.name, run.config) for run in runs], logs


def test_trackio_has_each_step_once_in_one_run(output: Path) -> None:
    ((name, settings),), rows = run_alone(trackio_rows, output)
    assert name.startswith("out-") and name == json.loads((output / "trackers.json").read_text())["trackio"]["id"]
    assert settings["schedule"]["warmup_steps"] == 2
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        *lines_of(output, "loss").items()
    ]
    assert [(row["step"], row["valid/loss"]) for row in rows if "valid/loss" in row] == [
        *lines_of(output, "valid_loss").items()
    ]


def test_csv_has_the_rows_of_the_metrics_file(output: Path) -> None:
    with (output / "metrics.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 5, 6, 6]
    assert {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]} == lines_of(output, "loss")
    assert {int(row["step"]): float(row["valid/loss"]) for row in rows if row["valid/loss"]} == lines_of(
        output, "valid_loss"
    )


def test_a_report_is_written_of_a_failed_and_of_a_resumed_run(output: Path) -> None:
    failed, whole = (output.parent / "failed.html").read_text(), (output / "report.html").read_text()
    assert "failed after step 5: RuntimeError: the disk has caught fire" in failed and 'class="status failed"' in failed
    for part in (
        'class="status done"',
        "failed after step 5: RuntimeError: the disk has caught fire",
        "resumed after step 4",
        "done after step 6",
        ">1 = tp 1 x pp 1 x dp 1<",
        " saved, the last of ",
        "warmup_steps: 2",
        'aria-label="Memory of the host over the steps"',
    ):
        assert part in whole, part


def test_the_metrics_file_has_readings_of_the_machine_if_asked(output: Path) -> None:
    steps, _ = mds.monitor.read_metrics(output / "metrics.jsonl")
    assert [one.step for one in steps] == STEPS
    for one in steps:
        assert {*one.system} == {"host_memory_bytes", "host_cpu_percent", "process_memory_bytes"}
        assert 1e7 < one.system["process_memory_bytes"] <= one.system["host_memory_bytes"] * 10
        assert all(math.isfinite(value) for value in one.system.values())


def test_a_tracker_that_needs_a_key_is_refused_before_the_first_step_on_all_ranks(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    preload()
    run = build_run({**run_mapping(corpus, tmp_path / "out"), "monitor": ["csv", "wandb"]})
    with pytest.raises(ConfigError) as caught:
        mds.train(run, nproc=2)
    assert str(caught.value) == (
        "monitor[1]=wandb: no API key is configured; try wandb login, or its option mode: offline"
    )
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == ""
    assert not {"report.html", "sessions.jsonl"} & {path.name for path in (tmp_path / "out").iterdir()}, "not started"


def run_with(folder: Path, **entry: Any) -> SinkInfo:
    mapping = {"model": {"config": {"model_type": "llama"}}, "data": {"format": "text", "train": ["a.txt"]}}
    run = build_run({**mapping, "train": {"steps": 9}, "output": str(folder), "monitor": [entry]})
    return SinkInfo(run, folder, None)


def open_mlflow_away(folder: Path) -> tuple[str, float]:
    """Message and seconds of the refusal of a server that is not there."""
    began_s = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        open_sinks(run_with(folder, name="mlflow", tracking_uri="http://127.0.0.1:9"))
    return str(caught.value), time.monotonic() - began_s


def test_a_server_that_is_away_is_refused_in_seconds(tmp_path: Path) -> None:
    message, seconds = run_alone(open_mlflow_away, tmp_path)
    assert message.startswith("monitor[0]=mlflow cannot be opened (MlflowException: API request to http://127.0.0.1:9")
    assert "\n" not in message and seconds < 30


def log_to_a_server_that_goes_away(folder: Path) -> tuple[list[tuple[str, Any]], list[str]]:
    """What the server has got of steps 1 to 4, and the lines of the log; it was away during step 3."""
    logged: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_ds").addHandler(handler)
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    with serve_mlflow() as (server, address):
        (sink,) = open_sinks(run_with(folder, name="mlflow", tracking_uri=address, experiment="new"))
        assert isinstance(sink, Tracker)
        for step in range(1, 5):
            server.is_away = step == 3
            sink.write(replace(STEP, step=step))
            sink._waiting.join()
        sink.close()
        return server.calls, logged


def test_a_server_that_goes_away_loses_lines_and_ends_no_run(tmp_path: Path) -> None:
    calls, logged = run_alone(log_to_a_server_that_goes_away, tmp_path)
    assert [path for path, _ in calls[:3]] == ["experiments/get-by-name", "experiments/create", "runs/create"]
    batches = [content for path, content in calls if path == "runs/log-batch"]
    params = {one["key"]: one["value"] for batch in batches for one in batch.get("params", [])}
    assert params["train.steps"] == "9" and params["optimizer.name"] == "adamw"
    metrics = [{one["key"]: (one["step"], one["value"]) for one in batch.get("metrics", [])} for batch in batches]
    losses = [batch["train/loss"] for batch in metrics if batch]
    assert [int(step) for step, _ in losses] == [1, 2, 4] and {value for _, value in losses} == {STEP.loss}
    assert calls[-1][0] == "runs/update" and calls[-1][1]["status"] == "FINISHED"
    assert len(logged) == 2 and logged[0].startswith("monitor[0]=mlflow takes no lines (MlflowException: ")
    assert logged[1] == "monitor[0]=mlflow has lost 1 of 4 lines; metrics.jsonl has all of them"


SERVE_TRACKIO = """
import pathlib, sys, time, trackio
full_url = trackio.show(open_browser=False, block_thread=False, share=False)[3]
pathlib.Path(sys.argv[1]).write_text(full_url)
time.sleep(100)
"""


def log_to_trackio(folder: Path, address: str) -> None:
    for continue_after, steps in ((None, (1, 2, 3)), (2, (3, 4))):
        info = run_with(folder, name="trackio", project="served", server_url=address)
        (sink,) = open_sinks(replace(info, continue_after=continue_after, written=LastSteps(step=3)))
        for step in steps:
            sink.write(replace(STEP, step=step))
        sink.close()


def trackio_steps() -> list[list[int]]:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    runs = trackio.Api().runs("served")
    return [[row["step"] for row in SQLiteStorage.get_logs("served", run.name, run_id=run.id)] for run in runs]


@pytest.mark.sweep
def test_trackios_own_server_has_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "served"))
    server = subprocess.Popen([sys.executable, "-c", SERVE_TRACKIO, str(tmp_path / "url.part")])
    try:
        while not (tmp_path / "url.part").is_file() or not (tmp_path / "url.part").read_text():
            assert server.poll() is None
            time.sleep(0.1)
        address, _, token = (tmp_path / "url.part").read_text().partition("?write_token=")
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "client"))
        monkeypatch.setenv("TRACKIO_WRITE_TOKEN", token)
        run_alone(log_to_trackio, tmp_path, address)
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "served"))
        assert run_alone(trackio_steps) == [[1, 2, 3, 4]]
    finally:
        server.terminate()
        server.wait(20)
