"""docs/run_file.md names every key of the run file, no other, with the default that the code has."""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_ds.config.run_config import RunConfig
from megatron_ds.config.unknown_keys import _models_in

ROOT = Path(__file__).parents[2]


def fields_of(model: Any, prefix: str = "") -> dict[str, FieldInfo]:
    """Dotted key -> field, of the leaves: fields that are not sections themselves."""
    leaves: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        inner = [fields_of(section, f"{prefix}{name}.") for section in _models_in(field.annotation)]
        if not inner or str(field.annotation).startswith("list"):
            leaves[f"{prefix}{name}"] = field
        for section in inner:
            leaves.update(section)
    return leaves


def default_words(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "none"
    return str(list(field.default) if isinstance(field.default, tuple) else field.default)


def test_every_key_stands_there_once_with_its_default() -> None:
    text = (ROOT / "docs/run_file.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z0-9_.]+)` \| ([^|]+) \|", text, re.MULTILINE)
    assert len(rows) == len({key for key, _ in rows}), "a key stands there twice"
    written = {key: words.strip().strip("`") for key, words in rows}
    fields = fields_of(RunConfig)
    assert set(written) == set(fields)
    for key, field in fields.items():
        expected = default_words(field)
        assert yaml.safe_load(written[key].lower()) == yaml.safe_load(expected.lower()), key
