"""A table of comma-separated values, for spreadsheets and pandas."""

from __future__ import annotations

import csv
import io
import math
from collections import deque
from pathlib import Path
from typing import Any, ClassVar

from megatron_ds.atomic import replacing
from megatron_ds.errors import DataError
from megatron_ds.log import get_logger
from megatron_ds.monitor.line_file import LineFile
from megatron_ds.monitor.metrics import archive_name
from megatron_ds.monitor.sinks import SINKS, SinkInfo
from megatron_ds.monitor.trackers.tracker import MAX_WAITING, Tracker
from megatron_ds.monitor.trackers.values import Line
from megatron_ds.untrusted import read_lines
from megatron_ds.untrusted.limits import RUN_LINE

STEP = "step"


@SINKS.register("csv")
class Csv(Tracker):
    """Writer of a table with a row for each line and a column for each name; what a line lacks is empty.

    A name that appears later adds a column, and the file is written again. A new run keeps the file of an earlier one
    as `metrics.<n>.csv`; a resumed run removes the rows after its checkpoint.

    Args:
        info: the run.
        file: name of the file in the run's output.
    """

    rewinds: ClassVar[bool] = True

    def __init__(self, info: SinkInfo, *, file: str = "metrics.csv") -> None:
        self._path = info.output / file
        self._names: list[str] = [STEP]
        if self._path.exists() and info.continue_after is None:
            self._path.rename(archive_name(self._path))
        elif self._path.exists():
            assert info.continue_after is not None
            self._rewind(info.continue_after)
        self._file, self._unwritten = LineFile(self._path), deque[Line]()
        self._path.touch()
        super().__init__(info, file)

    def log(self, line: Line) -> None:
        """Append a row; on a full disk it waits for room, and those after it too."""
        self._unwritten.append(line)
        try:
            self._write_waiting()
        except OSError as problem:
            if len(self._unwritten) > MAX_WAITING:
                raise
            if len(self._unwritten) == 1:
                get_logger().warning("%s waits for room (%s)", self._path, problem.strerror or problem)

    def finish(self) -> None:
        """Close the file."""
        try:
            self._write_waiting()
        finally:
            self._file.close()

    def _write_waiting(self) -> None:
        while self._unwritten:
            self._write(self._unwritten[0])
            self._unwritten.popleft()

    def _write(self, line: Line) -> None:
        new = [name for name in line.values if name not in self._names]
        if new:
            self._file.write_waiting()
            if self._file.num_waiting:
                raise OSError(self._file.reason)
            self._file.close()
            self._replace([*self._names, *new], _read(self._path)[1])
            self._names += new
            self._file = LineFile(self._path)
        row = io.StringIO()
        csv.DictWriter(row, self._names).writerow({STEP: line.step, **line.values})
        self._file.add(row.getvalue())

    def _rewind(self, step: int) -> None:
        """Remove the rows after a step. A file that a crash has damaged is kept under another name."""
        try:
            self._names, rows = _read(self._path)
        except DataError as problem:
            self._path.rename(archive_name(self._path))
            get_logger().warning("%s; a new one is begun", problem)
        else:
            self._replace(self._names, [row for row in rows if _step_of(row) <= step])

    def _replace(self, names: list[str], rows: list[dict[str, Any]]) -> None:
        with replacing(self._path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, extrasaction="ignore")  # a damaged row may have more values
            writer.writeheader()
            writer.writerows(rows)


def _step_of(row: dict[str, Any]) -> float:
    """Return the step of a row; infinity if a crash has damaged it, so that it is left out."""
    try:
        return int(row[STEP])
    except (ValueError, TypeError, KeyError):
        return math.inf


def _read(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the names of the columns and the complete rows; a row torn by a crash is left out."""
    try:
        lines = [line.decode("utf-8") for line in read_lines(path, RUN_LINE, DataError) if line.endswith(b"\n")]
        reader = csv.DictReader("".join(lines).splitlines())
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as problem:
        raise DataError(f"{path} is no table of a run ({problem}); move it away") from problem
    names = list(reader.fieldnames or [STEP])
    if STEP not in names:
        raise DataError(f"{path} is no table of a run (it has no column {STEP}); move it away")
    return names, rows
