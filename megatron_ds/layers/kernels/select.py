"""Choice of a kernel for each operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from megatron_ds.errors import ConfigError, not_one_of, show
from megatron_ds.layers.kernels.by_call import Deferred, Entry, Kernel, KernelsByCall
from megatron_ds.layers.kernels.check import validated
from megatron_ds.layers.kernels.table import KERNELS, REFERENCE, Candidate, Kernels, Operation

AUTO, TORCH = "auto", "torch"

Choice = str | Mapping[str, Any]
"""`auto`, `torch`, or an operation's choice by its name: `auto`, `torch` or the name of a candidate."""


def check_choice(wanted: Choice, table: Mapping[str, Operation] = KERNELS) -> None:
    """Check the names in `train.kernels`.

    Raises:
        ConfigError: no operation or no candidate has such a name.
    """
    if isinstance(wanted, str):
        if wanted not in (AUTO, TORCH):
            raise ConfigError(f"train.kernels={show(wanted)} {not_one_of(wanted, (AUTO, TORCH))}")
        return
    for name, choice in wanted.items():
        if name not in table:
            raise ConfigError(f"train.kernels.{name}={show(choice)}: {show(name)} {not_one_of(name, table)}")
        if choice not in (legal := (AUTO, TORCH, *table[name].names)):
            raise ConfigError(f"train.kernels.{name}={show(choice)} {not_one_of(choice, legal)}")


def select_kernels(wanted: Choice, device: torch.device, table: Mapping[str, Operation] = KERNELS) -> Kernels:
    """Return the kernels to use on a device.

    Args:
        wanted: "torch" = the reference; "auto" = for each operation the first registered candidate that is installed
            and runs on the device, or all of them in this order where kernels are chosen call by call; a mapping
            chooses for single operations, and the others are "auto".
        device: the device that layers run on.
        table: operations with their candidates.

    Raises:
        ConfigError: a name is unknown; a named candidate is not installed or does not run on the device; a chosen
            candidate cannot be loaded, or its results differ from the reference's.
    """
    check_choice(wanted, table)
    kernels = REFERENCE
    for operation in table.values():
        choice = wanted if isinstance(wanted, str) else wanted.get(operation.name, AUTO)
        candidates = _candidates(operation, choice, device)
        if candidates:
            field = "train.kernels=auto" if choice == AUTO else f"train.kernels.{operation.name}={choice}"
            kernel = _kernel(operation, candidates, device, field)
            labels = dict.fromkeys(f"{operation.name}: {candidate.label}" for candidate in candidates.values())
            kernels = replace(kernels, **{operation.name: kernel}, names=(*kernels.names, *labels))
    return kernels


def _kernel(operation: Operation, candidates: Mapping[str, Candidate], device: torch.device, field: str) -> Any:
    """Return the kernel of one candidate that computes what the operation says, else the choice call by call."""
    only = next(iter(candidates.values()))
    if len(candidates) == 1 and only.supports is None and not only.deferred:
        return validated(operation, only, device, field)
    entries = []
    for name, candidate in candidates.items():
        supports = candidate.supports or operation.supports
        assert supports is not None, f"{operation.name} has no calls that a kernel may leave out"
        make = _deferred if candidate.deferred else _at_once
        entries.append(Entry(name, supports, make(operation, candidate, device, field)))
    return KernelsByCall(entries)


def _at_once(
    operation: Operation, candidate: Candidate, device: torch.device, field: str
) -> Callable[..., Kernel | None]:
    kernel = validated(operation, candidate, device, field)
    return lambda *arguments: kernel


def _deferred(
    operation: Operation, candidate: Candidate, device: torch.device, field: str
) -> Callable[..., Kernel | None]:
    variant, smaller = operation.variant, operation.smaller
    assert variant is not None and smaller is not None, f"{operation.name} has no examples like a call"

    def make(*arguments: Any) -> Kernel:
        if device.index is not None:  # a new thread uses the first device
            torch.get_device_module(device).set_device(device)
        return validated(operation, candidate, device, field, [smaller(*arguments)])

    return Deferred(variant, make)


def _candidates(operation: Operation, choice: str, device: torch.device) -> dict[str, Candidate]:
    """Return the candidates of a choice by name, in order of preference; none = PyTorch."""
    if choice == TORCH:
        return {}
    if choice == AUTO:
        fitting = {name: one for name, one in operation.items() if device.type in one.devices and one.is_installed}
        first = dict(list(fitting.items())[:1])
        return first if operation.supports is None else fitting
    candidate, field = operation[choice], f"train.kernels.{operation.name}={choice}"
    if device.type not in candidate.devices:
        raise ConfigError(f"{field} runs on {' and '.join(candidate.devices)}, not on {device.type}; try auto")
    if not candidate.is_installed:
        raise ConfigError(
            f"{field} needs the package {candidate.package}, which is not installed; install it, or try auto"
        )
    return {choice: candidate}
