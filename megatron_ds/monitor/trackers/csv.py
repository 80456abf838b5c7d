"""A table of comma-separated values, for spreadsheets and pandas."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, ClassVar

from megatron_ds.atomic import replacing
from megatron_ds.errors import DataError
from megatron_ds.monitor.metrics import archive_name
from megatron_ds.monitor.sinks import SINKS, SinkInfo
from megatron_ds.monitor.trackers.tracker import Tracker
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
            self._names, rows = _read(self._path)
            assert info.continue_after is not None
            self._replace([row for row in rows if int(row[STEP]) <= info.continue_after])
        self._file = self._path.open("a", newline="", encoding="utf-8")
        super().__init__(info, file)

    def log(self, line: Line) -> None:
        """Append a row and flush it."""
        new = [name for name in line.values if name not in self._names]
        if new:
            self._file.close()
            rows = _read(self._path)[1]
            self._names += new
            self._replace(rows)
            self._file = self._path.open("a", newline="", encoding="utf-8")
        csv.DictWriter(self._file, self._names).writerow({STEP: line.step, **line.values})
        self._file.flush()

    def finish(self) -> None:
        """Close the file."""
        self._file.close()

    def _replace(self, rows: list[dict[str, Any]]) -> None:
        with replacing(self._path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._names)
            writer.writeheader()
            writer.writerows(rows)


def _read(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the names of the columns and the complete rows; a row torn by a crash is left out."""
    try:
        lines = [line.decode("utf-8") for line in read_lines(path, RUN_LINE, DataError) if line.endswith(b"\n")]
        reader = csv.DictReader("".join(lines).splitlines())
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as problem:
        raise DataError(f"{path} is no table of a run ({problem}); move it away") from problem
    return list(reader.fieldnames or [STEP]), rows
