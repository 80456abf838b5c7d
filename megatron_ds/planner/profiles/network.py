"""Networks: the link inside an island of devices, and the network cards (NICs) that join islands."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ds.planner.profiles.link import Link


@dataclass(frozen=True)
class Network:
    """The links of a cluster whose nodes are alike.

    Attributes:
        name: for messages and tables, such as "8 x 400Gb/s infiniband".
        inside: link between the devices of an island.
        outside: link of one device's share of its node's NICs; its `gb_s` is that share.
        island: number of consecutive ranks that `inside` joins: a node's devices, or more.
    """

    name: str
    inside: Link
    outside: Link
    island: int

    def __hash__(self) -> int:  # links hold tables
        return hash((self.name, self.island))
