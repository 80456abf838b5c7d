"""Pipelines: where to cut a list of stages."""

from megatron_ds.pipeline.partition import partition

__all__ = ["partition"]
