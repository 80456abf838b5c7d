"""`train.length_ramp`: rows that grow in the first steps (Li et al. 2022, "The Stability-Efficiency Dilemma").

Complete rows of `data.seq_length` tokens are cut into equal shorter ones: no token is left out, and every step has as
many of them. So lengths are divisors of `data.seq_length`.
"""

from typing import NamedTuple

from megatron_ds.config.schema_base import Count, Section
from megatron_ds.errors import ConfigError


class LengthRamp(Section):
    """Rows of `start` tokens, which grow up to `data.seq_length` in the first `steps` steps."""

    start: Count
    steps: Count


class LengthStage(NamedTuple):
    """Steps with rows of one length: the first of them, from 1, and the length in tokens."""

    first_step: int
    length: int


def length_stages(seq_length: int, ramp: LengthRamp | None) -> tuple[LengthStage, ...]:
    """Return the lengths of rows, in the order of the steps; the last one has no end.

    The length wanted grows linearly from `start` to `seq_length`, as DeepSpeed's `fixed_linear` does. That of a step is
    the largest one up to it which is a multiple of `start` and divides `seq_length`.

    Args:
        seq_length: `data.seq_length`.
        ramp: a ramp that ends at it; None = all rows are complete.
    """
    if ramp is None:
        return (LengthStage(1, seq_length),)
    more = seq_length - ramp.start
    lengths = [one for one in range(ramp.start, seq_length + 1, ramp.start) if seq_length % one == 0]
    return tuple(LengthStage(1 - (-(one - ramp.start) * ramp.steps // more), one) for one in lengths)


def check_length_ramp(seq_length: int, ramp: LengthRamp) -> None:
    """Check that a ramp ends at `data.seq_length`.

    Raises:
        ConfigError: it does not.
    """
    if ramp.start >= seq_length:
        raise ConfigError(
            f"train.length_ramp.start={ramp.start} is not less than data.seq_length={seq_length}, to which rows grow; "
            "try a smaller one, or no train.length_ramp"
        )
    if seq_length % ramp.start:
        legal = [one for one in range(1, seq_length) if seq_length % one == 0]
        near = [one for one in legal if one < ramp.start][-1:] + [one for one in legal if one > ramp.start][:1]
        raise ConfigError(
            f"train.length_ramp.start={ramp.start} does not divide data.seq_length={seq_length}, and rows are cut into "
            f"equal ones; nearest: {' or '.join(map(str, near))}"
        )
