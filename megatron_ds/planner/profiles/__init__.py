"""Profiles of devices and networks: what a step's operations and messages cost there. The data are YAML files."""

from megatron_ds.planner.profiles.device import Device
from megatron_ds.planner.profiles.link import Link
from megatron_ds.planner.profiles.network import Network
from megatron_ds.planner.profiles.shipped import (
    CARDS,
    device_names,
    find_by_gpu,
    find_device,
    find_network,
    measured_file_name,
)

__all__ = [
    "CARDS",
    "Device",
    "Link",
    "Network",
    "device_names",
    "find_by_gpu",
    "find_device",
    "find_network",
    "measured_file_name",
]
