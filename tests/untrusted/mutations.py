"""Seeded mutations of a file: its bytes, the structure and the types of its JSON, and the file itself.

The same seed always gives the same mutation, so that a reader which fails at one is tested with it for ever.
"""

import copy
import json
import os
import random
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

FileMutation = Callable[[Path], None]
MARKER = "@raw@"
"""A text of which the JSON is replaced by what follows, which no value of Python stands for."""

ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    7,
    1.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    2**31,
    2**63 - 1,
    2**63,
    10**18,
    10**30,
    "",
    "x",
    "0",
    "true",
    " ",
    "a\0b",
    "\x1b[2J",
    "\u202e",
    "é" * 50,
    "x" * 5000,
    "../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "a/../b",
    "https://127.0.0.1:9/x",
    "s3://bucket/x",
    "os.system",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    [],
    {},
    [[]],
    [None],
    ["a", 1],
    [1, "a"],
    [-1],
    [2**40],
    {"": 0},
    {"a": {"b": None}},
    {"__class__": "x"},
    MARKER + "[" * 100_000 + "]" * 100_000,
    MARKER + "[" * 500,
    MARKER + '{"a":' * 300 + "0" + "}" * 300,
    MARKER + "9" * 5000,
    MARKER + "1e400",
    MARKER + "-",
    MARKER + "NaN",
    MARKER + '"\\ud800"',
    MARKER + '"\\u0000"',
    MARKER + "[" + "0," * 300_000 + "0]",
    MARKER + "0.1" + "1" * 100_000,
    MARKER + '{"a": 1, "a": 2}',
)
ODD_BYTES = (
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b"\n",
    b"\r\n",
    b"\\",
    b"-",
    b"9" * 400,
)


def mutate(path: Path, seed: random.Random, *, is_json: bool, without: Collection[FileMutation] = ()) -> None:
    """Change a file that exists by one mutation, chosen by `seed`; it is removed in place of those `without`."""
    if seed.random() < 0.08:
        how = seed.choice(FILE_MUTATIONS)
        (Path.unlink if how in without else how)(path)
        return
    content = path.read_bytes()
    changed = content
    for _ in range(20):  # some change nothing: a byte is replaced by itself
        in_structure = is_json and seed.random() < 0.75
        changed = mutated_json(content, seed) if in_structure else seed.choice(BYTE_MUTATIONS)(content, seed)
        if changed != content:
            break
    path.write_bytes(changed)


# ---- bytes -----------------------------------------------------------------------------------------------------------


def _place(content: bytes, seed: random.Random) -> int:
    """Return a place in a content, most often near its start, where headers are."""
    end = len(content) if seed.random() < 0.5 else min(len(content), 200)
    return seed.randrange(end + 1)


def _flip(content: bytes, seed: random.Random) -> bytes:
    if not content:
        return b"\0"
    changed = bytearray(content)
    for _ in range(seed.choice((1, 1, 1, 4, 30))):
        changed[min(_place(content, seed), len(content) - 1)] ^= 1 << seed.randrange(8)
    return bytes(changed)


def _insert(content: bytes, seed: random.Random) -> bytes:
    at = _place(content, seed)
    return content[:at] + seed.choice((*ODD_BYTES, seed.randbytes(9))) + content[at:]


def _overwrite(content: bytes, seed: random.Random) -> bytes:
    at, new = _place(content, seed), seed.choice((*ODD_BYTES, b"\xff" * 8, bytes(8), seed.randbytes(8)))
    return content[:at] + new + content[at + len(new) :]


def _cut(content: bytes, seed: random.Random) -> bytes:
    start = _place(content, seed)
    return content[:start] + content[start + seed.choice((1, 1, 8, 100, len(content))) :]


def _repeat(content: bytes, seed: random.Random) -> bytes:
    start = _place(content, seed)
    part = content[start : start + seed.choice((1, 10, 100, 1000))]
    return content[:start] + part * seed.choice((2, 3, 500)) + content[start:]


def _new(content: bytes, seed: random.Random) -> bytes:
    return seed.choice((b"", b"\0" * 100, seed.randbytes(200), b"[" * 10**5, b"{}", b"[]", b"null", b'"a"', b"a: *b"))


BYTE_MUTATIONS = (_flip, _flip, _insert, _overwrite, _cut, _repeat, _new)

# ---- JSON ------------------------------------------------------------------------------------------------------------


def mutated_json(content: bytes, seed: random.Random) -> bytes:
    """Change one value or key of a JSON text, or of a line of several; other bytes stay as they are."""
    text = content.decode()
    lines = text.splitlines(keepends=True)
    one = seed.randrange(len(lines)) if len(lines) > 1 and _is_json(lines[0]) else None
    value = json.loads(text if one is None else lines[one])
    changed = json.dumps(_changed(copy.deepcopy(value), seed))
    for odd in ODD_VALUES:
        if isinstance(odd, str) and odd.startswith(MARKER):
            changed = changed.replace(json.dumps(odd), odd.removeprefix(MARKER))
    if one is None:
        return changed.encode()
    return "".join([*lines[:one], changed + "\n", *lines[one + 1 :]]).encode()


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of every value in a value."""
    found: list[tuple[Any, Any]] = []
    unseen = [value]
    while unseen:
        one = unseen.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        found += [(one, key) for key in keys]
        unseen += [one[key] for key in keys]
    return found


def _changed(value: Any, seed: random.Random) -> Any:
    places = _places(value)
    if not places or seed.random() < 0.03:
        return seed.choice(ODD_VALUES)
    container, key = seed.choice(places)
    seed.choice(JSON_MUTATIONS)(container, key, places, seed)
    return value


def _set_odd(container: Any, key: Any, places: Any, seed: random.Random) -> None:
    container[key] = seed.choice(ODD_VALUES)


def _other_type(container: Any, key: Any, places: Any, seed: random.Random) -> None:
    value = container[key]
    container[key] = seed.choice(
        (str(value), [value], {"a": value}, {str(value)[:50]: value}, [value] * 1000, not value)
    )


def _other_number(container: Any, key: Any, places: Any, seed: random.Random) -> None:
    value = container[key] if isinstance(container[key], int | float) else 1
    container[key] = seed.choice((value + 1, value - 1, -value, value * 1000, value * 10**9, value + 0.5, float(value)))


def _remove(container: Any, key: Any, places: Any, seed: random.Random) -> None:
    del container[key]


def _rename(container: Any, key: Any, places: Any, seed: random.Random) -> None:
    if isinstance(container, dict):
        name = seed.choice((key + "x", key.upper(), "", "../" + key, "a\0b", "x" * 5000, "__class__"))
        container[name] = container.pop(key)
    else:
        container.append(copy.deepcopy(container[key]))


def _swap(container: Any, key: Any, places: Any, seed: random.Random) -> None:
    other, other_key = seed.choice(places)
    one, two = copy.deepcopy(container[key]), copy.deepcopy(other[other_key])
    other[other_key], container[key] = one, two


JSON_MUTATIONS: tuple[Callable[[Any, Any, Any, random.Random], None], ...] = (
    _set_odd,
    _set_odd,
    _set_odd,
    _other_type,
    _other_number,
    _remove,
    _rename,
    _swap,
)

# ---- the file itself -------------------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _linked(target: str) -> Callable[[Path], None]:
    def link(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return link


def sparse(path: Path) -> None:
    os.truncate(path, 1 << 40)


FILE_MUTATIONS: tuple[FileMutation, ...] = (
    pipe,
    _directory,
    _linked("/dev/zero"),
    _linked("/etc/hostname"),
    _linked("gone"),
    Path.unlink,
    sparse,
)
