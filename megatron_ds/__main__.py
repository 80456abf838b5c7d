"""`python -m megatron_ds`."""

from megatron_ds.cli.main import main

main()
