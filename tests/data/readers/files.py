"""Files of the same rows in every form that the readers take."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import zstandard

Rows = Sequence[Mapping[str, Any]]
BOM = b"\xef\xbb\xbf"


def json_lines(rows: Rows, end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def json_array(rows: Rows, **options: Any) -> bytes:
    return json.dumps(rows, ensure_ascii=False, **options).encode()


def with_delimiter(rows: Rows, delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(
        {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()} for row in rows
    )
    return text.getvalue().encode()


def parquet(rows: Rows) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), sink, row_group_size=2)
    return sink.getvalue()


def arrow(rows: Rows, new: Callable[..., Any]) -> bytes:
    table, sink = pa.Table.from_pylist(list(rows)), io.BytesIO()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


FORMS: dict[str, Callable[[Rows], bytes]] = {
    "lines.jsonl": json_lines,
    "lines.json": json_lines,
    "lines.ndjson": json_lines,
    "lines": json_lines,
    "bom.jsonl": lambda rows: BOM + json_lines(rows),
    "bom_on_each_line.jsonl": lambda rows: b"".join(BOM + json_lines([row]) for row in rows),
    "crlf.jsonl": lambda rows: json_lines(rows, "\r\n"),
    "blank.jsonl": lambda rows: b"\n \n" + json_lines(rows, "\n\n \r\n"),
    "no_end.jsonl": lambda rows: json_lines(rows).rstrip(),
    "array.json": json_array,
    "array.jsonl": json_array,
    "pretty.json": lambda rows: json_array(rows, indent=2),
    "bom.json": lambda rows: BOM + json_array(rows, indent=1),
    "crlf.json": lambda rows: json_array(rows, indent=4).replace(b"\n", b"\r\n"),
    "row_a_line.json": lambda rows: b"[\n" + b",\n".join(json_lines([row]).strip() for row in rows) + b"\n]\n",
    "row_a_line_2.json": lambda rows: b"[" + b",\n".join(json_lines([row]).strip() for row in rows) + b"]",
    "wrapped.json": lambda rows: json.dumps({"version": "1.1", "n": 3, "data": rows}, ensure_ascii=False).encode(),
    "wrapped_pretty.json": lambda rows: json.dumps({"data": rows, "note": [1, 2]}, indent=2).encode(),
    "pretty_objects.json": lambda rows: b"\n".join(json.dumps(row, indent=2).encode() for row in rows),
    "a.csv": with_delimiter,
    "bom.csv": lambda rows: BOM + with_delimiter(rows),
    "semicolons.csv": lambda rows: with_delimiter(rows, ";"),
    "a.tsv": lambda rows: with_delimiter(rows, "\t"),
    "tabs.csv": lambda rows: with_delimiter(rows, "\t"),
    "a.parquet": parquet,
    "parquet.json": parquet,
    "file.arrow": lambda rows: arrow(rows, pa.ipc.new_file),
    "stream.arrow": lambda rows: arrow(rows, pa.ipc.new_stream),
}

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def every_file(rows: Rows) -> dict[str, bytes]:
    """Return the content of a file of each form, plain and compressed, by name."""
    plain = {name: form(rows) for name, form in FORMS.items()}
    chosen = ("lines.jsonl", "pretty.json", "a.csv", "a.tsv", "a.parquet", "file.arrow", "stream.arrow")
    packed = {f"{name}{ending}": compress(plain[name]) for name in chosen for ending, compress in COMPRESSIONS.items()}
    renamed = {"not_packed.jsonl.gz": plain["lines.jsonl"], "packed.jsonl": gzip.compress(plain["lines.jsonl"])}
    halves = [json_lines(rows[:1]), json_lines(rows[1:])]
    members = {f"two{ending}": b"".join(map(COMPRESSIONS[ending], halves)) for ending in COMPRESSIONS}
    return plain | packed | renamed | {f"members.jsonl{ending[3:]}": raw for ending, raw in members.items()}
