"""Names that a table of `datasets` has for the numbers of its classes, against those of the model.

Numbers in the order of the table would silently be other classes of the model.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ds.data.objective import Labelled
from megatron_ds.data.readers.sources import FoundSource, Table
from megatron_ds.errors import DataError, show
from megatron_ds.log import get_logger

_FIELDS = ("label", "labels", "tags")


def check_table_classes(found: FoundSource, objective: Labelled) -> None:
    """Check that a table numbers its classes as the model does; log the names if they are others.

    Raises:
        DataError: both have the same names in another order.
    """
    if objective.problem == "regression":
        return
    for part in found.parts:
        if not isinstance(part, Table):
            continue
        for field in _FIELDS:
            names = _class_names(part, found.source.names_of(field)[0])
            if names is None or tuple(names) == objective.classes:
                continue
            theirs, ours = show(", ".join(names)), show(", ".join(objective.classes))
            if sorted(names) == sorted(objective.classes):
                raise DataError(
                    f"data: {part.name}: the numbers of its field {field} are {theirs}, and those of the model {ours}; "
                    f"try model.head={{labels: [{', '.join(names)}]}}, or rows with names instead of numbers"
                )
            get_logger("data").info(
                "%s: the numbers of its field %s are %s, and are taken for %s", part.name, field, theirs, ours
            )


def _class_names(table: Table, field: str) -> Sequence[str] | None:
    """Return the names of a field's numbers, or of those in its lists; None = the table has no names for them."""
    import datasets

    feature = table.table.features.get(field)
    feature = getattr(feature, "feature", feature)
    return feature.names if isinstance(feature, datasets.ClassLabel) else None
