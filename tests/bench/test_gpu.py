"""The commands for a GPU, on a CPU: the driver, the report, the targets and the carried packages."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import driver, page, report
from bench.gpu.commands import Command
from bench.gpu.fast import targets
from bench.gpu.fast.targets import LLAMA, OURS, PACKED, TARGETS, THEIRS
from bench.gpu.fast.weights import draw, fill
from bench.gpu.host_waits import host_waits
from bench.gpu.judgement import MET, MISSED, NOT_MEASURED, Figure, Target, judge
from bench.gpu.part import Part
from bench.gpu.trace import summarize
from bench.gpu.wheels import pins
from megatron_ds.planner.operations import Product, Stream
from megatron_ds.planner.profiles import find_device, find_network
from megatron_ds.planner.profiles.from_measurements import Facts, build_device
from megatron_ds.planner.profiles.link import MeasuredTime
from tests.forked_python import run_python
from tests.ranks import run_alone

ROOT = Path(__file__).parents[2]


def row(section: str, name: str, ok: bool | None = None, **found: Any) -> dict[str, Any]:
    return {"section": section, "name": name, "ok": ok, **found}


def test_carried_packages_are_the_pinned_ones() -> None:
    lines = re.findall(r"^([A-Za-z-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    required = dict(lines)
    for name, pin in pins().items():
        assert pin == (required.get(name) or version(name)), name


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: Mapping[str, str], limit_s: float = 60.0) -> list[Any]:
    """Run a command whose parts are given as code, and return its results."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    for name, code in parts.items():
        (tmp_path / f"{name}.py").write_text(code)
    results = tmp_path / "check.jsonl"
    command = Command("right", tuple(Part(name, name, limit_s=3.0) for name in parts), limit_s)
    environment = {**driver._environment(tmp_path, results, 0.0), "DEVICE": "cpu"}
    running = driver.Run(command, tmp_path, results, environment, driver.time.time() + limit_s)
    assert running.parts(command.parts)
    running.write_log(tmp_path / "check.log")
    return report.read_rows(results)


def test_a_part_that_fails_or_hangs_is_a_result_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = "from bench.gpu.record import *\nimport time\nwait_for_turn()\n"
    parts = {
        "first_part": begin + "record('one', 'a', None, speed=2.0)",
        "raises": begin + "guarded('two', 'b', lambda: 1 / 0)\nrecord('two', 'c', True)",
        "ends": begin + "raise SystemExit('no such thing')",
        "hangs": begin + "time.sleep(60)",
        "last_part": begin + "record('one', 'd', None)",
    }
    rows = run(tmp_path, monkeypatch, parts)
    assert [(one["section"], one["name"], one["ok"]) for one in rows] == [
        ("one", "a", None),
        ("two", "b", False),
        ("two", "c", True),
        ("run", "ends", False),
        ("run", "hangs", False),
        ("one", "d", None),
    ]
    assert rows[1]["error"] == "ZeroDivisionError: division by zero"
    assert rows[3]["error"] == "status 1" and rows[3]["log"] == ["no such thing"]
    assert rows[4]["error"] == "ended at its limit of 3 s"
    shown = capsys.readouterr().out
    assert shown.startswith("one\n      a ") and "two\nWRONG b " in shown and "speed=2.0" in shown
    assert "==== ends\nno such thing" in (tmp_path / "check.log").read_text()
    assert not list(tmp_path.glob(".*.log")), "the logs of the parts are joined"


CONTESTANT = """import runpy, sys
for name in [name for name in sys.modules if name.startswith("bench.gpu")]:
    del sys.modules[name]  # they read the environment when they are imported
runpy.run_module("bench.gpu.fast.train", run_name="__main__", alter_sys=True)
"""


def test_tiny_contestants_do_the_same_work(tmp_path: Path) -> None:
    (tmp_path / "contestant.py").write_text(CONTESTANT)
    results = tmp_path / "bench.jsonl"
    environ = {"DEVICE": "cpu", "TINY": "1", "GPU_RESULTS": str(results), "PYTHONPATH": str(ROOT)}
    for name in (OURS, THEIRS):
        done = run_python(tmp_path / "contestant.py", "llama", name, **environ, timeout=100)
        assert done.returncode == 0, done.stderr
    ours, packed, theirs = report.read_rows(results)
    assert [one["name"] for one in (ours, packed, theirs)] == [OURS, PACKED, THEIRS]
    assert ours["section"] == packed["section"] == theirs["section"] == LLAMA
    assert ours["ok"] and packed["ok"] and theirs["ok"], theirs
    assert abs(ours["first_loss"] - theirs["first_loss"]) < 1e-3, "they begin with the same weights"
    assert ours["tokens_s"] > 0 and ours["tflops"] > 0 and packed["first_loss"] != ours["first_loss"]


