"""Comparison of a candidate with PyTorch's formula, before it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ds.errors import ConfigError
from megatron_ds.layers.kernels.reference import AttentionCall, Example, Random
from megatron_ds.layers.kernels.table import Candidate, Operation

TOLERANCE = 2e-2  # relative to the largest value, in bf16, which rounds by 4e-3


def validated(
    operation: Operation,
    candidate: Candidate,
    device: torch.device,
    field: str = "train.kernels=auto",
    examples: Sequence[Example] | None = None,
) -> Callable[..., Any]:
    """Return the candidate's kernel, if its results and gradients on small inputs match the reference's.

    Args:
        operation: the operation that it computes.
        candidate: the implementation.
        device: the device to compare on.
        field: the setting that chose it.
        examples: the small inputs; None = those of the operation that the candidate supports.

    Raises:
        ConfigError: it cannot be loaded, or its results differ.
    """
    name = f"{field}: {candidate.label}, {operation.name}"
    fix = f"try train.kernels=torch, or train.kernels.{operation.name}=torch for this operation alone"
    try:
        kernel = candidate.make()
        inputs = supported_examples(operation, candidate, device, operation.examples) if examples is None else examples
        error = largest_error(operation, kernel, device, inputs)
    except Exception as problem:  # an installation that does not fit the GPU may raise anything
        reason = " ".join([f"{type(problem).__name__}:", *str(problem).splitlines()[:1]])
        raise ConfigError(f"{name}: {reason}; {fix}") from problem
    if not error <= TOLERANCE:
        raise ConfigError(f"{name}: differs from PyTorch by {error:.1e} of the largest value; {fix}")
    return kernel


def largest_error(
    operation: Operation, kernel: Callable[..., Any], device: torch.device, examples: Sequence[Example]
) -> float:
    """Return the largest error of a kernel's results and gradients on examples.

    An error is relative to the largest value of the reference's tensor; a NaN counts as infinite.
    """
    expected, found = (_with_gradients(one, operation, examples, device) for one in (operation.reference, kernel))
    errors = [
        float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
        for ours, theirs in zip(found, expected, strict=True)
    ]
    return max(error if error == error else float("inf") for error in errors)


def supported_examples(
    operation: Operation, candidate: Candidate, device: torch.device, examples: Sequence[Example]
) -> list[Example]:
    """Return those of the examples that a candidate of the operation computes."""
    supports = candidate.supports or operation.supports
    return [one for one in examples if supports is None or supports(*one(_random(device)))]


def _random(device: torch.device) -> Random:
    """Return a source of bf16 tensors on a device that gives the same numbers each time it is made."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device, torch.bfloat16)


def _with_gradients(
    kernel: Callable[..., Any], operation: Operation, examples: Sequence[Example], device: torch.device
) -> list[Tensor]:
    """Return the results on all examples, each followed by the gradients of its floating-point tensors.

    The kernel gets copies of the leaves, which it may overwrite, as it may the results of other layers.
    """
    random = _random(device)
    found: list[Tensor] = []
    for example in examples:
        arguments = example(random)
        leaves = [one for one in _tensors(arguments) if one.is_floating_point()]
        for leaf in leaves:
            leaf.requires_grad_(operation.differentiable)
        result = kernel(*(one.clone() if isinstance(one, Tensor) else one for one in arguments))
        results = result if isinstance(result, tuple) else (result,)
        found += [one.detach() for one in results]
        if operation.differentiable:
            found += torch.autograd.grad(results, leaves, [random(*one.shape).to(one.dtype) for one in results])
    return found


def _tensors(arguments: Sequence[Any]) -> Iterator[Tensor]:
    """Yield the tensors that a kernel differentiates: arguments, and an attention call's learned scores."""
    for one in arguments:
        for learned in (one.distance_bias, one.sinks) if isinstance(one, AttentionCall) else (one,):
            if isinstance(learned, Tensor):
                yield learned
