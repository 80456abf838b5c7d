"""JSON files whose values have the types of a class: pydantic checks them, and converts nothing.

A text is no number, 1 is not true and 5.0 is not 5. A float may be written without a point. Keys that the class does
not have are ignored, so that older versions read the files of newer ones, unless the class forbids them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from megatron_ds.errors import show
from megatron_ds.untrusted.files import ErrorType, read_lines
from megatron_ds.untrusted.json_text import json_text, parse_json, read_json_text
from megatron_ds.untrusted.limits import Limits

T = TypeVar("T")


class Record(BaseModel):
    """Base of the classes that describe files; a dataclass or a plain type serves as well."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


def read_record(path: Path, model: type[T], limits: Limits, error: ErrorType) -> T:
    """Return the content of a JSON file as an object of a class, with the types of its fields.

    Raises:
        error: the file cannot be read (`read_bytes`), or see `parse_record`.
    """
    return parse_record(read_json_text(path, limits, error), str(path), model, limits, error)


def parse_record(text: str, place: str, model: type[T], limits: Limits, error: ErrorType) -> T:
    """Return a JSON text as an object of a class.

    Args:
        text: the text.
        place: its name in errors, such as a file name.
        model: a pydantic model, a dataclass, or a type such as `dict[str, str]`.
        limits: of the kind of file.
        error: the type of the error.

    Raises:
        error: not JSON within the limits, or a field is missing or has another type.
    """
    parse_json(text, place, limits, error)  # finds repeated keys and numbers that are too long, which pydantic does not
    try:
        return _adapter(model).validate_json(text, strict=True)
    except ValidationError as problem:
        raise error(f"{place}: {explain_first(problem)}; {limits.fix}") from problem


def read_complete_lines(path: Path, model: type[T], limits: Limits, error: ErrorType) -> tuple[list[T], int]:
    """Return the objects in the lines of a file, and the number of lines that hold none.

    A last line without an end was torn by a crash, or is being written: it is neither.

    Raises:
        error: the file cannot be read, or a line is too long (`read_lines`).
    """
    found: list[T] = []
    num_damaged = 0
    for number, line in enumerate(read_lines(path, limits, error), 1):
        if line.endswith(b"\n"):
            try:
                place = f"{path}, line {number}"
                found.append(parse_record(json_text(line, place, error), place, model, limits, error))
            except error:
                num_damaged += 1
    return found, num_damaged


def check_record(value: Any, place: str, model: type[T], limits: Limits, error: ErrorType) -> T:
    """Return a value that `parse_json` gave as an object of a class; see `parse_record`. A tuple needs a list there."""
    try:
        return _adapter(model).validate_python(value, strict=True)
    except ValidationError as problem:
        raise error(f"{place}: {explain_first(problem)}; {limits.fix}") from problem


def explain_first(problem: ValidationError) -> str:
    """Return the first of pydantic's errors as field, value and rule."""
    first = problem.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    rule = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] == "missing":
        return f"{show(field)} is missing"
    return f"{show(field)}={show(first['input'])}: {rule}" if field else f"{show(first['input'])}: {rule}"


def _adapter(model: Any) -> TypeAdapter[Any]:
    return _built(model)


@cache
def _built(model: Any) -> TypeAdapter[Any]:
    return TypeAdapter(model)
