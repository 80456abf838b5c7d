"""How far a run is from its reference."""

from typing import Any


def relative_errors(ours: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """Largest relative error of losses and gradient norms, and largest relative L2 error of any weight."""
    assert len(ours["losses"]) == len(reference["losses"]) > 0
    assert ours["weights"].keys() >= reference["weights"].keys()
    return {
        "loss": max(abs(a / b - 1) for a, b in zip(ours["losses"], reference["losses"])),
        "norm": max(abs(a / b - 1) for a, b in zip(ours["norms"], reference["norms"])),
        "weights": max(
            float((ours["weights"][name] - tensor).norm() / tensor.norm())
            for name, tensor in reference["weights"].items()
        ),
    }


def within_fp32(errors: dict[str, float]) -> bool:
    """Loss 2e-5, gradient norm 1e-4, weights 1e-4."""
    return errors["loss"] < 2e-5 and errors["norm"] < 1e-4 and errors["weights"] < 1e-4
