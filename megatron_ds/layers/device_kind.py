"""The kind of a device, where layers choose by it."""

from __future__ import annotations

import torch

GPU = "cuda"


def device_kind(device: torch.device) -> str:
    """Return torch's name of a device's type. The meta device, whose tensors have no values, stands for a GPU."""
    return GPU if device.type == "meta" else device.type
