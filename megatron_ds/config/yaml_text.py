"""YAML in which plain text is what users mean by it, a repeated key is an error, and every error names file and line.

PyYAML implements YAML 1.1, where `010` is 8, `1:30` is 90, `no` is false, `2024-07-26` is a date and `3e-4` is text.
The loader here reads plain scalars as YAML 1.2's core schema does: `010` is 10, `3e-4` is a number, and the others are
text. Digits may also be grouped by threes, as in `1_000`. The dumper quotes every text that either version reads
otherwise.
"""

import re
from typing import Any

import yaml

from megatron_ds.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
_MERGE_TAG = f"{_TAG}merge"
_DIGITS = r"(?:[0-9]{1,3}(?:_[0-9]{3})+|[0-9]+)"
_PLAIN: tuple[tuple[str, str, str], ...] = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", rf"[-+]?{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", rf"[-+]?(?:\.[0-9]+|{_DIGITS}(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
)
"""Tag, the plain scalars that have it, and their first characters; everything else is text."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads plain scalars as `_PLAIN` says."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_yaml_int(self, node: Any) -> int:
        """Read `1_000`, `010` and `-7` as decimal, `0o17` as octal and `0x1f` as hexadecimal."""
        text = self.construct_scalar(node).replace("_", "")
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def construct_yaml_float(self, node: Any) -> float:
        """Read a float; `.inf` and `.nan` have a dot in YAML and none in Python."""
        text = self.construct_scalar(node).replace("_", "").lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which `_Loader` or a reader of YAML 1.1 would not read as text; without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _PLAIN:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            _TAG + _tag, re.compile(rf"(?:{_pattern})\Z"), [*_first, *([""] if _tag == "null" else [])]
        )
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_yaml_int)
_Loader.add_constructor(f"{_TAG}float", _Loader.construct_yaml_float)


def parse_yaml(text: str, place: str) -> Any:
    """Parse the value that `text` holds; None if it is empty.

    Args:
        text: one YAML document.
        place: its name in errors, such as a file name.

    Raises:
        ConfigError: not YAML, a key is repeated in one mapping, or a number has a decimal comma; with the line.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_mappings(node, place, set())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        is_open_key = "could not find expected ':'" in (error.problem or "")  # found at the end of the next key
        mark = (error.context_mark if is_open_key else None) or error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{place}{line}: not valid YAML: {_problem(error)}") from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{place}: character {error.position} is not text; is it a YAML file?") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: not valid YAML: {' '.join(str(error).split())}") from None


_WAYS_OUT: tuple[tuple[str, str], ...] = (
    (r"character '\\t'", "indent with spaces instead of tabs"),
    (r"character '[@%`]'", "put the text in quotes"),
    (r"scanning an (alias|anchor)|undefined alias", "a text that begins with * or & needs quotes"),
    (
        r"mapping values are not allowed",
        "indent keys of a section alike; a text with a colon and a space needs quotes",
    ),
    (r"scanning a quoted scalar.*end of stream", "a quote is not closed"),
    (r"another document", "keep one document"),
    (r"could not find expected ':'", "write key: value, with a space after the colon"),
    (r"parsing a flow (mapping|sequence)", "close each { and [, and quote texts that hold one of them"),
    (r"escape (sequence|character)", "a text with a backslash needs single quotes: 'C:\\data'"),
)


def _problem(error: yaml.MarkedYAMLError) -> str:
    """Return PyYAML's problem with the way out, if it is known."""
    text = f"{error.context or ''}: {error.problem or ''}"
    fix = next((fix for pattern, fix in _WAYS_OUT if re.search(pattern, text)), "")
    return f"{error.problem or error.context}{'; ' if fix else ''}{fix}"


def _check_mappings(node: yaml.Node, place: str, visited: set[int]) -> None:
    """Refuse repeated keys and decimal commas in a node and all nodes below it."""
    if id(node) in visited:
        return
    visited.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            _check_mappings(entry, place, visited)
    if isinstance(node, yaml.MappingNode):
        _refuse_duplicates(node, place)
        _refuse_decimal_comma(node, place)
        for _, value in node.value:
            _check_mappings(value, place, visited)


def _refuse_duplicates(node: yaml.MappingNode, place: str) -> None:
    first_lines: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_TAG:
            line = key.start_mark.line + 1
            if key.value in first_lines:
                first = first_lines[key.value]
                raise ConfigError(f"{place} line {line}: key {key.value} was already given on line {first}; keep one")
            first_lines[key.value] = line


def _refuse_decimal_comma(node: yaml.MappingNode, place: str) -> None:
    """Refuse `{lr: 3,0e-4}`, which YAML reads as lr: 3 and a key `0e-4` without a value."""
    for (key, value), (rest, nothing) in zip(node.value, node.value[1:]):
        adjacent = node.flow_style and value.end_mark.index + 1 == rest.start_mark.index
        if adjacent and _is_plain(value, "int") and _is_plain(rest, "int", "float") and _is_plain(nothing, "null"):
            line = rest.start_mark.line + 1
            raise ConfigError(
                f"{place} line {line}: {key.value}: {value.value},{rest.value} has a decimal comma; "
                f"write {value.value}.{rest.value}"
            )


def _is_plain(node: yaml.Node, *tags: str) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag in {_TAG + tag for tag in tags}


def format_yaml(mapping: dict[str, Any]) -> str:
    """Return YAML text that `parse_yaml` reads back as an equal mapping; keys keep order, leaves are inline."""
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
