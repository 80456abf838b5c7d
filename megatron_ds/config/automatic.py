"""Values that the planner chooses when a run starts: `parallel: auto`, `train.micro_batch_size: auto`.

A section notes that it is to be chosen in a field of its own, so that sizes are numbers everywhere else. A run whose
choice was made has the numbers alone, and so has its `config.yaml`.
"""

from collections.abc import Mapping
from typing import Any

from megatron_ds.errors import ConfigError, show

AUTO = "auto"
PARALLEL_SIZES = ("tensor", "pipeline", "context", "expert", "sequence")
"""Keys of `parallel` that are chosen at once."""


def expand_parallel(value: Any) -> Any:
    """Return the mapping that `parallel: auto` is short for."""
    if isinstance(value, str):
        if value != AUTO:
            raise ConfigError(
                f"parallel={show(value)} is neither sizes, such as {{tensor: 2}}, nor auto; nearest: auto"
            )
        return {"auto": True}
    return value


def expand_micro_batch(train: Any) -> Any:
    """Return a `train` section in which `micro_batch_size: auto` is a field of its own."""
    if not isinstance(train, dict) or train.get("micro_batch_size") != AUTO:
        return train
    rest = {key: value for key, value in train.items() if key != "micro_batch_size"}
    return {**rest, "auto_micro_batch_size": True}


def check_nothing_given(given: Mapping[str, Any]) -> None:
    """Refuse sizes next to `parallel.auto`.

    Args:
        given: the sizes that differ from their defaults, by key.

    Raises:
        ConfigError: there is one.
    """
    for key, value in given.items():
        size = show(getattr(value, "size", value))
        raise ConfigError(f"parallel.auto=true chooses parallel.{key} too, which is {size}; keep one of them")


def refuse_choices(*, parallel: bool, micro_batch: bool = False) -> None:
    """Refuse values that are still to be chosen where nothing chooses them.

    Raises:
        ConfigError: there is one.
    """
    if parallel:
        raise ConfigError(
            "parallel=auto is chosen where a run starts, from its file and its devices; here try sizes, such as "
            "parallel={tensor: 2}"
        )
    if micro_batch:
        raise ConfigError(
            "train.micro_batch_size=auto is chosen where a run starts, from its file and its devices; here try a "
            "number, such as 1"
        )
