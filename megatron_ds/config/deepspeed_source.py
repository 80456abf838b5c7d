"""The place that a DeepSpeed value was written in, so that an error can name both places of a contradiction."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ds.errors import ConfigError, show

AUTO = "auto"


@dataclass(frozen=True)
class Place:
    """A DeepSpeed JSON file (`path`), or the mapping under `deepspeed` in the run file (None)."""

    path: str | None

    @classmethod
    def of(cls, source: str | Mapping[str, Any]) -> "Place":
        return cls(source if isinstance(source, str) else None)

    def name(self, key: str) -> str:
        """Return `zero_optimization.stage (ds.json)`, or `deepspeed.zero_optimization.stage (run file)`."""
        return f"{key} ({self.path})" if self.path is not None else f"deepspeed.{key} (run file)"

    def state(self, key: str, value: Any) -> str:
        """Return `train_batch_size=32 (ds.json)`, or `deepspeed.train_batch_size=32 (run file)`."""
        if self.path is not None:
            return f"{key}={show(value)} ({self.path})"
        return f"deepspeed.{key}={show(value)} (run file)"

    def refuse_disagreement(self, key: str, value: Any, run_statement: str) -> None:
        """Refuse a run file that states `run_statement` where this place states `key=value`."""
        home = "the JSON" if self.path is not None else "the deepspeed mapping"
        raise ConfigError(
            f'{run_statement} (run file) and {self.state(key, value)} disagree; remove it from {home} or set "{AUTO}"'
        )


def is_unset(value: Any) -> bool:
    """Return True for absent, null and "auto", which all leave a value to the run file."""
    return value is None or value == AUTO


def equal(left: Any, right: Any) -> bool:
    """Compare JSON values; true is not 1, and a list equals a tuple."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right))
    return bool(left == right)
