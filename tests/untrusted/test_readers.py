"""Files that are no files, too large, too deep, of other types, or that name files elsewhere: one line each."""

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_ds.errors import DataError, show
from megatron_ds.untrusted import (
    Limits,
    file_inside,
    is_missing,
    parse_json,
    parse_record,
    read_bytes,
    read_lines,
    read_text,
    require_regular,
)
from megatron_ds.untrusted.limits import MODEL_SETTINGS

SMALL = Limits("a small file", "try another", 100, 4, 10, 20)


def refusal(read: Any, *arguments: Any) -> str:
    with pytest.raises(DataError) as refused:
        read(*arguments)
    message = str(refused.value)
    assert "\n" not in message and len(message) < 600, message
    return message


def special_files(folder: Path) -> dict[str, Path]:
    """Make what is no regular file; opening some of them would wait for ever."""
    os.mkfifo(folder / "pipe")
    (folder / "directory").mkdir()
    os.symlink("loop", folder / "loop")
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(os.path.relpath(folder / "socket"))
    bound.close()
    names = ("pipe", "directory", "loop", "socket")
    return {name: folder / name for name in names} | {"device": Path("/dev/zero"), "null byte": folder / "a\0b"}


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    rules = {
        "pipe": "it is a pipe, not a regular file",
        "directory": "Is a directory",
        "loop": "Too many levels of symbolic links",
        "socket": "it is a socket, not a regular file",
        "device": "it is a device, not a regular file",
        "null byte": "is not the name of a file",
    }
    for kind, path in special_files(tmp_path).items():
        for message in (
            refusal(read_bytes, path, SMALL, DataError),
            refusal(list, read_lines(path, SMALL, DataError)),
            refusal(require_regular, path, DataError),
        ):
            assert rules[kind] in message and (kind == "null byte" or str(path) in message), (kind, message)


def test_a_missing_file_is_known_as_such(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "gone", tmp_path / "file" / "below"):
        with pytest.raises(DataError, match="is missing") as refused:
            read_text(path, SMALL, DataError)
        assert is_missing(refused.value)
    with pytest.raises(DataError) as refused:
        read_text(tmp_path, SMALL, DataError)
    assert not is_missing(refused.value)


def test_size_is_limited_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 100)
    assert read_bytes(file, SMALL, DataError) == b"x" * 100
    os.truncate(file, 1 << 40)  # sparse: reading it would take all memory
    assert refusal(read_bytes, file, SMALL, DataError) == (
        f"{file} has 1,099,511,627,776 bytes, more than the 100 that a small file may have; try another"
    )
    assert f"{file}, line 1: longer than 100 bytes" in refusal(list, read_lines(file, SMALL, DataError))


def test_lines_may_be_many(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc\n" * 1000 + b"torn")
    assert list(read_lines(tmp_path / "file", SMALL, DataError)) == [b"abc\n"] * 1000 + [b"torn"]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("[" * 5 + "]" * 5, "nested deeper than the 4 levels"),
        ("{" + '"a":{' * 5 + "}" * 6, "nested deeper than the 4 levels"),
        ("[" * 40, "values, more than the 10"),
        (json.dumps([1] * 11), "11 values, more than the 10"),
        ('{"a": 1, "a": 1}', "key a is given twice in one mapping"),
        ('{"a": {"b": 1, "b": 2}}', "key b is given twice in one mapping"),
        ("[1" + "0" * 60 + "]", "is larger than an integer may be, 9223372036854775807"),
        ("[9223372036854775808]", "is larger than an integer may be"),
        ('["' + "x" * 21 + '"]', "a text of 21 characters, more than the 20"),
        ('{"' + "x" * 21 + '": 1}', "a text of 21 characters, more than the 20"),
        ('["\\ud800"]', "half of a surrogate pair"),
        (" " * 101, "longer than the 100 characters"),
        ("{", "not JSON"),
        ("\ufeff{}", "not JSON"),
        ("", "not JSON"),
    ],
)
def test_json_beyond_its_limits(text: str, rule: str) -> None:
    assert rule in refusal(parse_json, text, "x.json", SMALL, DataError)


@pytest.mark.parametrize("text", ['["[[[[[[", "\\"]]]]]"]', '["\\\\", [["{,,,,,,,,,,"]]]', "[NaN, -Infinity, 1e999]"])
def test_brackets_and_commas_in_texts_are_not_counted(text: str) -> None:
    found = parse_json(text, "x.json", SMALL, DataError)
    assert json.dumps(found) == json.dumps(json.loads(text))


@pytest.mark.parametrize("part", ["[", '"', '\\"', '"\\', "[],", '{"a":', "-", "1", '"a":1,', "\\u", "\\ud800", "1e9"])
def test_no_text_takes_long(part: str) -> None:
    """One that grows with the square of its length would take hours here."""
    start = time.monotonic()
    for text in (part * (2_000_000 // len(part)), '["' + part * (2_000_000 // len(part)) + '"]'):
        try:
            parse_json(text, "x.json", MODEL_SETTINGS, DataError)
        except DataError as problem:
            assert len(str(problem)) < 600
    assert time.monotonic() - start < 5


@dataclass(frozen=True)
class Part:
    size: int
    names: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ('{"size": "5"}', "size=5: input should be a valid integer"),
        ('{"size": 5.0}', "size=5.0: input should be a valid integer"),
        ('{"size": true}', "size=true: input should be a valid integer"),
        ('{"size": null}', "size=null: input should be a valid integer"),
        ('{"names": []}', "size is missing"),
        ('{"size": 1, "names": ["a", 1]}', "names.1=1: input should be a valid string"),
        ('{"size": 1, "names": "a"}', "names=a: input should be a valid array"),
        ("[1]", "[1]: input should be"),
    ],
)
def test_types_are_strict(text: str, rule: str) -> None:
    message = refusal(parse_record, text, "x.json", Part, SMALL, DataError)
    assert message.startswith(f"x.json: {rule}") and message.endswith("; try another"), message


def test_a_record_is_an_object_of_its_class() -> None:
    assert parse_record('{"size": 3, "names": ["a"], "later": 1}', "x", Part, SMALL, DataError) == Part(3, ("a",))


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../a", "a/../../b", "..", "a\0b", "C:\\a", "a\\b", "a\nb", "\ud800", "x" * 256, "link"]
)
def test_names_that_lead_outside(name: str, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "directory" / "link").symlink_to("../secret")
    assert "points outside the directory" in refusal(file_inside, tmp_path / "directory", name, "index: a", DataError)


def test_names_inside(tmp_path: Path) -> None:
    """A link within the directory, and one of the hub's cache, are as good as a file."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    (snapshot / "sub").mkdir(parents=True)
    (snapshot.parent.parent / "blobs").mkdir()
    (snapshot / "blob").symlink_to("../../blobs/4567")
    (snapshot / "inner").symlink_to("sub/file")
    (tmp_path / "linked").symlink_to(snapshot)
    for name in ("a", "sub/b", "blob", "inner", "..a", "a..b"):
        assert file_inside(snapshot, name, "index", DataError) == snapshot / name
    assert file_inside(tmp_path / "linked", "sub/b", "index", DataError) == tmp_path / "linked" / "sub/b"


@pytest.mark.parametrize(
    "value",
    ["\x1b[2Jx", "a\rb", "x" * 10**6, {(1, 2): 3}, {"a": {1, 2}}, 10**5000, [10**5000], ["\ud800"], "\ud800"],
    ids=range(9),
)
def test_values_in_messages_are_short_and_harmless(value: Any) -> None:
    text = show(value)
    assert len(text) <= 80 and text.isprintable() and text.encode()
