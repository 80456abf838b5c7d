"""Megatron's model parallelism on DeepSpeed's engine, with Hugging Face Transformers checkpoints in and out.

import megatron_ds as mds
result = mds.train(mds.load_run("run.yaml"))
mds.import_hf(hf_dir, checkpoint); mds.export_hf(checkpoint, hf_dir); mds.verify_hf(hf_dir, tp=2, pp=2)
mds.evaluate(hf_dir, ["text.txt"], tp=2)
texts = [one.text for one in mds.generate(hf_dir, ["Once upon a time"], tp=2)]

with mds.session() as ranks:
    engine = ranks.build_engine(mds.load_model(hf_dir), parallel={"tensor": 2}, optimizer={"lr": 3e-4})

docs/python.md describes all of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_ds.version import __version__

if TYPE_CHECKING:
    from megatron_ds.checkpoint.convert import export_hf, import_hf
    from megatron_ds.config import build_run, load_run
    from megatron_ds.engine import DeviceSettings
    from megatron_ds.evaluation.run import evaluate
    from megatron_ds.generation.run import generate
    from megatron_ds.runtime import load_model, open_dataset, session
    from megatron_ds.training.launch import train
    from megatron_ds.verify.run import verify_hf

# Imported on first use, so that importing the package costs nothing.
_PUBLIC = {
    "DeviceSettings": "megatron_ds.engine",
    "build_run": "megatron_ds.config",
    "evaluate": "megatron_ds.evaluation.run",
    "export_hf": "megatron_ds.checkpoint.convert",
    "import_hf": "megatron_ds.checkpoint.convert",
    "generate": "megatron_ds.generation.run",
    "load_model": "megatron_ds.runtime",
    "load_run": "megatron_ds.config",
    "open_dataset": "megatron_ds.runtime",
    "session": "megatron_ds.runtime",
    "train": "megatron_ds.training.launch",
    "verify_hf": "megatron_ds.verify.run",
}

__all__ = [
    "DeviceSettings",
    "__version__",
    "build_run",
    "evaluate",
    "export_hf",
    "generate",
    "import_hf",
    "load_model",
    "load_run",
    "open_dataset",
    "session",
    "train",
    "verify_hf",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