def test_the_table_of_a_device_is_a_profile_that_plans_read(tmp_path: Path) -> None:
    """The part measures small sizes on the CPU and writes the profile; the page names it, with its figures."""
    (tmp_path / "part.py").write_text(CONTESTANT.replace("fast.train", "fast.device_table"))
    results = tmp_path / "bench.jsonl"
    environ = {"DEVICE": "cpu", "TINY": "1", "GPU_RESULTS": str(results), "OUT": str(tmp_path)}
    done = run_python(tmp_path / "part.py", **environ, PYTHONPATH=str(ROOT), timeout=100)
    assert done.returncode == 0, done.stderr
    table, long = report.read_rows(results)
    assert (table["name"], table["ok"], long["ok"]) == ("cpu.measured.yaml", None, None)
    device = find_device(str(tmp_path / "cpu.measured.yaml"))
    assert table["memory_gb_s"] == device.memory_gb_s and table["launch_us"] == device.streams.launch_us
    rows = [one for one in device.measured_products if one.dtype == "bfloat16"]
    assert table["tflops"] == pytest.approx(max(2 * one.m * one.n * one.k / one.us for one in rows) / 1e6, rel=1e-3)
    assert table["operations"] == sum(
        map(len, (device.measured_products, device.measured_attention, device.measured_streams))
    )
    assert long["tflops"] > 0
    network = find_network(None, device, 1)
    shown = page.render({"fast": [table, long]}, None)
    assert "### profile of this device, for `megatron-ds plan --device`" in shown and "| cpu.measured.yaml |" in shown
    assert "launch in µs" in shown and network.inside is not None


def _figures_of_h100() -> tuple[dict[str, float], dict[str, float]]:
    from bench.gpu.fast import device_table  # its folder of results is chosen by the import

    timed = [
        (Product(4096, 4096, 4096), 2 * 4096**3 / 791.2e12),
        (Product(64, 64, 64, dtype="float32"), 9e-6),
        (Stream(1 << 30), (1 << 30) / 3.015e12),
        (Stream(1024), 4e-6),
    ]
    sums = [
        MeasuredTime(kind="all_reduce", ranks=8, num_bytes=size, us=us) for size, us in ((1024, 20), (8 << 30, 3e4))
    ]
    sums += [MeasuredTime(kind="message", ranks=2, num_bytes=size, us=us) for size, us in ((1024, 9), (1 << 30, 3e3))]
    device = build_device("here", Facts("cuda", "NVIDIA H100 80GB HBM3", 132, 85 * 10**9, 8), timed, sums)
    return device_table._of_products(791.2, device), device_table._figures(device)


def test_the_shares_of_a_known_gpu_are_those_of_its_data_sheet() -> None:
    products, figures = run_alone(_figures_of_h100)
    assert products == {"tflops": 791.2, "of_peak": 0.8}
    assert figures["of_bandwidth"] == 0.9 and figures["launch_us"] == 4.0
    assert figures["all_reduce_gb_s"] == pytest.approx(2 * 7 / 8 * (8 << 30) / 3e4 / 1e3, abs=0.1)


def test_experts_are_drawn_by_the_names_that_files_have() -> None:
    """transformers has all experts of a layer in one parameter, a file has a tensor for each."""
    expert, model = "model.layers.0.mlp.experts.1", torch.nn.Module()
    model.add_module("model", torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Module()])}))
    experts = torch.nn.Module()
    experts.register_parameter("gate_up_proj", torch.nn.Parameter(torch.empty(2, 6, 4)))
    experts.register_parameter("down_proj", torch.nn.Parameter(torch.empty(2, 4, 3)))
    model.get_submodule("model.layers.0").add_module("mlp", torch.nn.ModuleDict({"experts": experts}))
    fill(model)
    drawn = {
        name: draw(f"{expert}.{name}.weight", shape, torch.float32, torch.device("cpu"))
        for name, shape in {"gate_proj": (3, 4), "up_proj": (3, 4), "down_proj": (4, 3)}.items()
    }
    assert torch.equal(experts.get_parameter("gate_up_proj")[1], torch.cat([drawn["gate_proj"], drawn["up_proj"]]))
    assert torch.equal(experts.get_parameter("down_proj")[1], drawn["down_proj"])


def test_parts_without_time_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(tmp_path, monkeypatch, {"one": "", "two": ""}, limit_s=driver.REPORT_S + driver.LAST_S - 1)
    assert [one["error"] for one in rows] == ["no time was left for: one, two"]


def test_targets_are_judged_by_the_best_of_each_side() -> None:
    ours = (Figure("1.2 B", "ours", "tokens_s"), Figure("1.2 B", "ours, compiled", "tokens_s"))
    others = (Figure("1.2 B", "theirs", "tokens_s"), Figure("1.2 B", "theirs, compiled", "tokens_s"))
    faster = Target("speed", 1.15, True, ours, others)
    smaller = Target(
        "memory", 0.85, False, (Figure("1.2 B", "ours", "peak_gb"),), (Figure("1.2 B", "theirs", "peak_gb"),)
    )
    rows = [
        row("1.2 B", "ours", tokens_s=110.0, peak_gb=8.0),
        row("1.2 B", "ours, compiled", tokens_s=120.0),
        row("1.2 B", "theirs", tokens_s=90.0, peak_gb=10.0),
        row("1.2 B", "theirs, compiled", tokens_s=100.0),
    ]
    assert [(one.value, one.verdict) for one in judge(rows, (faster, smaller))] == [(1.2, MET), (0.8, MET)]
    slower = [*rows, row("1.2 B", "theirs, compiled", tokens_s=110.0)]  # the last result of a name counts
    assert judge(slower, (faster,))[0].verdict == MISSED
    without_best = judge(rows[:3], (faster,))[0]
    assert without_best.verdict == NOT_MEASURED, "the strongest contestant may be the one that failed"
    assert without_best.measured == "1.33 (without theirs, compiled)"
    assert judge([], (faster,))[0].verdict == NOT_MEASURED


