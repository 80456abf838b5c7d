"""Communication of optimizers whose updates need whole matrices: Muon's exchange, and Adafactor's sums.

The axis `stage` are all ranks of a pipeline stage. Muon's bytes follow from the engine's own plan of the exchange, made
for the ranges that each rank of the stage holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_ds.config import OptimizerSection
from megatron_ds.engine.optimizers import OPTIMIZERS
from megatron_ds.engine.tensor_sums import as_matrices
from megatron_ds.planner.held_parameters import HeldParameter, HeldStage
from megatron_ds.planner.matrix_exchanges import DTYPE_BYTES, matrix_exchange, stage_ranks
from megatron_ds.planner.operations import Collective, Work
from megatron_ds.planner.plan_input import PlanInput
from megatron_ds.planner.traffic.zero3 import sub_groups
from megatron_ds.planner.zero_settings import ZeroSettings

STAGE = "stage"
FP64_BYTES = 8


def optimizer_traffic(given: PlanInput, held: HeldStage, zero: ZeroSettings) -> Work:
    """Return the communication of the optimizer's update on the first rank of a stage."""
    section, found = given.config.optimizer, Work()
    ranks = stage_ranks(given)
    if section is None or ranks == 1 or section.name not in _TRAFFIC:
        return found
    for group in held.groups:
        options = OPTIMIZERS.get(section.name).group_options(group[0].spec, section)
        for parameters in sub_groups(given, group, zero) if zero.stage == 3 else [group]:
            found += _TRAFFIC[section.name](_Update(given, held, zero, section, options, parameters))
    return found


@dataclass(frozen=True)
class _Update:
    """An update of the parameters of one group, or of one of ZeRO-3's subgroups.

    Attributes:
        given, held, zero: the run, the parameters of the stage, and DeepSpeed's settings.
        section: the optimizer, as in the run file.
        options: of the parameters' group.
        parameters: that are updated.
    """

    given: PlanInput
    held: HeldStage
    zero: ZeroSettings
    section: OptimizerSection
    options: Mapping[str, object]
    parameters: Sequence[HeldParameter]

    @property
    def ranks(self) -> int:
        """Ranks of the stage."""
        return stage_ranks(self.given)


def _of_adafactor(update: _Update) -> Work:
    """Sums in fp64 over the stage: a number for each row, column and matrix, and then one for each matrix."""
    factored = bool(update.options.get("factored"))
    lengths, matrices = 0, 0
    for one in update.parameters:
        spec = as_matrices(one.spec, is_vector=not factored)
        assert spec.matrices is not None
        view = spec.matrices.view_ranges(spec.full_ranges, spec.shape)
        blocks, each, rows, columns = (stop - start for start, stop in view)
        matrices += each
        lengths += each + (each * (blocks * rows + columns) if factored else 0)
    return Work(Collective("all_reduce", STAGE, count * FP64_BYTES, update.ranks) for count in (lengths, matrices))


def _of_muon(update: _Update) -> Work:
    """Each matrix goes to its owner and back, in one or more rounds of two all-to-alls."""
    if not update.options.get("matrices"):
        return Work()
    ranks, parameters = update.ranks, update.parameters
    size = DTYPE_BYTES[str(update.section.options.get("ns_dtype", "bf16"))]
    exchange = matrix_exchange(update.given, update.held, update.zero, parameters)
    if exchange is None:  # a mean over the ranks
        total = sum(one.spec.numel for one in parameters)
        mean = int(Fraction(total * (ranks - 1), ranks * ranks)) * size
        return Work({Collective("all_to_all", STAGE, mean, ranks, uneven_bytes=mean): 2})
    found = Work()
    for transfers in exchange.transfers:
        there = [one.piece.numel for one in transfers if one.sender == 0 and one.owner != 0]
        back = [one.piece.numel for one in transfers for holder in one.holders if one.owner == 0 and holder != 0]
        for elements in (sum(there), sum(back)):
            found[Collective("all_to_all", STAGE, elements * size, ranks, uneven_bytes=elements * size)] += 1
    return found


_TRAFFIC: Mapping[str, Callable[[_Update], Work]] = {"adafactor": _of_adafactor, "muon": _of_muon}
