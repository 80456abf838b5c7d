"""Differences between two tensors, and their bounds in fp32."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

# Both sides compute in fp32, in a different order: 6e-8 per rounding, which grows with the depth of the model. A wrong
# constant, permutation or missing term changes the result by 1e-3 and more.
LOGITS_BOUND = 1e-5
LOSS_BOUND = 1e-5
GRADIENT_BOUND = 1e-4

# A gradient that is zero in exact arithmetic (a key bias without rotation) is rounding noise on both sides, without a
# meaningful relative error: it is compared with this fraction of a typical gradient of as many elements.
SMALLEST_SCALE = 1e-2


# A difference above its bound is rounding if it is at most this multiple of what rounding does to the reference. In 40
# runs of badly conditioned models it was 0.1 to 0.7 of it (see `verify.rounding`).
ROUNDING_FACTOR = 2.0
# The size from which on mistakes are expected. Where rounding makes such differences too, fp32 cannot tell the two.
MOST_ROUNDING = 1e-3

Judgement = Literal["ok", "unclear", "off"]
JUDGEMENTS: tuple[Judgement, ...] = ("ok", "unclear", "off")  # from best to worst


@dataclass(frozen=True)
class Difference:
    """The difference of a tensor from its reference.

    Attributes:
        largest: absolute, of an element.
        relative: in the L2 norm.
        rounding: the largest relative difference that rounding makes between the reference and itself
            (`measure_rounding`); None = not measured.
    """

    largest: float
    relative: float
    rounding: float | None = None

    def within(self, bound: float) -> bool:
        return self.relative <= bound  # False if it is NaN

    def judge(self, bound: float) -> Judgement:
        """Return "ok" within the bound or within rounding, "unclear" if both rounding and mistakes are of its size."""
        if self.within(bound):
            return "ok"
        rounding = 0.0 if self.rounding is None else self.rounding
        if not (math.isfinite(self.relative) and self.relative <= ROUNDING_FACTOR * rounding):
            return "off"
        return "ok" if self.relative <= MOST_ROUNDING else "unclear"


def relative_error(found: Difference) -> float:
    """Return the relative error, NaN as infinity, so that it is the largest."""
    return math.inf if math.isnan(found.relative) else found.relative


def difference(ours: Tensor, reference: Tensor, smallest_norm: float = 0.0) -> Difference:
    """Compare tensors of one shape in fp64; the difference of tensors of different shapes is infinite.

    Args:
        ours, reference: tensors of any floating dtype.
        smallest_norm: lower bound of the reference's norm.
    """
    if ours.shape != reference.shape:
        return Difference(math.inf, math.inf)
    delta = ours.double() - reference.double()
    scale = max(float(reference.double().norm()), smallest_norm)
    norm = float(delta.norm())
    relative = 0.0 if norm == 0.0 else norm / scale if scale > 0.0 else math.inf
    return Difference(float(delta.abs().max()) if delta.numel() else 0.0, relative)


def smallest_norm(numel: int, typical: float) -> float:
    """Return the lower bound of the norm of a gradient of `numel` elements; `typical`: the model's root mean square."""
    return SMALLEST_SCALE * typical * math.sqrt(numel)


def count_others(chosen: Tensor, reference: Tensor) -> tuple[int, int]:
    """Count the tokens that chose other experts, in any order, and all tokens; ids (B S, k) each."""
    differs = chosen.sort(-1).values != reference.sort(-1).values
    return int(differs.any(-1).sum()), len(reference)


def root_mean_square(tensors: Iterable[Tensor]) -> float:
    """Return the root mean square over all elements of all tensors; one tensor is in memory at a time."""
    squares, count = 0.0, 0
    for tensor in tensors:
        squares += float(tensor.double().square().sum())
        count += tensor.numel()
    return math.sqrt(squares / max(1, count))
