"""`megatron-ds plan`: memory, bytes and time of a run on machines that need not be here."""

from __future__ import annotations

import json as json_module
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_ds.cli.json_file import check_json_file
from megatron_ds.cli.plan_failures import (
    GoodputPlot,
    MtbfHours,
    RestartSeconds,
    SaveSeconds,
    SpareNodes,
    Stragglers,
    draw_failures,
    faults_of,
    parse_saving,
    parse_stragglers,
)
from megatron_ds.cli.plan_search import Search, Write, check_search, search_and_print, search_facts
from megatron_ds.errors import ConfigError, show
from megatron_ds.paths import expanded

if TYPE_CHECKING:
    from megatron_ds.config import RunConfig
    from megatron_ds.planner.pipeline.stragglers import RandomSlowness
    from megatron_ds.training.planning import RunPlanner

HELP = """Plan a run: does it fit, how fast is it, what does it cost, what limits it, and what to change.

Nothing is started: it needs no GPU, no weights (config.json is enough) and no data. The exit status is 1 if the run
does not fit. docs/planning.md describes the numbers and how far they can be relied on.

--search compares all layouts instead, and --write DIR writes the best ones as run files. --calibrate FILE measures this
machine, for plans of runs on it: --device FILE.

Examples:

\b
  megatron-ds plan run.yaml --nodes 16 --gpus-per-node 8 --device h100
  megatron-ds plan run.yaml --device a100-80 parallel.tensor=4
  megatron-ds plan run.yaml --nodes 64 --network 200Gb/s --json plan.json
  megatron-ds plan run.yaml --nodes 64 --tokens 15T --price 2.5
  megatron-ds plan run.yaml --nodes 64 --search --write layouts
  megatron-ds plan run.yaml --nodes 64 --goodput-plot goodput.png
  megatron-ds plan --calibrate here.yaml
"""

_MULTIPLES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def plan(
    run: Annotated[
        Path | None, typer.Argument(help="The run file (YAML).", metavar="RUN.yaml", parser=expanded)
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Values that override those of the run file.", metavar="key.sub=value")
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="Devices, such as h100, a100-80, b200, or a profile, FILE.yaml.")
    ] = "h100",
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[
        int | None,
        typer.Option("--gpus-per-node", metavar="G", min=1, help="Devices, or ranks on a CPU, of each (default: 8)."),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="SPEED",
            help="Network cards of a node: 400Gb/s (one for each device), 'ethernet 2x100Gb/s' (default: the usual).",
        ),
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", metavar="SIZE", help="Memory to use of each device (default: all).")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens of the training, such as 300B or 15T (default: the run's).")
    ] = None,
    price: Annotated[float | None, typer.Option(metavar="X", min=0, help="Price of a device for an hour.")] = None,
    mtbf_hours: MtbfHours = None,
    save_seconds: SaveSeconds = None,
    restart_seconds: RestartSeconds = 300.0,
    spare_nodes: SpareNodes = None,
    stragglers: Stragglers = None,
    goodput_plot: GoodputPlot = None,
    search: Search = False,
    write: Write = None,
    calibrate: Annotated[
        Path | None,
        typer.Option("--calibrate", metavar="FILE", parser=expanded, help="Measure this machine, write its profile."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", parser=expanded, help="Write all numbers to this file.")
    ] = None,
) -> int:
    """Run the command; see HELP. Returns the exit status."""
    if calibrate is not None:
        return _calibrate(calibrate, gpus_per_node)
    if run is None:
        raise ConfigError("RUN.yaml is missing; try megatron-ds plan run.yaml --nodes 2")
    check_search(search, write, stragglers)
    check_json_file(json)
    total = parse_tokens(tokens) if tokens is not None else None
    faults = faults_of(nodes, mtbf_hours, restart_seconds, spare_nodes)
    saving = parse_saving(save_seconds) if save_seconds is not None else None
    slow = parse_stragglers(stragglers) if stragglers is not None else None
    planner = _planner(_load(run, overrides or []), device, nodes, gpus_per_node, network, gpu_memory, slow)
    if search:
        found = search_and_print(planner.searched(), planner.limit_bytes, write)
        if json is not None:
            _write_json(json, search_facts(found, planner.searched().given.tokens_per_step))
        return 0
    from megatron_ds.cli.plan_tables import print_plan
    from megatron_ds.planner.advice import advise
    from megatron_ds.planner.failures.run_failures import plan_run_failures
    from megatron_ds.planner.plan_facts import plan_facts

    planned = planner.plan()
    failures = plan_run_failures(planned.given, planned.time, planned.size.num_trained, faults, planner.device, saving)
    total = total if total is not None else planner.tokens_of_run(planned)
    campaign = planned.campaign(total, price, failures.slowdown) if total is not None else None
    advice = advise(planned, planner.candidate, planner.replan)
    if json is not None:
        _write_json(json, plan_facts(planned, campaign, advice, failures))
    if goodput_plot is not None:
        draw_failures(failures, planner.machines.ranks_per_node, goodput_plot)
    print_plan(planned, campaign, advice, failures)
    return 0 if planned.fits else 1


