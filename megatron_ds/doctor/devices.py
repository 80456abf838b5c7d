"""Accelerators as torch, DeepSpeed and the driver see them, and the compilers for their kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping

from megatron_ds.doctor.finding import Finding, note, problem

_QUERY_TIMEOUT_S = 20.0
_GIB = 2**30


def find_devices(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Yield the accelerator that DeepSpeed uses, its devices, NCCL, and the driver."""
    import torch

    from megatron_ds.engine import device_count, device_type

    kind, driver = device_type(), driver_gpus()
    yield Finding("accelerator", kind + (" (DS_ACCELERATOR is set)" if "DS_ACCELERATOR" in environ else ""))
    yield from compare_with_driver(driver, kind, torch.version.cuda, torch.__version__, environ)
    if kind != "cuda":
        return
    for index in range(device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        size = f"{total / _GIB:.0f} GiB, {free / _GIB:.0f} free"
        value = f"{about.name}, {size}, compute capability {about.major}.{about.minor}"
        if free < 0.9 * total:
            yield note(f"gpu {index}", value, "nvidia-smi, which lists the processes that use it")
        else:
            yield Finding(f"gpu {index}", value)
    if torch.distributed.is_nccl_available():
        yield Finding("nccl", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield problem(
            "nccl", "this torch has none", "torch's CUDA build for Linux: https://pytorch.org/get-started/locally"
        )


def driver_gpus() -> list[str]:
    """Return the GPUs that NVIDIA's driver lists, as `name, driver version`; empty without a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return found.stdout.splitlines() if found.returncode == 0 else []


def compare_with_driver(
    gpus: list[str], kind: str, cuda: str | None, version: str, environ: Mapping[str, str]
) -> Iterator[Finding]:
    """Yield what the driver lists, and why DeepSpeed does not use it if it does not.

    Args:
        gpus: what `driver_gpus` returns.
        kind: the accelerator that DeepSpeed uses.
        cuda: the CUDA version that torch was built for; None = it was built without.
        version: torch's version.
        environ: the environment.
    """
    if not gpus:
        if kind == "cpu":
            yield Finding("gpus", "none listed by a driver: runs train on the CPU")
        return
    name, _, driver = gpus[0].partition(", ")
    listed = f"{len(gpus)} x {name}, driver {driver}"
    if kind == "cuda":
        yield Finding("driver", f"{listed}; torch is built for CUDA {cuda}")
    elif cuda is None:
        fix = "torch's CUDA build: https://pytorch.org/get-started/locally"
        yield problem("driver", f"{listed}, but torch {version} is built without CUDA", fix)
    elif environ.get("DS_ACCELERATOR") == kind:
        yield note("driver", f"{listed}, which DS_ACCELERATOR={kind} leaves alone", "unset DS_ACCELERATOR")
    else:
        hidden = environ.get("CUDA_VISIBLE_DEVICES")
        fix = (
            "unset CUDA_VISIBLE_DEVICES"
            if hidden is not None
            else f"a driver for CUDA {cuda}, or torch built for an older CUDA"
        )
        cause = f" (CUDA_VISIBLE_DEVICES={hidden})" if hidden is not None else ""
        yield problem("driver", f"{listed}, but torch for CUDA {cuda} finds none{cause}", fix)


def find_compilers() -> Iterator[Finding]:
    """Yield the compilers that torch.compile and DeepSpeed's own operators need."""
    import torch

    compiler = next((name for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if shutil.which(name)), "")
    if compiler:
        yield Finding("c++", f"{shutil.which(compiler)}")
    else:
        fix = "apt install g++, or the compiler of your system"
        yield note("c++", "no compiler; train.compile and optimizer offload to the CPU need one", fix)
    if shutil.which("ninja"):
        yield Finding("ninja", f"{shutil.which('ninja')}")
    else:
        yield note("ninja", "not found; DeepSpeed's operators (offload, fp16 on CPUs) need it", "pip install ninja")
    if torch.version.cuda is None:
        return
    nvcc = shutil.which("nvcc") or shutil.which(os.path.join(os.environ.get("CUDA_HOME", ""), "bin", "nvcc"))
    if nvcc:
        yield Finding("nvcc", nvcc)
    else:
        fix = f"the CUDA {torch.version.cuda} toolkit, or CUDA_HOME=DIR, if you use them"
        yield note("nvcc", "not found; DeepSpeed's CUDA operators (fused optimizers, offload) need it", fix)
