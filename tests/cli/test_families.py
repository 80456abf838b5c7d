"""`megatron-ds families`: a part of the table, as lines and as JSON."""

import json

import pytest

from megatron_ds.cli.main import _run
from megatron_ds.hf.registry import FAMILIES


def test_a_part_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["families", "MoBA"]) == 2
    assert capsys.readouterr().err == (
        "error: TEXT=MoBA: no family has this in its model_type, class or models; try megatron-ds families\n"
    )
    assert _run(["families", "pythia"]) == 0
    titles, line = capsys.readouterr().out.splitlines()
    assert titles.split("  ")[0] == "model_type"
    assert line.startswith("gpt_neox") and "GPTNeoXForCausalLM" in line and " configs, " in line


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["families", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["model_type"] for one in found] == list(FAMILIES)
    assert all(one["proof"]["configs"] > 0 and one["proof"]["layouts"] > 3 for one in found)
