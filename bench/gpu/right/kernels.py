"""Every candidate of every operation against PyTorch's formula, on its examples and on shapes of real models."""

from __future__ import annotations

from functools import partial
from typing import Any

from bench.gpu.record import DEVICE, guarded, pick, record, torch_device, wait_for_turn
from bench.gpu.right.chosen_kernels import write_choice
from megatron_ds.layers.kernels import KERNELS, Candidate, Operation
from megatron_ds.layers.kernels.check import TOLERANCE, largest_error

TOKENS, HIDDEN, FFN = pick(4096, 64), pick(4096, 64), pick(14336, 128)

LARGER = {
    "rms_norm": lambda random: (random(TOKENS, 1, HIDDEN), random(HIDDEN), 1e-5),
    "swiglu": lambda random: (random(TOKENS, 1, 2 * FFN),),
}
"""Arguments at the width of an 8 B model, by operation; those without an entry are checked on their examples alone."""


def main() -> None:
    """Check all candidates; an operation with a wrong one is computed by its first right one in the other parts."""
    choice = {}
    for operation in KERNELS.values():
        checked = {name: _check(operation, name, operation[name]) for name in operation.names}
        right = [name for name, result in checked.items() if result]
        choice[operation.name] = "auto" if False not in checked.values() else right[0] if right else "torch"
    write_choice(choice)
    record("kernels", "chosen for the other parts", None, **choice)


def _check(operation: Operation, name: str, candidate: Candidate) -> bool | None:
    """Check a candidate and record the result; None = it cannot run here."""
    title = f"{operation.name}, {name}"
    if DEVICE not in candidate.devices or not candidate.is_installed:
        reason = "not installed" if DEVICE in candidate.devices else f"not for {DEVICE}"
        record("kernels", title, None, skipped=reason)
        return None
    return bool(guarded("kernels", title, partial(_compare, operation, candidate, title)))


def _compare(operation: Operation, candidate: Candidate, title: str) -> bool:
    kernel = candidate.make()
    errors = {"examples": largest_error(operation, kernel, torch_device())}
    if operation.name in LARGER:
        larger = _with_example(operation, LARGER[operation.name])
        errors["real_shapes"] = largest_error(larger, kernel, torch_device())
    right = all(error <= TOLERANCE for error in errors.values())
    record("kernels", title, right, version=candidate.label, bound=TOLERANCE, **errors)
    return right


def _with_example(operation: Operation, example: Any) -> Operation:
    return Operation(operation.name, operation.reference, (example,), operation.differentiable)


if __name__ == "__main__":
    wait_for_turn()
    main()
