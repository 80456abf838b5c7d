"""`megatron-ds`: parse, run, and turn what went wrong into one line and an exit status."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import typer

from megatron_ds.cli.display import print_error
from megatron_ds.cli.train import train
from megatron_ds.errors import LaunchError, MegatronDSError

app = typer.Typer(
    name="megatron-ds",
    help="Train and fine-tune transformers with Megatron's model parallelism on DeepSpeed's engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(train)


@app.callback()
def _root() -> None:
    """Train and fine-tune transformers with Megatron's model parallelism on DeepSpeed's engine."""


def main() -> None:
    """Exit status: 0 done; 2 the user's mistake, in one line; 130 interrupted; 1 anything else."""
    try:
        app()
    except LaunchError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1)
    except MegatronDSError as problem:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print_error(str(problem))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
