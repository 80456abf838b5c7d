"""Examination of a machine: what a run needs there, what is missing, and how to get it."""

from megatron_ds.doctor.examine import Examination, examine
from megatron_ds.doctor.finding import Finding, Level

__all__ = ["Examination", "Finding", "Level", "examine"]
