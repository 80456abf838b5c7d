"""`report.html`: what it shows of a run, its size, and how it looks in a browser at two widths."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ds.cli.main import _run
from megatron_ds.errors import DataError
from megatron_ds.monitor import MetricsWriter, ValidMetrics
from megatron_ds.monitor.report import write_end, write_report, write_start
from megatron_ds.monitor.report.chart import Curve, draw_chart
from megatron_ds.monitor.report.columns import Column
from megatron_ds.monitor.report.sessions import SESSIONS, read_sessions
from megatron_ds.monitor.reporter import RunSummary
from tests.browser import browse, needs_browser
from tests.monitor.test_metrics import STEP

SUMMARY = RunSummary(
    "llama <tiny>", 61, 8, 2, 1, 4, True, 1, "bf16", "NVIDIA H100", 4096, 90, "3 documents & a book", "out/run"
)
SYSTEM = {"memory_bytes": 7e10, "utilization_percent": 93.0, "power_watts": 600.0, "temperature_celsius": 60.0}


def write_run(output: Path, num_steps: int) -> None:
    """A run on 8 GPUs that a signal has stopped in its middle, with a loss that was NaN and another of 99."""
    chance = np.random.default_rng(0)
    noise = chance.normal(0, 0.05, num_steps + 1)
    with MetricsWriter(output / "metrics.jsonl") as writer:
        for step in range(1, num_steps + 1):
            loss = 2 + 6 * math.exp(-5 * step / num_steps) + noise[step]
            loss = {num_steps // 3: math.nan, num_steps // 4: 99.0}.get(step, loss)
            values = {"accuracy": 0.5 + noise[step], "moe_tokens_min": 1.0, "moe_tokens_max": 9.0}
            system = {
                f"gpu{gpu}_{name}": one + 9 * noise[step] + gpu for gpu in range(8) for name, one in SYSTEM.items()
            }
            writer.write(replace(STEP, step=step, loss=loss, tokens_per_s=5e4, mfu=0.4, metrics=values, system=system))
        writer.write(ValidMetrics(num_steps, 2.5, {"accuracy": 0.25}))
    sources = [{"name": name, "weight": 1.0, "samples": 30, "epochs": 0.5} for name in ("wiki", "code </td>")]
    (output / "data.json").write_text(json.dumps({"samples": 60, "sources": sources}))
    (output / "config.yaml").write_text("train:\n  steps: 123456  # <b>\n")
    write_start(output, SUMMARY, None)
    write_end(output, f"stopped by SIGTERM after step {num_steps // 2}")
    write_start(output, SUMMARY, num_steps // 2)
    write_end(output, f"failed after step {num_steps}: TrainingError: no <loss>")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reported") / "moby"
    output.mkdir()
    write_run(output, 900)
    return write_report(output)


def test_the_page_has_all_of_a_run_and_nothing_of_a_network(report: Path) -> None:
    text = report.read_text()
    for part in (
        "<title>moby</title>",
        "failed after step 900: TrainingError: no &lt;loss&gt;",
        "900 of 123,456",
        "code &lt;/td&gt;",
        "3 documents &amp; a book",
        "stopped by SIGTERM after step 450",
        "resumed after step 450",
        "steps: 123456  # &lt;b&gt;",
        ">deepspeed<",
        "1 not finite",
        'aria-label="Power of GPUs over the steps"',
        'aria-label="accuracy over the steps"',
    ):
        assert part in text, part
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|src=|@import|url\(|<link", text)


def test_a_long_run_takes_no_more_room(tmp_path: Path, report: Path) -> None:
    (tmp_path / "long").mkdir()
    write_run(tmp_path / "long", 12_000)
    size = write_report(tmp_path / "long").stat().st_size
    assert size < 400_000 and size < 1.25 * report.stat().st_size


def curve(values: Any) -> Curve:
    column = np.asarray(values, dtype=np.float64)
    return Curve("x", Column(np.arange(1.0, column.size + 1), column))


def test_a_spike_of_one_step_is_in_the_band() -> None:
    values = np.ones(50_000)
    values[31_234] = 5.0
    chart = draw_chart("x", [curve(values)], [], str)
    (band,) = re.findall(r'class="band c0" d="M([^"]*)Z"', chart)
    heights = [float(point.split()[1]) for point in band.split("L")]
    assert min(heights) < 20 < 190 < max(heights), "near the top of the panel, which is 230 high"


@pytest.mark.parametrize("values", [[3.0], [math.nan], [0.0, 0.0], [1.0, math.inf, 2.0], [-1.0, 5.0], [1e-300, 1e300]])
@pytest.mark.parametrize("is_log", [False, True])
def test_any_values_can_be_drawn(values: list[float], is_log: bool) -> None:
    chart = draw_chart("x", [curve(values)], [1], str, is_log=is_log)
    assert "nan" not in re.sub(r'data-points="[^"]*"|<text.*?</text>', "", chart)
    assert chart.count('class="bad"') == any(not math.isfinite(value) for value in values)


def test_a_run_without_steps_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert "No step has been logged yet." in write_report(tmp_path).read_text()


def test_sessions_are_those_of_the_newest_run(tmp_path: Path) -> None:
    for continue_after in (None, 3, None, 7):
        write_start(tmp_path, SUMMARY, continue_after)
    with (tmp_path / SESSIONS).open("a") as file:
        file.write('{"event": "end", "ti')  # torn by a crash
    assert [(one.resumed_after, one.outcome) for one in read_sessions(tmp_path)] == [(None, ""), (7, "")]
    (tmp_path / SESSIONS).unlink()
    write_start(tmp_path, SUMMARY, None)
    write_end(tmp_path, "done")
    write_end(tmp_path, "failed: the export")
    (only,) = read_sessions(tmp_path)
    assert only.outcome == "failed: the export"


def test_the_command_writes_the_page(report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "made" / "page.html"
    assert _run(["report", str(report.parent), "--html", str(page)]) == 0
    assert capsys.readouterr().out == f"wrote {page}: {page.stat().st_size / 1e3:,.0f} kB\n"
    assert page.read_text() == report.read_text()
    assert _run(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'metrics.jsonl'} does not exist; a run writes it as OUTPUT/metrics.jsonl\n"
    )
    with pytest.raises(DataError):
        write_report(tmp_path)


@pytest.fixture(params=[(1280, True), (390, False)], ids=["wide, dark", "narrow, light"])
def browsing(request: pytest.FixtureRequest, report: Path) -> Iterator[Any]:
    width, dark = request.param
    with browse(report, width=width, dark=dark) as opened:
        yield opened


@needs_browser
def test_it_looks_right_in_a_browser(browsing: Any) -> None:
    page = browsing.page
    assert browsing.refused == [] and browsing.errors == []
    is_wide = page.evaluate("innerWidth") > 800
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the window"
    charts = [one.bounding_box() for one in page.locator("svg").all()]
    assert len(charts) > 12 and len({round(one["x"]) for one in charts}) == (2 if is_wide else 1), "columns"
    for text in page.locator("svg text").all()[:12]:
        assert text.bounding_box()["height"] > 9, "it can be read"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(20, 23, 28)") == is_wide
    figure = page.locator("figure").first
    box = figure.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert re.fullmatch(
        r"step 4\d\d: training 2\.\d+, validation 2\.5 \(step 900\)", figure.locator("output").inner_text()
    )
    assert page.locator("tr", has_text="wiki").inner_text().split() == ["wiki", "30", "50.0%", "50.0%", "0.50"]


def test_a_line_of_sessions_that_a_crash_has_torn(tmp_path: Path) -> None:
    (tmp_path / SESSIONS).write_text('{"event": "start", "ti')
    write_end(tmp_path, "done")
    assert read_sessions(tmp_path) == []
    with (tmp_path / SESSIONS).open("a") as file:
        file.write(json.dumps({"event": "start", "time": "t", "resumed_after": None, "facts": [], "environment": {}}))
    write_end(tmp_path, "done after step 2")
    assert [one.outcome for one in read_sessions(tmp_path)] == ["done after step 2"]
