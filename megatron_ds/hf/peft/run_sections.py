"""Sections of the run file that are saved with adapters, in files of their own, which peft does not read."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from megatron_ds.config.schema_base import Section
from megatron_ds.errors import ConfigError, ConversionError
from megatron_ds.hf.config import read_json

Saved = TypeVar("Saved", bound=Section)


def read_section(file: Path, section: type[Saved]) -> Saved | None:
    """Read a section from its file; None = there is no such file.

    Raises:
        ConversionError: the file is damaged.
    """
    if not file.is_file():
        return None
    fields = read_json(file)
    try:
        return section.model_validate(fields)
    except (ValidationError, ConfigError) as problem:
        raise ConversionError(
            f"{file}: is damaged: {' '.join(str(problem).split())}; try to export it again"
        ) from problem
