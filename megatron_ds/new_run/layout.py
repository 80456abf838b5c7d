"""A layout whose memory fits the devices, as the planner computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_ds.errors import ConfigError, MegatronDSError

GB = 10**9
USABLE = 0.95
"""Share of a device's memory that a run may be planned to need: the rest is for what the plan does not know."""


@dataclass(frozen=True)
class ChosenLayout:
    """A layout and what is planned for it.

    Attributes:
        tensor: tensor ranks.
        stage: ZeRO's.
        recompute: value of `train.recompute`.
        bytes_per_rank: planned peak; 0 = it was not planned.
    """

    tensor: int
    stage: int
    recompute: str
    bytes_per_rank: int = 0


CANDIDATES = (
    *(ChosenLayout(tensor, 1, "none") for tensor in (1, 2)),
    *(ChosenLayout(tensor, 1, "full") for tensor in (1, 2)),
    *(ChosenLayout(1, 3, recompute) for recompute in ("none", "full")),
    *(ChosenLayout(tensor, 1, "full") for tensor in (4, 8)),
    *(ChosenLayout(tensor, 3, "full") for tensor in (2, 4, 8)),
)
"""Layouts in the order of what they cost in communication and recomputation."""


def choose_layout(
    plan_bytes: Callable[[ChosenLayout], int], num_devices: int, bytes_per_device: int, *, trains_all: bool
) -> ChosenLayout:
    """Return the first of `CANDIDATES` that is planned to fit.

    Args:
        plan_bytes: layout -> planned peak of a device; raises MegatronDSError for one that the run cannot have.
        num_devices: all devices of the run.
        bytes_per_device: memory of each.
        trains_all: whether all parameters are trained; else adapters.

    Raises:
        ConfigError: none fits.
        MegatronDSError: the run can have none; the message is that of the first.
    """
    smallest, refusal = None, None
    for candidate in CANDIDATES:
        if num_devices % candidate.tensor:
            continue
        try:
            found = replace(candidate, bytes_per_rank=plan_bytes(candidate))
        except MegatronDSError as problem:
            refusal = refusal or problem
            continue
        if found.bytes_per_rank <= USABLE * bytes_per_device:
            return found
        smallest = found if smallest is None else min(smallest, found, key=lambda one: one.bytes_per_rank)
    if smallest is None:
        assert refusal is not None
        raise refusal
    lora = ", or --lora" if trains_all else ""
    raise ConfigError(
        f"--gpus={num_devices}: the model needs about {smallest.bytes_per_rank / GB:.1f} GB on each GPU, of whose "
        f"{bytes_per_device / GB:.1f} GB a plan may use {USABLE:.0%}; try more GPUs, GPUs with more memory "
        f"(--gpu-memory){lora}"
    )
