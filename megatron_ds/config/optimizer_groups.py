"""`optimizer.groups`: learning rates and weight decay of single parameters, by patterns of their names."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from megatron_ds.config.schema_base import NonNegative, Section, Text
from megatron_ds.errors import ConfigError


def _pattern_to_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class OptimizerGroup(Section):
    """Settings of the parameters whose Hugging Face tensors match a pattern.

    `match`: a pattern, or several. `lr`: their peak learning rate, which follows the schedule in proportion;
    `lr_factor`: the same as a multiple of `optimizer.lr`. `weight_decay`: of all of them, biases and norms too.
    """

    match: Annotated[list[Text], Field(min_length=1), BeforeValidator(_pattern_to_list)]
    lr: NonNegative | None = None
    lr_factor: NonNegative | None = None
    weight_decay: NonNegative | None = None

    @model_validator(mode="after")
    def _changes_something(self) -> "OptimizerGroup":
        if self.lr is not None and self.lr_factor is not None:
            raise ConfigError(
                f"optimizer.groups: {self.label} has lr={self.lr:g} and lr_factor={self.lr_factor:g}, which both set "
                "its learning rate; keep one"
            )
        if not self.sets_lr and self.weight_decay is None:
            raise ConfigError(f"optimizer.groups: {self.label} changes nothing; give lr, lr_factor or weight_decay")
        return self

    @property
    def label(self) -> str:
        """The patterns as one text, which names the group in messages and metrics."""
        return ", ".join(self.match)

    @property
    def sets_lr(self) -> bool:
        """It has a learning rate of its own."""
        return self.lr is not None or self.lr_factor is not None

    def factor(self, peak_lr: float) -> float:
        """Return the group's learning rate divided by that of the run.

        Args:
            peak_lr: `optimizer.lr`, positive if the group has an `lr`.
        """
        if self.lr is not None:
            return self.lr / peak_lr
        return self.lr_factor if self.lr_factor is not None else 1.0
