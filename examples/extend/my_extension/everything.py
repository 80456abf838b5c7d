"""Register all of it; `imports` in run.yaml names this module."""

from examples.extend.my_extension import callback, data_format, family, objective

__all__ = ["callback", "data_format", "family", "objective"]
