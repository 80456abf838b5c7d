"""Checks of `train.length_ramp` against the data and the ranks."""

from megatron_ds.config.context_plan import ContextPlan
from megatron_ds.config.run_config import RunConfig
from megatron_ds.errors import ConfigError, TopologyError

TOKEN_STREAMS = ("text", "indexed")
"""Data formats whose samples of causal models are cut out of a stream of tokens, and may be cut again."""


def check_ramped_lengths(run: RunConfig, plan: ContextPlan, *, is_causal: bool) -> None:
    """Check that the rows of the data may be cut, and that ranks can share the parts.

    Args:
        run: the run file.
        plan: the division of its context ranks.
        is_causal: whether each token is predicted from those before it.

    Raises:
        ConfigError: a part of a row is no sample of these data.
        TopologyError: the ranks cannot divide its positions.
    """
    ramp, length, parallel = run.train.length_ramp, run.data.seq_length, run.parallel
    if ramp is None:
        return
    stated = f"train.length_ramp.start={ramp.start}"
    if run.data.format not in TOKEN_STREAMS or run.data.packing or not is_causal:
        reason = "data.packing=true" if run.data.packing else f"data.format={run.data.format}"
        reason = reason if is_causal else "an objective that is not causal"
        raise ConfigError(
            f"{stated} cuts samples into shorter ones, which cannot be with {reason}: it needs a stream of tokens, as "
            "text and indexed data of causal models are; remove train.length_ramp"
        )
    tensor = parallel.tensor if parallel.sequence else 1
    of_context = plan.multiple_of(tensor) if plan.rope is not None else 1
    multiple = tensor if parallel.context.size == 1 else of_context
    if ramp.start % multiple:
        legal = [one for one in range(multiple, length, multiple) if length % one == 0]
        near = sorted(legal, key=lambda one: abs(one - ramp.start))[:2]
        fix = f"nearest: {' or '.join(map(str, sorted(near)))}" if near else "try no train.length_ramp"
        raise TopologyError(f"{stated} is not divisible by {multiple}, as the ranks that divide rows need; {fix}")