def test_kernels_of_a_trace() -> None:
    """Two streams overlap for 1 us; the device is idle for 2 of 10 us."""
    spans = [
        ("gemm", "kernel", 0, 4),
        ("copy", "gpu_memcpy", 3, 2),
        ("gemm", "kernel", 7, 3),
        ("aten::mm", "cpu_op", 0, 9),
    ]
    events = [{"name": name, "cat": kind, "ts": ts, "dur": dur} for name, kind, ts, dur in spans]
    found = summarize([*events, {"name": "no category"}], steps=2)
    assert found == {"busy": 0.8, "kernels_a_step": 1, "kernels": [["gemm", 0.004, 1.0], ["copy", 0.001, 0.5]]}
    assert summarize([], steps=2)["kernels"] == []


def test_the_page_shows_the_profile_of_a_missed_target() -> None:
    profile = {
        "busy": 0.75,
        "kernels_a_step": 900,
        "kernels": [["gemm", 1.5, 8.0]],
        "host_waits": 2,
        "waits": [["a.py:1", 2]],
    }
    rows = [row(LLAMA, OURS, True, mfu=0.45), row("profile", f"{LLAMA}, {OURS}", None, **profile)]
    shown = page.render({"fast": rows}, None)
    assert "| 1.2 B Llama: MFU | >= 50.0% | 45.0% | **MISSED** |" in shown
    assert "busy for 75.0% of the time, with 900 kernels a step; the host waits for it 2 times a step: `a.py:1` 2." in (
        shown.replace("\n", " ")
    )
    assert "| `gemm` | 1.5 | 8.0 |" in shown
    met = page.render({"fast": [{**rows[0], "mfu": 0.55}, rows[1]]}, None)
    assert "| 55.0% | met |" in met and "gemm" not in met
    small = page.render({"fast": [row("environment", "device", shapes="small"), *rows]}, None)
    assert page.SMALL in small and page.SMALL not in shown


def test_targets_name_results_that_are_recorded() -> None:
    """Every section and name of a target is a constant that the measuring modules import, so it cannot be misspelt."""
    constants = {value for value in vars(targets).values() if isinstance(value, str)} | {"ours, bf16", "ours, fp32"}
    for target in TARGETS:
        for figure in (*target.ours, *target.others):
            assert {figure.section, figure.name} <= constants, figure


def test_each_command_replaces_its_half_of_the_page(tmp_path: Path) -> None:
    here = row(
        "environment", "versions", device="NVIDIA H100", driver="580", date="2026-01-01", versions={"torch": "2.11.0"}
    )
    right = [here, row("parity", "llama", True, loss=1e-6), row("parity", "gpt2", False, error="NaN")]
    fast = [{**here, "date": "2026-01-02"}, row("head", "ours", ms=12.5, peak_gb=1.25)]
    report.write_half("right", right, tmp_path)
    first = (tmp_path / report.PAGE).read_text()
    assert "- parity, gpt2: NaN" in first and "Not run on a GPU yet." in first
    report.write_half("fast", fast, tmp_path)
    both = (tmp_path / report.PAGE).read_text()
    assert "| ours | 12.5 | 1.25 |" in both and "| llama | ok | 1e-06 |" in both
    assert (
        "2026-01-01" in both and "- versions: torch 2.11.0" in both and "2026-01-02" in both and "Not run" not in both
    )
    assert json.loads((tmp_path / report.JSON).read_text()).keys() == {"right", "fast"}


def test_only_full_shapes_on_a_gpu_replace_the_committed_page() -> None:
    assert report.is_of_a_gpu([row("environment", "device", driver="580")])
    assert not report.is_of_a_gpu([row("environment", "device", driver="580", shapes="small")])
    assert not report.is_of_a_gpu([row("environment", "device", driver="none")])
    assert not report.is_of_a_gpu([row("run", "environment", False)])


def test_a_row_is_one_line_on_the_terminal() -> None:
    line = driver.summary(row("head", "ours", ms=12.5, log=["x" * 300]))
    assert line.startswith("      ours ") and "ms=12.5" in line and len(line) <= driver.WIDTH
    assert page.conclusion("right", [row("a", "b", False, error="NaN")])[-2:] == ["a, b: NaN", "1 results, 1 wrong"]


def test_waits_are_told_from_other_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step() -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    ((place, count),) = host_waits(step).items()
    assert place.startswith("bench/test_gpu.py:") and count == 2 and modes == ["warn", "default"]
