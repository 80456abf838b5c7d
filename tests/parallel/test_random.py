"""Dropout masks: the same where ranks hold the same, different where they hold parts, replayed under recomputation."""

from functools import partial
from typing import Any

import pytest
import torch
from deepspeed.runtime.activation_checkpointing import checkpointing
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from megatron_ds.hf.config import read_model
from megatron_ds.layers.dropout import HiddenDropout
from megatron_ds.layers.param_spec import initial_shard, spec_of
from megatron_ds.layers.recompute import Recompute
from megatron_ds.models.context import BuildContext
from megatron_ds.models.sequential import SequentialModel
from megatron_ds.parallel.grid import Grid, Layout
from megatron_ds.parallel.random import RngStreams, derive_seed
from megatron_ds.parallel.tensor import TensorParallel
from tests.parity.cases import CONFIGS, VOCAB
from tests.ranks import run_grid

CPU = torch.device("cpu")


def test_seeds_are_stable() -> None:
    """Pinned: a change would silently change every run's initial weights."""
    assert derive_seed("init", 1234, "embedding.weight") == 911698866739074511
    assert derive_seed("a", 1) != derive_seed("a", 2) != derive_seed("b", 2)


def _masks(grid: Grid) -> dict[str, Any]:
    place = tuple(grid.coords.values())
    rng = RngStreams(5, grid, CPU)
    x = torch.ones(64)
    hidden = HiddenDropout(0.5, rng, differs=False)(x)
    split = HiddenDropout(0.5, rng, differs=True)(x)
    again = HiddenDropout(0.5, rng, differs=False)(x)
    return {"place": place, "hidden": hidden.tolist(), "split": split.tolist(), "again": again.tolist()}


def test_masks_on_each_axis() -> None:
    for layout in (Layout(tensor=2, data=2), Layout(tensor=2, context=2)):
        check_masks(layout)


def check_masks(layout: Layout) -> None:
    """Along the axis of 2 ranks that is not the tensor axis, masks differ."""
    seen = {(0, max(place[1:3]), place[3]): masks for masks in run_grid(_masks, layout) for place in [masks["place"]]}
    for data in (0, 1):
        a, b = seen[0, data, 0], seen[0, data, 1]
        assert a["hidden"] == b["hidden"] and a["again"] == b["again"], "replicated activations need equal masks"
        assert a["split"] != b["split"], "parts of a sequence need masks of their own"
        assert a["hidden"] != a["again"], "the stream must advance"
    assert seen[0, 0, 0]["hidden"] != seen[0, 1, 0]["hidden"], "ranks with other tokens need masks of their own"
    assert 0 < seen[0, 0, 0]["hidden"].count(0.0) < 64


def _gradients(grid: Grid, sequence: bool, mode: str, how: str, replay: bool = True) -> list[torch.Tensor]:
    """Gradients of two micro-batches in a pipeline's order: both forwards, then both backwards."""
    config = read_model({**CONFIGS["gpt2"], "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}).core
    rng = RngStreams(5, grid, CPU)
    checkpoint = {
        "torch": partial(torch_checkpoint, use_reentrant=False),
        "torch-reentrant": partial(torch_checkpoint, use_reentrant=True),
        "deepspeed": checkpointing.checkpoint,
        "deepspeed-non-reentrant": checkpointing.non_reentrant_checkpoint,
    }[how]
    recompute = Recompute(mode, checkpoint, rng if replay else None)
    model = SequentialModel(config.build_layers(BuildContext(TensorParallel(grid.tensor, sequence), rng, recompute)))
    for name, parameter in model.named_parameters():
        parameter.data.copy_(initial_shard(name, spec_of(parameter), 1, grid.model_axes))
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, VOCAB, (2, 8), generator=generator) for _ in range(2)]
    losses = [model({"input_ids": ids}, {"targets": ids}).sum() for ids in batches]
    for loss in losses:
        loss.backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("how", ["torch", "torch-reentrant", "deepspeed", "deepspeed-non-reentrant"])
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_replays_dropout(mode: str, how: str) -> None:
    for layout, sequence in ((Layout(), False), (Layout(tensor=2), True)):
        plain = run_grid(_gradients, layout, sequence, "none", "torch")
        again = run_grid(_gradients, layout, sequence, mode, how)
        for a, b in zip(plain, again):
            assert all(torch.equal(x, y) for x, y in zip(a, b)), (layout, mode, how)


def test_without_the_replay_gradients_are_wrong() -> None:
    plain = run_grid(_gradients, Layout(tensor=2), True, "none", "torch")
    wrong = run_grid(_gradients, Layout(tensor=2), True, "full", "torch", False)
    assert not all(torch.equal(x, y) for a, b in zip(plain, wrong) for x, y in zip(a, b))
