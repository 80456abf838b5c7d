"""Rows of files with columns: CSV, parquet and Arrow, and of tables of `datasets`."""

import csv
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from megatron_ds.data.readers.file_kinds import BOM, DataFile
from megatron_ds.data.readers.row import Row
from megatron_ds.errors import DataError
from megatron_ds.untrusted.limits import ROW

if TYPE_CHECKING:
    import datasets
    import pyarrow

ROWS = 256
"""Number of rows of a table that are in memory at a time."""


def csv_rows(file: DataFile) -> Iterator[Row]:
    """Yield the rows of a CSV file with a header. All values are texts; nothing is taken for a missing value."""
    csv.field_size_limit(ROW.max_bytes)  # documents are longer than the 128 KiB that the module allows
    with file.open() as stream, io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="") as text:
        reader, line = csv.reader(_lines(text, file), delimiter=_delimiter(file), strict=True), 0
        header: Sequence[str] = ()
        try:
            for values in reader:
                where, line = f"{file.path}:{line + 1}", reader.line_num
                if not header:
                    header = _header(values, where)
                elif values:  # a blank line has none
                    yield Row(where, partial(_csv_columns, header, values, where))
        except csv.Error as error:
            raise DataError(
                f"data: {file.path}:{line + 1}: not CSV ({error}); double the quotes inside of a quoted field"
            ) from error


def _lines(text: io.TextIOWrapper, file: DataFile) -> Iterator[str]:
    for number, line in enumerate(iter(partial(text.readline, ROW.max_bytes + 1), ""), 1):
        if len(line) > ROW.max_bytes:
            raise DataError(f"data: {file.path}:{number}: longer than {ROW.max_bytes:,} characters; {ROW.fix}")
        yield line


def _header(names: Sequence[str], where: str) -> Sequence[str]:
    if len(set(names)) < len(names):
        raise DataError(f"data: {where}: two columns have the same name; rename one")
    return names


def _delimiter(file: DataFile) -> str:
    """Return the character between the fields of the header: a comma, unless it has none but tabs or semicolons."""
    header = file.head.removeprefix(BOM).partition(b"\n")[0]
    named = "\t" if file.identity.startswith(".tsv") else ","
    return next((mark for mark in (named, ",", "\t", ";") if mark.encode() in header), named)


def _csv_columns(header: Sequence[str], values: Sequence[str], where: str) -> Mapping[str, Any]:
    if len(values) != len(header):
        raise DataError(f"data: {where}: holds {len(values)} fields, but the header has {len(header)}")
    try:
        "".join(values).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"data: {where}: not UTF-8; convert the file to UTF-8") from error
    return dict(zip(header, values))


def parquet_rows(file: DataFile, only: Collection[str] | None) -> Iterator[Row]:
    """Yield the rows of a parquet file; of its columns, those in `only` (None = all)."""
    import pyarrow.parquet

    with file.open_seekable() as stream:
        table = pyarrow.parquet.ParquetFile(stream)
        names = _chosen(table.schema_arrow.names, only)
        yield from _rows_of(table.iter_batches(ROWS, columns=names), str(file.path))


def arrow_rows(file: DataFile, only: Collection[str] | None) -> Iterator[Row]:
    """Yield the rows of an Arrow file, or of an Arrow stream, as `datasets` writes; of its columns, those in `only`."""
    import pyarrow

    with file.open_seekable() as stream:
        if file.head.startswith(b"ARROW1"):
            opened = pyarrow.ipc.open_file(stream)
            batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(stream))
        yield from _rows_of((batch.select(_chosen(batch.schema.names, only)) for batch in batches), str(file.path))


def dataset_rows(table: "datasets.Dataset", name: str, only: Collection[str] | None) -> Iterator[Row]:
    """Yield the rows of a table of `datasets`; of its columns, those in `only`."""
    names = _chosen(table.column_names, only)
    row = 0
    for batch in table.select_columns(names).iter(ROWS):
        for values in zip(*batch.values()):
            yield Row(f"{name}: row {row}", partial(dict, list(zip(batch, values))))
            row += 1


class _Slice:
    """A few rows of a table, converted when the first of them is needed."""

    def __init__(self, batch: "pyarrow.RecordBatch") -> None:
        self._batch = batch

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return self._batch.to_pylist()

    def row(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def _rows_of(batches: Iterator["pyarrow.RecordBatch"], name: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS):
            part = batch.slice(start, ROWS)
            rows = _Slice(part)
            for index in range(part.num_rows):
                yield Row(f"{name}: row {number}", partial(rows.row, index))
                number += 1


def _chosen(names: Sequence[str], only: Collection[str] | None) -> list[str]:
    """Return the columns to read; all of them if none is in `only`, so that an error can name them."""
    chosen = [name for name in names if only is None or name in only]
    return chosen or list(names)
