"""From text to Megatron's `.bin` and `.idx`: in parallel, gone on with where it was cut, whole or not there."""

from megatron_ds.data.prepare.run import Prepared, PrepareOptions, State, prepare

__all__ = ["PrepareOptions", "Prepared", "State", "prepare"]
