"""The division of context ranks by the way in which their attention communicates, chosen from a model's sizes.

c = u * r: each group of u ranks exchanges heads for positions (Ulysses; Jacobs et al. 2023), and the r groups fetch
keys and values from each other ("gather") or pass them around ("ring"; Liu et al. 2023).
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from megatron_ds.config.checks import ModelShape, nearest
from megatron_ds.config.context_section import ContextSection
from megatron_ds.config.data_section import DataSection
from megatron_ds.config.run_config import ParallelSection
from megatron_ds.errors import TopologyError


@dataclass(frozen=True)
class ContextPlan:
    """The division of the ranks that share a sequence by their communication.

    Attributes:
        ulysses: u, ranks that exchange heads, neighbours on the context axis.
        ring: r, groups of these.
        method: of the groups to exchange keys and values.
        zigzag: the groups hold two chunks of a sequence each, so that causal work is even; else one.
        reason: of the choice, in words.
        rope: the model's rope type that depends on the length of a sequence, so that none can be padded; None = no such
            type.
    """

    ulysses: int = 1
    ring: int = 1
    method: Literal["gather", "ring"] = "gather"
    zigzag: bool = False
    reason: str = ""
    rope: str | None = None

    @property
    def size(self) -> int:
        """c, the number of context ranks."""
        return self.ulysses * self.ring

    def multiple_of(self, parts: int = 1) -> int:
        """Return the number that divides every length that the ranks can share without padding.

        Args:
            parts: tensor ranks that divide the positions of a context rank, under sequence parallelism.
        """
        return self.size * parts * (2 if self.zigzag else 1)

    def describe(self) -> str:
        """Return text such as `8 = ulysses 4 x ring 2, zigzag: 4 of 8 ranks divide the 12 heads of a tensor rank`."""
        parts = [f"ulysses {self.ulysses}"] if self.ulysses > 1 else []
        parts += [f"{self.method} {self.ring}"] if self.ring > 1 else []
        order = ", zigzag" if self.zigzag else ""
        return f"{self.size} = {' x '.join(parts) or 1}{order}: {self.reason}"


@dataclass(frozen=True)
class ContextNames:
    """The names that the user has for the settings."""

    size: str = "parallel.context"
    method: str = "parallel.context.method"
    ulysses: str = "parallel.context.ulysses"
    tensor: str = "parallel.tensor"


def plan_context(
    section: ContextSection, shape: ModelShape, tensor: int, names: ContextNames = ContextNames()
) -> ContextPlan:
    """Divide the context ranks of a model.

    "auto" has as many ranks exchange heads as divide the query heads of a tensor rank, because that takes any attention
    kernel and the fewest bytes for common numbers of key heads. The others form a ring if torch's kernels that return a
    log-sum-exp compute every layer, and fetch keys and values if not.

    Args:
        section: the run file's.
        shape: the model's sizes.
        tensor: number of tensor ranks; it divides the query heads.
        names: the names that the user has for the settings.

    Raises:
        TopologyError: the ranks that exchange heads do not divide the heads of a tensor rank.
    """
    size, heads = section.size, shape.num_attention_heads // tensor
    if size == 1:
        return ContextPlan(reason="one rank holds a sequence")
    ulysses = _ulysses_ranks(section, heads)
    if heads % ulysses:
        _refuse_heads(section, shape, tensor, names)
    ring = size // ulysses
    rope, zigzag = next(iter(shape.length_ropes), None), ring > 1 and shape.causal
    plan = ContextPlan(ulysses, ring, zigzag=zigzag, reason=_reason(section, ulysses, heads), rope=rope)
    if ring == 1:
        return plan
    if section.method in ("gather", "ring"):
        return replace(plan, method=section.method)
    if shape.score_options:
        why = f"no kernel with a log-sum-exp has {' and '.join(shape.score_options)}, so keys and values are fetched"
        return replace(plan, method="gather", reason=f"{plan.reason}; {why}")
    return replace(plan, method="ring", reason=f"{plan.reason}; kernels with a log-sum-exp compute every layer")


def describe_context(data: DataSection, parallel: ParallelSection, plan: ContextPlan) -> str:
    """Return the division of the context ranks in words, and the length to which sequences are padded for them."""
    whole = data.seq_length + -data.seq_length % _multiple(parallel, plan)
    if whole == data.seq_length:
        return plan.describe()
    return f"{plan.describe()}; sequences of {data.seq_length:,} positions are padded to {whole:,}"


def check_context_length(data: DataSection, parallel: ParallelSection, plan: ContextPlan) -> None:
    """Check that sequences that context ranks cannot divide may be padded.

    Raises:
        TopologyError: the model computes something else in a longer sequence.
    """
    multiple = _multiple(parallel, plan)
    if plan.rope is None or data.seq_length % multiple == 0:
        return
    below = data.seq_length // multiple * multiple
    near = " or ".join(str(length) for length in (below, below + multiple) if length)
    raise TopologyError(
        f"data.seq_length={data.seq_length} is not divisible by {multiple}, which parallel.context={plan.size} needs "
        f"here: it would be padded, and the model's rope type {plan.rope} depends on the length; nearest: "
        f"{near}"
    )


def _multiple(parallel: ParallelSection, plan: ContextPlan) -> int:
    return plan.multiple_of(parallel.tensor if parallel.sequence else 1)


def _ulysses_ranks(section: ContextSection, heads: int) -> int:
    """Return the number of ranks that exchange heads, given or chosen."""
    if section.ulysses is not None:
        return section.ulysses
    chosen = {"auto": math.gcd(section.size, heads), "ulysses": section.size}
    return chosen.get(section.method, 1)


def _reason(section: ContextSection, ulysses: int, heads: int) -> str:
    if section.ulysses is not None or section.method != "auto":
        return "as given"
    if ulysses == section.size:
        return f"{ulysses} divides the {heads} query heads of a tensor rank"
    if ulysses == 1:
        return f"no divisor of {section.size} divides the {heads} query heads of a tensor rank"
    return f"{ulysses} is the largest divisor of {section.size} that divides the {heads} query heads of a tensor rank"


def _refuse_heads(section: ContextSection, shape: ModelShape, tensor: int, names: ContextNames) -> None:
    heads = shape.num_attention_heads // tensor
    if section.ulysses is None:  # method ulysses: all ranks exchange heads
        legal = nearest(section.size, (one for one in range(1, heads + 1) if heads % one == 0))
        given, fix = f"{names.size}={section.size} with {names.method}=ulysses", f"or try {names.method}=auto"
    else:
        both = math.gcd(section.size, heads)
        legal = nearest(section.ulysses, (one for one in range(1, both + 1) if both % one == 0))
        given, fix = f"{names.ulysses}={section.ulysses}", ""
    of_rank = f"{heads} query heads of a tensor rank (num_attention_heads={shape.num_attention_heads}"
    of_rank += f" / {names.tensor}={tensor})" if tensor > 1 else ")"
    near = " or ".join(map(str, legal))
    raise TopologyError(f"{given} does not divide the {of_rank}; nearest: {near}{', ' if fix else ''}{fix}")
