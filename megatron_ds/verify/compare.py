"""How far two tensors are apart, and how far they may be in fp32."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

# Both sides compute in fp32, in another order: 6e-8 a rounding, grown by the depth of the model. A wrong constant,
# permutation or missing term moves the result by 1e-3 and more.
LOGITS_BOUND = 1e-5
LOSS_BOUND = 1e-5
GRADIENT_BOUND = 1e-4

# A gradient that is zero in exact arithmetic (a key bias without rotation) is rounding noise on both sides, of which no
# relative error can be taken: it is measured against this part of a typical gradient of as many elements.
SMALLEST_SCALE = 1e-2


@dataclass(frozen=True)
class Difference:
    """Of one tensor from its reference: largest absolute, and relative in L2."""

    largest: float
    relative: float

    def within(self, bound: float) -> bool:
        return self.relative <= bound  # not where it is NaN


def difference(ours: Tensor, reference: Tensor, smallest_norm: float = 0.0) -> Difference:
    """Compare tensors of one shape in fp64.

    Args:
        ours, reference: any floating dtype.
        smallest_norm: the reference counts as at least this large.
    """
    if ours.shape != reference.shape:
        return Difference(math.inf, math.inf)
    apart = ours.double() - reference.double()
    scale = max(float(reference.double().norm()), smallest_norm)
    norm = float(apart.norm())
    relative = 0.0 if norm == 0.0 else norm / scale if scale > 0.0 else math.inf
    return Difference(float(apart.abs().max()) if apart.numel() else 0.0, relative)


def smallest_norm(numel: int, typical: float) -> float:
    """What the norm of a gradient of `numel` elements counts as at least; `typical` is the model's root mean square."""
    return SMALLEST_SCALE * typical * math.sqrt(numel)


def root_mean_square(tensors: Iterable[Tensor]) -> float:
    """Over all elements of all tensors, of which one is looked at at a time."""
    squares, count = 0.0, 0
    for tensor in tensors:
        squares += float(tensor.double().square().sum())
        count += tensor.numel()
    return math.sqrt(squares / max(1, count))
