"""The nearest semi-orthogonal matrix, approximately, by products alone (Jordan et al. 2024, "Muon").

A matrix U S V^T becomes about U V^T: an odd polynomial is applied to its singular values several times, each time
a x + b x^3 + c x^5, with coefficients that take them near 1 quickly instead of exactly. In bf16 it is accurate enough.
"""

from __future__ import annotations

from torch import Tensor

EPS = 1e-7  # the least norm that a matrix is divided by
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """Return semi-orthogonal matrices near those given, in their dtype: (..., R, C) -> (..., R, C).

    Args:
        matrices: one or several.
        steps: number of times that the polynomial is applied.
        coefficients: a, b and c of it.
    """
    a, b, c = coefficients
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)  # so that no singular value is above 1
    for _ in range(steps):
        gram = x @ x.mT
        x = _plus_product(x, a, _plus_product(gram, b, gram, gram, c), x)
    return x.mT if is_tall else x


def _plus_product(added: Tensor, beta: float, left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    """Return beta * added + alpha * left @ right."""
    multiply_add = added.addmm if added.dim() == 2 else added.baddbmm
    return multiply_add(left, right, beta=beta, alpha=alpha)
