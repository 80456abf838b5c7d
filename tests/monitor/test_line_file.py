"""Files of lines on a full disk: whole lines only, in their order, and none is lost once there is room."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ds.monitor.line_file import LineFile
from tests.full_disk import limited_files


@pytest.mark.parametrize("room", [0, 1, 3, 4, 7, 8, 1000])
def test_lines_wait_for_room(room: int, tmp_path: Path, log_lines: list[str]) -> None:
    file = LineFile(tmp_path / "lines")
    with limited_files(room):
        for line in ("one\n", "two\n", "three\n"):
            file.add(line)
        whole = [line for line, end in (("one\n", 4), ("two\n", 8), ("three\n", 14)) if end <= room]
        assert file.path.read_text() == "".join(whole)
        assert file.num_waiting == 3 - len(whole) and bool(file.reason) == (len(whole) < 3)
    file.add("four\n")
    file.close()
    assert file.path.read_text() == "one\ntwo\nthree\nfour\n"
    waited = len(whole) < 3
    assert len(log_lines) == 2 * waited, "the first wait is reported, and its end"
    if waited:
        assert "lines cannot be written (" in log_lines[0] and "no line is lost" in log_lines[1]


def test_lines_that_never_have_room_are_counted(tmp_path: Path, log_lines: list[str]) -> None:
    file = LineFile(tmp_path / "lines")
    with limited_files(0):
        file.add("one\n", "two\n")
        file.close()
    assert log_lines[-1] == f"{tmp_path}/lines: 2 lines are lost (File too large)"


def test_a_torn_line_is_ended_first(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b'{"step": 1}\n{"st')
    file = LineFile(tmp_path / "lines")
    with limited_files(17):
        file.add('{"step": 2}\n')
    file.add('{"step": 3}\n')
    file.close()
    assert file.path.read_text() == '{"step": 1}\n{"st\n{"step": 2}\n{"step": 3}\n'


@pytest.fixture
def log_lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The lines that the package logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_ds")
    monkeypatch.setattr(logger, "handlers", [handler])
    before = logger.level
    logger.setLevel(logging.INFO)
    yield lines
    logger.setLevel(before)
