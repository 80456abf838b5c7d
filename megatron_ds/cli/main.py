"""`megatron-ds`: parse the command line, run the command, and turn errors into one line and an exit status.

Nothing heavy is imported here, so that `--help` is fast: each command imports what it needs when it runs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Annotated

import typer

from megatron_ds.cache import use_writable_caches
from megatron_ds.cli.doctor import HELP as DOCTOR_HELP
from megatron_ds.cli.doctor import doctor
from megatron_ds.cli.evaluate import HELP as EVALUATE_HELP
from megatron_ds.cli.evaluate import evaluate
from megatron_ds.cli.examples import HELP as EXAMPLES_HELP
from megatron_ds.cli.examples import examples
from megatron_ds.cli.export import HELP as EXPORT_HELP
from megatron_ds.cli.export import export
from megatron_ds.cli.families import HELP as FAMILIES_HELP
from megatron_ds.cli.families import families
from megatron_ds.cli.generate import HELP as GENERATE_HELP
from megatron_ds.cli.generate import generate
from megatron_ds.cli.import_hf import HELP as IMPORT_HELP
from megatron_ds.cli.import_hf import import_hf
from megatron_ds.cli.init import HELP as INIT_HELP
from megatron_ds.cli.init import init
from megatron_ds.cli.inspect import HELP as INSPECT_HELP
from megatron_ds.cli.inspect import inspect
from megatron_ds.cli.plan import HELP as PLAN_HELP
from megatron_ds.cli.plan import plan
from megatron_ds.cli.prepare import HELP as PREPARE_HELP
from megatron_ds.cli.prepare import prepare
from megatron_ds.cli.report import HELP as REPORT_HELP
from megatron_ds.cli.report import report
from megatron_ds.cli.streams import StandardStreams
from megatron_ds.cli.train import HELP as TRAIN_HELP
from megatron_ds.cli.train import train
from megatron_ds.cli.verify import HELP as VERIFY_HELP
from megatron_ds.cli.verify import verify
from megatron_ds.errors import ConfigError, LaunchError, MegatronDSError
from megatron_ds.log import flush_streams
from megatron_ds.parallel.launcher_process import end_with_launcher, find_launcher
from megatron_ds.version import __version__

PROGRAM = "megatron-ds"
ROOT_HELP = """Train and fine-tune transformers with Megatron's model parallelism on DeepSpeed's engine.

Examples:

\b
  megatron-ds init run.yaml --model hf_dir --data corpus.jsonl --gpus 8
  megatron-ds plan run.yaml --nodes 2 --device h100
  megatron-ds prepare corpus.jsonl --tokenizer hf_dir --output data/corpus
  megatron-ds train run.yaml --nproc 2
  megatron-ds inspect out/run
  megatron-ds evaluate out/run
  megatron-ds export out/run out/hf
  megatron-ds verify out/hf --tp 2
  megatron-ds doctor
  megatron-ds generate out/hf --prompt "Once upon a time"
"""
LAUNCHED = ("train", "evaluate", "generate", "doctor")
"""Commands that a launcher may start on several ranks."""
PRINT_WAIT_S = 5.0  # torchrun and `deepspeed` end all ranks when one exits: leave rank 0 time to print

app = typer.Typer(
    name=PROGRAM,
    help=ROOT_HELP,
    invoke_without_command=True,
    add_completion=True,
    context_settings={"max_content_width": 110},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(help=TRAIN_HELP, short_help="Pretrain or fine-tune a model from a run file.")(train)
app.command(help=PREPARE_HELP, short_help="Tokenize text once, into Megatron's .bin and .idx files.")(prepare)
app.command(help=EXPORT_HELP, short_help="Write a checkpoint as a Hugging Face directory.")(export)
app.command("import", help=IMPORT_HELP, short_help="Read a Hugging Face directory into a checkpoint.")(import_hf)
app.command(help=VERIFY_HELP, short_help="Compare our model with transformers, number by number.")(verify)
app.command(help=EVALUATE_HELP, short_help="Compute a model's loss on data, or its scores on tasks.")(evaluate)
app.command(help=GENERATE_HELP, short_help="Continue prompts by a model on several ranks.")(generate)
app.command(help=INSPECT_HELP, short_help="Show what a checkpoint, a model or data hold.")(inspect)
app.command(help=REPORT_HELP, short_help="Write report.html about a run.")(report)
app.command(help=FAMILIES_HELP, short_help="Show the supported families of models.")(families)
app.command(help=EXAMPLES_HELP, short_help="List the examples, or copy one.")(examples)
app.command(help=DOCTOR_HELP, short_help="Examine this machine, and what a run needs.")(doctor)
app.command(help=PLAN_HELP, short_help="Plan memory, time and cost of a run on machines.")(plan)
app.command(help=INIT_HELP, short_help="Write a first run file for a model and data.")(init)


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    # The `deepspeed` launcher passes it before the command; the environment has it too.
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    if version:
        print(PROGRAM, __version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


def main() -> None:
    """Run the command line and exit: 0 done; 2 a user error, in one line; 130 interrupted; 1 any other error."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # tokenizers would switch itself off in forked ranks
    arguments = sys.argv[1:]
    only_shows = _command(arguments) in ("", "inspect", "families", "doctor", "plan") or "--help" in arguments
    streams = StandardStreams(announces=not only_shows)
    streams.install()
    status = _run(arguments)
    if only_shows and streams.lost_output and status == 0:
        _print_error(f"standard output cannot be written: {streams.lost_output}; try another file or disk", arguments)
        status = 2
    sys.exit(status)


