"""Runs whose ranks compare what they hold: a changed bit ends them, and is never saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_ds as mds
from megatron_ds.config import RunConfig
from megatron_ds.engine.replica_checksums import Difference
from megatron_ds.errors import HardwareError, LaunchError
from megatron_ds.training.callbacks import Callback, RunState
from megatron_ds.training.replica_check import describe_differences
from tests.ranks import preload

MakeRun = Callable[..., RunConfig]


class FlipBit(Callback):
    """Changes the lowest bit of a weight on rank 1 after a step, or after its validation."""

    def __init__(self, step: int, event: str = "on_step_end") -> None:
        self.step = step
        setattr(self, event, self.flip)

    def flip(self, state: RunState) -> None:
        if state.rank == 1 and state.step == self.step:
            parameters: dict[str, Any] = dict(state.engine.local_parameters())
            parameters["blocks.1.mlp.down.weight"].data.view(-1)[7:8].view(torch.int32).bitwise_xor_(1)


def _train(make_run: MakeRun, every: int, zero: int, flip_after: int) -> tuple[str, list[str]]:
    """The error of a run that saves after steps 2 and 4, and its checkpoints."""
    preload()
    run = make_run(
        deepspeed={"zero_optimization": {"stage": zero}},
        data={"valid": []},
        train={"check_replicas": every, "eval_every": 0},
        checkpoint={"every": 2},
    )
    with pytest.raises(HardwareError) as caught:
        mds.train(run, nproc=2, callbacks=[FlipBit(flip_after)])
    folder = Path(run.output) / "checkpoints"
    assert (folder / "latest").read_text().strip() == sorted(folder.glob("step_*"))[-1].name
    return str(caught.value), sorted(path.name for path in folder.glob("step_*"))


@pytest.mark.sweep
def test_a_bit_that_flips_while_the_run_validates_is_not_saved(make_run: MakeRun) -> None:
    preload()
    run = make_run(train={"check_replicas": 1, "eval_every": 4}, checkpoint={"every": 2})
    with pytest.raises(HardwareError, match=r"before saving step 4 .* resumes from checkpoint step_00000002$"):
        mds.train(run, nproc=2, callbacks=[FlipBit(4, "on_validation_end")])


@pytest.mark.parametrize(
    ("every", "zero", "flip_after", "found", "saved"),
    [
        pytest.param(1, 0, 3, "after step 3", 2, id="after the step", marks=pytest.mark.sweep),
        pytest.param(4, 1, 3, "in step 4", 2, id="before ZeRO overwrites it"),
        pytest.param(100, 0, 3, "before saving step 4", 2, id="before a save"),
    ],
)
def test_a_flipped_bit_of_a_weight_ends_the_run_and_the_last_good_checkpoint_stays(
    make_run: MakeRun, every: int, zero: int, flip_after: int, found: str, saved: int
) -> None:
    text, checkpoints = _train(make_run, every, zero, flip_after)
    assert text.startswith("copies of blocks.1.mlp.down.weight (weights)"), text
    assert f", {found} (train.check_replicas={every})" in text and "rank 1 (host " in text
    assert text.endswith(f"; the same command resumes from checkpoint step_0000000{saved}")
    assert checkpoints == [f"step_0000000{saved}"]


def test_the_message_names_hosts_and_the_size_of_the_majority() -> None:
    hosts = ["a", "a", "b", "b"]
    found = [Difference(f"w{number}", {1: [0, 1, 3], 2: [2]}) for number in range(5)]
    assert describe_differences(found, hosts) == (
        "copies of w0, w1, w2 and 2 more on rank 2 (host b) differ from those of 3 other ranks"
    )
    tie = [Difference("w", {1: [0], 2: [3]})]
    assert describe_differences(tie, hosts) == (
        "copies of w differ between rank 0 (host a) and rank 3 (host b), of which none is in the majority,"
    )


def test_it_counts_as_a_failure_of_ranks_so_that_it_ends_with_status_1_and_may_be_restarted() -> None:
    assert issubclass(HardwareError, LaunchError)
