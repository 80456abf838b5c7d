"""Optimizers under DeepSpeed, one file each, registered by name."""

from megatron_ds.engine.optimizers import adamw, lion, sgd
from megatron_ds.engine.optimizers.guarded import (
    ADAM_STATE,
    OPTIMIZERS,
    STEPS,
    GuardedOptimizer,
    make_optimizer,
    state_kinds_of,
)

__all__ = [
    "ADAM_STATE",
    "OPTIMIZERS",
    "STEPS",
    "GuardedOptimizer",
    "adamw",
    "lion",
    "make_optimizer",
    "sgd",
    "state_kinds_of",
]
