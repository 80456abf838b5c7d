"""The first part of both commands: the device and the versions."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench.gpu.record import DEVICE, TINY, record, wait_for_turn

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "numpy", "flash-attn", "liger-kernel")
SMALL_SHAPES = "small, to test the command itself"
WITHOUT_GIT = os.environ.get("COMMIT", "unknown")
NO_DEVICE = "no CUDA device was found; try DEVICE=cpu TINY=1, which tests the commands themselves\n"


def main() -> None:
    """Record the environment; ends with status 2 if there is no CUDA device."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(NO_DEVICE)
        raise SystemExit(2)
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    found = {"date": datetime.date.today().isoformat(), "commit": commit(), "system": system, **(_cuda() or _cpu())}
    if TINY:
        found["shapes"] = SMALL_SHAPES
    record("environment", "device", None, **found, versions={name: _version(name) for name in PACKAGES})


def commit() -> str:
    """Return the commit of this tree, with a "+" if files were changed; without git, COMMIT of the environment."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True)
    except OSError:
        return WITHOUT_GIT
    return head.stdout.strip() + "+" * bool(changed.stdout.strip()) if head.returncode == 0 else WITHOUT_GIT


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> dict[str, str]:
    return {"device": f"{platform.processor() or platform.machine()} (CPU)", "driver": "none", "cuda": "none"}


def _cuda() -> dict[str, object] | None:
    if DEVICE != "cuda":
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": torch.cuda.get_device_name(0),
        "driver": _driver(),
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "sms": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (done.stdout.split() or ["unknown"])[0]


if __name__ == "__main__":
    wait_for_turn()
    main()
