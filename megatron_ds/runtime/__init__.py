"""Models and engines without a run file: what `training`, `verify`, the bench and Python programs build on."""

from megatron_ds.runtime.datasets import open_dataset
from megatron_ds.runtime.loaded_model import LoadedModel, load_model
from megatron_ds.runtime.model_engine import ModelEngine
from megatron_ds.runtime.process_session import Session, session

__all__ = ["LoadedModel", "ModelEngine", "Session", "load_model", "open_dataset", "session"]
