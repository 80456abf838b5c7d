"""A layout whose memory fits the devices, by an estimate of weights, gradients, optimizer state and activations.

The bytes per parameter are those of mixed precision with Adam (Rajbhandari et al. 2020): weights and gradients in bf16,
fp32 gradients where ZeRO-1 sums them, and 12 bytes of fp32 weights and moments that ZeRO divides. Activations of a
layer without recomputation are about 34 bytes per token and hidden unit with flash attention (Korthikanti et al. 2022).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_ds.errors import ConfigError

GB = 10**9
_USABLE = 0.9
_RESERVED_BYTES = 3 * GB  # of CUDA, NCCL and the allocator
_BYTES_KEPT, _BYTES_RECOMPUTED = 34, 2  # of activations per token, hidden unit and layer


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run that its memory depends on.

    Attributes:
        num_params: parameters of the model.
        num_heads: attention heads, which tensor ranks divide.
        hidden_size: of the model.
        num_layers: of the model.
        num_tokens: tokens of a micro-batch.
        trains_all: whether all parameters are trained; else adapters of negligible size.
    """

    num_params: int
    num_heads: int
    hidden_size: int
    num_layers: int
    num_tokens: int
    trains_all: bool


@dataclass(frozen=True)
class ChosenLayout:
    """A layout and what is estimated for it.

    Attributes:
        tensor: tensor ranks.
        stage: ZeRO's.
        recompute: value of `train.recompute`.
        bytes_per_rank: estimated peak.
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


def choose_layout(sizes: Sizes, num_devices: int, bytes_per_device: int) -> ChosenLayout:
    """Return the first of `CANDIDATES` that is estimated to fit.

    Args:
        sizes: of the run.
        num_devices: all devices of the run.
        bytes_per_device: memory of each.

    Raises:
        ConfigError: none fits.
    """
    smallest = None
    for candidate in CANDIDATES:
        if num_devices % candidate.tensor or sizes.num_heads % candidate.tensor:
            continue
        found = replace(candidate, bytes_per_rank=estimate(sizes, candidate, num_devices))
        if found.bytes_per_rank <= _USABLE * bytes_per_device:
            return found
        smallest = found if smallest is None else min(smallest, found, key=lambda one: one.bytes_per_rank)
    assert smallest is not None
    lora = "" if not sizes.trains_all else ", or --lora"
    raise ConfigError(
        f"--gpus={num_devices}: the model needs about {smallest.bytes_per_rank / GB:.1f} GB on each GPU, which has "
        f"{bytes_per_device / GB:.1f} GB; try more GPUs, GPUs with more memory (--gpu-memory){lora}"
    )


def estimate(sizes: Sizes, layout: ChosenLayout, num_devices: int) -> int:
    """Return the estimated peak of bytes on each device."""
    tensor, divided_by = layout.tensor, num_devices
    trained = sizes.num_params if sizes.trains_all else 0
    own, shared = sizes.num_params / tensor, sizes.num_params / divided_by
    weights = 2 * (shared if layout.stage == 3 else own)
    gradients = (2 * shared if layout.stage == 3 else 6 * own) if trained else 0
    states = 12 * shared if trained else 0
    one_layer = 2 * own / sizes.num_layers * 2 if layout.stage == 3 else 0  # gathered, and the next one
    kept = _BYTES_KEPT if layout.recompute == "none" else _BYTES_RECOMPUTED
    activations = sizes.num_tokens * sizes.hidden_size * (kept * sizes.num_layers + _BYTES_KEPT) / tensor
    return int(weights + gradients + states + one_layer + activations + _RESERVED_BYTES)
