"""The silent reporter has every method of the protocol and says nothing."""

import pytest

from megatron_ds.monitor import Reporter, RunSummary, SilentReporter, StepMetrics, ValidMetrics


def test_the_silent_reporter_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    reporter = SilentReporter()
    reporter.start(RunSummary("llama", 1, 1, 1, 1, 1, False, 0, "fp32", "cpu", 1, 1, "text", "out"))
    reporter.step(StepMetrics(1, 1.0, 1.0, 1.0, 1, 1.0, 1.0, 1.0), total_steps=1)
    reporter.valid(ValidMetrics(1, 1.0))
    reporter.note("note")
    reporter.finish("done")
    assert capfd.readouterr() == ("", "")


def test_the_silent_reporter_answers_every_call_of_the_protocol() -> None:
    calls = {name for name in vars(Reporter) if not name.startswith("_")}
    assert calls == {"start", "step", "valid", "note", "finish"}
    assert calls <= vars(SilentReporter).keys()
