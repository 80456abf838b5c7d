"""`train.samples` of the run file: prompts that the model continues while it is trained."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megatron_ds.config.schema_base import Count, NonNegative, Section, Text, integral_float_to_int
from megatron_ds.errors import ConfigError, show

EVAL: Literal["eval"] = "eval"


def _eval_or_steps(value: Any) -> Any:
    number = integral_float_to_int(value)
    if value == EVAL or (isinstance(number, int) and not isinstance(number, bool) and number >= 1):
        return number
    raise ConfigError(
        f"train.samples.every={show(value)} is neither eval nor a number of steps of at least 1; nearest: {EVAL}"
    )


class SamplesSection(Section):
    """Samples of what the model writes.

    `prompts`: texts that it continues. `every`: "eval" after each validation, or a number of steps. `max_new_tokens`:
    the most tokens of each. `temperature`: 0 chooses the most probable token. `chat`: prompts are messages of a user,
    for the tokenizer's chat template.
    """

    prompts: Annotated[list[Text], Field(min_length=1)]
    every: Annotated[Literal["eval"] | int, BeforeValidator(_eval_or_steps)] = EVAL
    max_new_tokens: Count = 64
    temperature: NonNegative = 0.0
    chat: bool = False
