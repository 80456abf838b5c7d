"""The planner's part in the start of a run: values that it chooses, and a warning if the run is not going to fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod

import torch

from megatron_ds.config import RunConfig
from megatron_ds.errors import ConfigError, MegatronDSError
from megatron_ds.log import get_logger
from megatron_ds.parallel.agreement import Council
from megatron_ds.planner.plan import GB, plan_stages
from megatron_ds.planner.profiles import Device, find_network
from megatron_ds.planner.profiles.device import GIB
from megatron_ds.planner.search.branch_and_bound import FoundLayout, Limits
from megatron_ds.planner.search.find_layouts import find_layouts
from megatron_ds.planner.search.space import LAYOUT, Candidate, with_candidate
from megatron_ds.planner.this_machine import machines_here, this_device
from megatron_ds.training.planning import RunPlanner, input_of_model
from megatron_ds.training.resolve import ResolvedRun

_FIELDS = {"parallel=auto": LAYOUT, "train.micro_batch_size=auto": frozenset({"micro_batch_size"})}
"""Entry of `RunConfig.choices` -> the fields of `Candidate` that it leaves to the planner."""
USABLE = 0.95
"""Share of a device's memory that a chosen layout may be planned to need; the rest is for what plans do not know."""
SURELY_FITS = 0.05
"""Share of a rank's memory below which a rough bound of a run is: it is then not planned, which takes a second."""
_STATE_BYTES, _TOKEN_BYTES, _SCORE_BYTES, _LOGIT_BYTES = 20, 200, 12, 12
"""More than a parameter needs with Adam in mixed precision, and than is kept of a token in each layer and hidden unit,
of a pair of tokens in each head, and of a logit."""


@dataclass(frozen=True)
class Choice:
    """A run with all values that it needs, and lines on those that the planner chose."""

    run: RunConfig
    notes: tuple[str, ...] = ()


def with_choices(run: RunConfig, world_size: int, device_type: str) -> Choice:
    """Have the planner choose what a run leaves to it; the run as it is if it leaves nothing.

    Does not communicate. Ranks that a launcher started choose by `choose_together`.

    Args:
        run: the run file.
        world_size: number of ranks.
        device_type: torch's name, such as `cpu` or `cuda`.

    Raises:
        ConfigError: nothing fits, or the devices cannot be asked for their memory.
        MegatronDSError: the run is invalid.
    """
    if not run.choices:
        return Choice(run)
    chosen, note = _choose_here(run, world_size, device_type)
    return _applied(run, chosen, note)


def choose_together(run: RunConfig, world_size: int, device_type: str, council: Council | None) -> Choice:
    """Have the planner choose for the ranks of a launcher. Collective over the world if the run leaves it anything.

    Rank 0 chooses, once for all ranks, so that they agree: by its own device, with the least memory that any rank has.

    Args:
        run: the run file, the same on all ranks.
        world_size: number of ranks.
        device_type: torch's name, such as `cpu` or `cuda`.
        council: of the ranks; None = one rank, or ranks that this program forked.

    Raises:
        ConfigError: see `with_choices`; on the ranks that `Council.decide` names.
        TopologyError, LaunchError: see `Council.ask`.
    """
    if not run.choices or council is None:
        return with_choices(run, world_size, device_type)
    found = [""]

    def judge(texts: Sequence[str]) -> str:
        try:
            chosen, note = _choose_here(run, world_size, device_type, min(map(int, texts)))
        except MegatronDSError as problem:
            return str(problem)
        found[0] = json.dumps({"chosen": asdict(chosen), "note": note})
        return ""

    device = this_device(device_type, machines_here(world_size, device_type).ranks_per_node)
    council.decide("the memory of their devices", str(device.memory_bytes if device is not None else 0), judge)
    text = json.loads(council.from_first("the chosen layout", found[0]))
    return _applied(run, Candidate(**text["chosen"]), text["note"])


