"""Base class of the run file's sections, and the types of the values in them."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from megatron_ds.errors import ConfigError
from megatron_ds.paths import expand_path


def integral_float_to_int(value: Any) -> Any:
    """Return a float without a fraction, such as 1e3, as an integer, and any other value unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def expand_text(value: Any) -> Any:
    """Return the path that a text stands for, and any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return expand_path(value)
    except ConfigError as problem:
        raise PydanticCustomError("path", "{rule}", {"rule": str(problem)}) from None


Count = Annotated[int, BeforeValidator(integral_float_to_int), Field(ge=1)]
CountOrZero = Annotated[int, BeforeValidator(integral_float_to_int), Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(expand_text)]
"""A path; `~` and environment variables are replaced when it is read."""
PathOrMapping = Annotated[str | dict[str, Any], AfterValidator(expand_text)]


VARIANT = "variant of "
"""Begin of the tags of values that may have several types; pydantic puts them into the places of errors."""


class Section(BaseModel):
    """Base of every section: frozen, strict, no unknown keys, no infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class NamedEntry(BaseModel):
    """The name of a registered entry with its options: `name`, or `{name: ..., option: value}`."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: Text

    @property
    def options(self) -> dict[str, Any]:
        """All fields except the name."""
        return dict(self.model_extra or {})

    @property
    def plain(self) -> str | dict[str, Any]:
        """The entry as it is written in a run file."""
        return {"name": self.name, **self.options} if self.options else self.name


def _names_to_mappings(value: Any) -> Any:
    return [{"name": one} if isinstance(one, str) else one for one in value] if isinstance(value, list) else value


NamedEntries = Annotated[list[NamedEntry], BeforeValidator(_names_to_mappings)]
