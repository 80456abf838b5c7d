"""YAML in which `3e-4` is a number, a repeated key is an error, and every error names file and line.

PyYAML implements YAML 1.1, where `3e-4` (no dot) is text. The loader and the dumper here both know YAML 1.2's floats,
so that a dumped value is read back with the same type.
"""

import re
from typing import Any

import yaml

from megatron_ds.errors import ConfigError

_FLOAT_TAG = "tag:yaml.org,2002:float"
_MERGE_TAG = "tag:yaml.org,2002:merge"
_EXPONENT_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 floats."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which `_Loader` would read as a float, and never writes anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.add_implicit_resolver(_FLOAT_TAG, _EXPONENT_FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver(_FLOAT_TAG, _EXPONENT_FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, place: str) -> Any:
    """Parse the value that `text` holds; None if it is empty.

    Args:
        text: one YAML document.
        place: its name in errors, such as a file name.

    Raises:
        ConfigError: not YAML, or a key is repeated in one mapping; with the line.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _refuse_duplicates(node, place, set())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{place}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{place}: not valid YAML: {' '.join(str(error).split())}") from None


def _refuse_duplicates(node: yaml.Node, place: str, visited: set[int]) -> None:
    if id(node) in visited:
        return
    visited.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            _refuse_duplicates(entry, place, visited)
    if not isinstance(node, yaml.MappingNode):
        return
    first_lines: dict[str, int] = {}
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_TAG:
            line = key.start_mark.line + 1
            if key.value in first_lines:
                first = first_lines[key.value]
                raise ConfigError(f"{place} line {line}: key {key.value} was already given on line {first}; keep one")
            first_lines[key.value] = line
        _refuse_duplicates(value, place, visited)


def format_yaml(mapping: dict[str, Any]) -> str:
    """Return YAML text that `parse_yaml` reads back as an equal mapping; keys keep order, leaves are inline."""
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
