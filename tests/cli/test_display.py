"""What rank 0 shows: exact plain lines, one-line bars at 80 columns, a terminal given back after an error."""

import io
import logging
import math
import re
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from megatron_ds.cli.display import (
    Pace,
    TerminalReporter,
    bar_status,
    format_count,
    format_duration,
    format_number,
    format_rate,
    print_error,
    summary_rows,
)
from megatron_ds.config import BatchSizes
from megatron_ds.config.batch_ramp import BatchStage
from megatron_ds.monitor import RunSummary, StepMetrics, ValidMetrics

SUMMARY = RunSummary(
    model_name="llama",
    num_params=109_482_240,
    world_size=8,
    tensor=2,
    pipeline=2,
    data=2,
    sequence=True,
    zero_stage=1,
    precision="bf16",
    device="NVIDIA H100",
    tokens_per_step=32_768,
    steps=1000,
    data_description="corpus[1].txt, text, sequences of 512 tokens",
    output="out/run",
)
STEP = StepMetrics(
    step=10,
    loss=5.12344,
    grad_norm=1.2341,
    lr=3e-4,
    tokens=32_768,
    step_s=723 / 990,
    tokens_per_s=4321.4,
    tflops_per_rank=0.1234,
)
HUGE = replace(
    STEP, step=1_234_567, loss=12345.678, lr=1.25e-5, tokens_per_s=123_456_789.0, step_s=0.05, grad_norm=math.nan
)
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def plain() -> tuple[TerminalReporter, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    return TerminalReporter(Console(file=out), clock), out, clock


def terminal(width: int = 80) -> tuple[TerminalReporter, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=width, height=24, force_terminal=True, force_interactive=True, _environ={})
    return TerminalReporter(console, clock), out, clock


def shown(out: io.StringIO) -> list[str]:
    """The lines, escape sequences removed, a redrawn bar as a line of its own."""
    return [line.rstrip() for line in re.split(r"[\r\n]+", ESCAPES.sub("", out.getvalue())) if line.strip()]


def test_plain_summary() -> None:
    reporter, out, _ = plain()
    reporter.start(SUMMARY)
    assert out.getvalue().splitlines() == [
        "model       llama, 109.5M parameters (109,482,240)",
        "world       8 = tp 2 x pp 2 x dp 2, sequence parallel",
        "deepspeed   ZeRO stage 1, bf16",
        "device      NVIDIA H100",
        "steps       1,000 of 32,768 tokens (32.8M in total)",
        "data        corpus[1].txt, text, sequences of 512 tokens",
        "output      out/run",
    ]


def test_plain_summary_without_sequence_parallelism_does_not_name_it() -> None:
    reporter, out, _ = plain()
    reporter.start(replace(SUMMARY, sequence=False))
    assert "world       8 = tp 2 x pp 2 x dp 2\n" in out.getvalue()
    reporter.start(replace(SUMMARY, world_size=16, context=2, context_plan="2 = ulysses 2: as given"))
    assert (
        "world       16 = tp 2 x cp 2 x pp 2 x dp 2, sequence parallel\ncontext     2 = ulysses 2: as given\n"
    ) in out.getvalue()


def test_plain_summary_with_a_statement() -> None:
    reporter, out, _ = plain()
    reporter.start(replace(SUMMARY, learned="2 epochs", validated="never: no data.valid", kept="nothing"))
    assert out.getvalue().splitlines()[-4:] == [
        "learned     2 epochs",
        "validated   never: no data.valid",
        "kept        nothing",
        "output      out/run",
    ]


def test_plain_step_line_is_exact_and_never_wrapped() -> None:
    reporter, out, _ = plain()
    reporter.step(STEP, total_steps=1000)
    assert out.getvalue() == (
        "step    10/1000  loss 5.1234  grad 1.234  lr 3.00e-04  4,321 tok/s  0.12 TFLOP/s/rank  left 0:12:03\n"
    )


def test_plain_columns_stay_aligned_and_time_left_follows_the_clock() -> None:
    reporter, out, clock = plain()
    reporter.step(replace(STEP, step=1, loss=10.5, tokens_per_s=12_345.0), total_steps=1000)
    clock.now_s += 10.0
    reporter.step(replace(STEP, step=11), total_steps=1000)
    reporter.valid(ValidMetrics(step=11, valid_loss=4.5))
    assert out.getvalue().splitlines() == [
        "step     1/1000  loss 10.5000  grad 1.234  lr 3.00e-04  12,345 tok/s  0.12 TFLOP/s/rank  left 0:12:10",
        "step    11/1000  loss  5.1234  grad 1.234  lr 3.00e-04   4,321 tok/s  0.12 TFLOP/s/rank  left 0:16:29",
        "valid   11/1000  loss  4.5000",
    ]


def test_metrics_follow_the_loss_and_leave_a_narrow_bar_first() -> None:
    reporter, out, _ = plain()
    measured = replace(STEP, metrics={"accuracy": 0.4321, "margin": -1.5})
    reporter.step(measured, total_steps=1000)
    reporter.valid(ValidMetrics(step=10, valid_loss=4.5, metrics={"accuracy": 0.25}))
    assert out.getvalue().splitlines() == [
        "step    10/1000  loss 5.1234  accuracy 0.4321  margin -1.5000  grad 1.234  lr 3.00e-04  4,321 tok/s  "
        "0.12 TFLOP/s/rank  left 0:12:03",
        "valid   10/1000  loss 4.5000  accuracy 0.2500",
    ]
    full = "loss 5.1234  accuracy 0.4321  margin -1.5000  lr 3.00e-04  4,321 tok/s  left 0:12:03"
    assert bar_status(measured, 723.0, len(full)) == full
    assert bar_status(measured, 723.0, len(full) - 1) == full.replace("  margin -1.5000", "")
    assert bar_status(measured, 723.0, 45) == "loss 5.1234  4,321 tok/s  left 0:12:03"


def test_mfu_and_peak_memory_follow_the_speed_and_leave_a_narrow_bar_before_all_else() -> None:
    reporter, out, _ = plain()
    used = replace(STEP, mfu=0.48123, peak_memory_bytes=61_240_000_000, reserved_memory_bytes=70_000_000_000)
    reporter.step(used, total_steps=1000)
    reporter.step(replace(used, mfu=None, peak_memory_bytes=523_400_000), total_steps=1000)
    first, second = out.getvalue().splitlines()
    assert first.endswith("0.12 TFLOP/s/rank  MFU 48.1%  peak 61.2 GB  left 0:12:03")
    assert second.endswith("0.12 TFLOP/s/rank  peak 0.52 GB  left 0:12:03")
    full = "loss 5.1234  lr 3.00e-04  4,321 tok/s  MFU 48.1%  peak 61.2 GB  left 0:12:03"
    assert bar_status(used, 723.0, len(full)) == full
    assert bar_status(used, 723.0, len(full) - 1) == full.replace("  peak 61.2 GB", "")
    assert bar_status(used, 723.0, 45) == "loss 5.1234  4,321 tok/s  left 0:12:03"


def test_of_the_experts_only_the_load_of_the_busiest_is_shown() -> None:
    reporter, out, _ = plain()
    balance = {"moe_aux_loss": 2.1, "moe_tokens_min": 50.0, "moe_tokens_mean": 100.0, "moe_tokens_max": 132.0}
    measured = replace(STEP, metrics={"accuracy": 0.5, **balance})
    reporter.step(measured, total_steps=1000)
    assert out.getvalue().startswith("step    10/1000  loss 5.1234  accuracy 0.5000  load 1.32x  grad 1.234  lr ")
    full = "loss 5.1234  accuracy 0.5000  load 1.32x  lr 3.00e-04  4,321 tok/s  left 0:12:03"
    assert bar_status(measured, 723.0, len(full)) == full
    assert bar_status(measured, 723.0, 50) == "loss 5.1234  load 1.32x  4,321 tok/s  left 0:12:03"


def test_plain_notes_are_not_markup_and_keep_their_length() -> None:
    reporter, out, _ = plain()
    text = "saved [bold]out[/bold] " + "x" * 200
    reporter.note(text)
    reporter.finish("done [/]")
    assert out.getvalue() == f"{text}\ndone [/]\n"


def test_no_escape_sequence_where_there_is_no_terminal() -> None:
    reporter, out, _ = plain()
    with reporter:
        reporter.start(SUMMARY)
        reporter.step(STEP, total_steps=1000)
        reporter.finish("done")
    assert "\x1b" not in out.getvalue()


def test_terminal_summary_and_bar_at_80_columns() -> None:
    reporter, out, _ = terminal()
    with reporter:
        reporter.start(SUMMARY)
        reporter.step(STEP, total_steps=1000)
    lines = shown(out)
    assert lines[0] == "model       llama, 109.5M parameters (109,482,240)"
    assert lines[6] == "output      out/run"
    assert re.fullmatch(r"step 10/1000 [━╸╺ ]{10,} loss 5\.1234  lr 3\.00e-04  4,321 tok/s  left 0:12:03", lines[-1]), (
        lines[-1]
    )
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize(
    ("width", "status"),
    [
        (81, "loss 1.23e+04  lr 1.25e-05  123.5M tok/s  left 10:37:52"),
        (80, "loss 1.23e+04  123.5M tok/s  left 10:37:52"),
        (57, "loss 1.23e+04  left 10:37:52"),
        (41, "loss 1.23e+04"),
    ],
)
def test_the_bar_is_one_line_whatever_it_shows(width: int, status: str) -> None:
    reporter, out, _ = terminal(width)
    with reporter:
        reporter.start(replace(SUMMARY, steps=2_000_000))
        reporter.step(HUGE, total_steps=2_000_000)
    bars = [line for line in shown(out) if "1234567" in line]
    assert len(bars) == 2, "drawn at the step and once more at the end"
    for bar in bars:
        assert re.fullmatch(rf"step 1234567/2000000 [━╸╺]{{4,}} {re.escape(status)}", bar), bar
        assert len(bar) <= width
    assert shown(out)[-2:] == bars, "nothing of the bar spills into a second line"


def test_a_long_output_path_is_shown_whole_in_its_column() -> None:
    reporter, out, _ = terminal()
    with reporter:
        reporter.start(replace(SUMMARY, output="o" * 100))
    rows = shown(out)[6:8]
    assert rows == ["output      " + "o" * 68, " " * 12 + "o" * 32]


def test_lines_appear_above_the_bar_without_markup() -> None:
    reporter, out, _ = terminal()
    with reporter:
        reporter.start(SUMMARY)
        reporter.step(STEP, total_steps=1000)
        reporter.valid(ValidMetrics(10, 4.5))
        reporter.note("saved [bold]step_10[/bold]")
        reporter.finish("done")
    lines = shown(out)
    assert "valid   10/1000  loss 4.5000" in lines and "saved [bold]step_10[/bold]" in lines
    assert lines[-1] == "done" and lines[-2].startswith("step 10/1000")


def test_redraws_are_few_but_the_last_step_is_drawn() -> None:
    reporter, out, clock = terminal()
    with reporter:
        reporter.start(SUMMARY)
        for step in range(1, 1001):
            clock.now_s += 0.001
            reporter.step(replace(STEP, step=step), total_steps=1000)
        drawn = [line for line in shown(out) if line.startswith("step ")]
    assert 5 < len(drawn) < 20
    assert drawn[-1].startswith("step 1000/1000") and drawn[-1].endswith("left 0:00:00")


def test_no_thread_redraws_the_bar() -> None:
    import threading

    before = threading.active_count()
    reporter, _, _ = terminal()
    with reporter:
        reporter.start(SUMMARY)
        assert threading.active_count() == before


def test_an_error_gives_the_terminal_back() -> None:
    reporter, out, _ = terminal()
    stdout, stderr = sys.stdout, sys.stderr
    with pytest.raises(RuntimeError), reporter:
        reporter.start(SUMMARY)
        assert sys.stderr is not stderr
        raise RuntimeError
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    assert out.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor is shown again"


def test_log_lines_go_above_the_bar_and_handlers_come_back() -> None:
    stderr = sys.stderr
    handler = logging.StreamHandler(stderr)
    logger = logging.getLogger("tests.display")
    logger.addHandler(handler)
    reporter, out, _ = terminal()
    try:
        with reporter:
            reporter.start(SUMMARY)
            logger.warning("a warning [1]")
        assert handler.stream is stderr
    finally:
        logger.removeHandler(handler)
    lines = shown(out)
    assert "a warning [1]" in lines and lines[-1].startswith("step 0/1000")


def test_time_left_counts_what_lies_between_steps_and_forgets_the_start() -> None:
    pace = Pace()
    assert pace.time_left_s(replace(STEP, step=1, step_s=2.0), 11, now_s=0.0) == 20.0
    assert pace.time_left_s(replace(STEP, step=2, step_s=2.0), 12, now_s=100.0) == 1000.0
    for step in range(3, 300):
        left_s = pace.time_left_s(replace(STEP, step=step), 1000, now_s=100.0 + step)
    assert left_s == pytest.approx(1000 - 299)
    assert pace.time_left_s(replace(STEP, step=1001), 1000, now_s=2000.0) == 0


def test_time_left_of_growing_batches_goes_by_their_samples() -> None:
    sizes = BatchSizes((BatchStage(1, 0, 2), BatchStage(2, 2, 4), BatchStage(3, 6, 6), BatchStage(4, 12, 8)))
    summary = replace(SUMMARY, steps=10, tokens_per_step=800, batch_sizes=sizes)
    assert dict(summary_rows(summary))["steps"] == "10 of 200 (step 1) to 800 (step 4 on) tokens (6.8K in total)"
    pace = Pace(summary.full_batches)
    assert pace.time_left_s(replace(STEP, step=1, step_s=2.0), 10, now_s=0.0) == pytest.approx(66 * 1.0)
    assert pace.time_left_s(replace(STEP, step=3), 10, now_s=30.0) == pytest.approx(56 * 3.0)


def test_numbers() -> None:
    assert [format_number(value, 4) for value in (0.0, 5.12345, 0.00012, 1e-7, 123456.0, math.nan, math.inf)] == [
        "0.0000",
        "5.1235",
        "0.00012",
        "1.00e-07",
        "1.23e+05",
        "nan",
        "inf",
    ]
    assert [format_number(value, 2) for value in (0.034, 0.12, 412.3)] == ["0.034", "0.12", "412.30"]
    assert [format_rate(value) for value in (0.52, 10, 4321.4, 1.23e7)] == ["0.5", "10", "4,321", "12.3M"]
    assert [format_count(value) for value in (512, 1500, 6.95e9, 1.2e12)] == ["512", "1.5K", "7.0B", "1.2T"]
    assert [format_duration(value) for value in (0.4, 59.6, 3600 * 51 + 61, math.nan)] == [
        "0:00:00",
        "0:01:00",
        "51:01:01",
        "-:--:--",
    ]


def test_an_error_is_one_line_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    print_error("data.train[0]='[/bold]' \n  is missing\r\n\n" + "x" * 200 + "\n")
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "error: data.train[0]='[/bold]' is missing " + "x" * 200 + "\n"
