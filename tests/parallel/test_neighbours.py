"""Exchanges through the memory of a machine: every part arrives, halves are not mixed up, lost ranks are named."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ds import processes
from megatron_ds.parallel import neighbours
from megatron_ds.parallel.collectives import (
    all_gather_dim0,
    all_reduce_,
    begin_all_gather_dim0,
    begin_reduce_scatter_dim0,
    reduce_scatter_dim0,
)
from megatron_ds.parallel.failure import lost_peer
from megatron_ds.parallel.grid import Axis, Grid, Layout, with_neighbours
from tests.parallel.wire_bytes import counting
from tests.parity.cases import Recipe
from tests.parity.ours import Place, engine_on, micro_batches
from tests.parity.reference import train_reference
from tests.ranks import run_alone, run_grid

LENGTH, WIDTH = 12, 7  # several pieces of `SMALL` bytes, the last of which is not full
SMALL = 3 * 64
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def _axis(grid: Grid) -> Axis:
    neighbours.HALF_BYTES = SMALL
    axis = with_neighbours(grid).tensor
    assert axis.neighbours is not None
    return axis


def _exchanges(grid: Grid) -> list[str]:
    """What is wrong."""
    axis, over_tcp = _axis(grid), grid.tensor
    t, rank, wrong = axis.size, axis.rank, []
    for round_, dtype in enumerate(DTYPES * 4):
        each = [
            torch.randint(-9, 9, (WIDTH, LENGTH), generator=torch.Generator().manual_seed(10 * round_ + one)).to(dtype)
            for one in range(t)
        ]
        own, whole = each[rank].t(), sum(each).t()
        if (round_ + rank) % t == 0:
            time.sleep(0.02)  # a rank that comes late must not find newer parts
        parts = whole.chunk(t)
        (gathered, first), (scattered, second) = (
            begin_all_gather_dim0(parts[rank], axis),
            begin_reduce_scatter_dim0(own, axis),
        )
        assert first is second is None, "it is already done"
        summed = all_reduce_(own.contiguous(), axis)
        for name, found, wanted in (
            ("gather", gathered, whole),
            ("reduce-scatter", scattered, parts[rank]),
            ("sum", summed, whole),
            ("sum of one number", all_reduce_(torch.tensor(rank + 1.0), axis), torch.tensor(t * (t + 1) / 2)),
            ("nothing", all_gather_dim0(own[:0].contiguous(), axis), own[:0]),
            ("sum of a transposed tensor", all_reduce_(own.clone(memory_format=torch.preserve_format), axis), whole),
            ("as over TCP", reduce_scatter_dim0(own, axis), reduce_scatter_dim0(own, over_tcp)),
        ):
            if found.dtype != wanted.dtype or not torch.equal(found, wanted):
                wrong.append(f"{name} in round {round_}, {dtype}")
    return wrong


@pytest.mark.parametrize("t", [2, 3])
def test_parts_arrive_where_they_belong(t: int) -> None:
    assert run_grid(_exchanges, Layout(tensor=t)) == [[]] * t


def _bits(grid: Grid) -> torch.Tensor:
    own = torch.randn(4000, generator=torch.Generator().manual_seed(grid.rank))
    return all_reduce_(own, _axis(grid))


def test_sums_have_the_same_bits_on_every_rank() -> None:
    first, *others = run_grid(_bits, Layout(tensor=3))
    assert all(torch.equal(first, other) for other in others)


def _two_machines(grid: Grid) -> list[Any]:
    before = len(os.listdir("/proc/self/fd"))
    if grid.rank == 1:
        made = neighbours._offer
        neighbours._offer = lambda rank, size: (  # type: ignore[assignment]
            replace(made(rank, size)[0], machine=("another", "pid:[1]")),
            {},
        )
    alone = with_neighbours(grid).tensor
    left = len(os.listdir("/proc/self/fd")) - before if grid.rank == 0 else 0
    return [alone.neighbours, left, all_gather_dim0(torch.tensor([float(grid.rank)]), alone).tolist()]


def test_ranks_of_two_machines_send_messages() -> None:
    assert run_grid(_two_machines, Layout(tensor=2)) == [[None, 0, [0.0, 1.0]]] * 2


def _sandbox(grid: Grid) -> list[Any]:
    if grid.rank == 1:
        processes._BOOT_ID = Path("/proc/not/here")
    alone = with_neighbours(grid).tensor
    return [alone.neighbours, all_gather_dim0(torch.tensor([float(grid.rank)]), alone).tolist()]


def test_a_rank_whose_machine_cannot_be_told_sends_messages() -> None:
    assert run_grid(_sandbox, Layout(tensor=2)) == [[None, [0.0, 1.0]]] * 2


def _lonely(grid: Grid, dies: bool) -> str:
    axis = _axis(grid)
    assert axis.neighbours is not None
    axis.neighbours.timeout_s = 0.2
    dist.barrier()
    said = ""
    if grid.rank == 1 and dies:
        for pipe in axis.neighbours._to.values():
            os.dup2(os.open(os.devnull, os.O_WRONLY), pipe)  # closes the pipe, as the end of its process does
    elif grid.rank == 0:
        try:
            all_reduce_(torch.ones(3), axis)
        except (ConnectionResetError, TimeoutError) as problem:
            said = f"{problem} {lost_peer(problem)}"
    dist.barrier()
    return said


@pytest.mark.parametrize(
    ("dies", "words"),
    [
        (True, "connection closed by rank 1 of the axis True"),
        (False, "timed out waiting for rank 1 of the axis, 0.2 s True"),
    ],
)
def test_a_rank_that_does_not_come(dies: bool, words: str) -> None:
    assert run_grid(_lonely, Layout(tensor=2), dies)[0] == words


def _counted(grid: Grid, directory: Path, sp: bool) -> dict[str, Any]:
    place, recipe = Place(2, sp=sp), Recipe()
    engine, _ = engine_on(grid, directory, place, recipe)
    with counting() as wire:
        engine.train_step(micro_batches(grid, place, recipe, 0), recipe.lr)
    return wire.calls


def test_engines_exchange_through_memory_with_sequence_parallelism(tmp_path: Path) -> None:
    """What is left on the wire are maxima of the softmax and statistics of the step."""
    run_alone(train_reference, "llama", Recipe(steps=0), tmp_path)
    plain, sequence = (run_grid(_counted, Layout(tensor=2), tmp_path, sp)[0] for sp in (False, True))
    assert "send" not in sequence
    assert sequence["all_reduce"] < 0.5 * plain["all_reduce"], (plain, sequence)
