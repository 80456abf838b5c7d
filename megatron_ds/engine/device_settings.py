"""Settings of a rank's device: environment variables that CUDA reads when it starts, and torch's global switches.

They are made in one place, because their order matters: a variable is without effect once the process has started CUDA.
`start_distributed` sets the variables before anything asks for a device, and the switches when the device is known. It
is the same for forked ranks and for those of torchrun, `deepspeed` and srun. What the user has set is kept.
"""

from __future__ import annotations

import ctypes
from collections.abc import MutableMapping
from dataclasses import dataclass

import torch

from megatron_ds.errors import ConfigError

ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Names of one setting of torch's allocator; the second is the older one, and torch reads it too."""

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_REPEATABLE_WORKSPACES = (":4096:8", ":16:8")  # cuBLAS, "Results reproducibility"
_MAX_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_BLACKWELL = 10  # major compute capability
_AMPERE = (8, 0)


@dataclass(frozen=True)
class DeviceSettings:
    """Settings of the devices of a run.

    Attributes:
        tensor: tensor-parallel size.
        zero_stage: ZeRO stage.
        deterministic: whether the same operations on the same values give the same bits on a GPU.
        tf32: whether products in fp32 are rounded to TF32 (10 bits of mantissa) on a GPU.
    """

    tensor: int = 1
    zero_stage: int = 0
    deterministic: bool = False
    tf32: bool = False

    def set_environment(self, environ: MutableMapping[str, str]) -> None:
        """Set the variables that CUDA and torch read when CUDA starts, where they are not set.

        - Segments of torch's allocator grow instead of leaving holes between them, so that less memory is lost to
          fragmentation.
        - With tensor parallelism, kernels start in the order in which they are issued, so that a reduction that is
          issued before a product overlaps it (Megatron-LM's rule for GPUs before Blackwell). Not at ZeRO-3, whose
          gathers ahead would then wait for computation.
        - A deterministic run has cuBLAS use a workspace of its own for each stream.

        Raises:
            ConfigError: the run is deterministic, and the environment or the state of the process forbids it.
        """
        if not any(name in environ for name in ALLOCATOR_NAMES):
            environ[ALLOCATOR_NAMES[0]] = "expandable_segments:True"
        if self.tensor > 1 and self.zero_stage < 3 and _MAX_CONNECTIONS not in environ and not _is_blackwell():
            environ[_MAX_CONNECTIONS] = "1"
        if self.deterministic:
            self._set_workspace(environ)

    def _set_workspace(self, environ: MutableMapping[str, str]) -> None:
        given = environ.get(CUBLAS_WORKSPACE)
        if given is None and torch.cuda.is_initialized():
            raise ConfigError(
                "train.deterministic=true has to be known before this process uses CUDA; try a fresh process, or set "
                f"{CUBLAS_WORKSPACE}={_REPEATABLE_WORKSPACES[0]} in the environment"
            )
        if given is not None and given not in _REPEATABLE_WORKSPACES:
            raise ConfigError(
                f"train.deterministic=true, and {CUBLAS_WORKSPACE}={given} in the environment lets cuBLAS vary; "
                f"nearest: {_REPEATABLE_WORKSPACES[0]}"
            )
        environ.setdefault(CUBLAS_WORKSPACE, _REPEATABLE_WORKSPACES[0])

    def set_switches(self, device: torch.device) -> None:
        """Set torch's global switches; on a CPU, whose results repeat and which has no TF32, nothing changes.

        In a deterministic run torch takes flash or memory-efficient attention, with a backward pass that sums in a
        fixed order, and never cuDNN's; torch.compile chooses no kernel by its speed; and an operation that has no
        deterministic kernel raises a RuntimeError.
        """
        if device.type != "cuda":
            return
        if self.deterministic:
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # no result reads it
        if self.tf32:
            torch.set_float32_matmul_precision("high")

    def check_precision(self, precision: str) -> None:
        """Check that TF32 is asked for in a run with products in fp32.

        Args:
            precision: of the run's computation, such as bf16.

        Raises:
            ConfigError: the run has no such products.
        """
        if self.tf32 and precision != "fp32":
            raise ConfigError(
                f"train.tf32=true rounds products in fp32, and this run computes in {precision}; try train.tf32=false"
            )

    def describe_idle(self, device: torch.device) -> str | None:
        """Return a line about a setting that the device makes useless; None = no such."""
        if not self.tf32:
            return None
        if device.type != "cuda":
            return f"train.tf32=true does nothing on a device of type {device.type}"
        if torch.cuda.get_device_capability(device) < _AMPERE:
            return f"train.tf32=true does nothing on {torch.cuda.get_device_name(device)}, which has no TF32"
        return None


DEFAULT_SETTINGS = DeviceSettings()


def _is_blackwell() -> bool:
    """Return whether the first GPU is of the Blackwell generation or later; False if NVML cannot be asked.

    NVML is asked because torch would start CUDA for it.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle))
        or nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    )
    return not failed and major.value >= _BLACKWELL
