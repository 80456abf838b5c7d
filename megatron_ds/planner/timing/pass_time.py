"""Seconds of one pass of one layer: what the device computes, and the communication that it waits for.

Communication that runs while the device computes is not free: its kernels take cores and memory bandwidth from the
products. In the tables of Korthikanti et al. 2022 (table 4), the backward pass of a layer is about half the time of its
hidden all-reduces longer than without them. Where the device computes too little to hide them, it waits for the rest.
A CPU hides nothing: it is its own host, which starts every operation before it computes it, and what it sends takes its
cores as long as they send.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_ds.planner.operations import Attention, Collective, HostCopy, ModuleHooks, Product, Stream, Work
from megatron_ds.planner.profiles.device import Device
from megatron_ds.planner.profiles.link import GB, US
from megatron_ds.planner.profiles.network import Network
from megatron_ds.planner.timing.links import communication_seconds
from megatron_ds.planner.timing.placement import Placement
from megatron_ds.planner.timing.roofline import seconds

CONTENTION = 0.5
"""Share of the time of hidden communication by which it slows down what the device computes at the same time."""

HOST_COPIES = "host copies"
"""Name under which copies between a device and its host stand among the axes of communication."""


@dataclass(frozen=True)
class Machine:
    """One device among the others of a run.

    Attributes:
        device: its profile.
        network: links to the others.
        placements: of the axes; see `place`.
        attention_speed: of attention kernels relative to the device's profile, forward and backward.
    """

    device: Device
    network: Network
    placements: Mapping[str, Placement]
    attention_speed: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True)
class PassTime:
    """Seconds of some work.

    Attributes:
        compute_s: of products, attention and streams.
        exposed_s: of communication beyond that, by axis: what it is waited for, and by how much it slows the rest.
    """

    compute_s: float = 0.0
    exposed_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def total_s(self) -> float:
        """All seconds."""
        return self.compute_s + sum(self.exposed_s.values())

    def __add__(self, other: PassTime) -> PassTime:
        exposed = {axis: self.exposed_s.get(axis, 0.0) + other.exposed_s.get(axis, 0.0) for axis in self._axes(other)}
        return PassTime(self.compute_s + other.compute_s, exposed)

    def times(self, number: float) -> PassTime:
        """Return the time of `number` repetitions."""
        return PassTime(number * self.compute_s, {axis: number * value for axis, value in self.exposed_s.items()})

    def _axes(self, other: PassTime) -> list[str]:
        return list(dict.fromkeys((*self.exposed_s, *other.exposed_s)))


def pass_time(work: Work, machine: Machine, hidden_by_s: float = 0.0) -> PassTime:
    """Return the seconds of work whose hidden communication and copies run while its own computation does.

    Args:
        work: of one pass.
        machine: that it runs on.
        hidden_by_s: further seconds of computation, outside this work, that hide communication.
    """
    compute_s, host_s = compute_seconds(work, machine), host_seconds(work, machine.device)
    on_host = machine.device.type == "cpu"
    compute_s = compute_s + host_s if on_host else max(compute_s, host_s)
    exposed: dict[str, float] = {}
    hidden: dict[str, float] = {}
    for (axis, is_hidden), value in communication_seconds(work, machine.placements, machine.network).items():
        (hidden if is_hidden else exposed)[axis] = value
    hideable_s = compute_s + hidden_by_s
    for axis, value in hidden.items():
        behind = min(value, hideable_s)
        exposed[axis] = exposed.get(axis, 0.0) + value - behind + (1.0 if on_host else CONTENTION) * behind
        hideable_s -= behind
    copied_s, copied_behind_s = (_copy_seconds(work, machine.device, hidden) for hidden in (False, True))
    waited_s = copied_s + max(0.0, copied_behind_s - compute_s - hidden_by_s)
    if waited_s:
        exposed[HOST_COPIES] = waited_s
    waits_along = _waits_along(work) if machine.device.skew else None
    if waits_along is not None:
        exposed[waits_along] = exposed.get(waits_along, 0.0) + machine.device.skew * compute_s
    return PassTime(compute_s, exposed)


def _copy_seconds(work: Work, device: Device, hidden: bool) -> float:
    """Return the seconds of copies between the device and its host, by engines that take nothing from products."""
    copied = sum(
        count * one.num_bytes for one, count in work.items() if isinstance(one, HostCopy) and one.hidden == hidden
    )
    return copied / (device.host_gb_s * GB)


def _waits_along(work: Work) -> str | None:
    """Return the axis of the most collectives that are not hidden, for which each rank waits for the slowest one."""
    found: Counter[str] = Counter()
    for one, count in work.items():
        if isinstance(one, Collective) and one.ranks > 1 and not one.hidden:
            found[one.axis] += count
    return max(found, key=lambda axis: found[axis], default=None)


def compute_seconds(work: Work, machine: Machine) -> float:
    """Return the seconds that the device computes."""
    found = seconds(work, machine.device)
    for one, count in work.items():
        if isinstance(one, Attention):
            speed = machine.attention_speed[one.backward]
            found += (1 / speed - 1) * count * seconds(one, machine.device)
    return found


def host_seconds(work: Work, device: Device) -> float:
    """Return the seconds in which the host starts the kernels of some work, and runs hooks of modules."""
    hooks = sum(count for one, count in work.items() if isinstance(one, ModuleHooks))
    return (num_launches(work) * device.host_us + hooks * device.hook_us) * US


def num_launches(work: Work) -> int:
    """Return the number of kernels that some work starts."""
    found = 0
    for one, count in work.items():
        if isinstance(one, Product | Attention):
            found += count
        elif isinstance(one, Stream):
            found += count * one.launches
    return found
