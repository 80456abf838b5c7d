"""Communication and products of optimizers whose updates need whole matrices: Muon, and Adafactor's sums.

The axis `stage` are all ranks of a pipeline stage. Muon's bytes follow from the engine's own plan of the exchange, made
for the ranges that each rank of the stage holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil

from megatron_ds.config import OptimizerSection
from megatron_ds.engine.optimizers import OPTIMIZERS
from megatron_ds.engine.tensor_sums import as_matrices
from megatron_ds.planner.held_parameters import HeldParameter, HeldStage
from megatron_ds.planner.matrix_exchanges import DTYPE_BYTES, matrix_exchange, stage_ranks
from megatron_ds.planner.operations import Collective, Product, Work
from megatron_ds.planner.plan_input import DTYPES, PlanInput
from megatron_ds.planner.traffic.zero3 import sub_groups
from megatron_ds.planner.zero_settings import ZeroSettings

STAGE = "stage"
FP64_BYTES = 8


@dataclass(frozen=True)
class OptimizerTraffic:
    """Work of the update of a stage's matrices.

    Attributes:
        first: communication of the first rank.
        slowest: communication of the rank that sends or receives most in each collective, for which all others wait.
        products: of the rank that has most.
    """

    first: Work = field(default_factory=Work)
    slowest: Work = field(default_factory=Work)
    products: Work = field(default_factory=Work)

    def __add__(self, other: OptimizerTraffic) -> OptimizerTraffic:
        return OptimizerTraffic(self.first + other.first, self.slowest + other.slowest, self.products + other.products)


def optimizer_traffic(given: PlanInput, held: HeldStage, zero: ZeroSettings) -> OptimizerTraffic:
    """Return the communication of the optimizer's update of a stage, and its products."""
    section, found = given.config.optimizer, OptimizerTraffic()
    if section is None or section.name not in _TRAFFIC:
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


def _of_adafactor(update: _Update) -> OptimizerTraffic:
    """Sums in fp64 over the stage: a number for each row, column and matrix, and then one for each matrix."""
    if update.ranks == 1:
        return OptimizerTraffic()
    factored = bool(update.options.get("factored"))
    lengths, matrices = 0, 0
    for one in update.parameters:
        spec = as_matrices(one.spec, is_vector=not factored)
        assert spec.matrices is not None
        view = spec.matrices.view_ranges(spec.full_ranges, spec.shape)
        blocks, each, rows, columns = (stop - start for start, stop in view)
        matrices += each
        lengths += each + (each * (blocks * rows + columns) if factored else 0)
    sums = Work(Collective("all_reduce", STAGE, count * FP64_BYTES, update.ranks) for count in (lengths, matrices))
    return OptimizerTraffic(sums, sums)


def _of_muon(update: _Update) -> OptimizerTraffic:
    """Each matrix goes to its owner and back, in one or more rounds of two all-to-alls."""
    if not update.options.get("matrices"):
        return OptimizerTraffic()
    ranks, parameters = update.ranks, update.parameters
    dtype = str(update.section.options.get("ns_dtype", "bf16"))
    size = DTYPE_BYTES[dtype]
    exchange = matrix_exchange(update.given, update.held, update.zero, parameters)
    if exchange is None:  # a mean over the ranks
        total = sum(one.spec.numel for one in parameters)
        mean = int(Fraction(total * (ranks - 1), ranks * ranks)) * size
        found = Work({Collective("all_to_all", STAGE, mean, ranks, uneven_bytes=mean): 2})
        return OptimizerTraffic(found, found, _products_of_one(update, dtype))
    first, slowest = Work(), Work()
    for transfers in exchange.transfers if ranks > 1 else ():
        there = ((one.sender, one.owner, one.piece.numel) for one in transfers)
        back = ((one.owner, holder, one.piece.numel) for one in transfers for holder in one.holders)
        for parts in (there, back):
            sent, received = Counter[int](), Counter[int]()
            for sender, receiver, numel in parts:
                if sender != receiver:
                    sent[sender] += numel
                    received[receiver] += numel
            most = max((*sent.values(), *received.values()), default=0)
            for found, elements in ((first, sent[0]), (slowest, most)):
                num_bytes = elements * size
                found[Collective("all_to_all", STAGE, num_bytes, ranks, uneven_bytes=num_bytes)] += 1
    products = [Work() for _ in range(ranks)]
    for key, owner in exchange.owners.items():
        products[owner] += _products(*exchange.shapes[key], update, dtype)
    return OptimizerTraffic(first, slowest, max(products, key=lambda one: one.flops))


def _products(rows: int, columns: int, update: _Update, dtype: str) -> Work:
    """Return the products of `newton_schulz.orthogonalize` of a matrix."""
    short, long = sorted((rows, columns))
    sizes = ((short, short, long), (short, short, short), (short, long, short))
    name = str(DTYPES[dtype]).removeprefix("torch.")
    steps = int(str(update.section.options.get("ns_steps", 5)))
    return Work(Product(*one, dtype=name) for one in sizes).times(steps)


def _products_of_one(update: _Update, dtype: str) -> Work:
    """Return the products of a rank that has its share of the matrices, as if all were like the largest one."""
    shapes = Counter[tuple[int, int]]()
    for one in update.parameters:
        assert one.spec.matrices is not None
        view = one.spec.matrices.view_ranges(one.spec.full_ranges, one.spec.shape)
        blocks, matrices, rows, columns = (stop - start for start, stop in view)
        shapes[blocks * rows, columns] += matrices
    each = {shape: _products(*shape, update, dtype) for shape in shapes}
    largest = max(each.values(), key=lambda one: one.flops)
    total = sum(each[shape].flops * count for shape, count in shapes.items())
    return largest.times(ceil(total / (update.ranks * largest.flops)))


_TRAFFIC: Mapping[str, Callable[[_Update], OptimizerTraffic]] = {"adafactor": _of_adafactor, "muon": _of_muon}
