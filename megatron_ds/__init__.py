"""Megatron's model parallelism on DeepSpeed's engine, with Hugging Face Transformers checkpoints in and out.

import megatron_ds as mds
mds.train(mds.load_run("run.yaml"))
mds.import_hf(hf_dir, checkpoint); mds.export_hf(checkpoint, hf_dir); mds.verify_hf(hf_dir, tp=2, pp=2)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_ds.version import __version__

if TYPE_CHECKING:
    from megatron_ds.checkpoint.convert import export_hf, import_hf
    from megatron_ds.config import load_run
    from megatron_ds.training.launch import train
    from megatron_ds.verify.run import verify_hf

# Imported on first use, so that importing the package costs nothing.
_PUBLIC = {
    "export_hf": "megatron_ds.checkpoint.convert",
    "import_hf": "megatron_ds.checkpoint.convert",
    "load_run": "megatron_ds.config",
    "train": "megatron_ds.training.launch",
    "verify_hf": "megatron_ds.verify.run",
}

__all__ = ["__version__", "export_hf", "import_hf", "load_run", "train", "verify_hf"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
