"""The lists of tests name tests that exist; `make quick` has every axis, stage of ZeRO and kind of model."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ds.hf.config import read_model
from tests.conftest import LONGEST
from tests.parity.ours import Place
from tests.parity.reference import ALL_CONFIGS
from tests.ranks import run_alone

ROOT = Path(__file__).parents[1]
LIST = "tests/quick.txt"


class _Collected:
    """A pytest plugin that keeps what was collected."""

    def __init__(self) -> None:
        self.items: list[pytest.Item] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = session.items


def _collect() -> tuple[str, list[str], list[tuple[str, Place]]]:
    """What pytest says, node ids, and the cases of parity with their places; by a pytest of its own."""
    os.chdir(ROOT)
    found, said = _Collected(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        pytest.main(["--collect-only", "-q", "-p", "no:xdist", f"@{LIST}"], plugins=[found])
    return said.getvalue(), [item.nodeid for item in found.items], list(_trained(found.items))


def _trained(items: list[pytest.Item]) -> Iterator[tuple[str, Place]]:
    for item in items:
        if isinstance(item, pytest.Function) and item.name.startswith("test_five_steps"):
            yield item.callspec.params["case"], item.callspec.params["place"]


def test_the_list_is_a_sample_of_everything() -> None:
    said, names, trained = run_alone(_collect)
    lines = (ROOT / LIST).read_text().splitlines()
    unknown = [line for line in lines if not any(name.startswith(line) for name in names)]
    assert not unknown, said
    places = [place for _, place in trained]
    assert {place.zero for place in places} >= {1, 2, 3}
    assert any(place.tp > 1 and place.sp for place in places)
    assert any(place.pp > 1 for place in places) and any(place.dp > 1 for place in places)
    kinds = {type(read_model(ALL_CONFIGS[case]).core).__name__ for case, _ in trained}
    assert kinds == {"DecoderConfig", "EncoderConfig", "EncoderDecoderConfig"}
    for what in ("checkpoint/test_layouts", "hf/test_export", "test_mistakes_are_told_in_one_line"):
        assert any(what in name for name in names), what


def test_files_of_the_other_lists_exist() -> None:
    files = [*LONGEST, *(ROOT / "tests/gpu.txt").read_text().splitlines()]
    assert len(files) > 20 and [file for file in files if not (ROOT / file).is_file()] == []
