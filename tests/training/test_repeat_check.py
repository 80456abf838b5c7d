"""Micro-batches that are computed twice: nothing else changes, and one bit of a gradient ends the run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import megatron_ds as mds
from megatron_ds.config import RunConfig
from megatron_ds.errors import ConfigError, HardwareError
from megatron_ds.training.callbacks import Callback, RunState
from tests.ranks import preload
from tests.training.test_runs import losses

MakeRun = Callable[..., RunConfig]


class FlipBitOfGradient(Callback):
    """Changes the lowest bit of one element of a gradient on rank 1, at its `call`-th computation."""

    def __init__(self, call: int) -> None:
        self.call, self.calls = call, 0

    def on_run_start(self, state: RunState) -> None:
        layer = dict(state.engine.deepspeed.module.named_modules())["blocks.1.mlp"]
        layer.register_forward_hook(lambda module, given, out: out.register_hook(self.flip) and None)
        self.rank = state.rank

    def flip(self, gradient: Tensor) -> Tensor:
        self.calls += 1
        if self.rank != 1 or self.calls != self.call:
            return gradient
        changed = gradient.clone()
        changed.view(-1)[3:4].view(torch.int32).bitwise_xor_(1)
        return changed


def _run(make_run: MakeRun, name: str = "run", **train: Any) -> RunConfig:
    return make_run(name, data={"valid": []}, train={"eval_every": 0, **train}, checkpoint={"every": 2})


def test_a_bit_of_a_gradient_that_changes_once_names_its_rank(make_run: MakeRun) -> None:
    """Two micro-batches a step: the ninth backward pass is the first of the two before step 4, as 6 are in steps 1 to 3
    and two before step 2."""
    preload()
    run = _run(make_run, check_repeats=2)
    with pytest.raises(HardwareError) as caught:
        mds.train(run, nproc=2, callbacks=[FlipBitOfGradient(9)])
    message = str(caught.value)
    assert message.startswith("two computations of the same micro-batch differ on rank 1 (host "), message
    assert "in blocks.1.mlp." in message and "before step 4 (train.check_repeats=2)" in message
    assert message.endswith("; the same command resumes from checkpoint step_00000002")
    assert (Path(run.output) / "checkpoints" / "latest").read_text().strip() == "step_00000002"


def test_without_a_fault_every_check_passes_and_the_run_is_the_same_bit_for_bit(make_run: MakeRun) -> None:
    preload()
    checks = {"check_repeats": 2, "check_replicas": 1, "device_test": True, "stragglers": {"every": 2}}
    plain, checked = _run(make_run, "plain"), _run(make_run, "checked", **checks)
    for run in (plain, checked):
        mds.train(run, nproc=2, callbacks=[FlipBitOfGradient(-1)])
    assert losses(plain.output, "loss") == losses(checked.output, "loss")
    assert losses(plain.output, "grad_norm") == losses(checked.output, "grad_norm")


def test_weights_that_are_divided_are_refused(make_run: MakeRun) -> None:
    preload()
    run = make_run(train={"check_repeats": 5}, deepspeed={"zero_optimization": {"stage": 3}})
    message = r"train.check_repeats=5 cannot compute with weights that ZeRO-3 divides; try ZeRO stage 2, or train.c"
    with pytest.raises(ConfigError, match=message):
        mds.train(run, nproc=2)
    assert not Path(run.output).exists()
