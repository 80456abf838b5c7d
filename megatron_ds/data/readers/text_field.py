"""A field that holds a text, with the errors of one that does not."""

from megatron_ds.data.readers.examples import TEXT_COLUMN, Located
from megatron_ds.data.readers.source import Source
from megatron_ds.errors import DataError


def require_text(located: Located, source: Source, field: str = TEXT_COLUMN) -> str:
    """Return the text of an example.

    Args:
        located: the example.
        source: its source, which knows the field's name in the data.
        field: our name of it.

    Raises:
        DataError: the field is missing, holds no text, or half a character.
    """
    columns, where, names = located.columns, located.where, located.names
    value, kind = columns.get(field), "column" if ": row " in where else "field"
    name = source.names_of(field)[0]
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair, which is no character
            raise DataError(
                f"data: {where}: {kind} {name!r} holds a lone surrogate at character {error.start}; remove it"
            ) from error
        return value
    if field not in columns:
        raise DataError(
            f"data: {where}: no {kind} {name!r}, only {', '.join(sorted(names)) or 'an empty object'}; name the one "
            f"that holds the text in data.columns.{field}"
        )
    raise DataError(f"data: {where}: {kind} {name!r} holds {type(value).__name__}; it must hold a string")