def _load(run: Path, overrides: list[str]) -> RunConfig:
    """Read the run file, before anything that takes seconds to import."""
    from megatron_ds.config import load_run

    return load_run(run, overrides)


def _planner(
    given: RunConfig,
    device: str,
    nodes: int,
    gpus_per_node: int | None,
    network: str | None,
    gpu_memory: str | None,
    slow: RandomSlowness | None,
) -> RunPlanner:
    """Return the planner of a run on machines."""
    from megatron_ds.log import quiet_libraries
    from megatron_ds.planner.profiles import find_device, find_network

    profile, ranks = find_device(device), gpus_per_node or 8
    joined = find_network(network, profile, ranks)
    quiet_libraries()  # before DeepSpeed says that it finds no GPU

    from megatron_ds.hf.weight_files import parse_size
    from megatron_ds.planner.plan_input import Machines
    from megatron_ds.planner.search.space import with_candidate
    from megatron_ds.training.automatic import choose, describe_choice
    from megatron_ds.training.planning import RunPlanner

    limit = parse_size(gpu_memory, "--gpu-memory") if gpu_memory is not None else None
    machines = Machines(nodes, ranks, profile.type)
    planner = RunPlanner(given.without_choices(), machines, profile, joined, limit, slow)
    if not given.choices:
        return planner
    chosen = choose(planner, given.choices)
    print(describe_choice(given.choices, chosen, profile))
    return RunPlanner(with_candidate(given.without_choices(), chosen.candidate), machines, profile, joined, limit, slow)


def _calibrate(file: Path, ranks: int | None) -> int:
    """Measure this machine and write its profile."""
    from megatron_ds.log import quiet_libraries

    quiet_libraries()
    if file.suffix not in (".yaml", ".yml") or file.is_dir() or not file.absolute().parent.is_dir():
        raise ConfigError(f"--calibrate={file} is not a .yaml file in a directory that exists; try here.yaml")
    from megatron_ds.planner.calibration.calibrate import calibrate, write_profile

    print("measuring this machine; it takes a few minutes, during which nothing else should run", flush=True)
    write_profile(calibrate(file.stem, ranks), file)
    print(f"{file}: use it with megatron-ds plan RUN.yaml --device {file}")
    return 0


def _write_json(file: Path, facts: object) -> None:
    file.write_text(json_module.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def parse_tokens(text: str) -> float:
    """Return a number of tokens, such as `1e12`, `300B` or `15T`.

    Raises:
        ConfigError: it is not one.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)([KMBT]?)", text.strip().replace(",", ""), re.IGNORECASE)
    number = float(match[1]) * _MULTIPLES[match[2].upper()] if match else 0.0
    if not number:
        raise ConfigError(f"--tokens={show(text)} is not a number of tokens; try 300B, 15T or 1e12")
    return number
