"""Optimizers under DeepSpeed, one file each, registered by name."""

from megatron_ds.engine.optimizers import adamw  # the default, which messages name first

# isort: split
from megatron_ds.engine.optimizers import adafactor, adamw8bit, lion, muon, sgd
from megatron_ds.engine.optimizers.guarded import (
    ADAM_STATE,
    LR_FACTOR,
    OPTIMIZERS,
    STEPS,
    GuardedOptimizer,
    Place,
    make_optimizer,
    state_kinds_of,
)
from megatron_ds.engine.optimizers.weight_average import EMA, WeightAverage, begin_average

__all__ = [
    "ADAM_STATE",
    "EMA",
    "LR_FACTOR",
    "OPTIMIZERS",
    "STEPS",
    "GuardedOptimizer",
    "Place",
    "WeightAverage",
    "adafactor",
    "adamw",
    "adamw8bit",
    "begin_average",
    "lion",
    "make_optimizer",
    "muon",
    "sgd",
    "state_kinds_of",
]
