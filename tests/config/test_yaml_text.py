"""Plain text of YAML means what its readers take it for, and what is written is read back as it was."""

import random
import time
from typing import Any

import pytest
import yaml

from megatron_ds.config.yaml_text import format_yaml, parse_yaml
from megatron_ds.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("010", 10),  # YAML 1.1: 8
        ("-08", -8),
        ("+1", 1),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", 1000),
        ("12_345_678", 12345678),
        ("1_000.5", 1000.5),
        (".5", 0.5),
        ("1.", 1.0),
        ("1e3", 1000.0),
        ("1.0e3", 1000.0),
        ("-3.E-4", -3e-4),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        ("~", None),
        ("null", None),
        ("", None),
        ("true", True),
        ("FALSE", False),
        *((word, word) for word in ("yes", "No", "ON", "off", "y", "n", "truE", "nULL")),  # YAML 1.1: booleans
        *((word, word) for word in ("1:30", "3:50:00", "190:20:30.15", "1:2")),  # YAML 1.1: numbers of base 60
        *((word, word) for word in ("2024-07-26", "2001-12-14t21:59:43.10-05:00")),  # YAML 1.1: dates
        *(
            (word, word)
            for word in ("0b11", "2024_07", "1_0", "_1", "1__000", "0o8", "0x", "1e", ".", "1.2.3", "1,000")
        ),
        *((word, word) for word in ("inf", "nan", "=", "3,0e-4", "10%", "5k", "١٢")),
    ],
)
def test_plain_scalars(text: str, expected: Any) -> None:
    found = parse_yaml(text, "x")
    assert found == expected and type(found) is type(expected)
    assert parse_yaml(f"{{a: {text}}}" if "," not in text else f"a: {text}", "x") == {"a": expected}


@pytest.mark.parametrize(
    "text", ["010", "1:30", "no", "2024-07-26", "3e-4", "~", "true", "1_000", "0x10", "=", "<<", ""]
)
def test_quotes_make_text(text: str) -> None:
    assert parse_yaml(f"'{text}'", "x") == text == parse_yaml(f'"{text}"', "x")


def test_texts_are_written_so_that_every_reader_takes_them_for_text() -> None:
    """Also a reader of YAML 1.1, for whom `no` is false."""
    generator = random.Random(3)
    letters = "0123456789_.:+-eExo~=<>n TtrueFfalsNyYIf,#&*!%@`'\"{}[]\n\t é|?"
    texts = ["".join(generator.choices(letters, k=generator.randrange(8))) for _ in range(4000)]
    texts += ["no", "on", "1:30", "010", "0o7", "2024-07-26", "<<", "=", "~", "1e3", "1_000", "0b1", "null", "٣"]
    mapping = {"texts": texts, "keys": dict.fromkeys(texts, 1)}
    written = format_yaml(mapping)
    assert parse_yaml(written, "x") == mapping == yaml.safe_load(written)


