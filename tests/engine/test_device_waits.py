"""A step waits for its device once, whatever the engine, the stage of ZeRO and the number of micro-batches."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu.host_waits import host_waits
from megatron_ds.engine import device_type
from megatron_ds.hf.config import read_model
from megatron_ds.layers.moe import grouped, padding
from megatron_ds.models.sequential import OutputHead
from megatron_ds.parallel.grid import Grid
from tests.engine.device_waits import NAME, DeviceWaits
from tests.halves import swept
from tests.parity.cases import Recipe
from tests.parity.context_cases import GATHER_2X2, RING_2
from tests.parity.ours import Place, engine_on, micro_batches
from tests.ranks import rank_device, run_alone, run_grid

RECIPE = Recipe(steps=2)
ON_GPU = device_type() == "cuda"
BF16 = replace(RECIPE, precision="bf16")
# On CUDA: the transport of ranks that share a GPU, and the stream of its own that DeepSpeed's ZeRO-3 waits for
NOT_COUNTED = ("staged.py", "streams.py")


def _count(step: Callable[[], Any], batches: list[dict[str, Tensor]]) -> list[str]:
    """Return the places where a step waits, by the recording device or by torch's own detection on CUDA."""
    if rank_device().type == "cpu":
        with DeviceWaits(column for batch in batches for column in batch.values()) as waits:
            step()
        return waits.places
    return list(host_waits(step).elements())


def _waits(grid: Grid, directory: Path, place: Place, recipe: Recipe, added: str = "") -> list[list[str]]:
    """Return the places where each step waits; `added` is a wait in the head."""
    engine, _ = engine_on(grid, directory, place, recipe)
    for module in engine.deepspeed.module.modules():
        if added and isinstance(module, OutputHead):
            _add_wait(module, added)
    seen = []
    for step in range(recipe.steps):
        batches = micro_batches(grid, place, recipe, step)
        if rank_device().type != "cpu":
            batches = [{name: column.pin_memory() for name, column in batch.items()} for batch in batches]
        seen.append(_count(lambda given=batches: engine.train_step(given, recipe.lr), batches))  # type: ignore[misc]
    return seen


def _add_wait(head: OutputHead, added: str) -> None:
    own = head.forward

    def forward(*given: Any) -> Any:
        losses = own(*given)
        ADDED[added](losses.detach())
        return losses

    head.forward = forward  # type: ignore[method-assign]


ADDED: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda losses: losses.sum().item(),
    "tolist": lambda losses: losses.tolist(),
    "bool": lambda losses: bool((losses > 0).all()),
    "cpu": lambda losses: losses.cpu(),
    "nonzero": lambda losses: losses.nonzero(),
    "mask": lambda losses: losses[losses > 0],
    "constant": lambda losses: torch.tensor(1.0, device=losses.device),
}

CASES = [
    (Place(1, 1, 1, 0), RECIPE),
    (Place(1, 1, 1, 2), RECIPE),
    (Place(1, 1, 1, 3), BF16),
    (Place(1, 1, 1, 1), BF16),
    (Place(2, 1, 1, 1, True), RECIPE),
    (Place(1, 2, 1, 1), BF16),
    (GATHER_2X2, BF16),
    (RING_2, BF16),
    *swept((Place(1, 1, 2, 1), RECIPE)),
]


@pytest.mark.parametrize(("place", "recipe"), CASES, ids=lambda value: getattr(value, "precision", str(value)))
def test_a_step_waits_once(place: Place, recipe: Recipe, references: Any) -> None:
    """On CUDA a pipeline's first stages wait once more: DeepSpeed sends them a constant. The first step may do so."""
    directory, _ = references("llama", RECIPE)
    limit = 1 if place.pp == 1 else 2
    for rank in run_grid(_waits, place.layout, directory, place, recipe):
        assert all(1 <= len(step) <= limit for step in rank[1:]), "\n".join(rank[-1])


def _waits_of_experts(grid: Grid, directory: Path, place: Place, by_torch: bool) -> list[list[str]]:
    """Return the places where steps of a mixture wait: with the product that torch has for a GPU, or with the loop."""
    if not ON_GPU:
        padding.DEVICES = ()
        grouped._has_grouped_product = lambda left, right: by_torch  # type: ignore[assignment]
    return _waits(grid, directory, place, BF16)


def test_experts_on_a_rank_wait_for_nothing_more(references: Any) -> None:
    """Nor do their routers, whose numbers are read with the loss. The loop of products waits once for each layer."""
    directory, _ = references("mixtral-four-experts", RECIPE)
    place = Place(1, 1, 1, 1)
    ((_, last),) = run_grid(_waits_of_experts, place.layout, directory, place, True)
    assert len(last) == 1, "\n".join(last)
    if not ON_GPU:
        ((_, last),) = run_grid(_waits_of_experts, place.layout, directory, place, False)
        layers, num_micro_batches = read_model(directory).core.num_layers, 2
        assert len(last) == 1 + layers * num_micro_batches, "\n".join(last)


def test_every_kind_of_wait_is_seen(references: Any) -> None:
    directory, _ = references("llama", RECIPE)
    for added in ADDED:
        place = Place(1, 1, 1, 1)
        (rank,) = run_grid(_waits, place.layout, directory, place, RECIPE, added)
        seen, expected = len(rank[1]), 1 + 2  # once in each of two micro-batches
        assert seen == expected or (seen > expected and ON_GPU), (added, rank[1])  # CUDA's nonzero may wait twice


def _transfers() -> list[list[str]]:
    """Return what is counted of copies to the device and back, of host tensors, and of synchronization."""
    from deepspeed.accelerator import get_accelerator

    batch, there = torch.arange(4), torch.ones(4)
    with DeviceWaits([batch]) as allowed:
        on_device = batch.to(NAME, non_blocking=True)
        _ = on_device * 2 + there, batch.sum().item(), torch.tensor([1, 2]).tolist(), there.new_zeros(3)
    with DeviceWaits([batch]) as counted:
        _ = batch.to(NAME), there.to("cpu"), there.copy_(batch), torch.tensor([1], device=NAME)
        get_accelerator().synchronize()
    return [allowed.places, [place.partition(" < ")[0] for place in counted.places]]


@pytest.mark.skipif(ON_GPU, reason="the recording device stands in for CUDA on a CPU")
def test_the_recording_device_counts_transfers() -> None:
    allowed, counted = run_alone(_transfers)
    assert allowed == []
    assert counted == ["to the device", "to the host", "copy to the device", "tensor from values", "synchronize"]
