"""Frozen parameters: patterns of Hugging Face tensor names -> native parameter names."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ds.errors import ConfigError
from megatron_ds.hf.config import HFModel
from megatron_ds.runtime.tensor_patterns import PatternKey, assign_parameters

_FREEZE = PatternKey("train.freeze", "freeze both or neither")


def frozen_parameters(model: HFModel, patterns: Sequence[str]) -> frozenset[str]:
    """Return the native names of the parameters whose Hugging Face tensors all match a pattern of `train.freeze`.

    Raises:
        ConfigError: a pattern matches nothing, only some tensors of a parameter, or the full model.
    """
    frozen = frozenset(assign_parameters(model.table, [patterns], _FREEZE))
    if len(frozen) == len(model.table):
        raise ConfigError("train.freeze matches every tensor of the model; leave some to train")
    return frozen
