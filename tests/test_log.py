"""Lines that are logged once."""

import json
import logging
from pathlib import Path

import pytest

from megatron_ds.cli.import_hf import import_hf
from megatron_ds.log import LOGGER_NAME, SHOWN, log_once
from tests.parity.family_cases import MOE_CASES
from tests.parity.reference import make_model


def test_a_line_that_was_not_shown_is_shown_later(caplog: pytest.LogCaptureFixture) -> None:
    """As by rank 0, if the process that it was forked from shows no lines of this level."""
    SHOWN.clear()
    logging.getLogger(LOGGER_NAME).propagate = True
    with caplog.at_level(logging.WARNING, LOGGER_NAME):
        log_once("a field is not read")
    with caplog.at_level(logging.INFO, LOGGER_NAME):
        log_once("a field is not read")
        log_once("a field is not read")
    assert caplog.messages == ["a field is not read"]


def test_import_shows_the_fields_without_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SHOWN.clear()
    make_model(MOE_CASES["mixtral-four-experts"]).save_pretrained(tmp_path / "in")
    config = tmp_path / "in/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "capacity_factor": 1.25}))
    import_hf(tmp_path / "in", tmp_path / "out")
    assert "config.json: MixtralForCausalLM does not read capacity_factor; exports keep the" in capsys.readouterr().err
