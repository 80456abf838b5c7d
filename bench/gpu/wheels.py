"""Wheels for a machine without a network: `make gpu-wheels` fetches them, the commands install them where they lack.

They are for Python 3.12 on x86-64 and are kept in `bench/gpu/wheels/`, which git ignores (22 MB).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIST, WHEELS = HERE / "wheels.txt", HERE / "wheels"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
BUILT_HERE = ("deepspeed",)  # no wheel on the index


def pins() -> dict[str, str]:
    """Return the versions in `wheels.txt` by package."""
    lines = (line.partition("#")[0].strip() for line in LIST.read_text().splitlines())
    return dict(line.split("==", 1) for line in lines if line)


def fetch(folder: Path = WHEELS) -> None:
    """Download the wheels with pip, which needs a network; those without a wheel are built."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    download = [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    download += ["--python-version", "3.12", "--implementation", "cp"]
    for platform in PLATFORMS:
        download += ["--platform", platform]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    # deepspeed's setup imports torch, and would otherwise look for a compiler of CUDA
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    names = [f"{name}=={pin}" for name, pin in pins().items()]
    built = [name for name in names if name.startswith(BUILT_HERE)]
    subprocess.run([*download, *(name for name in names if name not in built)], check=True)
    subprocess.run([*build, *built], check=True, env=environment)
    size = sum(file.stat().st_size for file in folder.iterdir())
    sys.stdout.write(f"{folder}: {len(names)} wheels, {size / 1e6:.0f} MB\n")


def missing() -> list[str]:
    """Return the packages of `wheels.txt` that this Python lacks, or has in another version."""
    return [name for name, pin in pins().items() if _installed(name) != pin]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def install_missing(folder: Path = WHEELS) -> Path | None:
    """Install the wheels in a temporary directory if this Python lacks packages; nothing else is changed.

    Returns:
        the directory for PYTHONPATH; None if nothing is missing, or there are no wheels.

    Raises:
        subprocess.CalledProcessError: pip failed.
    """
    files = sorted(folder.glob("*.whl"))
    if not files or not missing():
        return None
    digest = hashlib.sha256("\n".join(file.name for file in files).encode()).hexdigest()[:12]
    target = Path(tempfile.gettempdir()) / f"megatron_ds_wheels_{digest}"
    if not target.is_dir():
        unfinished = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        command += ["--no-cache-dir", "--disable-pip-version-check", "--upgrade", "--target", str(unfinished)]
        subprocess.run([*command, *map(str, files)], check=True)
        try:
            unfinished.rename(target)
        except OSError:  # another command has installed them meanwhile
            if not target.is_dir():
                raise
            shutil.rmtree(unfinished)
    return target


if __name__ == "__main__":
    fetch()