def _choose_here(
    run: RunConfig, world_size: int, device_type: str, memory_bytes: int | None = None
) -> tuple[Candidate, str]:
    """Return what the planner chooses for devices like this rank's, with so much memory, and a line on it."""
    machines = machines_here(world_size, device_type)
    device = this_device(device_type, machines.ranks_per_node)
    if device is None or memory_bytes == 0:
        raise ConfigError(
            f"{run.choices[0]} is chosen by the memory of the devices, which the driver does not tell; try a number"
        )
    if memory_bytes is not None:
        device = device.model_copy(update={"memory_gib": memory_bytes / GIB})
    network = find_network(None, device, machines.ranks_per_node)
    chosen = choose(RunPlanner(run.without_choices(), machines, device, network), run.choices)
    return chosen.candidate, describe_choice(run.choices, chosen, device)


def _applied(run: RunConfig, chosen: Candidate, note: str) -> Choice:
    return Choice(with_candidate(run.without_choices(), chosen), (note,))


def choose(planner: RunPlanner, choices: Sequence[str]) -> FoundLayout:
    """Return the fastest of the settings that a run leaves to the planner.

    Args:
        planner: of the run, with the defaults in their places.
        choices: see `RunConfig.choices`.

    Raises:
        ConfigError, TopologyError: none fits, or none is legal.
    """
    varies = frozenset[str]().union(*(_FIELDS[text] for text in choices))
    limits = Limits(USABLE * planner.limit_bytes)
    return find_layouts(planner.searched(), limits, varies, num_found=1, offload=False).found[0]


def describe_choice(choices: Sequence[str], chosen: FoundLayout, device: Device) -> str:
    """Return a line on what was chosen."""
    needs = f"{chosen.estimate.device_bytes / GB:.1f} of {device.memory_bytes / GB:.1f} GB"
    return f"{' and '.join(choices)}: {chosen.candidate.describe()}; planned for {device.name}: {needs} on a rank"


def warn_of_misfit(resolved: ResolvedRun, device_type: str) -> None:
    """Log a warning if a run is planned to need more memory than its devices have.

    Does not communicate, and draws no random numbers. It reads no weights and no data. A model that cannot be planned,
    such as one with layers of another package that read their values, trains all the same.

    Args:
        resolved: the run.
        device_type: torch's name, such as `cpu` or `cuda`.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            warning = describe_misfit(resolved, device_type)
    except Exception as problem:  # layers from outside may do anything
        get_logger().info("the memory of this run was not planned: %s: %s", type(problem).__name__, problem)
        return
    if warning is not None:
        get_logger().warning("warning: %s", warning)


def describe_misfit(resolved: ResolvedRun, device_type: str) -> str | None:
    """Return why a run is planned not to fit the devices of this machine; None = it fits, or they are not known."""
    machines = machines_here(resolved.plan.layout.world_size, device_type)
    device = this_device(device_type, machines.ranks_per_node)
    if device is None or _surely_fits(resolved, device.memory_bytes):
        return None
    given = input_of_model(resolved.run, resolved.model, resolved.plan, machines)
    fullest = max(plan_stages(given), key=lambda one: one.peak_bytes)
    if fullest.peak_bytes <= device.memory_bytes:
        return None
    name, largest = max(fullest.parts.items(), key=lambda part: part[1])
    where = f" of stage {fullest.stage}" if machines.world_size > 1 else ""
    return (
        f"the run is planned to need {fullest.peak_bytes / GB:.1f} GB on a rank{where}, which has "
        f"{device.memory_bytes / GB:.1f} GB, most of it for {name} ({largest / GB:.1f} GB); it may run out of memory. "
        "megatron-ds plan shows all parts, and what to change"
    )


def _surely_fits(resolved: ResolvedRun, memory_bytes: int) -> bool:
    """Return whether a rough bound of the memory that one rank could need is far below what it has."""
    hf, data, rows = resolved.hf, resolved.run.data, resolved.run.train.micro_batch_size
    shape, length = hf.core.shape(), data.seq_length + (data.target_length or data.seq_length)
    params = sum(prod(row.op.native_shape(hf.axis_sizes)) for row in hf.table.values())
    of_layers = _TOKEN_BYTES * length * shape.hidden_size + _SCORE_BYTES * shape.num_attention_heads * length**2
    kept = rows * (shape.num_layers * of_layers + _LOGIT_BYTES * length * shape.vocab_size)
    return _STATE_BYTES * params + kept < SURELY_FITS * memory_bytes
