"""`parallel.context` of the run file: the ranks that divide each sequence, and how their attention communicates."""

from typing import Any, Literal

from pydantic import model_validator

from megatron_ds.config.schema_base import Count, Section, integral_float_to_int
from megatron_ds.errors import ConfigError, TopologyError, show

ContextMethod = Literal["auto", "ulysses", "gather", "ring"]


class ContextSection(Section):
    """Context parallelism: `size` ranks hold a part of each sequence.

    `ulysses`: ranks that exchange heads around attention (Jacobs et al. 2023); None: as `method` needs. `method`:
    communication of the other `size / ulysses` ranks: "gather" fetches the keys and values that a rank's queries see,
    "ring" passes them around (Liu et al. 2023); "ulysses": there are no others; "auto" chooses by the model.
    """

    size: Count = 1
    method: ContextMethod = "auto"
    ulysses: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _mapping(cls, value: Any) -> Any:
        """Return a number of ranks as the mapping that it stands for."""
        if isinstance(value, ContextSection):
            return value
        if isinstance(value, dict):
            if value and "size" not in value:
                key = next(iter(value))
                raise ConfigError(
                    f"parallel.context.size is missing, without which parallel.context.{key}={show(value[key])} does "
                    "nothing; add it, as in {size: 2, method: ring}"
                )
            return value
        number = integral_float_to_int(value)
        if isinstance(number, bool) or not isinstance(number, int):
            raise ConfigError(
                f"parallel.context={show(value)} is neither a number of ranks nor a mapping; write 2, or "
                "{size: 2, method: ring}"
            )
        if number < 1:
            raise TopologyError(f"parallel.context={number} is less than one rank; nearest: 1")
        return {"size": number}

    @model_validator(mode="after")
    def _fits(self) -> "ContextSection":
        size, ulysses, method = self.size, self.ulysses, self.method
        if ulysses is None:
            return self
        if size % ulysses:
            below = max(one for one in range(1, ulysses) if size % one == 0)
            above = next((one for one in range(ulysses, size) if size % one == 0), size)
            near = f"{below} or {above}" if ulysses < size else f"{size}"
            raise TopologyError(
                f"parallel.context.ulysses={ulysses} does not divide parallel.context.size={size}; nearest: {near}"
            )
        if method == "ulysses" and ulysses != size:
            raise ConfigError(
                f"parallel.context.ulysses={ulysses} leaves {size // ulysses} parts of parallel.context.size={size} to "
                f"another method than parallel.context.method=ulysses; nearest: {size}, or try method gather or ring"
            )
        if method in ("gather", "ring") and ulysses == size > 1:
            raise ConfigError(
                f"parallel.context.ulysses={ulysses} of parallel.context.size={size} leaves no ranks for "
                f"parallel.context.method={method}; try method ulysses, or a smaller ulysses"
            )
        return self

    @property
    def plain(self) -> int | dict[str, Any]:
        """The section as it is written in a run file."""
        given = self.model_dump(exclude_defaults=True)
        return self.size if given.keys() <= {"size"} else {"size": self.size, **given}
