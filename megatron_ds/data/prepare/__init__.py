"""Preparation of text as Megatron's `.bin` and `.idx`: parallel, resumable, atomic."""

from megatron_ds.data.prepare.run import Prepared, PrepareOptions, State, prepare

__all__ = ["PrepareOptions", "Prepared", "State", "prepare"]
