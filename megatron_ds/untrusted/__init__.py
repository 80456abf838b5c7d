"""Files that others may have written, read within limits.

A model from the internet, a checkpoint on a shared disk, or a run file from a colleague can hold anything: a pipe that
never ends, lists nested a hundred thousand deep, aliases that expand to terabytes, a number of a million digits, a path
to another user's files. Each reader here opens regular files only, reads at most as much as `limits` allows for such a
file, checks types, and raises one error of this package in one line. Nothing in a file is executed.
"""

from megatron_ds.untrusted.files import is_missing, read_bytes, read_lines, read_text, require_regular
from megatron_ds.untrusted.json_text import parse_json, read_json
from megatron_ds.untrusted.limits import Limits
from megatron_ds.untrusted.names import file_inside
from megatron_ds.untrusted.records import check_record, parse_record, read_complete_lines, read_record

__all__ = [
    "Limits",
    "check_record",
    "file_inside",
    "is_missing",
    "parse_json",
    "parse_record",
    "read_bytes",
    "read_complete_lines",
    "read_json",
    "read_lines",
    "read_record",
    "read_text",
    "require_regular",
]
