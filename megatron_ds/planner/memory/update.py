"""Memory of an optimizer besides state of each element: what an update allocates for a while, and state of matrices.

Updates come last in a step, when no activations are left. They can need most memory where a run has few tokens, or
where matrices are updated as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

from megatron_ds.engine.matrix_exchange import ROUND_ELEMENTS, MatrixExchange, MatrixKey, Transfer
from megatron_ds.engine.optimizers import OPTIMIZERS
from megatron_ds.engine.tensor_sums import as_matrices
from megatron_ds.planner.held_parameters import HeldParameter, HeldStage
from megatron_ds.planner.matrix_exchanges import DTYPE_BYTES, matrix_exchange, stage_ranks
from megatron_ds.planner.plan_input import PlanInput
from megatron_ds.planner.zero_settings import ZeroSettings

FP32, FP64 = 4, 8  # bytes

UpdateBytes = Callable[[Sequence[HeldParameter], Sequence[int]], int]
"""(parameters of one update, elements of the tensors that they are in) -> bytes that this needs."""


def update_bytes_of(given: PlanInput, held: HeldStage, zero: ZeroSettings) -> UpdateBytes:
    """Return a function for the memory of updates by the optimizer of a run, on the rank that needs most."""
    section = given.config.optimizer
    if section is None or not given.config.trains:
        return lambda parameters, sizes: 0
    kind = OPTIMIZERS.get(section.name, "optimizer.name")

    def needed(parameters: Sequence[HeldParameter], sizes: Sequence[int]) -> int:
        options = kind.group_options(parameters[0].spec, section)
        if options.get("matrices"):
            item = DTYPE_BYTES[str(section.options.get("ns_dtype", "bf16"))]
            return _of_muon(given, held, zero, item, parameters)
        if section.name == "adafactor":
            return _of_adafactor(bool(options.get("factored")), parameters, sizes)
        return kind.update_bytes(sizes)

    return needed


# ---- Adafactor -------------------------------------------------------------------------------------------------------


def factor_bytes_of(given: PlanInput, held: HeldStage) -> Mapping[str, int]:
    """Return name -> bytes of the averages of rows and columns, which every rank has that has some of the elements."""
    section = given.config.optimizer
    if section is None or section.name != "adafactor" or not given.config.trains:
        return {}
    kind = OPTIMIZERS.get(section.name, "optimizer.name")
    factored = [one for one in held.trained if kind.group_options(one.spec, section).get("factored")]
    return {one.name: FP32 * _rows_and_columns(one, factored=True)[1] for one in factored}


def _rows_and_columns(one: HeldParameter, *, factored: bool) -> tuple[int, int]:
    """Return the number of matrices of a full parameter, and that of all their rows and columns."""
    spec = as_matrices(one.spec, is_vector=not factored)
    assert spec.matrices is not None
    view = spec.matrices.view_ranges(spec.full_ranges, spec.shape)
    blocks, matrices, rows, columns = (stop - start for start, stop in view)
    return matrices, matrices * (blocks * rows + columns)


def _of_adafactor(factored: bool, parameters: Sequence[HeldParameter], sizes: Sequence[int]) -> int:
    """Sums in fp64 of weights and updates, and squares of a matrix, or of all elements without rows."""
    found = [_rows_and_columns(one, factored=factored) for one in parameters]
    sums = FP64 * sum(2 * matrices + factored * lengths for matrices, lengths in found)
    largest = max(one.numel for one in parameters) if factored else max(sizes, default=0)
    return sums + FP32 * min(largest, max(sizes, default=0))


# ---- Muon ------------------------------------------------------------------------------------------------------------


def _of_muon(
    given: PlanInput, held: HeldStage, zero: ZeroSettings, item: int, parameters: Sequence[HeldParameter]
) -> int:
    exchange, ranks = matrix_exchange(given, held, zero, parameters), stage_ranks(given)
    if exchange is not None:
        return max(_of_exchange(exchange, rank, item) for rank in range(ranks))
    largest = max(prod(one.spec.shape) for one in parameters)
    owned = max(largest, min(ROUND_ELEMENTS, sum(one.spec.numel for one in parameters) // ranks))
    return item * (4 * owned + 4 * largest)


def _of_exchange(exchange: MatrixExchange, rank: int, item: int) -> int:
    """Return the most that a rank needs at once in `MatrixExchange.run`.

    Args:
        exchange: the exchange.
        rank: index of the rank in its stage.
        item: bytes of an element that is exchanged.
    """
    most = before = 0  # results of the round before, and what it received, are there until they are replaced
    for transfers in exchange.transfers:
        owned = {one.key: exchange.shapes[one.key] for one in transfers if one.owner == rank}
        matrices = item * sum(prod(shape) for shape in owned.values())
        sent, gathered, scattered, received = (
            item * sum(one.piece.numel for one in parts) for parts in _parts(transfers, rank)
        )
        if exchange.stage.size == 1:
            gathered = received = 0  # what is sent is what comes
        read = FP32 * max((one.piece.numel for one in transfers if rank in one.holders), default=0)
        most = max(most, before + matrices + sent + max(read, gathered))
        arrived = max(gathered, sent if exchange.stage.size == 1 else 0)
        most = max(most, before + matrices + arrived + _orthogonalized(exchange, owned, item))
        most = max(most, 2 * matrices + arrived + scattered + received)
        before = 2 * matrices + max(received, scattered if exchange.stage.size == 1 else 0)
    return most


def _parts(transfers: Sequence[Transfer], rank: int) -> list[list[Transfer]]:
    """Return what a rank sends to owners, gets as an owner, sends back as one, and gets back."""
    held = [one for one in transfers if rank in one.holders]
    own = [one for one in transfers if one.owner == rank]
    return [[one for one in held if one.sender == rank], own, [one for one in own for _ in one.holders], held]


def _orthogonalized(exchange: MatrixExchange, owned: Mapping[MatrixKey, tuple[int, int]], item: int) -> int:
    """Return the most that `orthogonalize` needs: results, and two matrices and two products of the one at hand.

    The matrices of a parameter's experts are one stack, a copy.
    """
    stacks: dict[object, list[tuple[int, int]]] = {}
    for key, shape in owned.items():
        is_of_experts = exchange.specs[key.parameter].is_of_experts
        stacks.setdefault(key.parameter if is_of_experts else key, []).append(shape)
    most = results = 0
    for shapes in stacks.values():
        count, (rows, columns) = len(shapes), shapes[0]
        each, product = count * rows * columns, count * min(rows, columns) ** 2
        most = max(most, results + 2 * each + 2 * product + (each if count > 1 else 0))
        results += each
    return item * most
