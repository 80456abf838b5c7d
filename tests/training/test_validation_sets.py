"""Named validation sets: in the run file, in a run's files, and in `evaluate`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.cli.main import _run
from megatron_ds.config import DataSection, DataSource, RunConfig, build_section
from megatron_ds.errors import ConfigError
from megatron_ds.monitor import read_metrics
from megatron_ds.monitor.plot import _read_curves
from megatron_ds.training.launch import train
from tests.ranks import preload

MakeRun = Callable[..., RunConfig]


def section(valid: Any) -> DataSection:
    return build_section(DataSection, {"train": ["a"], "valid": valid}, "data")


def test_sets_as_a_user_writes_them() -> None:
    found = section({"web": ["b", {"path": "c", "column": "body"}], "code": "d"})
    assert {name: [one.path for one in sources] for name, sources in found.valid_sets.items()} == {
        "web": ["b", "c"],
        "code": ["d"],
    }
    assert section(found.model_dump()["valid"]) == found, "as config.yaml has it"
    assert [*section({"path": "b", "split": "test"}).valid_sets] == [""], "a source, no sets"
    assert section({"web": DataSource(path="b")}).valid_sets == section({"web": "b"}).valid_sets
    assert section([]).valid_sets == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"valid": {"web": []}}, "data.valid.web is empty; give it at least one source, or remove it"),
        (
            {"valid": ["b", {"path": "c", "set": "web"}]},
            "data.valid[0].set is missing, and other sources have one; give",
        ),
        (
            {"train": [{"path": "a", "set": "web"}]},
            "data.train[0].set=web does nothing: sets are for data.valid; remove",
        ),
        ({"valid": {"web": {"path": "b", "set": "code"}}}, "data.valid.web has a source with set=code; remove its set"),
        ({"valid": {"web": 0.1}}, "data.valid.web=0.1 names no data; to hold out a share of data.train, write"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build_section(DataSection, {"train": ["a"], **fields}, "data")
    assert str(refused.value).startswith(message)


def test_a_run_with_sets(make_run: MakeRun, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: str(corpus / f"{name}.txt") for name in ("train", "valid")}
    sets = {"seen": [files["train"]], "new": files["valid"]}
    run = make_run("named", data={"valid": sets}, checkpoint={"every": 5})
    preload()
    result = train(run, 2)
    *_, last = read_metrics(result.metrics)[1]
    assert list(last.valid_losses) == ["seen", "new"] and last.valid_loss == result.last_valid_loss
    assert {name: values[-1] for name, values in _read_curves(result.metrics).sets.items()} == last.valid_losses
    assert "set: seen" in (Path(run.output) / "config.yaml").read_text()

    file = tmp_path / "evaluation.json"
    assert _run(["evaluate", run.output, "--json", str(file)]) == 0, capsys.readouterr().err
    found = {one["name"].removeprefix("data.valid."): one for one in json.loads(file.read_text())["data"]}
    assert {name: one["loss"] for name, one in found.items()} == pytest.approx(last.valid_losses, rel=1e-6)
    weighted = sum(one["loss"] * one["tokens"] for one in found.values())
    assert last.valid_loss == pytest.approx(weighted / sum(one["tokens"] for one in found.values()), rel=1e-6)
