"""`megatron-ds plan`: what it shows at two widths, its JSON, its exit status, and refusals."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ds.cli.main import _run
from megatron_ds.cli.plan import parse_tokens
from megatron_ds.cli.plan_tables import shown_parts
from megatron_ds.config import load_run
from megatron_ds.errors import ConfigError

MODEL = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose data, output and devices are nowhere; the current directory of the test."""
    run: dict[str, Any] = {
        "model": {"config": MODEL},
        "parallel": {"tensor": 2, "pipeline": 2, "sequence": True},
        "deepspeed": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
        "data": {"format": "indexed", "train": ["nowhere/corpus"], "seq_length": 2048},
        "train": {"steps": 1000, "global_batch_size": 64, "micro_batch_size": 2},
        "output": "/nowhere/out",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run.yaml"


def plan(*arguments: str) -> int:
    return _run(["plan", "run.yaml", *arguments])


@pytest.mark.parametrize("width", [80, 120])
def test_all_parts_fit_the_terminal(
    run_file: Path, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert plan("--nodes", "2", "--device", "h100", "--price", "2", "--tokens", "1B") == 0
    shown = capsys.readouterr().out
    tables = shown[shown.index("memory of a rank") : shown.index("speed  ")].splitlines()
    assert len(tables) > 25 and max(map(len, tables)) <= width
    for start in (
        "model       llama, ",
        "machines    2 x 8 h100 of 84.9 GB; ",
        "layout      16 = tp 2 x pp 2 x dp 4; sequence parallel, ZeRO-1, recompute none",
        "batch       64 x 2,048 = 131.1K tokens; 8 micro-batches of 2 on each data rank",
        "weights ",
        "peak ",
        "compute ",
        "1F1B of DeepSpeed: 2 ranks, 8 micro-batches",
        "speed ",
        "training    1.0B tokens in 7,630 steps: ",
        "limits ",
        "change ",
    ):
        assert f"\n{start}" in f"\n{shown}", start
    assert re.search(r"device hours, [\d,]+ at 2 an hour", shown)


def test_the_json_adds_up(run_file: Path) -> None:
    assert plan("--nodes", "2", "--json", "plan.json", "checkpoint.every=100") == 0
    facts = json.loads(Path("plan.json").read_text())
    stages = facts["memory"]["stages"]
    assert [stage["stage"] for stage in stages] == [0, 1] and facts["memory"]["fits"]
    for stage in stages:
        assert sum(stage["parts_bytes"].values()) == stage["peak_bytes"]
    assert facts["memory"]["peak_bytes"] == max(stage["peak_bytes"] for stage in stages)
    step = facts["step"]
    assert sum(step["parts_s"].values()) == pytest.approx(step["seconds"])
    assert step["tokens_per_s"] * step["seconds"] == pytest.approx(64 * 2048)
    assert facts["layout"]["data"] == 4 and facts["layout"]["micro_batches"] == 8
    layer = 1024 * (1024 * 3 + 2816 * 3 + 2)  # q and o 1024, k and v 512 each; gate, up, down; two norms
    assert facts["model"]["parameters"] == 2 * 32000 * 1024 + 8 * layer + 1024
    assert facts["training"]["tokens"] == 1000 * 64 * 2048 and facts["training"]["steps"] == 1000
    assert facts["failures"]["chosen"]["interval_steps"] == 100
    assert {row["axis"] for row in facts["communication"][0]["by_axis"]} >= {"tensor", "shard", "pipeline"}


def test_percents_are_written_alike(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--nodes", "2", "--tokens", "1B", "checkpoint.every=100", "train.recompute=full") == 0
    shown = capsys.readouterr().out
    assert len(re.findall(r"\d %", shown)) > 10 and not re.search(r"\d%", shown), shown


def test_slow_devices_are_one_setting(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The step, its table, the failures and the length of the training have the same slowness."""
    seconds = {}
    for given in ((), ("--stragglers", "5,10")):
        assert plan("--nodes", "2", "--json", "plan.json", "checkpoint.every=100", *given) == 0
        facts = json.loads(Path("plan.json").read_text())
        step, training = facts["step"], facts["training"]
        seconds[given] = step["parts_s"]["slowest node"]
        without_saves_s = step["seconds"] - step["parts_s"]["checkpoints"]
        assert facts["failures"]["step_s"] == pytest.approx(without_saves_s)
        assert training["seconds"] == pytest.approx(1000 * without_saves_s * training["slowdown_by_failures"])
    few, many = seconds.values()
    assert many > 5 * few and facts["machines"]["stragglers"] == pytest.approx({"devices": 0.05, "passes": 0.1})
    assert re.search(r"\nslowest node +[\d.]+ ", capsys.readouterr().out)


def test_a_run_without_progress(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its infinite numbers are null in the JSON, and no line shows them."""
    assert plan("--mtbf-hours", "0.001", "--price", "2", "--json", "plan.json") == 0

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    facts = json.loads(Path("plan.json").read_text(), parse_constant=refuse)
    assert facts["training"]["slowdown_by_failures"] is None and facts["training"]["cost"] is None
    shown = capsys.readouterr().out
    assert "\ntraining    it makes no progress: the machines fail faster than they restart and save\n" in shown
    assert not re.search(r"\b(inf|nan)\b", shown)


def test_a_run_that_does_not_fit(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its largest part is named, and the advised change makes it fit: so says a plan of it."""
    assert plan("--gpu-memory", "5GB", "train.micro_batch_size=8") == 1
    shown = dict(
        line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line.startswith(("limits", "change"))
    )
    assert re.match(r"memory: a rank of stage 0 needs [\d.]+ GB and a device has 5.0; activations are", shown["limits"])
    changes, _, rest = shown["change"].partition(": ")
    assert rest.endswith("of 5.0 GB")
    assert plan("--gpu-memory", "5GB", "train.micro_batch_size=8", *changes.split()) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "h1000"], "--device=h1000 is not a known device; did you mean h100"),
        (["--network", "token ring"], "--network=token ring is not the speed of network cards; try 400Gb/s"),
        (["--nodes", "3", "--gpus-per-node", "1"], "does not divide the number of ranks 3; nearest: 4 ranks"),
        (["parallel.tensor=3"], "parallel.tensor=3"),
        (["model.config=", "model.path=gone"], "model.path=gone does not exist"),
        (["--tokens", "many"], "--tokens=many is not a number of tokens; try 300B, 15T or 1e12"),
        (["--gpu-memory", "80"], "--gpu-memory='80' is not a size"),
        (["--write", "layouts"], "--write=layouts writes the layouts that a search finds; try --search"),
        (["--search", "--stragglers", "1"], "--stragglers=1 is for one layout, and --search compares them"),
        (["--json", "none/plan.json"], "--json=none/plan.json is not a file in a directory that exists"),
    ],
)
def test_refusals(run_file: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(*arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and message in shown and shown.count("\n") == 1, shown


def test_without_a_run_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["plan"]) == 2
    assert "RUN.yaml is missing; try megatron-ds plan run.yaml" in capsys.readouterr().err


def test_what_a_run_leaves_to_the_planner(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("parallel=auto", "train.micro_batch_size=auto") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("parallel=auto and train.micro_batch_size=auto: ") and " on a rank" in first


def test_a_search_writes_run_files_that_are_planned_alike(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--search", "--write", "layouts", "--json", "found.json") == 0
    found = json.loads(Path("found.json").read_text())
    files = sorted(Path("layouts").glob("*.yaml"))
    assert len(files) == len(found) == 5
    run = load_run(files[0])
    assert (run.parallel.tensor, run.train.micro_batch_size) == (found[0]["tensor"], found[0]["micro_batch_size"])
    assert _run(["plan", str(files[0]), "--json", "best.json"]) == 0
    best = json.loads(Path("best.json").read_text())
    assert best["step"]["seconds"] == pytest.approx(found[0]["step_s"])
    assert best["memory"]["peak_bytes"] == pytest.approx(found[0]["device_bytes"])


@pytest.mark.parametrize(
    ("text", "expected"), [("1e12", 1e12), ("300B", 3e11), ("1.5t", 1.5e12), ("1,000", 1000), ("7", 7)]
)
def test_numbers_of_tokens(text: str, expected: float) -> None:
    assert parse_tokens(text) == expected


@pytest.mark.parametrize("text", ["0", "", "B", "1X", "-5", "nan", "1e999"])
def test_what_is_no_number_of_tokens(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a number of tokens"):
        parse_tokens(text)


def test_small_parts_of_a_step_are_added_up() -> None:
    assert shown_parts({"a": 1.0, "b": 0.0004, "c": 0.0005, "d": 0.01}) == {"a": 1.0, "d": 0.01, "other": 0.0009}
    assert shown_parts({"a": 1.0}) == {"a": 1.0}
