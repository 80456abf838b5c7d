"""The work of updates of whole matrices: on the rank that has most, as the engine's own plan of the exchange has it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from megatron_ds.engine.matrix_exchange import MatrixExchange, Transfer
from megatron_ds.engine.optimizers.newton_schulz import orthogonalize
from megatron_ds.parallel.grid import Axis
from megatron_ds.planner import matrix_exchanges
from megatron_ds.planner.held_parameters import HeldParameter, HeldStage, hold_stage
from megatron_ds.planner.input_of_config import input_of
from megatron_ds.planner.matrix_exchanges import matrix_exchange
from megatron_ds.planner.operations import Collective, Product, Work
from megatron_ds.planner.plan_input import Machines, PlanInput, Rows
from megatron_ds.planner.trace.recorder import Recorder
from megatron_ds.planner.traffic.optimizers import optimizer_traffic
from megatron_ds.planner.zero_settings import ZeroSettings, zero_settings

LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def run(ranks: int, optimizer: str = "muon", zero: int = 1, **parallel: int) -> PlanInput:
    engine = {
        "parallel": parallel,
        "deepspeed": {"zero_optimization": {"stage": zero}, "bf16": {"enabled": zero > 0}},
        "optimizer": {"name": optimizer, "lr": 1e-4},
        "global_batch_size": 8,
        "micro_batch_size": 1,
    }
    return input_of(LLAMA, engine, Rows(128), Machines(1, ranks, "cuda"))


def most_of_any_rank(given: PlanInput) -> list[int]:
    """Return the most elements that a rank sends or receives in each collective, by the engine's view of each rank."""
    held, zero, found = hold_stage(given, 0), zero_settings(given), list[int]()
    for group in (one for one in held.groups if one[0].spec.matrix_shape is not None):
        exchange = matrix_exchange(given, held, zero, group)
        assert exchange is not None
        ranks = exchange.stage.size
        views = [_of_rank(exchange, rank, given, held, zero, group) for rank in range(ranks)]
        for rounds in zip(*views):
            there = [max(_num(one.sent, rank), _num(one.gathered, rank)) for rank, one in enumerate(rounds)]
            back = [max(_num(one.scattered, rank), _num(one.received, rank)) for rank, one in enumerate(rounds)]
            found += [max(there), max(back)]
    return found


def _of_rank(
    exchange: MatrixExchange,
    rank: int,
    given: PlanInput,
    held: HeldStage,
    zero: ZeroSettings,
    group: Sequence[HeldParameter],
) -> list[Any]:
    """Return the rounds as a rank sees them."""
    numbers, ranks = {one.name: number for number, one in enumerate(held.parameters)}, exchange.stage.size
    holdings = [matrix_exchanges._holdings(given, zero, other, group, numbers) for other in range(ranks)]
    axis = Axis(ranks, rank, tuple(range(ranks)))
    return MatrixExchange(exchange.specs, holdings, axis, torch.device("meta"))._rounds


def _num(parts: Sequence[tuple[int, Transfer]], own: int) -> int:
    return sum(transfer.piece.numel for other, transfer in parts if other != own)


@pytest.mark.parametrize(("zero", "tensor", "ranks"), [(0, 2, 4), (1, 1, 8), (2, 2, 4)])
def test_an_exchange_takes_as_long_as_that_of_the_busiest_rank(zero: int, tensor: int, ranks: int) -> None:
    given = run(ranks, zero=zero, tensor=tensor)
    found = optimizer_traffic(given, hold_stage(given, 0), zero_settings(given))
    sizes = sorted(one.num_bytes for one in found.slowest.elements() if isinstance(one, Collective))
    assert sizes == sorted(2 * elements for elements in most_of_any_rank(given)) and sizes[-1] > 0
    first = sum(one.num_bytes for one in found.first.elements() if isinstance(one, Collective))
    assert first < sum(sizes) if ranks == 8 else first <= sum(sizes)


def test_products_are_those_of_the_iteration() -> None:
    given = run(1)
    held, zero, recorder = hold_stage(given, 0), zero_settings(given), Recorder()
    found = optimizer_traffic(given, held, zero)
    (group,) = (one for one in held.groups if one[0].spec.matrix_shape is not None)
    exchange = matrix_exchange(given, held, zero, group)
    assert exchange is not None and len(exchange.shapes) > 3 * 4
    with recorder:
        recorder.begin_pass()
        for shape in exchange.shapes.values():
            orthogonalize(torch.empty(shape, dtype=torch.bfloat16, device="meta"), 5, (3.0, -3.2, 1.2))
    assert found.products == Work({one: count for one, count in recorder.work.items() if isinstance(one, Product)})
    assert not found.first and not found.slowest


def test_ranks_share_the_products() -> None:
    alone, shared = (optimizer_traffic(one, hold_stage(one, 0), zero_settings(one)) for one in (run(1), run(4)))
    assert alone.products.flops / 4 <= shared.products.flops < alone.products.flops / 3


def test_many_ranks_share_them_in_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    given = run(4)
    exact = optimizer_traffic(given, hold_stage(given, 0), zero_settings(given))
    monkeypatch.setattr("megatron_ds.planner.matrix_exchanges.MOST_HOLDINGS", 1)
    mean = optimizer_traffic(given, hold_stage(given, 0), zero_settings(given))
    assert mean.products.flops == pytest.approx(exact.products.flops, rel=0.35)
    assert mean.first == mean.slowest


def test_sums_of_adafactor_are_those_of_every_rank() -> None:
    given = run(4, "adafactor")
    found = optimizer_traffic(given, hold_stage(given, 0), zero_settings(given))
    assert found.first == found.slowest and found.first and not found.products
