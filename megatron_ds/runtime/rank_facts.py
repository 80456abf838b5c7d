"""Facts that must be the same on every rank of a job: versions, environment, plugins, files of models and data.

A launcher's ranks read run files, arguments, packages, models and data of their own machines.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import xxhash

from megatron_ds.config import DataSection, RunConfig, load_deepspeed
from megatron_ds.engine import device_type
from megatron_ds.parallel.agreement import Facts
from megatron_ds.plugins import GROUP
from megatron_ds.runtime.file_facts import data_facts, flatten, model_facts
from megatron_ds.version import __version__

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "peft", "datasets", "safetensors", "numpy", "triton")
ENVIRONMENT = (
    "NVIDIA_TF32_OVERRIDE",  # the precision of products
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "CUBLAS_WORKSPACE_CONFIG",  # the order of sums
    "TORCH_BLAS_PREFER_CUBLASLT",
    "FLASH_ATTENTION_DETERMINISTIC",
    "MKL_CBWR",
    "ATEN_CPU_CAPABILITY",  # the instructions of a CPU
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_COMPILE_DISABLE",  # what is compiled
    "TORCHDYNAMO_DISABLE",
    "TRITON_INTERPRET",
    "NCCL_ALGO",  # how ranks sum; they wait for each other where it differs
    "NCCL_PROTO",
)
"""Environment variables that change results."""
FIXES: Mapping[str, str] = {
    "versions": "install the same packages and the same code on every machine",
    "run file": "start every rank with the same run file and overrides",
    "command": "start every rank with the same command",
    "plugins": "copy the same code to every machine",
    "environment": "set it to the same value on every machine",
    "device": "start every rank on the same kind of device",
    "model": "copy the same files to every machine, or read them from a disk that all share",
    "data": "copy the same files to every machine, or read them from a disk that all share",
}
"""Kind of facts -> the end of the line that names a difference."""


MAY_DIFFER: Mapping[str, str] = {
    "data.cache_dir": "each machine may keep its own tokenized text",
    "checkpoint.local": "it is a disk of each machine's own",
}
"""Keys of the run file that may differ between ranks, with the reason. `deepspeed` is compared by its content."""


def process_facts() -> dict[str, Mapping[str, str]]:
    """Return the facts about this process that no run file changes."""
    return {
        "versions": _versions(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "device": {"the device": device_type()},
    }


def run_facts(run: RunConfig, data: DataSection | None) -> Facts:
    """Return the facts of a run that must be the same on every rank.

    Args:
        run: the run file.
        data: the section whose files are read; None = none.

    Raises:
        ConfigError: the DeepSpeed JSON cannot be read.
    """
    facts = {
        **process_facts(),
        "run file": run_file_facts(run),
        "plugins": plugin_facts(run.imports),
        "model": _model_files(run),
        "data": {} if data is None else section_facts(data),
    }
    return in_order(facts)


def section_facts(data: DataSection) -> dict[str, str]:
    """Return the facts of the files of a `data` section."""
    found: dict[str, str] = {}
    for split in ("train", "valid"):
        sources = getattr(data, split)
        for number, source in enumerate(sources):
            place = f"[{number}]" if len(sources) > 1 else ""
            found |= data_facts(f"data.{split}{place}", source.path)
    return found


def _model_files(run: RunConfig) -> dict[str, str]:
    resume = run.checkpoint.resume
    named = {
        "model.path": run.model.path,
        "model.tokenizer": run.model.tokenizer,
        "peft": run.peft if isinstance(run.peft, str) else None,
        "checkpoint.resume": None if resume in ("auto", "never") else resume,
    }
    return {name: value for field, path in named.items() for name, value in model_facts(field, path).items()}


def run_file_facts(run: RunConfig) -> dict[str, str]:
    """Return the keys of a run file with their values, apart from those that may differ."""
    content = {**run.model_dump(), "deepspeed": load_deepspeed(run.deepspeed)}
    return {name: value for name, value in flatten("", content) if name not in MAY_DIFFER}


def in_order(facts: Facts) -> Facts:
    """Return facts with their kinds in the order of `FIXES`: a difference explains those that come after it."""
    return {kind: facts[kind] for kind in FIXES if kind in facts}


def plugin_facts(imports: Sequence[str]) -> dict[str, str]:
    """Return the digests of the code of modules that register names.

    Args:
        imports: the names of those that the run file imports; those of installed packages are added.
    """
    named = {f"imports: {name}": name for name in imports}
    named |= {f"plugin {point.name}": point.module for point in entry_points(group=GROUP)}
    return {label: _code_of(name) for label, name in named.items()}


def _versions() -> dict[str, str]:
    found = {"megatron_ds": f"{__version__} (code {_code_of('megatron_ds')})"}
    found["python"] = ".".join(platform.python_version_tuple()[:2])
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def _code_of(name: str) -> str:
    """Return the digest of a module's source, of a package with its modules."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return "unknown"
    path = Path(file)
    sources = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    digest = xxhash.xxh3_64()
    for source in sources:
        digest.update(f"{source.relative_to(path.parent)}\n".encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()
