"""YAML in which plain text is what users mean by it, a repeated key is an error, and every error names file and line.

PyYAML implements YAML 1.1, where `010` is 8, `1:30` is 90, `no` is false, `2024-07-26` is a date and `3e-4` is text.
The loader here reads plain scalars as YAML 1.2's core schema does: `010` is 10, `3e-4` is a number, and the others are
text. Digits may also be grouped by threes, as in `1_000`. The dumper quotes every text that either version reads
otherwise.

A text of 1 kB can mean terabytes, because an alias repeats a value: depth and number of nodes are limited while they
are composed, and so is the number of values with each alias counted in full, before any is built.
"""

import re
from typing import Any, NamedTuple

import yaml

from megatron_ds.errors import ConfigError, show
from megatron_ds.untrusted.limits import RUN_FILE, Limits

_TAG = "tag:yaml.org,2002:"
_MERGE_TAG = f"{_TAG}merge"
_MOST_DIGITS = 40
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
_TAGS = {_TAG + name for name in ("str", "seq", "map", *(name for name, _, _ in _PLAIN))}


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads plain scalars as `_PLAIN` says, and stops at the limits of depth and of nodes."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def __init__(self, text: str, limits: Limits) -> None:
        super().__init__(text)
        self._limits, self._depth, self._num_nodes = limits, 0, 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node and all nodes below it."""
        self._depth, self._num_nodes = self._depth + 1, self._num_nodes + 1
        mark = self.peek_event().start_mark
        if self._depth > self._limits.max_depth:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {self._limits.max_depth} levels", problem_mark=mark)
        if self._num_nodes > self._limits.max_values:
            raise yaml.MarkedYAMLError(problem=f"more than {self._limits.max_values:,} values", problem_mark=mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_yaml_bool(self, node: Any) -> bool:
        """Read a truth value; the tag may be given to other text."""
        text = self.construct_scalar(node).lower()
        if text not in ("true", "false"):
            raise yaml.MarkedYAMLError(problem=f"{show(text)} is neither true nor false", problem_mark=node.start_mark)
        return text == "true"

    def construct_yaml_int(self, node: Any) -> int:
        """Read `1_000`, `010` and `-7` as decimal, `0o17` as octal and `0x1f` as hexadecimal."""
        text = self.construct_scalar(node).replace("_", "")
        value = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)) if len(text) <= _MOST_DIGITS else None
        if value is None or abs(value) > self._limits.max_integer:
            problem = f"{show(text)} is larger than an integer may be, {self._limits.max_integer}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return value

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
_Loader.add_constructor(f"{_TAG}bool", _Loader.construct_yaml_bool)
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_yaml_int)
_Loader.add_constructor(f"{_TAG}float", _Loader.construct_yaml_float)


def parse_yaml(text: str, place: str, limits: Limits = RUN_FILE) -> Any:
    """Parse the value that `text` holds; None if it is empty.

    Args:
        text: one YAML document.
        place: its name in errors, such as a file name.
        limits: of its size, with what its aliases repeat.

    Raises:
        ConfigError: not YAML, more than the limits allow, a key is repeated in one mapping, or a number has a decimal
            comma; with the line.
    """
    if len(text) > limits.max_bytes:
        raise ConfigError(f"{place}: longer than the {limits.max_bytes:,} characters that {limits.name} may have")
    try:
        loader = _Loader(text, limits)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_expanded(node, place, limits)
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


class _Extent(NamedTuple):
    """Size of a node with all aliases below it written out."""

    values: int = 1
    characters: int = 0
    depth: int = 1

    def with_child(self, child: "_Extent") -> "_Extent":
        depth = max(self.depth, child.depth + 1)
        return _Extent(self.values + child.values, self.characters + child.characters, depth)

    def is_within(self, limits: Limits) -> bool:
        within = self.values <= limits.max_values and self.characters <= limits.max_bytes
        return within and self.depth <= limits.max_depth


def _check_expanded(root: yaml.Node, place: str, limits: Limits) -> None:
    """Refuse other tags than YAML's core ones, a value that holds itself, and one that its aliases make too large."""
    extents: dict[int, _Extent | None] = {}  # by the id of the node; None = it is being measured

    def measure(node: yaml.Node) -> _Extent:
        line = f"{place} line {node.start_mark.line + 1}"
        if id(node) in extents:
            if (found := extents[id(node)]) is None:
                raise ConfigError(f"{line}: an alias repeats the value that it is in; write the value")
            return found
        if node.tag not in _TAGS:
            problem = f"could not determine a constructor for the tag {show(node.tag)}"
            raise ConfigError(f"{line}: not valid YAML: {problem}; try without it")
        extents[id(node)] = None
        extent = _Extent(characters=len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        for child in _children(node):
            extent = extent.with_child(measure(child))
        if not extent.is_within(limits):
            raise ConfigError(
                f"{line}: with its aliases written out it has more than {limits.max_values:,} values, "
                f"{limits.max_bytes:,} characters or {limits.max_depth} levels; try without aliases"
            )
        extents[id(node)] = extent
        return extent

    measure(root)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [one for pair in node.value for one in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


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
