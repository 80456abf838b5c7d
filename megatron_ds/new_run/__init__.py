"""A first run file for a model, its data and a number of devices."""

from megatron_ds.new_run.write import NewRun, write_run

__all__ = ["NewRun", "write_run"]