def _command(arguments: Sequence[str]) -> str:
    """Return the name of the command; empty for the options of the program itself."""
    return next((argument for argument in arguments if not argument.startswith("-")), "")


def _run(arguments: list[str]) -> int:
    try:
        _prepare_surroundings(arguments)
        if _command(arguments) in LAUNCHED:
            end_with_launcher(_rank(arguments))  # importing torch takes seconds
        status = app(arguments, prog_name=PROGRAM, standalone_mode=False)
    except LaunchError as problem:
        print(f"error: {problem}", file=sys.stderr)  # with the traceback of a rank
        return _leave(1)
    except MegatronDSError as problem:
        _fail(str(problem), arguments)
        return _leave(2)
    except typer.TyperException as problem:
        hint = f"see {getattr(getattr(problem, 'ctx', None), 'command_path', PROGRAM)} --help"
        option = getattr(problem, "option_name", None) or ""
        if "." in option:  # a key of the run file
            hint = f"write {option.lstrip('-')}=VALUE, without dashes"
        _fail(f"{problem.format_message().rstrip('.')}; {hint}", arguments)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as problem:  # a defect, or a package that only this machine lacks
        _tell_peers(f"{type(problem).__name__}: {problem}", arguments)
        raise
    return status if isinstance(status, int) else 0  # the code of typer.Exit, or the value that a command returned


def _leave(status: int) -> int:
    """Return the exit status; end a launcher's rank with it: destroying its process group could wait for its peers."""
    if "RANK" in os.environ or find_launcher() is not None:
        flush_streams()
        os._exit(status)
    return status


def _prepare_surroundings(arguments: Sequence[str]) -> None:
    """Give libraries directories that can be written, before a command imports them.

    Raises:
        ConfigError: the current directory does not exist any more, or there is no place for caches.
    """
    if _command(arguments) == "":
        return
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the current directory does not exist any more; try cd to one that does") from None
    moved = use_writable_caches()
    if moved and _command(arguments) == "train" and _rank(arguments) == "0":
        print(moved, file=sys.stderr)


def _rank(arguments: Sequence[str]) -> str:
    """Return the rank that this process has where a launcher starts several; other commands have no ranks."""
    if _command(arguments) not in LAUNCHED:
        return "0"
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID")) or "0"  # empty: left over in the shell


def _fail(message: str, arguments: Sequence[str]) -> None:
    """Print an error, and tell it to the other ranks if they wait for this one. Rank 0 prints first."""
    if _rank(arguments) == "0":
        _print_error(message, arguments)
        _tell_peers(message, arguments)
    else:
        _tell_peers(message, arguments)
        _print_error(message, arguments)


def _tell_peers(message: str, arguments: Sequence[str]) -> None:
    if _command(arguments) not in LAUNCHED:
        return
    from megatron_ds.parallel.early_errors import tell_peers

    tell_peers(" ".join(message.split()))


def _print_error(message: str, arguments: Sequence[str]) -> None:
    """Print an error once for all ranks of a run.

    An error that gets here on another rank than 0 occurs on every rank. Launchers end the others when rank 0 has
    printed it; if this rank lives on, it may be the only one, and prints it too.
    """
    from megatron_ds.cli.display import print_error

    rank = _rank(arguments)
    if rank == "0":
        print_error(message)
        return
    time.sleep(PRINT_WAIT_S)
    print_error(message, f"rank {rank}: ")


if __name__ == "__main__":
    main()