def test_numbers_are_written_so_that_they_stay() -> None:
    generator = random.Random(4)
    numbers: list[Any] = [generator.uniform(-1, 1) * 10.0 ** generator.randrange(-320, 300) for _ in range(500)]
    numbers += [generator.randrange(-(10**20), 10**20) for _ in range(200)] + [
        0,
        0.0,
        1.0,
        1e22,
        float("inf"),
        True,
        None,
    ]
    found = parse_yaml(format_yaml({"numbers": numbers}), "x")["numbers"]
    assert found == numbers and [type(one) for one in found] == [type(one) for one in numbers]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {lr: 3,0e-4, c: 2}", "x line 2: lr: 3,0e-4 has a decimal comma; write 3.0e-4"),
        ("{lr: 0,5}", "x line 1: lr: 0,5 has a decimal comma; write 0.5"),
        ("a: 1\n\tb: 2", "found character '\\t' that cannot start any token; indent with spaces instead of tabs"),
        ("a:\n\tb: 2", "found character '\\t' that cannot start any token; indent with spaces instead of tabs"),
        ("? [a]\n: 1", "x line 1: not valid YAML: found unhashable key"),
        (
            "a: *.txt",
            "x line 1: not valid YAML: expected alphabetic or numeric character, but found '.'; a text that begin",
        ),
        ("a: *b", "found undefined alias 'b'; a text that begins with * or & needs quotes"),
        ("a: @b", "found character '@' that cannot start any token; put the text in quotes"),
        (
            "a: b: c",
            "mapping values are not allowed here; indent keys of a section alike; a text with a colon",
        ),
        ('a: "b', "found unexpected end of stream; a quote is not closed"),
        (
            "a: 1\nb:2\nc: 3",
            "x line 2: not valid YAML: could not find expected ':'; write key: value, with a space after the colon",
        ),
        (
            "a: 1\nb = 2\n",
            "x line 2: not valid YAML: could not find expected ':'; write key: value, with a space after the colon",
        ),
        (
            "a: {b: 1\nc: 2",
            "x line 2: not valid YAML: expected ',' or '}', but got ':'; close each { and [, and quote texts that hold "
            "one of them",
        ),
        (
            'a: "C:\\Users"',
            "x line 1: not valid YAML: expected escape sequence of 8 hexadecimal numbers, but found 's'; a text with a "
            "backslash needs single quotes: 'C:\\data'",
        ),
        ("a: 1\n---\nb: 2", "x line 2: not valid YAML: but found another document; keep one document"),
        ("a: \0", "x: character 3 is not text; is it a YAML file?"),
        ("a: " + "[" * 5000, "x line 1: not valid YAML: nested deeper than 64 levels"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_yaml(text, "x")
    assert message in str(refused.value)


def test_a_comma_with_a_space_is_none_of_a_number() -> None:
    assert parse_yaml("{a: 3, 0: x, 4: y}", "x") == {"a": 3, 0: "x", 4: "y"}
    assert parse_yaml("{a: 3,4: x}", "x") == {"a": 3, 4: "x"}
    assert parse_yaml("[0,9, 0,95]", "x") == [0, 9, 0, 95]


def laughs(values: int) -> str:
    """Return lines of which each repeats the one before ten times; written out they are 10^values texts."""
    lines = [f"z{i}: &z{i} [{','.join([f'*z{i - 1}'] * 10)}]" for i in range(1, values)]
    return "\n".join(["z0: &z0 [text]", *lines])


def merges(values: int) -> str:
    lines = [f"z{i}: &z{i} {{<<: [{','.join([f'*z{i - 1}'] * 10)}], k{i}: 1}}" for i in range(1, values)]
    return "\n".join(["z0: &z0 {a: 1}", *lines])


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (laughs(10), "with its aliases written out it has more than 50,000 values"),
        (merges(10), "with its aliases written out it has more than 50,000 values"),
        (f"a: &a {'x' * 9_000}\nb: [{','.join(['*a'] * 200)}]", "1,048,576 characters"),
        ("\n".join(["z0: &z0 1", *(f"z{i}: &z{i} [*z{i - 1}]" for i in range(1, 3000))]), "or 64 levels"),
        ("a: &a [*a]", "an alias repeats the value that it is in"),
        ("a: &a {b: *a}", "an alias repeats the value that it is in"),
        ("a: &a {<<: *a}", "an alias repeats the value that it is in"),
        ("{a: " * 2000, "nested deeper than 64 levels"),
        ("- " * 2000, "nested deeper than 64 levels"),
        (f"[{'1,' * 60_000}]", "more than 50,000 values"),
        (f"a: 0x{'f' * 10**5}", "is larger than an integer may be"),
        (f"a: {'9' * 10**5}", "is larger than an integer may be"),
        ("a: !!bool maybe", "maybe is neither true nor false"),
        ("a: !!timestamp x", "could not determine a constructor"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("!!binary a: 1", "could not determine a constructor"),
        ("a: !!int ''", "not valid YAML"),
    ],
    ids=range(17),
)
def test_no_text_takes_more_than_the_limits(text: str, rule: str) -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError) as refused:
        parse_yaml(text, "x")
    assert rule in str(refused.value) and len(str(refused.value)) < 400, str(refused.value)
    assert time.monotonic() - start < 15


def test_aliases_and_merges_within_the_limits() -> None:
    text = "base: &base {a: 1, b: [2, 3]}\nmore: {<<: *base, c: *base}\n" + laughs(4).replace("z", "y")
    found = parse_yaml(text, "x")
    assert found["more"] == {"a": 1, "b": [2, 3], "c": {"a": 1, "b": [2, 3]}}
    assert len(found["y3"]) == 10
