"""Choice of a kernel for each operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from megatron_ds.errors import ConfigError, not_one_of, show
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
            and runs on the device; a mapping chooses for single operations, and the others are "auto".
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
        candidate = _candidate(operation, choice, device)
        if candidate is not None:
            field = "train.kernels=auto" if choice == AUTO else f"train.kernels.{operation.name}={choice}"
            kernel = validated(operation, candidate, device, field)
            names = (*kernels.names, f"{operation.name}: {candidate.label}")
            kernels = replace(kernels, **{operation.name: kernel}, names=names)
    return kernels


def _candidate(operation: Operation, choice: str, device: torch.device) -> Candidate | None:
    """Return the candidate of a choice; None = PyTorch."""
    if choice == TORCH:
        return None
    if choice == AUTO:
        fitting = (one for one in operation.values() if device.type in one.devices and one.is_installed)
        return next(fitting, None)
    candidate, field = operation[choice], f"train.kernels.{operation.name}={choice}"
    if device.type not in candidate.devices:
        raise ConfigError(f"{field} runs on {' and '.join(candidate.devices)}, not on {device.type}; try auto")
    if not candidate.is_installed:
        raise ConfigError(
            f"{field} needs the package {candidate.package}, which is not installed; install it, or try auto"
        )
    return candidate
